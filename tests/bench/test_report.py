"""The report's figures, from records whose answers are known."""

import msgspec
import pytest

from bench.scrape import ServerCounts, with_server_counts
from sim.report import Record, Report, summarise
from sim.slo import SloError, parse_slo

KEYS = """policy workers requests completed rejected failed duration_s throughput_rps output_tps
goodput_rps slo ttft_s tpot_s e2e_s max_tpot_s evictions evicted_requests kv_util_mean kv_peak_max
stall_p99_s invalid_tokens pad_tokens slices_per_request batch_size_mean early_return_ratio
completion_time_std_s busy_time_std_s scheduler_cpu_s decisions""".split()

RECORDS = [
    Record(0.0, "completed", 0.5, 2.5, 1.0, prompt_tokens=10, output_tokens=5),
    Record(1.0, "completed", 3.0, 5.0, 0.5, prompt_tokens=10, output_tokens=11),
    Record(2.0, "rejected", detail="429"),
    Record(2.0, "failed", 2.5, 3.0, 0.1, prompt_tokens=10, output_tokens=4, detail="cut"),
]


def report(slo: str = "") -> Report:
    return summarise(RECORDS, policy="p", workers=2, slo=parse_slo(slo))


def test_the_names_others_rely_on_are_there() -> None:
    names = msgspec.to_builtins(report())
    assert set(KEYS) <= set(names)
    assert set(names["ttft_s"]) == {"mean", "p50", "p95", "p99"}


def test_rates_count_from_first_sending_to_last_token() -> None:
    result = report()
    assert (result.requests, result.completed, result.rejected, result.failed) == (4, 2, 1, 1)
    assert result.duration_s == 5.0
    assert result.throughput_rps == pytest.approx(2 / 5)
    assert result.output_tps == pytest.approx(20 / 5)
    assert result.errors == {"429": 1, "cut": 1}


def test_latencies_are_those_of_completed_requests() -> None:
    result = report()
    assert result.ttft_s.mean == pytest.approx((0.5 + 2.0) / 2)
    assert result.tpot_s.mean == pytest.approx((2.0 / 4 + 2.0 / 10) / 2)
    assert result.e2e_s.p50 == pytest.approx((2.5 + 4.0) / 2)
    assert result.max_tpot_s.p99 == pytest.approx(0.5 + 0.99 * 0.5)


@pytest.mark.parametrize(
    ("slo", "good"),
    [("", 2), ("ttft=1", 1), ("ttft=10,gap=0.7", 1), ("tpot=0.1", 0), ("e2e=4", 2)],
)
def test_goodput_counts_what_meets_every_limit(slo: str, good: int) -> None:
    assert report(slo).goodput_rps == pytest.approx(good / 5)


@pytest.mark.parametrize("text", ["ttft", "tfft=1", "gap=x", "e2e=-1"])
def test_a_wrong_objective_is_refused(text: str) -> None:
    with pytest.raises(SloError):
        parse_slo(text)


def test_no_completed_request_gives_no_latency() -> None:
    empty = summarise(RECORDS[2:3], policy="p", workers=None, slo=parse_slo(""))
    assert (empty.completed, empty.ttft_s.mean, empty.throughput_rps) == (0, None, 0.0)


def test_server_counts_are_differences() -> None:
    before = ServerCounts({"tranche_pad_tokens_total": 10.0})
    after = ServerCounts({"tranche_pad_tokens_total": 25.0})
    assert with_server_counts(report(), after.since(before)).pad_tokens == 15
    assert with_server_counts(report(), ServerCounts()).pad_tokens is None
