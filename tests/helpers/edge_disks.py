"""A file system in memory that forgets in a power cut what was not fsynced; and the update that the tests interrupt.

    names      a folder's durable names are those of its last fsync; of each later change any subset may have happened
    contents   a file's durable bytes are those of its last fsync; of what came later nothing, a part, garbage or all is there

A rename within a folder is one change, as in every file system with a journal; one from folder to folder is two, which is
harsher than they are.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import io
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

from sartor.core.errors import HealthError, StoreError
from sartor.core.filesystem import Content, FileSystem, Stat
from sartor.edge.store.release_store import ReleaseStore
from sartor.edge.store.version_pointers import Installed

_numbers = itertools.count(1)


@dataclass(eq=False)
class File:
    content: bytes = b""
    durable: bytes = b""
    number: int = field(default_factory=lambda: next(_numbers))


@dataclass(eq=False)
class Folder:
    names: dict[str, File | Folder] = field(default_factory=dict)
    durable: dict[str, File | Folder] = field(default_factory=dict)
    changes: list[dict[str, File | Folder | None]] = field(default_factory=list)
    number: int = field(default_factory=lambda: next(_numbers))

    def change(self, change: dict[str, File | Folder | None]) -> None:
        apply(self.names, change)
        self.changes.append(change)


def apply(names: dict[str, File | Folder], change: dict[str, File | Folder | None]) -> None:
    for name, node in change.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


@dataclass(frozen=True)
class Cut:
    """What a power cut leaves of what was not fsynced. `random`: each change, each file by itself."""

    names: Literal["none", "all", "random"]
    contents: Literal["lost", "garbage", "all", "random"]
    seed: int = 0


CUTS = [
    Cut("none", "lost"),
    Cut("all", "lost"),
    Cut("all", "garbage"),
    Cut("all", "all"),
    *(Cut("random", "random", seed) for seed in range(4)),
]


class MemoryDisk(FileSystem):
    """`before` is called before each operation that changes something, with its name and path; it may raise."""

    def __init__(self, root: Folder | None = None) -> None:
        self.root = root or Folder()
        self.before: Callable[[str, Path], None] = lambda operation, path: None
        self.free = 1 << 40

    def _find(self, path: Path) -> File | Folder | None:
        node: File | Folder | None = self.root
        for part in filter(None, str(path).split("/")):
            node = node.names.get(part) if isinstance(node, Folder) else None
        return node

    def _folder(self, path: Path) -> Folder:
        node = self._find(path)
        if not isinstance(node, Folder):
            raise FileNotFoundError(errno.ENOENT, "no such folder", str(path))
        return node

    def _file(self, path: Path) -> File:
        node = self._find(path)
        if not isinstance(node, File):
            raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
        return node

    def _writing(self, path: Path, kept: bool, content: bytes) -> None:
        node = self._find(path)
        if node is None:
            node = File()
            self._folder(path.parent).change({path.name: node})
        assert isinstance(node, File)
        node.content = (node.content if kept else b"") + content

    def write(self, path: Path, content: Content) -> None:
        if callable(content):
            stream = io.BytesIO()
            content(stream)
            content = stream.getvalue()
        written = content
        self._operation("write", path, lambda half: self._writing(path, False, written[: len(written) // half]))

    def append(self, path: Path, content: bytes) -> None:
        self._operation("append", path, lambda half: self._writing(path, True, content[: len(content) // half]))

    def _operation(self, name: str, path: Path, act: Callable[[int], None]) -> None:
        """A write that cannot be finished has written a half."""
        try:
            self.before(name, path)
        except OSError:
            act(2)
            raise
        act(1)

    def sync(self, path: Path) -> None:
        self.before("sync", path)
        file = self._file(path)
        file.durable = file.content

    def sync_folder(self, path: Path) -> None:
        self.before("sync_folder", path)
        folder = self._folder(path)
        folder.durable, folder.changes = dict(folder.names), []

    def rename(self, source: Path, target: Path) -> None:
        self.before("rename", target)
        node, old, new = self._find(source), self._folder(source.parent), self._folder(target.parent)
        assert node is not None, f"there is no {source}"
        there = new.names.get(target.name)
        if isinstance(there, Folder) and (there.names or isinstance(node, File)):
            raise OSError(errno.ENOTEMPTY, "not empty", str(target))
        if old is new:
            new.change({source.name: None, target.name: node})
        else:
            new.change({target.name: node})
            old.change({source.name: None})

    def link(self, source: Path, target: Path) -> None:
        self.before("link", target)
        file, folder = self._file(source), self._folder(target.parent)
        if target.name in folder.names:
            raise FileExistsError(errno.EEXIST, "exists", str(target))
        folder.change({target.name: file})

    def unlink(self, path: Path) -> None:
        self.before("unlink", path)
        self._file(path)
        self._folder(path.parent).change({path.name: None})

    def mkdir(self, path: Path) -> None:
        self.before("mkdir", path)
        if self._find(path) is not None:
            raise FileExistsError(errno.EEXIST, "exists", str(path))
        self._folder(path.parent).change({path.name: Folder()})

    def rmdir(self, path: Path) -> None:
        self.before("rmdir", path)
        if self._folder(path).names:
            raise OSError(errno.ENOTEMPTY, "not empty", str(path))
        self._folder(path.parent).change({path.name: None})

    def open(self, path: Path) -> BinaryIO:
        return io.BytesIO(self._file(path).content)

    def digest(self, path: Path) -> str:
        return hashlib.sha256(self._file(path).content).hexdigest()

    def names(self, path: Path) -> list[str]:
        node = self._find(path)
        return sorted(node.names) if isinstance(node, Folder) else []

    def stat(self, path: Path) -> Stat | None:
        node = self._find(path)
        if node is None:
            return None
        return Stat(node.number, len(node.content) if isinstance(node, File) else 0, isinstance(node, Folder))

    def free_bytes(self, path: Path) -> int:
        return self.free

    def lock(self, path: Path) -> Callable[[], None]:
        return lambda: None

    def after(self, cut: Cut | None) -> MemoryDisk:
        """The disk as it is found when the power is back; without a cut, as the next process finds it after a kill."""
        if cut is None:
            return MemoryDisk(copy.deepcopy(self.root))
        return MemoryDisk(_Survivor(cut).folder(self.root))

    def files(self, path: Path) -> Iterator[tuple[Path, File]]:
        """Every file below a folder."""
        for name, node in sorted(self._folder(path).names.items()):
            if isinstance(node, File):
                yield path / name, node
            else:
                yield from self.files(path / name)


class _Survivor:
    def __init__(self, cut: Cut) -> None:
        self.cut, self.rng = cut, random.Random(cut.seed)
        self.made: dict[int, File | Folder] = {}

    def folder(self, folder: Folder) -> Folder:
        names = dict(folder.durable)
        for change in folder.changes:
            if self.cut.names == "all" or (self.cut.names == "random" and self.rng.random() < 0.5):
                apply(names, change)
        left = {name: self.node(node) for name, node in names.items()}
        return Folder(left, dict(left))

    def node(self, node: File | Folder) -> File | Folder:
        # one file under several names stays one file
        if node.number not in self.made:
            self.made[node.number] = self.folder(node) if isinstance(node, Folder) else self.file(node)
        return self.made[node.number]

    def file(self, file: File) -> File:
        if file.content == file.durable:
            return File(file.content, file.durable)
        how = self.cut.contents
        if how == "random":
            how = self.rng.choice(["lost", "part", "garbage", "all"])  # type: ignore[assignment]
        size = len(file.content)
        content = {
            "lost": file.durable if file.content.startswith(file.durable) else b"",
            "part": file.content[: self.rng.randrange(size + 1)],
            "garbage": self.rng.randbytes(size),
            "all": file.content,
        }[how]
        return File(content, content)


# the update that is interrupted

NAME = "faq"
SHARED = {"config/adapter_config.json": b'{"r": 8}' * 5, "config/deep/chat.jinja": b"{{ messages }}"}
VERSIONS: dict[str, dict[str, bytes]] = {
    version: {
        "release.json": f"manifest of {version}".encode(),
        "adapter.safetensors": version.encode() * 500,
        "empty": b"",
        **SHARED,
    }
    for version in ("1.0", "1.1", "1.2", "1.3", "1.4", "1.5")
}


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def digests(version: str) -> dict[str, str]:
    return {path: digest_of(content) for path, content in VERSIONS[version].items()}


def content_of(disk: FileSystem, path: Path) -> bytes:
    with disk.open(path) as stream:
        return stream.read()


def tree(disk: FileSystem, path: Path, below: str = "") -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for name in disk.names(path):
        stat = disk.stat(path / name)
        assert stat is not None
        if stat.is_folder:
            found |= tree(disk, path / name, f"{below}{name}/")
        else:
            found[below + name] = content_of(disk, path / name)
    return found


def fetch(store: ReleaseStore, contents: dict[str, bytes]) -> None:
    for content in contents.values():
        digest = digest_of(content)
        if store.has(digest):
            continue
        for _ in range(2):
            have = store.partial(digest)
            half = (len(content) + 1) // 2
            if piece := content[have : have + half]:
                store.append(digest, have, piece)
        try:
            store.finish(digest)
        except StoreError:  # what the power cut left of a download was garbage: it begins anew, once
            store.append(digest, 0, content)
            store.finish(digest)


def sizes(version: str) -> dict[str, int]:
    return {digest_of(content): len(content) for content in VERSIONS[version].values()}


def install(store: ReleaseStore, version: str, disk: FileSystem, starts: int = 0) -> None:
    contents = VERSIONS[version]
    store.make_room(NAME, sizes(version))
    fetch(store, contents)

    def healthy(path: Path) -> None:
        if tree(disk, path) != contents:
            raise ValueError("it is not what was published")

    store.stage(NAME, version, digests(version))
    store.activate(NAME, version, healthy, starts=starts)


def rollback(store: ReleaseStore, disk: FileSystem) -> None:
    if version_of(store.current(NAME)) == "1.1":
        assert store.rollback(NAME, "answers in riddles").version == "1.0"


def collect(store: ReleaseStore, disk: FileSystem) -> None:
    store.collect()


def try_out(store: ReleaseStore, disk: FileSystem) -> None:
    """An update on trial for two starts, of which none confirms: the third start goes back."""
    if "1.3" in store.refused(NAME):
        return
    if version_of(store.current(NAME)) != "1.3":
        install(store, "1.3", disk, starts=2)
    for _ in range(3):
        assert version_of(store.start(NAME)) in ("1.2", "1.3")


def keep(store: ReleaseStore, disk: FileSystem) -> None:
    """An update on trial that confirms."""
    if version_of(store.current(NAME)) != "1.5":
        install(store, "1.5", disk, starts=5)
    store.start(NAME)
    store.confirm(NAME)


def refuse(store: ReleaseStore, disk: FileSystem) -> None:
    """An update whose health check fails."""
    if "1.4" in store.refused(NAME):
        return
    store.make_room(NAME, sizes("1.4"))
    fetch(store, VERSIONS["1.4"])
    store.stage(NAME, "1.4", digests("1.4"))
    try:
        store.activate(NAME, "1.4", ill)
    except HealthError:
        return
    raise AssertionError("an ill version was activated")


def ill(path: Path) -> None:
    raise ValueError("canary: it answers in riddles")


@dataclass(frozen=True)
class Step:
    name: str
    act: Callable[[ReleaseStore, FileSystem], None]
    before: str | None
    after: str
    during: str = ""


STEPS = (
    Step("install", lambda store, disk: install(store, "1.0", disk), None, "1.0"),
    Step("update", lambda store, disk: install(store, "1.1", disk), "1.0", "1.1"),
    Step("rollback", rollback, "1.1", "1.0"),
    Step("update again", lambda store, disk: install(store, "1.2", disk), "1.0", "1.2"),
    Step("collect", collect, "1.2", "1.2"),
    Step("trial", try_out, "1.2", "1.2", during="1.3"),
    Step("refuse", refuse, "1.2", "1.2"),
    Step("keep", keep, "1.2", "1.5"),
)


def version_of(installed: Installed | None) -> str | None:
    return installed.version if installed else None


def steps_on(folder: Path) -> Iterator[tuple[Step, MemoryDisk]]:
    """A disk of its own for each step, as the steps before it left it."""
    disk = MemoryDisk()
    for step in STEPS:
        yield step, disk.after(Cut("all", "all"))
        with ReleaseStore(folder, disk=disk) as store:
            step.act(store, disk)


def check_whole(store: ReleaseStore, disk: FileSystem) -> None:
    """Every version that the store names has exactly its files, byte by byte."""
    for installed in (store.current(NAME), store.previous(NAME), store.staged(NAME)):
        if installed:
            assert tree(disk, installed.path) == VERSIONS[installed.version], f"{installed.version} is not whole"


def check_after(disk: FileSystem, folder: Path, step: Step) -> None:
    """Opened again: the old or the new version, whole, and the step then goes through; nobody mended anything by hand."""
    with ReleaseStore(folder, disk=disk) as store:
        check_swept(disk, folder)
        found = version_of(store.current(NAME))
        assert found in (step.before, step.after, step.during), f"{step.name} left {found}"
        check_whole(store, disk)
        step.act(store, disk)
        check_done(store, disk, step)


def check_done(store: ReleaseStore, disk: FileSystem, step: Step) -> None:
    assert version_of(store.current(NAME)) == step.after
    check_whole(store, disk)
    store.collect()
    check_whole(store, disk)
    assert store.verify() == []
    if step.name == "rollback":
        assert dict(store.refused(NAME)) == {"1.1": "answers in riddles"}
        try:
            install(store, "1.1", disk)
        except HealthError:
            assert version_of(store.current(NAME)) == "1.0"
        else:
            raise AssertionError("a version that was rolled back was activated again")
    if step.name == "trial":
        assert store.refused(NAME)["1.3"] == "starts: it did not confirm within 2"
    if step.name == "keep":
        found = store.current(NAME)
        assert found is not None and found.trial is None
    if step.name == "refuse":
        assert "riddles" in store.refused(NAME)["1.4"] and store.staged(NAME) is None
    check_swept(disk, store.folder)


def check_swept(disk: FileSystem, folder: Path) -> None:
    """Nothing is left of an interrupted write."""
    assert [name for name in walk(disk, folder) if name.startswith(".")] == []


def walk(disk: FileSystem, path: Path) -> Iterator[str]:
    for name in disk.names(path):
        yield name
        yield from walk(disk, path / name)
