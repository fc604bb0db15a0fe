"""Sends a workload to a live server: open loop by arrival times, or closed loop by clients."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

import httpx

from bench.client import stream_request
from bench.prompts import PromptMaker, fitted
from sim.report import Record
from sim.workload import Item, Workload

CONNECTIONS_MAX = 8192
"""Below the usual limit of open files with some to spare."""
PROBE_WORDS = (20, 120)

Lengths = Literal["exact", "natural"]


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to ask. `exact`: each answer has the recorded length (max_tokens and ignore_eos, which
    tells the server the length); `natural`: the model ends by itself, at `max_tokens` at most."""

    url: str
    model: str
    endpoint: Literal["completions", "chat"] = "completions"
    lengths: Lengths = "exact"
    max_tokens: int = 256
    temperature: float = 1.0
    seed: int = 0
    duration_s: float | None = None
    """No request is sent after this; those under way are waited for."""
    request_timeout_s: float = 600.0
    api_key: str = ""


async def run_load(
    workload: Workload, options: LoadOptions, progress: Callable[[Record], None]
) -> list[Record]:
    """The records of all requests sent, in order of ending. Raises httpx.HTTPError only if the
    server cannot be reached at all."""
    headers = {"authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    async with httpx.AsyncClient(
        base_url=options.url,
        headers=headers,
        timeout=httpx.Timeout(options.request_timeout_s, connect=30),
        limits=httpx.Limits(max_connections=CONNECTIONS_MAX, max_keepalive_connections=256),
    ) as client:
        maker = await _probe(client, options) if _needs_prompts(workload) else PromptMaker()
        run = _Run(client, options, maker, progress)
        if workload.clients is None:
            await run.open_loop(workload.items)
        else:
            await run.closed_loop(workload.items, workload.clients)
    return run.records


async def find_model(url: str, api_key: str = "") -> str:
    """The first model the server names. Raises httpx.HTTPError if it does not answer."""
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=30) as client:
        response = await client.get("/v1/models")
        response.raise_for_status()
        return str(response.json()["data"][0]["id"])


def _needs_prompts(workload: Workload) -> bool:
    return any(item.prompt is None for item in workload.items)


async def _probe(client: httpx.AsyncClient, options: LoadOptions) -> PromptMaker:
    rng, counts = Random(options.seed), []
    for words in PROBE_WORDS:
        body = {
            "model": options.model,
            "prompt": PromptMaker().prompt(words, rng),
            "max_tokens": 1,
        }
        response = await client.post("/v1/completions", json=body)
        response.raise_for_status()
        counts.append((words, int(response.json()["usage"]["prompt_tokens"])))
    return fitted(counts[0], counts[1])


class _Run:
    """One run: its clock, its seeded prompts and its records."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        options: LoadOptions,
        maker: PromptMaker,
        progress: Callable[[Record], None],
    ) -> None:
        self.records: list[Record] = []
        self._client, self._options, self._maker = client, options, maker
        self._progress = progress
        self._start_s = time.monotonic()

    async def open_loop(self, items: tuple[Item, ...]) -> None:
        async with asyncio.TaskGroup() as group:
            for number, item in enumerate(items):
                due_s = item.arrival_s or 0.0
                if self._over(due_s):
                    break
                await asyncio.sleep(max(0.0, due_s - self._now_s()))
                group.create_task(self._send(number, item))

    async def closed_loop(self, items: tuple[Item, ...], clients: int) -> None:
        numbered = iter(enumerate(items))

        async def one_client() -> None:
            for number, item in numbered:
                if self._over(self._now_s()):
                    return
                await self._send(number, item)

        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(one_client())

    def _now_s(self) -> float:
        return time.monotonic() - self._start_s

    def _over(self, at_s: float) -> bool:
        return self._options.duration_s is not None and at_s >= self._options.duration_s

    async def _send(self, number: int, item: Item) -> None:
        chat = self._options.endpoint == "chat"
        path = "/v1/chat/completions" if chat else "/v1/completions"
        body = self._body(number, item, chat)
        record = await stream_request(self._client, path, body, self._start_s)
        self.records.append(record)
        self._progress(record)

    def _body(self, number: int, item: Item, chat: bool) -> dict[str, Any]:
        options = self._options
        seed = options.seed * 1_000_003 + number
        prompt = item.prompt or self._maker.prompt(item.prompt_tokens, Random(seed))
        body: dict[str, Any] = {
            "model": options.model,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": options.temperature,
            "seed": seed % 2**31,
        }
        if chat:
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        if options.lengths == "exact":
            body |= {"max_tokens": item.output_tokens, "ignore_eos": True}
        else:
            body["max_tokens"] = options.max_tokens
        if item.priority:
            body["priority"] = item.priority
        return body
