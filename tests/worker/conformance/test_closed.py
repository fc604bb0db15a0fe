"""Closed batches: they start and end together, and count what was in vain."""

from pathlib import Path

from msgspec.structs import replace as changed

from services.worker.engines.api import SliceEnd
from shared.messages import WorkerMemory
from shared.tokens import unpack
from tests.worker.conformance.driver import some_prompts
from tests.worker.conformance.subjects import Kit
from tests.worker.orders import GREEDY, Made, make_batch, make_order, make_spec, run_batch
from tests.worker.tiny_models import BEGIN


def test_rows_may_have_different_leases(closed_kit: Kit, llama: Path) -> None:
    engine = closed_kit.make(llama)
    made = {name: Made(make_spec(name, max_tokens=9)) for name in ("short", "long", "last")}
    batch = make_batch(
        make_order(made["short"].spec, 2),
        make_order(made["long"].spec, 6),
        make_order(made["last"].spec, 20),
    )
    reports = run_batch(engine, batch, made)
    assert {n: (len(m.ids), m.finish_reason) for n, m in made.items()} == {
        "short": (2, None),
        "long": (6, None),
        "last": (9, "length"),
    }
    (end,) = reports[-1].ended
    assert [r.invalid_tokens for r in end.results] == [7, 3, 0]
    assert end.timings.iterations == 9
    assert end.timings.batch_size == 3
    assert end.timings.prefill_s > 0
    assert end.timings.decode_s > 0


def test_the_batch_is_no_longer_than_its_iterations(closed_kit: Kit, llama: Path) -> None:
    made = Made(make_spec())
    batch = make_batch(make_order(made.spec, 16), iterations=3)
    run_batch(closed_kit.make(llama), batch, {"r": made})
    assert (len(made.ids), made.finish_reason) == (3, None)


def test_a_batch_ends_when_all_its_rows_have(real_closed_kit: Kit, llama: Path) -> None:
    engine = real_closed_kit.make(llama)
    prompt = some_prompts(1)[0]
    made = Made(make_spec("r", prompt, 20))
    run_batch(engine, make_batch(make_order(made.spec, 20)), {"r": made})
    stopper = made.ids[5]
    stops = Made(make_spec("r", prompt, 20, changed(GREEDY, stop_token_ids=(stopper,))))
    reports = run_batch(engine, make_batch(make_order(stops.spec, 20)), {"r": stops})
    ending = [t.ending_token for r in reports for t in r.tokens]
    assert ending == [False] * (len(stops.ids) - 1) + [True]
    assert len([r for r in reports if r.tokens]) == len(stops.ids), "no early return"


def test_padding_is_counted(closed_kit: Kit, llama: Path) -> None:
    orders = [
        make_order(make_spec("a", [BEGIN] * 10), 2),
        make_order(make_spec("b", [BEGIN] * 3), 2, output=[5, 6]),
    ]
    reports = run_batch(closed_kit.make(llama), make_batch(*orders))
    (end,) = reports[-1].ended
    assert [r.pad_tokens for r in end.results] == [0, 5]
    assert end.timings.input_tokens_max == 10


def test_a_cancelled_request_makes_no_more_tokens(closed_kit: Kit, llama: Path) -> None:
    engine = closed_kit.make(llama)
    engine.start(make_batch(make_order(make_spec("gone"), 6), make_order(make_spec("stays"), 6)))
    seen: list[tuple[str, int]] = []
    ended: tuple[SliceEnd, ...] = ()
    while engine.busy:
        report = engine.step()
        seen += [(t.request_id, t.position) for t in report.tokens]
        ended = report.ended or ended
        if ("gone", 1) in seen:
            engine.cancel("gone")
            engine.cancel("unknown")
    assert [p for name, p in seen if name == "gone"] == [0, 1]
    assert [p for name, p in seen if name == "stays"] == [0, 1, 2, 3, 4, 5]
    gone, stays = ended[0].results
    assert (gone.finish_reason, len(unpack(gone.tokens)), gone.invalid_tokens) == (
        "cancelled",
        2,
        4,
    )
    assert (stays.finish_reason, stays.invalid_tokens) == (None, 0)


def test_a_batch_without_takers_ends_at_once(closed_kit: Kit, llama: Path) -> None:
    engine = closed_kit.make(llama)
    engine.start(make_batch(make_order(make_spec("a"), 8), make_order(make_spec("b"), 8)))
    engine.step()
    engine.cancel("a")
    engine.cancel("b")
    report = engine.step()
    assert not engine.busy
    assert report.tokens == ()
    assert [r.finish_reason for r in report.ended[0].results] == ["cancelled", "cancelled"]


def test_memory_is_that_of_the_whole_slice(closed_kit: Kit, llama: Path) -> None:
    """N x (L + S), from its start to its end."""
    engine = closed_kit.make(llama, kv_tokens=512)
    size = engine.memory().kv_bytes_per_token
    idle = memory_of(engine.memory())
    assert idle == (512, 0, size, 512 * size, 0)
    seen = set()
    orders = [make_order(make_spec("a", [BEGIN] * 20), 5), make_order(make_spec("b"), 9)]
    run_batch(
        engine, make_batch(*orders), after_step=lambda _: seen.add(memory_of(engine.memory()))
    )
    busy = 2 * (20 + 9)
    assert seen == {(512, busy, size, 512 * size, busy * size), idle}
    memory = engine.memory()
    assert 0 < memory.device_bytes_free <= memory.device_bytes_total


def memory_of(memory: WorkerMemory) -> tuple[int, int, int, int, int]:
    """The exact part of the telemetry."""
    return (
        memory.kv_tokens_capacity,
        memory.kv_tokens_used,
        memory.kv_bytes_per_token,
        memory.kv_bytes_capacity,
        memory.kv_bytes_used,
    )
