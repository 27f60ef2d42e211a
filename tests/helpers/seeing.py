"""Media of tests: towers without weights, and the data URLs that they read."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import torch

from sartor.core.records import Example, Message, Part


class Fake:
    """A tower whose features are drawn from the digest of the media; their number is the media's first byte."""

    licence = "MIT"

    def __init__(self, modality: Any = "image", stack: int = 1, version: int = 1) -> None:
        self.modality, self.stack, self.width = modality, stack, 12
        self.name, self.digest = f"fake-{modality}", f"{modality}-{version}"
        self.read = 0

    def features(self, content: bytes) -> torch.Tensor:
        self.read += 1
        seed = int(hashlib.sha256(content).hexdigest()[:8], 16)
        return torch.randn(content[0], self.width, generator=torch.Generator().manual_seed(seed)).half()


def picture(count: int, name: str = "a", kind: Any = "image") -> Part:
    return Part(kind, media="data:x/y;base64," + base64.b64encode(bytes([count]) + name.encode()).decode())


def said(*parts: Part | str, reply: str = "the sky is blue") -> Example:
    content = tuple(Part("text", part) if isinstance(part, str) else part for part in parts)
    return Example((Message("user", content), Message.of("assistant", reply)), ())
