"""The engines under test: what each is called, which form it runs here, and what it promises.

`TRANCHE_TEST_ENGINES` names the engines of a run (comma-separated): those with heavy libraries are
tested in environments of their own.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from services.worker.engines.api import Engine
from services.worker.engines.registry import engine_maker
from services.worker.settings import WorkerSettings
from shared.messages import Form
from tests.worker.conftest import DEVICE, simulated

NAMES = os.environ.get("TRANCHE_TEST_ENGINES", "padded,paged,simulated").split(",")


@dataclass(frozen=True)
class Subject:
    """An engine in one of its forms."""

    name: str
    form: Form
    real_text: bool = True
    """Its tokens are those of a model."""
    stepwise: bool = True
    """A step is one iteration: everybody who runs gets a token in it."""
    sets_aside: bool = True
    """KV of a whole lease counts as used from the lease's beginning."""
    keeps: bool = False
    """It is expensive to make: tests share it."""
    families: tuple[str, ...] | None = None
    """Shapes of models that it runs; None: all."""

    @property
    def id(self) -> str:
        return f"{self.name}-{self.form}"


SUBJECTS = (
    Subject("padded", "closed"),
    Subject("paged", "leased"),
    Subject("simulated", "closed", real_text=False, stepwise=False),
    Subject("simulated", "leased", real_text=False, stepwise=False, sets_aside=False),
    Subject(
        "vllm",
        "leased",
        stepwise=False,
        keeps=True,
        families=("llama", "qwen3", "mistral", "gemma", "gemma3", "gpt2"),
    ),
)
assert set(NAMES) <= {subject.name for subject in SUBJECTS}, f"no such engines: {NAMES}"


def subjects(**wanted: Any) -> list[Any]:
    """Parameters of a fixture: those engines of this run that are so."""
    return [
        pytest.param(subject, id=subject.id)
        for subject in SUBJECTS
        if subject.name in NAMES
        and all(getattr(subject, name) == value for name, value in wanted.items())
    ]


class Kit:
    """Makes engines of one subject."""

    kept: ClassVar[dict[tuple[Any, ...], list[Engine]]] = {}
    """Of subjects whose engines tests share, by settings: those that no test has now."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._made: list[tuple[tuple[Any, ...], Engine]] = []

    def make(self, folder: Path, **settings: Any) -> Engine:
        """An engine with the model of this folder, and other settings by name."""
        subject = self.subject
        if subject.families is not None and folder.name not in subject.families:
            pytest.skip(f"{subject.name} is not tried with {folder.name}")
        key = (subject.name, folder, *sorted(settings.items()))
        kept = self.kept.get(key)
        engine = kept.pop() if kept else self._new(folder, settings)
        self._made.append((key, engine))
        assert subject.form in engine.info.forms
        return engine

    def close(self) -> None:
        """Close what was made; a shared engine is kept if it is as if it were new."""
        for key, engine in self._made:
            if self.subject.keeps and not engine.busy and not engine.memory().kv_tokens_used:
                self.kept.setdefault(key, []).append(engine)
            else:
                engine.close()

    def _new(self, folder: Path, settings: dict[str, Any]) -> Engine:
        if self.subject.name == "simulated":
            return simulated(folder, **settings)
        defaults = {"kv_tokens": 8_000, "torch_threads": 1, "device": DEVICE}
        loaded = WorkerSettings(
            model=str(folder), engine=self.subject.name, **{**defaults, **settings}
        )
        return engine_maker(self.subject.name)(loaded)
