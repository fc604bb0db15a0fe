"""The comparison's figures: cells from traces, ratios with intervals, what is owed, the table."""

import json
import math
from pathlib import Path
from random import Random
from statistics import median

import msgspec
import pytest
from rich.console import Console

from bench.peers.agreement import describe
from bench.peers.cell import Cell, Usage, make_cell, percentile
from bench.peers.clients import Trace
from bench.peers.processes import Reading
from bench.peers.ratios import median_interval, output_tps, owed_rows, ratio
from bench.peers.report import (
    COLUMNS,
    Comparison,
    SystemNote,
    cell_rows,
    markdown,
    tables,
    with_ratios,
    write,
)
from bench.peers.rounds import usage_between
from bench.peers.systems import SYSTEMS


def trace(sent: float, *arrivals: tuple[float, int], ended: float | None, error: str = "") -> Trace:
    tokens = sum(count for _, count in arrivals)
    return Trace(
        sent,
        tokens,
        list(arrivals),
        ended_s=ended,
        complete=ended is not None and not error,
        tokens=tokens,
        error=error,
    )


def test_a_cell_counts_what_came_in_its_window() -> None:
    traces = [
        trace(8.0, (9.0, 4), (10.5, 2), (11.0, 2), ended=11.0),  # begun before: no TTFT
        trace(10.0, (10.25, 1), (11.25, 5), (12.25, 4), ended=12.25),
        trace(19.0, (19.5, 1), (20.5, 9), ended=None),  # cut: its token counts, its end does not
        trace(15.0, ended=16.0, error="500"),
    ]
    cell = make_cell("x", 3, 1, traces, (10.0, 20.0), Usage())
    assert cell.output_tps == pytest.approx((2 + 2 + 1 + 5 + 4 + 1) / 10)
    assert (cell.completed, cell.rps, cell.errors, cell.error) == (2, 0.2, 1, "500")
    assert cell.ttft_p50 == pytest.approx((250 + 500) / 2)
    assert cell.itl_p50 == pytest.approx(1000)
    assert cell.tpot_p50 == pytest.approx(1000 * (2.0 / 4 + 2.0 / 9) / 2)
    assert cell.e2e_p50 == pytest.approx((3000 + 2250) / 2)
    assert cell.tokens_per_read == pytest.approx(15 / 6)


def test_an_empty_cell_has_no_figures() -> None:
    cell = make_cell("x", 1, 1, [], (0.0, 1.0), Usage())
    assert cell.output_tps == 0
    assert math.isnan(cell.ttft_p50)
    assert math.isnan(cell.tokens_per_read)


def test_percentiles_are_linear_between_neighbours() -> None:
    assert percentile([4, 1, 3, 2], 0.5) == 2.5
    assert percentile([1, 2, 3], 1.0) == 3
    assert math.isnan(percentile([], 0.5))


@pytest.mark.parametrize(
    ("count", "low", "high", "coverage"),
    [(5, 0, 4, 0.9375), (7, 0, 6, 0.984375), (9, 1, 7, 0.9609375), (15, 3, 11, 0.96484375)],
)
def test_the_interval_is_the_narrowest_of_order_statistics(
    count: int, low: int, high: int, coverage: float
) -> None:
    assert median_interval([float(n) for n in range(count)]) == (low, high, coverage)


def test_the_interval_covers_the_median_as_often_as_it_says() -> None:
    rng, hits = Random(3), 0
    for _ in range(2000):
        low, high, _ = median_interval([rng.lognormvariate(0, 0.3) for _ in range(7)])
        hits += low <= 1.0 <= high
    assert hits / 2000 == pytest.approx(0.984, abs=0.012)


def cell(system: str, clients: int, number: int, tps: float, ttft: float = 100.0) -> Cell:
    empty = make_cell(system, clients, number, [], (0.0, 1.0), Usage())
    return msgspec.structs.replace(empty, output_tps=tps, ttft_p50=ttft)


def test_a_ratio_is_of_pairs_of_one_round() -> None:
    mine = [cell("ours", 8, n, 10.0 * n) for n in range(1, 8)]
    theirs = [cell("peer", 8, n, 5.0 * n) for n in range(1, 7)]
    found = ratio([*mine, *theirs], "t", 8, "ours", "peer", output_tps)
    assert found is not None
    assert (found.pairs, found.median, found.low, found.high) == (6, 2.0, 2.0, 2.0)
    assert ratio(mine, "t", 8, "ours", "peer", output_tps) is None


ROUNDS = range(1, 8)
CELLS = [
    made
    for n in ROUNDS
    for made in (
        cell("tranche", 1, n, 95 + n / 10),
        cell("llama", 1, n, 100),
        cell("vllm", 1, n, 60),
        cell("tranche", 32, n, 500 + n, ttft=150),
        cell("vllm", 32, n, 400, ttft=200),
        cell("llama", 32, n, 250, ttft=160 if n != 4 else 140),
        cell("transformers", 32, n, 170, ttft=900),
    )
]


def test_what_is_owed_is_measured_against_the_best_at_each_level() -> None:
    rows = owed_rows(CELLS, "tranche", ["vllm", "llama", "transformers"])
    told = [(row.ratio.clients, row.ratio.peer, row.owed, row.met, row.sure) for row in rows]
    assert told == [
        (1, "llama", 0.9, True, True),
        (32, "vllm", 1.0, True, True),
        (32, "transformers", 3.0, False, True),
        (32, "llama", 1.0, True, False),
    ]
    assert rows[-1].ratio.median == pytest.approx(150 / 160)
    assert rows[-1].ratio.high == pytest.approx(150 / 140)


def test_too_few_pairs_decide_nothing() -> None:
    rows = owed_rows([one for one in CELLS if one.round < 4], "tranche", ["vllm", "llama"])
    assert {row.sure for row in rows} == {False}


def comparison() -> Comparison:
    notes = [SystemNote(name=n, title=s.title, ours=s.ours) for n, s in SYSTEMS.items()]
    return with_ratios(
        Comparison(
            begun="2026-01-01T00:00:00+00:00",
            commit="abc",
            machine={"CPU": "x"},
            plan={"rounds": "7"},
            systems=notes,
            cells=CELLS,
        )
    )


def test_the_table_has_a_line_for_each_level_and_system() -> None:
    rows = cell_rows(comparison())
    assert [(row[0], row[1]) for row in rows] == [
        ("1", "tranche"),
        ("1", "vllm"),
        ("1", "llama"),
        ("32", "tranche"),
        ("32", "vllm"),
        ("32", "llama"),
        ("32", "transformers"),
    ]
    assert {len(row) for row in rows} == {len(COLUMNS)}
    assert rows[3][2] == f"{median(500 + n for n in ROUNDS):.0f}"
    console = Console(record=True, width=200, quiet=True)
    for table in tables(comparison()):
        console.print(table)


def test_the_files_hold_the_same(tmp_path: Path) -> None:
    data, page = write(comparison(), tmp_path, "peers-x")
    kept = json.loads(data.read_text())
    assert len(kept["cells"]) == len(CELLS)
    assert kept["cells"][0]["itl_p50"] is None
    assert page.read_text() == markdown(comparison())
    assert (
        "| tranche | output tokens/s at 1 client over the best peer (llama) |" in page.read_text()
    )


def test_what_is_not_installed_says_how_to_get_it(tmp_path: Path) -> None:
    assert "run `make peers`" in SYSTEMS["vllm"].missing(tmp_path)
    assert SYSTEMS["tranche"].missing(tmp_path) == ""


def test_foreign_time_is_what_the_core_did_beside_the_server() -> None:
    begin = Reading(100.0, 10.0, (50.0, 60.0))
    end = Reading(110.0, 18.0, (51.0, 69.0))
    usage = usage_between(begin, end, server_core=1, client_core=0)
    assert usage.server_cores == pytest.approx(0.8)
    assert usage.foreign_cores == pytest.approx(0.1)
    assert usage.client_core == pytest.approx(0.1)


def test_answers_are_compared_with_the_first() -> None:
    answers = {
        "a": [(3, " x y z")],
        "b": [(3, " x y q")],
        "c": [(4, " x y z")],
        "d": [(None, " x y z")],
    }
    told = describe(answers)
    assert "for 2 of" in told["b"]
    assert "prompt tokens differ: 3 and 4" in told["c"]
    assert "differ" not in told["d"]
    assert describe({"a": []}) == {}
