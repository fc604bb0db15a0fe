"""The document: docs/reproduction.md from the sections' stored results."""

from collections.abc import Sequence

from sim.known_error import known_error
from sim.reproduction.section import Check, Section, Table

HEAD = """# Reproduction

What the papers and systems that Tranche's policies come from report, beside what our simulator and
the same scheduler core make of it. Made by `make reproduce`; the figures behind it are in
`bench/results/reproduction/`.

Of every value compared with it is said what it is: a **fact** read in a source, a
**reconstruction** of what a source leaves open, a target of **ours**, or **unavailable**. The full
texts of the papers were not at hand: where a source is named, it is what was read of it
(docs/policies.md and the constants' comments say which).
"""
MARKS = {True: "yes", False: "**no**", None: "reported"}


def document(sections: Sequence[Section]) -> str:
    """The whole page as Markdown."""
    parts = [HEAD, f"Simulated figures: {known_error()}.\n", _summary(sections)]
    for section in sections:
        parts.append(f"## {section.title}\n\n{section.text.strip()}\n")
        if section.checks:
            parts.append(_checks(section.checks))
        parts.extend(_table(table) for table in section.tables)
        for caption, name in section.pictures:
            parts.append(f"![{caption}]({name})\n\n*{caption}*\n")
    return "\n".join(parts).rstrip() + "\n"


def _summary(sections: Sequence[Section]) -> str:
    rows = ["| part | statements | hold | do not | reported only |", "|---|---|---|---|---|"]
    for section in sections:
        held = [check.holds for check in section.checks]
        counts = (len(held), held.count(True), held.count(False), held.count(None))
        rows.append(f"| {section.title} | {' | '.join(map(str, counts))} |")
    return "\n".join(rows) + "\n"


def _checks(checks: Sequence[Check]) -> str:
    rows = ["| statement | value compared with | wanted | ours | holds |", "|---|---|---|---|---|"]
    for check in checks:
        claim = check.claim + (f" ({check.why})" if check.why else "")
        cells = (claim, check.source, check.wanted, check.got, MARKS[check.holds])
        rows.append(f"| {' | '.join(map(_cell, cells))} |")
    return "\n".join(rows) + "\n"


def _table(table: Table) -> str:
    rows = [f"**{table.title}**", "", f"| {' | '.join(map(_cell, table.columns))} |"]
    rows.append("|" + "---|" * len(table.columns))
    rows.extend(f"| {' | '.join(map(_cell, row))} |" for row in table.rows)
    if table.note:
        rows += ["", table.note]
    return "\n".join(rows) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
