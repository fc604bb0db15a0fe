"""Many requests at once to a live mesh, by token ids, for tests that compare texts."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

AT_ONCE_MAX = 64
TIMEOUT_S = 90.0


@dataclass(frozen=True)
class Question:
    """A prompt as token ids, and how to answer it."""

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    choices: int = 1


def ask_all(url: str, questions: Sequence[Question]) -> list[list[list[int]]]:
    """For each question the token ids of each choice, the ending token counted."""
    return asyncio.run(_ask_all(url, questions))


async def _ask_all(url: str, questions: Sequence[Question]) -> list[list[list[int]]]:
    slots = asyncio.Semaphore(AT_ONCE_MAX)
    limits = httpx.Limits(max_connections=AT_ONCE_MAX)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits) as client:

        async def ask(question: Question) -> list[list[int]]:
            async with slots:
                answer = await client.post("/v1/completions", json=_body(question))
            assert answer.status_code == 200, answer.text
            found = sorted(answer.json()["choices"], key=lambda choice: choice["index"])
            assert len(found) == question.choices
            return [choice["token_ids"] for choice in found]

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(ask(question)) for question in questions]
        return [task.result() for task in tasks]


def _body(question: Question) -> dict[str, Any]:
    return {
        "model": "demo_model",
        "prompt": list(question.prompt),
        "max_tokens": question.max_tokens,
        "temperature": question.temperature,
        "seed": question.seed,
        "n": question.choices,
        "return_token_ids": True,
    }
