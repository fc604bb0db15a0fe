"""`tranche simulate`, `plan` and `replay` as their users call them."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from services.replay_command import described, replay
from services.scheduler.core.replay import Difference
from shared.config import SetupError
from shared.messages import SchedulerBeat
from sim.cli import NOTHING_DONE_EXIT_CODE, simulate
from sim.plan_cli import UNMET_EXIT_CODE, plan

KEYS = """policy workers requests completed rejected failed duration_s throughput_rps output_tps
goodput_rps slo ttft_s tpot_s e2e_s max_tpot_s evictions evicted_requests kv_util_mean kv_peak_max
stall_p99_s invalid_tokens pad_tokens slices_per_request batch_size_mean early_return_ratio
completion_time_std_s busy_time_std_s scheduler_cpu_s decisions""".split()
SMALL = ("--trace", "uniform:16-200x4-60", "--limit", "60", "--profile", "llama-2-13b-a100")
RATE = ("--rate", "6")
USAGE_EXIT_CODE = 2
Shown = tuple[int, str]


def called(command: Callable[..., None], *arguments: str) -> Shown:
    """Exit code and all output."""
    app = typer.Typer()
    app.command()(command)
    shown = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "120"})
    if shown.exception is not None and not isinstance(shown.exception, SystemExit):
        raise shown.exception
    return shown.exit_code, shown.output


def reports_of(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_one_run_gives_one_report_with_the_agreed_keys(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.json"
    arguments = ("--policy", "vllm", "--workers", "2", "--slo", "ttft=1,tpot=0.1")
    code, text = called(simulate, *SMALL, *RATE, *arguments, "--json", str(path))
    assert code == 0, text
    report = reports_of(path)
    assert set(KEYS) <= set(report)
    assert (report["policy"], report["workers"], report["requests"]) == ("vllm", 2, 60)
    assert report["completed"] == 60
    assert report["slo"] == {"ttft": 1.0, "tpot": 0.1}
    assert set(report["ttft_s"]) == {"mean", "p50", "p95", "p99"}
    assert report["evictions"] == 0
    assert 0 < report["kv_util_mean"] <= report["kv_peak_max"] <= 1
    assert "TTFT" in text
    said = " ".join(text.split())
    assert "profile llama-3.1-8b-rtx4090; other profiles and policies are not checked" in said
    assert "profile llama-2-13b-a100: error of its fit on held-out cells" in said
    assert f"{report['good_share']:.2%}" in text
    assert report["notes"]["offered_rps"] in text


def test_seeds_and_policies_at_one_load_are_shown_as_means() -> None:
    many = ("--policy", "scls,vllm", "--seed", "0", "--seed", "1", "--limit", "20", "--jobs", "1")
    code, text = called(simulate, *SMALL, *RATE, *many, "--workers", "2", "--slo", "ttft=1")
    assert code == 0, text
    assert "means over 2 seeds" in text
    rows = [line.split() for line in text.splitlines() if line.startswith((" scls", " vllm"))]
    assert [row[0] for row in rows] == ["scls", "vllm"]


def test_policies_loads_and_seeds_multiply_in_parallel_processes(tmp_path: Path) -> None:
    path, page = tmp_path / "all.json", tmp_path / "all.html"
    many = ("--policy", "scls,vllm", "--rate", "2", "--rate", "8", "--seed", "0", "--seed", "1")
    many = (*many, "--limit", "20")
    out = ("--json", str(path), "--html", str(page), "--jobs", "2")
    code, text = called(simulate, *SMALL, *many, "--workers", "2", *out)
    assert code == 0, text
    reports = reports_of(path)
    told = [(r["policy"], r["notes"]["load"], r["notes"]["seed"]) for r in reports]
    assert sorted(told) == sorted(
        (policy, load, seed)
        for policy in ("scls", "vllm")
        for load in ("2 requests/s", "8 requests/s")
        for seed in "01"
    )
    assert "means over 2 seeds" in text
    shown = page.read_text(encoding="utf-8")
    assert "Goodput against the load" in shown
    assert shown.count("predicted future peak, mean") == 2, "the leased policy, at both loads"


def test_equal_commands_give_equal_reports(tmp_path: Path) -> None:
    def report(seed: str) -> dict[str, Any]:
        path = tmp_path / "report.json"
        arguments = ("--policy", "past-future", "--workers", "2", "--seed", seed)
        code, text = called(simulate, *SMALL, *RATE, *arguments, "--json", str(path))
        assert code == 0, text
        found: dict[str, Any] = reports_of(path)
        found.pop("scheduler_cpu_s")
        return found

    assert report("3") == report("3")
    assert report("3")["ttft_s"] != report("4")["ttft_s"]


@pytest.mark.parametrize("policy", ["scls", "vllm", "past-future"])
def test_a_simulated_journal_replays_to_the_same_decisions(tmp_path: Path, policy: str) -> None:
    journal = tmp_path / "journal"
    arguments = ("--policy", policy, "--workers", "2", "--set", "slice_tokens=24")
    code, text = called(simulate, *SMALL, *RATE, *arguments, "--journal", str(journal))
    assert code == 0, text
    code, text = called(replay, str(journal))
    assert code == 0
    assert re.fullmatch(r"\d+ steps, every decision the same\n", text)
    assert int(text.split()[0]) > 100
    code, text = called(replay, str(journal), "--policy", "sls")
    assert code == 3
    assert "replayed" in text


def test_what_is_no_whole_journal_is_told(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    with pytest.raises(SetupError, match="No such file"):
        called(replay, str(journal))
    journal.touch()
    with pytest.raises(SetupError, match="journal: empty"):
        called(replay, str(journal))
    arguments = ("--policy", "vllm", "--workers", "1", "--limit", "5", "--journal", str(journal))
    assert called(simulate, *SMALL, *RATE, *arguments)[0] == 0
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-3])
    code, text = called(replay, str(journal))
    assert code == 0
    cut = re.search(r"cut off at byte (\d+)", text)
    assert cut is not None
    journal.write_bytes(whole[: int(cut[1])])
    shorter = called(replay, str(journal))[1]
    assert shorter == text.splitlines(keepends=True)[-1]


def test_a_difference_between_beats_shows_the_fields() -> None:
    one = SchedulerBeat(epoch=1, waiting=3, running=5, kv_usage=0.25)
    other = SchedulerBeat(epoch=1, waiting=4, running=5, kv_usage=0.5)
    text = described(Difference(7, 1.5, (one,), (other,)))
    assert "SchedulerBeat differs in: waiting 3 recorded, 4 replayed; kv_usage 0.25" in text


def test_options_reach_the_simulation(tmp_path: Path) -> None:
    def report(*arguments: str) -> dict[str, Any]:
        path = tmp_path / "report.json"
        base = (*SMALL, "--policy", "so", "--workers", "1", "--clients", "8")
        code, text = called(simulate, *base, *arguments, "--json", str(path))
        assert code == 0, text
        found: dict[str, Any] = reports_of(path)
        return found

    plain = report("--slice-tokens", "8")
    assert plain["notes"]["load"] == "8 clients"
    assert report("--set", "slice_tokens=60")["slices_per_request"] < plain["slices_per_request"]
    assert report("--max-output-tokens", "5")["output_tokens"] <= 60 * 5
    assert report("--kv-tokens", "800")["batch_size_mean"] < plain["batch_size_mean"]


def test_a_load_that_fits_nowhere_is_reported_as_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    tiny = ("--kv-tokens", "16", "--workers", "1", "--policy", "scls,vllm", "--jobs", "1")
    code, text = called(simulate, *SMALL, *RATE, *tiny, "--html", str(page))
    assert code == NOTHING_DONE_EXIT_CODE, text
    said = " ".join(text.split())
    assert "vllm: 60 x too_long" in said
    assert "a worker has 16): raise --kv-tokens" in said
    assert "recorded vLLM run" not in said, "no figure to trust"
    assert "120 of 120 requests were refused or failed" in page.read_text(encoding="utf-8")


def test_json_to_the_output_is_all_that_it_prints() -> None:
    app = typer.Typer()
    app.command()(simulate)
    arguments = [*SMALL, *RATE, "--policy", "vllm", "--workers", "1", "--json", "-"]
    shown = CliRunner().invoke(app, arguments)
    assert json.loads(shown.stdout)["policy"] == "vllm"


def test_a_plan_names_the_fewest_workers_and_what_was_tried(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    load = ("--rate", "40", "--policy", "vllm", "--seed", "1")
    found = ("--slo", "ttft=0.25,tpot=0.032", "--target", "0.95", "--json", str(path))
    code, text = called(plan, *SMALL, *load, *found)
    assert code == 0, text
    made = reports_of(path)
    shares = {tried["workers"]: tried["attainment"] for tried in made["tried"]}
    assert shares[made["workers"]] >= 0.95
    assert made["workers"] > 1
    assert shares[made["workers"] - 1] < 0.95
    assert f"vllm: {made['workers']} workers" in text
    assert "Warning: fewer than 1,000 requests" in " ".join(text.split())


def test_a_plan_that_cannot_be_met_says_so() -> None:
    never = ("--slo", "ttft=0.001", "--workers-max", "3", "--policy", "vllm", *RATE)
    code, text = called(plan, *SMALL, *never)
    assert code == UNMET_EXIT_CODE
    assert "no number of workers up to 3" in text
    for size in ("1 worker,", "2 workers,", "3 workers,"):
        assert size in text


def test_a_plan_for_two_loads_is_refused() -> None:
    code, text = called(plan, *SMALL, *RATE, "--rate", "8", "--slo", "ttft=1", "--policy", "vllm")
    assert code == USAGE_EXIT_CODE
    said = " ".join(text.replace("│", " ").split())
    assert "once with each of --rate 6 and --rate 8" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--policy", "nope"), "unknown policy 'nope'"),
        (("--policy", "vllm", "--profile", "nope"), "llama-2-13b-a100"),
        (("--policy", "vllm", "--set", "nope=1"), "known are"),
        (("--policy", "vllm", "--set", "nope"), "NAME=VALUE"),
        (("--policy", "vlm"), "unknown policy 'vlm', did you mean 'vllm'"),
        (("--policy", "vllm", "--set", "slice_tokens=0"), "at least 1"),
        (("--policy", "vllm", "--slo", "speed=1"), "ttft=SECONDS"),
        (("--policy", "vllm", "--clients", "3"), "give one of --rate"),
        (("--policy", "vllm", "--trace", "none.csv"), "no such file"),
        (("--policy", "vllm,scls", "--journal", "x"), "one run"),
        (("--policy", "oracle", "--journal", "x"), "true lengths"),
        (("--policy", "vllm", "--html", "."), "cannot be written"),
        (("--policy", "vllm", "--rate", "8, 10"), "repeat the flag: --rate 8 --rate 10"),
        (("--policy", "vllm", "--rate", "fast"), "'fast' is no number"),
        (("--policy", "vllm", "--clients", "1.5"), "'1.5' is no whole number"),
    ],
)
def test_mistakes_are_told_before_anything_runs(arguments: tuple[str, ...], words: str) -> None:
    code, text = called(simulate, *SMALL, *RATE, "--workers", "1", *arguments)
    assert code == USAGE_EXIT_CODE
    assert words in " ".join(text.replace("│", " ").split())
