"""The simulator's error against reality, in one sentence to stand beside simulated figures.

From the stored result of `make reproduce`'s part `reality`; where that is not at hand (outside the
repository), the sentence only says where to look.
"""

import json
from pathlib import Path

from shared.profiles import CostProfile

STORED = Path(__file__).parents[1] / "bench" / "results" / "reproduction" / "reality.json"
MEASURES = {
    "TTFT, mean, s": "mean TTFT",
    "TPOT, mean, s": "mean TPOT",
    "end to end, mean, s": "mean end to end",
    "throughput, tokens/s": "throughput",
}
"""Rows of the section's first table, and what they are called here."""
MEASURED_ON = (
    "policy vllm on one RTX 4090, profile llama-3.1-8b-rtx4090; other profiles and policies are "
    "not checked against reality"
)
"""What the part `reality` replays."""
ELSEWHERE = "docs/reproduction.md of the repository compares the simulator with a real vLLM run"


def known_error(stored: Path = STORED) -> str:
    """A sentence without its full stop."""
    if not stored.is_file():
        return ELSEWHERE
    rows = json.loads(stored.read_bytes())["tables"][0]["rows"]
    errors = [f"{MEASURES[row[0]]} {row[3]}" for row in rows if row[0] in MEASURES]
    return f"the simulator's error against a recorded vLLM run ({MEASURED_ON}): {', '.join(errors)}"


def fit_error(profile: CostProfile) -> str:
    """How far the profile's own fit is off on cells that it did not see; also no full stop."""
    if not profile.errors:
        return f"profile {profile.name} does not say how good its fit is"
    errors = ", ".join(
        f"{phase} {error.median:.1%} / {error.p95:.1%}" for phase, error in profile.errors.items()
    )
    return f"profile {profile.name}: error of its fit on held-out cells, median / p95: {errors}"
