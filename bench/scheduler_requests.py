"""Loads for `bench.scheduler_cost`: what requests ask for, and what the estimator and engines say.

Each stresses what others leave alone: classes of predicted outputs, accounts of many tenants, an
order by deadlines, beginnings of prompts that workers have, a full history of lengths that changes,
batches of a hundred and more behind each gate.
"""

from dataclasses import dataclass
from random import Random

from shared import tokens
from shared.messages import LengthClass, LengthForecast, RequestSpec

PROMPTS = tuple(tokens.pack([0] * size) for size in (16, 60, 120, 250, 500, 1000, 2000))
MODEL = "m"
MAX_TOKENS = 1024
HISTORY = 1_000
SESSIONS = 500
"""Different beginnings of prompts."""
SESSION_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Load:
    """What comes, beside 10,000 waiting requests and 1,000 workers."""

    name: str
    tenants: int = 16
    ttft_ms: tuple[int | None, ...] = (None, 2_000, 10_000)
    """One of these each."""
    deadline_ms: tuple[int | None, ...] = (None,)
    predicted: bool = False
    """Requests say how long they will be."""
    sharing: bool = False
    """Workers share the KV of equal beginnings, and prompts have some."""
    history: bool = False
    """The estimator knows the lengths of a thousand requests, and says so again and again."""
    kv_tokens: int = 16_384
    """Of each worker."""
    told: bool = False
    """The gateway asks for predictions."""
    waiting_share: float = 1.0
    """Of the requests that are to wait."""
    open_each: int = 0
    """Requests for each worker, at least, wherever they are."""
    constants: tuple[tuple[str, float], ...] = ()

    def spec(self, number: int, rng: Random) -> RequestSpec:
        """The next request."""
        prompt = rng.choice(PROMPTS)
        if self.sharing:
            session = rng.randrange(SESSIONS)
            prompt = tokens.pack([session] * SESSION_TOKENS) + prompt
        return RequestSpec(
            request_id=f"r{number}",
            parent_id="",
            gateway="g",
            model=MODEL,
            tenant=f"t{number % self.tenants}",
            prompt=prompt,
            max_tokens=MAX_TOKENS,
            ttft_deadline_ms=rng.choice(self.ttft_ms),
            deadline_ms=rng.choice(self.deadline_ms),
            predicted_output_tokens=rng.randint(1, MAX_TOKENS) if self.predicted else None,
        )

    def forecast(self, version: int, rng: Random) -> LengthForecast | None:
        """What the estimator says now; None: nothing."""
        if not self.history:
            return None
        lengths = [min(MAX_TOKENS, round(rng.expovariate(1 / 300)) + 1) for _ in range(HISTORY)]
        prompts = [tokens.count(rng.choice(PROMPTS)) for _ in lengths]
        predicted = [max(1, length // 2) for length in lengths] if self.predicted else []
        known = LengthClass(
            model=MODEL,
            lengths=tokens.pack(lengths),
            finished=HISTORY * version,
            censored=bytes(length == MAX_TOKENS for length in lengths),
            prompts=tokens.pack(prompts),
            predicted=tokens.pack(predicted),
        )
        return LengthForecast(version=version, classes=(known,))


FAR = (None, 8_000, 20_000, 60_000, 240_000)
"""Limits of which some are in reach when a request comes and not when its turn does; with none at
all in some requests, the queue fills however many are refused."""
USUAL = Load("usual")
LOADS = {
    load.name: load
    for load in (
        USUAL,
        Load("one-tenant", tenants=1, ttft_ms=(None,), history=True),
        Load("tenants", tenants=1_000, history=True),
        Load(
            "crowd",
            tenants=20,
            history=True,
            constants=(("hoard_deviations", 3.0),),
        ),
        Load("predicted", predicted=True, history=True, told=True),
        Load("deadlines", ttft_ms=FAR, deadline_ms=FAR, history=True, told=True),
        Load("sharing", sharing=True, history=True),
        Load("large", kv_tokens=131_072, history=True),
        Load("calm", waiting_share=0.0, open_each=30, kv_tokens=65_536, history=True),
    )
}
