"""CTranslate2's `model.bin`, read: the variables of a model by name.

Little-endian: version (u32), name of the spec, revision (u32), number of variables (u32); of each: name, rank (u8), sizes
(u32 each), type (u8), number of bytes (u32), bytes. Then the number of aliases (u32), and two names of each. A name is its
length with the final NUL (u16), its bytes, NUL.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sartor.core.errors import ModelError

VERSION = 6
_TYPES = ("<f4", "i1", "<i2", "<i4", "<f2")  # by their numbers in the file; 5 is bf16, which numpy has not
MOST_BYTES = 4 << 30
MOST_RANK = 8


@dataclass(frozen=True)
class CTranslateModel:
    """A file's content. `spec`: which kind of model it is (`WhisperSpec`); aliases stand among the variables."""

    spec: str
    revision: int
    variables: dict[str, NDArray[Any]]


def read_model(file: Path) -> CTranslateModel:
    """Raises ModelError for a file that is cut, of another version, or of a type that is not read."""
    if file.stat().st_size > MOST_BYTES:
        raise _unusable(file, f"it has {file.stat().st_size:,} bytes; at most {MOST_BYTES:,} are read")
    try:
        return _parsed(_Reader(file.read_bytes()))
    except (struct.error, ValueError, UnicodeDecodeError, KeyError) as error:
        raise _unusable(file, str(error)) from None


def _unusable(file: Path, why: str) -> ModelError:
    return ModelError(f"{file} cannot be read as a model of CTranslate2: {why}", "get the whole file again")


class _Reader:
    """A walk over bytes; ValueError where they end too early."""

    def __init__(self, content: bytes) -> None:
        self._content, self._at = memoryview(content), 0

    def take(self, size: int) -> memoryview:
        if size > len(self._content) - self._at:
            raise ValueError(f"it ends at {len(self._content):,} bytes, within a value")
        self._at += size
        return self._content[self._at - size : self._at]

    def number(self, form: str) -> int:
        return int(struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0])

    def name(self) -> str:
        return bytes(self.take(self.number("H"))).rstrip(b"\0").decode()

    @property
    def left(self) -> int:
        return len(self._content) - self._at


def _parsed(reader: _Reader) -> CTranslateModel:
    if (version := reader.number("I")) != VERSION:
        raise ValueError(f"its version is {version}, and {VERSION} is read")
    spec, revision = reader.name(), reader.number("I")
    variables = dict(_variable(reader) for _ in range(reader.number("I")))
    for _ in range(reader.number("I")):
        alias, target = reader.name(), reader.name()
        variables[alias] = variables[target]
    if reader.left:
        raise ValueError(f"{reader.left:,} bytes follow its end")
    return CTranslateModel(spec, revision, variables)


def _variable(reader: _Reader) -> tuple[str, NDArray[Any]]:
    name = reader.name()
    if (rank := reader.number("B")) > MOST_RANK:
        raise ValueError(f"{name} has {rank} dimensions")
    shape = tuple(reader.number("I") for _ in range(rank))
    if (kind := reader.number("B")) >= len(_TYPES):
        raise ValueError(f"{name} is of the type {kind}, which is not read")
    dtype = np.dtype(_TYPES[kind])
    if (size := reader.number("I")) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} has {size:,} bytes, and its shape {shape} asks for {math.prod(shape) * dtype.itemsize:,}")
    return name, np.frombuffer(reader.take(size), dtype).reshape(shape)
