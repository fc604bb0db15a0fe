"""Models of Llama's shape on a CPU: few large products and compiled kernels, no small operations.

One packed product for queries, keys and values, one for gate and up; norms, rotary embedding and
activation are kernels of their own. transformers' modules do the same in some forty operations a
layer, which cost as much as the products where a batch is small. On one core, where products need
nothing of PyTorch's, still fewer calls do it (`compiled.py`). Whether a model has this shape is not
believed but tried: the engine compares logits with the untouched model's at the load.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from services.worker.models import LoadedModel
from services.worker.paged import kernels
from services.worker.paged.attention import Attention, KernelAttention, Rotation
from services.worker.paged.compiled import CompiledLayers, LayerArrays, Widths
from services.worker.paged.iteration import Ints, Iteration
from services.worker.paged.linears import (
    TILED_ROWS_MAX,
    Arena,
    Arrays,
    Fast,
    Int8Linear,
    TiledLinear,
    both_fit,
    can_pack,
    pack,
)

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose angles depend on the position alone."""


class Unfit(Exception):
    """The model has another shape; the text says what differs."""


class _Layer:
    """Weights of one decoder layer."""

    def __init__(self, layer: Any, angles: tuple[Any, Any], packing: "_Packing") -> None:
        attention, mlp = layer.self_attn, layer.mlp
        # In the order in which they are read.
        self.qkv = packing.joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = packing.joined(attention.o_proj)
        self.gate_up = packing.joined(mlp.gate_proj, mlp.up_proj)
        self.down = packing.joined(mlp.down_proj)
        self.norm_in, self.eps = _norm(layer.input_layernorm)
        self.norm_mlp, _ = _norm(layer.post_attention_layernorm)
        self.scale = float(attention.scaling)
        # Mistral's layers have no window of their own: all look back as far as the config says.
        of_model = getattr(attention.config, "sliding_window", None)
        self.window = int(getattr(attention, "sliding_window", of_model) or 0)
        q_norm = getattr(attention, "q_norm", None)
        k_norm = getattr(attention, "k_norm", None)
        none = np.empty(0, np.float32)
        self.rotation = Rotation(
            q_norm=none if q_norm is None else _norm(q_norm)[0],
            k_norm=none if k_norm is None else _norm(k_norm)[0],
            eps=self.eps,
            cos=angles[0],
            sin=angles[1],
        )

    def arrays(self) -> LayerArrays | None:
        """For few rows; None where a product has no plain form."""
        found = [_arrays(one) for one in (self.qkv, self.out, self.gate_up, self.down)]
        qkv, out, gate_up, down = found
        if qkv is None or out is None or gate_up is None or down is None:
            return None
        return LayerArrays(
            qkv=qkv,
            out=out,
            gate_up=gate_up,
            down=down,
            norm_in=self.norm_in,
            norm_mlp=self.norm_mlp,
            rotation=self.rotation,
            eps=self.eps,
            scale=self.scale,
            window=self.window,
        )


class FusedNetwork:
    """See the module's text."""

    kind = "fused"

    def __init__(self, model: LoadedModel, *, int8: bool = False) -> None:
        """Raises Unfit. The model's own linear layers are left as they are; `strip` frees them."""
        network = model.network
        config = network.config
        if config.model_type not in MODEL_TYPES:
            raise Unfit(f"model type {config.model_type}")
        if config.hidden_act != "silu":
            raise Unfit(f"activation {config.hidden_act}")
        if any(shape.key_size != shape.value_size for shape in model.kv_shapes):
            raise Unfit("keys and values of different sizes")
        body = network.model
        if not can_pack(network.lm_head.weight):
            raise Unfit(f"{model.dtype} on {model.device}")
        self._heads = config.num_attention_heads
        packing = _Packing(network, int8=int8)
        self._embedding = body.embed_tokens.weight.detach()
        angles = _angles(body.rotary_emb, config, model.context_tokens_max)
        self._layers = [_Layer(layer, angles, packing) for layer in body.layers]
        self._norm, self._eps = _norm(body.norm)
        self._head = packing.joined(network.lm_head)
        self._compiled = self._compile()

    def strip(self, model: LoadedModel) -> None:
        """Free what the untouched model holds twice."""
        for module in model.network.modules():
            if isinstance(module, nn.Linear):
                module.weight, module.bias = None, None  # type: ignore[assignment]

    def forward(self, iteration: Iteration, attention: Attention) -> Tensor:
        """See Network."""
        assert isinstance(attention, KernelAttention)
        if self._compiled is not None and len(iteration.ids) <= self._compiled_rows_max:
            return self._compiled.forward(iteration, attention, _only(iteration))
        attention.begin(iteration)
        ids = torch.from_numpy(iteration.ids)
        x = self._embedding[ids].float()
        h = torch.empty_like(x)
        last = len(self._layers) - 1
        kernels.normalize(x.numpy(), self._layers[0].norm_in, self._layers[0].eps, h.numpy())
        for index, layer in enumerate(self._layers):
            qkv = layer.qkv.wide(h)
            only = _only(iteration) if index == last else None
            found = attention.attend_joined(
                index, qkv, self._heads, layer.rotation, layer.scale, layer.window, only
            )
            if only is not None:
                x = x[torch.from_numpy(only)]
                h = torch.empty_like(x)
            mixed = layer.out.wide(found.flatten(1))
            kernels.add_and_normalize(
                x.numpy(), mixed.numpy(), layer.norm_mlp, layer.eps, h.numpy()
            )
            both = layer.gate_up.wide(h)
            inner = torch.empty((len(x), both.shape[1] // 2))
            kernels.gate(both.numpy(), inner.numpy())
            made = layer.down.wide(inner)
            following = self._layers[index + 1].norm_in if index < last else self._norm
            kernels.add_and_normalize(x.numpy(), made.numpy(), following, layer.eps, h.numpy())
        return self._head.wide(h if only is not None else h[torch.from_numpy(iteration.wanted)])

    def _compile(self) -> CompiledLayers | None:
        """None where products go through oneDNN alone."""
        head, first = _arrays(self._head), self._layers[0]
        layers = [layer.arrays() for layer in self._layers]
        found = [layer for layer in layers if layer is not None]
        if head is None or len(found) < len(layers):
            return None
        widths = Widths(
            hidden=self._embedding.shape[1],
            heads=self._heads,
            found=first.out.in_features,
            qkv=first.qkv.out_features,
            gate_up=first.gate_up.out_features,
            vocabulary=self._head.out_features,
        )
        return CompiledLayers(found, self._norm, head, self._embedding, widths)

    @property
    def _compiled_rows_max(self) -> int:
        """With bfloat16 many rows go through oneDNN."""
        return 1 << 30 if isinstance(self._head, TiledLinear) else TILED_ROWS_MAX


def _only(iteration: Iteration) -> Ints | None:
    """The rows that the last layer is wanted of; its keys and values are wanted of all. None: of so
    many that a chunk's products are the better way."""
    few = 2 * len(iteration.wanted) <= len(iteration.ids)
    return iteration.wanted if few else None


class _Packing:
    """Makes the fast forms of linear layers; panels lie in one piece, in the order of making."""

    def __init__(self, network: nn.Module, *, int8: bool) -> None:
        self._int8, self._both = int8, both_fit(network)
        self._arena = None if int8 or torch.get_num_threads() > 1 else Arena(network)

    def joined(self, *linears: Any) -> Fast:
        """Of layers with the same input, one. Raises Unfit."""
        if any(type(linear) is not nn.Linear for linear in linears):
            raise Unfit(f"{type(linears[0]).__name__} in the place of a linear layer")
        weight = torch.cat([linear.weight.detach() for linear in linears])
        biases = [linear.bias for linear in linears]
        bias = None
        if any(bias is not None for bias in biases):
            bias = torch.cat(
                [
                    weight.new_zeros(one.out_features) if one.bias is None else one.bias.detach()
                    for one in linears
                ]
            )
        return pack(weight, bias, int8=self._int8, both=self._both, arena=self._arena)


def _arrays(linear: Fast) -> Arrays | None:
    return None if isinstance(linear, Int8Linear) else linear.arrays


def _norm(module: Any) -> tuple[Any, Any]:
    if not type(module).__name__.endswith("RMSNorm") or "Gemma" in type(module).__name__:
        raise Unfit(f"norm {type(module).__name__}")
    return module.weight.detach().float().numpy().copy(), np.float32(module.variance_epsilon)


def _angles(rotary: Any, config: Any, positions: int) -> tuple[Any, Any]:
    kind = getattr(rotary, "rope_type", "default")
    if kind not in STATIC_ROPE:
        raise Unfit(f"rotary embedding {kind}")
    probe = torch.zeros((1, 1, 1))
    cos, sin = rotary(probe, torch.arange(positions)[None])
    return cos[0].float().contiguous().numpy(), sin[0].float().contiguous().numpy()
