"""Settings of `tranche serve`: the few that say what the mesh is made of.

All others are those of the services, by their own variables (TRANCHE_WORKER_..., and so on).
"""

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from services.scheduler.core.presets import PRESETS
from shared.config import CommandSettings, LogFormat, LogLevel, settings_config

DEMO_MODEL = Path(__file__).parents[1] / "deploy" / "demo_model"
WORKERS_MAX = 64
"""More in one process and event loop would only wait for each other."""


class MeshSettings(CommandSettings):
    """What `tranche serve` takes. A field that is None leaves the service's own setting alone."""

    service: ClassVar[str] = "serve"
    model_config = settings_config("serve")

    model: str = str(DEMO_MODEL)
    """Folder of a causal language model, or its id at the Hugging Face hub."""
    workers: int = Field(default=1, ge=1, le=WORKERS_MAX)
    """How many workers, all in this process."""
    policy: str | None = Field(
        default=None,
        description=f"Scheduling preset: {', '.join(PRESETS)} (default: the scheduler's); or one "
        "with other answers, such as vllm+offloading=sal-a (docs/policies.md).",
    )
    engine: str | None = None
    """What runs the slices: paged, padded, vllm or simulated (default: what goes with the
    policy)."""
    profile: str | None = None
    """Engine simulated: the cost profile, a name in deploy/costs or a file (default: the
    worker's)."""
    simulated_lengths: str | None = None
    """Engine simulated: a table of output lengths, or mean=TOKENS (default: the worker's)."""
    simulated_speed: float | None = Field(default=None, gt=0, le=1000)
    """Engine simulated: how many times faster than the profile says (default: the worker's)."""
    slice_tokens: int | None = Field(default=None, ge=1)
    """S, the most new tokens of one slice (default: the policy's)."""
    set: dict[str, str] = {}
    """A constant of the policy; may be given several times."""
    host: str = "127.0.0.1"
    """Where the REST interface listens; 0.0.0.0: everywhere."""
    port: int = Field(default=8000, ge=1, le=65535)
    """Where the REST interface listens."""
    log_level: LogLevel = "warning"
    """debug, info, warning or error; debug shows tracebacks."""
    log_format: LogFormat = "json"
    """json, or console for people; on a terminal console is the default."""
