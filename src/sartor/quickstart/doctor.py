"""Verb doctor: abilities of this machine, and packages to install for the rest.

It starts nothing, downloads nothing and compiles nothing. torch is imported only if it is installed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sartor.core import assets
from sartor.core.filesystem import tree_bytes
from sartor.core.home import home
from sartor.core.installation import install_command

_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
_COMPILERS = ("g++", "c++", "clang++")
# the extra that a first specialist needs beside the plain install
FIRST_EXTRA = "tune"
_LITTLE_MEMORY, _LITTLE_DISK = 4 << 30, 5 << 30
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+).*?;.*extra\s*==\s*['\"]([\w-]+)['\"]")


@dataclass(frozen=True)
class Diagnosis:
    """Findings about this machine. memory_bytes, free_disk_bytes and cache are in bytes.

    extras: missing packages of each extra. advice: steps to take, in order.
    """

    cpu: str
    cores: int
    is_bf16_native: bool
    memory_bytes: int
    free_disk_bytes: int
    gpu: str
    compiler: str
    cache: Mapping[str, int]
    assets: Mapping[str, bool]
    extras: Mapping[str, Sequence[str]]
    advice: Sequence[str]

    def as_json(self) -> dict[str, Any]:
        """Return the JSON output of the command."""
        return {
            "cpu": {"name": self.cpu, "cores": self.cores},
            "bf16": self.is_bf16_native,
            "memory_bytes": self.memory_bytes,
            "free_disk_bytes": self.free_disk_bytes,
            "gpu": self.gpu or None,
            "compiler": self.compiler or None,
            "home": str(home()),
            "cache_bytes": dict(self.cache),
            "assets": dict(self.assets),
            "extras": {
                name: {"installed": not missing, "missing": list(missing)} for name, missing in self.extras.items()
            },
            "advice": list(self.advice),
        }

    def table(self) -> list[tuple[str, Any]]:
        """Return the findings as a table for the terminal."""
        installed = [name for name, missing in self.extras.items() if not missing]
        absent = [name for name, missing in self.extras.items() if missing]
        cache = ", ".join(f"{name} {_size(size)}" for name, size in self.cache.items()) or "empty"
        numbers = "bf16 and fp32" if self.is_bf16_native else "fp32 (bf16 is not native here)"
        return [
            ("processor", f"{self.cpu}, {self.cores} cores, computes in {numbers}"),
            ("memory", f"{_size(self.memory_bytes)}"),
            ("GPU", self.gpu or "none found"),
            ("C++ compiler", self.compiler or "none: tuning and serving on a CPU are several times slower"),
            ("cache", f"{home()}: {cache}; {_size(self.free_disk_bytes)} free there"),
            ("assets", ", ".join(name for name, is_here in self.assets.items() if is_here) or "none installed"),
            ("extras", f"installed: {', '.join(installed) or 'none'}; not: {', '.join(absent) or 'none'}"),
            *(("do" if index == 0 else "", line) for index, line in enumerate(self.advice)),
        ]


def doctor() -> Diagnosis:
    """Inspect this machine."""
    cpu, flags = _processor()
    gpu, has_torch = _gpu()
    extras = missing_by_extra()
    compilers = [shutil.which(name) for name in (os.environ.get("CXX", ""), *_COMPILERS) if name]
    compiler = next(filter(None, compilers), "")
    if not compiler and importlib.util.find_spec("ziglang"):
        compiler = "the package ziglang"
    memory, disk = _memory(), shutil.disk_usage(home()).free
    advice = []
    if extras.get(FIRST_EXTRA):
        advice.append(
            f"{install_command(FIRST_EXTRA)}   # {', '.join(extras[FIRST_EXTRA])}: to tune, evaluate and ask"
        )
    if importlib.util.find_spec("torch") and not has_torch:
        advice.append(
            f"{install_command(FIRST_EXTRA)} --force-reinstall   # torch is installed, and cannot be imported"
        )
    if not compiler:
        advice.append(f"apt-get install g++   # or {install_command('compiler')}: the kernels for a CPU")
    if has_torch and not gpu and shutil.which("nvidia-smi"):
        advice.append("install torch with CUDA: nvidia-smi is here, and torch sees no GPU")
    if memory and memory < _LITTLE_MEMORY:
        advice.append(f"sartor plan RECIPE   # before tuning: {_size(memory)} of memory is little")
    if disk < _LITTLE_DISK:
        advice.append(f"free some space below {home()}, or set SARTOR_HOME: {_size(disk)} is left")
    advice += _mode_advice()
    if not assets.entry("starter").is_installed:
        advice.append("sartor assets install starter   # the small base; else it is fetched when it is first used")
    return Diagnosis(
        cpu=cpu,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        is_bf16_native=bool(_BF16_FLAGS & set(flags.split())) or bool(gpu),
        memory_bytes=memory,
        free_disk_bytes=disk,
        gpu=gpu,
        compiler=compiler,
        cache=_cache(),
        assets={name: asset.is_installed for name, asset in assets.entries().items()},
        extras=extras,
        advice=advice or ["sartor tailor rows.csv --name NAME"],
    )


def _mode_advice() -> list[str]:
    """Return what to do if other users may enter SARTOR_HOME, as one that an older version made."""
    if os.name != "posix" or not home().stat().st_mode & 0o077:
        return []
    return [f"chmod -R go= {home()}   # other users of this machine can read what is stored there"]


def missing_by_extra() -> dict[str, list[str]]:
    """Return the packages of each extra that are not installed, from the metadata of the installed Sartor."""
    missing: dict[str, list[str]] = {}
    for requirement in importlib.metadata.requires("sartor") or []:
        if not (found := _REQUIREMENT.match(requirement)):
            continue
        package, extra = found.groups()
        if extra in ("all", "dev", "bench") or package.lower() == "sartor":
            continue
        missing.setdefault(extra, [])
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            missing[extra].append(package)
    return missing


def _processor() -> tuple[str, str]:
    """Return the processor's name and flags, as the system reports them."""
    name, flags = platform.processor() or platform.machine(), ""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return name, flags
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        if key.strip() in ("flags", "Features"):
            flags = value
    return name, flags


def _gpu() -> tuple[str, bool]:
    """Return the name of the GPU that torch would use, empty for none, and whether torch can be imported."""
    if importlib.util.find_spec("torch") is None:
        return "", False
    try:
        import torch
    except (ImportError, OSError):  # torch or a library that it needs is broken, which this verb is to report
        return "", False

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return f"{properties.name}, {_size(properties.total_memory)}", True
    return ("Apple's, through Metal" if torch.backends.mps.is_available() else ""), True


def _memory() -> int:
    """Return the memory of this machine in bytes; 0 if the system does not report it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def _cache() -> dict[str, int]:
    """Return the bytes of each folder below SARTOR_HOME that is not empty."""
    sizes = {}
    for folder in sorted(path for path in home().iterdir() if path.is_dir()):
        size = tree_bytes(folder)
        if size:
            sizes[folder.name] = size
    return sizes


def _size(count: int) -> str:
    """Return a size as text, in GB or MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
