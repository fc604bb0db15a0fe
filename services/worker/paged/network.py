"""The model's forward over one iteration's rows: transformers' own modules, or fused ones.

Every decoder whose attention goes through transformers' attention interface runs here: a function
of ours is registered there, which finds KV through the attention module's layer. On a CPU its
linear layers are packed; models of Llama's shape are run by `FusedNetwork` instead. Both are
checked at the load: their logits must be those of the untouched model, or they are not used.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface

from services.worker.models import LoadedModel, ModelError
from services.worker.paged.attention import Attention
from services.worker.paged.iteration import Iteration

ATTENTION_NAME = "tranche_paged"
CHECK_TOKENS = 40
"""Of the prompt that is computed both ways at the load: more than a chunk, less than a second."""
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 8e-2, torch.float16: 2e-2}
"""Largest difference of logits over their largest magnitude."""


class Network(Protocol):
    """What the engine runs."""

    kind: str

    def forward(self, iteration: Iteration, attention: Attention) -> Tensor:
        """Logits [wanted rows, vocabulary] of one iteration; KV is written through `attention`."""


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface. query: [1, heads, rows, size]."""
    found = module.tranche_attention[0].attend(
        module.layer_idx,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window or 0,
        cap=softcap or 0.0,
    )
    return found.unsqueeze(0), None


AttentionInterface.register(ATTENTION_NAME, _attend)


class TransformersNetwork:
    """The model as transformers has it, but for attention."""

    kind = "transformers"

    def __init__(self, model: LoadedModel) -> None:
        """Raises ModelError if the model does not let go of its attention."""
        self._network = model.network
        self._device = model.device
        self._keeps_logits = model.keeps_logits
        if not model.takes_positions:
            raise ModelError(
                f"{type(model.network).__name__} takes no positions; use --engine padded"
            )
        try:
            self._network.set_attn_implementation(ATTENTION_NAME)
        except (ValueError, RuntimeError, KeyError) as error:
            raise ModelError(
                f"{type(self._network).__name__} does not support transformers' attention "
                f"interface ({error}); use --engine padded"
            ) from error
        self._slot: list[Attention | None] = [None]
        layers = [m for m in self._network.modules() if hasattr(m, "layer_idx")]
        for module in layers:
            module.tranche_attention = self._slot
        if not layers:
            raise ModelError(
                f"{type(self._network).__name__} does not number its layers; use --engine padded"
            )

    def forward(self, iteration: Iteration, attention: Attention) -> Tensor:
        """See Network."""
        attention.begin(iteration)
        ids = torch.from_numpy(iteration.ids).to(self._device)
        positions = torch.from_numpy(iteration.positions).to(self._device)
        wanted = torch.from_numpy(iteration.wanted).to(self._device)
        if self._keeps_logits:
            return self.run(ids, positions, attention, logits_to_keep=wanted)
        return self.run(ids, positions, attention)[wanted]

    def run(
        self, ids: Tensor, positions: Tensor, attention: Attention, **options: Tensor
    ) -> Tensor:
        """Logits [rows, vocabulary] of ids and positions [rows] on the device, with an attention
        that knows the iteration already."""
        self._slot[0] = attention
        logits: Tensor = self._network(
            input_ids=ids[None], position_ids=positions[None], use_cache=False, **options
        ).logits[0]
        return logits


def is_capped(model: LoadedModel) -> bool:
    """Whether its attention scores have a softcap, which not every attention knows."""
    config = model.network.config.get_text_config()
    return bool(getattr(config, "attn_logit_softcapping", None))


def check_prompt(vocabulary: int) -> list[int]:
    """Token ids of every part of the vocabulary."""
    return [(7 + 7919 * i) % vocabulary for i in range(CHECK_TOKENS)]


@torch.inference_mode()
def reference_logits(model: LoadedModel) -> Tensor:
    """What the untouched model says after each token of the check prompt: [tokens, vocabulary]."""
    ids = torch.tensor([check_prompt(model.vocabulary_size)], device=model.device)
    logits: Tensor = model.network(input_ids=ids, use_cache=False).logits[0]
    return logits.float().cpu()


def largest_error(found: Tensor, reference: Tensor) -> float:
    """Over the reference's largest magnitude."""
    size = float(reference.abs().max()) or 1.0
    error = float((found.float().cpu() - reference).abs().max()) / size
    return error if error == error else float("inf")
