"""Gaps: what sim.fairness checks at every step; that it finds what it is to find is shown in
tests/core/test_leads.py."""

from sim.fairness import calm, flooded, waits


def test_a_flood_keeps_within_the_bound() -> None:
    *_, held = waits("tranche", flooded(calm(0.9, 150, 0), 0), 0, {})
    assert held.steps > 5
    assert 0 < held.lead_worst <= 1
    assert 0 < held.gap_worst <= 1
