"""Limits, keys and tenants."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from services.gateway.keys import make_key, read_keys
from services.gateway.service import serve
from services.gateway.settings import GatewaySettings
from shared.bus.memory import MemoryBroker, MemoryBus
from shared.config import SetupError
from shared.messages import Accepted, Cancel, Rejected, RequestSpec, SchedulerBeat, Submit
from shared.telemetry.setup import start
from tests.api.conftest import DEMO_MODEL, Stage, free_port, staged
from tests.api.fake_mesh import Saying, faithful


def never(spec: RequestSpec) -> list[Saying]:
    return []


@contextlib.asynccontextmanager
async def held(stage: Stage, count: int, **body: object) -> AsyncIterator[None]:
    """So many open requests inside; they are answered afterwards."""
    stage.mesh.plan = never
    asking = [asyncio.create_task(stage.complete(**body)) for _ in range(count)]
    await stage.mesh.until_heard(Submit, count * int(str(body.get("n", 1))))
    stage.mesh.plan = faithful
    yield
    for spec in list(stage.mesh.specs.values()):
        for message in faithful(spec):
            await stage.mesh.say(message)
    assert {answer.status_code for answer in await asyncio.gather(*asking)} == {200}


async def test_open_requests_are_limited_and_counted_by_choice() -> None:
    async with staged(open_requests_max=4) as stage:
        async with held(stage, 1, n=3):
            answer = await stage.complete(n=2)
            assert answer.status_code == 429
            assert answer.json()["error"]["type"] == "rate_limit_error"
            assert int(answer.headers["retry-after"]) >= 1
            assert int(answer.headers["retry-after-ms"]) >= 1
            assert (await stage.complete(n=1)).status_code == 200
        assert (await stage.complete(n=4)).status_code == 200
        assert stage.metric("tranche_gateway_open_requests") == 0


async def test_retry_after_is_the_predicted_wait() -> None:
    async with staged(open_requests_max=1) as stage:
        stage.mesh.beat = SchedulerBeat(epoch=1, workers=1, predicted_wait_s=12.3)
        async with held(stage, 1), asyncio.timeout(10):
            answer = await stage.complete()
            while answer.headers["retry-after"] != "13":  # until the beat is there
                await asyncio.sleep(0.05)
                answer = await stage.complete()
            assert (answer.headers["retry-after"], answer.headers["retry-after-ms"]) == (
                "13",
                "12300",
            )


async def test_a_wait_too_long_is_refused_at_once() -> None:
    async with staged(wait_max_s=5.0) as stage:
        stage.mesh.beat = SchedulerBeat(epoch=1, workers=1, predicted_wait_s=6.0)
        async with asyncio.timeout(10):
            while (answer := await stage.complete()).status_code != 429:  # until the beat is there
                await asyncio.sleep(0.05)
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["type"] == "rate_limit_error"


async def test_deadlines_are_the_schedulers_to_judge(stage: Stage) -> None:
    stage.mesh.beat = SchedulerBeat(epoch=1, workers=1, predicted_wait_s=6.0)
    body = {"model": "demo_model", "prompt": "x"}
    headers = {"x-tranche-ttft-ms": "5000", "x-tranche-deadline-ms": "70000"}
    answer = await stage.client.post("/v1/completions", json=body, headers=headers)
    assert answer.status_code == 200
    spec = list(stage.mesh.specs.values())[-1]
    assert (spec.ttft_deadline_ms, spec.deadline_ms) == (5000, 70000)


def promised(spec: RequestSpec, start_s: float = 2.5, finish_s: float = 9.0) -> list[Saying]:
    accepted = Accepted(
        epoch=1,
        gateway=spec.gateway,
        request_id=spec.request_id,
        start_s=start_s,
        finish_s=finish_s,
    )
    return [accepted, *faithful(spec)]


@pytest.mark.parametrize("stream", [True, False])
async def test_what_is_predicted_is_in_the_headers(stage: Stage, *, stream: bool) -> None:
    plain = await stage.complete(stream=stream)
    assert "x-tranche-predicted-start-ms" not in plain.headers
    stage.mesh.plan = promised
    answer = await stage.complete(stream=stream)
    assert 2_500 <= int(answer.headers["x-tranche-predicted-start-ms"]) < 4_000
    assert 9_000 <= int(answer.headers["x-tranche-predicted-finish-ms"]) < 10_500
    told = [m.told for m in stage.mesh.heard if isinstance(m, Submit)]
    assert told == [True, True]


@pytest.mark.parametrize(
    ("start_s", "finish_s", "comment"),
    [
        (2.5, 9.0, r": waiting, predicted start-ms=(\d+) finish-ms=(\d+)"),
        (0.01, 9.0, r": waiting, predicted late-ms=(\d+) finish-ms=(\d+)"),
        (0.01, 0.03, r": waiting, predicted late-ms=(\d+) finish-ms=(20)"),
    ],
)
async def test_who_waits_is_told_for_how_long(
    start_s: float, finish_s: float, comment: str
) -> None:
    async with staged(keepalive_s=0.1) as stage, asyncio.timeout(20):
        stage.mesh.plan = lambda spec: promised(spec, start_s, finish_s)[:1]
        body = {"model": "demo_model", "prompt": "x", "stream": True}
        async with stage.client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.aiter_lines()
            said = await anext(lines)
            for message in faithful(next(iter(stage.mesh.specs.values()))):
                await stage.mesh.say(message)
            rest = [line async for line in lines]
        assert "x-tranche-predicted-start-ms" in answer.headers
    found = re.fullmatch(comment, said)
    assert found is not None
    first_ms, *finish_ms = map(int, found.groups())
    assert 0 < first_ms <= 2_500
    assert all(0 < one <= 9_000 for one in finish_ms)
    assert rest[-2:] == ["data: [DONE]", ""]


async def test_who_waits_long_is_told_at_once(stage: Stage) -> None:
    """Not only when the connection has been silent for as long as one may be."""
    assert stage.settings.keepalive_s >= 5
    stage.mesh.plan = lambda spec: promised(spec, 60.0, 90.0)[:1]
    body = {"model": "demo_model", "prompt": "x", "stream": True}
    async with asyncio.timeout(4), stage.client.stream("POST", "/v1/completions", json=body) as got:
        assert got.status_code == 200
        assert "x-tranche-predicted-start-ms" in got.headers
        assert (await anext(got.aiter_lines())).startswith(": waiting, predicted start-ms=")


@pytest.mark.parametrize("stream", [True, False])
async def test_what_would_begin_too_late_for_its_client_is_not_promised(
    stage: Stage, *, stream: bool
) -> None:
    """The scheduler counts from when it heard of it; its client from when it asked."""
    stage.mesh.plan = lambda spec: promised(spec, 5.0)[:1]
    body = {"model": "demo_model", "prompt": "x", "stream": stream}
    headers = {"x-tranche-ttft-ms": "5000"}
    answer = await stage.client.post("/v1/completions", json=body, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "deadline_unreachable")
    assert "it was on its way; 5.00 s are allowed" in answer.json()["error"]["message"]
    assert int(answer.headers["retry-after-ms"]) >= 1
    await stage.mesh.until_heard(Cancel)
    stage.mesh.plan = lambda spec: promised(spec, 0.01)
    answer = await stage.client.post("/v1/completions", json=body, headers=headers)
    assert answer.status_code == 200


async def test_the_first_word_of_a_promise_stands(stage: Stage) -> None:
    """Messages come twice, and later than they were sent."""
    stage.mesh.plan = lambda spec: promised(spec, 2.0)[:1]
    body = {"model": "demo_model", "prompt": "x"}
    headers = {"x-tranche-ttft-ms": "3000"}
    asking = asyncio.create_task(stage.client.post("/v1/completions", json=body, headers=headers))
    await stage.mesh.until_heard(Submit)
    await asyncio.sleep(1.1)  # counted from then it would be too late
    (spec,) = stage.mesh.specs.values()
    for message in promised(spec, 2.0):
        await stage.mesh.say(message)
    answer = await asking
    assert answer.status_code == 200
    assert int(answer.headers["x-tranche-predicted-start-ms"]) < 3_000


async def test_one_choice_in_time_is_enough(stage: Stage) -> None:
    """The limit is for the first token of any."""
    stage.mesh.plan = lambda spec: promised(spec, 0.01 if spec.request_id.endswith("0") else 9.0)
    body = {"model": "demo_model", "prompt": "x", "n": 2}
    answer = await stage.client.post(
        "/v1/completions", json=body, headers={"x-tranche-ttft-ms": "5000"}
    )
    assert answer.status_code == 200


async def test_a_refused_choice_is_an_error_also_where_the_other_would_wait(stage: Stage) -> None:
    def plan(spec: RequestSpec) -> list[Saying]:
        if spec.request_id.endswith("0"):
            return promised(spec)[:1]
        return []

    stage.mesh.plan = plan
    asking = asyncio.create_task(stage.complete(stream=True, n=2))
    await stage.mesh.until_heard(Submit, 2)
    await asyncio.sleep(0.1)
    _, spec = stage.mesh.specs.values()
    await stage.mesh.say(
        Rejected(
            epoch=1,
            gateway=spec.gateway,
            request_id=spec.request_id,
            reason="queue_full",
            retry_after_s=3.0,
        )
    )
    answer = await asking
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")


@pytest.mark.parametrize(
    "headers",
    [
        [("x-tranche-deadline", "2000")],
        [("X-Tranche-Priority", "1"), ("x-tranche-ttft-ms", "500")],
        [("x-tranche-ttft-ms", "9000"), ("x-tranche-ttft-ms", "1")],
    ],
)
async def test_limits_that_would_not_count_are_errors(
    stage: Stage, headers: list[tuple[str, str]]
) -> None:
    body = {"model": "demo_model", "prompt": "x"}
    answer = await stage.client.post("/v1/completions", json=body, headers=headers)
    assert answer.status_code == 400
    assert "x-tranche-ttft-ms" in answer.json()["error"]["message"]


async def test_the_workers_context_counts_too(stage: Stage) -> None:
    stage.mesh.beat = SchedulerBeat(epoch=1, workers=1, context_tokens_max=64)
    async with asyncio.timeout(10):
        while (await stage.complete(max_tokens=100)).status_code != 400:
            await asyncio.sleep(0.05)
    answer = await stage.complete(max_tokens=100)
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    body = {"model": "demo_model", "messages": [{"role": "user", "content": "x"}]}
    assert (await stage.client.post("/v1/chat/completions", json=body)).status_code == 200
    spec = list(stage.mesh.specs.values())[-1]
    assert spec.max_tokens + len(spec.prompt) // 4 == 64


# ----------------------------------------------------------------------------------------- keys


async def test_keys_and_tenants(tmp_path: Path) -> None:
    (alice, alice_line), (bob, bob_line) = make_key("alice"), make_key("bob")
    file = tmp_path / "keys"
    file.write_text(f"# our keys\n{alice_line}\n\n{bob_line}  # the second\n")
    async with staged(api_keys_file=str(file), tenant_requests_max=1) as stage:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {bob}"}):
            for answer in (
                await stage.client.get("/v1/models", headers=headers),
                await stage.client.post("/v1/completions", content=b"{", headers=headers),
            ):
                assert answer.status_code == 401
                assert answer.json()["error"]["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"
        assert (await stage.client.get("/health")).status_code == 200
        stage.client.headers["authorization"] = f"Bearer {alice}"
        async with held(stage, 1):
            assert (await stage.complete()).status_code == 429, "one open request for each tenant"
            stage.client.headers["authorization"] = f"Bearer {bob}"
            assert (await stage.complete()).status_code == 200
        assert [spec.tenant for spec in stage.mesh.specs.values()] == ["alice", "bob"]


def test_key_files(tmp_path: Path) -> None:
    key, line = make_key("team-1")
    assert key not in line
    assert key.startswith("sk-tranche-")
    good = tmp_path / "good"
    good.write_text(line)
    ring = read_keys(str(good))
    assert ring is not None
    assert ring.tenant_of(key) == "team-1"
    assert ring.tenant_of(key + "x") is None
    assert read_keys("") is None
    for content in ("", "# nothing\n", "team\n", f"team {key}\n", f"bad/tenant {line.split()[1]}"):
        bad = tmp_path / "bad"
        bad.write_text(content)
        with pytest.raises(SetupError):
            read_keys(str(bad))
    with pytest.raises(SetupError):
        read_keys(str(tmp_path / "missing"))
    with pytest.raises(SetupError):
        make_key("two words")


# ---------------------------------------------------------------------------------------- setup


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"model": ""}, "--model"),
        ({"model": "/nowhere/at/all"}, "tokenizer"),
        ({"api_keys_file": "/nowhere"}, "key file"),
    ],
)
async def test_a_wrong_setup_is_told(changes: dict[str, str], part: str) -> None:
    settings = GatewaySettings.model_validate(
        {"port": free_port(), "model": str(DEMO_MODEL), **changes}
    )
    bus = MemoryBus(MemoryBroker())
    await bus.open()
    with pytest.raises(SetupError, match=part):
        await serve(settings, bus, start(settings, "gateway-x"), asyncio.Event())
    await bus.close()


async def test_two_gateways_side_by_side() -> None:
    """Each hears its own tokens only."""
    async with staged() as stage:
        settings = stage.settings.model_copy(update={"port": free_port()})
        second_bus = MemoryBus(stage.mesh.bus.broker)
        await second_bus.open()
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(serve(settings, second_bus, start(settings, "gateway-2"), stop))
            url = f"http://127.0.0.1:{settings.port}"
            async with httpx.AsyncClient(base_url=url) as second:
                async with asyncio.timeout(20):
                    while True:
                        with contextlib.suppress(httpx.TransportError):
                            if (await second.get("/ready")).status_code == 200:
                                break
                        await asyncio.sleep(0.02)
                body = {"model": "demo_model", "prompt": "ROMEO:", "seed": 4}
                answers = await asyncio.gather(
                    *(
                        client.post("/v1/completions", json=body)
                        for client in (stage.client, second) * 5
                    )
                )
            stop.set()
        await second_bus.close()
    assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1
    assert {spec.gateway for spec in stage.mesh.specs.values()} == {"gateway-test", "gateway-2"}


async def test_a_stranger_s_tokens_are_ignored(stage: Stage) -> None:
    stage.mesh.plan = never
    asking = asyncio.create_task(stage.complete(seed=1))
    (submit,) = await stage.mesh.until_heard(Submit)
    assert isinstance(submit, Submit)
    other = RequestSpec(
        request_id="other",
        parent_id="other",
        gateway=submit.spec.gateway,
        model="m",
        prompt=submit.spec.prompt,
        max_tokens=5,
    )
    for message in (*faithful(other), *faithful(submit.spec)):
        await stage.mesh.say(message)
    assert (await asking).status_code == 200
