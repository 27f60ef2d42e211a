"""Where a base computes, and in what: the best that this machine has."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch


def best_device() -> torch.device:
    """CUDA, else Apple's GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def best_dtype(device: torch.device, cpu_flags: str | None = None) -> torch.dtype:
    """bf16 where the hardware multiplies it natively, else fp32 (fp16 on a CUDA device without bf16).

    On a CPU without avx512_bf16, amx_bf16 or Arm's bf16, bf16 products run several times slower than fp32 ones.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "mps":
        return torch.float32
    flags = _cpu_flags() if cpu_flags is None else cpu_flags
    return torch.bfloat16 if {"avx512_bf16", "amx_bf16", "bf16"} & set(flags.split()) else torch.float32


def _cpu_flags() -> str:
    """The first flags (x86) or Features (Arm) line of /proc/cpuinfo; empty where there is no such file."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line.partition(":")[2]
    return ""
