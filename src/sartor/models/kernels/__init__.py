"""Kernels of the fused path: one set of operations, several implementations.

    eager    torch's own operations: any device, any dtype; what the others are checked against
    native   one small C++ file, compiled once on this machine (`cpu.py`): CPUs
    cuda     flash-attention, Liger and torch.compile, where they can be imported (`cuda.py`): NVIDIA GPUs

All have the methods of `reference.ReferenceKernels`. `fused_decoder.py` calls them and knows no other.
"""

from __future__ import annotations

import torch

from sartor.models.kernels import cpu, cuda
from sartor.models.kernels.reference import ReferenceKernels


def choose_kernels(device: torch.device) -> tuple[ReferenceKernels, str]:
    """The fastest kernels for a device, and what they are, for the log."""
    if device.type == "cuda":
        return cuda.load()
    if device.type == "cpu":
        try:
            return cpu.load(), cpu.CpuKernels.name
        except cpu.NoKernels as error:
            return ReferenceKernels(), f"{ReferenceKernels.name}: {error}"
    return ReferenceKernels(), ReferenceKernels.name
