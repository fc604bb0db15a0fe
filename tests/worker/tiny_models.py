"""Tiny random models of several families, with a byte-level tokenizer, written to a folder.

Their weights are random but fixed by a seed. The end token is one of the vocabulary, so that greedy
and sampled outputs of some prompts end by themselves.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 264
"""256 bytes and 8 special tokens."""
PAD, BEGIN, END = 256, 257, 258
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
_SPECIAL = {"pad_token_id": PAD, "bos_token_id": BEGIN, "eos_token_id": END}
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,
    **_SPECIAL,
}


def tiny_llama(folder: Path, *, seed: int = 0) -> Path:
    """A Llama with 2 layers, 4 heads of 32 and 2 KV heads; vocabulary 264, context 512. Heads of
    32 are the smallest that all engines take."""
    return _write(folder, LlamaConfig(**_SHAPE, head_dim=32, tie_word_embeddings=False), seed)


def tiny_qwen2(folder: Path, *, seed: int = 0) -> Path:
    """A Qwen2: biased projections, heads of 16."""
    return _write(folder, Qwen2Config(**_SHAPE, tie_word_embeddings=True), seed)


def tiny_qwen3(folder: Path, *, seed: int = 0) -> Path:
    """A Qwen3: queries and keys are normed."""
    return _write(folder, Qwen3Config(**_SHAPE, head_dim=32, tie_word_embeddings=True), seed)


def tiny_mistral(folder: Path, *, seed: int = 0, window: int = 24) -> Path:
    """A Mistral whose layers all look back 24 tokens only."""
    return _write(folder, MistralConfig(**_SHAPE, sliding_window=window, head_dim=32), seed)


def tiny_gemma(folder: Path, *, seed: int = 0) -> Path:
    """A Gemma: head size is not hidden size over heads; scaled embeddings."""
    return _write(folder, GemmaConfig(**_SHAPE, head_dim=32, tie_word_embeddings=False), seed)


def tiny_gemma2(folder: Path, *, seed: int = 0) -> Path:
    """A Gemma 2: soft caps, and every other layer looks back 24 tokens only."""
    return _write(
        folder,
        Gemma2Config(**_SHAPE, head_dim=32, sliding_window=24, tie_word_embeddings=False),
        seed,
    )


def tiny_gemma3(folder: Path, *, seed: int = 0) -> Path:
    """A Gemma 3: its layers turn positions at different rates; one looks back 24 tokens only."""
    config = Gemma3TextConfig(
        **_SHAPE,
        head_dim=32,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention"],
        tie_word_embeddings=False,
    )
    return _write(folder, config, seed)


def tiny_gpt2(folder: Path, *, seed: int = 0) -> Path:
    """A GPT-2: learned positions, as many KV heads as heads, other names in its config."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=64,
        n_layer=2,
        n_head=2,
        n_positions=512,
        initializer_range=0.25,
        **_SPECIAL,
    )
    return _write(folder, config, seed)


FAMILIES: dict[str, Callable[..., Path]] = {
    "llama": tiny_llama,
    "qwen2": tiny_qwen2,
    "qwen3": tiny_qwen3,
    "mistral": tiny_mistral,
    "gemma": tiny_gemma,
    "gemma2": tiny_gemma2,
    "gemma3": tiny_gemma3,
    "gpt2": tiny_gpt2,
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte; it adds the begin token."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {letter: index for index, letter in enumerate(sorted(alphabet))}
    names = ["<pad>", "<begin>", "<end>", *(f"<spare{n}>" for n in range(5))]
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.add_special_tokens(names)
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<begin>",
        eos_token="<end>",
        add_bos_token=True,
        chat_template=CHAT_TEMPLATE,
    )


def _write(folder: Path, config: PreTrainedConfig, seed: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer = byte_tokenizer()
    assert len(tokenizer) == VOCABULARY
    tokenizer.save_pretrained(folder)
    return folder
