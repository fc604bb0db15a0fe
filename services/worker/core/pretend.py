"""A pretend worker that runs leases: what a real one would do and when, without a model.

Theory of operation. Every request has a seat. A seat prefills (in order of arrival, in chunks),
then runs, pauses when its lease is used up, and leaves when it ends, is parked or is dropped.
Time moves in jumps: a jump is one iteration with prefill in it, or as many iterations of decodes
alone as pass before a seat has something to report. All running seats make one token an
iteration, so none of them is touched in a jump: a seat's position is its `base` plus the engine's
count of decode steps, and what it will report next stands in a heap under the step at which it
will. A long generation costs a few operations a lease, not one a token.

What comes from outside (`add`, `renew`, `park`, `drop`) cuts the current jump at the end of the
iteration that runs, unless it can wait. `advance(now)` completes jumps and returns what there is
to report. The engine keeps the truth about its blocks and never uses more than it has.
"""

from collections.abc import Iterator

from services.worker.core.pretend_agenda import Agenda
from services.worker.core.pretend_blocks import BlockPool
from services.worker.core.pretend_gaps import Gaps
from services.worker.core.pretend_line import PrefillLine
from services.worker.core.pretend_parts import (
    Costs,
    Noise,
    Progress,
    Spans,
    Tally,
    no_noise,
)
from services.worker.core.pretend_seats import Jump, Measured, Seat, Stage, note_jump
from shared.messages import FinishReason, SliceTimings

ITERATION_TOKENS = 2048
"""The engine's own limit where an order gives none: vLLM V1's default before Hopper."""


class LeasedEngine:
    """See the module's text. `noise` draws the factor of a jump from the caller's generator."""

    def __init__(
        self,
        costs: Costs,
        kv_tokens: int,
        block_tokens: int = 1,
        noise: Noise = no_noise,
        spans: Spans | None = None,
        prefix_cache: bool = False,
        composes_after_s: float | None = None,
    ) -> None:
        """`spans`: where to write down what was worked on when, if anybody wants to see it.
        `prefix_cache`: who comes back finds what is left of its KV.
        `composes_after_s`: the next iteration's prefill is composed so long after the start of
        the one that runs, as vLLM does with asynchronous scheduling; who comes later sits it out.
        None: it is composed when it starts."""
        self.pool = BlockPool(kv_tokens, block_tokens, prefix_cache)
        self._composes_after_s = composes_after_s
        self.tally = Tally()
        self.spans = spans
        self._costs = costs
        self._noise = noise
        self._margin_tokens = 0
        self._iteration_tokens = ITERATION_TOKENS
        self._prefill_first = False
        self._seats: dict[str, Seat] = {}
        self._steps = 0
        self._running = 0
        self._contexts = 0
        """Sum of prompt plus output of the running seats."""
        self._prefills = PrefillLine(self.pool)
        self._agenda = Agenda()
        self._added = 0
        self._joining: list[Seat] = []
        """Paused seats with a new lease: they run when the running iteration is over."""
        self._leaving: list[tuple[Seat, bool]] = []
        """(seat, whether to report it): they go when the running iteration is over."""
        self._jump: Jump | None = None
        self._gaps = Gaps()
        self._reports: list[Progress] = []
        self._measured = Measured()

    # ------------------------------------------------------------------------ what comes in

    def configure(self, margin_tokens: int, iteration_tokens: int, prefill_first: bool) -> None:
        """As the latest RunSlice says, for all that comes from now on."""
        self._margin_tokens = margin_tokens
        self._iteration_tokens = iteration_tokens or ITERATION_TOKENS
        self._prefill_first = prefill_first

    def add(
        self,
        request_id: str,
        attempt: int,
        *,
        prompt_tokens: int,
        made: int,
        lease_tokens: int,
        true_length: int,
        max_tokens: int,
        now: float,
    ) -> None:
        """A new request, or a new attempt at one, whose older attempt is dropped. `true_length` is
        where the model would end it by itself; only the engine's owner knows it."""
        old = self._seats.get(request_id)
        if old is not None and old.attempt >= attempt:
            return
        if old is not None:
            self._leaving.append((old, False))
        self._added += 1
        ends = true_length <= max_tokens
        seat = Seat(
            request_id=request_id,
            attempt=attempt,
            prompt_tokens=prompt_tokens,
            made=made,
            length=true_length if ends else max_tokens,
            reason="stop" if ends else "length",
            cap=max_tokens,
            until=made + max(1, lease_tokens),
            number=self._added,
            arrived_at=now,
            base=made,
            reported=made,
        )
        self._seats[request_id] = seat
        self.pool.reserved += seat.lease_blocks(self.pool.size)
        self._prefills.add(seat, late=self._composed_by(now))
        self._interrupt(now)

    def renew(self, request_id: str, attempt: int, until: int, now: float) -> bool:
        """A longer lease, which a running seat takes up without a break. False: it is not here, or
        its lease is as long already."""
        seat = self._seats.get(request_id)
        if seat is None or seat.attempt != attempt or until <= seat.until:
            return False
        pool = self.pool
        before = seat.lease_blocks(pool.size)
        seat.until, seat.margin_told = until, False
        pool.reserved += seat.lease_blocks(pool.size) - before
        if seat.stage is Stage.RUNNING:
            self._schedule(seat)
            if self._jump is not None and seat.event_step < self._steps + self._jump.steps:
                self._interrupt(now)
        elif seat.stage is Stage.PAUSED and seat not in self._joining:
            self._joining.append(seat)
            self._interrupt(now)
        return True

    def park(self, request_id: str, attempt: int, now: float) -> None:
        """End the lease after the running iteration, and say so."""
        seat = self._seats.get(request_id)
        if seat is not None and seat.attempt == attempt:
            self._leaving.append((seat, True))
            self._interrupt(now)

    def drop(self, request_id: str, attempt: int, now: float) -> None:
        """Forget attempts up to this one, without a word."""
        seat = self._seats.get(request_id)
        if seat is not None and seat.attempt <= attempt:
            self._leaving.append((seat, False))
            self._interrupt(now)

    # ------------------------------------------------------------------------- what it says

    def next_at(self) -> float | None:
        """When to call `advance` next; None while nothing runs. What comes in may bring it
        forward, so ask again after that."""
        if self._reports:
            return self._reports[0].at
        return self._jump.end if self._jump is not None else None

    def next_iteration_at(self, now: float) -> float | None:
        """When the iteration that runs is over and there are new tokens; None: nothing runs."""
        jump = self._jump
        if self._reports or jump is None or jump.steps <= 1:
            return self.next_at()
        steps = self._steps_by(now) + 1
        taken_s = self._costs.decode_steps_s(jump.decodes, self._contexts, steps)
        return min(jump.end, jump.start + jump.factor * taken_s)

    def advance(self, now: float) -> list[Progress]:
        """Complete the jumps that end by `now`, and begin the next. Reports are in order of time;
        those of one iteration have the same `at`."""
        while self._jump is not None and self._jump.end <= now:
            end = self._jump.end
            self._complete(self._jump)
            self._plan(end)
        reports, self._reports = self._reports, []
        return reports

    def positions(self, now: float) -> Iterator[tuple[str, int, int]]:
        """(request, attempt, output tokens) of every seat after the iterations over by `now`."""
        within = self._steps_by(now)
        for seat in self._seats.values():
            yield seat.request_id, seat.attempt, self._position(seat, within)

    def position_of(self, request_id: str, attempt: int, now: float) -> int | None:
        """Output tokens of one seat after the iterations over by `now`; None if it is not here."""
        seat = self._seats.get(request_id)
        if seat is None or seat.attempt != attempt:
            return None
        return self._position(seat, self._steps_by(now))

    def until_of(self, request_id: str) -> int:
        """Where the lease of a seat ends; 0 if it is not here."""
        seat = self._seats.get(request_id)
        return 0 if seat is None else seat.until

    def last_token_at(self, request_id: str, now: float) -> float | None:
        """When its newest token was there; None if it is not here or has made none here."""
        seat = self._seats.get(request_id)
        if seat is None or seat.stage is Stage.PREFILLING:
            return None
        steps, jump = self._steps_by(now), self._jump
        if seat.stage is Stage.RUNNING and steps and jump is not None:
            taken_s = self._costs.decode_steps_s(jump.decodes, self._contexts, steps)
            return jump.start + jump.factor * taken_s
        return self._gaps.last_at(seat)

    def paused_since(self, until: float) -> list[tuple[str, int]]:
        """(request, attempt) of seats that have waited for a renewal since `until` or longer."""
        if len(self._seats) == self._running + len(self._prefills):
            return []
        seats = self._seats.values()
        paused = (s for s in seats if s.stage is Stage.PAUSED and s.last_at <= until)
        return [(seat.request_id, seat.attempt) for seat in paused]

    @property
    def running(self) -> int:
        """Seats that make a token an iteration."""
        return self._running

    @property
    def waiting(self) -> int:
        """Seats whose prefill is not over."""
        return len(self._prefills)

    @property
    def seats(self) -> int:
        """Requests here, in whatever stage."""
        return len(self._seats)

    @property
    def kv_tokens(self) -> int:
        """Slots of all blocks in use after the last completed jump."""
        return self.pool.used * self.pool.size

    def take_timings(self) -> SliceTimings:
        """Measured since the last call. If somebody's prefill ended, it is about that prefill
        (batch size 1, from its first chunk to its first token, whatever ran beside it). Else about
        the iterations of decodes alone, as of a closed batch of the mean size whose input was the
        mean context; `iterations` is then one more than the steps."""
        measured, self._measured = self._measured, Measured()
        return measured.as_message()

    # -------------------------------------------------------------------------------- jumps

    def _interrupt(self, now: float) -> None:
        """Something changed: the current jump ends with the iteration that runs now."""
        jump = self._jump
        if jump is None:
            self._plan(now)
        elif jump.steps > 1:
            steps = self._steps_by(now) + 1
            if steps < jump.steps:
                taken_s = self._costs.decode_steps_s(jump.decodes, self._contexts, steps)
                jump.steps, jump.end = steps, max(now, jump.start + jump.factor * taken_s)

    def _plan(self, now: float) -> None:
        """Begin the next jump, if there is anything to do."""
        self._jump = None
        if self._leaving:
            self._let_leave(now)
        if self._joining:
            self._let_join()
        self._jump = self._composed(now)
        if self._prefills.has_late:
            self._prefills.admit_late()
            if self._jump is None:
                self._jump = self._composed(now)

    def _composed(self, now: float) -> Jump | None:
        """The next jump, of what is here; None if there is nothing to do."""
        line, pool = self._prefills, self.pool
        overbooked = pool.reserved > pool.most
        while True:
            room = self._iteration_tokens - (0 if self._prefill_first else self._running)
            chunks = line.chunks(room) if line else []
            decodes = 0 if chunks and self._prefill_first else self._running
            if not chunks and not decodes:
                return None
            steps = 0
            if decodes:
                single = bool(chunks) or line.has_late or overbooked
                steps = 1 if single else max(1, self._agenda.next_step() - self._steps)
            if not overbooked:
                break
            # Nobody promised that this fits: look at every iteration.
            need = sum(pool.growth(seat, tokens) for seat, tokens in chunks)
            if pool.used + need + pool.begun(self._steps, steps) <= pool.most:
                break
            self._evict(max(self._seats.values(), key=lambda seat: seat.number), now)
        return self._jump_of(now, chunks, decodes, steps)

    def _jump_of(
        self, now: float, chunks: list[tuple[Seat, int]], decodes: int, steps: int
    ) -> Jump:
        costs, contexts = self._costs, self._contexts
        if chunks:
            parts = [(tokens, seat.filled) for seat, tokens in chunks]
            first_s = whole_s = costs.iteration_s(parts, decodes, contexts if decodes else 0)
        else:
            first_s = whole_s = costs.decode_steps_s(decodes, contexts, 1)
            if steps > 1:
                whole_s = costs.decode_steps_s(decodes, contexts, steps)
        factor = self._noise(steps or 1)
        return Jump(now, now + factor * whole_s, steps, decodes, factor, factor * first_s, chunks)

    def _composed_by(self, now: float) -> bool:
        """Whether the iteration after the one that runs has its prefill already."""
        jump = self._jump
        if jump is None or self._composes_after_s is None:
            return False
        steps, begun_at = self._steps_by(now), jump.start
        if steps:
            taken_s = self._costs.decode_steps_s(jump.decodes, self._contexts, steps)
            begun_at += jump.factor * taken_s
        return now > begun_at + self._composes_after_s

    def _steps_by(self, now: float) -> int:
        """Whole decode steps of the current jump that are over by `now`."""
        jump = self._jump
        if jump is None or not jump.steps or now < jump.start + jump.first_s:
            return 0
        if now >= jump.end:
            return jump.steps
        if jump.steps == 1:
            return 0
        passed_s = (now - jump.start) / jump.factor
        within = self._costs.decode_steps_within(jump.decodes, self._contexts, passed_s)
        return min(max(within, 1), jump.steps - 1)

    def _complete(self, jump: Jump) -> None:
        """The jump is over: count it, then see who has something to report."""
        tally, pool, steps = self.tally, self.pool, jump.steps
        used = pool.used
        self._measured.count(jump, self._contexts)
        if steps:
            pool.take(pool.begun(self._steps, steps))
            self._gaps.stepped(jump, self._steps)
            self._steps += steps
            self._contexts += jump.decodes * steps
            tally.decode_tokens += jump.decodes * steps
        for seat, tokens in jump.chunks:
            self._fill(seat, tokens, jump.start)
        assert pool.used <= pool.most, "more blocks in use than there are"
        iterations = max(1, steps)
        tally.busy_s += jump.end - jump.start
        tally.iterations += iterations
        tally.sequence_iterations += iterations * (jump.decodes + len(jump.chunks))
        tally.count_memory(jump.start, jump.end, used, pool.used)
        if self.spans is not None:
            note_jump(self.spans, jump)
        self._jump = None
        if steps:
            for seat in self._agenda.due(self._steps):
                self._look_at(seat, jump.end, first=False)
        if jump.chunks:
            self._prefills_over(jump.end)

    def _fill(self, seat: Seat, tokens: int, began_at: float) -> None:
        if seat.began_at < 0:
            seat.began_at = began_at
        self.pool.take(self.pool.growth(seat, tokens))
        seat.filled += tokens
        self.tally.prefill_tokens += tokens

    def _prefills_over(self, now: float) -> None:
        for seat in self._prefills.over():
            seat.last_at = now
            seat.base = seat.made + (seat.made < seat.length)
            self._run(seat)
            self._measured.prefilled(seat, now)
            self._look_at(seat, now, first=True)

    # -------------------------------------------------------------------------------- seats

    def _position(self, seat: Seat, within: int) -> int:
        """Output tokens, `within` steps into the current jump."""
        if seat.stage is Stage.RUNNING:
            return seat.base + self._steps + within
        return seat.base

    def _look_at(self, seat: Seat, now: float, *, first: bool) -> None:
        """It has reached something that was to be reported, or it has its first token."""
        position = self._position(seat, 0)
        if position >= seat.length:
            self._report(seat, now, position, first=first, reason=seat.reason)
            self._depart(seat, now)
            return
        low = seat.until - position <= self._margin_tokens and seat.until < seat.cap
        if position >= seat.until:
            self._rest(seat, Stage.PAUSED)
            self._report(seat, now, position, first=first, resident=True)
        elif first or (low and not seat.margin_told):
            self._report(seat, now, position, first=first, resident=True)
        seat.margin_told = seat.margin_told or low
        if seat.stage is Stage.RUNNING:
            self._schedule(seat)

    def _schedule(self, seat: Seat) -> None:
        """Put the next thing that it has to report into the heap."""
        step = min(seat.length, seat.until) - seat.base
        if not seat.margin_told and seat.until < seat.cap:
            low = seat.until - self._margin_tokens - seat.base
            step = min(step, max(low, self._steps + 1))
        self._agenda.put(seat, step)

    def _report(
        self,
        seat: Seat,
        now: float,
        position: int,
        *,
        first: bool = False,
        reason: FinishReason | None = None,
        resident: bool = False,
        evicted: bool = False,
    ) -> None:
        report = Progress(
            request_id=seat.request_id,
            attempt=seat.attempt,
            at=now,
            position=seat.reported,
            tokens=position - seat.reported,
            first=first,
            finish_reason=reason,
            resident=resident,
            evicted=evicted,
            gap_s=self._gaps.longest(seat),
            first_at=seat.last_at if first else 0.0,
            last_at=self._gaps.last_at(seat),
            cached_tokens=max(0, seat.cached) if first else 0,
        )
        self._reports.append(report)
        seat.reported, seat.gap_s, seat.gap_from = position, 0.0, max(seat.gap_from, self._steps)

    def _run(self, seat: Seat) -> None:
        """It makes a token an iteration from the next jump on. `base` is its position."""
        self._contexts += seat.prompt_tokens + seat.base
        seat.stage = Stage.RUNNING
        seat.base -= self._steps
        seat.event_step = -1
        self._running += 1
        self.pool.begins(seat)
        self._gaps.begins(seat, self._steps)

    def _rest(self, seat: Seat, stage: Stage) -> None:
        """It runs no more."""
        if seat.stage is Stage.RUNNING:
            self.pool.ends(seat)
            seat.base += self._steps
            self._running -= 1
            self._contexts -= seat.prompt_tokens + seat.base
            self._gaps.ends(seat, self._steps, last=not self._running)
        seat.stage = stage

    def _let_join(self) -> None:
        joining, self._joining = self._joining, []
        for seat in joining:
            if seat.stage is Stage.PAUSED:
                self._run(seat)
                self._schedule(seat)

    def _let_leave(self, now: float) -> None:
        leaving, self._leaving = self._leaving, []
        for seat, told in leaving:
            if seat.stage is Stage.GONE:
                continue
            if told:
                self._report(seat, now, self._position(seat, 0))
            self._depart(seat, now)

    def _evict(self, seat: Seat, now: float) -> None:
        """There are no blocks left: the newest goes. A scheduler that keeps its books right never
        lets it come to this."""
        self.tally.evictions += 1
        self._report(seat, now, self._position(seat, 0), evicted=True)
        self._depart(seat, now)

    def _depart(self, seat: Seat, now: float) -> None:
        """Free its blocks and forget it."""
        self.tally.count_memory(now, now, self.pool.used, self.pool.used)
        self.pool.give_back(seat, self._position(seat, 0))
        self.pool.reserved -= seat.lease_blocks(self.pool.size)
        if seat.stage is Stage.PREFILLING:
            self._prefills.remove(seat)
        self._rest(seat, Stage.GONE)
        if self._seats.get(seat.request_id) is seat:
            del self._seats[seat.request_id]
