"""Verb doctor: what this machine can do, and what to install for the rest.

It starts nothing, fetches nothing and compiles nothing; torch is asked only if it is installed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sartor.core import assets
from sartor.core.home import home
from sartor.core.installation import install_command

_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
_COMPILERS = ("g++", "c++", "clang++")
# what a first specialist needs beside the plain install
FIRST_EXTRA = "tune"
_LITTLE_MEMORY, _LITTLE_DISK = 4 << 30, 5 << 30
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+).*?;.*extra\s*==\s*['\"]([\w-]+)['\"]")


@dataclass(frozen=True)
class Diagnosis:
    """What was found. memory, disk and cache are bytes.

    extras: name -> packages of it that are missing. advice: what to do, in order.
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
        """The command's JSON."""
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
        """The same for a person."""
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
    """Look at this machine."""
    cpu, flags = _processor()
    gpu, has_torch = _gpu()
    extras = missing_by_extra()
    compiler = next(
        (found for name in (os.environ.get("CXX", ""), *_COMPILERS) if name and (found := shutil.which(name))), ""
    )
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


def missing_by_extra() -> dict[str, list[str]]:
    """Extra -> the packages of it that are not installed, by what the installed Sartor declares."""
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
    """(name, flags) of the processor, as the system tells them."""
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
    """(name of the GPU that torch would take, empty for none; whether torch is installed and can be imported)."""
    if importlib.util.find_spec("torch") is None:
        return "", False
    try:
        import torch
    except (ImportError, OSError):  # a library that it needs is missing: what is broken is what is looked for here
        return "", False

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return f"{properties.name}, {_size(properties.total_memory)}", True
    return ("Apple's, through Metal" if torch.backends.mps.is_available() else ""), True


def _memory() -> int:
    """Bytes of memory of this machine; 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def _cache() -> dict[str, int]:
    """Bytes of each folder below SARTOR_HOME that holds any."""
    sizes = {}
    for folder in sorted(path for path in home().iterdir() if path.is_dir()):
        size = sum(map(_bytes_of, folder.rglob("*")))
        if size:
            sizes[folder.name] = size
    return sizes


def _bytes_of(path: Path) -> int:
    """Bytes of a file; 0 of a directory, and of what another process has removed meanwhile."""
    try:
        status = path.stat(follow_symlinks=False)
    except OSError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
