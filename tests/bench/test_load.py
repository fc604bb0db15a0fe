"""The load generator against a small scripted server: what it sends and what it measures."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import typer
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from typer.testing import CliRunner

from bench.cli import base_of, bench
from bench.load import LoadOptions, find_model, run_load
from sim.report import Record
from sim.workload import make_workload


class ScriptedServer:
    """Answers as OpenAI's API does: `output` tokens per request, one refusal, one cut stream."""

    def __init__(self, refuse: set[int] = frozenset(), cut: set[int] = frozenset()) -> None:  # type: ignore[assignment]
        self.bodies: list[dict[str, Any]] = []
        self.most_at_once = self._now = 0
        self._refuse, self._cut = refuse, cut

    async def completions(self, request: Request) -> Response:
        body = await request.json()
        if not body.get("stream"):
            words = len(body["prompt"].split())
            return JSONResponse({"usage": {"prompt_tokens": 2 * words + 1}})
        number = len(self.bodies)
        self.bodies.append(body)
        if number in self._refuse:
            return JSONResponse({"error": {"message": "busy"}}, 429)
        return StreamingResponse(self._stream(body, number in self._cut))

    async def _stream(self, body: dict[str, Any], cut: bool) -> AsyncIterator[str]:
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        for index in range(body["max_tokens"]):
            finish = "length" if index == body["max_tokens"] - 1 else None
            choice = {"index": 0, "text": "x", "finish_reason": finish}
            yield f"data: {json.dumps({'choices': [choice]})}\n\n"
            await asyncio.sleep(0)
            if cut:
                break
        self._now -= 1
        if not cut:
            usage = {"prompt_tokens": 7, "completion_tokens": body["max_tokens"]}
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        async def models(_: Request) -> Response:
            return JSONResponse({"data": [{"id": "scripted"}]})

        app = Starlette(
            routes=[
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/models", models),
            ]
        )
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", ws="none"))
        task = asyncio.create_task(server.serve())
        async with asyncio.timeout(10):
            while not server.started:
                await asyncio.sleep(0.01)
        try:
            port = server.servers[0].sockets[0].getsockname()[1]
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            await task


@pytest.fixture
def lengths(tmp_path: Path) -> Path:
    path = tmp_path / "lengths.csv"
    path.write_text("prompt_tokens,output_tokens\n" + "".join(f"41,{n}\n" for n in range(1, 31)))
    return path


async def test_closed_loop_keeps_so_many_under_way(lengths: Path) -> None:
    server, seen = ScriptedServer(), list[Record]()
    async with server.running() as url:
        options = LoadOptions(url=url, model=await find_model(url))
        records = await run_load(make_workload(lengths, clients=3), options, seen.append)
    assert records == seen
    assert sorted(record.output_tokens for record in records) == list(range(1, 31))
    assert {record.outcome for record in records} == {"completed"}
    assert server.most_at_once <= 3
    assert all(body["model"] == "scripted" and body["ignore_eos"] for body in server.bodies)
    assert {len(body["prompt"].split()) for body in server.bodies} == {20}  # 2 a word, 1 more


async def test_open_loop_sends_by_the_clock_until_the_duration(lengths: Path) -> None:
    server = ScriptedServer()
    async with server.running() as url:
        options = LoadOptions(url=url, model="m", duration_s=0.4, lengths="natural", max_tokens=2)
        workload = make_workload(lengths, rate=50, seed=1)
        records = await run_load(workload, options, lambda _: None)
    due = [item.arrival_s for item in workload.items if (item.arrival_s or 0) < 0.4]
    assert len(records) == len(due) < 30
    sent = sorted(record.sent_s for record in records)
    assert all(at >= (wanted or 0) for at, wanted in zip(sent, due, strict=True))
    assert all("ignore_eos" not in body for body in server.bodies)


async def test_refusals_and_cut_streams_are_told_apart(lengths: Path) -> None:
    server = ScriptedServer(refuse={4}, cut={6})
    async with server.running() as url:
        workload = make_workload(lengths, clients=1, limit=10)
        records = await run_load(workload, LoadOptions(url=url, model="m"), lambda _: None)
    assert [record.outcome for record in records].count("completed") == 8
    assert records[4].outcome == "rejected"
    assert records[4].detail.startswith("429")
    assert (records[6].outcome, records[6].output_tokens) == ("failed", 1)
    assert "cut" in records[6].detail


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
def test_the_url_may_be_the_one_of_openai_clients(ending: str) -> None:
    assert base_of(f"http://127.0.0.1:8000{ending}") == "http://127.0.0.1:8000"


def test_a_choice_of_lengths_that_is_none_is_refused_with_the_choices(lengths: Path) -> None:
    app = typer.Typer()
    app.command()(bench)
    told = ["--url", "http://x", "--trace", str(lengths), "--lengths", "half"]
    shown = CliRunner().invoke(app, told)
    assert shown.exit_code == 2
    assert "exact" in shown.output
    assert "natural" in shown.output


async def test_the_command_writes_a_page_and_a_report(tmp_path: Path, lengths: Path) -> None:
    app = typer.Typer()
    app.command()(bench)
    page, report = tmp_path / "page.html", tmp_path / "report.json"
    server = ScriptedServer(refuse={3})
    async with server.running() as url:
        told = ["--url", url, "--trace", str(lengths), "--rate", "200", "--burst", "2"]
        told += ["--policy", "<ours>", "--slo", "ttft=5", "--html", str(page)]
        command = CliRunner().invoke
        shown = await asyncio.to_thread(command, app, [*told, "--json", str(report)])
    assert shown.exit_code == 0, shown.output
    assert json.loads(report.read_text())["completed"] == 29
    text = page.read_text(encoding="utf-8")
    assert "&lt;ours&gt;: what its clients saw" in text
    assert "29 / 30" in text
    assert "Time to first token (TTFT), seconds" in text
    assert "Inside the workers" not in text
