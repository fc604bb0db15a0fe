"""Variants: a preset with other answers to some questions, as one name: `vllm+offloading=sal-a`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from services.scheduler.core.policies.admission import ADMISSIONS
from services.scheduler.core.policies.balancing import BALANCERS
from services.scheduler.core.policies.batching import BATCHINGS
from services.scheduler.core.policies.gates import GATES
from services.scheduler.core.policies.offloading import OFFLOADINGS
from services.scheduler.core.policies.order import ORDERS
from services.scheduler.core.policies.pacing import LEASE_PACINGS, PACINGS
from services.scheduler.core.policies.queues import QUEUES
from services.scheduler.core.policies.victims import VICTIMS
from services.scheduler.core.settings import did_you_mean
from shared.messages import Form

Answers = Mapping[str, Mapping[str, Any]]
LEASE_BATCHINGS = {"continuous": None, "prefill-first": None}
"""The worker's, not the core's: chunks beside decodes, or prefills alone while there are any."""
BINDINGS = {"late": None, "early": None}
QUESTIONS: Mapping[Form, Answers] = {
    "closed": {
        "order": ORDERS,
        "admission": ADMISSIONS,
        "batching": BATCHINGS,
        "offloading": OFFLOADINGS,
        "pacing": PACINGS,
    },
    "leased": {
        "order": QUEUES,
        "admission": GATES,
        "batching": LEASE_BATCHINGS,
        "offloading": BALANCERS,
        "pacing": LEASE_PACINGS,
        "victim": VICTIMS,
        "binding": BINDINGS,
    },
}


class UnknownAnswer(ValueError):
    """A question that is not asked, or an answer that a preset of this form cannot give."""


@dataclass(frozen=True, slots=True)
class Spelling:
    """A policy's name, taken apart."""

    preset: str
    """As written before the first change; not necessarily one that exists."""
    changes: Mapping[str, str]
    """Question to answer, in the order of the questions."""

    @property
    def name(self) -> str:
        """The same for all ways to write it."""
        return "+".join((self.preset, *(f"{q}={answer}" for q, answer in self.changes.items())))


def spelled(text: str, presets: Iterable[str]) -> Spelling:
    """Take a name apart. A `+` may be part of a preset's own name: the longest one that fits is
    meant. Raises UnknownAnswer."""
    fitting = [name for name in presets if text == name or text.startswith(name + "+")]
    preset = max(fitting, key=len, default=text.partition("+")[0])
    changes: dict[str, str] = {}
    for part in text[len(preset) :].split("+")[1:]:
        question, equals, answer = part.partition("=")
        if not equals:
            raise UnknownAnswer(f"{text!r}: {part!r} is not question=answer")
        if question in changes:
            raise UnknownAnswer(f"{text!r} answers {question} twice")
        changes[question] = answer
    order = list(QUESTIONS["leased"])
    known = sorted(changes, key=lambda q: order.index(q) if q in order else len(order))
    return Spelling(preset, {question: changes[question] for question in known})


def check(spelling: Spelling, form: Form) -> None:
    """Whether a preset of this form can be changed so. Raises UnknownAnswer, naming what can."""
    for question, answer in spelling.changes.items():
        answers = QUESTIONS[form].get(question)
        if answers is None:
            raise UnknownAnswer(
                f"{spelling.name!r}: {_no_such_question(question, form)}; "
                f"questions are {', '.join(QUESTIONS[form])}"
            )
        if answer not in answers:
            raise UnknownAnswer(
                f"{spelling.name!r}: {_no_such_answer(question, answer, form)}; "
                f"known are {', '.join(answers)}"
            )


def _no_such_question(question: str, form: Form) -> str:
    if any(question in answers for answers in QUESTIONS.values()):
        return f"{form} presets are not asked for {question}"
    return f"there is no question {question!r}{did_you_mean(question, QUESTIONS[form])}"


def _no_such_answer(question: str, answer: str, form: Form) -> str:
    others = [other for other in QUESTIONS if answer in QUESTIONS[other].get(question, ())]
    if others:
        return f"{question} {answer!r} is one for {others[0]} presets, and this one is {form}"
    near = did_you_mean(answer, QUESTIONS[form][question])
    return f"no such {question} as {answer!r}{near}"
