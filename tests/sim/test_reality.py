"""Replays of recorded runs: what is read of the files, how both are compared, the shipped one."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from services.scheduler.core.credit import Credit
from services.scheduler.core.state import Request
from shared.memory import leased_blocks
from shared.profiles import load_profile
from sim.items import WorkloadError
from sim.reproduction import reality
from sim.reproduction.real_run import RealRun, clock_offset_s, limits_of, load_run
from sim.reproduction.reality_chart import curves_svg
from sim.reproduction.reality_compare import Comparison, compared, replayed, setup_of
from sim.run import Keep, run
from tests.core.seam import spec_of

PROFILE = "llama-3.1-8b-rtx4090"


@pytest.fixture(scope="module")
def real() -> RealRun:
    return load_run([reality.RUN])


@pytest.fixture(scope="module")
def comparison(real: RealRun) -> Comparison:
    return replayed(real, setup_of(real, load_profile(PROFILE)))


def test_the_run_that_ships_is_met(comparison: Comparison) -> None:
    missed = [figure for figure in comparison.figures if not figure.holds]
    assert not missed
    assert len(comparison.figures) == 11


def test_what_is_read_of_the_files(real: RealRun) -> None:
    assert len(real.arrival_s) == 300
    assert real.limits.kv_tokens == 2587 * 16  # one of 2588 blocks is the null block
    assert (real.limits.running_max, real.limits.iteration_tokens) == (256, 2048)
    assert real.limits.prefix_cache
    assert real.limits.asynchronous
    assert real.ttft_s[0] == pytest.approx(0.6894)
    # 9,045 prompt tokens in its second second: the 13 of which the last came at 1.7586 s and the
    # next would have come at 1.953 s. So that second ended in between, by the requests' clock.
    assert 1.7586 < real.sampled_s[1] < 1.953


@pytest.mark.parametrize("offset_s", [-0.4, 0.0, 0.25, 1.3])
def test_the_clock_of_the_log_is_found(offset_s: float) -> None:
    draws = np.random.default_rng(7)
    first_s = np.sort(draws.uniform(0, 60, 200))
    prompts = draws.integers(10, 2000, 200).astype(float)
    ticks = np.arange(1.0, 64.0)
    rates, _ = np.histogram(first_s + offset_s, np.concatenate(([-np.inf], ticks)), weights=prompts)
    assert clock_offset_s(ticks, rates, first_s, prompts) == pytest.approx(offset_s, abs=0.02)


def test_records_of_other_engines() -> None:
    old = limits_of({"vllm_version": "0.11.2", "engine_kwargs": {"max_num_seqs": 64}})
    assert (old.asynchronous, old.kv_tokens, old.running_max) == (False, None, 64)
    resolved = {"scheduler_config": {"async_scheduling": False}}
    new = {"vllm_version": "0.19.0", "resolved_config": resolved}
    assert not limits_of(new).asynchronous
    assert limits_of({"vllm_version": "1.0"}).asynchronous
    assert not limits_of({"kv_cache": {"enable_prefix_caching": False}}).prefix_cache


def test_a_run_lacks_a_file(tmp_path: Path) -> None:
    (tmp_path / "x_requests.csv").write_text("arrival_s\n0\n")
    with pytest.raises(WorkloadError, match=r"timeseries.csv, …meta.json"):
        load_run([tmp_path / "x_requests.csv"])


def test_a_request_that_cannot_fit(real: RealRun) -> None:
    with pytest.raises(WorkloadError, match="does not fit"):
        setup_of(real, load_profile(PROFILE), kv_tokens=1600)


def small(real: RealRun, count: int) -> RealRun:
    """Its first requests."""
    cut = {
        name: getattr(real, name)[:count]
        for name in ("arrival_s", "first_s", "last_s", "prompt_tokens", "output_tokens")
    }
    return replace(real, **cut)


def test_a_run_equals_itself(real: RealRun) -> None:
    few = small(real, 8)
    outcome = run(
        setup_of(few, load_profile(PROFILE)), keep=Keep(series=True, sample_s=0.1, spans=False)
    )
    times = {
        name: np.array([getattr(record, name) for record in outcome.records])
        for name in ("first_token_s", "last_token_s")
    }
    same = replace(few, first_s=times["first_token_s"], last_s=times["last_token_s"])
    once = compared(same, outcome)
    logged = replace(
        same,
        sampled_s=once.times_s,
        running=once.ours.running,
        waiting=once.ours.waiting,
        kv_share=once.ours.kv_share,
    )
    again = compared(logged, outcome)
    assert [f.error for f in again.figures] == pytest.approx([0.0] * len(again.figures), abs=1e-5)
    assert all(figure.holds for figure in again.figures)


def test_other_runs_on_the_command_line(
    real: RealRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = Path(f"{reality.RUN}_requests.csv").read_text().splitlines()
    (tmp_path / "mine_requests.csv").write_text("\n".join(lines[:9]) + "\n")
    log = Path(f"{reality.RUN}_timeseries.csv").read_text().splitlines()
    (tmp_path / "mine_timeseries.csv").write_text("\n".join(log[:40]) + "\n")
    meta = json.loads(Path(f"{reality.RUN}_meta.json").read_text())
    (tmp_path / "mine_meta.json").write_text(json.dumps(meta))
    files = [str(file) for file in sorted(tmp_path.iterdir())]
    picture = tmp_path / "curves.svg"
    code = reality.main(["--run", *files, "--profile", PROFILE, "--svg", str(picture)])
    assert code == 1  # the log is of 300 requests, these are 8
    assert "TTFT, mean" in capsys.readouterr().out
    assert picture.read_text().startswith("<svg")
    assert reality.main(["--run", *files, "--profile", "no-such"]) == 2


def test_section_and_picture(comparison: Comparison, real: RealRun) -> None:
    section = reality.section([comparison] * 10)
    assert all(check.holds for check in section.checks)
    assert len(section.tables[1].rows) == 10
    assert curves_svg(comparison, "t").count("<polyline") == 6
    assert "KV" not in curves_svg(
        replace(comparison, real=replace(comparison.real, kv_share=np.zeros(1))), "t"
    )


@pytest.mark.parametrize("prompt", [1, 15, 16, 17, 33])
@pytest.mark.parametrize("until", [1, 2, 16, 40])
def test_leases_end_with_a_block(prompt: int, until: int) -> None:
    credit = Credit(block_tokens=16)
    request = Request(spec=spec_of(max_tokens=1000), number=1, prompt_tokens=prompt)
    rounded = credit.rounded(request, until)
    assert rounded >= until
    assert leased_blocks(prompt, rounded, 16) == leased_blocks(prompt, until, 16)
    assert leased_blocks(prompt, rounded + 1, 16) == leased_blocks(prompt, until, 16) + 1
