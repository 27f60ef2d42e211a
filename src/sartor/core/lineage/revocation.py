"""Everything a revoked source or Example reaches.

It lists and changes nothing. Only the manifest and the index of lineage are read, so a Dataset of a million rows answers
in under a second.
"""

from __future__ import annotations

import dataclasses
import difflib
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from sartor.core import catalogue
from sartor.core.artifacts import Artifact, read_manifest
from sartor.core.catalogue import Descendant
from sartor.core.errors import ConfigError
from sartor.core.lineage import origin_index
from sartor.core.lineage.origin_index import OriginFiles, Pair
from sartor.core.lineage.receipt_index import ReceiptIndex
from sartor.core.parquet_io import column, numbers, to_index_array, to_string_array

FIRST = 10  # of each list, for a person; --json has them all


@dataclass(frozen=True)
class RevokedReply:
    """A reply that a Release gave, by its receipt. agent: the exact version. path: the folder of receipts."""

    receipt: str
    agent: str
    created: str
    path: str


@dataclass(frozen=True)
class Folder:
    """Receipts of one served team. `state`: read | not there (moved, deleted) | not read, with the reason."""

    path: str
    state: str


@dataclass(frozen=True)
class Revocation:
    """What would go. `examples` have no other origin left; `examples_kept` lose an origin and keep another."""

    dataset: Artifact
    revoked: str
    examples: list[str]
    examples_kept: list[str]
    made_from_it: list[Descendant]
    replies: list[RevokedReply]
    receipts: list[Folder]

    def as_json(self) -> dict[str, Any]:
        """The command's JSON."""
        kinds = {
            "datasets": "dataset",
            "adapters": "adapter",
            "reports": "report",
            "releases": "release",
            "exports": "export",
        }
        made = {
            name: [_without_kind(child) for child in self.made_from_it if child.kind == kind] for name, kind in kinds.items()
        }
        return {
            "dataset": str(self.dataset.path),
            "revoked": self.revoked,
            "examples": self.examples,
            "examples_kept": self.examples_kept,
            **made,
            "replies": [dataclasses.asdict(reply) for reply in self.replies],
            "receipts": [dataclasses.asdict(folder) for folder in self.receipts],
        }

    def table(self) -> list[tuple[str, Any]]:
        """The same for a person: counts, and the first ten."""
        shown: list[tuple[str, Any]] = []
        for name, value in self.as_json().items():
            if not isinstance(value, list):
                shown.append((name, value))
                continue
            lines = [_line(item) for item in value[:FIRST]]
            more = [f"and {len(value) - FIRST:,} more; --json lists them"] if len(value) > FIRST else []
            shown.append((name, [f"{len(value):,}", *lines, *more]))
        return shown


def _line(item: str | dict[str, str]) -> str:
    if isinstance(item, str):
        return item
    return (
        f"{item['receipt']} of {item['agent']}, {item['created']}" if "receipt" in item else f"{item['path']} ({item['state']})"
    )


def _without_kind(child: Descendant) -> dict[str, str]:
    return {name: value for name, value in dataclasses.asdict(child).items() if name != "kind"}


def revoke(path: Path | str, *, source: str = "", example: str = "") -> Revocation:
    """List everything that a source or an Example of a Dataset reaches. Nothing is changed.

    `source` is a source as the recipe declared it, a file's path, or `source/path`; `example` an Example's id, also of one
    that stands in no row any more but that others were made from. Raises ConfigError for a name that the Dataset does not know.
    """
    if bool(source) == bool(example):
        raise ConfigError("one of a source and an example is to be named", "--source faq.jsonl, or --example ID")
    path = Path(path).absolute()
    dataset = Artifact(path, read_manifest(path, ("dataset",)))
    table = origin_index.read(dataset, ["row", "source", "path", "parents"])
    graph = _Graph.of(dataset, table)
    if source:
        files = OriginFiles.of(table)
        pairs = _pairs(dataset, files, source)
        graph.lose_origins(files.mask(pairs) | graph.made_from_drops_of(pairs))
    else:
        graph.lose_example(example)
    gone, touched = graph.spread()
    reached = catalogue.descendants(dataset.id) if len(gone) or len(touched) else []
    releases = [child.id for child in reached if child.kind == "release"]
    replies, receipts = _replies(releases) if releases else ([], [])
    return Revocation(dataset, source or example, graph.ids_of(gone), graph.ids_of(touched), reached, replies, receipts)


def _replies(releases: list[str]) -> tuple[list[RevokedReply], list[Folder]]:
    """What these Releases said, by the receipts of every team that was served on this machine."""
    replies: list[RevokedReply] = []
    folders: list[Folder] = []
    for path in catalogue.receipt_folders():
        state = "read" if path.is_dir() else "not there"
        if path.is_dir():
            index = ReceiptIndex(path)
            try:
                index.catch_up()
                replies += [RevokedReply(one.id, one.agent, one.created, str(path)) for one in index.of_releases(releases)]
            except (OSError, sqlite3.Error) as error:
                state = f"not read: {error}"
        folders.append(Folder(str(path), state))
    return replies, folders


def _pairs(dataset: Artifact, files: OriginFiles, source: str) -> set[Pair]:
    """The files that a person means by `source`."""
    known = origin_index.known_pairs(dataset.manifest, files)
    found = origin_index.named(known, source)
    if len(found) > 1:
        raise ConfigError(f"{source!r} names {len(found)} files: {', '.join(sorted(found)[:5])}", f"--source {min(found)}")
    if not found:
        names = sorted({name for pair in known for name in (pair[0], origin_index.place(*pair))})
        near = difflib.get_close_matches(source, names[:10_000], n=1, cutoff=0.4)
        more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
        remedy = f"--source {near[0] if near else names[0] if names else '...'}"
        raise ConfigError(f"{dataset.path.name} knows no source {source!r}; it has {', '.join(names[:5])}{more}", remedy)
    return next(iter(found.values()))


@dataclass
class _Graph:
    """Examples, their origins, and which origins were made from which Examples: arrays over origins unless said otherwise."""

    dataset: Artifact
    row: Any
    total: Any  # per Example: its origins
    parents: Any  # Arrow lists of ids
    lost: Any
    gone: Any  # per Example
    ids: Any = None  # an Arrow array, read when it is first needed

    @classmethod
    def of(cls, dataset: Artifact, table: Any) -> _Graph:
        row = numbers(column(table, "row"))
        total = np.bincount(row)
        return cls(dataset, row, total, column(table, "parents"), np.zeros(len(row), bool), np.zeros(len(total), bool))

    def lose_origins(self, mask: Any) -> None:
        """Revoke these origins."""
        self.lost = mask
        self.gone = (self._lost_per_example() == self.total) & (self.total > 0)

    def _lost_per_example(self) -> Any:
        return np.bincount(self.row[self.lost], minlength=len(self.total))

    def made_from(self, ids: Any) -> Any:
        """Which origins name one of these Examples as a parent."""
        made = np.zeros(len(self.row), bool)
        named = numbers(pc.is_in(pc.list_flatten(self.parents), value_set=ids))
        made[numbers(pc.list_parent_indices(self.parents))[named]] = True
        return made

    def made_from_drops_of(self, pairs: set[Pair]) -> Any:
        """Origins made from rows of these files that were themselves dropped, so that no Example stands for the parent."""
        parents = pc.list_flatten(self.parents).unique()
        if not len(parents):
            return np.zeros(len(self.row), bool)
        known = np.zeros(len(parents), bool)
        # the few are looked up among themselves for each of the many: a table of a million ids takes longer to build
        known[numbers(pc.index_in(self._load_ids(), value_set=parents).drop_null())] = True
        absent = parents.take(to_index_array(np.flatnonzero(~known)))
        return self.made_from(to_string_array(origin_index.dropped_ids(self.dataset, absent, pairs)))

    def lose_example(self, example: str) -> None:
        """Revoke an Example: its row, and the origins that name it as a parent."""
        one = to_string_array([origin_index.whole_id(self._load_ids(), example)])
        mask = numbers(pc.is_in(self._load_ids(), value_set=one)) | self.made_from(one)
        if not mask.any():
            raise ConfigError(f"{self.dataset.path.name} has no example {example!r}", self._nearest(example))
        self.lose_origins(mask)

    def _nearest(self, example: str) -> str:
        for length in range(len(example), 3, -1):
            near = pc.index(pc.starts_with(self._load_ids(), example[:length]), True).as_py()
            if near >= 0:
                return f"--example {self._load_ids()[near].as_py()}"
        return f"the `id` column of {self.dataset.path / 'examples'} has them"

    def spread(self) -> tuple[Any, Any]:
        """Follow parents down until nothing more is lost; returns the Examples gone, and those that lose an origin only."""
        if self.gone.any() and len(pc.list_flatten(self.parents)):
            self._follow()
        return np.flatnonzero(self.gone), np.flatnonzero((self._lost_per_example() > 0) & ~self.gone)

    def _follow(self) -> None:
        named = pc.list_flatten(self.parents).dictionary_encode()
        row_of = np.full(len(named.dictionary), -1)  # per distinct parent: its Example
        which = pc.index_in(self._load_ids(), value_set=named.dictionary)
        row_of[numbers(which.drop_null())] = self.row[numbers(which.is_valid())]
        parent, child = row_of[numbers(named.indices)], numbers(pc.list_parent_indices(self.parents))
        order = np.argsort(parent, kind="stable")
        parent, child = parent[order], child[order]
        left = self.total - self._lost_per_example()
        edge = np.flatnonzero(self.gone)
        while len(edge):  # each Example is on the edge once, so this is linear in the parents, however deep they go
            starts, ends = np.searchsorted(parent, edge, "left"), np.searchsorted(parent, edge, "right")
            counts = ends - starts
            fresh = np.unique(child[np.repeat(starts - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())])
            fresh = fresh[~self.lost[fresh]]
            self.lost[fresh] = True
            rows, times = np.unique(self.row[fresh], return_counts=True)
            left[rows] -= times
            edge = rows[left[rows] == 0]
            self.gone[edge] = True

    def _load_ids(self) -> Any:
        if self.ids is None:
            self.ids = column(origin_index.read(self.dataset, ["id"]), "id")
        return self.ids

    def ids_of(self, examples: Any) -> list[str]:
        """The ids of these Examples."""
        if not len(examples):
            return []
        found: list[str] = self._load_ids().take(to_index_array(np.searchsorted(self.row, examples))).to_pylist()
        return found
