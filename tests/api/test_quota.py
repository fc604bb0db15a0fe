"""Quotas per tenant: the buckets by themselves, then over HTTP, told as OpenAI tells it."""

from pathlib import Path

import pytest

from services.gateway.core.quota import Quotas, Shortage, TenantLimits, duration
from services.gateway.keys import make_key, read_keys
from shared.config import SetupError
from tests.api.conftest import staged

USUAL = TenantLimits(requests_per_minute=60, tokens_per_minute=6_000)


def test_a_minute_s_worth_at_once_and_then_steadily() -> None:
    quotas = Quotas(USUAL, {})
    taken = [quotas.take("t", 10, 0.0) for _ in range(61)]
    assert taken[:60] == [None] * 60
    assert taken[60] == Shortage("requests", 60, used=60, asked=1, wait_s=1.0)
    assert quotas.take("other", 10, 0.0) is None, "each has its own"
    assert quotas.take("t", 10, 0.9) is not None
    assert quotas.take("t", 10, 1.0) is None
    assert [quotas.take("t", 1, 3_600.0) for _ in range(61)].count(None) == 60, "and no more"


def test_tokens_count_in_advance_and_what_was_not_made_comes_back() -> None:
    quotas = Quotas(USUAL, {})
    assert quotas.take("t", 5_000, 0.0) is None
    assert quotas.take("t", 2_000, 0.0) == Shortage(
        "tokens", 6_000, used=5_000, asked=2_000, wait_s=10.0
    )
    assert quotas.headers("t", 0.0) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "6000",
        "x-ratelimit-remaining-tokens": "1000",
        "x-ratelimit-reset-tokens": "50s",
    }, "what was refused costs nothing"
    quotas.give_back("t", 4_000, 0.0)
    assert quotas.take("t", 5_000, 0.0) is None
    quotas.give_back("t", 10_000, 0.0)
    assert quotas.headers("t", 0.0)["x-ratelimit-remaining-tokens"] == "6000", "never too much"


def test_what_never_fits_is_told_so() -> None:
    shortage = Quotas(USUAL, {}).take("t", 6_001, 0.0)
    assert shortage is not None
    assert shortage.wait_s is None


def test_a_tenant_s_own_limits_win_each_for_itself() -> None:
    quotas = Quotas(USUAL, {"big": TenantLimits(tokens_per_minute=100_000, open_requests=3)})
    assert quotas.limits("big") == TenantLimits(3, 60, 100_000)
    assert quotas.limits("small") == USUAL
    assert Quotas(TenantLimits(), {}).headers("any", 0.0) == {}


def test_durations() -> None:
    shown = [duration(seconds) for seconds in (0.0, 0.0123, 0.999, 1.0, 11.2, 60.0, 359.5)]
    assert shown == ["0ms", "13ms", "999ms", "1s", "12s", "1m0s", "6m0s"]


def test_limits_in_the_key_file(tmp_path: Path) -> None:
    (_, first), (_, second) = make_key("a"), make_key("a")
    file = tmp_path / "keys"
    file.write_text(f"{first} requests_per_minute=5 open_requests=2 # ours\n{second}\n")
    ring = read_keys(str(file))
    assert ring is not None
    assert ring.limits == {"a": TenantLimits(open_requests=2, requests_per_minute=5)}
    for wrong in ("5", "rpm=5", "requests_per_minute=-1", "requests_per_minute=", "x=1"):
        file.write_text(f"{first} {wrong}\n")
        with pytest.raises(SetupError, match="requests_per_minute=NUMBER"):
            read_keys(str(file))
    file.write_text(f"{first} open_requests=1\n{second} open_requests=2\n")
    with pytest.raises(SetupError, match="further up"):
        read_keys(str(file))


async def test_over_http(tmp_path: Path) -> None:
    (alice, alice_line), (bob, bob_line) = make_key("alice"), make_key("bob")
    file = tmp_path / "keys"
    file.write_text(f"{alice_line} requests_per_minute=2\n{bob_line} tokens_per_minute=100\n")
    async with staged(api_keys_file=str(file), tenant_tokens_per_minute=10_000) as stage:
        stage.client.headers["authorization"] = f"Bearer {alice}"
        first = await stage.complete(max_tokens=3)
        assert first.status_code == 200
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert first.headers["x-ratelimit-limit-tokens"] == "10000"
        assert (await stage.complete(max_tokens=0)).status_code == 400, "is not counted"
        assert (await stage.complete(max_tokens=3, stream=True)).status_code == 200
        refused = await stage.complete(max_tokens=3)
        assert refused.status_code == 429
        error = refused.json()["error"]
        assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
        assert 1 <= int(refused.headers["retry-after"]) <= 30
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert refused.headers["x-ratelimit-reset-requests"].endswith("s")

        stage.client.headers["authorization"] = f"Bearer {bob}"
        answer = await stage.complete(max_tokens=60)
        usage = answer.json()["usage"]
        assert usage["completion_tokens"] < 60, "it ends by itself"
        left = int((await stage.complete(max_tokens=1)).headers["x-ratelimit-remaining-tokens"])
        prompt = usage["prompt_tokens"]
        spent = usage["total_tokens"] + prompt + 1
        assert 100 - spent <= left <= 100 - spent + 20, "the rest came back, and time has passed"
        large = await stage.complete(max_tokens=500)
        assert large.status_code == 429
        assert large.json()["error"]["type"] == "tokens"
        assert "retry-after" not in large.headers
        assert large.headers["x-should-retry"] == "false"
