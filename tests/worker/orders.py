"""Orders, and a driver that runs requests on engines slice by slice, as a scheduler would."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from services.worker.engines.api import Engine, StepReport
from shared.messages import (
    FinishReason,
    RequestSpec,
    RunSlice,
    Sampling,
    SliceOrder,
    SliceResult,
    TokenLogprobs,
)
from shared.tokens import pack, unpack

GREEDY = Sampling(temperature=0.0)


def make_spec(
    request_id: str = "r",
    prompt: Sequence[int] = (257, 72, 105),
    max_tokens: int = 16,
    sampling: Sampling = GREEDY,
    *,
    choice: int = 0,
    gateway: str = "gateway-1",
    trace: str = "",
) -> RequestSpec:
    """A request."""
    return RequestSpec(
        request_id=request_id,
        parent_id=request_id,
        choice=choice,
        gateway=gateway,
        model="tiny",
        prompt=pack(prompt),
        max_tokens=max_tokens,
        sampling=sampling,
        trace=trace,
    )


def make_order(
    spec: RequestSpec, lease_tokens: int = 8, output: Sequence[int] = (), attempt: int = 1
) -> SliceOrder:
    """One request's share of a batch."""
    return SliceOrder(spec=spec, attempt=attempt, tokens=pack(output), lease_tokens=lease_tokens)


def make_batch(
    *orders: SliceOrder,
    batch_id: str = "b1",
    epoch: int = 1,
    worker: str = "worker-1",
    form: str = "closed",
    iterations: int = 0,
) -> RunSlice:
    """A batch of them."""
    return RunSlice(
        epoch=epoch,
        worker=worker,
        batch_id=batch_id,
        form="leased" if form == "leased" else "closed",
        orders=orders,
        iterations=iterations,
    )


@dataclass
class Made:
    """What one request got."""

    spec: RequestSpec
    ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    slices: list[SliceResult] = field(default_factory=list)


def run_batch(
    engine: Engine,
    order: RunSlice,
    made: dict[str, Made] | None = None,
    after_step: Callable[[StepReport], None] = lambda report: None,
) -> list[StepReport]:
    """Run one batch to its end; checks what every engine must keep to."""
    engine.start(order)
    reports = []
    requests = made or {}
    while engine.busy:
        reports.append(engine.step())
        for tokens in reports[-1].tokens if made is not None else ():
            request = requests[tokens.request_id]
            assert tokens.position == len(request.ids)
            assert request.finish_reason is None, "a token after the end"
            request.ids += tokens.ids
            request.logprobs += tokens.logprobs
            request.prompt_logprobs += tokens.prompt_logprobs
            request.finish_reason = tokens.finish_reason
        after_step(reports[-1])
    ended = [end for report in reports for end in report.ended]
    assert [end.batch_id for end in ended] == [order.batch_id]
    assert engine.step() == StepReport()
    for result in ended[0].results if made is not None else ():
        request = requests[result.request_id]
        assert list(unpack(result.tokens)) == request.ids[result.position :]
        assert result.finish_reason == request.finish_reason
        request.slices.append(result)
    return reports


def run_to_end(
    engine: Engine,
    specs: Sequence[RequestSpec],
    slice_tokens: int | Mapping[str, int],
    batch_size: int = 100,
) -> dict[str, Made]:
    """Run all requests, `slice_tokens` at a time (of each, or by name), in batches that change
    from slice to slice."""
    if isinstance(slice_tokens, int):
        slice_tokens = dict.fromkeys((spec.request_id for spec in specs), slice_tokens)
    made = {spec.request_id: Made(spec) for spec in specs}
    number = 0
    while waiting := [m for m in made.values() if m.finish_reason is None]:
        # A rotating start mixes requests of different ages.
        turned = waiting[number % len(waiting) :] + waiting[: number % len(waiting)]
        number += 1
        orders = [
            make_order(m.spec, slice_tokens[m.spec.request_id], m.ids) for m in turned[:batch_size]
        ]
        run_batch(engine, make_batch(*orders, batch_id=f"b{number}"), made)
    return made
