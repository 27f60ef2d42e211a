"""Strict reader of safetensors headers and values, without torch.

Format: github.com/huggingface/safetensors, README. A file is an unsigned 64-bit length, a JSON header of that length,
then the bytes of the tensors. This reader requires that the tensors cover those bytes exactly: no hole, no overlap, no
trailing bytes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sartor.core.errors import ModelError
from sartor.core.remedies import restore_command

# bytes per element
SIZES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}
FLOATS = ("F32", "F16", "BF16")
MOST_HEADER_BYTES = 8 << 20
MOST_AXES = 8
_PIECE = 1 << 22  # elements in memory at a time
_NAME = re.compile(r"[\w.:/-]{1,512}", re.ASCII)

Values = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class SafetensorsEntry:
    """Location of a tensor in a file.

    start: offset in the file, bytes.
    shape: as the header states it; (out, in) for a weight.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def pieces(self) -> Iterator[Values]:
        """Yield all values in fp32, in order, as arrays of shape (n,) with n at most `_PIECE`.

        Raises ModelError for a dtype that is not a float.
        """
        if self.dtype not in FLOATS:
            raise ModelError(f"{self.name} of {self.file} is {self.dtype}", f"store it as {' or '.join(FLOATS)}")
        with self.file.open("rb") as stream:
            stream.seek(self.start)
            for start in range(0, self.count, _PIECE):
                yield _floats(stream.read(min(_PIECE, self.count - start) * SIZES[self.dtype]), self.dtype)

    def values(self) -> Values:
        """Return all values in fp32, in the tensor's shape. Raises ModelError for a truncated file."""
        pieces = list(self.pieces())
        array = np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
        if array.size != self.count:
            raise ModelError(f"{self.file} is cut inside {self.name}", restore_command(self.file))
        return array.reshape(self.shape)


def _floats(data: bytes, dtype: str) -> Values:
    if dtype == "F32":
        return np.frombuffer(data, "<f4")
    if dtype == "F16":
        return np.frombuffer(data, "<f2").astype(np.float32)
    # bf16 is the upper 16 bits of fp32
    return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)


def read_header(file: Path, most_bytes: int = MOST_HEADER_BYTES) -> dict[str, SafetensorsEntry]:
    """Return every tensor of a safetensors file by name; values are not read.

    Raises ModelError with the defect of the header.
    """
    return read_whole(file, most_bytes)[0]


def read_whole(file: Path, most_bytes: int = MOST_HEADER_BYTES) -> tuple[dict[str, SafetensorsEntry], dict[str, str]]:
    """Return every tensor of a safetensors file by name, and the metadata of the header.

    Raises ModelError as `read_header` does.
    """
    try:
        return _read_header(file, most_bytes)
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}", _AGAIN) from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is no whole safetensors file: {error}", _AGAIN) from None


_AGAIN = "get the file again, or write it with safetensors"


def _read_header(file: Path, most_bytes: int) -> tuple[dict[str, SafetensorsEntry], dict[str, str]]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, most_bytes):
            raise ValueError(
                f"its header has {length:,} bytes; the file has {size:,}, and {most_bytes:,} are the limit"
            )
        text = stream.read(length)
    fields = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys)
    if not isinstance(fields, dict):
        raise ValueError("its header is no mapping")
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its __metadata__ holds what is no text")
    tensors = sorted(
        (_tensor(file, name, entry, 8 + length) for name, entry in fields.items()), key=lambda tensor: tensor.start
    )
    end = 8 + length
    for tensor in tensors:
        if tensor.start != end:
            kind = "overlaps what stands before it" if tensor.start < end else "leaves a hole before it"
            raise ValueError(f"{tensor.name} begins at byte {tensor.start - 8 - length:,} and {kind}")
        end += tensor.count * SIZES[tensor.dtype]
    if end != size:
        raise ValueError(f"its tensors end at byte {end:,}; the file has {size:,}")
    return {tensor.name: tensor for tensor in tensors}, metadata


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key stands twice in its header")
    return result


def _tensor(file: Path, name: str, entry: Any, start: int) -> SafetensorsEntry:
    """Return the tensor of a header entry; its end must match its start and its shape."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"a tensor has the name {name[:80]!a}")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the entry of {name} has not exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise ValueError(f"{name} is of the unknown dtype {str(dtype)[:40]!a}")
    if not _counts(shape) or len(shape) > MOST_AXES or not _counts(offsets) or len(offsets) != 2:
        raise ValueError(f"the shape or the offsets of {name} are no whole numbers")
    byte_count = math.prod(shape) * SIZES[dtype]
    if offsets[1] - offsets[0] != byte_count:
        raise ValueError(
            f"{name} of shape {shape} takes {byte_count:,} bytes; its offsets span {offsets[1] - offsets[0]:,}"
        )
    return SafetensorsEntry(file, name, dtype=dtype, shape=tuple(shape), start=start + offsets[0])


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 48 for item in value)
