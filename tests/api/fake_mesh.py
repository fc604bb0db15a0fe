"""A scheduler and a worker in one: it speaks the protocol and writes what a script says.

It keeps to the protocol, or breaks it in the ways that a broker and crashes do, as told by
`plan`: a function from a request to the messages about it.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field

from shared.bus.api import Delivery, QueueSpec
from shared.bus.memory import MemoryBus
from shared.bus.topology import ASKS, ORDERS, SCHEDULER_QUEUE, addresses_of
from shared.messages import (
    Accepted,
    AnyMessage,
    Cancel,
    GatewayBeat,
    Recall,
    Rejected,
    RequestSpec,
    SchedulerBeat,
    Submit,
    TokenBatch,
    TokenLogprobs,
    TokenRun,
)
from shared.tokens import pack, unpack

EOS = 2
RUN_TOKENS = 3
BEAT_S = 0.2
WORKER = "fake-worker"
FIRST_BEAT = SchedulerBeat(epoch=1, workers=1, context_tokens_max=2048)
Saying = TokenBatch | Recall | Accepted | Rejected | SchedulerBeat
Plan = Callable[[RequestSpec], Iterable[Saying]]


def output_of(spec: RequestSpec) -> list[int]:
    """A scripted output: depends on all that should change it, and ends by itself."""
    state = sum(unpack(spec.prompt)) * 31 + spec.choice * 7
    if spec.sampling.temperature > 0:
        state += spec.sampling.seed * 13
    ids: list[int] = []
    length = 20 + state % 20
    while len(ids) < spec.max_tokens:
        state = (state * 1_103_515_245 + 12_345) % 2**31
        ending = len(ids) >= max(length, spec.sampling.min_tokens)
        if ending and not spec.sampling.ignore_eos:
            ids.append(EOS)
            break
        chosen = state >> 8
        if spec.sampling.allowed_token_ids:
            ids.append(
                spec.sampling.allowed_token_ids[chosen % len(spec.sampling.allowed_token_ids)]
            )
        else:
            ids.append(270 + chosen % 1_700)  # past the single bytes: whole words
        if ids[-1] in spec.sampling.stop_token_ids:
            break
    return ids


def scores_of(spec: RequestSpec, ids: Iterable[int]) -> tuple[TokenLogprobs, ...]:
    """Made-up logprobs: the chosen token is always the best."""
    count = spec.sampling.logprobs
    if count is None:
        return ()
    return tuple(
        TokenLogprobs(
            chosen=-0.5,
            top_ids=pack([token_id, *range(300, 300 + count)][:count]),
            top_logprobs=tuple(-0.5 - rank for rank in range(count)),
        )
        for token_id in ids
    )


def runs_of(
    spec: RequestSpec,
    ids: list[int],
    *,
    attempt: int = 1,
    start: int = 0,
    size: int = RUN_TOKENS,
) -> list[TokenRun]:
    """An output as runs of at most `size` tokens, from position `start` on."""
    runs = []
    for position in range(start, len(ids), size):
        part = ids[position : position + size]
        last = position + len(part) == len(ids)
        ends = last and (part[-1] == EOS or part[-1] in spec.sampling.stop_token_ids)
        prompt_scores: tuple[TokenLogprobs, ...] = ()
        if position == 0 and spec.sampling.prompt_logprobs:
            _, *rest = scores_of(spec, unpack(spec.prompt))
            prompt_scores = (TokenLogprobs(chosen=None), *rest)
        runs.append(
            TokenRun(
                request_id=spec.request_id,
                attempt=attempt,
                position=position,
                ids=pack(part),
                finish_reason=("stop" if ends else "length") if last else None,
                ending_token=ends,
                logprobs=scores_of(spec, part),
                prompt_logprobs=prompt_scores,
            )
        )
    return runs


def batch(spec: RequestSpec, *runs: TokenRun) -> TokenBatch:
    """One message to the request's gateway."""
    return TokenBatch(gateway=spec.gateway, worker=WORKER, epoch=1, runs=runs)


def faithful(spec: RequestSpec) -> list[Saying]:
    """What a mesh without any trouble says."""
    return [batch(spec, run) for run in runs_of(spec, output_of(spec))]


@dataclass(slots=True)
class FakeMesh:
    """Answers each Submit with its plan; keeps all that it hears."""

    bus: MemoryBus
    plan: Plan = faithful
    pause_s: float = 0.0
    """Before each message of a plan."""
    beat: SchedulerBeat = FIRST_BEAT
    beating: bool = True
    on_beat: Callable[[GatewayBeat], None] = lambda beat: None
    heard: list[AnyMessage] = field(default_factory=list)
    specs: dict[str, RequestSpec] = field(default_factory=dict)
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    _tasks: asyncio.TaskGroup | None = None
    _cancelled: set[str] = field(default_factory=set)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["FakeMesh"]:
        """The mesh is there inside."""
        asks = QueueSpec(
            name=f"tranche.worker.{WORKER}",
            kind="exclusive",
            bindings=((ASKS, f"worker.{WORKER}"), (ORDERS, f"worker.{WORKER}")),
        )
        await self.bus.consume(SCHEDULER_QUEUE, self._on_delivery)
        await self.bus.consume(asks, self._on_delivery)
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            beating = tasks.create_task(self._beat())
            yield self
            beating.cancel()
            for task in tuple(tasks._tasks):
                task.cancel()

    async def say(self, message: Saying) -> None:
        """Sends one message, to whom it is addressed."""
        for address in addresses_of(message):
            await self.bus.publish(address, message, mandatory=False)

    async def until_heard(self, kind: type[AnyMessage], count: int = 1) -> list[AnyMessage]:
        """Waits until so many messages of a kind were heard; returns them."""

        def found() -> list[AnyMessage]:
            return [message for message in self.heard if isinstance(message, kind)]

        async with asyncio.timeout(10), self._changed:
            await self._changed.wait_for(lambda: len(found()) >= count)
        return found()

    async def _beat(self) -> None:
        while True:
            if self.beating:
                await self.say(self.beat)
            await asyncio.sleep(BEAT_S)

    async def _on_delivery(self, delivery: Delivery) -> None:
        message = delivery.message
        match message:
            case GatewayBeat():
                self.on_beat(message)
                return
            case Submit(spec=spec):
                self.specs[spec.request_id] = spec
                assert self._tasks is not None
                self._tasks.create_task(self._carry_out(spec))
            case Cancel():
                self._cancelled.add(message.request_id)
        async with self._changed:
            self.heard.append(message)
            self._changed.notify_all()

    async def _carry_out(self, spec: RequestSpec) -> None:
        for message in self.plan(spec):
            if self.pause_s:
                await asyncio.sleep(self.pause_s)
            if spec.request_id in self._cancelled:
                return
            await self.say(message)
