"""`tranche calibrate`: an engine measured on a small grid, tables fitted, what mistakes say."""

from pathlib import Path

import pytest

from services.calibrate_command import cells_of, looks_like_seconds
from services.cli import main
from services.worker.engines.paged import make_paged
from services.worker.measure import Measured, Point, grid, measure
from services.worker.settings import WorkerSettings
from shared.config import SetupError
from shared.profiles import load_profile
from sim.calibration_cells import Cell
from tests.worker.conftest import MakeEngine

TABLE = Path(__file__).parents[2] / "deploy" / "costs" / "tables"


def run(*arguments: object) -> int:
    """The exit code of the command."""
    with pytest.raises(SystemExit) as ending:
        main(["calibrate", *map(str, arguments)])
    return int(ending.value.code or 0)


def test_an_engine_is_measured_step_by_step(make_engine: MakeEngine, llama: Path) -> None:
    engine = make_engine(llama, batch_size_max=4)
    points = grid(engine, [1, 2, 4, 8], [8, 24], steps=10)
    assert {point.batch for point in points} == {1, 2, 4}
    seen: list[None] = []
    runs = list(
        measure(
            engine,
            points,
            steps=10,
            repeats=2,
            seconds_max=60.0,
            on_run=lambda: seen.append(None),
        )
    )
    assert len(runs) == len(seen) == 2 * len(points)
    assert {run.point for run in runs[: len(points)]} == set(points)
    for one in runs:
        assert one.prefill_s > 0
        assert len(one.decode_s) == 10
        assert min(one.decode_s) > 0
    assert not engine.busy


def test_no_time_left_ends_the_grid_early(make_engine: MakeEngine, llama: Path) -> None:
    engine = make_engine(llama)
    points = grid(engine, [1, 2, 3], [4, 5, 6, 7], steps=8)
    runs = list(measure(engine, points, steps=8, repeats=9, seconds_max=0.0))
    assert len(runs) == 8


def test_a_grid_that_does_not_fit_is_refused(make_engine: MakeEngine, llama: Path) -> None:
    engine = make_engine(llama, kv_tokens=60)
    with pytest.raises(SetupError, match="only 1 batches fit into 60 KV tokens"):
        grid(engine, [1, 2, 4], [32, 64], steps=8)


def test_leases_are_measured_like_batches(llama: Path) -> None:
    engine = make_paged(
        WorkerSettings(model=str(llama), kv_tokens=400, prefill_chunk_tokens=20, torch_threads=1)
    )
    points = grid(engine, [1, 2, 4, 8], [8, 24], steps=10)
    assert {(p.batch, p.input_tokens) for p in points} >= {(1, 8), (8, 24)}
    runs = list(measure(engine, points, steps=10, repeats=1, seconds_max=60.0))
    assert [len(one.decode_s) for one in runs] == [10] * len(points)
    assert all(one.prefill_s > 0 for one in runs)
    assert engine.memory().kv_tokens_used == 0
    engine.close()


def test_cells_are_medians_at_their_mean_context() -> None:
    point = Point(batch=2, input_tokens=100)
    runs = [
        Measured(point, 0.5, (0.010,) * 8 + (0.020,) * 8),
        Measured(point, 0.7, (0.010,) * 8 + (0.020,) * 8),
        Measured(point, 9.0, (0.010,) * 8 + (0.020,) * 8),
    ]
    cells, noise = cells_of(runs)
    assert [(cell.phase, cell.kv_tokens, cell.seconds) for cell in cells] == [
        ("prefill", 0, 0.7),
        ("decode", 2 * 104 + 1, 0.010),  # contexts 101 to 108: 104.5 in the mean
        ("decode", 2 * 112 + 1, 0.020),
    ]
    assert noise == 0.0


def test_a_worker_becomes_a_profile(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny.json"
    options = ("--batch-sizes", "1,2,4", "--lengths", "8,16,32", "--steps", 8, "--repeats", 1)
    sizes = ("--kv-tokens", 512, "--torch-threads", 1, "--device", "cpu", "--name", "tiny")
    assert run("--model", llama, "--out", out, *options, *sizes) == 0
    profile = load_profile(out)
    assert (profile.name, profile.gpu, profile.kv_tokens) == ("tiny", "cpu", 512)
    assert profile.kv_bytes_per_token > 0
    assert profile.padded_s(4, 32, 9) > profile.padded_s(1, 8, 9) > 0


def test_a_table_becomes_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = TABLE / "composed_iteration_latency.csv"
    assert run("--from-table", table, "--model", "CodeLlama-34b", "--out", tmp_path) == 0
    names = sorted(path.stem for path in tmp_path.glob("*.json"))
    assert names == [f"codellama-34b-a100{tp}" for tp in ("", "-tp2", "-tp4", "-tp8")]
    assert "Held-out errors" in capsys.readouterr().out
    shipped, fitted = load_profile(names[0]), load_profile(tmp_path / f"{names[0]}.json")
    assert fitted.kv_tokens == shipped.kv_tokens
    assert fitted.errors["decode"].median == pytest.approx(
        shipped.errors["decode"].median, abs=1e-3
    )


def test_an_impossible_latency_names_its_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (TABLE / "composed_iteration_latency.csv").read_text().splitlines()
    at = lines[0].split(",").index("latency_ms")
    cells = lines[2].split(",")
    cells[at] = "-3"
    table = tmp_path / "table.csv"
    table.write_text("\n".join([*lines[:2], ",".join(cells)]))
    assert run("--from-table", table, "--out", tmp_path) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "row 3: latency_ms is '-3'; it must be above 0" in said


@pytest.mark.parametrize(("decode_s", "suspect"), [(25e-6, True), (25e-3, False)])
def test_seconds_in_place_of_milliseconds_are_noticed(decode_s: float, suspect: bool) -> None:
    cells = [Cell(((100, 0),), 0, 0, 9.0), *(Cell((), 1, 10 * n, decode_s) for n in (1, 2, 3))]
    assert looks_like_seconds(cells) is suspect


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (("--from-table", "nowhere.csv"), 1, "nowhere.csv is no file"),
        (("--from-table", TABLE / "splitwise_measured_latency.csv"), 1, "--kv-tokens"),
        (
            ("--from-table", TABLE / "composed_iteration_latency.csv", "--model", "x"),
            1,
            "has no model x, only Llama-2-7b",
        ),
        (
            ("--from-table", TABLE / "composed_iteration_latency.csv", "--name", "x"),
            2,
            "--name is for one table",
        ),
        (("--batch-sizes", "1,many"), 2, "no list of numbers"),
    ],
)
def test_mistakes_are_told(
    arguments: tuple[object, ...],
    code: int,
    complaint: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(*arguments) == code
    assert complaint in " ".join(capsys.readouterr().err.replace("│", " ").split())
