"""Streaming requests against the gateway of the compose stack, with what each must answer."""

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.progress import Progress
from transformers import AutoTokenizer

from bench.client import stream_request
from deploy.compose_test.stack import ROOT
from sim.report import Record

DEMO_MODEL: Path = ROOT / "deploy" / "demo_model"
REQUEST_LIMIT_S = 300.0
PROMPTS = (
    "ROMEO:\nBut soft, what light",
    "Now is the winter of",
    "HIGGINS:\nThe English have no respect for",
    "First Citizen:\nBefore we proceed any further, hear me speak. You are all resolved",
    "LIZA:\nI ain't done nothing wrong by speaking to the gentleman",
)
OUTPUT_TOKENS = (8, 24, 40, 64)


@dataclass(frozen=True, slots=True)
class Ask:
    """One request and the usage it must report."""

    path: str
    body: dict[str, Any]
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of an ask."""

    ask: Ask
    record: Record

    @property
    def fault(self) -> str:
        """What is wrong with it; empty if nothing is."""
        record, ask = self.record, self.ask
        if record.outcome != "completed":
            return f"{record.outcome}: {record.detail}"
        got = (record.prompt_tokens, record.output_tokens)
        wanted = (ask.prompt_tokens, ask.output_tokens)
        return "" if got == wanted else f"usage {got}, not {wanted}"


def make_asks() -> list[Ask]:
    """Every prompt with every output length, as a completion and as a chat, of known usage."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    asks = []
    for prompt, tokens in itertools.product(PROMPTS, OUTPUT_TOKENS):
        common = {
            "model": "demo",
            "max_tokens": tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        prompt_tokens = len(tokenizer(prompt).input_ids)
        asks.append(Ask("/v1/completions", common | {"prompt": prompt}, prompt_tokens, tokens))
        messages = [{"role": "user", "content": prompt}]
        rendered = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True
        )
        chat_tokens = len(rendered["input_ids"])
        body = common | {"messages": messages}
        asks.append(Ask("/v1/chat/completions", body, chat_tokens, tokens))
    return asks


def client_of(url: str) -> httpx.AsyncClient:
    """A client without a limit on its connections."""
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=url, timeout=REQUEST_LIMIT_S, limits=limits)


async def all_at_once(url: str, asks: Sequence[Ask]) -> list[Answer]:
    """Send all asks at once, with a progress bar."""
    start_s = time.monotonic()
    with Progress() as progress:
        bar = progress.add_task("streams", total=len(asks))

        async def one(client: httpx.AsyncClient, ask: Ask) -> Answer:
            record = await stream_request(client, ask.path, ask.body, start_s)
            progress.advance(bar)
            return Answer(ask, record)

        async with client_of(url) as client:
            return await asyncio.gather(*(one(client, ask) for ask in asks))


class SteadyLoad:
    """`clients` clients that ask again as soon as they are answered, until told to stop."""

    def __init__(self, url: str, asks: Sequence[Ask], clients: int) -> None:
        self.answers: list[Answer] = []
        self._url = url
        self._asks = itertools.cycle(asks)
        self._clients = clients
        self._stop = asyncio.Event()
        self._changed = asyncio.Event()

    def stop(self) -> None:
        """Let every open request end, and start none."""
        self._stop.set()

    async def run(self) -> None:
        """Until `stop`."""
        start_s = time.monotonic()
        async with client_of(self._url) as client, asyncio.TaskGroup() as tasks:
            for _ in range(self._clients):
                tasks.create_task(self._ask_again(client, start_s))

    async def answered(self, more: int) -> None:
        """Wait until so many more answers are there."""
        wanted = len(self.answers) + more
        while len(self.answers) < wanted:
            self._changed.clear()
            await self._changed.wait()

    async def _ask_again(self, client: httpx.AsyncClient, start_s: float) -> None:
        while not self._stop.is_set():
            ask = next(self._asks)
            record = await stream_request(client, ask.path, ask.body, start_s)
            self.answers.append(Answer(ask, record))
            self._changed.set()
