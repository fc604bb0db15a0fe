"""The simulator's error against reality in docs/simulation.md, from the stored reproduction."""

from pathlib import Path

from sim.known_error import known_error

DOCUMENT = Path(__file__).parents[2] / "docs" / "simulation.md"
BEGIN = "<!-- simulator's error: begin (make docs) -->"
END = "<!-- simulator's error: end -->"


def page() -> str:
    """The whole document, with the present figures between its two marks. Raises ValueError
    without those."""
    before, begin, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{DOCUMENT} has lost its marks {BEGIN} and {END}")
    note = known_error()
    said = f"How far to trust it: {note} ([how it was measured](reproduction.md))."
    return f"{before}{BEGIN}\n{said}\n{END}{after}"
