"""Best device and dtype; free and used memory.

`available_bytes` is the memory that can still be allocated within the limits of the machine, the cgroup (a container's
limit) and the shell. File pages that the kernel would reclaim count as free in a cgroup's use.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

PROC = Path("/proc/self")
CGROUPS = Path("/sys/fs/cgroup")
# A cgroup without a limit reports a number near 2^63
_NO_LIMIT_BYTES = 1 << 60
# the safetensors format's own limit
_MOST_HEADER_BYTES = 100_000_000
# oneDNN caches the code of a product for each shape: by default 1,024 shapes in each of two caches, up to 0.9 MB each.
# A micro-batch of a new length needs 55 (counted on the starter); 128 hold two such micro-batches.
PRIMITIVE_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
PRIMITIVES, PRIMITIVES_PER_BATCH = 128, 55
_MADV_DONTNEED = 4
# device type -> the peak before the last `restart_peak`
_past_peaks: dict[str, int] = {}


@dataclass(frozen=True)
class FreeMemory:
    """Memory that can still be allocated, and the limit that determines it."""

    bytes: int
    bound: str


def resident_bytes(device: torch.device | None = None) -> int:
    """Return the resident memory of this process; on CUDA the memory of tensors on the device."""
    if device is not None and device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    fields = _fields(PROC / "status")
    # outside Linux the standard library offers only the peak
    return fields.get("VmRSS", 0) or peak_bytes()


def peak_bytes(device: torch.device | None = None) -> int:
    """Return the peak resident memory of this process; on CUDA the peak of its tensors on the device."""
    if device is not None and device.type == "cuda":
        return max(_past_peaks.get("cuda", 0), int(torch.cuda.max_memory_allocated(device)))
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(_past_peaks.get("cpu", 0), peak if sys.platform == "darwin" else peak * 1024)


def restart_peak(device: torch.device) -> bool:
    """Start a new measurement for `recent_peak_bytes`, and return whether the system supports that.

    macOS does not, nor does a /proc that cannot be written.
    """
    if device.type not in ("cpu", "cuda"):
        return False
    # the system's counters are reset here, so the old peak is kept for `peak_bytes`
    _past_peaks[device.type] = peak_bytes(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        (PROC / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def recent_peak_bytes(device: torch.device) -> int:
    """Return the peak memory since `restart_peak`. Call it only if that returned true."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device))
    return _fields(PROC / "status")["VmHWM"]


def bound_primitive_caches() -> None:
    """Limit oneDNN's caches to the code of PRIMITIVES products, unless the environment sets a limit.

    oneDNN reads the environment once, before its first product: call this before a base computes.
    """
    for name in PRIMITIVE_CACHES:
        os.environ.setdefault(name, str(PRIMITIVES))


def cached_batch_shapes() -> int:
    """Return the number of micro-batch lengths whose products oneDNN's caches hold, at least one."""
    capacities = [os.environ.get(name, "") for name in PRIMITIVE_CACHES]
    return max(1, *(int(text) if text.isdecimal() else 1024 for text in capacities)) // PRIMITIVES_PER_BATCH or 1


def release_free_memory() -> None:
    """Return the allocator's unused memory to the system. Without glibc nothing is done."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def drop_mapped_pages(tensors: Sequence[torch.Tensor]) -> None:
    """Release the resident pages of tensors that are views of a mapped weights file.

    A later access reads the file again. This is for weights that have been copied elsewhere, whose pages would stay
    resident beside the copy. Tensors in the process's own memory, of any shape, are not changed, and without /proc
    nothing is done.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        madvise = ctypes.CDLL(None).madvise
        pattern = re.compile(r"([0-9a-f]+)-([0-9a-f]+) r\S+ \S+ \S+ [1-9]\d* +\S.*\.safetensors")
        lines = (PROC / "maps").read_text().splitlines()
        mapped = [(int(match[1], 16), int(match[2], 16)) for match in map(pattern.match, lines) if match]
        page = os.sysconf("SC_PAGESIZE")
        for tensor in tensors:
            # whole pages only: a page at either end also holds data of a neighbour
            low = -(-tensor.data_ptr() // page) * page
            high = (tensor.data_ptr() + tensor.nbytes) // page * page
            if tensor.is_contiguous() and low < high and any(start <= low and high <= end for start, end in mapped):
                madvise(ctypes.c_void_p(low), ctypes.c_size_t(high - low), ctypes.c_int(_MADV_DONTNEED))


def available_bytes(device: torch.device | None = None) -> FreeMemory:
    """Return the memory that can still be allocated: the minimum over machine, cgroup and shell limits."""
    if device is not None and device.type == "cuda":
        held_unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return FreeMemory(int(torch.cuda.mem_get_info(device)[0] + held_unused), "the device's free memory")
    machine_bytes = _fields(Path("/proc/meminfo")).get("MemAvailable")
    if not machine_bytes:
        import psutil  # comes with accelerate

        machine_bytes = int(psutil.virtual_memory().available)
    bounds = [
        FreeMemory(machine_bytes, "the machine's free memory"),
        *_cgroups(PROC / "cgroup", CGROUPS),
        *_limits(),
    ]
    return min(bounds, key=lambda bound: bound.bytes)


def weights_in(folder: Path) -> int:
    """Return the number of weights in a folder's safetensors files, from their headers.

    Unreadable files count as empty.
    """
    count = 0
    for file in sorted(folder.glob("*.safetensors")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError), file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length <= _MOST_HEADER_BYTES:
                header = json.loads(stream.read(length))
                count += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return count


def _cgroups(membership: Path, mount: Path) -> Iterator[FreeMemory]:
    """Yield the free memory in each memory cgroup of this process, from its own up to the root (v2, v1)."""
    with contextlib.suppress(OSError):
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            version_2 = not controllers
            if not (version_2 or "memory" in controllers.split(",")):
                continue
            root = mount if version_2 else mount / "memory"
            names = (
                ("memory.max", "memory.current") if version_2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
            )
            group_path = PurePosixPath(path.lstrip("/"))
            # inside a container the host's path may not exist; the container's own group is then the root
            for group in dict.fromkeys([group_path, *group_path.parents, PurePosixPath(".")]):
                yield from _room_in(root / group, *names)


def _room_in(group: Path, limit_name: str, use_name: str) -> Iterator[FreeMemory]:
    """Yield the free memory of one cgroup, if it has a limit."""
    with contextlib.suppress(OSError, ValueError):  # "max" (no limit) is not a number
        limit = int((group / limit_name).read_text())
        if limit < _NO_LIMIT_BYTES:
            use = int((group / use_name).read_text())
            words = (line.split() for line in (group / "memory.stat").read_text().splitlines())
            stat = {name: int(count) for name, count in words}
            given_back = stat.get("total_inactive_file", stat.get("inactive_file", 0))
            yield FreeMemory(max(limit - use + given_back, 0), f"the cgroup's limit of {limit / 1e9:.1f} GB")


def _limits() -> Iterator[FreeMemory]:
    """Yield the free memory under RLIMIT_AS and RLIMIT_DATA (`ulimit -v`, `ulimit -d`)."""
    import resource  # not on Windows

    fields = _fields(PROC / "status")
    for name, kind, used in (("-v", resource.RLIMIT_AS, "VmSize"), ("-d", resource.RLIMIT_DATA, "VmData")):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY and used in fields:
            yield FreeMemory(max(limit - fields[used], 0), f"`ulimit {name}` of {limit / 1e9:.1f} GB")


def _fields(file: Path) -> dict[str, int]:
    """Return the `Name: N kB` lines of a /proc file, in bytes; empty without such a file."""
    result = {}
    with contextlib.suppress(OSError):
        for line in file.read_text().splitlines():
            name, _, value = line.partition(":")
            words = value.split()
            if len(words) == 2 and words[1] == "kB":
                result[name] = int(words[0]) * 1024
    return result


def best_device() -> torch.device:
    """Return CUDA, else Apple's GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def best_dtype(device: torch.device, cpu_flags: str | None = None) -> torch.dtype:
    """Return bf16 if the hardware multiplies it natively, else fp32.

    On a CUDA device without bf16 it is fp16. On a CPU without avx512_bf16, amx_bf16 or Arm's bf16, bf16 products run
    several times slower than fp32 ones.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "mps":
        return torch.float32
    flags = _cpu_flags() if cpu_flags is None else cpu_flags
    return torch.bfloat16 if {"avx512_bf16", "amx_bf16", "bf16"} & set(flags.split()) else torch.float32


def _cpu_flags() -> str:
    """Return the first flags (x86) or Features (Arm) line of /proc/cpuinfo; empty without that file."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line.partition(":")[2]
    return ""
