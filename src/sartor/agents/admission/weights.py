"""The weights of a base as admission needs them: which matrices there are, their shapes, and how large they are (no torch)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from sartor.core import safetensors_file
from sartor.core.errors import ModelError
from sartor.core.filesystem import write_file_atomic
from sartor.core.safetensors_file import Tensor

# safetensors' own limit; a base is the operator's own file, and a large one has many tensors
MOST_HEADER_BYTES = 100 << 20
SUFFIX = ".weight"


class BaseWeights:
    """The safetensors files in a base's directory. matrices: module name -> its two-dimensional weight.

    norms_file keeps what `norms` found, so that a base is read once and not at every admission.
    """

    def __init__(self, path: Path, digest: str, norms_file: Path) -> None:
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise ModelError(f"{path} holds no *.safetensors of a base", "give the base's directory in transformers' layout")
        self.path = path
        self._digest = digest
        self._norms_file = norms_file
        self._vocabulary = _vocabulary(path)
        self.matrices: dict[str, Tensor] = {}
        for file in files:
            for name, tensor in safetensors_file.read_header(file, MOST_HEADER_BYTES).items():
                if len(tensor.shape) == 2 and name.endswith(SUFFIX):
                    self.matrices[name.removesuffix(SUFFIX)] = tensor

    def linear(self) -> dict[str, Tensor]:
        """The matrices that an adapter may add to: all but embeddings and the head, which have a row per token."""
        return {name: tensor for name, tensor in self.matrices.items() if tensor.shape[0] != self._vocabulary}

    @property
    def width(self) -> int:
        """Of an embedding; 0 where no weight has a row per token."""
        return next((tensor.shape[1] for tensor in self.matrices.values() if tensor.shape[0] == self._vocabulary), 0)

    def norms(self, modules: Iterable[str]) -> dict[str, float]:
        """The Frobenius norm of each module's weight."""
        known = self._read_norms()
        lacking = [module for module in modules if module not in known]
        for module in lacking:
            known[module] = float(np.sqrt(sum(_squares(piece) for piece in self.matrices[module].pieces())))
        if lacking:
            self._write_norms(known)
        return known

    def _read_norms(self) -> dict[str, float]:
        try:
            said = json.loads(self._norms_file.read_text(encoding="utf-8"))
            return {str(name): float(norm) for name, norm in said["norms"].items()} if said["base"] == self._digest else {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def _write_norms(self, norms: dict[str, float]) -> None:
        # a cache: norms that a power cut takes are computed anew from the base
        content = json.dumps({"schema": 1, "base": self._digest, "norms": norms}).encode()
        write_file_atomic(self._norms_file, content, durable=False)


def _squares(piece: safetensors_file.Values) -> float:
    wide = piece.astype(np.float64)
    return float(wide @ wide)


def _vocabulary(path: Path) -> int:
    """Rows of the embedding, from config.json; 0 when it does not say."""
    try:
        said = json.loads((path / "config.json").read_text(encoding="utf-8"))
        return int(said.get("vocab_size") or said.get("text_config", {}).get("vocab_size") or 0)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ModelError(f"{path}/config.json is not a whole JSON file: {error}", "restore it from a copy") from None
