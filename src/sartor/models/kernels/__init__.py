"""Kernels of the fused path: one set of operations, several implementations.

    reference  torch's own operations: any device, any dtype; the others are checked against it
    cpu        two small C++ files, compiled once on this machine: CPUs
    cuda       flash-attention, Liger and torch.compile, where they can be imported: NVIDIA GPUs

All have the methods of `reference.ReferenceKernels`. `fused_decoder.py` calls them and knows no other interface.
"""

from __future__ import annotations

import torch

from sartor.models.kernels import cpu, cuda
from sartor.models.kernels.reference import ReferenceKernels


def choose_kernels(device: torch.device) -> tuple[ReferenceKernels, str]:
    """Return the fastest kernels for a device, and their name for the log, with the reason for a fallback."""
    if device.type == "cuda":
        return cuda.load()
    if device.type == "cpu":
        try:
            return cpu.load(), cpu.CpuKernels.name
        except cpu.NoKernels as error:
            return ReferenceKernels(), f"{ReferenceKernels.name}: {error}"
    return ReferenceKernels(), ReferenceKernels.name
