"""The workloads of the trials: open traces, length sets, and synthetic ones."""

from dataclasses import dataclass
from pathlib import Path

from sim.reproduction.survey_load import SOURCES

_HERE = Path(__file__).parents[1]
_BENCH = _HERE.parent / "bench" / "workloads"


@dataclass(frozen=True, slots=True)
class LengthSet:
    """Where lengths come from, and what is done with them."""

    source: str
    max_tokens: int
    """The limit that every request carries."""
    recorded: bool = False
    """A trace with arrivals of its own, sped up to the load; else they are Poisson."""
    shuffled: bool = True
    length_max: int | None = None
    """Longer prompts and outputs are cut."""


SETS: dict[str, LengthSet] = {
    "conv": LengthSet(SOURCES["conv"], 1024),
    "dec": LengthSet(SOURCES["dec"], 4096, length_max=4000),
    "azure-conv": LengthSet(SOURCES["conv"], 1024, recorded=True, shuffled=False),
    "azure-code": LengthSet(
        str(_BENCH / "azure2023_code.csv"), 2048, recorded=True, shuffled=False
    ),
    "sharegpt": LengthSet(str(_BENCH / "sharegpt_v3.csv"), 2048),
    "sharegpt-o1": LengthSet(str(_HERE / "data" / "sharegpt_o1.csv"), 16384),
    "dist-1": LengthSet("dist-1", 4096),
    "dist-2": LengthSet("dist-2", 5120),
    "dist-3": LengthSet("dist-3", 4096),
}
"""`conv` is the Azure conversations in random order with Poisson arrivals, `dec` the survey note's
decode-heavy set; `azure-*` come as recorded, faster."""
