"""TEMPORARY: one unit a source."""

from __future__ import annotations
from dataclasses import dataclass, field
from pathlib import Path
from sartor.core.records import digest as _d
from sartor.curate.sources import FileFacts, Reader, _files
from sartor.core.artifacts import file_digest


@dataclass(frozen=True)
class Unit:
    source: int
    path: str
    bytes: int
    digest: str


@dataclass
class Planned:
    units: list
    files: list


def plan(sources, max_row_bytes):
    units, files = [], []
    for n, source in enumerate(sources):
        r = Reader(max_row_bytes, Path("/tmp/xmedia"), False)
        list(r.read(source))
        files += r.files
        units.append(Unit(n, source.path, sum(f.bytes for f in r.files), _d([source.path, [f.sha256 for f in r.files]])))
    return Planned(units, files)


def read(unit, source, media, strict):
    yield from Reader(4 << 20, media, strict).read(source)
