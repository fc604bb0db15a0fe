"""Making room: large requests whose clients do not stream make room for new ones, as an option."""

from statistics import fmean

from shared.profiles import load_profile
from sim.clients import Call
from sim.items import Item, Workload
from sim.mesh import SimMesh
from sim.run import run_out
from sim.setup import Setup

LARGE, SMALL = 12, 30
PROFILE = load_profile("opt-13b-a100-swift")


def crowded(*, yield_after_s: float, streamed: bool) -> SimMesh:
    """Large requests fill one worker's memory; then small ones come, one every two seconds."""
    large = [Item(0.1 * number, 500, 900) for number in range(LARGE)]
    small = [Item(6.0 + 2.0 * number, 60, 40) for number in range(SMALL)]
    setup = Setup(
        policy="tranche",
        workload=Workload("large and small", (*large, *small)),
        profile=PROFILE,
        kv_tokens=8_000,
        constants={"yield_after_s": yield_after_s},
        history=(40,) * 300 + (900,) * 200,
        noise_cv=0.0,
        streamed=streamed,
    )
    mesh = SimMesh(setup)
    mesh.start()
    run_out(mesh)
    assert all(call.outcome == "completed" for call in mesh.clients.calls)
    return mesh


def ttft_s(calls: list[Call]) -> float:
    return fmean(call.record(0.0).ttft_s for call in calls)


def test_new_ones_begin_sooner_where_nobody_reads_along() -> None:
    stay = crowded(yield_after_s=0.0, streamed=False)
    go = crowded(yield_after_s=0.3, streamed=False)
    assert sum(worker.counts.moves for worker in stay.all_workers) == 0
    assert sum(worker.counts.moves for worker in go.all_workers) > 0
    assert ttft_s(go.clients.calls[LARGE:]) < ttft_s(stay.clients.calls[LARGE:])
    evicted = [sum(w.counts.evictions for w in mesh.all_workers) for mesh in (stay, go)]
    assert evicted[1] <= evicted[0]  # making room is no eviction


def test_nobody_who_streams_is_stopped() -> None:
    mesh = crowded(yield_after_s=0.3, streamed=True)
    assert sum(worker.counts.moves for worker in mesh.all_workers) == 0
