"""What is on the device, for a program that only reads: without the lock, in one read of one file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sartor.core.filesystem import FileSystem
from sartor.edge.store.pointers import Pointers, Trial, Version, tree_of


@dataclass(frozen=True)
class Installed:
    """A version that is on the device. `path` opens as a Release; `since`: UTC; `files`: path inside it -> blob.

    `trial`: the starts that it has left to prove itself; None: it has, or was never asked to.
    """

    name: str
    version: str
    path: Path
    since: str
    files: Mapping[str, str]
    trial: Trial | None = None


def installed(folder: Path, name: str) -> Installed | None:
    """What is current in the store at `folder`."""
    pointer = Pointers(FileSystem(), folder.absolute()).read(name)
    return of(folder.absolute(), name, pointer.current, pointer.trial)


@dataclass(frozen=True)
class State:
    """Everything that a store says of one name. `refused`: version -> why."""

    name: str
    current: Installed | None
    previous: Installed | None
    staged: Installed | None
    refused: Mapping[str, str]


def states(folder: Path) -> list[State]:
    """The state of every name in the store at `folder`; nothing where there is none."""
    folder = folder.absolute()
    return [
        State(
            one.name,
            of(folder, one.name, one.current, one.trial),
            of(folder, one.name, one.previous),
            of(folder, one.name, one.staged),
            one.refused,
        )
        for one in Pointers(FileSystem(), folder).all()
    ]


def of(folder: Path, name: str, version: Version | None, trial: Trial | None = None) -> Installed | None:
    """A version of a pointer as a program sees it."""
    if version is None:
        return None
    path = folder / tree_of(name, version.version)
    return Installed(name, version.version, path, version.since, version.files, trial)
