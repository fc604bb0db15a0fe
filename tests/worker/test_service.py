"""The worker's shell on a bus, between a scripted scheduler and gateways."""

import asyncio
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from services.worker.engines.api import EngineError
from services.worker.engines.registry import ENGINES, UnknownEngine
from services.worker.models import ModelError
from services.worker.service import serve
from services.worker.settings import WorkerSettings
from shared.bus.api import Address, Bus
from shared.bus.memory import MemoryBroker, MemoryBus
from shared.bus.topology import ORDERS
from shared.messages import (
    DrainWorker,
    Drop,
    FinishAck,
    Recall,
    SchedulerBeat,
    SendTokens,
    encode,
)
from shared.telemetry import setup
from tests.worker.mesh import WORKER, Mesh, a_mesh
from tests.worker.orders import make_batch, make_order, make_spec
from tests.worker.reference import Agreement, Reference
from tests.worker.scripted_engine import ScriptedEngine

OpenBus = Callable[[], Awaitable[Bus]]


@pytest.fixture
def open_bus() -> OpenBus:
    """Opens connections to one broker in this process."""
    broker = MemoryBroker()

    async def connect() -> Bus:
        bus = MemoryBus(broker)
        await bus.open()
        return bus

    connect.broker = broker  # type: ignore[attr-defined]
    return connect


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> ScriptedEngine:
    """A scripted engine that a worker with engine=scripted gets."""
    made = ScriptedEngine()
    monkeypatch.setitem(ENGINES, "scripted", lambda settings: made)
    return made


@pytest.fixture
async def mesh(open_bus: OpenBus, engine: ScriptedEngine) -> AsyncIterator[Mesh]:
    """A ready worker with a scripted engine, two gateways."""
    settings = WorkerSettings(engine="scripted", name="w")
    async with a_mesh(open_bus, settings, ("gateway-1", "gateway-2")) as ready:
        yield ready
        engine.free_running = True
        engine.permits.release(100)
    assert engine.closed


def value_of(mesh: Mesh, name: str, **labels: str) -> float:
    """A metric of worker w."""
    return mesh.registry.get_sample_value(name, {"worker": "w", **labels}) or 0.0


@pytest.mark.parametrize("kind", ["memory", "rabbit"])
async def test_a_real_engine_serves_slice_after_slice(
    request: pytest.FixtureRequest,
    open_bus: OpenBus,
    llama: Path,
    references: dict[str, Reference],
    kind: str,
) -> None:
    if kind == "rabbit":
        from shared.bus.connect import make_bus

        url = request.getfixturevalue("broker_url")

        async def connect() -> Bus:
            bus = make_bus(url, service="test")
            await bus.open()
            return bus

        open_bus = connect
    settings = WorkerSettings(
        model=str(llama), engine="padded", kv_tokens=2_000, torch_threads=1, device="cpu"
    )
    prompts = {"a": [257, 5, 6, 7], "b": [257, 80, 81]}
    agreement = Agreement()
    async with a_mesh(open_bus, settings, ("gateway-1", "gateway-2")) as mesh:
        info = mesh.beats[0].info
        assert (info.engine, info.forms, info.model) == ("padded", ("closed",), "llama")
        assert mesh.beats[0].residents_listed
        for number in range(3):
            shares = [
                make_order(
                    make_spec(name, prompt, 20, gateway=f"gateway-{1 + (name == 'b')}"),
                    7,
                    mesh.text(name),
                )
                for name, prompt in prompts.items()
            ]
            await mesh.say(make_batch(*shares, batch_id=f"b{number}"))
            done = await mesh.done(number + 1)
            assert done.refused == ""
            assert done.timings.queue_s >= 0
            assert done.timings.decode_s > 0
            assert done.memory.kv_tokens_used == 0
            expected = min(20, 7 * (number + 1))
            await mesh.until(lambda n=expected: all(len(mesh.text(x)) == n for x in prompts))
        assert [mesh.finish_of(name) for name in prompts] == ["length", "length"]
        for name, prompt in prompts.items():
            references["llama"].compare_greedy(prompt, mesh.text(name), 20, agreement)
    agreement.check()
    assert mesh.beats[-1].leaving


async def test_orders_may_repeat(mesh: Mesh, engine: ScriptedEngine) -> None:
    order = make_batch(make_order(make_spec("a", max_tokens=3), 3))
    for _ in range(3):
        await mesh.say(order)
    engine.permits.release(10)
    await mesh.done()
    await mesh.say(order)
    await mesh.say(make_batch(make_order(make_spec("b", max_tokens=1), 1), batch_id="b2"))
    await mesh.done(2)
    assert engine.started == ["b1", "b2"]
    assert [d.batch_id for d in mesh.results] == ["b1", "b2"]
    await mesh.hears("a", [1, 2, 3])


async def test_a_drop_takes_effect_within_one_iteration(mesh: Mesh, engine: ScriptedEngine) -> None:
    gone, stays = make_spec("gone", max_tokens=100), make_spec("stays", max_tokens=100)
    await mesh.say(make_batch(make_order(gone, 50), make_order(stays, 50)))
    engine.permits.release(5)
    await mesh.until(lambda: len(mesh.text("stays")) == 5)
    await mesh.say(Drop(epoch=1, worker=WORKER, request_id="gone", attempt=1))
    # The worker has handled the drop once it has answered what came behind it.
    await mesh.say(SendTokens(epoch=1, worker=WORKER, request_id="x", attempt=1, position=0))
    assert (await mesh.done()).refused == "unknown request"
    engine.permits.release(45)
    done = await mesh.done(2)
    results = {r.request_id: r for r in done.results}
    assert results["gone"].finish_reason == "cancelled"
    assert len(results["gone"].tokens) // 4 <= 6, "more than the iteration that ran"
    assert len(results["stays"].tokens) // 4 == 50
    assert len(mesh.text("gone")) <= 6


async def test_a_drop_reaches_a_batch_that_waits(mesh: Mesh, engine: ScriptedEngine) -> None:
    await mesh.say(make_batch(make_order(make_spec("first"), 2)))
    await mesh.say(
        make_batch(
            make_order(make_spec("gone"), 2), make_order(make_spec("stays"), 2), batch_id="b2"
        )
    )
    await mesh.say(make_batch(make_order(make_spec("gone too"), 2), batch_id="b3"))
    for name in ("gone", "gone too"):
        await mesh.say(Drop(epoch=1, worker=WORKER, request_id=name, attempt=1))
    await mesh.say(SendTokens(epoch=1, worker=WORKER, request_id="x", attempt=1, position=0))
    await mesh.done()
    engine.permits.release(10)
    await mesh.done(4)
    assert engine.started == ["b1", "b2"]
    finishes = {r.request_id: r.finish_reason for d in mesh.results for r in d.results}
    assert (finishes["gone"], finishes["gone too"]) == ("cancelled", "cancelled")
    await mesh.hears("stays", [1, 2])
    assert mesh.text("gone") == []


async def test_an_order_of_an_old_epoch_is_not_run(mesh: Mesh, engine: ScriptedEngine) -> None:
    engine.permits.release(10)
    await mesh.say(SchedulerBeat(epoch=7))
    await mesh.until(lambda: mesh.beats[-1].epoch == 7 and mesh.beats[-1].residents_listed)
    await mesh.say(make_batch(make_order(make_spec("old"), 1), batch_id="old", epoch=6))
    await mesh.say(make_batch(make_order(make_spec("new"), 1), batch_id="new", epoch=7))
    assert (await mesh.done()).batch_id == "new"
    assert engine.started == ["new"]


async def test_tokens_are_sent_again_until_they_are_confirmed(
    mesh: Mesh, engine: ScriptedEngine
) -> None:
    engine.permits.release(10)
    await mesh.say(make_batch(make_order(make_spec("a", max_tokens=4), 4)))
    await mesh.done()
    await mesh.until(lambda: mesh.finish_of("a"))
    mesh.batches.clear()
    wish = SendTokens(epoch=1, worker=WORKER, request_id="a", attempt=1, position=2)
    await mesh.say(wish)
    await mesh.until(lambda: mesh.batches)
    (run,) = mesh.batches[0].runs
    assert (run.position, run.finish_reason) == (2, "length")
    await mesh.say(FinishAck(gateway="gateway-1", worker=WORKER, request_ids=("a",)))
    await mesh.say(wish)
    assert (await mesh.done(2)).refused == "unknown request"


async def test_a_gateway_that_is_away_gets_its_tokens_later(
    open_bus: OpenBus, engine: ScriptedEngine
) -> None:
    engine.free_running = True
    async with a_mesh(open_bus, WorkerSettings(engine="scripted", name="w"), ()) as mesh:
        await mesh.say(make_batch(make_order(make_spec("a", max_tokens=5), 5)))
        await mesh.done()
        assert mesh.text("a") == []
        await mesh.listen_at("gateway-1")
        await mesh.until(lambda: mesh.finish_of("a"))
        assert mesh.text("a") == [1, 2, 3, 4, 5]
        assert value_of(mesh, "tranche_worker_errors_total", kind="tokens_not_sent") >= 1


async def test_tokens_of_many_iterations_travel_together(
    mesh: Mesh, engine: ScriptedEngine
) -> None:
    engine.free_running = True
    specs = [make_spec(f"r{n}", max_tokens=900) for n in range(3)]
    await mesh.say(make_batch(*(make_order(spec, 900) for spec in specs)))
    await mesh.done()
    await mesh.until(lambda: all(mesh.finish_of(s.request_id) for s in specs))
    assert all(mesh.text(s.request_id) == list(range(1, 901)) for s in specs)
    assert len(mesh.batches) < 450, "fewer messages than iterations"


async def test_what_the_engine_cannot_take_goes_back(mesh: Mesh, engine: ScriptedEngine) -> None:
    engine.permits.release(10)
    await mesh.say(make_batch(*(make_order(make_spec(f"r{n}"), 2) for n in range(4))))
    assert (await mesh.done()).refused == "out of memory: at most 3"
    await mesh.say(make_batch(make_order(make_spec("r0"), 2), batch_id="b2"))
    assert (await mesh.done(2)).refused == ""
    assert value_of(mesh, "tranche_slices_total", outcome="refused") == 1


async def test_a_failing_iteration_gives_the_batch_back(mesh: Mesh, engine: ScriptedEngine) -> None:
    engine.fail_next = EngineError("the model failed: boom")
    engine.permits.release(10)
    await mesh.say(make_batch(make_order(make_spec("a"), 2)))
    assert (await mesh.done()).refused == "the model failed: boom"
    await mesh.say(make_batch(make_order(make_spec("a"), 2, attempt=2), batch_id="b2"))
    assert (await mesh.done(2)).refused == ""


async def test_draining_by_command(mesh: Mesh, engine: ScriptedEngine) -> None:
    await mesh.say(make_batch(make_order(make_spec("runs"), 3)))
    await mesh.say(make_batch(make_order(make_spec("waits"), 3), batch_id="b2"))
    engine.permits.release(1)
    await mesh.until(lambda: mesh.text("runs"))
    await mesh.say(DrainWorker(epoch=1, worker=WORKER))
    back = await mesh.done()
    assert (back.batch_id, back.refused) == ("b2", "draining")
    await mesh.until(lambda: mesh.beats[-1].draining)
    await mesh.say(make_batch(make_order(make_spec("late"), 3), batch_id="b3"))
    assert (await mesh.done(2)).refused == "draining"
    engine.permits.release(10)
    assert (await mesh.done(3)).batch_id == "b1"
    assert mesh.serving is not None
    await mesh.serving
    await mesh.until(lambda: mesh.beats[-1].leaving)
    await mesh.hears("runs", [1, 2, 3])


async def test_stopping_lets_the_running_slice_end(mesh: Mesh, engine: ScriptedEngine) -> None:
    await mesh.say(make_batch(make_order(make_spec("runs"), 3)))
    engine.permits.release(1)
    await mesh.until(lambda: mesh.text("runs"))
    mesh.stop.set()
    await mesh.until(lambda: mesh.beats[-1].draining)
    engine.permits.release(10)
    assert (await mesh.done()).batch_id == "b1"
    await mesh.until(lambda: mesh.beats[-1].leaving)
    await mesh.hears("runs", [1, 2, 3])


async def test_messages_that_are_not_for_workers_become_dead_letters(
    mesh: Mesh, engine: ScriptedEngine, open_bus: OpenBus
) -> None:
    broker: MemoryBroker = open_bus.broker  # type: ignore[attr-defined]
    address = Address(ORDERS, f"worker.{WORKER}")
    recall = Recall(epoch=1, gateway="g", request_id="r", attempt=1)
    for body in (b"garbage", b"", encode(recall), b"\x80"):
        broker.publish_bytes(address, body)
    engine.permits.release(10)
    await mesh.say(make_batch(make_order(make_spec("a"), 2)))
    assert (await mesh.done()).refused == ""
    assert len(broker.dead_letters) == 4
    assert value_of(mesh, "tranche_worker_errors_total", kind="misdirected") >= 1


async def test_metrics_count_what_was_done(mesh: Mesh, engine: ScriptedEngine) -> None:
    engine.permits.release(10)
    await mesh.say(
        make_batch(make_order(make_spec("a", max_tokens=2), 4), make_order(make_spec("b"), 4))
    )
    await mesh.done()
    assert value_of(mesh, "tranche_slices_total", outcome="done") == 1
    assert value_of(mesh, "tranche_output_tokens_total") == 6
    assert value_of(mesh, "tranche_batch_size_requests_sum") == 2
    assert value_of(mesh, "tranche_worker_queue_seconds_count") == 1
    assert value_of(mesh, "tranche_kv_capacity_tokens") == 500


async def test_readiness_waits_for_the_model(
    open_bus: OpenBus, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch, free_port: int
) -> None:
    loading = asyncio.Event()
    go_on = asyncio.Event()
    loop = asyncio.get_running_loop()

    def load(settings: object) -> ScriptedEngine:
        loop.call_soon_threadsafe(loading.set)
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(20)
        return engine

    monkeypatch.setitem(ENGINES, "scripted", load)
    bus = await open_bus()
    settings = WorkerSettings(engine="scripted", name="w", ops_port=free_port)
    stop = asyncio.Event()
    telemetry = setup.start(settings, WORKER, CollectorRegistry())
    serving = asyncio.create_task(serve(settings, bus, telemetry, stop))

    def status() -> int:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{free_port}/ready") as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            error.close()
            return error.code
        except OSError:
            return 0

    async def until_status(wanted: int) -> None:
        async with asyncio.timeout(20):
            while await asyncio.to_thread(status) != wanted:
                await asyncio.sleep(0.01)

    await loading.wait()
    await until_status(503)
    go_on.set()
    await until_status(200)
    stop.set()
    await serving
    await bus.close()


async def test_a_stop_while_the_model_loads(
    open_bus: OpenBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENGINES, "scripted", lambda settings: ScriptedEngine())
    bus = await open_bus()
    settings = WorkerSettings(engine="scripted")
    stop = asyncio.Event()
    stop.set()
    telemetry = setup.start(settings, WORKER, CollectorRegistry())
    async with asyncio.timeout(20):
        await serve(settings, bus, telemetry, stop)
    await bus.close()


@pytest.mark.parametrize(
    ("settings", "error"),
    [({"engine": "steam"}, UnknownEngine), ({"model": "/nowhere"}, ModelError)],
)
async def test_what_cannot_start_says_so(
    open_bus: OpenBus, settings: dict[str, str], error: type[Exception]
) -> None:
    bus = await open_bus()
    worker = WorkerSettings(**settings)  # type: ignore[arg-type]
    telemetry = setup.start(worker, WORKER, CollectorRegistry())
    with pytest.raises(error):
        await serve(worker, bus, telemetry, asyncio.Event())
    await bus.close()
