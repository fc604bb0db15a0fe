"""One seed: mesh up, references, storm under load, calm, and the judgement."""

import asyncio
import platform
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import httpx
import msgspec
import psutil  # type: ignore[import-untyped]

from bench.chaos.clients import CLIENTS, Load, Stream
from bench.chaos.judge import Finding, Verdict, finding, judge, recoveries, token_s
from bench.chaos.processes import KV_TOKENS, SLICE_TOKENS, Processes
from bench.chaos.questions import (
    TOKENS_MAX,
    Answer,
    Question,
    References,
    asks,
    check_end,
    pool,
    tokenizer,
    verify,
)
from bench.chaos.report import Run, late
from bench.chaos.schedule import schedule
from bench.chaos.storm import Storm
from bench.mesh import MeshNotReady
from shared.messages import Sampling
from tests.rabbitmq import Broker
from tests.worker.reference import Agreement, Reference

START_S = 420.0
SETTLE_S = 120.0
"""After the storm: until everybody is back, and until every stream has ended."""
CALM_ASKS = 6
CALM_S = 120.0
TELL_S = 10.0
Answers = dict[str, tuple[Answer, ...]]
Tell = Callable[[str], None]


class Oracle:
    """Plain transformers, loaded when it is first needed."""

    def __init__(self, folder: Path) -> None:
        self._model = folder
        self._reference: Reference | None = None

    def get(self) -> Reference:
        """In float32, one thread."""
        if self._reference is None:
            import torch

            torch.set_num_threads(1)
            self._reference = Reference(self._model)
        return self._reference


async def run_seed(seed: int, seconds: float, folder: Path, oracle: Oracle, tell: Tell) -> Run:
    """Raises MeshNotReady, BrokerFailed, AssertionError (the calm mesh's text is wrong)."""
    questions = {question.key: question for question in pool()}
    processes = Processes(folder, seed)
    try:
        await processes.start()
        if not await processes.until_ready(START_S, at_start=True):
            down = [s.name for s in processes.services.values() if not s.up]
            said = "; ".join(processes.findings) or f"not ready within {START_S:g} s"
            raise MeshNotReady(f"{said}: {', '.join(down)}; see {folder}")
        tell("the mesh is ready")
        answers = await _references(processes, tuple(questions.values()), oracle, folder, tell)
        await processes.with_broker(Broker.wait_until_written)
        return await _storm(seed, seconds, processes, questions, answers, oracle, tell)
    finally:
        await processes.stop()


async def _storm(
    seed: int,
    seconds: float,
    processes: Processes,
    questions: Mapping[str, Question],
    answers: Answers,
    oracle: Oracle,
    tell: Tell,
) -> Run:
    urls = {number: processes.services[f"gateway-{number}"].url for number in (1, 2)}
    load = Load(urls, questions, asks(seed, tuple(questions.values())))
    faults = schedule(seed, seconds)
    loop = asyncio.get_running_loop()
    began = loop.time()

    def say(text: str) -> None:
        counts = load.counts()
        ended = sum(counts.values()) - counts["open"]
        tell(f"{loop.time() - began:6.1f} s  open {counts['open']:3}, ended {ended:4}  {text}")

    storm = Storm(processes, say)
    load.start()
    telling = asyncio.create_task(_tell_now_and_then(say))
    try:
        await storm.run(faults)
        await asyncio.sleep(max(0.0, began + seconds - loop.time()))
        await storm.calm()
        say("the storm is over")
        back = await processes.until_ready(SETTLE_S)
        await load.stop(SETTLE_S)
        say("the streams are over")
    finally:
        telling.cancel()
    left = await _leftovers(processes)
    await processes.stop()
    what = [] if back else [f"not everybody came back within {SETTLE_S:g} s"]
    what += [*left, *processes.findings, *_history(processes.database)]
    what += bad_lines(processes.folder)
    (processes.folder / "streams.json").write_bytes(msgspec.json.encode(load.streams))
    verdict = judge(load.streams, storm.done, questions, answers, decode)
    agreement = await asyncio.to_thread(_compare_unlike, verdict, storm, questions, oracle)
    slice_s = SLICE_TOKENS * token_s(load.streams)
    felt = recoveries(load.streams, storm.done, slice_s)
    for done in storm.done:
        done.at, done.until = round(done.at - began, 3), round(done.until - began, 3)
    return Run(
        seed=seed,
        seconds=seconds,
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=f"{psutil.cpu_count()} cores, {len(psutil.Process().cpu_affinity())} of them used, "
        f"{platform.machine()}",
        settings={"clients": CLIENTS, "slice_tokens": SLICE_TOKENS, "kv_tokens": KV_TOKENS},
        schedule=faults,
        done=storm.done,
        outcomes=dict(verdict.counts),
        refusals=dict(load.refusals),
        tokens=verdict.tokens,
        ties=agreement.ties,
        token_s=round(token_s(load.streams), 4),
        slice_s=round(slice_s, 3),
        recoveries=felt,
        findings=[*verdict.findings, *(Finding(what=text) for text in what)],
        late=late(felt),
        logs=str(processes.folder),
    )


async def _tell_now_and_then(say: Tell) -> None:
    while True:
        await asyncio.sleep(TELL_S)
        say("")


def decode(ids: Sequence[int]) -> str:
    """As the model's own tokenizer does."""
    text: str = tokenizer().decode(list(ids), skip_special_tokens=True)
    return text


# ---------------------------------------------------------------------------------- references


async def _references(
    processes: Processes,
    questions: Sequence[Question],
    oracle: Oracle,
    folder: Path,
    tell: Tell,
) -> Answers:
    """Of an earlier run, or of this calm mesh, checked."""
    kept = References(folder.parent, questions)
    found = kept.load()
    if found is None:
        tell(f"asking the calm mesh {len(questions)} questions")
        found = await _ask_calmly(processes.services["gateway-1"].url, questions)
        tell("checking every token with plain transformers")
        agreement = await asyncio.to_thread(verify, questions, found, oracle.get())
        kept.save(found)
        tell(f"{agreement.tokens} reference tokens are right, {agreement.ties} near ties")
    return found


async def _ask_calmly(url: str, questions: Sequence[Question]) -> Answers:
    slots = asyncio.Semaphore(CALM_ASKS)
    async with httpx.AsyncClient(base_url=url, timeout=CALM_S) as client:

        async def ask(question: Question) -> tuple[Answer, ...]:
            async with slots:
                body = question.body(TOKENS_MAX, stream=False)
                answer = await client.post(question.path, json=body)
            if answer.status_code != httpx.codes.OK:
                raise MeshNotReady(f"the calm mesh said {answer.status_code}: {answer.text[:300]}")
            choices = sorted(answer.json()["choices"], key=lambda choice: choice["index"])
            return tuple(
                Answer(ids=tuple(c["token_ids"]), ended=c["finish_reason"] == "stop")
                for c in choices
            )

        async with asyncio.TaskGroup() as group:
            tasks = {q.key: group.create_task(ask(q)) for q in questions}
    return {key: task.result() for key, task in tasks.items()}


def _compare_unlike(
    verdict: Verdict, storm: Storm, questions: Mapping[str, Question], oracle: Oracle
) -> Agreement:
    """Streams that differ from the reference: by near ties, or wrong."""
    agreement = Agreement()
    for stream, choice in verdict.unlike:
        question = questions[stream.ask.question]
        try:
            _compare_one(stream, choice, question, oracle.get(), agreement)
        except AssertionError as error:
            what = f"choice {choice}: {error}"
            verdict.findings.append(finding(stream, what, storm.done))
    agreement.tokens = verdict.tokens
    try:
        agreement.check()
    except AssertionError:
        verdict.findings.append(Finding(what=f"too many near ties: {agreement}"))
    return agreement


def _compare_one(
    stream: Stream, choice: int, question: Question, reference: Reference, into: Agreement
) -> None:
    ids = stream.ids[choice]
    sampling = Sampling(seed=question.seed, temperature=question.temperature)
    reference.compare_sampled(question.prompt, ids, sampling, into, choice)
    if stream.outcome == "complete":
        stopped = stream.reasons[choice] == "stop"
        check_end(question, ids, stopped, stream.ask.max_tokens, reference.end_ids)
        assert stream.texts[choice] == decode(ids), "the ids are right, their text is not"


# ---------------------------------------------------------------------------------- leftovers


async def _leftovers(processes: Processes) -> list[str]:
    """What a mesh without requests must not have: open ones, and dead letters."""
    found = []
    async with httpx.AsyncClient(timeout=5.0) as client:
        for name, metric in (
            *((f"gateway-{number}", "tranche_gateway_open_requests") for number in (1, 2)),
            *((f"scheduler-{n}", m) for n in (1, 2) for m in _SCHEDULER_GAUGES),
        ):
            value = await _until_zero(client, processes.services[name].url, metric)
            if value:
                found.append(f"{name} still counts {value:g} as {metric}")
    path = "/api/queues/%2F/tranche.dead?columns=messages"
    dead = await processes.with_broker(lambda broker: broker.management.call("GET", path))
    count = dead.get("messages", 0) if isinstance(dead, dict) else 0
    return found + ([f"{count} dead letters"] if count else [])


_SCHEDULER_GAUGES = ("tranche_waiting_requests", "tranche_running_requests")
ZERO_S = 8.0
"""Gauges of the scheduler move with its beats."""


async def _until_zero(client: httpx.AsyncClient, url: str, metric: str) -> float:
    """Its value once it is 0, or at the end of the patience."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + ZERO_S
    while True:
        try:
            lines = (await client.get(f"{url}/metrics")).text.splitlines()
        except httpx.HTTPError:
            return float("nan")
        value = sum(
            float(line.split()[-1])
            for line in lines
            if line.partition(" ")[0].partition("{")[0] == metric
        )
        if not value or loop.time() > deadline:
            return value
        await asyncio.sleep(0.5)


BAD_EVENTS = ("core_failed", "handler_failed", "undecodable", "Traceback")
"""What no fault excuses: our own code failed, and nothing may have been lost by luck only."""


def bad_lines(folder: Path) -> list[str]:
    """How often each log has one, and the first."""
    found = []
    for log in sorted(folder.glob("*.log")):
        lines = log.read_text(errors="replace").splitlines()
        bad = [line for line in lines if any(event in line for event in BAD_EVENTS)]
        if bad:
            found.append(f"{len(bad)} bad lines in {log}, the first: {bad[0][-300:]}")
    return found


def _history(database: Path) -> list[str]:
    """Whether the estimator's file is sound."""
    if not database.exists():
        return ["the estimator has no history"]
    moved = list(database.parent.glob(f"{database.name}.corrupt*"))
    with closing(sqlite3.connect(database)) as connection:
        (said,) = connection.execute("PRAGMA integrity_check").fetchone()
        (rows,) = connection.execute("SELECT count(*) FROM finished").fetchone()
    found = [] if said == "ok" and not moved else [f"the history is damaged: {said} {moved}"]
    return found if rows else [*found, "the history is empty"]


def save(runs: Sequence[Run], file: Path) -> None:
    """As JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(msgspec.json.format(msgspec.json.encode(list(runs)), indent=1) + b"\n")
