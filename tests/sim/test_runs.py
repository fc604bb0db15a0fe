"""Runs of the simulator: everybody is served, promises are kept, and the figures add up."""

import math
import os
import subprocess
import sys

import pytest

from services.scheduler.core.presets import PRESETS
from services.scheduler.core.replay import replay
from shared.profiles import CostProfile
from sim.items import Item
from sim.run import Keep, run
from sim.setup import Abort
from sim.slo import Slo
from tests.sim.worlds import items, judged, profile, setup

CLOSED = [name for name, preset in PRESETS.items() if preset.form == "closed"]
LEASED = [name for name, preset in PRESETS.items() if preset.form == "leased"]


@pytest.mark.parametrize("policy", PRESETS)
def test_everybody_is_served_and_every_promise_kept(policy: str) -> None:
    given = setup(policy)
    outcome, violations = judged(given, waiting_max_s=60.0)
    assert violations == []
    report = outcome.report
    assert (report.completed, report.rejected, report.failed) == (60, 0, 0)
    assert report.output_tokens == sum(item.output_tokens for item in given.workload.items)
    assert report.prompt_tokens == sum(item.prompt_tokens for item in given.workload.items)
    for record in outcome.records:
        assert record.first_token_s is not None
        assert record.last_token_s is not None
        assert record.sent_s < record.first_token_s <= record.last_token_s
        assert record.gap_max_s <= record.last_token_s - record.first_token_s + 1e-9


@pytest.mark.parametrize("policy", LEASED)
def test_little_memory_costs_time_but_no_token(policy: str) -> None:
    """2,560 tokens a worker: three or four requests at once."""
    outcome, violations = judged(setup(policy, kv_tokens=2560), waiting_max_s=300.0)
    assert violations == []
    assert outcome.report.completed == 60
    assert outcome.report.kv_peak_max is not None
    assert 0.5 < outcome.report.kv_peak_max <= 1.0


def alone(costs: CostProfile, prompt: int, output: int) -> float:
    """Seconds for one request on an idle worker, without any mesh."""
    first = costs.iteration_s([(prompt, 0)], 0, 0)
    return first + costs.decode_steps_s(1, prompt + 1, output - 1)


@pytest.mark.parametrize("policy", ["past-future", "vllm", "scls"])
def test_one_request_takes_what_the_profile_says(policy: str) -> None:
    given = setup(
        policy,
        [Item(0.0, 100, 60)],
        noise_cv=0.0,
        workers=1,
        constants={"interval_floor_s": 0.0, "gather_s": 0.0} if policy == "scls" else {},
    )
    (record,) = run(given).records
    rounds = 8 * given.network_delay_s + 0.3 * (policy == "scls")
    assert alone(profile(), 100, 60) < record.e2e_s < alone(profile(), 100, 60) + rounds + 0.1


def test_a_closed_request_takes_one_slice_for_every_s_tokens() -> None:
    requests = items(30)
    given = setup("so", requests, constants={"slice_tokens": 32})
    report = run(given).report
    slices = sum(math.ceil(item.output_tokens / 32) for item in requests)
    assert report.slices_per_request == pytest.approx(slices / 30)
    assert report.invalid_tokens is not None
    assert 0 < report.invalid_tokens < 32 * slices
    assert report.pad_tokens is not None
    assert report.pad_tokens > 0
    assert report.evictions == 0


def test_slices_bound_what_is_wasted() -> None:
    whole = run(setup("sls")).report
    sliced = run(setup("so", constants={"slice_tokens": 32})).report
    assert whole.slices_per_request == 1
    assert (whole.invalid_tokens or 0) > 3 * (sliced.invalid_tokens or 0)
    assert (whole.pad_tokens or 0) < (sliced.pad_tokens or 0)


def test_leases_are_renewed_before_they_are_used_up() -> None:
    """Slices of 16 tokens stall nobody: the longest gap is that of an unsliced run."""
    short = run(setup("past-future", constants={"slice_tokens": 16}, noise_cv=0.0)).report
    whole = run(setup("past-future", constants={"slice_tokens": 512}, noise_cv=0.0)).report
    assert (short.slices_per_request or 0) > 3 * (whole.slices_per_request or 0)
    assert short.max_tpot_s.mean == pytest.approx(whole.max_tpot_s.mean, rel=0.02)
    assert short.e2e_s.mean == pytest.approx(whole.e2e_s.mean, rel=0.02)


def test_a_journal_replays_byte_for_byte() -> None:
    outcome = run(setup("past-future"), keep=Keep(journal=True))
    steps, difference = replay(outcome.transcript)
    assert difference is None
    assert steps == len(outcome.steps) == outcome.spent.calls


PROGRAM = "from tests.sim.test_runs import digests; print(digests())"


def digests() -> list[str]:
    """Fingerprints of decisions and records."""
    runs = (setup(policy, items(20)) for policy in ("scls", "past-future", "sal+larry"))
    return [run(given, keep=Keep(journal=True)).digest for given in runs]


def test_the_hash_seed_changes_nothing() -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for hash_seed in ("1", "4711")
    ]
    one, other = (process.communicate(timeout=100)[0] for process in processes)
    assert one.count("'") == 6
    assert one == other


def test_another_seed_is_another_world() -> None:
    requests = items(20)
    first = run(setup("past-future", requests, seed=1)).records
    assert run(setup("past-future", requests, seed=1)).records == first
    assert run(setup("past-future", requests, seed=2)).records != first


def test_a_closed_loop_has_so_many_clients_and_no_more() -> None:
    records = run(setup("past-future", items(40), clients=4)).records
    assert len(records) == 40
    moments = [(r.sent_s, 1) for r in records] + [(r.last_token_s or 0.0, -1) for r in records]
    open_now = most = 0
    for _, change in sorted(moments):
        open_now += change
        most = max(most, open_now)
    assert most == 4


def test_clients_hang_up_and_come_again() -> None:
    """Limits that a loaded worker cannot meet for all: some give up, all are served at last."""
    given = setup(
        "past-future",
        items(30),
        clients=12,
        workers=1,
        kv_tokens=2560,
        abort=Abort(first_token_s=0.8),
        resubmit=True,
        slo=Slo(ttft=1.0),
    )
    outcome = run(given)
    report = outcome.report
    assert report.completed == 30
    assert report.failed == report.requests - 30 > 0
    assert list(report.errors) == ["no first token in 0.8 s"]
    assert all(r.ttft_s <= 0.8 for r in outcome.records if r.outcome == "completed")


def test_a_stalled_stream_is_hung_up() -> None:
    """SLS keeps a finished batch's neighbours waiting, but nobody's stream stalls; slices do."""
    busy = items(40, rate=50.0, output_max=120)
    given = setup("so", busy, workers=1, constants={"slice_tokens": 8}, abort=Abort(gap_s=1.0))
    outcome = run(given)
    assert outcome.report.failed > 0
    assert all(r.gap_max_s < 1.3 for r in outcome.records if r.outcome == "failed")


def test_what_was_seen_inside_agrees_with_the_report() -> None:
    progress: list[tuple[int, int]] = []
    outcome = run(
        setup("past-future"),
        keep=Keep(series=True, sample_s=0.05),
        progress=lambda done, total: progress.append((done, total)),
    )
    assert progress == [(done, 60) for done in range(1, 61)]
    series, report = outcome.series, outcome.report
    assert series is not None
    assert series.kv_used.shape == (2, len(series.times_s))
    share = series.kv_used.sum() / series.kv_total.sum() / len(series.times_s)
    assert share == pytest.approx(report.kv_util_mean, rel=0.1)
    busy_s = sum(span.end_s - span.start_s for span in series.spans)
    assert 0 < busy_s <= 2 * report.duration_s * 1.01
    assert (series.kv_predicted >= series.kv_used - 16 * series.running - 1).mean() > 0.95


def test_the_estimator_knows_lengths_from_before() -> None:
    known = run(setup("past-future", history=(40,) * 200), keep=Keep(journal=True))
    first = known.steps[0:8]
    assert any(type(step.event).__name__ == "LengthForecast" for step in first)
