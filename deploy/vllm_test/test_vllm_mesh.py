"""Whole meshes whose workers run the engine `vllm`: real services, the demo model, real HTTP."""

import numpy as np
import pytest

from services.mesh_settings import DEMO_MODEL
from shared.messages import Sampling
from tests.e2e.asking import Question, ask_all
from tests.e2e.live_mesh import live_mesh
from tests.worker.reference import Agreement, Reference

FIRST_ID, LAST_ID = 300, 1000
"""Ids that are words or parts of them in the demo model's vocabulary."""


def questions(number: int) -> list[Question]:
    """Prompts of mixed length, half of them greedy, half sampled in two choices."""
    chance = np.random.default_rng(7)
    return [
        Question(
            tuple(chance.integers(FIRST_ID, LAST_ID, size=chance.integers(1, 120)).tolist()),
            max_tokens=20 + 5 * n,
            temperature=n % 2,
            seed=n,
            choices=1 + n % 2,
        )
        for n in range(number)
    ]


@pytest.mark.parametrize(("workers", "slice_tokens"), [(1, 8), (2, 16), (1, 512)])
def test_text_is_the_same_through_the_whole_mesh(workers: int, slice_tokens: int) -> None:
    asked, reference, agreement = questions(16), Reference(DEMO_MODEL), Agreement()
    with live_mesh(engine="vllm", workers=workers, slice_tokens=slice_tokens) as mesh:
        answers = ask_all(mesh.url, asked)
    for question, texts in zip(asked, answers, strict=True):
        for choice, output in enumerate(texts):
            if question.temperature:
                sampling = Sampling(seed=question.seed)
                reference.compare_sampled(question.prompt, output, sampling, agreement, choice)
            else:
                reference.compare_greedy(question.prompt, output, question.max_tokens, agreement)
    agreement.check()
    assert agreement.tokens > 500
