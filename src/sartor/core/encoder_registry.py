"""TextEncoder protocol and the encoders registered by name.

`curate` requests an encoder by name or by the directory of a model. The package `sartor` registers the implementations
at import (`register_encoder`, `register_encoder_directory`), so a stage that does not import torch can use one that
does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from sartor.core.errors import ConfigError


class TextEncoder(Protocol):
    """Encoder of texts to vectors of unit length."""

    @property
    def name(self) -> str:
        """Name of the encoder, for manifests and cards."""
        ...

    @property
    def cut(self) -> int:
        """Number of texts of the last `encode` longer than the context; their ends are not in the vectors."""
        ...

    @property
    def tokens(self) -> int:
        """Number of tokens that the last `encode` read; 0 for an encoder without tokens."""
        ...

    def encode(self, texts: Sequence[str]) -> Any:
        """Return the embeddings of N texts.

        Returns: (N, D) float32 numpy array; each row has length 1, or 0 for a text without content.
        """
        ...


_OFFERED: dict[str, Callable[[], TextEncoder]] = {}
# (test whether a directory is of this kind, function that opens it), in the order of testing
_DIRECTORIES: list[tuple[Callable[[Path], bool], Callable[[Path], TextEncoder]]] = []


def register_encoder(name: str, opener: Callable[[], TextEncoder]) -> None:
    """Register an encoder under a name.

    opener: may raise MissingError if a package or an asset is absent.
    """
    _OFFERED[name] = opener


def register_encoder_directory(fits: Callable[[Path], bool], opener: Callable[[Path], TextEncoder]) -> None:
    """Register a kind of model directory.

    fits: tests a directory by its files.
    opener: may raise MissingError or ModelError.
    """
    _DIRECTORIES.append((fits, opener))


def open_encoder(name: str) -> TextEncoder:
    """Open the encoder of this name, or the one in the directory with this path.

    Raises ConfigError if it is neither, MissingError if it cannot be opened here, ModelError if it is damaged.
    """
    if name in _OFFERED:
        return _OFFERED[name]()
    path = Path(name).expanduser()
    if not path.is_dir():
        raise ConfigError(
            f"there is no encoder {name!r}, nor a directory of that path",
            f"one of {', '.join(sorted(_OFFERED))}, or a directory of sentence-transformers, transformers or "
            "model2vec",
        )
    for fits, opener in _DIRECTORIES:
        if fits(path):
            return opener(path)
    raise ConfigError(f"{path} holds no encoder that is known here", "give the directory that holds its config.json")
