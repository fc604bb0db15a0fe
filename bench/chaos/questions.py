"""What clients ask, and what the undisturbed answer is.

A question of the pool is asked with many limits: by the keyed sampling (and greedily) a shorter
output is the beginning of a longer one, so one long reference serves all. The references are what
a calm mesh answers, token by token checked against plain transformers in float32 (tests/worker/
reference.py): the greedy ones are what `generate` makes, the sampled ones follow their draws.
"""

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Literal

import msgspec

from tests.worker.reference import Agreement, Reference

MODEL = Path(__file__).parents[2] / "deploy" / "demo_model"
TEXT = MODEL.parent / "demo_text" / "tinyshakespeare.txt"
POOL = 40
POOL_SEED = 11
TOKENS_MAX = 240
"""Of a reference; the model's own end may come sooner, where it counts."""
TOKENS_MIN = 24
"""Of a stream: shorter ones are seldom under way when something happens."""
CHOICES_MAX = 3

Style = Literal["plain", "abort", "slow"]
Endpoint = Literal["completions", "chat"]


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt and its sampling; `limits` come with each stream."""

    key: str
    endpoint: Endpoint
    prompt: tuple[int, ...]
    """As the model sees it."""
    messages: tuple[dict[str, str], ...] = ()
    """Chat only."""
    temperature: float = 0.0
    seed: int = 0
    choices: int = 1
    ignore_eos: bool = False
    """The limit alone ends it. The model is brief, and a fault needs time to meet a stream."""

    def body(self, max_tokens: int, *, stream: bool) -> dict[str, Any]:
        """The request."""
        asked = {"messages": self.messages} if self.messages else {"prompt": self.prompt}
        return {
            "model": MODEL.name,
            **asked,
            "max_tokens": max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "n": self.choices,
            "ignore_eos": self.ignore_eos,
            "stream": stream,
            "return_token_ids": True,
        }

    @property
    def path(self) -> str:
        """Of the request."""
        return "/v1/chat/completions" if self.endpoint == "chat" else "/v1/completions"


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A whole reference of one choice."""

    ids: tuple[int, ...]
    ended: bool
    """The model ended it; otherwise the limit did."""


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """One stream that a client is to have."""

    number: int
    question: str
    max_tokens: int
    gateway: int
    style: Style
    abort_after: int = 0
    """Tokens after which the client goes away."""
    read_pause_s: float = 0.0
    think_s: float = 0.0
    """Before it is asked."""


@cache
def tokenizer() -> Any:
    """The model's own, by transformers."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


def pool() -> tuple[Question, ...]:
    """Every question that clients ask; always the same ones."""
    text, rng = TEXT.read_text(), Random(POOL_SEED)
    return tuple(_question(rng, text, number) for number in range(POOL))


def _question(rng: Random, text: str, number: int) -> Question:
    start, length = rng.randrange(len(text) - 2000), min(700, round(rng.paretovariate(0.8)) * 12)
    passage = text[start : start + length].strip() or "ROMEO:"
    sampled = number % 2 == 1
    choices = 1 + number % CHOICES_MAX if sampled and number % 8 in (1, 5) else 1
    messages: tuple[dict[str, str], ...] = ()
    if number % 3 == 0:
        messages = ({"role": "user", "content": passage},)
        prompt = tokenizer().apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
        )
    else:
        prompt = tokenizer()(passage).input_ids
    return Question(
        key=f"q{number}",
        endpoint="chat" if messages else "completions",
        prompt=tuple(prompt),
        messages=messages,
        temperature=rng.choice((0.7, 1.0)) if sampled else 0.0,
        seed=rng.randrange(1 << 31),
        choices=choices,
        ignore_eos=number % 5 < 3,
    )


def asks(seed: int, questions: Sequence[Question]) -> "AskMaker":
    """The streams of a run: the same for the same seed, as many as are drawn."""
    return AskMaker(Random(f"asks {seed}"), questions)


class AskMaker:
    """Draws the next stream."""

    def __init__(self, rng: Random, questions: Sequence[Question]) -> None:
        self._rng = rng
        self._keys = [question.key for question in questions]
        self._count = 0

    def next(self) -> Ask:
        """One more."""
        rng, number = self._rng, self._count
        self._count += 1
        styles: tuple[Style, ...] = ("plain", "abort", "slow")
        style = rng.choices(styles, (80, 8, 12))[0]
        max_tokens = rng.randint(TOKENS_MIN, TOKENS_MAX)
        return Ask(
            number=number,
            question=rng.choice(self._keys),
            max_tokens=max_tokens,
            gateway=1 if rng.random() < 0.75 else 2,
            style=style,
            abort_after=rng.randint(1, max_tokens - 1) if style == "abort" else 0,
            read_pause_s=rng.uniform(0.1, 0.6) if style == "slow" else 0.0,
            think_s=rng.expovariate(2.0),
        )


def expected(answer: Answer, max_tokens: int) -> tuple[tuple[int, ...], str]:
    """The ids and the finish reason under this limit."""
    if answer.ended and len(answer.ids) <= max_tokens:
        return answer.ids, "stop"
    return answer.ids[:max_tokens], "length"


def verify(
    questions: Sequence[Question], answers: dict[str, tuple[Answer, ...]], reference: Reference
) -> Agreement:
    """Every token of the references is what transformers make. Raises AssertionError."""
    from shared.messages import Sampling

    agreement = Agreement()
    for question in questions:
        for choice, answer in enumerate(answers[question.key]):
            sampling = Sampling(seed=question.seed, temperature=question.temperature)
            reference.compare_sampled(question.prompt, answer.ids, sampling, agreement, choice)
            check_end(question, answer.ids, answer.ended, TOKENS_MAX, reference.end_ids)
    agreement.check()
    return agreement


def check_end(
    question: Question, ids: Sequence[int], stopped: bool, limit: int, end_ids: set[int]
) -> None:
    """A complete output ends where it should. Raises AssertionError."""
    ends = set() if question.ignore_eos else end_ids
    assert not ends & set(ids[:-1]), "it went on after the end"
    assert stopped == (bool(ids) and ids[-1] in ends), "its finish reason is another"
    assert stopped or len(ids) == limit, f"{len(ids)} tokens, and no end"


class References:
    """Kept in a file, since they cost a minute of a core; named by what they depend on."""

    def __init__(self, folder: Path, questions: Sequence[Question]) -> None:
        said = hashlib.sha256(msgspec.json.encode([TOKENS_MAX, *questions]))
        said.update((MODEL / "model.safetensors").read_bytes())
        self._file = folder / f"references-{said.hexdigest()[:16]}.json"

    def load(self) -> dict[str, tuple[Answer, ...]] | None:
        """What an earlier run verified."""
        if not self._file.exists():
            return None
        return msgspec.json.decode(self._file.read_bytes(), type=dict[str, tuple[Answer, ...]])

    def save(self, answers: dict[str, tuple[Answer, ...]]) -> None:
        """For later runs."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_bytes(msgspec.json.encode(answers))
