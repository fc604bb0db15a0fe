"""Lengths of outputs in refusals: what is known of them, and how better is known in time."""

from itertools import pairwise

import pytest

from services.scheduler.core.exploring import FIRST_S, LEAST_S, MOST_S, REFUSED_LEAST, Explorer
from shared.messages import (
    Accepted,
    Cancel,
    Rejected,
    Sampling,
    Stopped,
)
from tests.core.test_after_bursts import Mesh
from tests.core.test_foretelling import forecast_of

LONG, SHORT = 800, 5
WITHIN_MS = 200
"""Enough for a short one; a long one takes 0.8 s."""


@pytest.fixture
def mesh() -> Mesh:
    """Its outputs were all long, and one more of them is always running."""
    mesh = Mesh()
    for _ in range(40):
        mesh.serve(1, LONG)
    mesh.ask(max_tokens=LONG)
    return mesh


def ask(mesh: Mesh, **changes: object) -> Accepted | Rejected:
    """A client that knows better: its outputs are short."""
    answer = mesh.ask(max_tokens=LONG, deadline_ms=WITHIN_MS, **changes)
    if isinstance(answer, Accepted):
        mesh.pass_s(0.03)
        mesh.say(Stopped(gateway="g1", request_id=answer.request_id, output_tokens=SHORT))
    return answer


def test_one_is_let_in_from_time_to_time_and_sooner_while_it_goes_well() -> None:
    explorer = Explorer()
    assert not explorer.may(5.0), "the first one that is refused"
    assert not explorer.may(5.0 + FIRST_S), "where few ask, few are let in"
    assert [explorer.may(5.0 + FIRST_S) for _ in range(REFUSED_LEAST)][-1]
    explorer.takes("a", 15.0)
    assert not explorer.may(15.0 + FIRST_S), "one is under way"
    explorer.ended("b", kept=False)
    explorer.ended("a", kept=True)
    assert explorer.every_s == FIRST_S / 2
    for number in range(20):
        explorer.takes(str(number), 100.0)
        explorer.ended(str(number), kept=True)
    assert explorer.every_s == LEAST_S
    for number in range(20):
        explorer.takes(str(number), 100.0)
        explorer.ended(str(number), kept=False)
    assert explorer.every_s == MOST_S
    explorer.takes("lost", 200.0)
    later = 200.0 + MOST_S
    assert any(explorer.may(later) for _ in range(9)), "who is not heard of again stops nobody"


def test_short_outputs_are_not_locked_out_by_long_ones(mesh: Mesh) -> None:
    first = ask(mesh)
    assert isinstance(first, Rejected)
    assert first.retry_after_s is None, "an empty mesh would refuse it too"
    answers = []
    for _ in range(300):
        mesh.pass_s(0.25)
        answers.append(ask(mesh))
    assert not any(isinstance(answer, Accepted) for answer in answers[: int(FIRST_S * 3.5)])
    assert all(isinstance(answer, Accepted) for answer in answers[-20:]), "that is known now"


def test_who_names_no_limit_finds_nothing_out() -> None:
    """An idle mesh takes it in anyway."""
    mesh = Mesh()
    for _ in range(6):
        mesh.pass_s(6.0)
        mesh.serve(1, LONG)
    assert mesh.core.books.explorer == Explorer()


def test_long_ones_find_out_little(mesh: Mesh) -> None:
    """Where refusals are right few are let in, and ever fewer."""
    accepted = []
    for _ in range(280):
        mesh.pass_s(0.5)
        answer = mesh.ask(max_tokens=LONG, deadline_ms=WITHIN_MS)
        if isinstance(answer, Accepted):
            accepted.append(mesh.now)
            mesh.pass_s(WITHIN_MS / 1_000)
            mesh.say(Cancel(gateway="g1", request_id=answer.request_id, output_tokens=170))
    assert 2 <= len(accepted) <= 6
    gaps = [later - sooner for sooner, later in pairwise(accepted)]
    assert gaps == sorted(gaps)


@pytest.mark.parametrize("known", [{"ignore_eos": True}, {"min_tokens": 700}])
def test_whose_length_is_known_is_not_let_in_to_find_out(
    mesh: Mesh, known: dict[str, object]
) -> None:
    for _ in range(100):
        mesh.pass_s(0.5)
        answer = mesh.ask(
            max_tokens=LONG,
            deadline_ms=WITHIN_MS,
            sampling=Sampling(**known),  # type: ignore[arg-type]
        )
        assert isinstance(answer, Rejected)


def test_what_the_client_says_of_its_length_counts() -> None:
    mesh = Mesh()
    for _ in range(20):
        mesh.serve(1, SHORT)
    usual = mesh.ask(max_tokens=LONG)
    assert (usual.output_tokens, usual.finish_s < 0.2) == (SHORT, True)
    for sampling in (Sampling(ignore_eos=True), Sampling(min_tokens=LONG)):
        answer = mesh.ask(max_tokens=LONG, sampling=sampling)
        assert answer.output_tokens == LONG
        assert answer.finish_s > 0.7
        late = mesh.ask(max_tokens=LONG, sampling=sampling, deadline_ms=WITHIN_MS)
        assert isinstance(late, Rejected)


def test_a_least_length_is_no_more_than_that() -> None:
    mesh = Mesh()
    usual = mesh.ask(max_tokens=LONG)
    assert mesh.ask(max_tokens=LONG, sampling=Sampling(min_tokens=1)).output_tokens == (
        usual.output_tokens
    )


def test_strings_that_end_an_output_are_heeded() -> None:
    """Only its gateway knows them."""
    mesh = Mesh()
    for _ in range(20):
        mesh.serve(1, SHORT)
    endless = Sampling(ignore_eos=True)
    answer = mesh.ask(max_tokens=LONG, sampling=endless, stop_strings=True, deadline_ms=WITHIN_MS)
    assert isinstance(answer, Accepted)


def test_predictions_count_where_they_told_something() -> None:
    mesh = Mesh()
    for _ in range(20):
        mesh.serve(1, SHORT)
    mesh.say(forecast_of(SHORT, LONG))
    told = [
        mesh.ask(max_tokens=LONG, predicted_output_tokens=length).output_tokens
        for length in (SHORT, LONG)
    ]
    assert told == pytest.approx([SHORT, LONG], rel=0.5)


def test_who_is_given_up_at_its_deadline_teaches_that_outputs_are_longer() -> None:
    """Nothing else ends: so nothing else could tell."""
    mesh = Mesh()
    refused = 0
    for _ in range(30):
        mesh.pass_s(0.1)
        answer = mesh.ask(max_tokens=LONG, deadline_ms=100)
        if isinstance(answer, Rejected):
            refused += 1
            continue
        mesh.pass_s(0.1)
        mesh.say(Cancel(gateway="g1", request_id=answer.request_id, output_tokens=90))
    assert refused >= 15
