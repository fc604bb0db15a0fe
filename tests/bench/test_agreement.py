"""The live mesh against the simulator: what both are given, and what is compared."""

import pytest

from bench.agreement import Case, compared, failures_of
from bench.stretched import stretched
from shared.profiles import load_profile
from sim.report import Record, Report, summarise
from sim.slo import Slo

PROFILE = load_profile("opt-13b-a100-swift")


@pytest.mark.parametrize(
    ("prefill", "decodes", "kv_tokens"),
    [([(300, 0)], 0, 0), ([], 40, 30_000), ([(64, 64)], 8, 900)],
)
def test_every_iteration_of_a_stretched_profile_takes_longer_by_the_factor(
    prefill: list[tuple[int, int]], decodes: int, kv_tokens: int
) -> None:
    slow = stretched(PROFILE, 3.0).iteration_s(prefill, decodes, kv_tokens)
    assert slow == pytest.approx(3 * PROFILE.iteration_s(prefill, decodes, kv_tokens))


def test_a_stretched_case_offers_the_same_load_more_slowly() -> None:
    quick = Case("tranche", "dec", 0.8, 50, 4, 1.0, 1, 16_384).workload
    slow = Case("tranche", "dec", 0.8, 50, 4, 4.0, 1, 16_384).workload
    assert [i.output_tokens for i in slow.items] == [i.output_tokens for i in quick.items]
    assert slow.offered_rps == pytest.approx(quick.offered_rps / 4)  # type: ignore[operator]


def report(first_s: float, last_s: float, tokens: int = 100) -> Report:
    record = Record(0.0, "completed", first_s, last_s, output_tokens=tokens)
    return summarise([record], policy="tranche", workers=1, slo=Slo())


def test_what_is_further_off_than_allowed_is_told() -> None:
    live = report(1.0, 10.0)
    assert failures_of(compared(live, report(1.05, 10.2)), live, report(1.05, 10.2)) == []
    late = report(1.2, 10.0)
    (failure,) = failures_of(compared(live, late), live, late)
    assert failure.startswith("TTFT, mean")
    short = report(1.0, 10.0, tokens=99)
    assert any(one.startswith("tokens:") for one in failures_of([], live, short))
