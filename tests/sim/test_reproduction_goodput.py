"""The Past-Future and goodput parts: their statements fail when they should; small runs of each."""

from dataclasses import replace
from random import Random
from statistics import fmean
from xml.etree import ElementTree

import numpy as np
import pytest

from services.scheduler.core.policies.lengths import OPEN_END, prepare_lengths
from services.scheduler.core.presets import preset_named
from sim.items import Item
from sim.memory_only import Tally
from sim.past_future_source import POLICIES, SETS as MEMORY_SETS, SOURCE_STEPS
from sim.past_future_table import Cell, cell
from sim.reproduction import goodput
from sim.reproduction.goodput_chart import small_multiples
from sim.reproduction.goodput_claims import Grid, claims
from sim.reproduction.goodput_runs import (
    LIMITS,
    PARTS,
    PAST_FUTURE,
    SETS,
    SOURCE_CONSERVATIVE,
    Result,
    Task,
    evenly,
    in_parts,
    run,
)
from sim.reproduction.past_future_claims import claims as memory_claims
from sim.reproduction.similarity import LikenessTask, ks_distance, likeness, of_window

FIXED = tuple(p for p in goodput.POLICIES if p not in (PAST_FUTURE, SOURCE_CONSERVATIVE))


def nothing(done: int, total: int) -> None:
    """Nobody watches."""


# ------------------------------------------------------------------------------------- goodput


def result(lengths: str, clients: int, policy: str, goodput_rps: float) -> Result:
    return Result(
        task=Task(lengths, clients, policy, "past-future"),
        goodput_rps=goodput_rps,
        counted_rps=goodput_rps,
        good_tps=5000 * goodput_rps,
        ended=100,
        good=100,
        late=0,
        turned_away=0,
        evictions=0,
        kv_util=0.9,
        batch=30.0,
        duration_s=500.0,
    )


def grid(past_future_at: float, fixed_low: float, source: float) -> Grid:
    """The fixed ones reach 1 everywhere but on Dist-2, where they reach `fixed_low`; the source's
    conservative falls behind with the clients."""
    results = []
    for lengths in ("Dist-1", "Dist-2"):
        for clients in (10, 100):
            rates = {PAST_FUTURE: past_future_at if lengths == "Dist-1" else 1.0}
            rates |= dict.fromkeys(FIXED, 1.0 if lengths == "Dist-1" else fixed_low)
            rates[SOURCE_CONSERVATIVE] = source if clients == 100 else 1.0
            results += [result(lengths, clients, name, rate) for name, rate in rates.items()]
    return Grid(results)


@pytest.mark.parametrize(
    ("past_future_at", "fixed_low", "source", "expected"),
    [
        (0.98, 0.85, 0.5, [True, True, True, True]),
        (0.96, 0.85, 0.5, [False, True, True, True]),
        (0.98, 0.95, 0.5, [True, False, True, True]),
        (0.98, 0.85, 0.655, [True, True, True, False]),
        (0.98, 0.85, 0.7, [True, True, False, False]),
    ],
)
def test_each_statement_hangs_on_its_own_figures(
    past_future_at: float, fixed_low: float, source: float, expected: list[bool]
) -> None:
    checks = claims(grid(past_future_at, fixed_low, source))
    assert [check.holds for check in checks if check.holds is not None][:4] == expected


def test_one_fixed_policy_that_is_good_everywhere_is_enough_to_fail() -> None:
    cells = [
        replace(r, goodput_rps=1.0) if r.task.policy == "aggressive 90 %" else r
        for r in (
            grid(0.98, 0.85, 0.5).at(lengths, clients, policy)
            for lengths in ("Dist-1", "Dist-2")
            for clients in (10, 100)
            for policy in goodput.POLICIES
        )
    ]
    assert claims(Grid(cells))[2].holds is False


def test_seeds_are_averaged_and_their_counts_added() -> None:
    one, two = (result("Dist-1", 10, PAST_FUTURE, rate) for rate in (1.0, 2.0))
    whole = Grid([one, replace(two, task=replace(two.task, seed=2))])
    assert whole.at("Dist-1", 10, PAST_FUTURE).goodput_rps == 1.5
    assert whole.at("Dist-1", 10, PAST_FUTURE).ended == 200
    assert whole.seeds == 2


def test_a_collapse_past_saturation_is_seen() -> None:
    cells = [result("Dist-1", n, PAST_FUTURE, rate) for n, rate in ((10, 1.0), (100, 0.8))]
    cells += [result("Dist-1", n, SOURCE_CONSERVATIVE, 0.5) for n in (10, 100)]
    assert claims(Grid(cells))[-1].holds is False


def test_the_picture_is_svg_with_a_line_for_each_policy() -> None:
    picture = ElementTree.fromstring(small_multiples(grid(0.98, 0.85, 0.5)))
    lines = picture.findall(".//{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 2 * len(goodput.POLICIES)


SMALL = Task("Dist-3", 4, PAST_FUTURE, "past-future", warm=2, counted=6, kv_tokens=14_000, seed=3)
"""Two of four clients' requests run at once, the others are turned away and come again."""


def test_requests_are_taken_and_ordered_evenly() -> None:
    items = [Item(None, 10, output) for output in range(1, 1001)]
    taken = evenly(items, 100, Random(1))
    assert sorted(item.output_tokens for item in taken) == list(range(6, 1001, 10))
    for at in range(0, 100, 20):
        assert fmean(i.output_tokens for i in taken[at : at + 20]) == pytest.approx(501, abs=25)
    assert evenly(items, 100, Random(1)) == taken != evenly(items, 100, Random(2))


def test_a_run_counts_what_passed_and_nothing_of_the_warm_up() -> None:
    small = run(SMALL, nothing)
    assert small.ended == 6 == small.good + small.late
    assert small.turned_away > 0
    assert small.counted_rps == pytest.approx(small.good / small.duration_s)
    assert 0 < small.goodput_rps < 1
    assert small.batch <= 4
    assert run(SMALL, nothing) == small


def test_the_parts_of_a_run_make_up_its_count() -> None:
    small = run(SMALL, nothing)
    assert len(small.parts_rps) == PARTS
    assert fmean(small.parts_rps) == pytest.approx(small.counted_rps)
    assert in_parts([10.0, 11.9, 12.0, 20.0], 10.0, 20.0) == (1.0, 0.5, 0.0, 0.0, 0.5)


def test_requests_that_end_at_once_do_not_carry_a_run_past_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four alike begin and end together: the fourth is one more than the warm-up wants."""
    monkeypatch.setitem(SETS, "alike", "uniform:64x32")
    monkeypatch.setitem(LIMITS, "alike", 32)
    assert run(replace(SMALL, lengths="alike", warm=3, counted=3), nothing).ended == 4


def test_a_section_of_small_runs() -> None:
    tasks = [
        replace(task, warm=1, counted=3, clients=2)
        for task in goodput.tasks(quick=True)
        if task.clients == 10
    ]
    section = goodput.section([goodput.run(task, nothing) for task in tasks])
    assert section.checks[0].holds is True
    assert section.pictures[0][1].startswith("<svg")
    assert section.tables[0].columns == ("policy", "N = 2")


def test_the_full_part_asks_for_every_policy_on_every_set_at_every_number_of_clients() -> None:
    tasks = goodput.tasks(quick=False)
    cells = {(t.lengths, t.clients, t.policy) for t in tasks if t.group == "grid"}
    assert len(cells) == 4 * 7 * 8
    limits = {tuple(t.constants) for t in tasks if t.policy == PAST_FUTURE}
    assert limits == {()}  # one setting, the preset's own


# ---------------------------------------------------------------------------------- cold start


@pytest.mark.parametrize(("finished", "stand_ins"), [(0, 20), (20, 20), (30, 10), (40, 0)])
def test_past_future_begins_as_the_artifacts_server(finished: int, stand_ins: int) -> None:
    constants = preset_named("past-future").with_constants()
    model = prepare_lengths(np.full(finished, 100, dtype=np.int64), None, constants)
    assert int((model.lengths == OPEN_END).sum()) == stand_ins


# ------------------------------------------------------------------------------- memory only


def source_cells() -> list[Cell]:
    """Cells that say exactly what the source says."""
    cells = []
    for lengths in MEMORY_SETS:
        oracle = Tally(SOURCE_STEPS[lengths, "oracle"], 1000, 0, 0.9, 0.9)
        for policy, row in POLICIES.items():
            ratio, memory, future, evictions = row.source[lengths]
            steps = SOURCE_STEPS.get((lengths, policy), round(ratio * oracle.steps))
            tally = Tally(steps, 100_000, round(evictions * 1000), memory / 100, future / 100)
            cells.append(cell(lengths, policy, [tally], [oracle]))
    return cells


def test_the_sources_own_figures_hold() -> None:
    alike = [of_window(LikenessTask("code", 1000))]
    alike.append(of_window(LikenessTask("conversation", 1000)))
    checks = memory_claims(source_cells(), alike)
    assert {check.holds for check in checks} == {True, None}
    assert len(checks) == 10


@pytest.mark.parametrize(
    ("policy", "number"), [("aggressive 99 %", 0), ("past-future 3 %", 1), ("past-future 5 %", 2)]
)
def test_a_figure_that_is_off_fails_its_statement(policy: str, number: int) -> None:
    cells = [
        replace(c, verdict="differs", first=replace(c.first, verdict="differs"))
        if (c.lengths, c.policy) == ("ShareGPT-o1", policy)
        else c
        for c in source_cells()
    ]
    alike = [of_window(LikenessTask(name, 1000)) for name in ("conversation", "code")]
    assert memory_claims(cells, alike)[number].holds is False


def test_distances_of_distributions() -> None:
    assert ks_distance(np.array([1, 2, 3]), np.array([1, 2, 3])) == 0
    assert ks_distance(np.array([1, 2]), np.array([3, 4])) == 1
    assert ks_distance(np.array([1, 2, 3, 4]), np.array([3, 4, 5, 6])) == 0.5
    same = likeness(np.tile(np.arange(1, 101), 4), 100)
    assert same.all_min == pytest.approx(1.0)
    assert same.ks_max == 0
