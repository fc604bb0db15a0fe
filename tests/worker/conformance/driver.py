"""Runs leases on an engine as a worker does, and holds it to its credit and its books.

The driver keeps its own truth: which requests are there, up to where each may go, and what memory
follows from that. Every report is checked against it.
"""

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from msgspec.structs import replace as changed

from services.worker.engines.api import Engine, LeasedEngine, LeaseEnd, StepReport
from shared.memory import leased_blocks
from shared.messages import RequestSpec, RunSlice, Sampling, SliceOrder
from shared.tokens import count
from tests.worker.conformance.subjects import Kit, Subject
from tests.worker.orders import GREEDY, Made, make_batch, make_order, make_spec, run_to_end
from tests.worker.tiny_models import BEGIN

UNKNOWN = Subject("unknown", "leased", stepwise=False, sets_aside=False)
"""Promises nothing; its tests may speak to it past the driver, which then has no books."""
STEPS_MAX = 5_000
"""An engine that is busy for so many steps without an end does not end."""


def some_prompts(number: int, longest: int = 60, seed: int = 3) -> list[list[int]]:
    """Prompts of mixed length; no two share their first block."""
    rng = Random(seed)
    return [
        [BEGIN, *(rng.randrange(256) for _ in range(rng.randrange(1, longest)))]
        for _ in range(number)
    ]


def some_specs(
    number: int, max_tokens: int = 60, sampling: Sampling = GREEDY, seed: int = 3
) -> list[RequestSpec]:
    """Requests r0, r1, ... with seeds of their own."""
    return [
        make_spec(f"r{n}", prompt, max_tokens, changed(sampling, seed=n * 7919 + sampling.seed))
        for n, prompt in enumerate(some_prompts(number, seed=seed))
    ]


def leases(*orders: SliceOrder, **more: Any) -> RunSlice:
    """An order of leases."""
    return changed(make_batch(*orders, form="leased"), **more)


class Driver:
    """See the module's text."""

    def __init__(self, engine: Engine, subject: Subject = UNKNOWN, *, shares: bool = False) -> None:
        """`shares`: requests begin alike, so that they may need less memory than each alone."""
        assert isinstance(engine, LeasedEngine)
        self.engine = engine
        self.subject = subject
        self.shares = shares
        self.made: dict[str, Made] = {}
        self.until: dict[str, int] = {}
        """Of those that are there."""
        self.attempts: dict[str, int] = {}
        self.left: list[LeaseEnd] = []
        self.cancelled_tokens = 0
        """KV that they may still fill where an iteration is longer than a step."""

    # ------------------------------------------------------------------------ what a worker does

    def start(self, *orders: SliceOrder, **more: Any) -> None:
        """If it raises, nothing is there that was not before."""
        self.engine.start(leases(*orders, **more))
        for order in orders:
            name = order.spec.request_id
            known = self.made.setdefault(name, Made(order.spec))
            assert count(order.tokens) == len(known.ids)
            self.until[name] = min(len(known.ids) + order.lease_tokens, order.spec.max_tokens)
            self.attempts[name] = order.attempt

    def go_on(self, name: str, lease_tokens: int, **more: Any) -> None:
        """A new attempt at a request that is not there any more."""
        made = self.made[name]
        attempt = self.attempts[name] + 1
        self.start(make_order(made.spec, lease_tokens, made.ids, attempt=attempt), **more)

    def renew(self, name: str, until: int) -> None:
        """Raise its lease; a lower one is given on to the engine all the same."""
        until_now = min(until, self.made[name].spec.max_tokens)
        self.until[name] = max(self.until[name], until_now)
        self.engine.renew(name, until)

    def park(self, name: str) -> None:
        """Ask for its end."""
        self.engine.park(name)

    def cancel(self, name: str) -> None:
        """It makes no more tokens from now on."""
        before = self.predicted_tokens
        self.engine.cancel(name)
        del self.until[name]
        if not self.subject.stepwise:
            self.cancelled_tokens += before - self.predicted_tokens

    def step(self) -> StepReport:
        """One step, checked."""
        report = self.engine.step()
        for tokens in report.tokens:
            name = tokens.request_id
            request = self.made[name]
            assert name in self.until, f"{name} is not there any more"
            assert tokens.attempt == self.attempts[name]
            assert tokens.position == len(request.ids), f"{name}: positions have a gap"
            assert tokens.ids or tokens.finish_reason, f"{name}: an empty report"
            wanted = request.spec.sampling.logprobs is not None
            assert len(tokens.logprobs) == (len(tokens.ids) if wanted else 0)
            request.ids += tokens.ids
            request.logprobs += tokens.logprobs
            request.prompt_logprobs += tokens.prompt_logprobs
            assert len(request.ids) <= self.until[name], f"{name}: beyond its credit"
            if tokens.finish_reason is not None:
                request.finish_reason = tokens.finish_reason
                del self.until[name]
        for end in report.left:
            assert end.attempt == self.attempts[end.request_id]
            del self.until[end.request_id]
        self.left += report.left
        self.check_books()
        return report

    def rest(self) -> None:
        """Until nothing happens any more by itself; then all have used up what they have."""
        for _ in range(STEPS_MAX):
            if not self.engine.busy:
                break
            self.step()
        assert not self.engine.busy, "it does not come to rest"
        for name, until in self.until.items() if self.subject is not UNKNOWN else ():
            assert len(self.made[name].ids) == until, f"{name} stopped before its lease's end"
        assert self.engine.step() == StepReport()

    def until_made(self, name: str, tokens: int) -> None:
        """Step until the request has made so many."""
        for _ in range(STEPS_MAX):
            if len(self.made[name].ids) >= tokens:
                return
            assert self.engine.busy, f"{name} stopped at {len(self.made[name].ids)} tokens"
            self.step()
        raise AssertionError(f"{name} does not come to {tokens} tokens")

    def run(self, lease_tokens: int) -> None:
        """Renew whatever rests until all have finished."""
        while self.until:
            self.rest()
            for name in list(self.until):
                self.renew(name, len(self.made[name].ids) + lease_tokens)

    # ------------------------------------------------------------------------------- its books

    @property
    def predicted_tokens(self) -> int:
        """KV that the leases may fill, in whole blocks."""
        size = self.engine.info.kv_block_tokens
        blocks = (
            leased_blocks(count(self.made[name].spec.prompt), max(until, 1), size)
            for name, until in self.until.items()
        )
        return size * sum(blocks)

    @property
    def used_tokens(self) -> int:
        return self.engine.memory().kv_tokens_used

    def check_books(self) -> None:
        """What is used is what follows from the leases, and busy is who has something to do."""
        memory = self.engine.memory()
        size = memory.kv_bytes_per_token
        assert memory.kv_tokens_used <= memory.kv_tokens_capacity
        assert memory.kv_tokens_used % self.engine.info.kv_block_tokens == 0
        assert memory.kv_bytes_used == memory.kv_tokens_used * size
        assert memory.kv_bytes_capacity == memory.kv_tokens_capacity * size
        if self.subject is UNKNOWN:
            return
        if self.subject.sets_aside and not self.shares:
            assert memory.kv_tokens_used == self.predicted_tokens
        else:
            assert memory.kv_tokens_used <= self.predicted_tokens + self.cancelled_tokens
        if any(len(self.made[name].ids) < until for name, until in self.until.items()):
            assert self.engine.busy, "somebody has credit, and it is not busy"

    def assert_empty(self) -> None:
        """Nothing is left, and nothing is to be done."""
        assert not self.engine.busy
        assert self.used_tokens == 0

    def ids(self, name: str) -> list[int]:
        return self.made[name].ids


def run_all(
    kit: Kit,
    engine: Engine,
    specs: Sequence[RequestSpec],
    slice_tokens: int | Mapping[str, int],
    at_once: int = 100,
    *,
    shares: bool = False,
    **more: Any,
) -> dict[str, Made]:
    """Run all requests, `slice_tokens` at a time (of each, or by name), in company that changes:
    in closed batches of so many, or as leases, so many at once, whoever waits joining when
    somebody has finished."""
    if isinstance(slice_tokens, int):
        slice_tokens = dict.fromkeys((spec.request_id for spec in specs), slice_tokens)
    if kit.subject.form == "closed":
        return run_to_end(engine, specs, slice_tokens, at_once)
    driver = Driver(engine, kit.subject, shares=shares)
    waiting = list(specs)
    while waiting or driver.until:
        joining = waiting[: at_once - len(driver.until)]
        del waiting[: len(joining)]
        if joining:
            orders = [make_order(spec, slice_tokens[spec.request_id]) for spec in joining]
            driver.start(*orders, **more)
        driver.rest()
        for name in list(driver.until):
            driver.renew(name, len(driver.ids(name)) + slice_tokens[name])
    driver.assert_empty()
    return driver.made
