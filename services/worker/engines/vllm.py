"""Engine `vllm`: leases on top of vLLM's continuous batching and its prefix cache.

Theory of operation. A request is put into vLLM with all tokens that it may ever make, and stays
there as long as its lease is renewed in time. At the lease's end it is taken out (aborted, in
vLLM's word) before the next iteration, so there is never a token beyond the credit; its KV stays
in the prefix cache, and with a renewal it is put in anew, output and all, and goes on after at most
a block of computing again. Blocks for whole leases are set aside in books of our own
(`vllm_leases`), which vLLM's own use never exceeds; a renewal without room ends the lease where it
stands (evicted). Tokens are chosen by our own sampler (`vllm_sampling`).

`iteration_tokens` lowers vLLM's own limit, which is `prefill_chunk_tokens`.
"""

import itertools
import logging
import time
from collections.abc import Sequence
from typing import Protocol

from services.worker.engines.api import (
    BadOrder,
    EngineError,
    EngineInfo,
    LeaseEnd,
    StepReport,
    StepTokens,
)
from services.worker.engines.vllm_core import CoreTokens, VllmCore
from services.worker.engines.vllm_leases import Lease, LeaseBook, open_leases
from services.worker.engines.vllm_sampling import KeyedRow
from services.worker.memory import device_memory
from services.worker.models import pick_device
from services.worker.settings import WorkerSettings
from shared.messages import RunSlice, TokenLogprobs, WorkerMemory

NO_ROOM = "no KV is left for the next lease"
_log = logging.getLogger(__name__)


class Core(Protocol):
    """What the engine needs of vLLM."""

    preemptions: int

    def add(self, row: KeyedRow, ends: Sequence[int], tokens_max: int) -> None:
        """Begin a request. Raises ValueError."""

    def abort(self, keys: Sequence[str]) -> None:
        """End requests before the next step."""

    def configure(self, iteration_tokens: int, *, prefill_first: bool) -> None:
        """Most tokens in an iteration (0: its own limit), and whether decodes wait for prefill."""

    def step(self) -> list[CoreTokens]:
        """One iteration."""

    def close(self) -> None:
        """Free everything."""


def make_vllm(settings: WorkerSettings) -> "VllmEngine":
    """Load the model and make the engine. Raises SetupError."""
    return engine_on(VllmCore(settings), settings)


def engine_on(core: VllmCore, settings: WorkerSettings) -> "VllmEngine":
    """The engine on a vLLM that is loaded."""
    info = EngineInfo(
        engine="vllm",
        forms=("leased",),
        model=settings.served_name(),
        context_tokens_max=core.context_tokens_max,
        vocabulary_size=core.config.vocabulary_size,
        end_token_ids=core.config.end_token_ids,
        batch_size_max=settings.batch_size_max,
        device=str(core.device),
        kv_block_tokens=core.block_tokens,
        shares_prefixes=True,
        details={"dtype": core.dtype},
    )
    return VllmEngine(info, core, blocks=core.blocks, kv_bytes_per_token=core.kv_bytes_per_token)


class VllmEngine:
    """See the module's text."""

    def __init__(
        self, info: EngineInfo, core: Core, *, blocks: int, kv_bytes_per_token: int
    ) -> None:
        self._info = info
        self._core = core
        self._book = LeaseBook(blocks, info.kv_block_tokens)
        self._kv_bytes = kv_bytes_per_token
        self._running: dict[str, Lease] = {}
        """By key: those that are in vLLM."""
        self._done: list[StepTokens] = []
        self._left: list[LeaseEnd] = []
        """Both are said by the next step."""
        self._keys = itertools.count()
        self._preemptions = 0

    @property
    def info(self) -> EngineInfo:
        """What this engine is."""
        return self._info

    @property
    def busy(self) -> bool:
        """Something runs, or is to be said."""
        return bool(self._running or self._done or self._left)

    # ---------------------------------------------------------------------------- orders

    def start(self, order: RunSlice) -> None:
        """Take in leases. Raises OutOfMemory or BadOrder; then nothing was taken."""
        if order.form != "leased":
            raise BadOrder(f"this engine runs leases only, not {order.form} batches")
        info = self._info
        leases = open_leases(
            order.orders, info.end_token_ids, info.vocabulary_size, info.context_tokens_max
        )
        self._book.admit(leases)
        self._core.configure(order.iteration_tokens, prefill_first=order.prefill_first)
        begun = 0
        try:
            for lease in leases:
                begun += 1
                self._begin(lease)
        except ValueError as error:
            for lease in leases[:begun]:
                self._take_out(lease)
            for lease in leases:
                self._book.release(lease)
            raise BadOrder(f"vLLM refuses the order: {error}") from error
        self._end_the_done(leases)

    def renew(self, request_id: str, until: int) -> None:
        """The request may make output up to position `until`."""
        lease = self._book.get(request_id)
        until = min(until, lease.spec.max_tokens) if lease is not None else 0
        if lease is None or until <= lease.wanted:
            return
        lease.wanted = until
        if self._book.extend(lease):
            if not lease.key:
                self._begin(lease)
        elif lease.paused:
            self._evict(lease, NO_ROOM)
        # Else it is tried again where the present lease ends: there may be room by then.

    def park(self, request_id: str) -> None:
        """Its lease ends now; a step says so."""
        lease = self._book.get(request_id)
        if lease is not None:
            self._let_go(lease)
            self._left.append(LeaseEnd(request_id, lease.attempt))

    def cancel(self, request_id: str) -> None:
        """Its lease ends now, without a word."""
        lease = self._book.get(request_id)
        if lease is not None:
            self._let_go(lease)

    def _begin(self, lease: Lease) -> None:
        """Put it into vLLM, unless it may make nothing there."""
        if lease.done or lease.paused:
            return
        lease.key = f"{lease.spec.request_id}-{next(self._keys)}"
        lease.fresh = True
        self._core.add(lease.row(lease.key), sorted(lease.ends), lease.tokens_left)
        self._running[lease.key] = lease

    def _end_the_done(self, leases: Sequence[Lease]) -> None:
        """Those that came with all their tokens."""
        for lease in leases:
            if lease.done:
                lease.finish_reason = "length"
                self._done.append(self._said(lease, lease.position, ()))
                self._let_go(lease)

    # ----------------------------------------------------------------------------- steps

    def step(self) -> StepReport:
        """One iteration of vLLM. Raises EngineError if that fails; all leases are gone then."""
        done, self._done = self._done, []
        left, self._left = self._left, []
        if not self._running:
            return StepReport(tokens=tuple(done), left=tuple(left))
        size = len(self._running)
        prefilling = any(lease.fresh for lease in self._running.values())
        began = time.perf_counter()
        try:
            found = self._core.step()
        except Exception as error:  # whatever vLLM may raise, its requests are in no known state
            self._drop_all()
            raise EngineError(f"vLLM failed: {type(error).__name__}: {error}") from error
        self._warn_of_preemptions()
        tokens = [
            self._take(self._running[one.key], one) for one in found if one.key in self._running
        ]
        took = time.perf_counter() - began
        left += self._left
        self._left = []
        return StepReport(
            tokens=(*done, *(one for one in tokens if one is not None)),
            left=tuple(left),
            prefill_s=took if prefilling else 0.0,
            decode_s=0.0 if prefilling else took,
            batch_size=size,
        )

    def _take(self, lease: Lease, found: CoreTokens) -> StepTokens | None:
        """A request's new token."""
        begin, ending = lease.position, False
        if not lease.tokens_left:  # its prompt was to be scored, no more
            lease.finish_reason = "length"
            said = self._said(lease, begin, (), prompt_logprobs=found.prompt_logprobs)
        else:
            for token in found.ids:
                ending = lease.take(token)
            if lease.position == begin and not found.ended:
                return None
            said = self._said(
                lease,
                begin,
                found.ids,
                ending_token=ending,
                logprobs=(found.logprobs,) if found.logprobs else (),
                prompt_logprobs=found.prompt_logprobs,
            )
        if lease.finish_reason is not None:
            self._let_go(lease)
        elif lease.paused:
            self._pause(lease)
        elif found.ended:
            self._evict(lease, "vLLM ended the request early")
        return said

    def _said(
        self,
        lease: Lease,
        position: int,
        ids: tuple[int, ...],
        *,
        ending_token: bool = False,
        logprobs: tuple[TokenLogprobs, ...] = (),
        prompt_logprobs: tuple[TokenLogprobs, ...] = (),
    ) -> StepTokens:
        return StepTokens(
            request_id=lease.spec.request_id,
            attempt=lease.attempt,
            position=position,
            ids=ids,
            finish_reason=lease.finish_reason,
            ending_token=ending_token,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )

    def _pause(self, lease: Lease) -> None:
        """Its lease is used up, or the room for the next one was missing until now."""
        if lease.wanted == lease.until:
            self._take_out(lease)
        elif not self._book.extend(lease):
            self._evict(lease, NO_ROOM)

    def _evict(self, lease: Lease, detail: str) -> None:
        self._let_go(lease)
        self._left.append(
            LeaseEnd(lease.spec.request_id, lease.attempt, evicted=True, detail=detail)
        )

    def _let_go(self, lease: Lease) -> None:
        self._take_out(lease)
        self._book.release(lease)

    def _take_out(self, lease: Lease) -> None:
        if self._running.pop(lease.key, None) is not None:
            self._core.abort([lease.key])
        lease.key = ""

    def _drop_all(self) -> None:
        for lease in list(self._book):
            self._running.pop(lease.key, None)
            if lease.key:
                self._core.abort([lease.key])
            self._book.release(lease)
        self._done, self._left = [], []

    def _warn_of_preemptions(self) -> None:
        if self._core.preemptions != self._preemptions:
            self._preemptions = self._core.preemptions
            _log.warning("vLLM took KV back from a request: %d times so far", self._preemptions)

    # ---------------------------------------------------------------------------- memory

    def memory(self) -> WorkerMemory:
        """What leases have set aside, paused ones too; exact in blocks."""
        block, size = self._info.kv_block_tokens, self._kv_bytes
        capacity, used = self._book.blocks * block, self._book.blocks_used * block
        free, total = device_memory(pick_device(self._info.device))
        return WorkerMemory(
            kv_tokens_capacity=capacity,
            kv_tokens_used=used,
            kv_blocks_capacity=self._book.blocks,
            kv_blocks_used=self._book.blocks_used,
            kv_bytes_per_token=size,
            kv_bytes_capacity=capacity * size,
            kv_bytes_used=used * size,
            device_bytes_free=free,
            device_bytes_total=total,
        )

    def close(self) -> None:
        """Free the model and the cache."""
        self._core.close()
