"""Predictors of output lengths: found by path, asked in a thread of their own, within a bound."""

import threading
from random import Random

import pytest

from services.estimator.core.tenant_classes import CLASSES_MAX, TenantClasses
from services.estimator.predictor import WAITING_MAX, Asked, PredictorThread, load
from shared import tokens
from shared.config import SetupError
from shared.messages import Finished, PredictionWanted
from tests.estimator.reports import report

PROMPT = tuple(range(100))
WAIT_S = 10.0


def asked(tenant: str = "chat", prompt_tokens: int = 100) -> Asked:
    return Asked("m", "completions", tenant, range(prompt_tokens), 500)


def wanted(request_id: str = "r1") -> PredictionWanted:
    prompt = tokens.pack(PROMPT)
    return PredictionWanted(
        epoch=1, request_id=request_id, model="m", prompt=prompt, max_tokens=500
    )


class Scripted:
    """Says what it is told to, when it may."""

    def __init__(self, says: int | Exception | None = 7) -> None:
        self.says = says
        self.may = threading.Event()
        self.may.set()
        self.asked = threading.Event()
        self.seen: list[Asked] = []
        self.learnt: list[Finished] = []

    def predict(self, asked: Asked) -> int | None:
        self.seen.append(asked)
        self.asked.set()
        assert self.may.wait(WAIT_S)
        if isinstance(self.says, Exception):
            raise self.says
        return self.says

    def learn(self, finished: Finished) -> None:
        self.learnt.append(finished)


class Answers:
    def __init__(self) -> None:
        self.said: list[tuple[str, int]] = []
        self.came = threading.Event()

    def __call__(self, wanted: PredictionWanted, output_tokens: int) -> None:
        self.said.append((wanted.request_id, output_tokens))
        self.came.set()


def test_a_path_names_what_makes_a_predictor() -> None:
    assert isinstance(load("tenant-classes"), TenantClasses)
    assert isinstance(load("tests.estimator.test_predictor:Scripted"), Scripted)


@pytest.mark.parametrize("path", ["nowhere", "no.such.module:Name", "json:loads", "json:nothing"])
def test_a_wrong_path_is_said_with_what_is_wanted(path: str) -> None:
    with pytest.raises(SetupError, match="module:name"):
        load(path)


def test_it_is_asked_and_taught_in_its_own_thread() -> None:
    scripted, answers = Scripted(), Answers()
    thread = PredictorThread(scripted, timeout_s=WAIT_S, answer=answers)
    thread.start()
    thread.learn(report(0, output_tokens=5))
    thread.ask(wanted(), waited_s=0.0)
    assert answers.came.wait(WAIT_S)
    thread.stop()
    assert answers.said == [("r1", 7)]
    assert tuple(scripted.seen[0].prompt) == PROMPT
    assert [finished.request_id for finished in scripted.learnt] == ["r0"]
    assert thread.counts.answered == 1


@pytest.mark.parametrize(("says", "count"), [(None, "unknown"), (ValueError("no"), "failed")])
def test_without_an_answer_nothing_is_sent(says: int | Exception | None, count: str) -> None:
    scripted, answers = Scripted(says), Answers()
    thread = PredictorThread(scripted, timeout_s=WAIT_S, answer=answers)
    thread.start()
    thread.ask(wanted("first"), waited_s=0.0)
    assert scripted.asked.wait(WAIT_S)
    scripted.says = 3  # whoever failed once may answer the next one
    thread.ask(wanted("second"), waited_s=0.0)
    assert answers.came.wait(WAIT_S)
    thread.stop()
    assert [name for name, _ in answers.said] in (["second"], ["first", "second"])
    assert getattr(thread.counts, count) + thread.counts.answered == 2


def test_who_hangs_is_not_asked_any_more_and_late_answers_are_dropped() -> None:
    now = [0.0]
    scripted, answers = Scripted(), Answers()
    thread = PredictorThread(scripted, timeout_s=1.0, answer=answers, clock=lambda: now[0])
    scripted.may.clear()
    thread.start()
    thread.ask(wanted("old"), waited_s=2.0)
    assert thread.counts.late == 1
    thread.ask(wanted("slow"), waited_s=0.0)
    assert scripted.asked.wait(WAIT_S)
    thread.ask(wanted("behind"), waited_s=0.0)
    now[0] = 11.0
    assert thread.hangs
    thread.ask(wanted("refused"), waited_s=0.0)
    assert thread.counts.refused == 1
    scripted.may.set()
    thread.ask(wanted("again"), waited_s=0.0) if not thread.hangs else None
    thread.stop()
    assert "slow" not in dict(answers.said)
    assert "behind" not in dict(answers.said)


def test_the_line_is_bounded() -> None:
    thread = PredictorThread(Scripted(), timeout_s=WAIT_S, answer=Answers())
    for number in range(WAITING_MAX + 5):
        thread.ask(wanted(f"r{number}"), waited_s=0.0)
    assert thread.counts.refused == 5


def test_a_tenants_like_prompts_tell_its_outputs() -> None:
    rng, classes = Random(7), TenantClasses()
    usual = {"chat": 400, "label": 3}
    for number in range(300):
        tenant = rng.choice(list(usual))
        output = max(1, round(usual[tenant] * rng.uniform(0.8, 1.2)))
        classes.learn(report(number, output, model="m", tenant=tenant, prompt_tokens=100))
    assert classes.predict(asked("chat")) == pytest.approx(400, rel=0.1)
    assert classes.predict(asked("label")) == pytest.approx(3, abs=1)
    assert classes.predict(asked("chat", prompt_tokens=900)) is None
    assert classes.predict(asked("unknown")) is None


def test_cancelled_requests_teach_nothing_and_classes_are_bounded() -> None:
    classes = TenantClasses()
    for number in range(50):
        classes.learn(
            report(number, model="m", tenant="chat", prompt_tokens=100, reason="cancelled")
        )
    assert classes.predict(asked("chat")) is None
    for number in range(CLASSES_MAX + 10):
        classes.learn(report(number, tenant=f"t{number}", prompt_tokens=100))
    assert len(classes._classes) == CLASSES_MAX
