"""The scheduler's settings, and the core's constants that follow from them."""

from typing import ClassVar, Self

from pydantic import Field, model_validator

from services.scheduler.core.presets import (
    PRESETS,
    USUAL_POLICY,
    Preset,
    UnknownPreset,
    preset_named,
)
from services.scheduler.core.settings import Constants, weights_of, with_overrides
from shared.config import ServiceSettings, settings_config

LIVE = (
    "slice_tokens",
    "batch_size",
    "interval_share",
    "interval_floor_s",
    "interval_s",
    "gather_s",
    "spread_batches",
    "round_on_idle",
    "memory_share",
    "waiting_max",
    "wait_max_s",
    "tenant_weights",
)
"""Constants that have a setting of their own."""

AMPLE_SLICE_TOKENS = 256
"""Leases of a worker with ample memory, unless slice_tokens was chosen: nobody else loses by it,
and a renewal costs messages (`Constants.ample_slice_tokens`)."""


class SchedulerSettings(ServiceSettings):
    """One scheduler. Several on one broker: one leads, the others stand by."""

    model_config = settings_config("scheduler")
    service: ClassVar[str] = "scheduler"

    policy: str = Field(
        default=USUAL_POLICY,
        description=f"Preset: {', '.join(n for n, row in PRESETS.items() if not row.needs_truth)}.",
    )
    slice_tokens: int = Field(default=64, ge=1)
    """S: most new tokens before a request is scheduled anew. Small slices react faster and waste
    less after a request's end; each pays for a prefill of all that went before."""
    batch_size: int = Field(default=12, ge=1)
    """N of the presets with a fixed batch size: sls, so, pm."""
    interval_share: float = Field(default=0.9, ge=0)
    """lambda of scls: the next round comes after this share of the least loaded worker's work.
    The paper's is taken to be 0.5; orders reach a worker here in milliseconds, so a later round
    idles nobody and joins more requests in a batch."""
    interval_floor_s: float = Field(default=0.003, ge=0)
    """Gamma of scls: the shortest interval between rounds. With a few milliseconds an idle mesh
    answers at once, and the interval follows the fitted slice time when it is busy."""
    interval_s: float = Field(default=0.25, ge=0)
    """Between rounds of ab and lb."""
    gather_s: float = Field(default=0.003, ge=0)
    """How long the first of several arrivals waits for the others before a round of closed batches;
    leases wait for nobody unless this is set."""
    spread_batches: bool = True
    """Split batches until every idle worker has one; without it, as in the papers, a mesh with
    few requests leaves workers idle."""
    round_on_idle: bool = True
    """scls does not wait for its interval while a worker has nothing to do."""
    memory_share: float = Field(default=0.9, gt=0, le=1)
    """Share of a worker's KV slots that batches may fill."""
    waiting_max: int = Field(default=4096, ge=1)
    """Requests that may wait; more are answered with 429 and a time to retry."""
    wait_max_s: float = Field(default=120.0, ge=0)
    """A new request that would wait longer than this, by prediction, is answered with 429 and the
    time until requests are taken in again; 0: never."""
    tenant_weights: str = ""
    """Shares of tenants beside each other, in orders that keep accounts (`volume`, `fair`):
    NAME=WEIGHT, comma separated; all others weigh 1."""
    set: dict[str, str] = Field(default_factory=dict)
    """Any other constant of the policies, by name; an unknown name lists them all."""

    journal: str = ""
    """A file to record every event and decision in; empty: none. It holds prompts as token ids."""
    journal_bytes_max: int = Field(default=1 << 30, ge=1)
    """Recording ends at this size."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        self.preset()
        self.constants()
        weights_of(self.tenant_weights)
        return self

    def preset(self) -> Preset:
        """The row of the policy's name. Raises UnknownPreset (a ValueError)."""
        preset = preset_named(self.policy)
        if preset.needs_truth:
            raise UnknownPreset(
                f"policy {preset.name!r} is told true output lengths, which only a simulation has: "
                "use it with tranche simulate, or choose tranche here"
            )
        return preset

    def constants(self) -> Constants:
        """The core's constants: a live mesh's defaults, then the preset's own, then what was asked
        for; `set` wins. Raises UnknownConstant (a ValueError)."""
        live = {name: getattr(self, name) for name in LIVE}
        if "slice_tokens" not in self.model_fields_set:
            live["ample_slice_tokens"] = AMPLE_SLICE_TOKENS
        if self.preset().form == "leased" and "gather_s" not in self.model_fields_set:
            live["gather_s"] = 0.0  # nothing is batched here that could be waited for
        told = {name: live[name] for name in LIVE if name in self.model_fields_set}
        constants = self.preset().with_constants(**{**live, **self.preset().constants, **told})
        return with_overrides(constants, self.set)
