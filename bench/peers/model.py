"""`python -m bench.peers.model`: makes the model that all systems of a comparison serve.

Llama's shape, 28.8 million random float32 weights from a fixed seed, and a byte-level BPE tokenizer
learnt from the two plays in deploy/demo_text. The output layer can only choose tokens of one space
and letters: greedy decoding never ends early, and the number of tokens in any piece of an answer is
the number of its spaces, however a server cuts its stream.
"""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import typer

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "peers"
TEXT = ROOT / "deploy" / "demo_text"
NAME = "peers-29m"
RECIPE = 1
"""Raised when what is made changes; an older folder is made anew."""

VOCABULARY = 8192
CONTEXT_TOKENS = 4096
END = "<|end|>"
COUNTABLE = re.compile(r"Ġ[A-Za-z]+")
"""Tokens that may be chosen, as the vocabulary spells them (a space is written Ġ)."""
SEED = 20_240_607


def model_folder(cache: Path = CACHE) -> Path:
    """The model's folder; made now unless it is there already."""
    folder = cache / f"{NAME}-{RECIPE}"
    if not (folder / "config.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as fresh:
            _make(Path(fresh) / NAME)
            (Path(fresh) / NAME).rename(folder)
    return folder


def countable_ids(vocabulary: dict[str, int]) -> list[int]:
    """Ids of the tokens that are one space and ASCII letters, in order."""
    return sorted(number for token, number in vocabulary.items() if COUNTABLE.fullmatch(token))


def _make(folder: Path) -> None:
    tokenizer = _tokenizer()
    network = _network(countable_ids(tokenizer.get_vocab()), tokenizer.eos_token_id)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # The one class name that every release of transformers, and llama.cpp's converter, know.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(
        (path.read_text(encoding="utf-8") for path in sorted(TEXT.glob("*.txt"))), trainer
    )
    assert bpe.get_vocab_size() == VOCABULARY, "the text is too short for so many tokens"
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        bos_token=END,
        pad_token=END,
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def _network(choosable: list[int], end_id: int) -> Any:
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=512,
            intermediate_size=1152,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=CONTEXT_TOKENS,
            tie_word_embeddings=False,
            bos_token_id=end_id,
            eos_token_id=end_id,
            pad_token_id=end_id,
        )
    ).to(torch.float32)
    with torch.no_grad():
        # Larger than the usual 0.02, so that attention and layers change which token is next.
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
        kept = torch.zeros(VOCABULARY, 1)
        kept[choosable] = 1.0
        network.lm_head.weight.mul_(kept)
    network.generation_config = GenerationConfig(bos_token_id=end_id, eos_token_id=end_id)
    return network


def main() -> None:
    """Make the model and print its folder."""
    typer.echo(model_folder())


if __name__ == "__main__":
    typer.run(main)
