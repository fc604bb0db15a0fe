"""Engine `padded`: one closed slice at a time, as in SCLS: a left-padded static batch.

Theory of operation. All inputs of a batch are padded on the left to the longest, L, so that their
last tokens stand in one column and every decode step appends one column for all rows. KV for
N x (L + S) tokens is taken before anything runs, so a slice that started cannot run out of it. The
prefill goes through the columns in chunks, one per call of `step`; the last chunk's logits give
the first token, each further step one more. A row that has ended idles: it is fed a token whose
result nobody reads. The batch ends when no row makes tokens any more, or at its longest budget.

Padding columns get a finite, very negative mask instead of minus infinity: a query that is padding
itself then averages nonsense, which nobody reads, instead of making NaN, which would spread.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from services.worker.engines.api import EngineError, EngineInfo, OutOfMemory, StepReport
from services.worker.engines.batch import Batch
from services.worker.engines.kv import KvArena
from services.worker.engines.prompt_scores import PromptScores
from services.worker.memory import device_memory, kv_capacity_tokens
from services.worker.models import LoadedModel, load_model
from services.worker.sampling import BatchSampler
from services.worker.settings import WorkerSettings
from shared.messages import RunSlice, WorkerMemory

MASK_ELEMENTS_MAX = 1 << 24
"""Largest attention mask of a prefill chunk (64 MiB in float32)."""
PROMPT_LOGITS_MAX = 1 << 24
"""Most logits of a prefill chunk whose prompt logprobs are wanted (64 MiB in float32)."""


def make_padded(settings: WorkerSettings) -> "PaddedEngine":
    """Load the model and make the engine. Raises ModelError."""
    if settings.torch_threads:
        torch.set_num_threads(settings.torch_threads)
    model = load_model(settings)
    return PaddedEngine(
        model,
        kv_tokens=kv_capacity_tokens(settings, model),
        batch_size_max=settings.batch_size_max,
        prefill_chunk_tokens=settings.prefill_chunk_tokens,
    )


class _Running:
    """The tensors of the batch that runs."""

    def __init__(self, batch: Batch, model: LoadedModel, cache: Cache) -> None:
        rows, width = len(batch.rows), batch.input_tokens_max
        capacity = width + batch.new_tokens_max
        device = model.device
        self.batch = batch
        self.cache = cache
        self.prefilled = 0
        """Columns whose KV is there."""
        self.inputs = torch.zeros((rows, width), dtype=torch.long)
        for index, row in enumerate(batch.rows):
            ids = torch.tensor(row.input_ids, dtype=torch.long)
            self.inputs[index, width - len(ids) :] = ids
        self.inputs = self.inputs.to(device)
        pads = torch.tensor([width - len(row.input_ids) for row in batch.rows], device=device)
        columns = torch.arange(capacity, device=device)
        self.visible = columns >= pads[:, None]
        """[rows, capacity]: the columns that are not padding."""
        self.positions = (columns - pads[:, None]).clamp(min=0)
        self.padded = bool((pads > 0).any())
        self.padding_mask = _additive(self.visible, model.dtype)[:, None, None, :]
        self.sampler = BatchSampler(
            [row.sampling_row() for row in batch.rows],
            model.vocabulary_size,
            model.end_token_ids,
            device,
        )
        self.prompt_scores = PromptScores(batch.rows, width)
        self.next_ids = torch.empty(0)


class PaddedEngine:
    """See the module's text."""

    def __init__(
        self,
        model: LoadedModel,
        *,
        kv_tokens: int,
        batch_size_max: int = 0,
        prefill_chunk_tokens: int = 4096,
    ) -> None:
        self._model = model
        self._kv_tokens = kv_tokens
        self._chunk_tokens = prefill_chunk_tokens
        self._arena = KvArena(model.kv_shapes, model.dtype, model.device)
        self._running: _Running | None = None
        self._info = EngineInfo(
            engine="padded",
            forms=("closed",),
            model=model.name,
            context_tokens_max=model.context_tokens_max,
            vocabulary_size=model.vocabulary_size,
            end_token_ids=model.end_token_ids,
            batch_size_max=batch_size_max,
            device=str(model.device),
            details={"dtype": str(model.dtype).removeprefix("torch.")},
        )

    @property
    def info(self) -> EngineInfo:
        """What this engine is."""
        return self._info

    @property
    def busy(self) -> bool:
        """A batch is running."""
        return self._running is not None

    def start(self, order: RunSlice) -> None:
        """Take in a batch. Raises OutOfMemory or BadOrder; then nothing was taken."""
        assert self._running is None, "a closed batch was started while another one runs"
        info = self._info
        batch = Batch(order, info.end_token_ids, info.vocabulary_size, info.context_tokens_max)
        if info.batch_size_max and len(batch.rows) > info.batch_size_max:
            raise OutOfMemory(f"{len(batch.rows)} requests; at most {info.batch_size_max} fit")
        if batch.kv_tokens > self._kv_tokens:
            raise OutOfMemory(
                f"the batch needs {batch.kv_tokens} tokens of KV, there are {self._kv_tokens}"
            )
        length = batch.input_tokens_max + batch.new_tokens_max
        with self._device_errors(), torch.inference_mode():
            cache = self._arena.reserve(len(batch.rows), length)
            self._running = _Running(batch, self._model, cache)

    def step(self) -> StepReport:
        """One chunk of prefill, or one token for every row.

        Raises OutOfMemory if the device has none left before the batch made a token, EngineError
        if the model fails; the batch is dropped then.
        """
        running = self._running
        if running is None:
            return StepReport()
        batch = running.batch
        if batch.done:
            return self._end()
        began = time.perf_counter()
        prefilling = running.prefilled < batch.input_tokens_max
        try:
            with self._device_errors(), torch.inference_mode():
                logits = self._prefill(running) if prefilling else self._decode(running)
                chosen = None
                if logits is not None:
                    chosen = running.sampler.choose(logits)
                    running.next_ids = chosen.tensor
                    if prefilling:
                        running.prompt_scores.deliver()
        except OutOfMemory as error:
            if batch.iterations:
                return self._end(detail=str(error))
            raise
        tokens = batch.take(chosen) if chosen is not None else ()
        took = time.perf_counter() - began
        prefill_s, decode_s = (took, 0.0) if prefilling else (0.0, took)
        batch.prefill_s += prefill_s
        batch.decode_s += decode_s
        ended = self._end().ended if batch.done else ()
        return StepReport(
            tokens=tokens,
            ended=ended,
            prefill_s=prefill_s,
            decode_s=decode_s,
            batch_size=len(batch.rows),
        )

    def cancel(self, request_id: str) -> None:
        """End this request's row at once."""
        if self._running is not None:
            self._running.batch.cancel(request_id)

    def memory(self) -> WorkerMemory:
        """Exact in tokens and bytes of the slice that runs."""
        used = self._running.batch.kv_tokens if self._running else 0
        size = self._model.kv_bytes_per_token
        free, total = device_memory(self._model.device)
        return WorkerMemory(
            kv_tokens_capacity=self._kv_tokens,
            kv_tokens_used=used,
            kv_bytes_per_token=size,
            kv_bytes_capacity=self._kv_tokens * size,
            kv_bytes_used=used * size,
            device_bytes_free=free,
            device_bytes_total=total,
        )

    def close(self) -> None:
        """Free the cache and let go of the model."""
        self._running = None
        self._arena.release()

    def _end(self, detail: str = "") -> StepReport:
        assert self._running is not None
        batch = self._running.batch
        self._running = None
        return StepReport(ended=(batch.end(detail),), batch_size=len(batch.rows))

    def _prefill(self, running: _Running) -> Tensor | None:
        """The next chunk of columns; the last columns' logits [rows, vocabulary] at the end."""
        rows, width = running.inputs.shape
        start = running.prefilled
        end = min(width, start + self._chunk_columns(running, rows))
        wants_all = running.prompt_scores.wanted
        logits = self._forward(running, running.inputs[:, start:end], start, end, wants_all)
        if wants_all:
            running.prompt_scores.add(logits, running.inputs, start)
        running.prefilled = end
        return logits[:, -1] if end == width else None

    def _chunk_columns(self, running: _Running, rows: int) -> int:
        columns = self._chunk_tokens // rows
        if running.padded or running.prefilled:
            columns = min(columns, MASK_ELEMENTS_MAX // (rows * running.batch.input_tokens_max))
        if running.prompt_scores.wanted:
            columns = min(columns, PROMPT_LOGITS_MAX // (rows * self._model.vocabulary_size))
        return max(1, columns)

    def _decode(self, running: _Running) -> Tensor:
        """One more column: logits [rows, vocabulary]."""
        start = running.prefilled + running.batch.iterations - 1
        ids = running.next_ids.unsqueeze(1)
        return self._forward(running, ids, start, start + 1, wants_all=False)[:, -1]

    def _forward(
        self, running: _Running, ids: Tensor, start: int, end: int, wants_all: bool
    ) -> Tensor:
        """Logits [rows, columns or 1, vocabulary] of columns start..end."""
        options: dict[str, Any] = {}
        if self._model.takes_positions:
            options["position_ids"] = running.positions[:, start:end]
        if self._model.keeps_logits and not wants_all:
            options["logits_to_keep"] = 1
        logits: Tensor = self._model.network(
            input_ids=ids,
            attention_mask=self._mask(running, start, end),
            past_key_values=running.cache,
            use_cache=True,
            **options,
        ).logits
        return logits

    def _mask(self, running: _Running, start: int, end: int) -> Tensor | None:
        """What the columns start..end may see.

        Where all layers see everything, the finished additive mask, sliced out of one that was
        made at the start; otherwise the 2-D mask, from which the model makes its own.
        """
        if not self._model.uniform_attention:
            return running.visible[:, :end].long()
        if not running.padded:
            return None
        if end - start == 1:
            return running.padding_mask[..., :end]
        columns = torch.arange(end, device=running.visible.device)
        causal = columns[None, :] <= columns[start:, None]
        return _additive(causal & running.visible[:, None, :end], self._model.dtype)[:, None]

    @contextmanager
    def _device_errors(self) -> Iterator[None]:
        """Turns what PyTorch raises into the engine's errors; then the batch is dropped, unless
        it has tokens to be kept."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            self._drop_unless_kept()
            self._arena.release()
            raise OutOfMemory(f"the device is out of memory: {error}") from error
        except RuntimeError as error:
            out_of_memory = "memory" in str(error).lower() and "alloc" in str(error).lower()
            if out_of_memory:
                self._drop_unless_kept()
                self._arena.release()
                raise OutOfMemory(f"the machine is out of memory: {error}") from error
            self._running = None
            raise EngineError(f"the model failed: {error}") from error

    def _drop_unless_kept(self) -> None:
        if self._running is not None and not self._running.batch.iterations:
            self._running = None


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `visible`, else the most negative number of this type."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)
