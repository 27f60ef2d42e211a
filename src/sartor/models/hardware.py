"""Best device and dtype; free and used memory.

`available_bytes` is what may still be taken before somebody says no: the machine, the cgroup (a container's limit), or
a limit of the shell. Of a cgroup's use, file pages that the kernel would give back count as free.
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
# A cgroup without a limit says so with a number near 2^63
_NO_LIMIT_BYTES = 1 << 60
# the format's own bound
_MOST_HEADER_BYTES = 100_000_000
# oneDNN keeps the code of a product for each shape that it has met: 1,024 shapes in each of two caches, up to 0.9 MB
# each. A micro-batch of a length that has not been met asks for 55 (counted on the starter); 128 hold two such
# micro-batches.
PRIMITIVE_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
PRIMITIVES, PRIMITIVES_PER_BATCH = 128, 55
_MADV_DONTNEED = 4
# device type -> the peak before the last `restart_peak`
_past_peaks: dict[str, int] = {}


@dataclass(frozen=True)
class FreeMemory:
    """Bytes that can still be taken, and what sets that bound."""

    bytes: int
    bound: str


def resident_bytes(device: torch.device | None = None) -> int:
    """Memory held now. On CUDA by tensors on the device."""
    if device is not None and device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    fields = _fields(PROC / "status")
    # elsewhere than on Linux the peak is all that the standard library tells
    return fields.get("VmRSS", 0) or peak_bytes()


def peak_bytes(device: torch.device | None = None) -> int:
    """Most memory that this process has held resident; on CUDA the most that its tensors have held on the device."""
    if device is not None and device.type == "cuda":
        return max(_past_peaks.get("cuda", 0), int(torch.cuda.max_memory_allocated(device)))
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(_past_peaks.get("cpu", 0), peak if sys.platform == "darwin" else peak * 1024)


def restart_peak(device: torch.device) -> bool:
    """Let `recent_peak_bytes` count from now. False where the system cannot (macOS, a /proc that cannot be
    written).
    """
    if device.type not in ("cpu", "cuda"):
        return False
    # the counters forget the old peak, so `peak_bytes` must not
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
    """Most memory held since `restart_peak`. Only where that returned true."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device))
    return _fields(PROC / "status")["VmHWM"]


def bound_primitive_caches() -> None:
    """Let oneDNN keep the code of PRIMITIVES products, unless the environment says how many.

    It reads the environment once, before its first product: call this before a base computes.
    """
    for name in PRIMITIVE_CACHES:
        os.environ.setdefault(name, str(PRIMITIVES))


def cached_batch_shapes() -> int:
    """Lengths of a micro-batch whose products oneDNN keeps the code of, at least one."""
    capacities = [os.environ.get(name, "") for name in PRIMITIVE_CACHES]
    return max(1, *(int(text) if text.isdecimal() else 1024 for text in capacities)) // PRIMITIVES_PER_BATCH or 1


def release_free_memory() -> None:
    """Return to the system what the allocator holds and nobody uses. Without glibc nothing is done."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def drop_mapped_pages(tensors: Sequence[torch.Tensor]) -> None:
    """Let the pages of tensors go that are parts of a mapped weights file; whoever looks there reads the file again.

    For weights that have been copied elsewhere: their pages would stay resident beside the copy. Tensors in memory of
    the process are left alone, and so is everything where there is no /proc.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        madvise = ctypes.CDLL(None).madvise
        pattern = re.compile(r"([0-9a-f]+)-([0-9a-f]+) r\S+ \S+ \S+ [1-9]\d* +\S.*\.safetensors")
        lines = (PROC / "maps").read_text().splitlines()
        mapped = [(int(match[1], 16), int(match[2], 16)) for match in map(pattern.match, lines) if match]
        page = os.sysconf("SC_PAGESIZE")
        for tensor in tensors:
            # whole pages alone: a page at an end is also the neighbour's
            low = -(-tensor.data_ptr() // page) * page
            high = (tensor.data_ptr() + tensor.nbytes) // page * page
            if tensor.is_contiguous() and low < high and any(start <= low and high <= end for start, end in mapped):
                madvise(ctypes.c_void_p(low), ctypes.c_size_t(high - low), ctypes.c_int(_MADV_DONTNEED))


def available_bytes(device: torch.device | None = None) -> FreeMemory:
    """What can still be taken: the smallest of what the machine has, the cgroup allows and the shell allows."""
    if device is not None and device.type == "cuda":
        held_unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return FreeMemory(int(torch.cuda.mem_get_info(device)[0] + held_unused), "the device's free memory")
    bounds = [
        FreeMemory(_machine_bytes(), "the machine's free memory"),
        *_cgroups(PROC / "cgroup", CGROUPS),
        *_limits(),
    ]
    return min(bounds, key=lambda bound: bound.bytes)


def weights_in(folder: Path) -> int:
    """How many numbers the safetensors files of a folder hold, read from their headers. Unreadable ones count as
    none.
    """
    count = 0
    for file in sorted(folder.glob("*.safetensors")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError), file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length <= _MOST_HEADER_BYTES:
                header = json.loads(stream.read(length))
                count += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return count


def _machine_bytes() -> int:
    if result := _fields(Path("/proc/meminfo")).get("MemAvailable"):
        return result
    import psutil  # comes with accelerate

    return int(psutil.virtual_memory().available)


def _cgroups(membership: Path, mount: Path) -> Iterator[FreeMemory]:
    """The room in each memory cgroup of this process, from its own up to the root (v2, then v1)."""
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
            # inside a container the path of the host may not be there; its own group is then the root
            for group in dict.fromkeys([group_path, *group_path.parents, PurePosixPath(".")]):
                yield from _room_in(root / group, *names)


def _room_in(group: Path, limit_name: str, use_name: str) -> Iterator[FreeMemory]:
    with contextlib.suppress(OSError, ValueError):  # "max" is no number, and no limit
        limit = int((group / limit_name).read_text())
        if limit < _NO_LIMIT_BYTES:
            use = int((group / use_name).read_text())
            words = (line.split() for line in (group / "memory.stat").read_text().splitlines())
            stat = {name: int(count) for name, count in words}
            given_back = stat.get("total_inactive_file", stat.get("inactive_file", 0))
            yield FreeMemory(max(limit - use + given_back, 0), f"the cgroup's limit of {limit / 1e9:.1f} GB")


def _limits() -> Iterator[FreeMemory]:
    """The room under RLIMIT_AS and RLIMIT_DATA (`ulimit -v`, `ulimit -d`)."""
    import resource  # not on Windows

    fields = _fields(PROC / "status")
    for name, kind, used in (("-v", resource.RLIMIT_AS, "VmSize"), ("-d", resource.RLIMIT_DATA, "VmData")):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY and used in fields:
            yield FreeMemory(max(limit - fields[used], 0), f"`ulimit {name}` of {limit / 1e9:.1f} GB")


def _fields(file: Path) -> dict[str, int]:
    """The `Name: N kB` lines of a file of /proc, in bytes; empty where there is no such file."""
    result = {}
    with contextlib.suppress(OSError):
        for line in file.read_text().splitlines():
            name, _, value = line.partition(":")
            words = value.split()
            if len(words) == 2 and words[1] == "kB":
                result[name] = int(words[0]) * 1024
    return result


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
