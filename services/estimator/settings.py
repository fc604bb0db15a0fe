"""The estimator's settings."""

import os
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from shared.config import ServiceSettings, settings_config


class EstimatorSettings(ServiceSettings):
    """One estimator per mesh: a second one would take half of the reports away."""

    model_config = settings_config("estimator")
    service: ClassVar[str] = "estimator"

    database: str = ""
    """File of the history; empty: tranche/history.sqlite in the user's state folder
    (XDG_STATE_HOME, else ~/.local/state); :memory: keeps it until the end of the process."""
    window: int = Field(default=1_000, ge=1, le=100_000)
    """Finished requests per model that a forecast rests on."""
    rows_max: int = Field(default=100_000, ge=1_000)
    """Finished requests kept in the database, of all models; about 200 bytes each."""
    forecast_interval_s: float = Field(default=2.0, gt=0)
    """Forecasts are at least this far apart, except when a scheduler takes over."""
    store_patience_s: float = Field(default=20.0, ge=0)
    """How long to try again to store a request (disk full, file locked) before it goes back to
    the broker; after five times it becomes a dead letter."""

    predictor: str = ""
    """A predictor of outputs: `tenant-classes` (the median of a tenant's like prompts), or
    module:name of a class or function that makes one (docs/operations.md); empty: none, the
    scheduler goes by the history."""
    predictor_timeout_s: float = Field(default=0.25, gt=0, le=10)
    """An answer that takes longer, on its way and in the predictor, is not given."""

    def database_path(self) -> str:
        """Where the history is kept, or :memory:."""
        if self.database:
            return (
                str(Path(self.database).expanduser()) if self.database[0] != ":" else self.database
            )
        state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
        return str(Path(state).expanduser() / "tranche" / "history.sqlite")
