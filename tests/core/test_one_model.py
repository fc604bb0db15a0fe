"""A mesh serves one model: that of its first worker. Others are not mixed in, and told so."""

from shared.messages import Rejected, RunSlice
from tests.core.seam import Bench, submit


def refusal(bench: Bench, request_id: str, model: str) -> Rejected:
    (answer,) = bench.say(submit(request_id, model=model))
    assert isinstance(answer, Rejected)
    return answer


def test_a_request_for_another_model_is_refused() -> None:
    bench = Bench()
    bench.join("w1", model="a")
    answer = refusal(bench, "r1", "b")
    assert answer.reason == "unknown_model"
    assert "'a'" in answer.detail
    assert answer.retry_after_s is None


def test_a_worker_with_another_model_gets_no_work_and_the_advice_says_why() -> None:
    bench = Bench()
    bench.join("w1", model="m")
    bench.join("w2", model="other")
    assert "'w2' serves 'other'" in bench.core.advice
    assert list(bench.core.books.workers.active) == ["w1"]
    for number in range(4):
        bench.say(submit(f"r{number}"))
    runs = [command for command in bench.after(0.01) if isinstance(command, RunSlice)]
    assert [run.worker for run in runs] == ["w1"]
    assert len(runs[0].orders) == 4


def test_when_the_model_changes_waiting_requests_of_the_old_one_are_told() -> None:
    bench = Bench()
    assert bench.say(submit("old", model="a")) == []
    assert bench.say(submit("new", model="b")) == []
    (answer, *_) = bench.join("w1", model="b")
    assert isinstance(answer, Rejected)
    assert (answer.request_id, answer.reason) == ("old", "unknown_model")
    (run,) = [c for c in bench.after(0.01) if isinstance(c, RunSlice)]
    assert [order.spec.request_id for order in run.orders] == ["new"]
    assert bench.core.advice == ""
