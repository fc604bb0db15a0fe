"""Bad days in the simulator: messages repeated, late and lost, workers and leaders dying."""

import pytest

from sim.network import Faults
from tests.sim.worlds import items, judged, setup

STORM = Faults(repeat=0.1, late=0.1, lose=0.05, until_s=15)
DEATHS = Faults(worker_losses_s=(2.0, 5.0, 9.3))
TAKEOVERS = Faults(leader_losses_s=(2.0, 6.5), leader_away_s=0.7)
ALL = Faults(
    repeat=0.1,
    late=0.1,
    lose=0.05,
    until_s=15,
    worker_losses_s=(2.0, 8.0),
    leader_losses_s=(5.0,),
)
DAYS = {"storm": STORM, "deaths": DEATHS, "takeovers": TAKEOVERS, "all": ALL}


@pytest.mark.parametrize("policy", ["sls", "scls", "past-future", "vllm"])
@pytest.mark.parametrize("day", DAYS)
def test_nothing_is_lost_doubled_or_spliced(policy: str, day: str) -> None:
    given = setup(
        policy,
        items(60, rate=6.0),
        workers=3,
        faults=DAYS[day],
        encoded=True,
        constants={"overdue_s": 8.0},
    )
    outcome, violations = judged(given, calm=False, waiting_max_s=120.0)
    assert outcome.report.completed == 60, outcome.report.errors
    assert violations == []


def test_a_dead_worker_costs_compute_and_no_token() -> None:
    calm, _ = judged(setup("past-future", workers=3))
    hard, violations = judged(setup("past-future", workers=3, faults=DEATHS), calm=False)
    assert violations == []
    assert hard.report.output_tokens == calm.report.output_tokens
    assert hard.report.e2e_s.mean is not None
    assert calm.report.e2e_s.mean is not None
    assert hard.report.e2e_s.mean > calm.report.e2e_s.mean
