"""Owns the vocabulary: the byte-level BPE tokenizer, its special tokens and the chat template."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

PAD, SPEECH, END = "<|pad|>", "<|speech|>", "<|end|>"
PAD_ID, SPEECH_ID, END_ID = 0, 1, 2
VOCABULARY_SIZE = 2048
CONTEXT_TOKENS = 2048

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- bos_token -}}
    {%- if message['role'] in ['system', 'developer'] -%}
        {{- 'STAGE:\\n' -}}
    {%- endif -%}
    {{- message['content'] or '' -}}
    {{- eos_token -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- bos_token -}}
{%- endif -%}
"""


def train_bpe(texts: Iterable[str]) -> Tokenizer:
    """Learn the byte-level merges from the texts; any byte string stays encodable."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[PAD, SPEECH, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{SPEECH} $A",
        pair=f"{SPEECH} $A {SPEECH}:1 $B:1",
        special_tokens=[(SPEECH, SPEECH_ID)],
    )
    return bpe


def wrap_tokenizer(bpe: Tokenizer) -> PreTrainedTokenizerFast:
    """Give the BPE its named special tokens and the chat template, ready to be saved."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=SPEECH,
        eos_token=END,
        pad_token=PAD,
        model_max_length=CONTEXT_TOKENS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped
