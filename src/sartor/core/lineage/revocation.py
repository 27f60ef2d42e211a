"""Artefacts and replies that a revoked source or Example reaches.

It lists them and changes nothing. Only the manifest and the lineage index are read, so a Dataset of a million rows
takes less than a second.
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

from sartor.core import catalogue, trace_store
from sartor.core.artifacts import Artifact, Dataset, read_manifest
from sartor.core.catalogue import Descendant
from sartor.core.errors import ConfigError
from sartor.core.home import ROW_CACHES, home
from sartor.core.lineage import origin_index
from sartor.core.lineage.origin_index import OriginFiles, Pair
from sartor.core.lineage.receipt_index import ReceiptIndex
from sartor.core.parquet_io import column, numbers, to_index_array, to_string_array

FIRST = 10  # items of each list shown on a terminal; --json has all


@dataclass(frozen=True)
class RevokedReply:
    """A reply of an affected Release, by its receipt.

    agent: exact version.
    path: folder of the receipts.
    """

    receipt: str
    agent: str
    created: str
    path: str


@dataclass(frozen=True)
class Folder:
    """Receipts of one served team, or a cache.

    state: "read", "not there" (moved or deleted), or "not read" with the reason; of a cache, what to do with it.
    """

    path: str
    state: str


@dataclass(frozen=True)
class Revocation:
    """Everything that a revocation affects.

    examples: Examples with no other origin left.
    examples_kept: Examples that lose an origin and keep another.
    caches: folders of this machine that hold what was computed from rows: by digests of them, of which rows nobody
        can tell; and sketches for attribution, of adapters made from the Dataset. `sartor assets prune --cache`
        empties them.
    """

    dataset: Artifact
    revoked: str
    examples: list[str]
    examples_kept: list[str]
    made_from_it: list[Descendant]
    replies: list[RevokedReply]
    receipts: list[Folder]
    caches: list[str]

    def as_json(self) -> dict[str, Any]:
        """Return the command's JSON."""
        descendants: dict[str, list[dict[str, str]]] = {}
        for kind in ("dataset", "adapter", "report", "release", "export"):
            descendants[f"{kind}s"] = []
        for child in self.made_from_it:
            fields = dataclasses.asdict(child)
            kind = fields.pop("kind")
            if f"{kind}s" in descendants:
                descendants[f"{kind}s"].append(fields)
        return {
            "dataset": str(self.dataset.path),
            "revoked": self.revoked,
            "examples": self.examples,
            "examples_kept": self.examples_kept,
            **descendants,
            "replies": [dataclasses.asdict(reply) for reply in self.replies],
            "receipts": [dataclasses.asdict(folder) for folder in self.receipts],
            "caches": self.caches,
        }

    def table(self) -> list[tuple[str, Any]]:
        """Return lines for a terminal: counts, and the first ten items of each list."""
        rows: list[tuple[str, Any]] = []
        for name, value in self.as_json().items():
            if not isinstance(value, list):
                rows.append((name, value))
                continue
            lines = [_line(item) for item in value[:FIRST]]
            suffix = [f"and {len(value) - FIRST:,} more; --json lists them"] if len(value) > FIRST else []
            rows.append((name, [f"{len(value):,}", *lines, *suffix]))
        return rows


def _line(item: str | dict[str, str]) -> str:
    if isinstance(item, str):
        return item
    if "receipt" in item:
        return f"{item['receipt']} of {item['agent']}, {item['created']}"
    return f"{item['path']} ({item['state']})"


def revoke(path: Path | str, *, source: str = "", example: str = "") -> Revocation:
    """List everything that a source or an Example of a Dataset reaches; change nothing.

    source: a source as the recipe declares it, a file's path, or `source/path`.
    example: an Example's id; also of an Example that is no longer a row, if others were made from it.
    Raises ConfigError for a name that the Dataset does not know.
    """
    if bool(source) == bool(example):
        raise ConfigError("one of a source and an example is to be named", "--source faq.jsonl, or --example ID")
    path = Path(path).absolute()
    dataset = Dataset(path, read_manifest(path, ("dataset",)))
    table = origin_index.read(dataset, ["row", "source", "path", "parents"])
    graph = _Graph.of(dataset, table)
    if source:
        files = OriginFiles.of(table)
        pairs = _pairs(dataset, files, source)
        graph.lose_origins(files.mask(pairs) | graph.made_from_drops_of(pairs))
    else:
        graph.lose_example(example)
    removed, affected = graph.spread()
    descendants = catalogue.descendants(dataset.id) if len(removed) or len(affected) else []
    releases = [child.id for child in descendants if child.kind == "release"]
    replies, receipts = _replies(releases) if releases else ([], [])
    return Revocation(
        dataset,
        revoked=source or example,
        examples=graph.ids_of(removed),
        examples_kept=graph.ids_of(affected),
        made_from_it=descendants,
        replies=replies,
        receipts=receipts,
        caches=_filled_caches(dataset, descendants) if len(removed) or len(affected) else [],
    )


def _filled_caches(dataset: Artifact, descendants: list[Descendant]) -> list[str]:
    """Return the folders of SARTOR_HOME that hold values computed from rows, if there is anything in them.

    Of the sketches for attribution, those of adapters made from the Dataset.
    """
    folders = [home() / name for name in ROW_CACHES]
    filled = [folder for folder in folders if folder.is_dir() and any(folder.iterdir())]
    traces = trace_store.find_traces(adapter_ids={child.id for child in descendants}, dataset_ids={dataset.id})
    return [str(folder) for folder in [*filled, *traces]]


def _replies(releases: list[str]) -> tuple[list[RevokedReply], list[Folder]]:
    """Return the replies of these Releases, from the receipts of every team served on this machine.

    The second result is the state of each folder of receipts.
    """
    replies: list[RevokedReply] = []
    folders: list[Folder] = []
    for path in catalogue.receipt_folders():
        state = "read" if path.is_dir() else "not there"
        if path.is_dir():
            index = ReceiptIndex(path)
            try:
                index.catch_up()
                replies += [
                    RevokedReply(item.id, item.agent, item.created, str(path)) for item in index.of_releases(releases)
                ]
            except (OSError, sqlite3.Error) as error:
                state = f"not read: {error}"
        folders.append(Folder(str(path), state))
    return replies, folders


def _pairs(dataset: Artifact, files: OriginFiles, source: str) -> set[Pair]:
    """Return the (source, file) pairs that `source` names. Raises ConfigError if none or several match."""
    pairs = origin_index.known_pairs(dataset.manifest, files)
    matches = origin_index.pairs_by_name(pairs, source)
    if len(matches) > 1:
        raise ConfigError(
            f"{source!r} names {len(matches)} files: {', '.join(sorted(matches)[:5])}", f"--source {min(matches)}"
        )
    if not matches:
        names = sorted({pair[0] for pair in pairs} | {origin_index.display_name(*pair) for pair in pairs})
        suggestions = difflib.get_close_matches(source, names[:10_000], n=1, cutoff=0.4)
        suffix = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
        closest = names[0] if names else "..."
        if suggestions:
            closest = suggestions[0]
        raise ConfigError(
            f"{dataset.path.name} knows no source {source!r}; it has {', '.join(names[:5])}{suffix}",
            f"--source {closest}",
        )
    return next(iter(matches.values()))


@dataclass
class _Graph:
    """Graph of N Examples and their M origins, with the Examples from which each origin was made.

    row: (M,) Example of each origin.
    total: (N,) number of origins of each Example.
    parents: (M,) Arrow lists of parent ids.
    lost: (M,) whether the origin is revoked.
    removed: (N,) whether the Example has no origin left.
    ids: (M,) Arrow array of the origin's Example id, read at the first use.
    """

    dataset: Artifact
    row: Any
    total: Any
    parents: Any
    lost: Any
    removed: Any
    ids: Any = None

    @classmethod
    def of(cls, dataset: Artifact, table: Any) -> _Graph:
        row = numbers(column(table, "row"))
        total = np.bincount(row)
        return cls(
            dataset,
            row=row,
            total=total,
            parents=column(table, "parents"),
            lost=np.zeros(len(row), bool),
            removed=np.zeros(len(total), bool),
        )

    def lose_origins(self, mask: Any) -> None:
        """Revoke the origins in `mask`, of shape (M,)."""
        self.lost = mask
        self.removed = (self._lost_per_example() == self.total) & (self.total > 0)

    def _lost_per_example(self) -> Any:
        return np.bincount(self.row[self.lost], minlength=len(self.total))

    def made_from(self, ids: Any) -> Any:
        """Return a mask (M,) of the origins that name one of these Examples as a parent."""
        result = np.zeros(len(self.row), bool)
        is_named = numbers(pc.is_in(pc.list_flatten(self.parents), value_set=ids))
        result[numbers(pc.list_parent_indices(self.parents))[is_named]] = True
        return result

    def made_from_drops_of(self, pairs: set[Pair]) -> Any:
        """Return a mask (M,) of the origins made from dropped rows of these files.

        Such a parent is not an Example of the Dataset, so only the Drops show its file.
        """
        parents = pc.list_flatten(self.parents).unique()
        if not len(parents):
            return np.zeros(len(self.row), bool)
        has_example = np.zeros(len(parents), bool)
        # the few parents form the look-up table: building one of a million ids takes longer
        has_example[numbers(pc.index_in(self._load_ids(), value_set=parents).drop_null())] = True
        absent = parents.take(to_index_array(np.flatnonzero(~has_example)))
        return self.made_from(to_string_array(origin_index.dropped_ids(self.dataset, absent, pairs)))

    def lose_example(self, example: str) -> None:
        """Revoke an Example: its row, and the origins that name it as a parent.

        Raises ConfigError if the Dataset has neither.
        """
        ids = to_string_array([origin_index.whole_id(self._load_ids(), example)])
        mask = numbers(pc.is_in(self._load_ids(), value_set=ids)) | self.made_from(ids)
        if not mask.any():
            raise ConfigError(f"{self.dataset.path.name} has no example {example!r}", self._nearest(example))
        self.lose_origins(mask)

    def _nearest(self, example: str) -> str:
        for length in range(len(example), 3, -1):
            position = pc.index(pc.starts_with(self._load_ids(), example[:length]), True).as_py()
            if position >= 0:
                return f"--example {self._load_ids()[position].as_py()}"
        return f"the `id` column of {self.dataset.path / 'examples'} has them"

    def spread(self) -> tuple[Any, Any]:
        """Propagate the revocation to all descendants.

        Returns the indices of the removed Examples, and of those that lose only some origins.
        """
        if self.removed.any() and len(pc.list_flatten(self.parents)):
            self._follow()
        return np.flatnonzero(self.removed), np.flatnonzero((self._lost_per_example() > 0) & ~self.removed)

    def _follow(self) -> None:
        parent_ids = pc.list_flatten(self.parents).dictionary_encode()
        row_of = np.full(len(parent_ids.dictionary), -1)  # per distinct parent: its Example, or -1
        positions = pc.index_in(self._load_ids(), value_set=parent_ids.dictionary)
        row_of[numbers(positions.drop_null())] = self.row[numbers(positions.is_valid())]
        parent, child = row_of[numbers(parent_ids.indices)], numbers(pc.list_parent_indices(self.parents))
        order = np.argsort(parent, kind="stable")
        parent, child = parent[order], child[order]
        remaining = self.total - self._lost_per_example()
        edge = np.flatnonzero(self.removed)
        # breadth-first: each Example is on the edge once, so this is linear in the parents at any depth
        while len(edge):
            starts, ends = np.searchsorted(parent, edge, "left"), np.searchsorted(parent, edge, "right")
            counts = ends - starts
            newly_lost = np.unique(
                child[np.repeat(starts - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())]
            )
            newly_lost = newly_lost[~self.lost[newly_lost]]
            self.lost[newly_lost] = True
            rows, times = np.unique(self.row[newly_lost], return_counts=True)
            remaining[rows] -= times
            edge = rows[remaining[rows] == 0]
            self.removed[edge] = True

    def _load_ids(self) -> Any:
        if self.ids is None:
            self.ids = column(origin_index.read(self.dataset, ["id"]), "id")
        return self.ids

    def ids_of(self, examples: Any) -> list[str]:
        """Return the ids of the Examples with these indices."""
        if not len(examples):
            return []
        result: list[str] = self._load_ids().take(to_index_array(np.searchsorted(self.row, examples))).to_pylist()
        return result
