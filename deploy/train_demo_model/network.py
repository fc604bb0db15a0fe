"""Owns the network: the Llama configuration, its training-time dropout and how it is saved."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from .vocabulary import CONTEXT_TOKENS, END_ID, PAD_ID, SPEECH_ID, VOCABULARY_SIZE


def build_network(seed: int) -> LlamaForCausalLM:
    """A fresh Llama of about 4 million parameters, float32, tied embeddings."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY_SIZE,
            hidden_size=256,
            intermediate_size=640,
            num_hidden_layers=5,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=CONTEXT_TOKENS,
            tie_word_embeddings=True,
            bos_token_id=SPEECH_ID,
            eos_token_id=END_ID,
            pad_token_id=PAD_ID,
        )
    )


def add_dropout(network: LlamaForCausalLM, share: float) -> None:
    """Drop `share` of the embedding and of each block's residual updates while training."""

    def drop(module: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (drop(module, _inputs, output[0]), *output[1:])
        return nn.functional.dropout(output, share, module.training)

    network.model.embed_tokens.register_forward_hook(drop)
    for layer in network.model.layers:
        layer.self_attn.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)


def name_tokenizer_class(path: Path) -> None:
    """Name the fast tokenizer by the class that every transformers release knows."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def save_network(
    network: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    """Write weights (bfloat16 safetensors), configs and tokenizer; each file swaps in whole."""
    frozen = LlamaForCausalLM(copy.deepcopy(network.config)).to(torch.bfloat16)
    frozen.load_state_dict(network.state_dict())
    frozen.generation_config = GenerationConfig(
        bos_token_id=SPEECH_ID, eos_token_id=END_ID, pad_token_id=PAD_ID
    )
    logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as fresh:
        frozen.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        name_tokenizer_class(Path(fresh) / "tokenizer_config.json")
        for path in Path(fresh).iterdir():
            path.chmod(0o644)
            path.replace(folder / path.name)
