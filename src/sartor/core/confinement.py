"""Confinement of a process on Linux: no network, and no writes outside one folder.

Both take effect for the calling process and all processes that it starts afterwards, and cannot be undone. They need
no privilege where the kernel lets users make namespaces; elsewhere `leave_network` says why it failed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from pathlib import Path

# unshare(2)
_NEW_USER, _NEW_NET = 0x10000000, 0x40000000
# landlock(7): the system calls have these numbers on every architecture
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION_FLAG, _PATH_BENEATH = 1, 1
_WRITE_FILE, _TRUNCATE, _REFER = 1 << 1, 1 << 14, 1 << 13
# of directories: REMOVE_DIR, REMOVE_FILE, and MAKE_ of a device, directory, file, socket, pipe, block device, symlink
_CHANGE_FOLDER = sum(1 << bit for bit in range(4, 13))
# no connection to abstract sockets, and no signal to processes outside
_SCOPED = 0b11
_PR_SET_NO_NEW_PRIVS = 38


def leave_network() -> str:
    """Move this process into a network namespace of its own, in which nothing can be reached.

    Returns an empty string, or the reason why the system does not allow it; then nothing has changed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "unshare"):
        return "this system has no network namespaces"
    for flags in (_NEW_NET, _NEW_USER | _NEW_NET):  # root needs no user namespace
        if libc.unshare(flags) == 0:
            return ""
    number = ctypes.get_errno()
    return f"unshare: {errno.errorcode.get(number, str(number))}, {os.strerror(number)}"


def confine_writes(folder: Path) -> bool:
    """Let this process change files below `folder` alone, by Landlock.

    From Landlock's version 6 on it can also signal no process outside. Returns false if the kernel has no Landlock;
    then nothing has changed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(_CREATE_RULESET, None, 0, _VERSION_FLAG) if hasattr(libc, "syscall") else -1
    if version < 1:
        return False
    writes = _WRITE_FILE | _CHANGE_FOLDER
    writes |= _REFER if version >= 2 else 0
    writes |= _TRUNCATE if version >= 3 else 0
    # of struct landlock_ruleset_attr {handled_access_fs, handled_access_net, scoped} an older kernel knows a part
    attributes = struct.pack("=QQQ", writes, 0, _SCOPED)[: 24 if version >= 6 else 8]
    ruleset = libc.syscall(_CREATE_RULESET, attributes, len(attributes), 0)
    if ruleset < 0:
        return False
    try:
        for path, access in ((folder, writes), (Path(os.devnull), writes & (_WRITE_FILE | _TRUNCATE))):
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                if libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, struct.pack("=Qi", access, opened), 0):
                    return False
            finally:
                os.close(opened)
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        return libc.syscall(_RESTRICT_SELF, ruleset, 0) == 0
    finally:
        os.close(ruleset)
