"""Which network runs a model: the fastest whose logits are those of the untouched model."""

import structlog
import torch
from torch import Tensor

from services.worker.models import LoadedModel, ModelError
from services.worker.paged.attention import make_attention
from services.worker.paged.cache import KvCache
from services.worker.paged.iteration import Ints, Part, lay_out
from services.worker.paged.network import (
    CHECK_TOKENS,
    TOLERANCE,
    Network,
    TransformersNetwork,
    check_prompt,
    is_capped,
    largest_error,
    reference_logits,
)

CHECK_BLOCK = 16
INT8_TOLERANCE = 0.25
"""Weights of 8 bits are another model; this only tells that it is no nonsense."""


def make_network(model: LoadedModel, *, int8: bool = False, fuse: bool = True) -> Network:
    """Raises ModelError if none agrees with the model."""
    if int8 and model.device.type != "cpu":
        raise ModelError("weights of int8 are for the CPU; use weights=auto")
    reference = reference_logits(model)
    tolerance = INT8_TOLERANCE if int8 else TOLERANCE.get(model.dtype, 1e-2)
    if fuse:
        fused = _fused(model, reference, tolerance, int8=int8)
        if fused is not None:
            return fused
    network = TransformersNetwork(model)
    if model.device.type == "cuda":
        graphed = _graphed(network, model, reference, tolerance)
        if graphed is not None:
            return graphed
    if model.device.type == "cpu":
        from services.worker.paged.linears import pack_layers

        pack_layers(model.network, int8=int8)
    error = check(network, model, reference)
    if error > tolerance:
        raise ModelError(
            f"{type(model.network).__name__} makes other logits on paged KV (off by {error:.1e} of "
            "the largest); use --engine padded"
        )
    return network


def _graphed(
    network: TransformersNetwork, model: LoadedModel, reference: Tensor, tolerance: float
) -> Network | None:
    from services.worker.paged.graphs import GraphedNetwork

    graphed = GraphedNetwork(network, model.context_tokens_max)
    try:
        off = check(graphed, model, reference)
    except RuntimeError as error:
        structlog.get_logger().warning("paged.no_graphs", reason=str(error))
        return None
    if off > tolerance:
        structlog.get_logger().warning(
            "paged.no_graphs", reason=f"logits are off by {off:.1e} of the largest"
        )
        return None
    return graphed if graphed.recorded else None


def _fused(
    model: LoadedModel, reference: Tensor, tolerance: float, *, int8: bool
) -> Network | None:
    from services.worker.paged.fused import FusedNetwork, Unfit

    log = structlog.get_logger()
    try:
        fused = FusedNetwork(model, int8=int8)
    except (Unfit, AttributeError) as error:
        log.debug("paged.not_fused", reason=str(error))
        return None
    off = check(fused, model, reference)
    if off > tolerance:
        log.warning("paged.not_fused", reason=f"logits are off by {off:.1e} of the largest")
        return None
    fused.strip(model)
    return fused


@torch.inference_mode()
def check(network: Network, model: LoadedModel, reference: Tensor) -> float:
    """The largest difference from the reference's logits, over their largest magnitude: of a
    prompt that is computed as a chunk, a short chunk, and single rows."""
    blocks = -(-CHECK_TOKENS // CHECK_BLOCK)
    cache = KvCache(
        model.kv_shapes, model.dtype, model.device, blocks=blocks, block_tokens=CHECK_BLOCK
    )
    attention = make_attention(cache, 1, capped=is_capped(model))
    tables: Ints = torch.randperm(blocks, generator=torch.Generator().manual_seed(1)).int().numpy()
    ids = check_prompt(model.vocabulary_size)
    worst, begin = 0.0, 0
    for rows in (CHECK_TOKENS - 10, 7, 1, 1, 1):
        part = Part(0, ids[begin : begin + rows], begin + rows, rows)
        logits = network.forward(lay_out([part], tables[None], CHECK_BLOCK), attention)
        worst = max(worst, largest_error(logits, reference[begin : begin + rows]))
        begin += rows
    return worst
