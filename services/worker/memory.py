"""Memory of the worker's device: how much there is, is free, and may hold KV."""

from pathlib import Path

import torch

from services.worker.models import LoadedModel, ModelError
from services.worker.settings import WorkerSettings

SHARE_CUDA = 0.85
SHARE_CPU = 0.2
_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def device_memory(device: torch.device) -> tuple[int, int]:
    """(free, total) bytes. On a CPU: available RAM, within the control group's limit."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(free), int(total)
    free, total = _machine_memory()
    limit, used = _control_group()
    if limit is not None and limit < total:
        return max(0, min(free, limit - used)), limit
    return free, total


def kv_capacity_tokens(settings: WorkerSettings, model: LoadedModel) -> int:
    """How many tokens of KV this worker may hold. Raises ModelError if it is too little."""
    tokens = settings.kv_tokens
    if not tokens:
        free, _ = device_memory(model.device)
        default = SHARE_CUDA if model.device.type == "cuda" else SHARE_CPU
        share = settings.kv_memory_share or default
        tokens = int(free * share) // model.kv_bytes_per_token
    if tokens < 2:
        raise ModelError(
            "there is no memory left for the KV cache; set kv_tokens or kv_memory_share, or use a "
            "smaller model"
        )
    return tokens


def _machine_memory() -> tuple[int, int]:
    """From /proc/meminfo; zeros where there is none (then kv_tokens must be set)."""
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return 0, 0
    fields = {line.split(":")[0]: line.split() for line in lines}
    return int(fields["MemAvailable"][1]) * 1024, int(fields["MemTotal"][1]) * 1024


def _control_group() -> tuple[int | None, int]:
    """(limit, used) bytes of the container, if it has a limit (control groups v2)."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        cache = _reclaimable()
    except (OSError, ValueError):
        return None, 0
    return (None, 0) if limit == "max" else (int(limit), max(0, used - cache))


def _reclaimable() -> int:
    """File cache that the kernel gives back when memory is wanted."""
    for line in (_CGROUP / "memory.stat").read_text().splitlines():
        name, _, value = line.partition(" ")
        if name == "inactive_file":
            return int(value)
    return 0
