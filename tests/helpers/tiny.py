"""A tiny base of the real architecture with a tiny tokenizer, made here: 2 layers, width 32, seeded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = [
    "what colour is the sky",
    "the sky is blue",
    "turn on the kitchen light",
    '{"intent":"HassTurnOn","area":"kitchen"}',
] * 8
SIZE = 320
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def tokenizer(
    template: str | None = CHATML,
    *,
    eos: str = "<|im_end|>",
    pad: str | None = "<|im_end|>",
    texts: list[str] = TEXT,
    size: int = SIZE,
) -> Any:
    """A byte-level BPE of 320 tokens, of the words of `texts`; pad is eos on purpose, as many published ones have it."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=eos, pad_token=pad, bos_token="<|endoftext|>")
    fast.chat_template = template
    return fast


def model(**changes: Any) -> Any:
    """A Llama with random weights, the same in every run."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def write_base(path: Path, template: str | None = CHATML, texts: list[str] = TEXT, **changes: Any) -> Path:
    """The tiny base as a directory in transformers' layout, with a model card that states its licence.

    texts: what its tokenizer is made of; changes: of the model's settings.
    """
    model(**changes).save_pretrained(str(path))
    tokenizer(template, texts=texts, size=changes.get("vocab_size", SIZE)).save_pretrained(str(path))
    (path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# tiny\n")
    return path
