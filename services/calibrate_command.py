"""`tranche calibrate`: a cost profile from a table of measured iterations, or from a worker."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, pstdev
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as Shown

from shared.config import SetupError
from shared.profiles import CostProfile
from sim.calibrated_profile import Described, calibrated, profile_json
from sim.calibration_cells import CalibrationError, Cell
from sim.calibration_tables import Table, read_tables

if TYPE_CHECKING:
    from services.worker.engines.api import Engine
    from services.worker.measure import Measured, Point

NOISE_TOLD = 0.2
"""Standard deviation / mean of equal steps from which the user is warned."""
DECODE_S_MIN = 1e-4
"""No model decodes in less; a table whose decodes do has most likely seconds for milliseconds."""
WINDOW_STEPS = 8
"""Decode steps that make one cell: their median time at their mean context."""


def calibrate(
    from_table: Annotated[
        Path | None,
        typer.Option(
            help="Fit this CSV or Parquet (columns model,gpu,tp,phase,batch_size,context_len,"
            "latency_ms; optional kv_capacity_tokens, and prefill_chunk,kv_prefill,n_decode,"
            "kv_decode for mixed rows) instead of measuring."
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            help="Measured: a folder or hub id; default: the demo model. "
            "With --from-table: only this model's rows."
        ),
    ] = "",
    out: Annotated[
        Path, typer.Option(help="Folder for the profiles, or a .json file for a single one.")
    ] = Path(),
    name: Annotated[
        str, typer.Option(help="Name of the profile; default: model, device and number of GPUs.")
    ] = "",
    kv_tokens: Annotated[
        int,
        typer.Option(min=0, help="KV tokens that fit; 0: as the table or the worker says."),
    ] = 0,
    kv_block_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens a KV block; default: 16 for tables, else the engine's."),
    ] = None,
    engine: Annotated[str, typer.Option(help="Measured: the worker's engine.")] = "paged",
    device: Annotated[str, typer.Option(help="Measured: auto, cpu or cuda.")] = "auto",
    torch_threads: Annotated[int, typer.Option(min=0, help="Measured: 0: every core.")] = 0,
    batch_sizes: Annotated[str, typer.Option(help="Measured: N of the grid.")] = "1,2,4,8,16,32",
    lengths: Annotated[
        str, typer.Option(help="Measured: input tokens of the grid.")
    ] = "16,64,128,256,512,1024",
    steps: Annotated[int, typer.Option(min=8, help="Measured: decode steps a batch.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Measured: rounds over the grid.")] = 3,
    seconds: Annotated[
        float, typer.Option(min=0, help="Measured: no new batch is begun after so long.")
    ] = 120.0,
    seed: Annotated[int, typer.Option(help="Of prompts, and of the held-out cells.")] = 0,
) -> None:
    """Write a cost profile for tranche simulate, tranche plan and the engine `simulated`.

    Without --from-table a worker's engine is loaded and measured here; nothing else should run on
    the machine meanwhile. Errors are of cells that the fit did not see.
    """
    console = Console()
    try:
        if from_table is not None:
            tables = _wanted(read_tables(from_table), model, from_table)
            if name and len(tables) > 1:
                raise typer.BadParameter(f"--name is for one table; {from_table} has {len(tables)}")
            for table in tables:
                if looks_like_seconds(table.cells):
                    console.print(
                        f"Warning: {table.model}: half of all decodes take less than "
                        f"{DECODE_S_MIN * 1e3:g} ms. Does latency_ms hold seconds?"
                    )
            made = [
                _fitted(table, from_table, name, kv_tokens, kv_block_tokens or 16, seed)
                for table in tables
            ]
        else:
            plan = Plan(numbers(batch_sizes), numbers(lengths), steps, repeats, seconds, seed)
            loaded = _engine(model, engine, device, torch_threads, kv_tokens)
            try:
                block = kv_block_tokens or loaded.info.kv_block_tokens
                made = [_measured(loaded, plan, name, block, console)]
            finally:
                loaded.close()
    except CalibrationError as error:
        raise SetupError(str(error)) from error
    publish(made, out, console)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be measured."""

    batch_sizes: list[int]
    lengths: list[int]
    steps: int
    repeats: int
    seconds_max: float
    seed: int


def numbers(text: str) -> list[int]:
    """Of a list such as 1,2,4. Raises typer.BadParameter."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is no list of numbers such as 1,2,4") from error
    if not found or found[0] < 1:
        raise typer.BadParameter(f"{text!r}: numbers are at least 1")
    return found


def looks_like_seconds(cells: Iterable[Cell]) -> bool:
    """Whether latencies were given in another unit than milliseconds, to judge by decodes."""
    decodes = [cell.seconds for cell in cells if cell.phase == "decode"]
    return bool(decodes) and median(decodes) < DECODE_S_MIN


def cells_of(runs: Iterable["Measured"]) -> tuple[list[Cell], float]:
    """The cells of measured batches, medians over repeats, and the spread of single steps: standard
    deviation / mean around their cells' times."""
    prefills: dict[Point, list[float]] = defaultdict(list)
    decodes: dict[tuple[Point, int], list[float]] = defaultdict(list)
    for run in runs:
        prefills[run.point].append(run.prefill_s)
        for index, step_s in enumerate(run.decode_s):
            decodes[run.point, index // WINDOW_STEPS].append(step_s)
    cells = [
        Cell(((point.input_tokens, 0),) * point.batch, 0, 0, median(times))
        for point, times in prefills.items()
    ]
    spreads = []
    for (point, window), times in decodes.items():
        context = point.input_tokens + 1 + window * WINDOW_STEPS + (WINDOW_STEPS - 1) / 2
        cells.append(Cell((), point.batch, round(point.batch * context), median(times)))
        spreads.append(pstdev(times) / fmean(times))
    return cells, round(median(spreads), 4)


def publish(made: Sequence[CostProfile], out: Path, console: Console) -> None:
    """Write the profiles and show what they are worth."""
    single = out.suffix == ".json"
    if single and len(made) > 1:
        raise typer.BadParameter(f"--out {out}: there are {len(made)} profiles; give a folder")
    (out.parent if single else out).mkdir(parents=True, exist_ok=True)
    console.print(errors_table(made))
    for profile in made:
        path = out if single else out / f"{profile.name}.json"
        path.write_bytes(profile_json(profile))
        console.print(f"profile: {path}", markup=False, soft_wrap=True)


def errors_table(made: Sequence[CostProfile]) -> Shown:
    """Median / 95th percentile of the relative errors, in percent."""
    shown = Shown(
        title="Held-out errors, %: median/p95; decode: ms of one sequence",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    phases = [
        p for p in ("prefill", "decode", "mixed", "slice") if any(p in m.errors for m in made)
    ]
    for heading in ("profile", "KV", "decode", *phases, "noise", "cells"):
        left = heading == "profile"
        if left:
            shown.add_column(heading, min_width=14, overflow="fold")
        else:
            shown.add_column(heading, justify="right", no_wrap=True)
    for profile in made:
        errors = [profile.errors.get(phase) for phase in phases]
        shown.add_row(
            profile.name,
            str(profile.kv_tokens),
            f"{profile.iteration_s((), 1, 256) * 1e3:.1f}",
            *(f"{e.median * 100:.1f}/{e.p95 * 100:.1f}" if e else "" for e in errors),
            f"{profile.noise_cv * 100:.1f}",
            str(profile.valid["cells"]),
        )
    return shown


def _wanted(tables: list[Table], model: str, path: Path) -> list[Table]:
    wanted = [table for table in tables if not model or table.model == model]
    if not wanted:
        known = ", ".join(dict.fromkeys(table.model for table in tables))
        raise CalibrationError(f"{path} has no model {model}, only {known}")
    return wanted


def _fitted(
    table: Table, path: Path, name: str, kv_tokens: int, block: int, seed: int
) -> CostProfile:
    named = name or "-".join(
        [*f"{table.model} {table.gpu}".lower().replace("/", "-").split()]
        + ([f"tp{table.tp}"] if table.tp > 1 else [])
    )
    capacity = kv_tokens or table.kv_tokens
    if not capacity:
        raise CalibrationError(
            f"{path} has no column kv_capacity_tokens: say how many KV tokens fit by --kv-tokens"
        )
    described = Described(
        name=named,
        model=table.model,
        gpu=table.gpu,
        tp=table.tp,
        kv_tokens=capacity,
        kv_block_tokens=block,
        source=f"tranche calibrate --from-table {path.name}",
    )
    return calibrated(table.within(capacity), described, seed=seed)


def _engine(model: str, engine: str, device: str, torch_threads: int, kv_tokens: int) -> "Engine":
    from services.mesh_settings import DEMO_MODEL
    from services.options import load_settings
    from services.worker.engines.registry import engine_maker
    from services.worker.settings import WorkerSettings

    given = {
        "model": model or str(DEMO_MODEL),
        "engine": engine,
        "device": device,
        "torch_threads": torch_threads,
        "kv_tokens": kv_tokens,
        "batch_size_max": 0,
    }
    return engine_maker(engine)(load_settings(WorkerSettings, given))


def _measured(engine: "Engine", plan: Plan, name: str, block: int, console: Console) -> CostProfile:
    from services.worker.measure import grid, measure

    points = grid(engine, plan.batch_sizes, plan.lengths, plan.steps)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("batches", total=len(points) * plan.repeats)
        runs = list(
            measure(
                engine,
                points,
                steps=plan.steps,
                repeats=plan.repeats,
                seconds_max=plan.seconds_max,
                seed=plan.seed,
                on_run=lambda: progress.advance(task),
            )
        )
        progress.update(task, total=len(runs), completed=len(runs))
    cells, noise_cv = cells_of(runs)
    if noise_cv > NOISE_TOLD:
        console.print(
            f"Equal steps differ by {noise_cv:.0%}: other programs run here. The profile is of a "
            "busy machine; measure again when it is quiet, or with --torch-threads 1."
        )
    info, memory = engine.info, engine.memory()
    model = Path(info.model).name
    return calibrated(
        cells,
        Described(
            name=name or f"{model}-{info.device.replace(':', '')}".lower(),
            model=model,
            gpu=info.device,
            kv_tokens=memory.kv_tokens_capacity,
            kv_block_tokens=block,
            kv_bytes_per_token=memory.kv_bytes_per_token,
            noise_cv=noise_cv,
            source=f"tranche calibrate: engine {info.engine}, {info.details}, {len(runs)} batches",
            notes="The engine's own clock: the worker's shell and the bus are not in it.",
        ),
        seed=plan.seed,
    )
