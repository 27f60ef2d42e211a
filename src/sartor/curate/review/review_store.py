"""A Dataset's files and the queue as one list. Nothing is written here."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from sartor.core import signing
from sartor.core.artifacts import Artifact, read_manifest
from sartor.core.errors import ConfigError
from sartor.core.lineage import origin_index
from sartor.core.parquet_io import column
from sartor.curate.review import findings
from sartor.curate.review.items import Decision, Item
from sartor.curate.review.queue import Queue
from sartor.curate.review.standing import Standing, standing

VARIABLE = "SARTOR_REVIEW"
FILE = "review.sqlite"


@dataclass(frozen=True)
class Rule:
    """What counts as decided. reviewers: how many people must agree. signed: whether only signed decisions count."""

    reviewers: int = 1
    signed: bool = False

    def __post_init__(self) -> None:
        if self.reviewers < 1:
            raise ConfigError(f"reviewers is {self.reviewers}", "--reviewers 1, or 2")


@dataclass(frozen=True)
class Entry:
    """An item with every decision about it, and what becomes of it."""

    item: Item
    decisions: tuple[Decision, ...]
    standing: Standing

    @property
    def is_open(self) -> bool:
        """Whether somebody has yet to decide, or to settle."""
        return self.standing.state != "decided"


class View:
    """The items of a Dataset: of its own files, and of the queue if there is one."""

    def __init__(self, dataset: Artifact, queue: Queue | None, rule: Rule) -> None:
        self.dataset, self.queue, self.rule = dataset, queue, rule

    @cached_property
    def ids(self) -> frozenset[str]:
        """The ids of the Dataset's rows."""
        return frozenset(column(origin_index.read(self.dataset, ["id"]), "id").to_pylist())

    def ids_of(self, split: str) -> list[str]:
        """Those of a split. Raises ConfigError for a split that no row is in."""
        found: list[str] = []
        known: set[str] = set()
        for file in origin_index.example_files(self.dataset):
            table = pq.read_table(file, columns=["id", "split"])
            known.update(pc.unique(table["split"]).to_pylist())
            found += table.filter(pc.equal(table["split"], split))["id"].to_pylist()
        if not found:
            raise ConfigError(
                f"no row is in the split {split!r}", f"--split {sorted(known)[0]}" if known else "another Dataset"
            )
        return sorted(found)

    @cached_property
    def lines(self) -> findings.Lines:
        """What the Dataset's own files say."""
        return findings.of_dataset(self.dataset)

    @cached_property
    def items(self) -> dict[str, Item]:
        """Every item by id: those of the files first, in their order."""
        queued = self.queue.items(self.dataset.id) if self.queue else {}
        return {**self.lines.items, **{key: item for key, item in queued.items() if key not in self.lines.items}}

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """The samples drawn from this very Dataset."""
        return self.queue.samples(self.dataset.id) if self.queue else []

    def entries(self) -> list[Entry]:
        """Every item that concerns a row which stands in the Dataset, a row that would join it, or a slice."""
        return [entry for entry in self.all_entries() if self.concerns(entry.item)]

    def all_entries(self) -> list[Entry]:
        """Also those whose rows have gone since: what was decided about them is part of the record."""
        said = self._decisions(self.items)
        return [Entry(item, tuple(said.get(key, ())), self.stand(said.get(key, []))) for key, item in self.items.items()]

    def entry(self, key: str) -> Entry:
        """The item whose id begins like this. Raises ConfigError where none or several do."""
        found = [item for item in self.items if item.startswith(key)] if key else []
        if len(found) != 1:
            what = f"{len(found)} items begin with {key!r}" if found else f"there is no item {key!r}"
            raise ConfigError(f"{what} among the {len(self.items):,} of {self.dataset.path.name}", "sartor review list DATASET")
        decisions = self._decisions(found).get(found[0], [])
        return Entry(self.items[found[0]], tuple(decisions), self.stand(decisions))

    def concerns(self, item: Item) -> bool:
        """Whether it is still about something of this Dataset."""
        return item.row is not None or not item.examples or any(one in self.ids for one in item.examples)

    def stand(self, decisions: list[Decision]) -> Standing:
        """What these decisions come to by the rule."""
        counted = [one for one in decisions if signer(one)] if self.rule.signed else decisions
        return standing(counted, self.rule.reviewers)

    def _decisions(self, items: Collection[str]) -> dict[str, list[Decision]]:
        found: dict[str, list[Decision]] = {}
        queued = self.queue.decisions(items) if self.queue else {}
        of_files = (one for one in self.lines.decisions if one.item in items)
        for decision in [*of_files, *(one for some in queued.values() for one in some)]:
            known = found.setdefault(decision.item, [])
            if decision not in known:
                known.append(decision)
        return found


def signer(decision: Decision) -> str:
    """The id of the trusted key that signed a decision; empty where nobody did, or somebody whom this machine does not know.

    Raises SignatureError where the signer is trusted and signed something else, or is revoked.
    """
    identity = str(decision.signature.get("key_id", ""))
    if not identity or identity not in signing.trusted_ids() | signing.revoked_ids():
        return ""
    name = f"the decision of {decision.by} about {decision.item}"
    return signing.check_said(decision.document, dict(decision.signature), Path(name), name)


def place_of(dataset: Path, queue: str) -> str:
    """The URL of the queue: as given (a URL or a file), else as SARTOR_REVIEW says, else `review.sqlite` beside the Dataset."""
    said = queue or os.environ.get(VARIABLE, "")
    if "://" in said:
        return said
    return f"sqlite:///{Path(said).absolute() if said else dataset.absolute().parent / FILE}"


@contextmanager
def opened(dataset: Path | str, queue: str = "", rule: Rule | None = None, *, make: bool = False) -> Iterator[View]:
    """A View of a Dataset. A queue's file that is not there is made only with `make`: looking leaves nothing behind."""
    path = Path(dataset).absolute()
    artifact = Artifact(path, read_manifest(path, ("dataset",)))
    url = place_of(path, queue)
    there = Queue.open(url) if make or _is_there(url) else None
    try:
        yield View(artifact, there, rule or Rule())
    finally:
        if there:
            there.close()


def _is_there(url: str) -> bool:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        return True  # whoever opens it says what is wrong with it
    return parsed.get_backend_name() != "sqlite" or Path(parsed.database or "").exists()
