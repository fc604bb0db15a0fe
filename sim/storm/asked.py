"""What clients ask for, and the one text that each of them must get, whatever happens.

A text depends on the prompt, the seed, the choice and the position alone. An engine that is given
another prefix than the true one makes other tokens, as a model would.
"""

from dataclasses import dataclass, field
from random import Random
from zlib import crc32

from shared.messages import RequestSpec, Sampling
from shared.tokens import count
from sim.text import ROW_TOKENS, output, prompt_of

MODEL = "storm"
FOREIGN = 7_919
"""How far a text goes astray after a wrong prefix."""


@dataclass(frozen=True, slots=True)
class Wish:
    """One client's call: `choices` requests with one parent."""

    number: int
    at: float
    prompt_tokens: int
    lengths: tuple[int, ...]
    """Of each choice: where the model would end it."""
    max_tokens: int
    seed: int
    tenant: str = "default"
    priority: int = 0
    abort_s: float | None = None
    """The client hangs up so long after its call."""
    stop_at: int | None = None
    """A stop string is complete with this output token."""
    expires_s: float | None = None
    reads_tps: float | None = None
    """Tokens a second that it reads; None: as they come."""


@dataclass(slots=True)
class Asked:
    """One request under way, as its client sees it."""

    wish: Wish
    choice: int
    gateway: str
    sent_at: float
    spec: RequestSpec
    length: int
    """Tokens of the whole output."""
    got: int = 0
    outcome: str = ""
    """Empty: it is open."""
    ended_at: float = 0.0
    detail: str = ""
    paused_at: float = 0.0
    """Unread tokens when the mesh was last told that the reader is behind; 0: it keeps up."""
    read: float = 0.0
    read_at: float = 0.0

    def unread(self, now: float) -> float:
        """Tokens that its reader has not taken yet. To be asked now and then: it reads on."""
        tps = self.wish.reads_tps
        if tps is not None:
            self.read = min(self.got, self.read + tps * (now - self.read_at))
        self.read_at = now
        return self.got - self.read

    @property
    def request_id(self) -> str:
        return self.spec.request_id


def spec_of(wish: Wish, choice: int, gateway: str, parent: str) -> RequestSpec:
    """As the gateway makes it."""
    return RequestSpec(
        request_id=f"{parent}-{choice}",
        parent_id=parent,
        choice=choice,
        gateway=gateway,
        model=MODEL,
        tenant=wish.tenant,
        priority=wish.priority,
        prompt=prompt_of(wish.prompt_tokens),
        max_tokens=wish.max_tokens,
        sampling=Sampling(seed=wish.seed),
        stream=True,
    )


@dataclass(slots=True)
class Texts:
    """The model: lengths and tokens of every request, by what decides them."""

    lengths: dict[tuple[int, int], int] = field(default_factory=dict)
    """(Seed, choice) to where the model ends the output."""
    _begins: dict[tuple[int, int, int], int] = field(default_factory=dict)

    def begins(self, spec: RequestSpec) -> int:
        """Where this request's text stands in the row of all texts."""
        key = (spec.sampling.seed, spec.choice, len(spec.prompt))
        found = self._begins.get(key)
        if found is None:
            found = self._begins[key] = crc32(repr(key).encode()) % (ROW_TOKENS - FOREIGN)
        return found

    def true(self, spec: RequestSpec, position: int, tokens: int) -> bytes:
        """Output tokens from `position` on, packed."""
        return output(self.begins(spec), position, tokens)

    def whole(self, spec: RequestSpec) -> int:
        """Tokens of the whole output."""
        return min(self.lengths[spec.sampling.seed, spec.choice], spec.max_tokens)

    def continued(self, spec: RequestSpec, prefix: bytes) -> int:
        """Where in the row a text goes on (less its position) that was given this prefix."""
        begins = self.begins(spec)
        if prefix == output(begins, 0, count(prefix)):
            return begins
        return (begins + FOREIGN + crc32(prefix)) % ROW_TOKENS


def drawn_wish(rng: Random, number: int, at: float, prompt_max: int, output_max: int) -> Wish:
    """One client, with its habits."""
    choices = rng.choice((1, 1, 1, 1, 2, 3))
    lengths = tuple(1 + int(rng.expovariate(2.0 / output_max)) for _ in range(choices))
    habit = rng.random()
    return Wish(
        number=number,
        at=at,
        prompt_tokens=rng.randint(1, prompt_max),
        lengths=lengths,
        max_tokens=rng.randint(max(1, output_max // 3), output_max),
        seed=rng.getrandbits(31),
        tenant=rng.choice(("default", "a", "b")),
        priority=rng.choice((0, 0, 0, 1, 2)),
        abort_s=rng.uniform(0.0, 4.0) if habit < 0.08 else None,
        stop_at=rng.randint(1, output_max) if 0.08 <= habit < 0.16 else None,
        expires_s=rng.uniform(1.0, 12.0) if 0.16 <= habit < 0.20 else None,
        reads_tps=rng.uniform(3.0, 30.0) if 0.20 <= habit < 0.28 else None,
    )
