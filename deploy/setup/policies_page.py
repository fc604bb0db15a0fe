"""docs/policies.md, made from the presets, the policies' own words, and the constants."""

import ast
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import partial
from inspect import getdoc
from itertools import pairwise
from pathlib import Path
from typing import Any

from deploy.setup import policies_figures
from services.scheduler.core import settings
from services.scheduler.core.policies.admission import ADMISSIONS
from services.scheduler.core.policies.balancing import BALANCERS
from services.scheduler.core.policies.batching import BATCHINGS
from services.scheduler.core.policies.gates import GATES
from services.scheduler.core.policies.offloading import OFFLOADINGS
from services.scheduler.core.policies.order import ORDERS
from services.scheduler.core.policies.pacing import LEASE_PACINGS, PACINGS
from services.scheduler.core.policies.queues import QUEUES
from services.scheduler.core.policies.victims import VICTIMS
from services.scheduler.core.presets import PRESETS, Preset
from services.scheduler.core.settings import Constants

HEAD = """# Policies

Made from the code by `make docs`: the table of presets (`services/scheduler/core/presets.py`), the
policies' own words (`services/scheduler/core/policies/`) and the constants
(`services/scheduler/core/settings.py`).

A policy answers five questions: in what **order** those who wait are served, whether a request is
**admitted** as far as memory and its future go, who is **batched** together, which worker gets it
(**offloading**), and how long a slice is and when the next round comes (**pacing**). A preset is a
row of answers; nothing in the scheduler asks for a preset by name.

Wherever a policy is named (`--policy`, settings, journals) a preset may be varied:
`NAME+question=answer[+question=answer...]`, such as `vllm+offloading=sal-a+binding=late`: all of
`vllm`, its constants too, but for who gets a request and when. Questions are order, admission,
batching, offloading and pacing; for leased presets also victim and binding (`late`, `early`).
Answers are those of the tables below, of the preset's own form. `sal+larry` is a preset's name.

Two forms of running a slice. `closed`: a padded batch that starts and ends together, as in SLS and
SCLS. `leased`: each request has a lease of so many tokens in a batch that is continuous at
iteration level; its KV stays on the worker between leases, and the next lease comes before the
last is used up. An [engine](engines.md) says which forms it runs (`paged`, `vllm`: leased;
`padded`: closed; `simulated`: both). `tranche serve` picks the engine that goes with a policy, and
the policy that goes with an engine; a pair that does not fit is refused with advice.

Tags: [M] recollected from memory of a source and not confirmed, [R] our reconstruction of what a
source leaves open, [C] read in the named system's code, [A] read in an abstract, [S] from a
simulation of our research notes, [T] Tranche's own choice. How well the presets reproduce their
sources: [reproduction.md](reproduction.md).
"""

QUESTIONS: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
    ("Order, closed", "Sorts the pool before a round.", ORDERS),
    ("Order, leased", "Who is at the head of a line; lower `priority` always first.", QUEUES),
    ("Admission, closed", "How many rows a closed batch may have.", ADMISSIONS),
    (
        "Admission, leased",
        "May the head of the line join the batch on a worker? Beside the gate the credit rule "
        "always holds: the blocks of the first lease must be free.",
        GATES,
    ),
    ("Batching, closed", "Cuts the ordered pool into batches.", BATCHINGS),
    ("Offloading, closed", "Gives batches to workers.", OFFLOADINGS),
    ("Offloading, leased", "Picks a worker for one request.", BALANCERS),
    ("Victims, leased", "Who is parked when the next leases do not fit.", VICTIMS),
)


def page() -> str:
    """The whole document."""
    parts = [HEAD, _presets("closed"), _presets("leased"), _differences()]
    parts += [part for part in (policies_figures.section(),) if part]
    parts.extend(_answers(*question) for question in QUESTIONS)
    parts += [_pacing(), _constants()]
    return "\n".join(parts).rstrip() + "\n"


def _presets(form: str) -> str:
    rows = [row for row in PRESETS.values() if row.form == form]
    closed = form == "closed"
    columns = ["policy", "order", "admission", "batching", "offloading", "pacing"]
    columns += [] if closed else ["binding", "victim"]
    lines = [f"## Presets, {form}", "", _row(columns), "|" + "---|" * len(columns)]
    for preset in rows:
        answers = [f"`{getattr(preset, name)}`" for name in columns[1:6]]
        answers += [] if closed else [preset.binding, f"`{preset.victim}`"]
        lines.append(_row([f"`{preset.name}`", *answers]))
    lines += ["", *(f"- `{preset.name}`: {preset.summary}" for preset in rows)]
    return "\n".join(lines) + "\n"


def _differences() -> str:
    lines = ["Constants in which presets differ from the defaults below:", ""]
    lines += [f"- `{p.name}`: {_values(p)}" for p in PRESETS.values() if p.constants]
    return "\n".join(lines) + "\n"


def _values(preset: Preset) -> str:
    return ", ".join(f"`{name}={value}`" for name, value in preset.constants.items())


def _answers(title: str, text: str, answers: Mapping[str, Any]) -> str:
    lines = [f"## {title}", "", text, "", "| name | rule |", "|---|---|"]
    lines += [_row((f"`{name}`", _words(answer))) for name, answer in answers.items()]
    return "\n".join(lines) + "\n"


def _pacing() -> str:
    lines = ["## Pacing", "", "| name | form | rule |", "|---|---|---|"]
    lines += [
        _row((f"`{name}`", "closed", _words(pacing.next_round_at)))
        for name, pacing in PACINGS.items()
    ]
    lines += [_row((f"`{name}`", "leased", _words(lease))) for name, lease in LEASE_PACINGS.items()]
    return "\n".join(lines) + "\n"


def _words(answer: Callable[..., Any]) -> str:
    """The first paragraph of an answer's docstring, of the scoring rule where that is bound in."""
    bound = answer.args if isinstance(answer, partial) else ()
    source = next((part for part in bound if callable(part) and getdoc(part)), None)
    if source is None:
        source = answer.func if isinstance(answer, partial) else answer
    text = getdoc(source)
    assert text, f"{source} has no docstring"
    return " ".join(text.split("\n\n")[0].split())


def _constants() -> str:
    lines = [
        "## Constants",
        "",
        "Any of them with `--set NAME=VALUE`. The live mesh changes the defaults of a few "
        "([settings.md](settings.md), scheduler).",
        "",
        "| name | default | meaning and source |",
        "|---|---|---|",
    ]
    words = dict(_documented())
    missing = [item.name for item in fields(Constants) if item.name not in words]
    assert not missing, f"constants without words: {missing}"
    lines += [
        _row((f"`{item.name}`", f"`{item.default}`", words[item.name]))
        for item in fields(Constants)
    ]
    return "\n".join(lines) + "\n"


def _documented() -> Iterator[tuple[str, str]]:
    """(constant, the text that follows it in the source)."""
    tree = ast.parse(Path(settings.__file__).read_text(encoding="utf-8"))
    body = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Constants").body
    for item, text in pairwise(body):
        if not (isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)):
            continue
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            yield item.target.id, " ".join(str(text.value.value).split())


def _row(cells: Any) -> str:
    return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"
