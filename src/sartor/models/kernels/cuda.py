"""Kernels for NVIDIA GPUs."""

from __future__ import annotations

from sartor.models.kernels.eager import Eager


def load() -> tuple[Eager, str]:
    """The fastest kernels that can be imported, and what they are."""
    return Eager(), Eager.name
