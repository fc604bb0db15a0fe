"""deploy/costs/README.md: the shipped cost profiles and their fit errors, as a table."""

from collections.abc import Sequence
from pathlib import Path

from shared.profiles import CostProfile

TEXT = Path(__file__).parent / "about.md"
PHASES = ("prefill", "decode", "mixed", "slice")


def page(profiles: Sequence[CostProfile]) -> str:
    """The whole document."""
    head = (
        "| profile | KV tokens | block | 1 decode, ms | overhead, ms | "
        + " | ".join(f"{phase} %" for phase in PHASES)
        + " | noise % | cells |\n|---|---|---|---|---|"
        + "---|" * (len(PHASES) + 2)
    )
    rows = "\n".join(_row(profile) for profile in profiles)
    return TEXT.read_text(encoding="utf-8").replace("<!-- profiles -->", f"{head}\n{rows}")


def _row(profile: CostProfile) -> str:
    errors = []
    for phase in PHASES:
        error = profile.errors.get(phase)
        errors.append(f"{error.median:.1%} / {error.p95:.1%}".replace("%", "") if error else "")
    overhead = f"{profile.overhead_s * 1e3:.2f} + {profile.overhead_per_sequence_s * 1e3:.3f} N"
    cells = [
        f"`{profile.name}`",
        f"{profile.kv_tokens}",
        f"{profile.kv_block_tokens}",
        f"{profile.iteration_s((), 1, 512) * 1e3:.1f}",
        overhead if profile.overhead_s else "none",
        *errors,
        f"{profile.noise_cv:.1%}".replace("%", ""),
        f"{profile.valid['cells']}",
    ]
    return "| " + " | ".join(cells) + " |"
