"""What a broker and crashes can do to the tokens, and what clients see of it: nothing, or a clean
error."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from shared.bus.api import Address
from shared.bus.topology import TOKENS
from shared.messages import (
    Cancel,
    FinishAck,
    GatewayBeat,
    Reading,
    Recall,
    Rejected,
    RequestSpec,
    Resume,
    SchedulerBeat,
    Stopped,
    Submit,
    TokenRun,
    TokensWanted,
)
from shared.tokens import pack, unpack
from tests.api.conftest import Stage, staged
from tests.api.fake_mesh import FIRST_BEAT, Plan, Saying, batch, faithful, output_of, runs_of
from tests.api.test_streams import events_of


def twice(spec: RequestSpec) -> list[Saying]:
    return [message for message in faithful(spec) for _ in range(2)]


def backwards(spec: RequestSpec) -> list[Saying]:
    return list(reversed(faithful(spec)))


def overlapping(spec: RequestSpec) -> list[Saying]:
    """Every run begins four tokens early."""
    ids = output_of(spec)
    runs = runs_of(spec, ids)
    return [
        batch(spec, run, *runs_of(spec, ids[: run.position], start=max(0, run.position - 4)))
        for run in runs
    ]


def in_one_message(spec: RequestSpec) -> list[Saying]:
    return [batch(spec, *runs_of(spec, output_of(spec), size=1))]


def late_attempt(spec: RequestSpec) -> list[Saying]:
    """Attempt 1 is recalled half way; it goes on with other tokens, beside attempt 2."""
    ids = output_of(spec)
    half = len(ids) // 2
    before = [batch(spec, run) for run in runs_of(spec, ids)[: half // 3]]
    kept = 3 * len(before)
    recall = Recall(epoch=1, gateway=spec.gateway, request_id=spec.request_id, attempt=1)
    wrong = [batch(spec, run) for run in runs_of(spec, ids[:kept] + [400] * 30, start=kept)]
    right = [batch(spec, run) for run in runs_of(spec, ids, attempt=2, start=kept)]
    return [
        *before,
        recall,
        *(message for pair in zip(wrong, right, strict=False) for message in pair),
        *right,
    ]


def takeover(spec: RequestSpec) -> list[Saying]:
    first, *others = faithful(spec)
    return [first, SchedulerBeat(epoch=2, workers=1, context_tokens_max=2048), *others]


@pytest.mark.parametrize(
    "plan", [twice, backwards, overlapping, in_one_message, late_attempt, takeover]
)
async def test_text_is_the_same_under_faults(stage: Stage, plan: Plan) -> None:
    body = {"max_tokens": 40, "seed": 5, "n": 2}
    expected = (await stage.complete(**body)).json()["choices"]
    stage.mesh.plan = plan
    choices = (await stage.complete(**body)).json()["choices"]
    assert [c["text"] for c in choices] == [c["text"] for c in expected]
    assert [c["finish_reason"] for c in choices] == [c["finish_reason"] for c in expected]
    streamed = await stage.complete(**body, stream=True)
    texts = ["", ""]
    for event in events_of(streamed.text):
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == [c["text"] for c in expected]


async def test_finish_is_acknowledged_to_the_worker(stage: Stage) -> None:
    await stage.complete(max_tokens=5)
    (ack,) = await stage.mesh.until_heard(FinishAck)
    (submit,) = await stage.mesh.until_heard(Submit)
    assert isinstance(ack, FinishAck)
    assert isinstance(submit, Submit)
    assert ack.request_ids == (submit.spec.request_id,)


async def test_takeover_is_answered_with_the_tokens_so_far(stage: Stage) -> None:
    stage.mesh.plan = takeover
    await stage.complete(max_tokens=30)
    (resume,) = await stage.mesh.until_heard(Resume)
    assert isinstance(resume, Resume)
    assert list(unpack(resume.tokens)) == output_of(resume.spec)[:3]
    assert resume.attempt == 0


async def test_a_lost_message_is_asked_for() -> None:
    def lossy(spec: RequestSpec) -> list[Saying]:
        messages = faithful(spec)
        return messages[:1] + messages[2:]

    async with staged(gap_wait_s=0.05) as stage:
        expected = (await stage.complete(max_tokens=20, seed=1)).json()["choices"][0]["text"]
        stage.mesh.plan = lossy
        asking = asyncio.create_task(stage.complete(max_tokens=20, seed=1))
        (wanted,) = await stage.mesh.until_heard(TokensWanted)
        assert isinstance(wanted, TokensWanted)
        assert (wanted.position, wanted.attempt) == (3, 1)
        spec = stage.mesh.specs[wanted.request_id]
        for message in faithful(spec):
            await stage.mesh.say(message)
        assert (await asking).json()["choices"][0]["text"] == expected


async def test_a_silent_worker_is_asked_after_and_the_request_moves() -> None:
    async with staged(silence_s=0.1) as stage:
        stage.mesh.plan = lambda spec: faithful(spec)[:2]
        asking = asyncio.create_task(stage.complete(max_tokens=20, seed=1))
        (wanted,) = await stage.mesh.until_heard(TokensWanted)
        assert isinstance(wanted, TokensWanted)
        spec = stage.mesh.specs[wanted.request_id]
        await stage.mesh.say(
            Recall(epoch=1, gateway=spec.gateway, request_id=spec.request_id, attempt=1)
        )
        (resume,) = await stage.mesh.until_heard(Resume)
        assert isinstance(resume, Resume)
        start = len(unpack(resume.tokens))
        for run in runs_of(spec, output_of(spec), attempt=2, start=start):
            await stage.mesh.say(batch(spec, run))
        assert (await asking).status_code == 200


async def test_a_stop_string_ends_the_lease(stage: Stage) -> None:
    text = (await stage.complete(max_tokens=30, seed=1, ignore_eos=True)).json()["choices"][0]
    stop = text["text"][20:24]
    answer = (await stage.complete(max_tokens=30, seed=1, ignore_eos=True, stop=stop)).json()
    (stopped,) = await stage.mesh.until_heard(Stopped)
    assert isinstance(stopped, Stopped)
    assert stopped.output_tokens == answer["usage"]["completion_tokens"] < 30
    assert answer["choices"][0]["stop_reason"] == stop


# ------------------------------------------------------------------------------------- refusals


def rejecting(reason: Any, detail: str = "", retry_after_s: float | None = None) -> Plan:
    def plan(spec: RequestSpec) -> list[Saying]:
        refusal = Rejected(
            epoch=1,
            gateway=spec.gateway,
            request_id=spec.request_id,
            reason=reason,
            detail=detail,
            retry_after_s=retry_after_s,
        )
        return [refusal]

    return plan


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("reason", "retry_after_s", "status", "code", "retry"),
    [
        ("queue_full", 7.2, 429, "overloaded", ("8", "7200", None)),
        ("queue_full", None, 429, "overloaded", ("2", "2000", None)),
        ("no_worker", None, 503, "no_worker", ("2", "2000", None)),
        ("deadline", 500.0, 429, "deadline_unreachable", ("120", "120000", None)),
        ("deadline", None, 429, "deadline_unreachable", (None, None, "false")),
        ("too_long", None, 400, "context_length_exceeded", (None, None, "false")),
        ("unknown_model", None, 404, "model_not_found", (None, None, "false")),
    ],
)
async def test_refusals_are_http_errors_also_for_streams(
    stage: Stage,
    stream: bool,
    reason: str,
    retry_after_s: float | None,
    status: int,
    code: str,
    retry: tuple[str | None, ...],
) -> None:
    stage.mesh.plan = rejecting(reason=reason, retry_after_s=retry_after_s, detail="because")
    answer = await stage.complete(stream=stream, n=2)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["code"] == code
    if reason == "too_long":
        assert error["param"] == "prompt"
    assert "because" in error["message"]
    names = ("retry-after", "retry-after-ms", "x-should-retry")
    assert tuple(answer.headers.get(name) for name in names) == retry


async def test_a_refusal_can_be_found_again(capsys: pytest.CaptureFixture[str]) -> None:
    """Its x-request-id is the mesh's own name for it, in journal and traces; a client's own stands
    beside that in the log."""
    async with staged(log_level="info") as stage:
        stage.mesh.plan = rejecting(reason="deadline", detail="because")
        answer = await stage.complete()
        (spec,) = stage.mesh.specs.values()
        assert spec.request_id == f"{answer.headers['x-request-id']}-0"
        body = {"model": "demo_model", "prompt": "ROMEO:"}
        await stage.client.post("/v1/completions", json=body, headers={"x-request-id": "mine"})
        ids = list(stage.mesh.specs)
    lines = [json.loads(x) for x in capsys.readouterr().err.splitlines() if "mine" in x]
    (line,) = [line for line in lines if line["event"] == "request failed"]
    assert f"{line['request_id']}-0" == ids[1]
    assert (line["level"], line["code"]) == ("info", "deadline_unreachable")


def failing_late(spec: RequestSpec) -> list[Saying]:
    end = TokenRun(
        request_id=spec.request_id,
        attempt=1,
        position=3,
        ids=pack([]),
        finish_reason="error",
        detail="out of memory",
    )
    return [faithful(spec)[0], batch(spec, end)]


async def test_a_failure_in_a_stream_is_an_event_and_then_done(stage: Stage) -> None:
    stage.mesh.plan = failing_late
    answer = await stage.complete(stream=True)
    assert answer.status_code == 200
    *_, last = events_of(answer.text)
    assert last["error"]["code"] == "generation_failed"
    assert "out of memory" in last["error"]["message"]
    whole = await stage.complete()
    assert whole.status_code == 500
    assert whole.json()["error"]["type"] == "server_error"


async def test_one_failed_choice_cancels_the_others(stage: Stage) -> None:
    def plan(spec: RequestSpec) -> list[Saying]:
        return failing_late(spec) if spec.choice == 1 else faithful(spec)[:1]

    stage.mesh.plan = plan
    answer = await stage.complete(n=3)
    assert answer.status_code == 500
    assert len(await stage.mesh.until_heard(Cancel, 2)) == 2


async def test_a_deadline_ends_the_request(stage: Stage) -> None:
    stage.mesh.plan = lambda spec: faithful(spec)[:1]
    body = {"model": "demo_model", "prompt": "x", "max_tokens": 50}
    headers = {"x-tranche-deadline-ms": "150"}
    whole = await stage.client.post("/v1/completions", json=body, headers=headers)
    assert whole.status_code == 408
    assert whole.json()["error"]["code"] == "deadline_exceeded"
    await stage.mesh.until_heard(Cancel)
    streamed = await stage.client.post(
        "/v1/completions", json={**body, "stream": True}, headers=headers
    )
    assert events_of(streamed.text)[-1]["error"]["code"] == "deadline_exceeded"
    specs = list(stage.mesh.specs.values())
    assert [spec.deadline_ms for spec in specs] == [150, 150]


# ---------------------------------------------------------------------------------- disconnects


def endless(spec: RequestSpec) -> list[Saying]:
    return faithful(spec)[:1]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_is_cancelled_at_once(stage: Stage, stream: bool) -> None:
    stage.mesh.plan = endless
    asking = asyncio.create_task(stage.complete(stream=stream, n=2, max_tokens=50))
    await stage.mesh.until_heard(Submit, 2)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert len(await stage.mesh.until_heard(Cancel, 2)) == 2
    async with asyncio.timeout(5):
        while stage.metric("tranche_gateway_open_requests"):
            await asyncio.sleep(0.01)
    assert stage.metric("tranche_gateway_disconnected_requests_total") == 1


async def test_a_stream_in_waiting_is_kept_alive() -> None:
    async with staged(keepalive_s=0.05) as stage:
        stage.mesh.plan = lambda spec: ()
        asking = asyncio.create_task(stage.complete(stream=True, seed=1))
        (submit,) = await stage.mesh.until_heard(Submit)
        assert isinstance(submit, Submit)
        await asyncio.sleep(0.2)
        for message in faithful(submit.spec):
            await stage.mesh.say(message)
        answer = await asking
        assert answer.text.startswith(": waiting\n\n")
        assert len(events_of(answer.text)) > 1


async def test_a_refusal_after_the_stream_began_is_an_event() -> None:
    async with staged(keepalive_s=0.05) as stage:
        stage.mesh.plan = lambda spec: ()
        asking = asyncio.create_task(stage.complete(stream=True))
        (submit,) = await stage.mesh.until_heard(Submit)
        assert isinstance(submit, Submit)
        await asyncio.sleep(0.2)
        for message in rejecting(reason="queue_full")(submit.spec):
            await stage.mesh.say(message)
        (event,) = events_of((await asking).text)
        assert event["error"]["code"] == "overloaded"


async def test_a_slow_reader_is_cancelled_and_others_go_on() -> None:
    async with staged(stream_characters_max=1_024) as stage:

        def flood(spec: RequestSpec) -> list[Saying]:
            """All at once: more text than may wait, before anybody can read it."""
            runs = runs_of(spec, output_of(spec), size=500)
            return [batch(spec, *runs[:-1]), batch(spec, runs[-1])]

        stage.mesh.plan = flood
        body = {"max_tokens": 2_000, "ignore_eos": True, "prompt": [5]}
        answer = await stage.complete(**body, stream=True)
        assert events_of(answer.text)[-1]["error"]["code"] == "slow_reader"
        await stage.mesh.until_heard(Cancel)
        whole = await stage.complete(**body)
        assert whole.json()["usage"]["completion_tokens"] == 2_000, "a whole answer may be long"
        assert stage.metric("tranche_gateway_slow_readers_total") == 1
        stage.mesh.plan = faithful
        assert (await stage.complete()).status_code == 200


@contextlib.asynccontextmanager
async def raw_request(
    stage: Stage, head: bytes, receive_bytes: int = 4_096
) -> AsyncIterator[socket.socket]:
    """A connection that has sent these bytes and has room for little."""
    loop = asyncio.get_running_loop()
    with socket.socket() as connection:
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        await loop.sock_connect(connection, ("127.0.0.1", stage.settings.port))
        await loop.sock_sendall(connection, head)
        yield connection


async def test_a_client_that_reads_nothing_is_given_up() -> None:
    async with staged(write_timeout_s=0.3) as stage:

        def chatty(spec: RequestSpec) -> list[Saying]:
            """One event per token: the kernel's buffers fill."""
            return [batch(spec, run) for run in runs_of(spec, [290] * 1_900, size=1)]

        stage.mesh.plan = chatty
        body = json.dumps(
            {"model": "demo_model", "prompt": [5], "max_tokens": 1_900, "stream": True, "n": 16}
        ).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        head += b"content-length: %d\r\n\r\n" % len(body)
        async with raw_request(stage, head + body), asyncio.timeout(30):
            while not stage.metric("tranche_gateway_disconnected_requests_total"):
                await asyncio.sleep(0.02)
        assert stage.metric("tranche_gateway_open_streams") == 0
        assert stage.metric("tranche_gateway_open_requests") == 0


async def test_a_slow_reader_is_paused_and_gets_all_its_text() -> None:
    """The mesh hears when it falls behind and when it has caught up; then the rest follows."""
    length, choices = 900, 2

    def runs(spec: RequestSpec) -> list[Saying]:
        return [batch(spec, run) for run in runs_of(spec, [290] * length, size=1)]

    async with staged(reader_behind_characters=256) as stage:
        stage.mesh.plan = lambda spec: runs(spec)[:-1]
        body = {"model": "demo_model", "prompt": [5], "max_tokens": length, "stream": True}
        body |= {"n": choices, "stream_options": {"include_usage": True}}
        content = json.dumps(body).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        head += b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(content)
        async with raw_request(stage, head + content) as connection, asyncio.timeout(60):
            await stage.mesh.until_heard(Reading, choices)
            words = [m for m in stage.mesh.heard if isinstance(m, Reading)]
            assert all(word.paused for word in words), "it has read nothing yet"
            loop, received = asyncio.get_running_loop(), b""
            said = False
            while piece := await loop.sock_recv(connection, 65_536):
                received += piece
                last = {m.request_id: m.paused for m in stage.mesh.heard if isinstance(m, Reading)}
                if not said and len(last) == choices and not any(last.values()):
                    said = True
                    for spec in stage.mesh.specs.values():
                        await stage.mesh.say(runs(spec)[-1])
        assert f'"completion_tokens":{choices * length},'.encode() in received
        assert b"data: [DONE]" in received
        assert stage.metric("tranche_gateway_slow_readers_total") == 0
        assert stage.metric("tranche_gateway_paused_readers_total") >= choices


async def test_a_body_that_never_comes_is_given_up() -> None:
    async with staged(body_timeout_s=0.1) as stage:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        async with raw_request(stage, head + b"content-length: 50\r\n\r\n{") as connection:
            answer = await asyncio.get_running_loop().sock_recv(connection, 4_096)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"body_timeout" in answer


# ------------------------------------------------------------------------- the mesh comes and goes


async def test_without_a_scheduler_requests_are_refused() -> None:
    async with staged(beat_timeout_s=0.5) as stage:
        stage.mesh.beating = False
        async with asyncio.timeout(10):
            while (await stage.client.get("/ready")).status_code == 200:
                await asyncio.sleep(0.02)
        answer = await stage.complete()
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "unavailable"
        assert "starting, or its scheduler" in answer.json()["error"]["message"]
        assert int(answer.headers["retry-after"]) >= 1
        assert (await stage.client.get("/health")).status_code == 200
        stage.mesh.beating = True
        async with asyncio.timeout(10):
            while (await stage.client.get("/ready")).status_code != 200:
                await asyncio.sleep(0.02)
        assert (await stage.complete()).status_code == 200


async def until_status(stage: Stage, status: int) -> httpx.Response:
    """What /ready says once it has this status."""
    async with asyncio.timeout(10):
        while (answer := await stage.client.get("/ready")).status_code != status:
            await asyncio.sleep(0.02)
    return answer


async def test_before_the_first_worker_requests_are_refused_at_once() -> None:
    beat = SchedulerBeat(epoch=1)
    async with staged(beat=beat) as stage:
        ready = await stage.client.get("/ready")
        async with asyncio.timeout(10):
            while "model loaded" not in ready.json()["reason"]:
                assert "starting" in ready.json()["reason"]
                ready = await stage.client.get("/ready")
        assert (ready.status_code, ready.json()["ready"]) == (503, False)
        answer = await stage.complete()
        assert answer.status_code == 503
        assert answer.json()["error"] == {
            "message": "No worker has its model loaded yet.",
            "type": "server_error",
            "param": None,
            "code": "no_worker",
        }
        assert int(answer.headers["retry-after"]) >= 1
        stage.mesh.beat = SchedulerBeat(epoch=1, advice="choose another --policy")
        async with asyncio.timeout(10):
            while "another --policy" not in (await stage.complete()).text:
                await asyncio.sleep(0.02)
        stage.mesh.beat = FIRST_BEAT
        await until_status(stage, 200)
        assert (await stage.complete()).status_code == 200


async def test_without_a_worker_requests_wait_for_the_grace_and_are_refused_then() -> None:
    async with staged(worker_grace_s=1.0) as stage:
        stage.mesh.plan = endless
        stage.mesh.beat = SchedulerBeat(epoch=1)
        ready = await until_status(stage, 503)
        assert "No worker" in ready.json()["reason"]
        waiting = asyncio.create_task(stage.complete())
        (submit,) = await stage.mesh.until_heard(Submit)
        assert isinstance(submit, Submit)
        stage.mesh.plan = faithful
        async with asyncio.timeout(10):
            while (refused := await stage.complete()).status_code == 200:
                await asyncio.sleep(0.05)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_worker")
        assert not waiting.done()
        for message in faithful(submit.spec):
            await stage.mesh.say(message)
        assert (await waiting).status_code == 200
        stage.mesh.beat = FIRST_BEAT
        await until_status(stage, 200)
        assert (await stage.complete()).status_code == 200


async def test_a_stop_finishes_open_answers_and_refuses_new_ones() -> None:
    async with staged() as stage:
        stage.mesh.plan = endless
        asking = asyncio.create_task(stage.complete(stream=True, max_tokens=20, seed=1))
        (submit,) = await stage.mesh.until_heard(Submit)
        assert isinstance(submit, Submit)
        stage.stop.set()
        async with asyncio.timeout(10):
            while (await stage.client.get("/ready")).status_code == 200:
                await asyncio.sleep(0.01)
        assert (await stage.complete()).status_code == 503
        for message in faithful(submit.spec):
            await stage.mesh.say(message)
        assert len(events_of((await asking).text)) > 0
        await stage.serving
        with pytest.raises(httpx.ConnectError):
            await stage.client.get("/ready")


async def test_what_outlives_the_drain_ends_with_an_error() -> None:
    async with staged(drain_s=0.1) as stage:
        stage.mesh.plan = endless
        streaming = asyncio.create_task(stage.complete(stream=True, max_tokens=20))
        asking = asyncio.create_task(stage.complete(max_tokens=20))
        await stage.mesh.until_heard(Submit, 2)
        async with asyncio.timeout(10):
            while stage.metric("tranche_gateway_output_tokens_total", tenant="default") < 6:
                await asyncio.sleep(0.01)
        stage.stop.set()
        assert events_of((await streaming).text)[-1]["error"]["code"] == "unavailable"
        answer = await asking
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        assert len(await stage.mesh.until_heard(Cancel, 2)) == 2


async def test_the_last_beat_says_that_the_gateway_leaves() -> None:
    beats: list[GatewayBeat] = []
    async with staged() as stage:
        stage.mesh.on_beat = beats.append
        assert (await stage.complete()).status_code == 200
    assert beats[-1].leaving
    assert not any(beat.leaving for beat in beats[:-1])


async def test_garbage_on_the_queue_does_not_stop_the_gateway(stage: Stage) -> None:
    for n in range(50):
        address = Address(TOKENS, "gateway.gateway-test")
        stage.mesh.bus.broker.publish_bytes(address, bytes([n]) * n)
    assert (await stage.complete()).status_code == 200
    assert len(stage.mesh.bus.broker.dead_letters) == 50


async def test_events_are_coalesced_per_message(stage: Stage) -> None:
    """One event per token batch at most, whatever number of runs it holds."""
    stage.mesh.plan = in_one_message
    events = events_of((await stage.complete(stream=True, max_tokens=30)).text)
    assert len(events) == 1


def test_plans_differ() -> None:
    """The fault plans really are faults: each changes what is said."""
    spec = RequestSpec(
        request_id="r", parent_id="p", gateway="g", model="m", prompt=pack([1]), max_tokens=30
    )
    plain = json.dumps([repr(message) for message in faithful(spec)])
    plans: list[Callable[[RequestSpec], object]] = [twice, backwards, overlapping, late_attempt]
    for plan in plans:
        assert json.dumps([repr(message) for message in plan(spec)]) != plain  # type: ignore[attr-defined]
