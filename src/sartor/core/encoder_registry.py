"""TextEncoder protocol and the encoders registered by name.

`curate` asks for an encoder by name, or by the directory of a model; the façade says at import which implementations
there are (`offer`, `offer_directories`), so a stage that holds no torch can use one that does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from sartor.core.errors import ConfigError


class TextEncoder(Protocol):
    """Texts -> vectors of unit length."""

    @property
    def name(self) -> str:
        """What made the vectors: for manifests and cards."""
        ...

    @property
    def cut(self) -> int:
        """How many texts of the last `encode` were longer than the encoder reads; their ends are not in the
        vectors.
        """
        ...

    @property
    def tokens(self) -> int:
        """How many tokens the last `encode` read; 0 for an encoder that reads no tokens."""
        ...

    def encode(self, texts: Sequence[str]) -> Any:
        """(N, D) float32 numpy array, each row of length 1 (or 0 for a text without content)."""
        ...


_OFFERED: dict[str, Callable[[], TextEncoder]] = {}
# (whether a directory is of this kind, how it is opened), in the order of asking
_DIRECTORIES: list[tuple[Callable[[Path], bool], Callable[[Path], TextEncoder]]] = []


def register_encoder(name: str, opener: Callable[[], TextEncoder]) -> None:
    """Make an encoder known under a name. `opener` may raise MissingError when a package or an asset is absent."""
    _OFFERED[name] = opener


def register_encoder_directory(fits: Callable[[Path], bool], opener: Callable[[Path], TextEncoder]) -> None:
    """Make a kind of model directory known. `fits` looks at the files; `opener` may raise MissingError or
    ModelError.
    """
    _DIRECTORIES.append((fits, opener))


def open_encoder(name: str) -> TextEncoder:
    """The encoder of that name, or in the directory of that path.

    Raises ConfigError for one that is neither, MissingError where it cannot be opened here, ModelError for a damaged
    one.
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
