"""The worker's shell with the simulated engine, between a scripted scheduler and a gateway, on
both buses: leases, renewals, parking, draining, and closed batches on the same engine."""

from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from msgspec.structs import replace as changed

from services.worker.engines.api import Engine, EngineError, StepReport
from services.worker.engines.registry import ENGINES
from services.worker.engines.simulated import make_simulated
from services.worker.settings import WorkerSettings
from shared.bus.api import Bus
from shared.bus.connect import make_bus
from shared.messages import (
    DrainWorker,
    Drop,
    Park,
    Renewal,
    RunSlice,
    Sampling,
    SchedulerBeat,
    SliceOrder,
    SliceResult,
)
from shared.tokens import count, unpack
from tests.worker.mesh import WORKER, Mesh, a_mesh
from tests.worker.orders import make_batch, make_order, make_spec

SPEED = 20.0
NOT_SOON = Sampling(temperature=1.0, seed=1, ignore_eos=True)


@pytest.fixture
async def mesh(any_bus_url: str, llama: Path) -> AsyncIterator[Mesh]:
    """A ready worker whose engine is simulated."""

    async def connect() -> Bus:
        bus = make_bus(any_bus_url, service="test")
        await bus.open()
        return bus

    settings = WorkerSettings(
        model=str(llama), engine="simulated", name="w", kv_tokens=8_000, simulated_speed=SPEED
    )
    async with a_mesh(connect, settings) as ready:
        yield ready


def leases(*orders: SliceOrder, batch_id: str = "b1", epoch: int = 1) -> RunSlice:
    """New leases, with a margin of 2 tokens."""
    order = make_batch(*orders, batch_id=batch_id, form="leased", epoch=epoch)
    return changed(order, margin_tokens=2)


def renewal(request_id: str, until: int, epoch: int = 1) -> RunSlice:
    """The next lease."""
    renewed = Renewal(request_id=request_id, attempt=1, until=until)
    return changed(leases(batch_id="", epoch=epoch), renewals=(renewed,))


def told(mesh: Mesh, request_id: str) -> list[SliceResult]:
    """What the scheduler heard of a request."""
    return [r for done in mesh.results for r in done.results if r.request_id == request_id]


def heard(results: Sequence[SliceResult]) -> list[int]:
    """The tokens of its reports, which must join."""
    ids: list[int] = []
    for result in results:
        assert result.position == len(ids)
        ids += unpack(result.tokens)
    return ids


async def test_leases_renewals_and_the_end(mesh: Mesh) -> None:
    info = mesh.beats[0].info
    assert (info.engine, info.forms, info.kv_block_tokens) == (
        "simulated",
        ("closed", "leased"),
        16,
    )
    spec = make_spec("a", max_tokens=30, sampling=NOT_SOON)
    await mesh.say(leases(make_order(spec, 8)))
    await mesh.until(lambda: len(heard(told(mesh, "a"))) == 8)
    assert all(r.resident for r in told(mesh, "a"))
    await mesh.until(lambda: len(mesh.text("a")) == 8)
    await mesh.say(renewal("a", 16))
    await mesh.say(renewal("a", 16))
    await mesh.until(lambda: len(heard(told(mesh, "a"))) == 16)
    await mesh.say(renewal("a", 99))
    await mesh.until(lambda: not told(mesh, "a")[-1].resident)
    assert told(mesh, "a")[-1].finish_reason == "length"
    await mesh.until(lambda: mesh.finish_of("a"))
    assert heard(told(mesh, "a")) == mesh.text("a")
    assert len(mesh.text("a")) == 30
    assert mesh.results[-1].memory.kv_tokens_used == 0
    slices = {"worker": "w", "outcome": "done"}
    assert mesh.registry.get_sample_value("tranche_slices_total", slices) == 1


async def test_metrics_count_every_iteration_of_a_long_prompt(
    any_bus_url: str, llama: Path
) -> None:
    """Also those of the chunks before the last, which make no token."""

    async def connect() -> Bus:
        bus = make_bus(any_bus_url, service="test")
        await bus.open()
        return bus

    settings = WorkerSettings(
        model=str(llama),
        engine="paged",
        name="w",
        kv_tokens=2_000,
        torch_threads=1,
        device="cpu",
        prefill_chunk_tokens=8,
    )
    spec = make_spec("a", range(10, 50), max_tokens=10, sampling=NOT_SOON)
    async with a_mesh(connect, settings) as mesh:
        await mesh.say(leases(make_order(spec, 10)))
        await mesh.until(lambda: told(mesh, "a") and not told(mesh, "a")[-1].resident)
        timings = [done.timings for done in mesh.results]
        prefill_s = sum(each.prefill_s for each in timings)
        decode_s = sum(each.decode_s for each in timings)

        def value(name: str) -> float | None:
            return mesh.registry.get_sample_value(f"tranche_{name}", {"worker": "w"})

        assert sum(each.iterations for each in timings) == 40 // 8 + 9
        assert value("iteration_seconds_count") == 40 // 8 + 9
        assert value("iteration_seconds_sum") == pytest.approx(prefill_s + decode_s)
        assert value("prefill_seconds_sum") == pytest.approx(prefill_s)
        assert value("decode_seconds_sum") == pytest.approx(decode_s)
        assert min(prefill_s, decode_s) > 0
        assert value("batch_size_requests_sum") == value("batch_size_requests_count") > 0
        assert value("worker_queue_seconds_count") == 1


async def test_parking_and_going_on_elsewhere(mesh: Mesh) -> None:
    """The other worker is this one again: text depends on nothing but the seed."""
    spec = make_spec("a", max_tokens=60, sampling=NOT_SOON)
    await mesh.say(leases(make_order(spec, 50)))
    await mesh.until(lambda: len(mesh.text("a")) >= 3)
    await mesh.say(Park(epoch=1, worker=WORKER, request_id="a", attempt=1))
    await mesh.until(lambda: not told(mesh, "a")[-1].resident)
    assert (told(mesh, "a")[-1].finish_reason, told(mesh, "a")[-1].evicted) == (None, False)
    first = heard(told(mesh, "a"))
    await mesh.say(leases(make_order(spec, 60, first, attempt=2), batch_id="b2"))
    await mesh.until(lambda: mesh.finish_of("a"))
    await mesh.say(leases(make_order(changed(spec, request_id="b"), 60), batch_id="b3"))
    await mesh.until(lambda: mesh.finish_of("b"))
    second = [i for batch in mesh.batches for run in batch.runs if run.attempt == 2 for i in [run]]
    joined = first + [i for run in second for i in unpack(run.ids)]
    assert joined == mesh.text("b")
    assert 3 <= len(first) < 60


async def test_a_waiting_lease_can_be_parked_renewed_and_dropped(mesh: Mesh) -> None:
    """A long prefill runs; what comes meanwhile waits before the engine, or in it."""
    long = make_spec("long", [1] * 400, max_tokens=90, sampling=NOT_SOON)
    names = ("parked", "renewed", "dropped")
    others = [make_spec(name, max_tokens=40, sampling=NOT_SOON) for name in names]
    await mesh.say(leases(make_order(long, 3), *(make_order(spec, 4) for spec in others)))
    await mesh.say(Park(epoch=1, worker=WORKER, request_id="parked", attempt=1))
    await mesh.say(Drop(epoch=1, worker=WORKER, request_id="dropped", attempt=1))
    await mesh.say(renewal("renewed", 40))
    await mesh.until(lambda: mesh.finish_of("renewed"))
    await mesh.until(lambda: told(mesh, "parked") and not told(mesh, "parked")[-1].resident)
    assert len(heard(told(mesh, "renewed"))) == 40
    assert len(mesh.text("dropped")) < 40
    assert len(heard(told(mesh, "long"))) == 3


async def test_a_new_leader_hears_of_everything(mesh: Mesh) -> None:
    spec = make_spec("a", max_tokens=30, sampling=NOT_SOON)
    await mesh.say(leases(make_order(spec, 8)))
    await mesh.until(lambda: len(heard(told(mesh, "a"))) == 8)
    mesh.results.clear()
    await mesh.say(SchedulerBeat(epoch=5))
    await mesh.until(lambda: mesh.beats[-1].epoch == 5 and mesh.beats[-1].residents_listed)
    assert [(r.request_id, r.position) for r in mesh.beats[-1].residents] == [("a", 8)]
    await mesh.say(renewal("a", 20, epoch=1))
    await mesh.say(renewal("a", 30, epoch=5))
    await mesh.until(lambda: mesh.finish_of("a"))
    await mesh.until(lambda: told(mesh, "a") and not told(mesh, "a")[-1].resident)
    assert len(heard(told(mesh, "a"))) == 30, "from the placement's begin"


async def test_draining_parks_at_the_end_of_the_lease(mesh: Mesh) -> None:
    runs = make_spec("runs", max_tokens=450, sampling=NOT_SOON)
    await mesh.say(leases(make_order(runs, 400)))
    await mesh.until(lambda: len(mesh.text("runs")) >= 2)
    await mesh.say(DrainWorker(epoch=1, worker=WORKER))
    await mesh.say(renewal("runs", 450))
    await mesh.say(leases(make_order(make_spec("late"), 4), batch_id="late"))
    assert mesh.serving is not None
    await mesh.serving
    await mesh.until(lambda: mesh.beats[-1].leaving)
    assert [done.refused for done in mesh.results if done.batch_id == "late"] == ["draining"]
    last = told(mesh, "runs")[-1]
    assert (last.resident, last.finish_reason, len(heard(told(mesh, "runs")))) == (False, None, 400)
    await mesh.hears("runs", heard(told(mesh, "runs")))


async def test_closed_batches_on_the_same_engine(mesh: Mesh) -> None:
    spec = make_spec("a", max_tokens=20, sampling=NOT_SOON)
    ids: list[int] = []
    for number in range(3):
        await mesh.say(make_batch(make_order(spec, 8, ids), batch_id=f"b{number}"))
        done = await mesh.done(number + 1)
        assert (done.form, done.refused) == ("closed", "")
        assert done.timings.prefill_s > 0
        (result,) = done.results
        assert result.position == len(ids)
        ids += unpack(result.tokens)
    assert result.finish_reason == "length"
    await mesh.until(lambda: mesh.finish_of("a"))
    assert mesh.text("a") == ids
    assert count(spec.prompt) == 3


async def test_a_closed_batch_beside_leases_goes_back(mesh: Mesh) -> None:
    await mesh.say(leases(make_order(make_spec("a", max_tokens=30, sampling=NOT_SOON), 4)))
    await mesh.until(lambda: len(heard(told(mesh, "a"))) == 4)
    spec = make_spec("b", max_tokens=4, sampling=NOT_SOON)
    await mesh.say(make_batch(make_order(spec, 4), batch_id="closed"))
    await mesh.until(lambda: mesh.results[-1].batch_id == "closed")
    assert "leases are held" in mesh.results[-1].refused
    await mesh.say(Drop(epoch=1, worker=WORKER, request_id="a", attempt=1))
    await mesh.say(make_batch(make_order(spec, 4), batch_id="again"))
    await mesh.until(lambda: mesh.finish_of("b"))
    assert len(mesh.text("b")) == 4


async def test_what_a_failing_engine_has_made_is_good(
    any_bus_url: str, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = ["the model failed: boom"]

    def make(settings: WorkerSettings) -> Engine:
        engine = make_simulated(settings)
        step = engine.step

        def failing() -> StepReport:
            report = step()
            if failures and any(t.position + len(t.ids) > 4 for t in report.tokens):
                engine.cancel("a")
                engine.cancel("b")
                raise EngineError(failures.pop())
            return report

        monkeypatch.setattr(engine, "step", failing)
        return engine

    async def connect() -> Bus:
        bus = make_bus(any_bus_url, service="test")
        await bus.open()
        return bus

    monkeypatch.setitem(ENGINES, "simulated", make)
    settings = WorkerSettings(model=str(llama), engine="simulated", name="w")
    spec = make_spec("a", max_tokens=20, sampling=NOT_SOON)
    async with a_mesh(connect, settings) as mesh:
        await mesh.say(leases(make_order(spec, 20), make_order(changed(spec, request_id="b"), 20)))
        await mesh.until(lambda: told(mesh, "a") and told(mesh, "a")[-1].evicted)
        (last,) = [r for r in told(mesh, "b") if not r.resident]
        assert (last.evicted, last.detail) == (True, "the model failed: boom")
        ids = heard(told(mesh, "a"))
        assert len(ids) >= 1
        await mesh.say(leases(make_order(spec, 20, ids, attempt=2), batch_id="b2"))
        await mesh.until(lambda: mesh.finish_of("a"))
