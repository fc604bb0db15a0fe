"""Trials: presets compared on equal terms, kept in pieces, judged by what is written down."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sim.trials import everywhere, four_workers, ladder
from sim.trials.__main__ import app
from sim.trials.cell import Cell, Figures, measure, workload_of
from sim.trials.kept import Kept, finish
from sim.trials.sets import SETS
from sim.trials.stats import mean_of, ratio_of


def figures(**changes: float) -> Figures:
    plain = {
        "completed": 1.0,
        "output_tps": 100.0,
        "good_share": 0.9,
        "ttft_mean_s": 1.0,
        "ttft_p50_s": 0.5,
        "ttft_p99_s": 4.0,
        "e2e_mean_s": 20.0,
        "gap_p99_s": 0.2,
        "evictions": 0.0,
        "kv_mean": 0.5,
        "bound_rps": 10.0,
    }
    return Figures(**{**plain, **changes})


def cell(policy: str = "tranche", **changes: object) -> Cell:
    told = {"workload": "conv", "load": 0.9, "policy": policy, "requests": 120, "seed": 3}
    return Cell(**{**told, **changes})  # type: ignore[arg-type]


def test_a_load_is_a_share_of_the_fluid_bound_and_the_same_for_every_policy() -> None:
    for name in SETS:
        workload, bound_rps = workload_of(name, 0.8, 150, None, 1)
        assert len(workload.items) == 150
        assert workload.offered_rps == pytest.approx(0.8 * bound_rps, rel=0.35), name
        assert workload_of(name, 0.8, 150, None, 1)[0].items == workload.items
        limit = SETS[name].max_tokens
        assert all(item.output_tokens <= limit for item in workload.items), name


def test_traces_keep_their_own_arrivals() -> None:
    """The same gaps, all shorter by one factor."""
    slow, fast = (workload_of("azure-code", load, 200, None, 1)[0] for load in (0.5, 1.0))
    pairs = [(s.arrival_s, f.arrival_s) for s, f in zip(slow.items, fast.items, strict=True)]
    assert all(s == pytest.approx(2 * f, rel=1e-6) for s, f in pairs if f)


def test_a_cell_is_measured_and_found_again_in_the_file(tmp_path: Path) -> None:
    path, wanted = tmp_path / "kept.jsonl", [cell(), cell("past-future")]
    assert finish(Kept(path), wanted, jobs=1, minutes=0, title="") == 0
    kept = Kept(path)
    assert kept.missing(wanted) == []
    found = kept.of(cell())
    assert found is not None
    assert found.completed == 1.0
    assert found.ttft_mean_s > 0
    assert found == measure(cell(), lambda done, total: None)
    with path.open("ab") as out:
        out.write(b'{"key": "cut o')
    assert Kept(path).missing(wanted) == []
    assert Kept(path, without=["tranche"]).missing(wanted) == [cell()]


def test_other_constants_are_another_cell() -> None:
    assert cell().key != cell(constants={"slice_tokens": 16}).key
    assert cell("past-future").key != cell("past-future", constants={"future_reserve": 0.03}).key
    assert cell().key == cell().key


def test_with_a_limit_some_are_refused_and_more_come_in_time() -> None:
    free = cell(load=4.0, requests=300)
    limited = replace(free, ttft_ms=2_000)
    assert limited.key != free.key
    refusing, taking = (measure(one, lambda done, total: None) for one in (limited, free))
    assert refusing.completed < taking.completed == 1.0
    assert refusing.good_share > taking.good_share


def test_ratios_are_of_means_with_the_spread_of_seeds() -> None:
    ratio = ratio_of([1.0, 30.0], [2.0, 20.0])
    assert ratio.value == pytest.approx(31 / 22)
    assert ratio.spread == pytest.approx(2**0.5 / 2)
    assert mean_of([2.0]).spread == 0.0


def kept_with(path: Path, runs: list[tuple[Cell, Figures]]) -> Kept:
    kept = Kept(path)
    for one, came in runs:
        kept.add(one, came)
    return kept


def test_limits_are_judged_on_the_means_of_the_same_seeds(tmp_path: Path) -> None:
    case = four_workers.CASES[0]
    base, ours = four_workers.BASE, four_workers.CONTENDERS[-1]
    runs = []
    for seed, (mean_s, good) in enumerate(((0.8, 0.999), (0.9, 0.985)), start=1):
        runs.append((four_workers.cell_of(case, base, seed, {}), figures()))
        came = figures(ttft_mean_s=mean_s, good_share=good, ttft_p99_s=5.0)
        runs.append((four_workers.cell_of(case, ours, seed, {}), came))
    kept = kept_with(tmp_path / "kept.jsonl", runs)
    found = four_workers.rows(kept, 3, four_workers.CONTENDERS, {})
    told = {v.owed.figure: (round(v.value, 3), v.held) for v in four_workers.verdicts(found)}
    assert told == {
        "ttft_mean_s": (0.85, True),
        "ttft_p99_s": (1.25, False),
        "good_share": (0.992, True),
    }


def test_changes_are_for_tranche_alone() -> None:
    case = four_workers.CASES[0]
    cells = [
        four_workers.cell_of(case, c, 1, {"volume_boost_s": 5.0}) for c in four_workers.CONTENDERS
    ]
    assert [dict(c.constants) for c in cells] == [
        {"future_reserve": 0.03},
        {},
        dict(four_workers.PREFILL_ESTIMATED),
        {"volume_boost_s": 5.0},
    ]


def placed(**others: Figures) -> everywhere.Place:
    means = {name: everywhere.means_of([one]) for name, one in others.items()}
    return everywhere.Place("dec", 0.92, 1, means)


def test_behind_is_counted_against_the_best_beyond_what_can_be_felt() -> None:
    place = placed(
        tranche=figures(ttft_mean_s=1.0, gap_p99_s=0.215, good_share=0.9),
        vllm=figures(ttft_mean_s=0.8, gap_p99_s=0.2, good_share=0.95),
        tgi=figures(ttft_mean_s=0.5, completed=0.9),
    )
    assert place.behind("ttft_mean_s") == pytest.approx(0.25)  # of vllm: tgi failed some
    assert place.behind("gap_p99_s") == 0.0  # less than an iteration
    assert place.behind("good_share") == pytest.approx(0.05 / 0.95)
    assert [figure for _, figure, _ in everywhere.losses([place])] == ["ttft_mean_s", "good_share"]


@pytest.mark.parametrize(
    ("theirs", "trade"),
    [
        ({"output_tps": 50.0, "gap_p99_s": 9.0}, "tokens"),
        ({"gap_p99_s": 9.0}, "stalls"),
        ({"ttft_p99_s": 9.0}, "tail"),
        ({}, "nothing"),
    ],
)
def test_who_is_ahead_is_told_with_what_it_pays(theirs: dict[str, float], trade: str) -> None:
    ours = figures(ttft_mean_s=1.0, good_share=0.9)
    place = placed(tranche=ours, vllm=figures(ttft_mean_s=1.0, good_share=0.95, **theirs))
    assert everywhere.trade(place, "good_share") == trade
    (line,) = everywhere.explained([place])
    assert line.startswith(f"- `vllm`: {everywhere.TRADES[trade]}")
    assert line.endswith("dec 0.92 goodput (5%).")


def test_many_losses_of_one_figure_are_told_together() -> None:
    ours = figures(gap_p99_s=0.3)
    far, near = (placed(tranche=ours, sls=figures(gap_p99_s=gap)) for gap in (0.1, 0.2))
    same = placed(tranche=ours, sls=ours)
    (line,) = everywhere.explained([same, *[far] * everywhere.MANY, near])
    assert line.endswith(": p99 stall in 9 of 10 places (50% to 200%).")
    (line,) = everywhere.explained([far, same])
    assert line.endswith(": dec 0.92 p99 stall (200%).")


def test_every_preset_but_the_oracle_is_compared() -> None:
    names = everywhere.policies()
    assert len(names) == len(set(names))
    assert "oracle" not in names
    assert {"tranche", "past-future", "vllm", "sls", "scls"} <= set(names)


def test_the_whole_is_one_on_its_own_ladder(tmp_path: Path) -> None:
    case = four_workers.CASES[0]
    whole = next(rung for rung in ladder.RUNGS if rung.policy == "tranche" and not rung.constants)
    worse = ladder.DOWN[0]
    runs = [
        (ladder.cell_of(case, whole, 1), figures()),
        (ladder.cell_of(case, worse, 1), figures(ttft_mean_s=1.5)),
    ]
    found = ladder.rows(kept_with(tmp_path / "kept.jsonl", runs), 1)
    told = {row.rung.name: row.ratio("ttft_mean_s").value for row in found}
    assert told == {whole.name: 1.0, worse.name: 1.5}


def test_the_command_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    kept_file, json_file = tmp_path / "kept.jsonl", tmp_path / "table.json"
    names = ("tranche", "vllm")
    kept = Kept(kept_file)
    for one in everywhere.cells(1, 100, names):
        kept.add(one, figures())
    options = ["--requests", "100", "--policy", "vllm", "--jobs", "1", "--kept", str(kept_file)]
    came = CliRunner().invoke(app, ["everywhere", *options, "--json", str(json_file)])
    assert came.exit_code == 0, came.output
    assert f"behind in 0 of {len(everywhere.WORKLOADS) * len(everywhere.LOADS) * 6}" in came.output
    body = json.loads(json_file.read_text())
    assert body["missing"] == 0
    assert body["behind"] == 0
