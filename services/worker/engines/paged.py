"""Engine `paged`: a running batch, continuous at iteration level, whose KV stays between leases.

Theory of operation. `start` sets a lease's blocks aside and `renew` adds to them; nothing else
takes memory, so an iteration cannot be refused any. Each `step` plans rows (`paged.plan`), lays
them out (`paged.iteration`), runs the network over them (`paged.network`, `paged.fused`), and
chooses a token for every sequence whose text is computed to its end. A sequence whose lease is
used up has no row until it is renewed; its blocks stay. A parked, finished or cancelled one gives
them back, and they are found again by their content as long as nobody needed the room.
"""

import time
from collections.abc import Iterator, Sequence as Items
from contextlib import contextmanager

import torch
from torch import Tensor

from services.worker.engines.api import (
    BadOrder,
    EngineError,
    EngineInfo,
    LeaseEnd,
    OutOfMemory,
    StepReport,
    StepTokens,
)
from services.worker.memory import device_memory, kv_capacity_tokens
from services.worker.models import LoadedModel, ModelError, load_model
from services.worker.paged.attention import make_attention
from services.worker.paged.cache import KvCache
from services.worker.paged.iteration import lay_out
from services.worker.paged.lease_memory import LeaseMemory
from services.worker.paged.network import Network, is_capped
from services.worker.paged.networks import make_network
from services.worker.paged.plan import Share, plan
from services.worker.paged.pool import PoolExhausted
from services.worker.paged.sequence import Sequence, make_sequence
from services.worker.sampling import BatchSampler, describe_logprobs
from services.worker.settings import WorkerSettings
from shared.messages import RunSlice, TokenLogprobs, WorkerMemory

MEMORY_EVERY_S = 1.0
"""How often the device's own telemetry is read; on Linux it costs more than a small iteration's
bookkeeping."""
PROMPT_LOGITS_MAX = 1 << 25
"""Logits that are held at once while a prompt is scored: 128 MiB of float32."""


def make_paged(settings: WorkerSettings) -> "PagedEngine":
    """The engine that the settings describe. Raises SetupError."""
    if settings.torch_threads:
        torch.set_num_threads(settings.torch_threads)
    model = load_model(settings)
    return PagedEngine(
        model,
        kv_tokens=kv_capacity_tokens(settings, model),
        block_tokens=settings.kv_block_tokens,
        host_tokens=settings.kv_host_tokens,
        batch_size_max=settings.batch_size_max,
        chunk_tokens=settings.prefill_chunk_tokens,
        share_prefixes=settings.share_prefixes,
        int8=settings.weights == "int8",
        fuse=settings.fuse,
    )


class PagedEngine:
    """See the module's text."""

    def __init__(
        self,
        model: LoadedModel,
        *,
        kv_tokens: int,
        block_tokens: int = 16,
        host_tokens: int = 0,
        batch_size_max: int = 0,
        chunk_tokens: int = 4096,
        share_prefixes: bool = True,
        int8: bool = False,
        fuse: bool = True,
    ) -> None:
        """Raises ModelError."""
        blocks = kv_tokens // block_tokens
        if not blocks:
            raise ModelError(
                f"{kv_tokens} tokens of KV are less than a block of {block_tokens}; set kv_tokens"
            )
        self._model = model
        self._rows_max = batch_size_max or 1 << 30
        self._chunk_tokens = chunk_tokens
        self._network: Network = make_network(model, int8=int8, fuse=fuse)
        try:
            self._cache = KvCache(
                model.kv_shapes,
                model.dtype,
                model.device,
                blocks=blocks,
                block_tokens=block_tokens,
            )
        except (torch.OutOfMemoryError, RuntimeError) as error:
            raise ModelError(
                f"{blocks * block_tokens} tokens of KV cannot be had ({error}); set kv_tokens or "
                "kv_memory_share"
            ) from error
        self._attention = make_attention(
            self._cache, torch.get_num_threads(), capped=is_capped(model)
        )
        self._leases = LeaseMemory(
            self._cache,
            blocks=blocks,
            context_tokens_max=model.context_tokens_max,
            host_blocks=host_tokens // block_tokens,
            block_bytes=block_tokens * model.kv_bytes_per_token,
            share=share_prefixes,
        )
        self._sequences: dict[str, Sequence] = {}
        """In the order of arrival."""
        self._left: list[LeaseEnd] = []
        self._budget = chunk_tokens
        self._prefill_first = False
        self._separate = model.device.type == "cpu"
        """Prefill and decodes take turns instead of sharing an iteration. A CPU is busy with a
        hundred rows as it is, so that decodes beside a chunk are not cheaper than after it, and
        the first token comes earlier."""
        self._prefilled = False
        """The last iteration was prefill alone."""
        self._turn = 0
        """Of the iterations, for those of more decodes than have room in one."""
        self._sampled: list[Sequence] = []
        self._sampler: BatchSampler | None = None
        self._device_at, self._device_memory = float("-inf"), (0, 0)
        self.evictions = 0
        """Leases that ended for want of memory."""
        self._info = EngineInfo(
            engine="paged",
            forms=("leased",),
            model=model.name,
            context_tokens_max=model.context_tokens_max,
            vocabulary_size=model.vocabulary_size,
            end_token_ids=model.end_token_ids,
            batch_size_max=batch_size_max,
            device=str(model.device),
            kv_block_tokens=block_tokens,
            shares_prefixes=share_prefixes,
            details={
                "dtype": str(model.dtype).removeprefix("torch."),
                "network": self._network.kind,
                "attention": type(self._attention).__name__,
                "weights": "int8" if int8 else "as stored",
            },
        )

    @property
    def info(self) -> EngineInfo:
        """What this engine is."""
        return self._info

    @property
    def model(self) -> LoadedModel:
        """What it runs; the linear layers of `network` may have been packed away."""
        return self._model

    @property
    def busy(self) -> bool:
        """A row to compute, or an end to tell."""
        return bool(self._left) or any(s.runs for s in self._sequences.values())

    # ----------------------------------------------------------------------------- leases

    def start(self, order: RunSlice) -> None:
        """Take in leases. Raises OutOfMemory or BadOrder; then nothing was taken."""
        info = self._info
        if order.form != "leased":
            raise BadOrder(f"this engine runs leases only, not {order.form} batches")
        made = [
            make_sequence(
                share,
                info.end_token_ids,
                info.vocabulary_size,
                info.context_tokens_max,
                info.kv_block_tokens,
            )
            for share in order.orders
        ]
        granted: list[Sequence] = []
        try:
            for sequence in made:
                self._leases.grant(sequence)
                granted.append(sequence)
        except PoolExhausted as error:
            for sequence in granted:
                self._leases.release(sequence)
            raise OutOfMemory(f"{error}; blocks of {info.kv_block_tokens} tokens") from error
        for sequence in made:
            self.cancel(sequence.request_id)
            self._sequences[sequence.request_id] = sequence
        self._budget = min(order.iteration_tokens or self._chunk_tokens, self._chunk_tokens)
        self._prefill_first = order.prefill_first

    def renew(self, request_id: str, until: int) -> None:
        """The request may make output up to `until`. If there is no memory for it, its lease ends
        where it is: the scheduler promised more than it had."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return
        until = min(until, sequence.order.spec.max_tokens)
        if until <= sequence.until:
            return
        try:
            self._leases.extend(sequence, until)
        except PoolExhausted as error:
            self._evict(sequence, str(error))
            return
        sequence.until = until

    def park(self, request_id: str) -> None:
        """End its lease; the next step says so."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self._leases.release(sequence, keep=True)
            self._left.append(LeaseEnd(request_id, sequence.order.attempt))

    def cancel(self, request_id: str) -> None:
        """End its lease without a word."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self._leases.release(sequence)

    def _evict(self, sequence: Sequence, detail: str) -> None:
        self.evictions += 1
        del self._sequences[sequence.request_id]
        self._leases.release(sequence, keep=True)
        self._left.append(
            LeaseEnd(sequence.request_id, sequence.order.attempt, evicted=True, detail=detail)
        )

    # ----------------------------------------------------------------------------- steps

    def step(self) -> StepReport:
        """One iteration. Raises EngineError if the model fails; all leases are dropped then."""
        left, self._left = tuple(self._left), []
        shares = plan(
            self._sequences.values(),
            budget=self._budget,
            rows_max=self._rows_max,
            prefill_first=self._prefill_first or (self._separate and not self._prefilled),
            find=self._leases.find,
            awaited=self._leases.awaited,
            turn=self._turn,
        )
        self._turn += 1
        if not shares:
            return StepReport(left=left)
        self._prefilled = not any(share.sequence.decodes for share in shares)
        began = time.perf_counter()
        with self._device_errors(), torch.inference_mode():
            shares = [self._limited(share) for share in shares]
            tokens = self._run(shares)
        took = time.perf_counter() - began
        return self._report(shares, tokens, left, took)

    def _run(self, shares: Items[Share]) -> tuple[StepTokens, ...]:
        parts = [sequence.part(tokens) for sequence, tokens in shares]
        iteration = lay_out(parts, self._leases.tables, self._cache.block_tokens)
        logits = self._network.forward(iteration, self._attention)
        last: list[int] = []
        drawn: list[Sequence] = []
        tokens: list[StepTokens] = []
        row = 0
        for (sequence, count), part in zip(shares, parts, strict=True):
            if sequence.scores_prompt and sequence.computed < len(sequence.prompt):
                self._score(sequence, count, logits[row : row + part.wanted])
            sequence.computed += count
            self._leases.publish(sequence)
            row += part.wanted
            if sequence.computed == sequence.tokens:
                if sequence.scores_only:
                    tokens.append(sequence.end_scored())
                else:
                    drawn.append(sequence)
                    last.append(row - 1)
        if drawn:
            rows = logits if len(last) == len(logits) else logits[last]
            tokens += self._choose(drawn, rows)
        for sequence, _ in shares:
            if sequence.finish_reason is not None:
                del self._sequences[sequence.request_id]
                self._leases.release(sequence)
        return tuple(tokens)

    def _choose(self, drawn: list[Sequence], logits: Tensor) -> Iterator[StepTokens]:
        """The next token of each."""
        if self._sampler is None or drawn != self._sampled:
            self._sampler = BatchSampler(
                [sequence.sampling_row() for sequence in drawn],
                self._model.vocabulary_size,
                self._model.end_token_ids,
                self._model.device,
            )
            self._sampled = drawn
        chosen = self._sampler.choose(logits)
        for index, sequence in enumerate(drawn):
            token = chosen.ids[index]
            sequence.chain.extend((token,))
            yield sequence.take(token, chosen.logprobs.get(index))

    def _score(self, sequence: Sequence, count: int, logits: Tensor) -> None:
        """Log probabilities of the prompt's tokens after these rows; the first has none."""
        found, begin = sequence.prompt_logprobs, sequence.computed
        if not found:
            found.append(TokenLogprobs(chosen=None))
        targets = list(sequence.prompt[begin + 1 : begin + count + 1])
        if targets:
            scores = torch.log_softmax(logits[: len(targets)].float(), dim=-1)
            wanted = sequence.order.spec.sampling.logprobs or 0
            found += describe_logprobs(scores, targets, [wanted] * len(targets))

    def _limited(self, share: Share) -> Share:
        if not share.sequence.scores_prompt:
            return share
        most = max(1, PROMPT_LOGITS_MAX // self._model.vocabulary_size)
        return Share(share.sequence, min(share.tokens, most))

    def _report(
        self,
        shares: Items[Share],
        tokens: tuple[StepTokens, ...],
        left: tuple[LeaseEnd, ...],
        took: float,
    ) -> StepReport:
        """Time is shared out by tokens between prefill and decode."""
        rows = sum(share.tokens for share in shares)
        prefilled = sum(share.tokens for share in shares if share.tokens > 1)
        prefill_s = took if prefilled == rows else took * prefilled / rows
        if prefilled:
            self._leases.token_cost.add(took / rows)
        return StepReport(
            tokens=tokens,
            left=left,
            prefill_s=prefill_s,
            decode_s=took - prefill_s,
            batch_size=len(shares),
        )

    # -------------------------------------------------------------------------- telemetry

    def memory(self) -> WorkerMemory:
        """Exact in blocks, tokens and bytes of what leases hold."""
        pool, size = self._leases.pool, self._info.kv_block_tokens
        now = time.monotonic()
        if now - self._device_at > MEMORY_EVERY_S:
            self._device_at, self._device_memory = now, device_memory(self._model.device)
        free, total = self._device_memory
        per_token = self._model.kv_bytes_per_token
        return WorkerMemory(
            kv_tokens_capacity=pool.blocks * size,
            kv_tokens_used=pool.used_blocks * size,
            kv_blocks_capacity=pool.blocks,
            kv_blocks_used=pool.used_blocks,
            kv_blocks_cached=pool.cached_blocks,
            kv_bytes_per_token=per_token,
            kv_bytes_capacity=pool.blocks * size * per_token,
            kv_bytes_used=pool.used_blocks * size * per_token,
            device_bytes_free=free,
            device_bytes_total=total,
        )

    def close(self) -> None:
        """Free the cache and let go of the model."""
        self._drop_all()
        self._cache.release()

    def _drop_all(self) -> None:
        for sequence in self._sequences.values():
            self._leases.release(sequence)
        self._sequences.clear()
        self._leases.forget()
        self._sampler, self._sampled = None, []

    @contextmanager
    def _device_errors(self) -> Iterator[None]:
        """Turns what PyTorch raises into the engine's errors; then all leases are dropped."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            self._drop_all()
            raise OutOfMemory(f"the device is out of memory: {error}") from error
        except RuntimeError as error:
            self._drop_all()
            if "memory" in str(error).lower() and "alloc" in str(error).lower():
                raise OutOfMemory(f"the machine is out of memory: {error}") from error
            raise EngineError(f"the model failed: {error}") from error
