"""Reader of the metadata header of a GGUF file.

Format: github.com/ggml-org/ggml, docs/gguf.md. Everything is little-endian: magic, version, number of tensors, number
of metadata pairs, the pairs, then for each tensor its name, shape, type and offset.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from sartor.core.errors import ModelError
from sartor.core.remedies import restore_command

MAGIC = b"GGUF"
F32, F16 = 0, 1
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_CHECKED = 1 << 16  # bytes; a longer part is compared with the size of the file first
_LONGEST = 1 << 26  # limit on bytes of a string and items of an array; no real file exceeds it


@dataclass(frozen=True)
class GgufHeader:
    """Header of a GGUF file.

    metadata: strings and numbers by key.
    matrices: ggml types of the tensors with two or more axes.
    arrays: the requested arrays, by key.
    tensor_count: number of tensors with any number of axes.
    """

    metadata: dict[str, Any]
    matrices: frozenset[int]
    arrays: dict[str, list[Any]] = field(default_factory=dict)
    tensor_count: int = 0

    @property
    def is_rounded(self) -> bool:
        """Whether no matrix is F16 or F32, so that bf16 is precise enough for the dequantised weights."""
        return not self.matrices & {F16, F32}


def is_gguf(file: Path) -> bool:
    """Return whether the file begins with the GGUF magic."""
    with file.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC


def read_head(file: Path, arrays: Collection[str] = ()) -> GgufHeader:
    """Return the header of `file`.

    arrays: keys of the arrays to keep.
    Raises ModelError if the file is truncated, of another version, or states impossible sizes.
    """
    try:
        with file.open("rb") as stream:
            return _head(stream, arrays)
    except (EOFError, ValueError, OverflowError, MemoryError, UnicodeDecodeError) as error:
        raise ModelError(f"{file} is no whole GGUF file: {error}", restore_command(file)) from None


def _head(stream: BinaryIO, arrays: Collection[str]) -> GgufHeader:
    if stream.read(len(MAGIC)) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = _number(stream, "I")
    if version not in (2, 3):
        raise ValueError(f"its version is {version}, and 2 and 3 are read")
    tensors, pairs = _number(stream, "Q"), _number(stream, "Q")
    metadata, selected_arrays = {}, {}
    for _ in range(pairs):
        key = _text(stream)
        value = _value(stream, _number(stream, "I"), keep=key in arrays)
        if isinstance(value, list):
            selected_arrays[key] = value
        elif value is not None:
            metadata[key] = value
    matrices = set()
    for _ in range(tensors):
        _text(stream)
        axes = _number(stream, "I")
        if axes > 8:
            raise ValueError(f"a tensor has {axes} axes")
        for _ in range(axes):
            _number(stream, "Q")
        kind = _number(stream, "I")
        _number(stream, "Q")
        if axes > 1:
            matrices.add(kind)
    return GgufHeader(metadata, frozenset(matrices), selected_arrays, tensors)


def _bytes(stream: BinaryIO, count: int) -> bytes:
    if count > _LONGEST:
        raise ValueError(f"a part of {count} bytes")
    # `read` allocates what it is asked for, so a length that the file cannot hold is refused before
    if count > _CHECKED and count > os.fstat(stream.fileno()).st_size - stream.tell():
        raise EOFError("it ends inside its head")
    result = stream.read(count)
    if len(result) < count:
        raise EOFError("it ends inside its head")
    return result


def _number(stream: BinaryIO, type_code: str) -> Any:
    return struct.unpack(f"<{type_code}", _bytes(stream, struct.calcsize(f"<{type_code}")))[0]


def _text(stream: BinaryIO) -> str:
    return _bytes(stream, _number(stream, "Q")).decode()


def _value(stream: BinaryIO, kind: int, *, keep: bool = False) -> Any:
    """Return one metadata value; None for an array that is skipped."""
    if kind == _STRING:
        return _text(stream)
    if kind == _ARRAY:
        item_type, count = _number(stream, "I"), _number(stream, "Q")
        if item_type in _SCALARS:
            content = _bytes(stream, count * struct.calcsize(f"<{_SCALARS[item_type]}"))
            return list(struct.unpack(f"<{count}{_SCALARS[item_type]}", content)) if keep else None
        if count > _LONGEST:
            raise ValueError(f"an array of {count} items")
        if item_type == _ARRAY:  # llama.cpp reads none; nested a thousand deep they would end the interpreter's stack
            raise ValueError("an array of arrays")
        values = [_value(stream, item_type) for _ in range(count)] if keep else None
        for _ in range(0 if keep else count):
            _value(stream, item_type)
        return values
    if kind not in _SCALARS:
        raise ValueError(f"metadata of the unknown type {kind}")
    return _number(stream, _SCALARS[kind])
