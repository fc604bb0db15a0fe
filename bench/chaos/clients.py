"""The clients: streams as a client library reads them, with the time of every piece.

A fixed number of clients each ask, read to the end, think, and ask again. Refusals (429, 503, a
gateway that is not there) are obeyed and counted, and the same stream is asked for again: it was
never accepted. What happens to a stream after its answer began is kept for the judge.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx
import msgspec

from bench.chaos.questions import Ask, AskMaker, Question

STALL_S = 150.0
"""A stream that says nothing for so long, keep-alive comments apart, is lost."""
RETRY_MAX_S = 3.0
CONNECT_S = 10.0
CLIENTS = 12

Outcome = Literal["open", "complete", "aborted", "cut", "error", "stalled", "unasked"]


class Stream(msgspec.Struct, kw_only=True):
    """One stream, as its client saw it. Times are monotonic seconds."""

    ask: Ask
    sent_at: float
    outcome: Outcome = "open"
    ended_at: float = 0.0
    detail: str = ""
    answer_id: str = ""
    """The gateway's name for it, as in its logs."""
    ids: list[list[int]] = []
    texts: list[str] = []
    reasons: list[str | None] = []
    arrivals: list[tuple[float, int]] = []
    """When pieces came, and how many tokens they brought."""


@dataclass(slots=True)
class Load:
    """All clients of a run."""

    urls: Mapping[int, str]
    questions: Mapping[str, Question]
    maker: AskMaker
    streams: list[Stream] = field(default_factory=list)
    refusals: Counter[str] = field(default_factory=Counter)
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: list["asyncio.Task[None]"] = field(default_factory=list)

    def start(self) -> None:
        """Begin to ask."""
        self._tasks = [asyncio.create_task(self._client()) for _ in range(CLIENTS)]

    async def stop(self, patience_s: float) -> None:
        """No new streams; those under way may end. What does not is left open."""
        self.stopping.set()
        _, late = await asyncio.wait(self._tasks, timeout=patience_s)
        for task in late:
            task.cancel()
        for result in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result

    def counts(self) -> Counter[str]:
        """Outcomes so far."""
        return Counter(stream.outcome for stream in self.streams)

    async def _client(self) -> None:
        while not self.stopping.is_set():
            ask = self.maker.next()
            with suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), ask.think_s)
                return
            await self.until_accepted(ask)

    async def until_accepted(self, ask: Ask) -> None:
        """A refused stream is asked for again, of a killed gateway's at the other one."""
        gateway = ask.gateway
        while not self.stopping.is_set():
            wait_s = await self._ask(msgspec.structs.replace(ask, gateway=gateway))
            if wait_s is None:
                return
            if ask.gateway != 1:
                gateway = 3 - gateway
            with suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), min(wait_s, RETRY_MAX_S))

    async def _ask(self, ask: Ask) -> float | None:
        """None: there was an answer. Otherwise it was refused; when to come again."""
        question = self.questions[ask.question]
        stream = Stream(
            ask=ask,
            sent_at=_now(),
            ids=[[] for _ in range(question.choices)],
            texts=[""] * question.choices,
            reasons=[None] * question.choices,
        )
        timeout = httpx.Timeout(STALL_S, connect=CONNECT_S)
        async with httpx.AsyncClient(base_url=self.urls[ask.gateway], timeout=timeout) as client:
            self.streams.append(stream)
            try:
                wait_s = await self._read(client, stream, question)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                wait_s = self._refuse("no gateway", 0.5)
            except TimeoutError:
                stream.outcome, stream.detail = "stalled", f"nothing for {STALL_S:g} s"
            except httpx.HTTPError as error:
                stream.outcome, stream.detail = "cut", f"{type(error).__name__}: {error}"
            else:
                if wait_s is None and stream.outcome == "open":
                    stream.outcome, stream.detail = "cut", "it ended without [DONE]"
            if stream.outcome == "open":
                self.streams.remove(stream)
                return wait_s
            stream.ended_at = _now()
            return None

    def _refuse(self, why: str, wait_s: float) -> float:
        self.refusals[why] += 1
        return wait_s

    async def _read(
        self, client: httpx.AsyncClient, stream: Stream, question: Question
    ) -> float | None:
        ask = stream.ask
        body = question.body(ask.max_tokens, stream=True)
        async with client.stream("POST", question.path, json=body) as response:
            if response.status_code in (429, 503):
                said = (await response.aread()).decode(errors="replace")
                code = _code(said)
                wait = response.headers.get("retry-after", "1")
                return self._refuse(f"{response.status_code} {code}", float(wait))
            if response.status_code != httpx.codes.OK:
                said = (await response.aread()).decode(errors="replace")
                stream.outcome, stream.detail = "error", f"{response.status_code} {said[:200]}"
                return None
            lines = response.aiter_lines().__aiter__()
            heard_at = _now()
            while stream.outcome == "open":
                async with asyncio.timeout(max(0.1, heard_at + STALL_S - _now())):
                    line = await anext(lines, None)
                if line is None:
                    return None
                if line.startswith("data:"):
                    heard_at = _now()
                    self._take(stream, line[5:].strip())
                if ask.read_pause_s and stream.outcome == "open" and line:
                    await asyncio.sleep(ask.read_pause_s * 0.2)
        return None

    def _take(self, stream: Stream, data: str) -> None:
        if data == "[DONE]":
            if stream.outcome == "open":
                stream.outcome = "complete"
            return
        event = json.loads(data)
        if "error" in event:
            stream.outcome, stream.detail = "error", json.dumps(event["error"])[:200]
            return
        stream.answer_id = event.get("id", "")
        tokens = sum(_join(stream, choice) for choice in event.get("choices", ()))
        if tokens:
            stream.arrivals.append((_now(), tokens))
        total = sum(map(len, stream.ids))
        if stream.ask.style == "abort" and total >= stream.ask.abort_after:
            stream.outcome = "aborted"


def _join(stream: Stream, choice: dict[str, Any]) -> int:
    """One choice's piece; how many tokens it has."""
    index = choice["index"]
    ids = choice.get("token_ids") or []
    text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
    if stream.reasons[index] is not None and (ids or text):
        stream.detail = f"choice {index} goes on after its end"
        stream.outcome = "error"
    stream.ids[index] += ids
    stream.texts[index] += text
    if choice.get("finish_reason"):
        stream.reasons[index] = choice["finish_reason"]
    return len(ids)


def _code(said: str) -> str:
    with suppress(json.JSONDecodeError, AttributeError, KeyError, TypeError):
        return str(json.loads(said)["error"]["message"])[:60]
    return said[:60]


def _now() -> float:
    return asyncio.get_running_loop().time()
