"""What chaos needs from the system: a wall clock that jumps for some processes only, and values in another process's
memory.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_PIECE = 64 << 20
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw.. [0-9a-f]+ 00:00 0 +(?!\[v)")
# The monotonic clock is left alone, as a jump of the wall clock leaves it. The offset stands in a file that is mapped.
_CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static volatile const long long *offset;
static int (*real)(clockid_t, struct timespec *);
__attribute__((constructor)) static void begin(void) {
  const char *path = getenv("CHAOS_CLOCK");
  int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
  void *found = file < 0 ? MAP_FAILED : mmap(0, sizeof *offset, PROT_READ, MAP_SHARED, file, 0);
  if (found != MAP_FAILED) offset = found;
  if (file >= 0) close(file);
  real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
}
int clock_gettime(clockid_t id, struct timespec *now) {
  int status = real ? real(id, now) : (int)syscall(SYS_clock_gettime, id, now);
  if (!status && offset && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) now->tv_sec += *offset;
  return status;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
  struct timespec exact;
  int status = clock_gettime(CLOCK_REALTIME, &exact);
  if (!status && now) { now->tv_sec = exact.tv_sec; now->tv_usec = exact.tv_nsec / 1000; }
  return status;
}
time_t time(time_t *out) {
  struct timespec exact;
  clock_gettime(CLOCK_REALTIME, &exact);
  if (out) *out = exact.tv_sec;
  return exact.tv_sec;
}
"""


@dataclass(frozen=True)
class Clock:
    """The wall clock of the processes that are started with `environment`. file: its offset. library: what is
    preloaded.
    """

    file: Path
    library: Path

    @classmethod
    def made(cls, folder: Path) -> Clock | None:
        """A clock that is right for now; None where there is no C compiler."""
        if not (compiler := shutil.which("cc")):
            return None
        clock = cls(folder / "clock", folder / "clock.so")
        clock.file.write_bytes(bytes(8))
        source = folder / "clock.c"
        source.write_text(_CLOCK)
        subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", clock.library, source, "-ldl"], check=True)
        return clock

    @property
    def environment(self) -> dict[str, str]:
        """What a process has to be started with."""
        return {"LD_PRELOAD": str(self.library), "CHAOS_CLOCK": str(self.file)}

    def jump(self, offset_s: int) -> None:
        """From now on it is that far from the true one."""
        with self.file.open("r+b", buffering=0) as file:
            file.write(struct.pack("<q", offset_s))


def poison(pid: int, values: np.ndarray) -> int:
    """Turn `values` to NaN wherever a process holds them in memory of its own, in F32 or BF16; how many such places
    there were.

    Raises OSError where this user may not.
    """
    exact = np.ascontiguousarray(values, "<f4")
    bits = exact.view("<u4")
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")  # to the nearest, as torch does
    poisons = {exact.tobytes(): np.full_like(exact, np.nan).tobytes(), rounded.tobytes(): b"\xc0\x7f" * rounded.size}
    places = 0
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
        for start, raw in _private(pid, memory.fileno(), max(map(len, poisons))):
            for wanted, nans in poisons.items():
                at = raw.find(wanted)
                while at >= 0:
                    places += os.pwrite(memory.fileno(), nans, start + at) == len(nans)
                    at = raw.find(wanted, at + len(wanted))
    return places


def _private(pid: int, memory: int, overlap: int) -> Iterator[tuple[int, bytes]]:
    """Address and content of what a process has written for itself, in pieces that overlap."""
    for low, high in _MAPPING.findall(Path(f"/proc/{pid}/maps").read_text()):
        for at in range(int(low, 16), int(high, 16), _PIECE):
            try:
                yield at, os.pread(memory, min(_PIECE + overlap, int(high, 16) - at), at)
            except OSError:  # it was given back meanwhile
                continue
