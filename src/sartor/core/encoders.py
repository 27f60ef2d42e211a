"""Texts -> vectors, for the stages that must not know a model: the Protocol, and who offers one by which name.

`curate` asks for an encoder by name; the façade says at import which implementations there are (`offer`), so a stage that
holds no torch can use one that does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from sartor.core.errors import ConfigError


class Encoder(Protocol):
    """Texts -> vectors of unit length."""

    @property
    def name(self) -> str:
        """What made the vectors: for manifests and cards."""
        ...

    def encode(self, texts: Sequence[str]) -> Any:
        """(N, D) float32 numpy array, each row of length 1 (or 0 for a text without content)."""
        ...


_OFFERED: dict[str, Callable[[], Encoder]] = {}


def offer(name: str, opener: Callable[[], Encoder]) -> None:
    """Make an encoder known under a name. `opener` may raise MissingError when a package or an asset is absent."""
    _OFFERED[name] = opener


def open_encoder(name: str) -> Encoder:
    """The encoder of that name. Raises ConfigError for an unknown one, MissingError where it cannot be opened here."""
    if name not in _OFFERED:
        raise ConfigError(f"there is no encoder {name!r}", f"one of {', '.join(sorted(_OFFERED))}")
    return _OFFERED[name]()
