"""Engines by name, and the forms of slices that each runs. Each is imported only when it is asked
for: their libraries are heavy."""

import os
from collections.abc import Callable

from services.worker.engines.api import Engine
from services.worker.settings import WorkerSettings
from shared.config import SetupError
from shared.messages import Form


class UnknownEngine(SetupError):
    """No engine has this name."""


def _padded(settings: WorkerSettings) -> Engine:
    from services.worker.engines.padded import make_padded

    return make_padded(settings)


def _simulated(settings: WorkerSettings) -> Engine:
    from services.worker.engines.simulated import make_simulated

    return make_simulated(settings)


def _paged(settings: WorkerSettings) -> Engine:
    # Read by PyTorch at its first allocation: weights and KV in pages of 2 MiB, a fifth faster.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from services.worker.engines.paged import make_paged

    return make_paged(settings)


def _vllm(settings: WorkerSettings) -> Engine:
    from services.worker.engines.vllm import make_vllm

    return make_vllm(settings)


ENGINES: dict[str, Callable[[WorkerSettings], Engine]] = {
    "padded": _padded,
    "paged": _paged,
    "simulated": _simulated,
    "vllm": _vllm,
}
FORMS: dict[str, tuple[Form, ...]] = {
    "padded": ("closed",),
    "paged": ("leased",),
    "simulated": ("closed", "leased"),
    "vllm": ("leased",),
}
"""What each engine's `info.forms` will be, to be known before a model is loaded."""


def engine_maker(name: str) -> Callable[[WorkerSettings], Engine]:
    """What makes the engine. Raises UnknownEngine."""
    if name not in ENGINES:
        raise UnknownEngine(f"there is no engine {name!r}; choose one of: {', '.join(ENGINES)}")
    return ENGINES[name]
