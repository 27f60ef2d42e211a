"""Tiny towers of the real architectures with random weights, in transformers' layout: a CLIP and a Whisper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import pre_tokenizers

from sartor.models import whisper_conversion
from sartor.models.loading import quiet_transformers

RATE = 16_000
WINDOW_S, HOP = 2, 160  # of the tiny Whisper
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**SMALL, "image_size": 32, "patch_size": 8}
CARD = "---\nlicense: mit\n---\n"


def save(path: Path, *parts: Any) -> Path:
    with quiet_transformers():
        for part in parts:
            part.save_pretrained(str(path))
    (path / "README.md").write_text(CARD)
    return path


def tiny_tokenizer() -> Any:
    letters = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    vocabulary = {token: n for n, token in enumerate([*sorted(letters), *special])}
    return transformers.WhisperTokenizer(vocab=vocabulary, merges=[])


def tiny_whisper(path: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    end, start, plain = (
        tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("endoftext", "startoftranscript", "notimestamps")
    )
    config = transformers.WhisperConfig(
        vocab_size=270,
        num_mel_bins=8,
        d_model=32,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=48,
        max_source_positions=WINDOW_S * RATE // HOP // 2,
        max_target_positions=16,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=start,
    )
    model = transformers.WhisperForConditionalGeneration(config)
    said = {"suppress_ids": [1, 2], "suppress_ids_begin": [end], "alignment_heads": [[0, 0]]}
    model.generation_config = whisper_conversion._generation(said, tokenizer, config)
    assert model.generation_config.no_timestamps_token_id == plain
    prepare = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=WINDOW_S)
    return save(path, model, tokenizer, prepare)


def tiny_clip(path: Path) -> Path:
    torch.manual_seed(0)
    text = {**SMALL, "vocab_size": 99, "num_hidden_layers": 1}
    config = transformers.CLIPConfig(vision_config=VISION, text_config=text)
    return save(path, transformers.CLIPModel(config), cropping(transformers.CLIPImageProcessor))


def cropping(kind: Any) -> Any:
    return kind(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})
