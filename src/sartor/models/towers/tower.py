"""Tower protocol: frozen encoder of images or audio."""

from __future__ import annotations

from typing import Any, Protocol

from sartor.core.model_refs import Modality, TowerRef

STACKS = {"image": 1, "audio": 8}  # an audio feature is 20 ms; eight are about a syllable (Ultravox)
WHOLE = "check that its files are whole"
_MOST_HALF = 65504.0


class Tower(Protocol):
    """Protocol of a tower in memory."""

    @property
    def name(self) -> str:
        """Name by which it was requested."""
        ...

    @property
    def digest(self) -> str:
        """Digest of everything that determines its features: weights, conversion, preparation of media."""
        ...

    @property
    def licence(self) -> str:
        """SPDX identifier; NOASSERTION if its files state none."""
        ...

    @property
    def modality(self) -> Modality:
        """Media kind that it reads."""
        ...

    @property
    def width(self) -> int:
        """Width of one feature."""
        ...

    @property
    def stack(self) -> int:
        """Number of neighbouring features per token, unless a recipe sets it."""
        ...

    def features(self, content: bytes) -> Any:
        """Return the features (T, width) of a media file, an fp16 tensor on the CPU; T is at least 1.

        They are computed in fp32, one file at a time. So they do not depend on other files of a request: they are
        cached by the file's digest. Raises MediaError for a file that cannot be decoded.
        """
        ...


class Located:
    """Base class with the attributes that a tower takes from its ref."""

    def __init__(self, ref: TowerRef) -> None:
        self.name, self.digest, self.licence, self.modality = ref.name, ref.digest, ref.licence, ref.modality
        self.stack = STACKS[ref.modality]


def stored(states: Any) -> Any:
    """Return states (T, width) in the form in which they are cached: fp16 on the CPU, in their own memory."""
    return states.clamp(-_MOST_HALF, _MOST_HALF).half().cpu().contiguous()
