"""Any sequence of any well-formed messages: the core answers, and its answers can be sent."""

from hypothesis import given, settings, strategies as st

from services.scheduler.core.presets import PRESETS, preset_named
from services.scheduler.core.scheduler import Scheduler
from services.scheduler.core.settings import Constants
from shared.messages import (
    Cancel,
    Elected,
    GatewayBeat,
    OrderReturned,
    RequestSpec,
    Resident,
    Resume,
    SchedulerEvent,
    SliceDone,
    SliceResult,
    SliceTimings,
    Stopped,
    Submit,
    TokensWanted,
    WorkerBeat,
    WorkerInfo,
    WorkerMemory,
    encode,
)

integers = st.one_of(
    st.integers(-2, 40), st.sampled_from([10**6 + 1, 2**31, 2**53, 2**63, 2**64 - 1, -(2**63)])
)
seconds = st.floats(allow_nan=True, allow_infinity=True)
ids = st.sampled_from(["r1", "r2", "r3", ""])
gateways = st.sampled_from(["g1", "g2"])
workers = st.sampled_from(["w1", "w2"])
packed = st.one_of(st.integers(0, 30).map(lambda n: bytes(4 * n)), st.binary(max_size=9))
reasons = st.sampled_from([None, "stop", "length", "cancelled", "error"])

specs = st.builds(
    RequestSpec,
    request_id=ids,
    parent_id=ids,
    gateway=gateways,
    model=st.just("m"),
    prompt=packed,
    max_tokens=integers,
    priority=integers,
)
memories = st.builds(WorkerMemory, kv_tokens_capacity=integers, kv_tokens_used=integers)
results = st.builds(
    SliceResult,
    request_id=ids,
    attempt=integers,
    position=integers,
    tokens=packed,
    finish_reason=reasons,
)
timings = st.builds(
    SliceTimings,
    prefill_s=seconds,
    decode_s=seconds,
    iterations=integers,
    input_tokens_max=integers,
    batch_size=integers,
)
infos = st.builds(
    WorkerInfo,
    worker=workers,
    name=workers,
    engine=st.just("e"),
    forms=st.sampled_from([(), ("closed",), ("leased",), ("closed", "leased")]),
    model=st.just("m"),
    context_tokens_max=integers,
    batch_size_max=integers,
)
residents = st.builds(Resident, request_id=ids, attempt=integers, position=integers)
events: st.SearchStrategy[SchedulerEvent] = st.one_of(
    st.builds(Submit, spec=specs),
    st.builds(Resume, spec=specs, attempt=integers, tokens=packed),
    st.builds(Cancel, gateway=gateways, request_id=ids),
    st.builds(Stopped, gateway=gateways, request_id=ids, output_tokens=integers),
    st.builds(TokensWanted, gateway=gateways, request_id=ids, attempt=integers, position=integers),
    st.builds(GatewayBeat, gateway=gateways, leaving=st.booleans()),
    st.builds(
        SliceDone,
        epoch=integers,
        worker=workers,
        batch_id=st.sampled_from(["", "1-1", "1-2", "2-1", "2-2"]),
        form=st.sampled_from(["closed", "leased"]),
        results=st.lists(results, max_size=3).map(tuple),
        timings=timings,
        memory=memories,
        refused=st.sampled_from(["", "draining", "no"]),
    ),
    st.builds(
        WorkerBeat,
        info=infos,
        memory=memories,
        epoch=integers,
        residents=st.lists(residents, max_size=3).map(tuple),
        residents_listed=st.booleans(),
        draining=st.booleans(),
        leaving=st.booleans(),
    ),
    st.builds(OrderReturned, worker=workers),
    st.builds(Elected, epoch=integers),
)
steps = st.lists(st.tuples(events, st.sampled_from([0.0, 0.004, 0.3, 1.1, 4.0])), max_size=40)


@settings(max_examples=150)
@given(policy=st.sampled_from(sorted(PRESETS)), epoch=st.sampled_from([1, 2]), history=steps)
def test_every_message_is_survived(
    policy: str, epoch: int, history: list[tuple[SchedulerEvent, float]]
) -> None:
    constants = Constants(
        slice_tokens=16, interval_floor_s=0.003, interval_s=0.1, spread_batches=True
    )
    preset = preset_named(policy)
    core = Scheduler(preset, constants, (lambda request_id: 7) if preset.needs_truth else None)
    now = 0.0
    said = core.handle(Elected(epoch=epoch), now)
    for event, wait_s in history:
        said += core.handle(event, now)
        now += wait_s
        for _ in range(20):
            deadline = core.deadline()
            assert deadline is not None
            if deadline > now:
                break
            said += core.wake(max(deadline, now))
        else:
            raise AssertionError("the core wants to be woken again and again")
    for command in said:
        encode(command)
