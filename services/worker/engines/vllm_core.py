"""vLLM in this process: the one file that knows its interfaces (tried with 0.32).

Its engine core runs without a process of its own, so that a step is one iteration, an abort holds
from the next step on, and the scheduler's KV blocks can be read. Models are read by vLLM itself.
"""

import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from services.worker.engines.vllm_sampling import ROW, KeyedBatch, KeyedRow, vllm_parameters
from services.worker.memory import SHARE_CPU, SHARE_CUDA, device_memory
from services.worker.models import ModelError, pick_device
from services.worker.models_config import ModelConfig, read_config
from services.worker.settings import WorkerSettings
from shared.config import SetupError
from shared.messages import TokenLogprobs
from shared.telemetry.logs import adopt_logger
from shared.tokens import pack

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # The newer model runner has another interface for logits processors.
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CONFIGURE_LOGGING": "0",
}
"""Read by vLLM when it is imported, or later."""
BLOCK_TOKENS_CPU = 32
"""vLLM's attention on the CPU takes multiples of 32; elsewhere 16 is its own choice."""
BLOCK_TOKENS = 16
ALONE = threading.RLock()
"""vLLM keeps the iteration that runs, and its process groups, in globals: where one process holds
several (workers of `tranche serve`, say), they take turns."""
SEQUENCES_MAX = 256
"""In one iteration, where batch_size_max sets no limit; more wait inside vLLM."""


@dataclass(frozen=True, slots=True)
class CoreTokens:
    """What one request got in an iteration."""

    key: str
    ids: tuple[int, ...]
    ended: bool = False
    """It is not in vLLM any more."""
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


class VllmCore:
    """Requests in, tokens out. All calls come from one thread."""

    living = 0
    """How many this process holds."""

    def __init__(self, settings: WorkerSettings) -> None:
        """Loads the model. Raises ModelError, or SetupError if there is no vLLM."""
        self.config: ModelConfig = read_config(settings)
        os.environ.update(ENVIRONMENT)
        set_threads = torch.set_num_threads
        if settings.torch_threads:
            set_threads(settings.torch_threads)
        self.device = pick_device(settings.device)
        try:
            with ALONE:
                self._load(settings)
                VllmCore.living += 1
        except ImportError as error:
            raise SetupError(
                f"engine vllm needs vLLM ({error}); see docs/vllm.md for its environment"
            ) from error
        except (ValueError, RuntimeError, OSError, AssertionError) as error:
            raise ModelError(f"vLLM cannot serve {settings.model}: {error}") from error
        finally:
            # vLLM puts a function there that only warns.
            torch.set_num_threads = set_threads

    def _load(self, settings: WorkerSettings) -> None:
        from vllm import SamplingParams
        from vllm.engine.arg_utils import EngineArgs
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.llm_engine import LLMEngine

        adopt_logger("vllm")
        self._batch = KeyedBatch(self.config.vocabulary_size, self.config.end_token_ids)
        self._parameters = SamplingParams
        self._deltas = RequestOutputKind.DELTA
        arguments = vllm_arguments(settings, self.config, self.device)
        self._engine: Any = LLMEngine.from_engine_args(
            EngineArgs(**arguments, logits_processors=[_processor_for(self._batch)])
        )
        self._scheduler: Any = self._engine.engine_core.engine_core.scheduler
        self._rows: dict[str, KeyedRow] = {}
        """By key: of the requests that are in vLLM."""
        self._inside: dict[str, str] = {}
        """By key: the names that vLLM's scheduler has for them."""
        self._silent: set[str] = set()
        """Keys of those of which nothing was heard yet: their prompts are being read."""
        self._prefill_first = False
        self._compiles = settings.vllm_compile
        self._iteration_tokens_max: int = self._scheduler.max_num_scheduled_tokens
        self._measure_cache(settings)
        self.dtype = str(self._engine.model_config.dtype).removeprefix("torch.")
        self.preemptions = 0
        """How often vLLM took back the blocks of a request. Never, if the books are right."""
        self._preempted: set[str] = set()
        self.cached_tokens = 0
        """Input tokens of all requests so far whose KV the prefix cache had."""

    def _measure_cache(self, settings: WorkerSettings) -> None:
        cache = self._scheduler.kv_cache_config
        groups = cache.kv_cache_groups
        sizes = {group.kv_cache_spec.block_size for group in groups}
        if len(sizes) != 1:
            raise ModelError(
                f"{settings.model} keeps other state than keys and values of one block size; only "
                "models whose layers are all attention can be served"
            )
        self.block_tokens: int = sizes.pop()
        blocks = (cache.num_blocks - 1) // len(groups)  # one is the null block
        self.blocks = min(blocks, settings.kv_tokens // self.block_tokens or blocks)
        size = sum(tensor.size for tensor in cache.kv_cache_tensors)
        self.kv_bytes_per_token = size * len(groups) // (cache.num_blocks * self.block_tokens)
        self.context_tokens_max = (
            self.config.context_tokens_max
            if settings.kv_tokens
            else min(self.config.context_tokens_max, self._engine.model_config.max_model_len)
        )

    def add(self, row: KeyedRow, ends: Sequence[int], tokens_max: int) -> None:
        """Begin a request: its prompt is the row's prompt and output. Raises ValueError."""
        fields = vllm_parameters(row, ends, tokens_max)
        self._inside[row.key] = self._engine.add_request(
            row.key,
            {"type": "token", "prompt_token_ids": [*row.prompt, *row.output]},
            self._parameters(**fields, output_kind=self._deltas),
        )
        self._rows[row.key] = row
        self._silent.add(row.key)

    def abort(self, keys: Sequence[str]) -> None:
        """End requests; their KV stays in the prefix cache until others need the room."""
        known = [key for key in keys if key in self._rows]
        for key in known:
            self._forget(key)
        if known:
            self._engine.abort_request(known)

    def configure(self, iteration_tokens: int, *, prefill_first: bool) -> None:
        """Most tokens in an iteration from now on, 0 for the limit that was set at the start; and
        whether decodes wait while prompts are being read."""
        most = self._iteration_tokens_max
        self._scheduler.max_num_scheduled_tokens = min(iteration_tokens or most, most)
        self._prefill_first = prefill_first

    def step(self) -> list[CoreTokens]:
        """One iteration. Requests whose prompt is not read to its end have no tokens yet."""
        with ALONE, self._stance(), self._decodes_held():
            outputs = self._engine.step()
        self._look_for_preemptions()
        return [self._tokens_of(output) for output in outputs]

    def _stance(self) -> AbstractContextManager[Any]:
        """Small functions of vLLM compile themselves at their first use, in the middle of serving:
        half a minute for the first prompt that is scored. Only who asked for it may compile."""
        return nullcontext() if self._compiles else torch.compiler.set_stance("force_eager")

    @contextmanager
    def _decodes_held(self) -> Iterator[None]:
        """Hides decodes from the scheduler for an iteration, if prefill goes first. To vLLM that is
        an iteration whose limit of tokens they did not come under."""
        scheduler = self._scheduler
        limit = scheduler.max_num_running_reqs
        if not (self._prefill_first and self._silent and len(self._rows) <= limit):
            yield
            return
        reading = {self._inside[key] for key in self._silent}
        held = [r for r in scheduler.running if r.request_id not in reading]
        scheduler.running = [r for r in scheduler.running if r.request_id in reading]
        try:
            yield
        finally:
            scheduler.running = held + scheduler.running

    def _tokens_of(self, output: Any) -> CoreTokens:
        key = output.request_id
        row = self._rows[key]
        ids = tuple(output.outputs[0].token_ids)
        if key in self._silent:
            self._silent.discard(key)
            self.cached_tokens += output.num_cached_tokens or 0
        if output.finished:
            self._forget(key)
        return CoreTokens(
            key=key,
            ids=ids,
            ended=output.finished,
            logprobs=self._batch.logprobs.get(key) if ids else None,
            prompt_logprobs=_prompt_scores(output, row.sampling.logprobs or 0),
        )

    def _forget(self, key: str) -> None:
        del self._rows[key], self._inside[key]
        self._silent.discard(key)

    def _look_for_preemptions(self) -> None:
        waiting = {r.request_id for r in self._scheduler.waiting if r.num_preemptions}
        self.preemptions += len(waiting - self._preempted)
        self._preempted = waiting

    @property
    def blocks_used(self) -> int:
        """Blocks of requests that are in vLLM now; what is only cached does not count."""
        pool = self._scheduler.kv_cache_manager.block_pool
        return int(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())

    def close(self) -> None:
        """Free the model and the cache; the last one also what vLLM has in common for all."""
        client = self._engine.engine_core
        with ALONE:
            VllmCore.living -= 1
            if VllmCore.living:
                client._finalizer.detach()
                client.engine_core.model_executor.shutdown()
                self._scheduler.shutdown()
            else:
                client.shutdown()
        del self._engine, self._scheduler


def vllm_arguments(
    settings: WorkerSettings, config: ModelConfig, device: torch.device
) -> dict[str, Any]:
    """The fields of vLLM's EngineArgs."""
    on_cpu = device.type == "cpu"
    block = BLOCK_TOKENS_CPU if on_cpu else BLOCK_TOKENS
    dtype = "float32" if on_cpu and settings.dtype == "auto" else settings.dtype
    sequences = settings.batch_size_max or SEQUENCES_MAX
    return {
        "model": settings.model,
        "revision": settings.revision or None,
        "served_model_name": settings.served_name(),
        "skip_tokenizer_init": True,
        "dtype": dtype,
        "block_size": block,
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        "max_num_seqs": sequences,
        "max_num_batched_tokens": max(sequences, settings.prefill_chunk_tokens),
        "max_logprobs": -1,
        "async_scheduling": False,
        "enforce_eager": not settings.vllm_compile,
        "disable_log_stats": True,
        "generation_config": "vllm",
        **_cache_arguments(settings, config, device, block),
    }


def _cache_arguments(
    settings: WorkerSettings, config: ModelConfig, device: torch.device, block: int
) -> dict[str, Any]:
    """How much KV there is, and the context that vLLM must have room for."""
    context = config.context_tokens_max
    if not settings.kv_tokens:
        free, _ = device_memory(device)
        share = settings.kv_memory_share or (SHARE_CPU if device.type == "cpu" else SHARE_CUDA)
        return {
            "kv_cache_memory_bytes": int(free * share),
            # As much of the context as fits.
            "max_model_len": settings.context_tokens_max or -1,
        }
    blocks = settings.kv_tokens // block
    if not blocks:
        raise SetupError(f"kv_tokens {settings.kv_tokens} is less than a block of {block}")
    # vLLM wants room for one request of full length, and ends it when its last token has none.
    # One block more than the books have keeps that end beyond what is ever leased.
    return {
        "kv_cache_memory_bytes": 1 << 20,  # not looked at, but without it vLLM takes what is free
        "num_gpu_blocks_override": blocks + 2,
        "max_model_len": min(context, blocks * block + 1),
    }


def _processor_for(batch: KeyedBatch) -> type:
    """vLLM wants a class, and makes the object: one that hands everything to this batch."""
    from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality

    class KeyedProcessor(LogitsProcessor):  # type: ignore[misc]
        def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
            pass

        def is_argmax_invariant(self) -> bool:
            return False

        def update_state(self, batch_update: Any) -> None:
            if batch_update is None:
                return
            for index in batch_update.removed:
                batch.remove(index)
            for index, parameters, _, made in batch_update.added:
                batch.add(index, parameters.extra_args[ROW], made)
            for start, end, direction in batch_update.moved:
                batch.move(start, end, swap=direction == MoveDirectionality.SWAP)

        def apply(self, logits: torch.Tensor) -> torch.Tensor:
            return batch.choose(logits)

    return KeyedProcessor


def _prompt_scores(output: Any, wanted: int) -> tuple[TokenLogprobs, ...]:
    """One entry per prompt token; the first has no probability."""
    if not output.prompt_logprobs:
        return ()
    scores = [TokenLogprobs(chosen=None)]
    pairs = zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
    for token, entry in itertools.islice(pairs, 1, None):
        # Beside the likely ones the token itself is there, wherever it stands.
        best = sorted(entry, key=lambda i: entry[i].logprob, reverse=True)[:wanted]
        scores.append(
            TokenLogprobs(
                chosen=entry[token].logprob,
                top_ids=pack(best),
                top_logprobs=tuple(entry[i].logprob for i in best),
            )
        )
    return tuple(scores)
