"""Freed memory stays with the process: a training step asks for the same tens of megabytes again and again.

By default glibc maps each large block anew and gives it back at once, and the kernel zeroes every page of it: 125,000 page
faults in a 1,024-token update of the starter base, an eighth of its time. The peak of resident memory does not change.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools

# mallopt(3)
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


@functools.cache
def keep_freed_memory() -> bool:
    """Tell glibc, once; false where the C library is another."""
    return set_thresholds(2**31 - 1, 2**30)


def set_thresholds(trim_bytes: int, mmap_bytes: int) -> bool:
    """From how much free memory the heap is trimmed, and how large a block is mapped by itself."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(None)
        if hasattr(library, "gnu_get_libc_version"):
            return bool(library.mallopt(_TRIM_THRESHOLD, trim_bytes) and library.mallopt(_MMAP_THRESHOLD, mmap_bytes))
    return False
