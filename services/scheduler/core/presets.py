"""Presets: the named policies, each a row of five answers, a form, and constants of its own.

Tags: [M] recollected from memory of a source and not confirmed, [R] our reconstruction, [C] read in
the named system's code (through the research notes), [T] Tranche's own choice.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from services.scheduler.core.settings import Constants, did_you_mean, known_names
from services.scheduler.core.variants import UnknownAnswer, check, spelled
from shared.messages import Form

USUAL_POLICY = "tranche"
"""What is used where nobody asks for another one."""
Binding = Literal["late", "early"]
Value = int | float | bool | str
NOTHING: Mapping[str, Value] = MappingProxyType({})


class UnknownPreset(ValueError):
    """A policy name that no row has, or a change to a row that cannot be made."""


@dataclass(frozen=True, slots=True)
class Preset:
    """Names in the dicts of `policies/`; see `variants.QUESTIONS`."""

    name: str
    order: str
    admission: str
    batching: str
    offloading: str
    pacing: str
    form: Form
    summary: str
    victim: str = "last-admitted"
    """Leased: who is parked when the next leases do not fit."""
    binding: Binding = "late"
    """Leased: `late`: everybody waits in the centre until a worker has room. `early`: bound to a
    worker at once, as by a load balancer in front of servers."""
    constants: Mapping[str, Value] = field(default_factory=lambda: NOTHING)
    """Where its source differs from the defaults."""
    needs_truth: bool = False
    """It is told true output lengths: simulation only."""

    def __post_init__(self) -> None:
        unknown = set(self.constants) - set(known_names())
        assert not unknown, f"{self.name}: no such constants: {unknown}"

    def with_constants(self, **explicit: Value) -> Constants:
        """The defaults, then this row's constants, then what is given explicitly."""
        return Constants(**{**self.constants, **explicit})  # type: ignore[arg-type]


VLLM: Mapping[str, Value] = MappingProxyType(
    {
        "slice_tokens": 16,  # a lease is a block [C: block size 16]
        "ample_slice_tokens": 128,  # of which nothing depends while none is scarce [T]
        "iteration_tokens": 2048,  # max_num_batched_tokens of the server on large GPUs [C]
        # Two iterations' worth: the next one is composed while one runs [C: asynchronous
        # scheduling, on by default since 0.14].
        "bind_backlog_tokens": 4096,
        "running_max": 256,  # max_num_seqs [C]
        "prompt_watermark": 0.0,  # V1 sets none aside [C]
    }
)
ILS: Mapping[str, Value] = MappingProxyType(
    {
        "slice_tokens": 128,  # a lease is a KV block of DeepSpeed-FastGen [C]
        "iteration_tokens": 768,  # its max_ragged_batch_size: decodes first, split prompts [C]
        "bind_backlog_tokens": 768,
        # Its max_ragged_sequence_count is 512 [C]; "ILS often limits the number of parallel
        # requests" for fear of running out of memory (SCLS's abstract), to which number is not
        # known: that of SLS's batch [R]. Always to be told with a result.
        "running_max": 12,
        "prompt_watermark": 0.0,  # the whole prompt must fit now, no output is reserved [C]
    }
)
SARATHI: Mapping[str, Value] = MappingProxyType(
    {
        "slice_tokens": 16,
        "ample_slice_tokens": 128,
        "iteration_tokens": 512,
        "bind_backlog_tokens": 512,
        "running_max": 128,
        "prompt_watermark": 0.01,  # of V0, on which Sarathi-Serve is built [C]
    }
)
TGI: Mapping[str, Value] = MappingProxyType(
    {"iteration_tokens": 4096, "bind_backlog_tokens": 4096, "running_max": 0}
)
TRTLLM: Mapping[str, Value] = MappingProxyType(
    {"iteration_tokens": 8192, "bind_backlog_tokens": 8192, "running_max": 2048}
)
TRTLLM_UTILIZATION: Mapping[str, Value] = MappingProxyType(
    {**TRTLLM, "slice_tokens": 16, "ample_slice_tokens": 128}
)

COLD_START: Mapping[str, Value] = MappingProxyType(
    {
        "cold_start_share": 0.02,  # As in the artifact's server: 20 stand-ins in a history of
        "cold_start_ends": 40,  # 1000, which go between the 20th and the 40th finish; then W is
        # the paper's 1000, second hand.
    }
)
PAST_FUTURE: Mapping[str, Value] = MappingProxyType({"future_reserve": 0.05, **COLD_START})
"""The victim is the one that holds most [T]: evicted requests miss a limit on token gaps whatever
their age, so what counts is how few they are (docs/reproduction.md, goodput under an SLA)."""
TRANCHE: Mapping[str, Value] = MappingProxyType(
    {
        "chance_target": 0.1,  # at most: the price of evictions lowers it
        "backfill_max": 15,
        "bind_backlog_estimated": True,
        "chance_return_less": 0.75,  # a victim stands still until it is back
        "move_gain": 2.0,
        "hoard_deviations": 4.0,
        "lead_prompts": 2.0,
    }
)
SAL_LARRY: Mapping[str, Value] = MappingProxyType(
    {"victim_spared_tokens": 256, **COLD_START}  # y is not known [R]
)

_ROWS = (
    Preset(
        name="sls",
        order="fcfs",
        admission="slice-bound",
        batching="fixed",
        offloading="round-robin",
        pacing="whole",
        form="closed",
        summary="Sequence-level: batches of N in order of arrival, dealt to the workers in turn, "
        "run until all have ended.",
    ),
    Preset(
        name="ils",
        order="fcfs",
        admission="prompt-fits",
        batching="continuous",
        offloading="round-robin",
        pacing="fixed",
        form="leased",
        binding="early",
        constants=ILS,
        summary="Iteration-level, as SCLS compares with: continuous batching of at most "
        "`running_max` requests a worker, as DeepSpeed-FastGen runs them, bound in turn.",
    ),
    Preset(
        name="so",
        order="fcfs",
        admission="slice-bound",
        batching="fixed",
        offloading="round-robin",
        pacing="ticked",
        form="closed",
        summary="Slice only: SLS, but a batch ends after S tokens and its requests wait again.",
    ),
    Preset(
        name="pm",
        order="fcfs",
        admission="slice-bound",
        batching="sorted",
        offloading="round-robin",
        pacing="ticked",
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
    Preset(
        name="past-future",
        order="fcfs",
        admission="past-future",
        batching="continuous",
        offloading="sal-a",
        pacing="fixed",
        form="leased",
        victim="largest-kv",
        constants=PAST_FUTURE,
        summary="Past-Future: joins if the future memory peak, by lengths sampled from the "
        "history, fits; waits in the centre, goes to the worker with the least SAL load.",
    ),
    Preset(
        name="aggressive",
        order="fcfs",
        admission="aggressive",
        batching="continuous",
        offloading="sal-a",
        pacing="fixed",
        form="leased",
        summary="Joins while what is held stays below a watermark; nothing is kept for growth.",
    ),
    Preset(
        name="conservative",
        order="fcfs",
        admission="conservative",
        batching="continuous",
        offloading="sal-a",
        pacing="fixed",
        form="leased",
        summary="Joins if everybody's longest possible output fits, times an overcommit.",
    ),
    Preset(
        name="oracle",
        order="fcfs",
        admission="oracle",
        batching="continuous",
        offloading="sal-a",
        pacing="fixed",
        form="leased",
        needs_truth=True,
        summary="Past-Future with the true lengths and no reserve: a bound, in simulation only.",
    ),
    Preset(
        name="vllm",
        order="fcfs",
        admission="prompt-fits",
        batching="continuous",
        offloading="vllm-dp",
        pacing="fixed",
        form="leased",
        binding="early",
        constants=VLLM,
        summary="vLLM V1's rule: whoever's prompt fits joins; a lease is one block of KV, and "
        "where none is free the last admitted is preempted and computed anew.",
    ),
    Preset(
        name="sarathi",
        order="fcfs",
        admission="prompt-fits",
        batching="continuous",
        offloading="round-robin",
        pacing="fixed",
        form="leased",
        binding="early",
        constants=SARATHI,
        summary="Sarathi-Serve: stall-free iterations of at most C tokens, decodes first, then "
        "chunks of prefill; admission with vLLM's first watermark.",
    ),
    Preset(
        name="tgi",
        order="fcfs",
        admission="reserve-all",
        batching="continuous",
        offloading="round-robin",
        pacing="whole",
        form="leased",
        binding="early",
        constants=TGI,
        summary="TGI v3: in order of arrival, with blocks for prompt and whole output up front.",
    ),
    Preset(
        name="trtllm-no-evict",
        order="fcfs",
        admission="reserve-all",
        batching="continuous",
        offloading="round-robin",
        pacing="whole",
        form="leased",
        binding="early",
        constants=TRTLLM,
        summary="TensorRT-LLM GUARANTEED_NO_EVICT: the worst case of everybody is reserved.",
    ),
    Preset(
        name="trtllm-max-utilization",
        order="fcfs",
        admission="next-step",
        batching="continuous",
        offloading="round-robin",
        pacing="fixed",
        form="leased",
        binding="early",
        constants=TRTLLM_UTILIZATION,
        summary="TensorRT-LLM MAX_UTILIZATION: blocks for the next step only; on a misfit the last "
        "started is paused.",
    ),
    Preset(
        name="sal+larry",
        order="larry",
        admission="larry-a",
        batching="continuous",
        offloading="sal-a",
        pacing="fixed",
        form="leased",
        binding="early",
        victim="least-computed",
        constants=SAL_LARRY,
        summary="Our reconstruction of the survey's pair: SAL binds to the least of queued prefill "
        "and missing memory; LARRY orders by load-adaptive short-first with ageing, behind a "
        "gate that keeps a share of memory for what the running ones grow.",
    ),
    Preset(
        name="tranche",
        order="volume",
        admission="chance",
        batching="continuous",
        offloading="late-binding",
        pacing="fixed",
        form="leased",
        victim="farthest-end",
        constants=TRANCHE,
        summary="Ours: joins if a calibrated chance says that memory will last, one target for "
        "every workload; deadlines, tenants and small requests are looked after in the order, "
        "smaller ones fill what a refused head leaves free, and each goes to the worker with the "
        "least prefill queued.",
    ),
)

PRESETS: dict[str, Preset] = {row.name: row for row in _ROWS}


def preset_named(name: str) -> Preset:
    """The row, or a variant of it (`vllm+offloading=sal-a`). Raises UnknownPreset, naming what
    there is."""
    try:
        spelling = spelled(name, PRESETS)
        if spelling.preset not in PRESETS:
            near, known = did_you_mean(spelling.preset, PRESETS), ", ".join(PRESETS)
            raise UnknownPreset(f"unknown policy {spelling.preset!r}{near}; known are: {known}")
        row = PRESETS[spelling.preset]
        check(spelling, row.form)
    except UnknownAnswer as error:
        raise UnknownPreset(str(error)) from error
    if not spelling.changes:
        return row
    told = spelling.changes.get("admission", row.admission) == "oracle"
    changes: dict[str, Any] = dict(spelling.changes)
    return replace(row, name=spelling.name, needs_truth=told, **changes)
