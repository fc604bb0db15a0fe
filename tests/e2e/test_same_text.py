"""The defining property: sliced, batched, moved text is the text that plain transformers make.

Greedy text is compared with `model.generate` in float32, one prompt at a time. Sampled text is
compared between meshes of different slice lengths, workers and batch mates, and each token with
the draw that its key gives. Both allow for near ties alone (see tests/worker/reference.py).
"""

from collections.abc import Sequence
from random import Random

import pytest
import torch
from transformers import AutoTokenizer

from services.mesh_settings import DEMO_MODEL
from shared.messages import Sampling
from tests.e2e.asking import Question, ask_all
from tests.e2e.live_mesh import live_mesh
from tests.worker.reference import Agreement, Reference

TEXT = DEMO_MODEL.parent / "demo_text" / "tinyshakespeare.txt"
GREEDY_PROMPTS = 200
SAMPLED_PROMPTS = 24
MESHES = [
    pytest.param(bus, workers, slice_tokens, id=f"{bus}-{workers}-workers-slices-of-{slice_tokens}")
    for bus in ("memory", "rabbit")
    for workers in (1, 3)
    for slice_tokens in (8, 32, 128)
]


def prompts(count: int, seed: int) -> list[tuple[int, ...]]:
    """Passages of the plays from 1 to some 300 tokens long."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    text = TEXT.read_text()
    rng, found = Random(seed), list[tuple[int, ...]]()
    while len(found) < count:
        start, length = rng.randrange(len(text) - 2000), round(rng.paretovariate(0.7)) * 4
        found.append(tuple(tokenizer(text[start : start + min(length, 900)]).input_ids))
    return found


@pytest.fixture(scope="module")
def reference() -> Reference:
    torch.set_num_threads(1)  # tests run side by side on few cores
    return Reference(DEMO_MODEL)


@pytest.fixture(scope="module")
def greedy(reference: Reference) -> list[tuple[Question, list[int]]]:
    """Questions with the texts that transformers make; every tenth one crosses a long slice."""
    questions = [
        Question(prompt, 150 if number % 20 == 0 else 12 + number % 30)
        for number, prompt in enumerate(prompts(GREEDY_PROMPTS, seed=1))
    ]
    return [(q, reference.greedy(q.prompt, q.max_tokens)) for q in questions]


@pytest.fixture(scope="module")
def sampled() -> list[Question]:
    """Questions at temperature 1; the last ones want four choices."""
    return [
        Question(prompt, 40, temperature=1.0, seed=number * 7919, choices=4 if number > 17 else 1)
        for number, prompt in enumerate(prompts(SAMPLED_PROMPTS, seed=2))
    ]


@pytest.fixture(scope="module")
def alone(reference: Reference, sampled: Sequence[Question]) -> list[list[list[int]]]:
    """The sampled texts of a mesh that gets one request at a time and never cuts one."""
    with live_mesh(workers=1, slice_tokens=256) as mesh:
        return [ask_all(mesh.url, [question])[0] for question in sampled]


def address_of(bus: str, request: pytest.FixtureRequest) -> str:
    """A fresh virtual host of the real broker, or nothing for the bus in memory."""
    return str(request.getfixturevalue("broker_url")) if bus == "rabbit" else ""


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("bus", "workers", "slice_tokens"), MESHES)
def test_same_text_whatever_the_slices_mates_and_workers(
    bus: str,
    workers: int,
    slice_tokens: int,
    request: pytest.FixtureRequest,
    reference: Reference,
    greedy: list[tuple[Question, list[int]]],
    sampled: list[Question],
    alone: list[list[list[int]]],
) -> None:
    with live_mesh(address_of(bus, request), workers=workers, slice_tokens=slice_tokens) as mesh:
        answers = ask_all(mesh.url, [question for question, _ in greedy] + sampled)
    agreement = Agreement()
    for (question, expected), (output,) in zip(greedy, answers[: len(greedy)], strict=True):
        if output == expected:
            agreement.tokens += len(output)
        else:
            reference.compare_greedy(question.prompt, output, question.max_tokens, agreement)
    for question, expected, texts in zip(sampled, alone, answers[len(greedy) :], strict=True):
        compare_sampled(reference, question, expected, texts, agreement)
    agreement.check()


def compare_sampled(
    reference: Reference,
    question: Question,
    expected: list[list[int]],
    texts: list[list[int]],
    into: Agreement,
) -> None:
    """Same texts as alone, or different from a near tie on."""
    for choice, (first, second) in enumerate(zip(expected, texts, strict=True)):
        if first == second:
            into.tokens += len(second)
            continue
        sampling = Sampling(seed=question.seed)
        reference.compare_sampled(question.prompt, second, sampling, into, choice)


def test_sampled_texts_follow_their_draws_and_choices_differ(
    reference: Reference, sampled: list[Question], alone: list[list[list[int]]]
) -> None:
    agreement = Agreement()
    for question, texts in zip(sampled, alone, strict=True):
        assert len({tuple(text) for text in texts}) == question.choices
        for choice, text in enumerate(texts):
            sampling = Sampling(seed=question.seed)
            reference.compare_sampled(question.prompt, text, sampling, agreement, choice)
    agreement.check()
    assert agreement.tokens > 1000
