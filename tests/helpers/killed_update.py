"""A program that kills itself: one child per operation of the update that the tests interrupt. Run as a script: its memory is
small, so a fork takes a millisecond.

    killed_update.py ROOT EACH    ROOT/N/ is the store as the N-th kill left it; prints a JSON line [N, step, operation] for it

EACH 1 leaves no operation out; 8 kills before the first, the ninth, ...
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from edge_disks import STEPS
from sartor.core.filesystem import Content, FileSystem
from sartor.edge.store.release_store import ReleaseStore

CHANGES = ("write", "append", "sync", "sync_folder", "rename", "link", "unlink", "mkdir", "rmdir")


class Killer(FileSystem):
    """Kills its own process before the n-th operation; a write is also cut in the middle, which counts as one more."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.count = at, 0
        self.said = ""

    def point(self, what: str) -> None:
        if self.count == self.at:
            os.write(1, (json.dumps([self.at, self.said, what]) + "\n").encode())
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1

    def write(self, path: Path, content: Content) -> None:
        self.point(f"write {path.name}")
        if isinstance(content, bytes) and len(content) > 1:
            super().write(path, content[: len(content) // 2])
            self.point(f"half of write {path.name}")
        super().write(path, content)

    def append(self, path: Path, content: bytes) -> None:
        self.point(f"append {path.name}")
        if len(content) > 1:
            super().append(path, content[: len(content) // 2])
            self.point(f"half of append {path.name}")
            content = content[len(content) // 2 :]
        super().append(path, content)

    def sync(self, path: Path) -> None:
        self.point(f"sync {path.name}")
        super().sync(path)

    def sync_folder(self, path: Path) -> None:
        self.point(f"sync_folder {path.name}")
        super().sync_folder(path)

    def rename(self, source: Path, target: Path) -> None:
        self.point(f"rename {target.name}")
        super().rename(source, target)

    def link(self, source: Path, target: Path) -> None:
        self.point(f"link {target.name}")
        super().link(source, target)

    def unlink(self, path: Path) -> None:
        self.point(f"unlink {path.name}")
        super().unlink(path)

    def mkdir(self, path: Path) -> None:
        self.point(f"mkdir {path.name}")
        super().mkdir(path)

    def rmdir(self, path: Path) -> None:
        self.point(f"rmdir {path.name}")
        super().rmdir(path)


def run(folder: Path, at: int) -> None:
    """The whole update, unless it is killed."""
    disk = Killer(at)
    disk.said = STEPS[0].name
    with ReleaseStore(folder, disk=disk) as store:
        for step in STEPS:
            disk.said = step.name
            step.act(store, disk)


def main(root: Path, each: int) -> None:
    """Kill at one operation after the other until a child lives to the end."""
    at = 0
    while True:
        child = os.fork()
        if child == 0:
            try:
                run(root / str(at), at)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert status == 0, f"child {at} failed"
            return
        assert os.WTERMSIG(status) == signal.SIGKILL
        at += each


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
