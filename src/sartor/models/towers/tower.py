"""Tower protocol: frozen encoder of images or audio."""

from __future__ import annotations

from typing import Any, Protocol

from sartor.core.model_refs import Modality, TowerRef

STACKS = {"image": 1, "audio": 8}  # an audio feature is 20 ms; eight are about a syllable (Ultravox)
WHOLE = "check that its files are whole"
_MOST_HALF = 65504.0


class Tower(Protocol):
    """A tower in memory."""

    @property
    def name(self) -> str:
        """As it is asked for."""
        ...

    @property
    def digest(self) -> str:
        """Of what decides its features: weights, conversion, the way that media are prepared."""
        ...

    @property
    def licence(self) -> str:
        """SPDX; NOASSERTION where its files state none."""
        ...

    @property
    def modality(self) -> Modality:
        """What it takes in."""
        ...

    @property
    def width(self) -> int:
        """Of one feature."""
        ...

    @property
    def stack(self) -> int:
        """How many neighbouring features make one token, unless a recipe says otherwise."""
        ...

    def features(self, content: bytes) -> Any:
        """(T, width) fp16 tensor on the CPU of a media file; T is at least 1. Computed in fp32, one file at a time.

        One at a time, so that the features do not depend on what else was asked: they are kept by the file's digest.

        Raises MediaError for a file that cannot be decoded.
        """
        ...


class Located:
    """What a tower says of itself by its ref."""

    def __init__(self, ref: TowerRef) -> None:
        self.name, self.digest, self.licence, self.modality = ref.name, ref.digest, ref.licence, ref.modality
        self.stack = STACKS[ref.modality]


def stored(states: Any) -> Any:
    """(T, width) states as they are kept: fp16 on the CPU, in memory of their own."""
    return states.clamp(-_MOST_HALF, _MOST_HALF).half().cpu().contiguous()
