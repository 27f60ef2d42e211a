"""Bounded tensor cache on disk; streamed safetensors writer.

Files are written whole or not at all, checked by a digest when read, and the least recently used are removed first.
Everything in the cache can be computed again: a full disk or a damaged file costs time, never a run. Each file records
the version of the arithmetic that made it (core/numerics.py), in its name too. So no version of Sartor uses tensors of
another version's arithmetic.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save

from sartor.core.filesystem import PRIVATE, fsync_descriptor, write_file_atomic
from sartor.core.numerics import FIRST, difference, numerics

SCHEMA = 1


class TensorCache:
    """Cache of tensors by name below `folder`, of at most `limit_bytes` in total.

    Tensors that this object protects (`keep`) are never removed and may exceed the limit.
    dtype: dtype in which they are computed, whatever their storage dtype.
    outdated: number of requested tensors that exist only in another version's arithmetic.
    """

    def __init__(
        self,
        folder: Path,
        limit_bytes: int,
        notice: Callable[[str], object] = lambda line: None,
        *,
        dtype: str = "float32",
    ) -> None:
        self.folder, self.limit_bytes, self.notice = folder, limit_bytes, notice
        self._dtype, self._numerics = dtype, numerics(dtype)
        self._protected: set[Path] = set()
        self._total: int | None = None
        self.outdated = 0

    def keep(self, name: str) -> None:
        """Protect this name from being removed to make space."""
        self._protected.add(self._file(name))

    def read(self, name: str, shape: tuple[int, ...] | None = None) -> Any:
        """Return the tensor under `name` as a memory-mapped slice object; None if missing or damaged.

        shape: required shape; None accepts any.
        """
        file = self._file(name)
        if not file.is_file():
            self._look_for_others(name)
            return None
        with contextlib.suppress(OSError, safetensors.SafetensorError, KeyError, ValueError):
            opened: Any = safetensors.safe_open(str(file), "pt")
            metadata = opened.metadata() or {}
            if metadata.get("numerics", str(FIRST)) != str(self._numerics):
                return None
            tensor = opened.get_tensor("hidden")
            if shape in (None, tuple(tensor.shape)) and metadata.get("sha256") == _digest(tensor):
                os.utime(file)
                return opened.get_slice("hidden")
        return None

    def _look_for_others(self, name: str) -> None:
        """Count a tensor that exists in another version's arithmetic; report the first one."""
        stem = self.folder / name[:2] / name
        versions = [
            file.stem.removeprefix(name).removeprefix("-") for file in stem.parent.glob(f"{name}*.safetensors")
        ]
        made_by = [int(version or FIRST) for version in versions if version.isdecimal() or not version]
        if not made_by:
            return
        if not self.outdated:
            description = difference(max(made_by), self._dtype)
            self.notice(f"stored {self.folder.name} are not used: made by {description}; they are computed anew")
        self.outdated += 1

    def write(self, name: str, tensor: torch.Tensor) -> Any:
        """Store a tensor of any shape; return it as `read` would, or itself if the disk is full."""
        file = self._file(name)
        fields = {"schema": str(SCHEMA), "sha256": _digest(tensor), "numerics": str(self._numerics)}
        content = save({"hidden": tensor}, fields)
        try:
            self._make_room(len(content))
            # thousands of files, each checked against its digest when read: an fsync would cost more than it saves
            write_file_atomic(file, content, mode=PRIVATE, durable=False)
        except OSError as error:
            self.notice(f"{self.folder.name} could not be stored ({error.strerror}); they are held in memory")
            return tensor
        opened: Any = safetensors.safe_open(str(file), "pt")
        return opened.get_slice("hidden")

    def _file(self, name: str) -> Path:
        """Return the path of a name in this version's arithmetic."""
        made_by = "" if self._numerics == FIRST else f"-{self._numerics}"
        return self.folder / name[:2] / f"{name}{made_by}.safetensors"

    def _make_room(self, new_bytes: int) -> None:
        """Remove the least recently used unprotected tensors until `new_bytes` more are within the limit.

        The directory is listed at first and when the limit is reached, not for each of thousands of small files.
        """
        if self._total is None:
            self._total = sum(stat.st_size for _, stat in self._stored())
        self._total += new_bytes
        if self._total <= self.limit_bytes:
            return
        files = [(stat.st_mtime, stat.st_size, file) for file, stat in self._stored()]
        self._total = sum(size for _, size, _ in files) + new_bytes
        for _, size, file in sorted(files, key=lambda entry: entry[0]):
            if self._total <= self.limit_bytes:
                return
            if file not in self._protected:
                file.unlink(missing_ok=True)
                self._total -= size

    def _stored(self) -> list[tuple[Path, os.stat_result]]:
        """Return the path and status of every stored file."""
        result = []
        for file in self.folder.glob("*/*.safetensors"):
            with contextlib.suppress(OSError):
                result.append((file, file.stat()))
        return result


def _digest(tensor: torch.Tensor) -> str:
    """Return the sha256 of a tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy()).hexdigest()


NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(tensors: Mapping[str, torch.Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors of any shape to a safetensors file, and fsync it.

    Format: huggingface.co/docs/safetensors. Raises OSError, for instance when the disk is full.
    """
    # wide dtypes first, so that each tensor begins at a multiple of its element size
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header_bytes = json.dumps(header).encode()
    header_bytes += b" " * (-len(header_bytes) % 8)
    with file.open("wb") as stream:
        stream.write(len(header_bytes).to_bytes(8, "little") + header_bytes)
        for _, tensor in ordered:
            stream.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        stream.flush()
        fsync_descriptor(stream.fileno())
