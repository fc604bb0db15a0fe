"""Engine `simulated`: takes the time that a cost profile says and makes nonsense; no model, no GPU.

Theory of operation. The truth of what runs when is `core/pretend*.py`, the same as in simulations:
continuous batching of leases, or padded closed batches, over a pretend KV pool. This engine gives
it orders with the time of its clock, sleeps until something has happened there, and puts what has
happened into the words of an engine. A step returns at the end of what happens next, or after a
tick, so that tokens flow while long jumps of decodes are under way, or when it is interrupted
because something new has come; that then joins at the end of the iteration that runs, as on a GPU.

Use it for load tests of a mesh: the text means nothing, and depends only on seeds and positions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from services.worker.core.pretend import LeasedEngine as PretendLeases
from services.worker.core.pretend_closed import ClosedEngine as PretendBatches, Row
from services.worker.core.pretend_parts import Noise, Progress, no_noise, noise_of
from services.worker.engines.api import (
    BadOrder,
    EngineError,
    EngineInfo,
    LeaseEnd,
    OutOfMemory,
    SliceEnd,
    StepReport,
    StepTokens,
)
from services.worker.engines.simulated_clock import Clock, WallClock
from services.worker.engines.simulated_text import Texts, load_lengths
from services.worker.models_config import read_config
from services.worker.settings import WorkerSettings
from shared.config import SetupError
from shared.memory import closed_batch_tokens, leased_blocks
from shared.messages import (
    FinishReason,
    RequestSpec,
    RunSlice,
    SliceOrder,
    SliceResult,
    WorkerMemory,
)
from shared.profiles import BadProfile, CostProfile, UnknownProfile, load_profile
from shared.tokens import count, pack, unpack


def make_simulated(settings: WorkerSettings, clock: Clock | None = None) -> "SimulatedEngine":
    """The engine that the settings describe. Raises SetupError."""
    try:
        profile = load_profile(settings.profile)
    except (UnknownProfile, BadProfile) as error:
        raise SetupError(f"--profile: {error}") from error
    model = read_config(settings)
    block = profile.kv_block_tokens
    kv_tokens = (settings.kv_tokens or profile.kv_tokens) // block * block
    if not kv_tokens:
        raise SetupError(f"kv_tokens {settings.kv_tokens} is less than a block of {block}")
    cv = profile.noise_cv if settings.simulated_noise is None else settings.simulated_noise
    info = EngineInfo(
        engine="simulated",
        forms=("closed", "leased"),
        model=settings.served_name(),
        context_tokens_max=model.context_tokens_max,
        vocabulary_size=model.vocabulary_size,
        end_token_ids=model.end_token_ids,
        batch_size_max=settings.batch_size_max,
        device="simulated",
        kv_block_tokens=block,
        details={"profile": profile.name, "speed": f"{settings.simulated_speed:g}"},
    )
    return SimulatedEngine(
        info,
        profile,
        kv_tokens=kv_tokens,
        texts=Texts(load_lengths(settings.simulated_lengths), model),
        noise=noise_of(Random(settings.name).gauss, cv) if cv else no_noise,  # noqa: S311
        clock=clock or WallClock(settings.simulated_speed),
    )


@dataclass(slots=True)
class _Request:
    """One that is here, and how far its tokens have been told."""

    order: SliceOrder
    told: int
    """Output tokens that were told."""
    finished: bool = False
    """Its end was told, too."""

    @property
    def spec(self) -> RequestSpec:
        return self.order.spec


class SimulatedEngine:
    """See the module's text."""

    def __init__(
        self,
        info: EngineInfo,
        profile: CostProfile,
        *,
        kv_tokens: int,
        texts: Texts,
        clock: Clock,
        noise: Noise = no_noise,
    ) -> None:
        self._info = info
        self._kv_tokens = kv_tokens
        self._kv_bytes = profile.kv_bytes_per_token
        self._texts = texts
        self._clock = clock
        self._leases = PretendLeases(profile, kv_tokens, info.kv_block_tokens, noise)
        self._batches = PretendBatches(profile, kv_tokens, noise)
        self._requests: dict[str, _Request] = {}
        self._counted = {True: (0.0, 0), False: (0.0, 0)}
        """Closed or not -> seconds and iterations that were told."""

    @property
    def info(self) -> EngineInfo:
        """What this engine is."""
        return self._info

    @property
    def busy(self) -> bool:
        """Something happens without anything new."""
        return self._next_at() is not None

    def interrupt(self) -> None:
        """From any thread: the step that runs returns now."""
        self._clock.interrupt()

    # ---------------------------------------------------------------------------- orders

    def start(self, order: RunSlice) -> None:
        """Take in a batch or leases. Raises OutOfMemory or BadOrder; then nothing was taken."""
        for share in order.orders:
            self._check(share)
        if not order.orders:
            raise BadOrder("the batch is empty")
        if order.form == "closed":
            self._start_batch(order)
        else:
            self._start_leases(order)
        self._requests |= {
            share.spec.request_id: _Request(share, count(share.tokens)) for share in order.orders
        }

    def renew(self, request_id: str, until: int) -> None:
        """The request may make output up to position `until`."""
        request = self._requests.get(request_id)
        if request is not None:
            self._leases.renew(request_id, request.order.attempt, until, self._clock.now())

    def park(self, request_id: str) -> None:
        """Its lease ends after the iteration that runs; a step says so."""
        request = self._requests.get(request_id)
        if request is not None:
            self._leases.park(request_id, request.order.attempt, self._clock.now())

    def cancel(self, request_id: str) -> None:
        """No more tokens of this request."""
        request = self._requests.get(request_id)
        if request is None:
            return
        attempt, now = request.order.attempt, self._clock.now()
        self._batches.drop(request_id, attempt, now)
        if self._leases.position_of(request_id, attempt, now) is not None:
            self._leases.drop(request_id, attempt, now)
            del self._requests[request_id]

    def _check(self, share: SliceOrder) -> None:
        prompt, made = count(share.spec.prompt), count(share.tokens)
        named, budget = f"request {share.spec.request_id}", _budget(share)
        if not prompt:
            raise BadOrder(f"{named} has no prompt")
        ids = (*unpack(share.spec.prompt), *unpack(share.tokens))
        if max(ids) >= self._info.vocabulary_size:
            raise BadOrder(
                f"{named} has token ids beyond the vocabulary of {self._info.vocabulary_size}"
            )
        if prompt + made + budget > self._info.context_tokens_max:
            raise BadOrder(
                f"{named} would exceed the context of {self._info.context_tokens_max} tokens"
            )

    def _start_batch(self, order: RunSlice) -> None:
        assert self._batches.next_at() is None, "a closed batch was started while another one runs"
        if self._leases.seats:
            raise EngineError("leases are held here; a closed batch has no room beside them")
        most = self._info.batch_size_max
        if most and len(order.orders) > most:
            raise OutOfMemory(f"{len(order.orders)} requests; at most {most} fit")
        budget = max(_budget(share) for share in order.orders)
        iterations = max(1, min(budget, order.iterations) if order.iterations else budget)
        rows = [
            Row(
                request_id=share.spec.request_id,
                attempt=share.attempt,
                prompt_tokens=count(share.spec.prompt),
                made=count(share.tokens),
                lease_tokens=share.lease_tokens,
                true_length=self._texts.length(share.spec),
                max_tokens=share.spec.max_tokens,
            )
            for share in order.orders
        ]
        if not self._batches.fits(rows, iterations):
            need = closed_batch_tokens(len(rows), max(row.input_tokens for row in rows), iterations)
            raise OutOfMemory(f"the batch needs {need} tokens of KV, there are {self._kv_tokens}")
        self._batches.start(order.batch_id, rows, iterations, self._clock.now())

    def _start_leases(self, order: RunSlice) -> None:
        if self._batches.next_at() is not None:
            raise EngineError("a closed batch runs; leases have no room beside it")
        block, now = self._info.kv_block_tokens, self._clock.now()
        for share in order.orders:
            until = count(share.tokens) + max(1, share.lease_tokens)
            need = leased_blocks(count(share.spec.prompt), until, block) * block
            if need > self._kv_tokens:
                raise OutOfMemory(
                    f"request {share.spec.request_id} needs {need} tokens of KV, there are "
                    f"{self._kv_tokens}"
                )
        self._leases.configure(order.margin_tokens, order.iteration_tokens, order.prefill_first)
        for share in order.orders:
            self._leases.add(
                share.spec.request_id,
                share.attempt,
                prompt_tokens=count(share.spec.prompt),
                made=count(share.tokens),
                lease_tokens=share.lease_tokens,
                true_length=self._texts.length(share.spec),
                max_tokens=share.spec.max_tokens,
                now=now,
            )

    # ----------------------------------------------------------------------------- steps

    def step(self) -> StepReport:
        """Until something has happened, a tick at most."""
        at = self._next_at()
        if at is None:
            return StepReport()
        self._clock.wait_until(min(at, self._clock.now() + self._clock.tick_s))
        now = self._clock.now()
        closed = self._batches.next_at() is not None
        size = self._batches.running if closed else self._leases.running
        report = self._step_batches(now) if closed else self._step_leases(now)
        iteration_s = self._iteration_s(closed)
        return StepReport(
            tokens=report.tokens,
            ended=report.ended,
            left=report.left,
            timings=report.timings,
            decode_s=iteration_s,
            batch_size=size,
        )

    def next_tokens_at(self) -> float | None:
        """When a step has something to tell, on the clock; None: never by itself. For whoever
        steps without waiting."""
        now = self._clock.now()
        at = self._batches.next_at()
        if at is not None:
            return min(at, now + self._clock.tick_s)
        return self._leases.next_iteration_at(now)

    def _next_at(self) -> float | None:
        at = self._batches.next_at()
        return self._leases.next_at() if at is None else at

    def _iteration_s(self, closed: bool) -> float:
        """The mean time of the iterations that were counted since the last step; 0: none."""
        tally = (self._batches if closed else self._leases).tally
        seconds, iterations = self._counted[closed]
        self._counted[closed] = (tally.busy_s, tally.iterations)
        new = tally.iterations - iterations
        return (tally.busy_s - seconds) / new if new else 0.0

    def _step_leases(self, now: float) -> StepReport:
        progress = self._leases.advance(now)
        tokens = list(self._ends(progress))
        left = tuple(
            LeaseEnd(p.request_id, p.attempt, p.evicted)
            for p in progress
            if not p.resident and p.finish_reason is None and self._is_here(p)
        )
        tokens += self._told(self._leases.positions(now))
        for over in progress:
            if not over.resident and self._is_here(over):
                del self._requests[over.request_id]
        timings = self._leases.take_timings() if progress else None
        return StepReport(tokens=tuple(tokens), left=left, timings=timings)

    def _step_batches(self, now: float) -> StepReport:
        over = self._batches.advance(now)
        tokens = [run for batch in over for run in self._ends(batch.rows)]
        tokens += self._told(self._batches.positions(now))
        ended = tuple(
            SliceEnd(batch.batch_id, tuple(self._result(row) for row in batch.rows), batch.timings)
            for batch in over
        )
        for batch in over:
            for row in batch.rows:
                del self._requests[row.request_id]
        return StepReport(tokens=tuple(tokens), ended=ended)

    def _is_here(self, progress: Progress) -> bool:
        request = self._requests.get(progress.request_id)
        return request is not None and request.order.attempt == progress.attempt

    def _ends(self, progress: Sequence[Progress]) -> Iterator[StepTokens]:
        """Untold tokens of those that are over."""
        for one in progress:
            if self._is_here(one) and not one.resident and one.finish_reason != "cancelled":
                request = self._requests[one.request_id]
                yield from self._run(request, one.position + one.tokens, one.finish_reason)

    def _told(self, positions: Iterator[tuple[str, int, int]]) -> Iterator[StepTokens]:
        """New tokens of those that go on."""
        for request_id, attempt, position in positions:
            request = self._requests.get(request_id)
            if request is not None and request.order.attempt == attempt:
                yield from self._run(request, position)

    def _run(
        self, request: _Request, end: int, finish: FinishReason | None = None
    ) -> Iterator[StepTokens]:
        begin, spec = request.told, request.spec
        if request.finished or (end <= begin and finish is None):
            return
        length = self._texts.length(spec)
        if finish is None and end >= min(length, spec.max_tokens):
            # A row of a closed batch, which is over before its batch is.
            finish = "stop" if end >= length else "length"
        request.told, request.finished = end, finish is not None
        ended = finish == "stop" and end > begin
        prompt = count(spec.prompt)
        yield StepTokens(
            request_id=spec.request_id,
            attempt=request.order.attempt,
            position=begin,
            ids=self._texts.ids(spec, begin, end, ended=ended),
            finish_reason=finish,
            ending_token=ended and bool(self._info.end_token_ids),
            logprobs=self._texts.logprobs(spec, end - begin),
            prompt_logprobs=() if begin else self._texts.prompt_logprobs(spec, prompt),
        )

    def _result(self, row: Progress) -> SliceResult:
        spec = self._requests[row.request_id].spec
        end = row.position + row.tokens
        ids = self._texts.ids(spec, row.position, end, ended=row.finish_reason == "stop")
        return SliceResult(
            request_id=row.request_id,
            attempt=row.attempt,
            position=row.position,
            tokens=pack(ids),
            finish_reason=row.finish_reason,
            invalid_tokens=row.invalid_tokens,
            pad_tokens=row.pad_tokens,
        )

    # ---------------------------------------------------------------------------- memory

    def memory(self) -> WorkerMemory:
        """Exact, of the pretend pool."""
        used = self._batches.kv_tokens or self._leases.kv_tokens
        size, all_tokens = self._kv_bytes, self._kv_tokens
        return WorkerMemory(
            kv_tokens_capacity=all_tokens,
            kv_tokens_used=used,
            kv_bytes_per_token=size,
            kv_bytes_capacity=all_tokens * size,
            kv_bytes_used=used * size,
            device_bytes_free=(all_tokens - used) * size,
            device_bytes_total=all_tokens * size,
        )

    def close(self) -> None:
        """Nothing to free."""


def _budget(share: SliceOrder) -> int:
    """Most new tokens of this slice."""
    return max(0, min(share.lease_tokens, share.spec.max_tokens - count(share.tokens)))
