"""The table of policies in docs/operations.md: the scheduler's presets, in words."""

from pathlib import Path

from services.scheduler.core.presets import PRESETS, Preset

DOCUMENT = Path(__file__).parents[2] / "docs" / "operations.md"
BEGIN = "<!-- policies: begin (make docs) -->"
END = "<!-- policies: end -->"

ORDER = {"fcfs": "by arrival", "by-length": "by input length"}
BATCHING = {
    "fixed": "the next N",
    "sorted": "the oldest, with the N - 1 of most like input length",
    "dp": "any size, the least sum of times (dynamic programming)",
}
OFFLOADING = {
    "round-robin": "the next in turn",
    "max-min": "longest batch first, to the least loaded",
}
PACING = {
    "whole": "none: a batch runs until all have ended",
    "fixed": "slices of S; a batch when a worker is free",
    "ticked": "slices of S; a round every `interval_s`",
    "adaptive": "slices of S; rounds follow the load",
}


def table() -> str:
    """Markdown: a row per preset. Raises KeyError for an answer that has no words here."""
    head = "| policy | order | batching | worker | pacing |\n|---|---|---|---|---|"
    return "\n".join([head, *map(_row, PRESETS.values())])


def page() -> str:
    """The whole document, with a fresh table between its two marks. Raises ValueError without."""
    before, begin, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{DOCUMENT} has lost its marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def _row(preset: Preset) -> str:
    cells = (
        f"`{preset.name}`",
        ORDER[preset.order],
        BATCHING[preset.batching],
        OFFLOADING[preset.offloading],
        PACING[preset.pacing],
    )
    return f"| {' | '.join(cells)} |"
