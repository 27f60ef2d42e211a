"""A base as a GGUF file for llama.cpp: the one that is given, or one that is made once; and whether it is that base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from filelock import FileLock

from sartor.core import model_refs
from sartor.core.errors import ModelError
from sartor.core.gguf_header import read_head
from sartor.core.home import folder
from sartor.models import gguf_writer
from sartor.models.base import open_base
from sartor.models.chat import Chat
from sartor.models.engine.inner import Inner

_PROBE = "Turn on the light, please: 21 °C!\n"


@dataclass(frozen=True)
class BaseFile:
    """A base as a GGUF file. shapes: axes of its tensors by name, the inner one first as GGUF has them."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    stored: str

    def check_adapter(self, file: Path) -> None:
        """Raises ModelError unless every factor in a GGUF adapter fits a tensor: the server would not start with it."""
        for name, shape in _shapes(file).items():
            tensor, _, side = name.rpartition(".lora_")
            axes = self.shapes.get(tensor, ())
            if not axes or shape[side == "b"] != axes[side == "b"]:
                raise ModelError(
                    f"the adapter's {name} has the axes {shape}, and the base's {tensor} has {axes or 'no place'}",
                    "use the base that the adapter was tuned on",
                )


def open_base_file(path: Path, config: Mapping[str, Any]) -> BaseFile:
    """A GGUF file that is said to be a base's. Raises ModelError where it is not whole, or its sizes are not in `config`."""
    head = read_head(path)
    kind = str(head.metadata.get("general.architecture", ""))
    for key, option in (("block_count", "num_hidden_layers"), ("embedding_length", "hidden_size")):
        if (found := head.metadata.get(f"{kind}.{key}")) != config.get(option):
            raise ModelError(
                f"{path} has {kind}.{key} {found}, and the base has {option} {config.get(option)}",
                "engine.gguf: a file of this base",
            )
    names = {int(kind): kind.name.removeprefix("MOSTLY_").lower() for kind in gguf.LlamaFileType}
    return BaseFile(path, _shapes(path), names.get(head.metadata.get("general.file_type", -1), ""))


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tuple(int(axis) for axis in tensor.shape) for tensor in gguf.GGUFReader(file).tensors}


def f16_file(ref: model_refs.BaseRef) -> Path:
    """A base in F16, written once under SARTOR_HOME/bases; two processes at once: the second waits for the first.

    Raises ModelError for a base of which llama.cpp knows no form.
    """
    file = folder("bases") / f"{ref.path.name}-{ref.digest[:12]}.f16.gguf"
    with FileLock(file.with_suffix(".wait")):
        if not file.is_file():
            opened = open_base(ref.name, bits=32, device=torch.device("cpu"))
            rows = opened.model.get_input_embeddings().weight.shape[0]
            about = gguf_writer.About(ref.path.name, ref.digest[:12], ref.licence, opened.chat.template)
            gguf_writer.write_model_gguf(opened.model, gguf_writer.from_chat(opened.chat, rows), about, file)
    return file


def check_tokens(inner: Inner, chat: Chat) -> None:
    """Raises ModelError unless token ids mean to the server what they mean to the base's own tokenizer."""
    ids = list(chat.tokenizer(_PROBE, add_special_tokens=False)["input_ids"])
    said = inner.ask("/detokenize", {"tokens": ids}).get("content")
    if str(said).strip() != _PROBE.strip():
        raise ModelError(
            f"the GGUF file's tokenizer reads {said!r} where the base's wrote {_PROBE!r}", "engine.gguf: a file of this base"
        )
