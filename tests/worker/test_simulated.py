"""What the simulated engine promises beside what every engine does (`tests/worker/conformance`)."""

import threading
import time
from pathlib import Path

import pytest
from msgspec.structs import replace as changed

from services.worker.engines.api import EngineError
from services.worker.engines.simulated_clock import WallClock
from services.worker.engines.simulated_text import LengthsError, load_lengths
from shared.config import SetupError
from shared.messages import Sampling
from tests.worker.conformance.driver import leases, run_all, some_specs
from tests.worker.conformance.subjects import SUBJECTS, Kit
from tests.worker.conftest import TestClock, simulated
from tests.worker.orders import make_batch, make_order, make_spec, run_batch, run_to_end
from tests.worker.tiny_models import END, VOCABULARY

DRAWN = Sampling(temperature=1.0)


def test_closed_and_leased_texts_are_the_same(llama: Path) -> None:
    specs = some_specs(8, 90, DRAWN)
    texts = {}
    for subject in SUBJECTS:
        if subject.name == "simulated":
            made = run_all(Kit(subject), simulated(llama), specs, 13, at_once=3)
            texts[subject.form] = {name: request.ids for name, request in made.items()}
    assert texts["closed"] == texts["leased"]


def test_forms_do_not_run_beside_each_other(llama: Path) -> None:
    engine = simulated(llama)
    first, second = some_specs(2)
    engine.start(leases(make_order(first, 5)))
    with pytest.raises(EngineError, match="leases are held"):
        engine.start(make_batch(make_order(second, 5)))
    engine.cancel("r0")
    while engine.busy:
        engine.step()
    run_batch(engine, make_batch(make_order(second, 5)))


def test_lengths_are_those_of_the_table(llama: Path, tmp_path: Path) -> None:
    table = tmp_path / "lengths.csv"
    table.write_text("prompt_tokens,output_tokens\n5,3\n5,7\n5,400\n")
    engine = simulated(llama, simulated_lengths=str(table))
    cases = {
        "row 0": (changed(DRAWN, seed=0), 0, 3, "stop"),
        "row 1": (changed(DRAWN, seed=4), 0, 7, "stop"),
        "row 2 is cut": (changed(DRAWN, seed=2), 0, 50, "length"),
        "a choice is a row further": (changed(DRAWN, seed=0), 1, 7, "stop"),
        "no end": (changed(DRAWN, seed=0, ignore_eos=True), 0, 50, "length"),
        "not so soon": (changed(DRAWN, seed=0, min_tokens=20), 0, 21, "stop"),
    }
    specs = [
        make_spec(name, max_tokens=50, sampling=sampling, choice=choice)
        for name, (sampling, choice, _, _) in cases.items()
    ]
    made = run_to_end(engine, specs, 16)
    found = {name: (len(request.ids), request.finish_reason) for name, request in made.items()}
    assert found == {name: (tokens, reason) for name, (_, _, tokens, reason) in cases.items()}
    for name, request in made.items():
        ended = cases[name][3] == "stop"
        assert request.ids[-1] == END if ended else END not in request.ids
        assert all(0 <= token < VOCABULARY for token in request.ids)
        assert END not in request.ids[:-1]


def test_a_table_can_be_made_for_a_mean() -> None:
    lengths = load_lengths("mean=200")
    assert sum(lengths) / len(lengths) == pytest.approx(200, rel=0.01)
    assert lengths != tuple(sorted(lengths))
    assert load_lengths("mean=200") == lengths


@pytest.mark.parametrize("source", ["mean=0", "mean=x", "/nowhere.csv", "/nowhere.parquet"])
def test_tables_that_are_none_are_refused(source: str) -> None:
    with pytest.raises(LengthsError, match="simulated_lengths"):
        load_lengths(source)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"profile": "abacus"}, "--profile: no cost profile abacus"),
        ({"kv_tokens": 15}, "less than a block"),
        ({"model": "/nowhere"}, "config.json"),
    ],
)
def test_what_cannot_be_simulated_says_so(
    llama: Path, settings: dict[str, object], complaint: str
) -> None:
    with pytest.raises(SetupError, match=complaint):
        simulated(Path(str(settings.pop("model", llama))), **settings)


def test_logprobs_are_there_where_they_are_wanted(llama: Path) -> None:
    scored = changed(DRAWN, logprobs=2, prompt_logprobs=True)
    specs = [make_spec("with", max_tokens=5, sampling=scored), make_spec("without", max_tokens=5)]
    made = run_to_end(simulated(llama), specs, 2)
    assert len(made["with"].logprobs) == len(made["with"].ids)
    assert len(made["with"].prompt_logprobs) == 3
    assert made["without"].logprobs == []


def test_the_profile_says_how_long_it_takes(llama: Path) -> None:
    """An iteration of a 13 B model on an A100 takes 15 to 40 ms, whatever the machine."""
    clock = TestClock()
    engine = simulated(llama, clock, simulated_noise=0.0)
    (spec,) = some_specs(1, 90, DRAWN)
    engine.start(leases(make_order(spec, 50)))
    while engine.busy:
        engine.step()
    assert 49 * 0.015 < clock.now() < 50 * 0.040


def test_a_waiting_step_can_be_interrupted_from_outside() -> None:
    clock = WallClock(speed=0.001)
    waker = threading.Timer(0.05, clock.interrupt)
    waker.start()
    began = time.monotonic()
    clock.wait_until(clock.now() + 60)
    assert time.monotonic() - began < 30
    waker.join()
