"""A comparison's outcome as JSON, as a table on the terminal and as markdown."""

import math
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.table import Table

from bench.peers.cell import Cell
from bench.peers.ratios import Ratio, Row, all_ratios, median_of, owed_rows

COLUMNS = (
    "clients",
    "system",
    "out tok/s",
    "req/s",
    "TTFT p50/p99",
    "TPOT p50/p99",
    "ITL p50/p99",
    "E2E p50/p99",
    "tok/read",
    "errors",
    "RSS MB",
    "cores",
    "foreign",
    "client core",
)


class SystemNote(msgspec.Struct, frozen=True, kw_only=True):
    """One system in the report."""

    name: str
    title: str
    version: str = ""
    settings: str = ""
    ours: bool = False
    missing: str = ""
    """Why it has no cells: not installed, or how it failed."""
    note: str = ""
    restarts: int = 0


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """All of a run."""

    begun: str
    """UTC, ISO 8601."""
    commit: str
    machine: dict[str, str]
    plan: dict[str, str]
    systems: list[SystemNote]
    cells: list[Cell]
    ratios: list[Ratio] = []


def names(comparison: Comparison, *, ours: bool) -> list[str]:
    """Systems with cells, of one side."""
    measured = {cell.system for cell in comparison.cells}
    return [s.name for s in comparison.systems if s.ours is ours and s.name in measured]


def with_ratios(comparison: Comparison) -> Comparison:
    """The same with its ratios worked out."""
    mine, peers = names(comparison, ours=True), names(comparison, ours=False)
    found = all_ratios(comparison.cells, mine, peers)
    return msgspec.structs.replace(comparison, ratios=found)


def owed(comparison: Comparison) -> list[Row]:
    """The lines that have to be shown, for each of ours."""
    peers = names(comparison, ours=False)
    return [
        row
        for mine in names(comparison, ours=True)
        for row in owed_rows(comparison.cells, mine, peers)
    ]


def write(comparison: Comparison, folder: Path, name: str) -> tuple[Path, Path]:
    """`folder`/`name`.json and .md."""
    folder.mkdir(parents=True, exist_ok=True)
    data, page = folder / f"{name}.json", folder / f"{name}.md"
    # NaN has no place in JSON: msgspec writes null.
    data.write_bytes(msgspec.json.format(msgspec.json.encode(comparison), indent=1) + b"\n")
    page.write_text(markdown(comparison), encoding="utf-8")
    return data, page


def cell_rows(comparison: Comparison) -> list[list[str]]:
    """Medians over the rounds, a line for each level and system, in COLUMNS."""
    cells = comparison.cells
    order = [system.name for system in comparison.systems]
    places = sorted({(cell.clients, order.index(cell.system)) for cell in cells})
    return [_row(cells, level, order[place]) for level, place in places]


def tables(comparison: Comparison) -> list[Table]:
    """For the terminal."""
    made = [_table("medians over the rounds; times in ms", COLUMNS, cell_rows(comparison))]
    rows = ratio_rows(comparison.ratios)
    if rows:
        made.append(_table("ours over the peer, round by round", RATIO_COLUMNS, rows))
    owed_lines = [_owed_cells(row) for row in owed(comparison)]
    if owed_lines:
        made.append(_table("what is owed", OWED_COLUMNS, owed_lines))
    return made


RATIO_COLUMNS = ("measure", "clients", "ours", "peer", "median", "interval", "pairs")
OWED_COLUMNS = ("ours", "what", "owed", "median", "interval", "pairs", "met")


def ratio_rows(ratios: Sequence[Ratio]) -> list[list[str]]:
    """A line for each ratio, in RATIO_COLUMNS."""
    return [
        [
            one.measure,
            str(one.clients),
            one.ours,
            one.peer,
            f"{one.median:.2f}",
            _interval(one),
            str(one.pairs),
        ]
        for one in ratios
    ]


def markdown(comparison: Comparison) -> str:
    """A fragment for a document."""
    plan = ", ".join(f"{key} {value}" for key, value in comparison.plan.items())
    machine = ", ".join(f"{key} {value}" for key, value in comparison.machine.items())
    lines = [f"Begun {comparison.begun} at commit {comparison.commit}. {machine}. {plan}.", ""]
    for system in comparison.systems:
        said = [system.title, system.version, system.settings, system.note, system.missing]
        if system.restarts:
            said.append(f"restarted {system.restarts} times")
        lines.append(f"- `{system.name}`: {'; '.join(part for part in said if part)}")
    lines += ["", *_markdown_table(COLUMNS, cell_rows(comparison))]
    rows = ratio_rows(comparison.ratios)
    if rows:
        lines += ["", *_markdown_table(RATIO_COLUMNS, rows)]
    owed_lines = [_owed_cells(row) for row in owed(comparison)]
    if owed_lines:
        lines += ["", *_markdown_table(OWED_COLUMNS, owed_lines)]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[Cell], level: int, system: str) -> list[str]:
    here = [cell for cell in cells if cell.clients == level and cell.system == system]

    def number(name: str) -> str:
        return _short(median_of(here, system, level, lambda cell: float(getattr(cell, name))))

    def pair(name: str) -> str:
        return f"{number(name + '_p50')}/{number(name + '_p99')}"

    def used(name: str) -> float:
        return median_of(here, system, level, lambda cell: float(getattr(cell.usage, name)))

    return [
        str(level),
        system,
        number("output_tps"),
        number("rps"),
        *(pair(name) for name in ("ttft", "tpot", "itl", "e2e")),
        number("tokens_per_read"),
        str(sum(cell.errors for cell in here)),
        f"{used('rss_mb'):.0f}",
        f"{used('server_cores'):.2f}",
        f"{used('foreign_cores'):.2f}",
        f"{used('client_core'):.2f}",
    ]


def _owed_cells(row: Row) -> list[str]:
    sign = ">=" if row.at_least else "<="
    met = "yes" if row.met else "no"
    return [
        row.ratio.ours,
        row.text,
        f"{sign} {row.owed:g}",
        f"{row.ratio.median:.2f}",
        _interval(row.ratio),
        str(row.ratio.pairs),
        met if row.sure else f"{met}, undecided",
    ]


def _interval(ratio: Ratio) -> str:
    return f"{ratio.low:.2f} to {ratio.high:.2f} ({ratio.coverage:.0%})"


def _short(value: float) -> str:
    """Three digits or so."""
    if math.isnan(value):
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        words = column in ("system", "measure", "ours", "peer", "what", "met")
        table.add_column(column, justify="left" if words else "right", no_wrap=not words)
    previous = None
    for row in rows:
        if previous is not None and columns[0] == "clients" and row[0] != previous:
            table.add_section()
        previous = row[0]
        table.add_row(*row)
    return table


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
