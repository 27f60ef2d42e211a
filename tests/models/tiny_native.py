"""Tiny native multi-modal bases: random weights of the real classes, with real processors over a tokenizer made here."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import transformers
from PIL import Image

import tiny
from sartor.core.records import Example, Message, Part

# The form of published templates: content is a text or a list of parts
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE{% elif part.type == 'audio' %}AUDIO{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = {
    "vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "tie_word_embeddings": False, "bos_token_id": 0,
    "eos_token_id": 2, "pad_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14, "initializer_range": 0.2,
}  # fmt: skip


def tokenizer(*special: str, image: str = "", audio: str = "", **named: str) -> Any:
    """The tiny tokenizer with placeholders. named: tokens that a processor looks for on it (`boi_token`)."""
    made = tiny.tokenizer(TEMPLATE.replace("IMAGE", image).replace("AUDIO", audio))
    made.add_special_tokens({"additional_special_tokens": [*special, *named.values()]})
    for name, token in named.items():
        setattr(made, name, token)
        setattr(made, f"{name}_id", made.convert_tokens_to_ids(token))
    return made


def llava() -> tuple[Any, Any]:
    coded = tokenizer("<image>", image="<image>\n")
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(**VISION),
        image_token_index=coded.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    pictures = transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = transformers.LlavaProcessor(
        pictures, coded, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=coded.chat_template,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config), processor


MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {"llava": llava}


def write(name: str, folder: Path) -> Path:
    """One of MODELS as a directory in transformers' layout."""
    torch.manual_seed(0)
    model, processor = MODELS[name]()
    model.eval().save_pretrained(str(folder))
    processor.save_pretrained(str(folder))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# tiny\n")
    return folder


def picture(seed: int, width: int = 40, height: int = 28) -> bytes:
    """A PNG of noise."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def sound(seed: int, seconds: float = 0.6) -> bytes:
    """A WAV of noise at 16 kHz."""
    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(seed).normal(0, 0.1, int(16000 * seconds)), 16000, format="WAV")
    return file.getvalue()


def part(kind: str, seed: int, **how: Any) -> Part:
    content = picture(seed, **how) if kind == "image" else sound(seed, **how)
    name = "image/png" if kind == "image" else "audio/wav"
    return Part(kind, media=f"data:{name};base64," + base64.b64encode(content).decode())  # type: ignore[arg-type]


def row(*parts: Part | str, reply: str = "the sky is blue") -> Example:
    content = tuple(Part("text", one) if isinstance(one, str) else one for one in parts)
    return Example((Message("user", content), Message.of("assistant", reply)), ())
