"""Presets: the named policies, each a row of five answers and a form."""

from dataclasses import dataclass

from shared.messages import Form


class UnknownPreset(ValueError):
    """A policy name that no row has."""


@dataclass(frozen=True, slots=True)
class Preset:
    """Names in the dicts of `policies/`."""

    name: str
    order: str
    admission: str
    batching: str
    offloading: str
    pacing: str
    form: Form
    summary: str


_ROWS = (
    Preset(
        name="sls",
        order="fcfs",
        admission="slice-bound",
        batching="fixed",
        offloading="round-robin",
        pacing="whole",
        form="closed",
        summary="Sequence-level: the next N in order of arrival run until all have ended.",
    ),
    Preset(
        name="so",
        order="fcfs",
        admission="slice-bound",
        batching="fixed",
        offloading="round-robin",
        pacing="fixed",
        form="closed",
        summary="Slice only: SLS, but a batch ends after S tokens and its requests wait again.",
    ),
    Preset(
        name="pm",
        order="fcfs",
        admission="slice-bound",
        batching="sorted",
        offloading="round-robin",
        pacing="fixed",
        form="closed",
        summary="Padding mitigating: SO, with requests of like input length in a batch.",
    ),
    Preset(
        name="ab",
        order="by-length",
        admission="slice-bound",
        batching="dp",
        offloading="round-robin",
        pacing="ticked",
        form="closed",
        summary="Adaptive batching: batches of any size by dynamic programming, at a fixed tick.",
    ),
    Preset(
        name="lb",
        order="by-length",
        admission="slice-bound",
        batching="dp",
        offloading="max-min",
        pacing="ticked",
        form="closed",
        summary="Load balancing: AB, each batch to the worker with the least estimated load.",
    ),
    Preset(
        name="scls",
        order="by-length",
        admission="slice-bound",
        batching="dp",
        offloading="max-min",
        pacing="adaptive",
        form="closed",
        summary="SCLS as reconstructed: LB, with an interval that follows the load.",
    ),
)

PRESETS: dict[str, Preset] = {row.name: row for row in _ROWS}


def preset_named(name: str) -> Preset:
    """The row. Raises UnknownPreset, naming what there is."""
    if name not in PRESETS:
        raise UnknownPreset(f"unknown policy {name!r}; known are: {', '.join(PRESETS)}")
    return PRESETS[name]
