"""The books of leases that vLLM runs: how far each may go, and which KV blocks are set aside.

vLLM gives out KV block by block as a request grows, and takes it back from another one where none
is left. Here blocks are set aside for a whole lease when it is given (`leased_blocks`), and no more
than there are: so vLLM itself never runs out. A lease that pauses keeps its claim, though vLLM has
its KV in the prefix cache only: it can always come back.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from services.worker.engines.api import BadOrder, OutOfMemory
from services.worker.engines.vllm_sampling import KeyedRow
from services.worker.sampling import end_ids
from shared.memory import leased_blocks
from shared.messages import FinishReason, RequestSpec, SliceOrder
from shared.tokens import unpack


@dataclass(slots=True)
class Lease:
    """One request that is held."""

    spec: RequestSpec
    attempt: int
    prompt: tuple[int, ...]
    output: list[int]
    until: int
    """Output position up to which blocks are set aside."""
    wanted: int
    """Output position up to which it may go; more than `until` if there was no room."""
    ends: frozenset[int]
    key: str = ""
    """Its name inside vLLM while it is there."""
    fresh: bool = True
    """No token since it was put into vLLM: its prompt is being read."""
    finish_reason: FinishReason | None = None

    @property
    def position(self) -> int:
        """Output tokens so far."""
        return len(self.output)

    @property
    def tokens_left(self) -> int:
        """Most tokens that the request, not the lease, may still make."""
        return max(0, self.spec.max_tokens - self.position)

    @property
    def done(self) -> bool:
        """No token is wanted of it, not even the one with which a prompt is scored."""
        return not self.tokens_left and not (self.spec.sampling.prompt_logprobs and not self.output)

    @property
    def paused(self) -> bool:
        """Its lease is used up."""
        return self.position >= self.until

    def row(self, key: str) -> KeyedRow:
        """What the sampler must know of it, as it stands."""
        spec = self.spec
        return KeyedRow(key, spec.sampling, spec.choice, self.prompt, tuple(self.output))

    def take(self, token: int) -> bool:
        """Append a token. True if it is an ending token."""
        self.output.append(token)
        self.fresh = False
        ending = token in self.ends
        if ending:
            self.finish_reason = "stop"
        elif self.position >= self.spec.max_tokens:
            self.finish_reason = "length"
        return ending


class LeaseBook:
    """All leases that are held, within so many blocks."""

    def __init__(self, blocks: int, block_tokens: int) -> None:
        self.blocks = blocks
        self.block_tokens = block_tokens
        self.blocks_used = 0
        self._leases: dict[str, Lease] = {}

    def __iter__(self) -> Iterator[Lease]:
        return iter(self._leases.values())

    def get(self, request_id: str) -> Lease | None:
        """The lease of this request, if it is held."""
        return self._leases.get(request_id)

    def admit(self, leases: Sequence[Lease]) -> None:
        """Hold all of these, or raise OutOfMemory."""
        needs = [self._blocks(lease, lease.until) for lease in leases]
        size = self.block_tokens
        for lease, need in zip(leases, needs, strict=True):
            if need > self.blocks:
                raise OutOfMemory(
                    f"request {lease.spec.request_id} needs {need * size} tokens of KV, there are "
                    f"{self.blocks * size}"
                )
        free = self.blocks - self.blocks_used
        if sum(needs) > free:
            raise OutOfMemory(
                f"the leases need {sum(needs) * size} tokens of KV, {free * size} are free"
            )
        self.blocks_used += sum(needs)
        self._leases |= {lease.spec.request_id: lease for lease in leases}

    def extend(self, lease: Lease) -> bool:
        """Set aside what is missing up to where it may go; False if there is no room."""
        more = self._blocks(lease, lease.wanted) - self._blocks(lease, lease.until)
        if self.blocks_used + more > self.blocks:
            return False
        self.blocks_used += more
        lease.until = lease.wanted
        return True

    def release(self, lease: Lease) -> None:
        """It is held no more."""
        del self._leases[lease.spec.request_id]
        self.blocks_used -= self._blocks(lease, lease.until)

    def _blocks(self, lease: Lease, until: int) -> int:
        return leased_blocks(len(lease.prompt), max(until, 1), self.block_tokens)


def open_leases(
    orders: Iterable[SliceOrder], end_token_ids: Sequence[int], vocabulary: int, context: int
) -> list[Lease]:
    """The leases of an order. Raises BadOrder."""
    leases = [_open(order, end_token_ids, vocabulary, context) for order in orders]
    if not leases:
        raise BadOrder("the order is empty")
    return leases


def _open(order: SliceOrder, end_token_ids: Sequence[int], vocabulary: int, context: int) -> Lease:
    spec = order.spec
    prompt, output = unpack(spec.prompt), unpack(order.tokens)
    named = f"request {spec.request_id}"
    if not prompt:
        raise BadOrder(f"{named} has no prompt")
    if max(prompt) >= vocabulary or max(output, default=0) >= vocabulary:
        raise BadOrder(f"{named} has token ids beyond the vocabulary of {vocabulary}")
    made, left = len(output), max(0, spec.max_tokens - len(output))
    # A prompt that is only scored costs one token all the same, which nobody hears of.
    scored = not left and not made and spec.sampling.prompt_logprobs
    until = made + (1 if scored else min(order.lease_tokens, left))
    if len(prompt) + until > context:
        raise BadOrder(f"{named} would exceed the context of {context} tokens")
    return Lease(
        spec=spec,
        attempt=order.attempt,
        prompt=tuple(prompt),
        output=list(output),
        until=until,
        wanted=until,
        ends=end_ids(spec.sampling, end_token_ids),
    )
