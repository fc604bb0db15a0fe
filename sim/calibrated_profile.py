"""A cost profile from calibration cells: the fit, the memory, and where both come from."""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from shared.profiles import CostProfile, decode_profile
from sim.calibration import fit_cells
from sim.calibration_cells import Cell


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """What cells cannot say of themselves."""

    name: str
    model: str
    gpu: str
    tp: int = 1
    kv_tokens: int
    kv_block_tokens: int = 16
    kv_bytes_per_token: int = 0
    overhead_s: float = 0.0
    overhead_per_sequence_s: float = 0.0
    noise_cv: float | None = None
    """Measured; None: what the fit leaves open."""
    source: str = ""
    licence: str = ""
    notes: str = ""


def calibrated(cells: Sequence[Cell], described: Described, *, seed: int = 0) -> CostProfile:
    """Fit cells into a profile. Raises CalibrationError."""
    fit = fit_cells(cells, seed=seed)
    block = described.kv_block_tokens
    return CostProfile(
        name=described.name,
        model=described.model,
        gpu=described.gpu,
        tp=described.tp,
        kv_tokens=described.kv_tokens // block * block,
        kv_block_tokens=block,
        kv_bytes_per_token=described.kv_bytes_per_token,
        coefficients=fit.coefficients,
        overhead_s=described.overhead_s,
        overhead_per_sequence_s=described.overhead_per_sequence_s,
        noise_cv=fit.noise_cv if described.noise_cv is None else described.noise_cv,
        errors=fit.errors,
        valid=measured_range(cells),
        source=described.source,
        licence=described.licence,
        notes=described.notes,
    )


def measured_range(cells: Sequence[Cell]) -> dict[str, int]:
    """The largest of each axis that was measured."""
    contexts = [cell.kv_tokens // cell.decodes for cell in cells if cell.decodes]
    return {
        "decodes": max(cell.decodes for cell in cells),
        "iteration_tokens": max(cell.tokens for cell in cells),
        "kv_tokens": max(cell.memory_tokens for cell in cells),
        "context_tokens": max(contexts, default=0),
        "cells": len(cells),
    }


def profile_json(profile: CostProfile) -> bytes:
    """As it is shipped: indented, and known to be readable again."""
    text = msgspec.json.format(msgspec.json.encode(profile), indent=1) + b"\n"
    assert decode_profile(text, profile.name) == profile
    return text
