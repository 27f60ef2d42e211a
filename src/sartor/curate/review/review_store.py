"""Review items from a Dataset's files and from a SQL database.

    review_items      findings, each once
    review_found      Dataset (by its id) in which an item was found
    review_decisions  append-only: person, verdict, time and reason; an equal decision is stored once
    review_samples    rows drawn for an acceptance sample, with the bound they were drawn for
    review_counter    one row, which every change locks

Each change is one transaction. Several processes may review at once: decisions are added beside those of others and
never replace them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    ForeignKey,
    Integer,
    MetaData,
    Table,
    Text,
    insert,
    make_url,
    select,
)
from sqlalchemy.exc import ArgumentError

from sartor.core import records, signing
from sartor.core.artifacts import Artifact, Dataset, read_manifest
from sartor.core.database import Database, Form, open_database, sealed
from sartor.core.errors import ArtifactError, ConfigError
from sartor.core.lineage import origin_index
from sartor.core.parquet_io import column
from sartor.core.row_seals import RowSeals
from sartor.curate.review import review_file
from sartor.curate.review.review_items import Decision, ItemState, ReviewItem, decision_of, item_of, item_state

metadata = MetaData()
MIGRATIONS = Path(__file__).parent / "migrations"


def _text(name: str, *, key: bool = False) -> Column[str]:
    return Column(name, Text, primary_key=key, nullable=False)


items = Table("review_items", metadata, _text("id", key=True), _text("said"), _text("checksum"))

occurrences = Table(
    "review_found",
    metadata,
    Column("item", Text, ForeignKey("review_items.id"), primary_key=True),
    _text("dataset", key=True),
)

decisions = Table(
    "review_decisions",
    metadata,
    # SQLite assigns row numbers only if the key's type is exactly INTEGER
    Column("number", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    _text("key"),
    Column("item", Text, ForeignKey("review_items.id"), nullable=False),
    _text("said"),
    _text("checksum"),
)

samples = Table("review_samples", metadata, _text("id", key=True), _text("dataset"), _text("said"), _text("checksum"))

counter = Table(
    "review_counter",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("value", BigInteger, nullable=False),
)


def form() -> Form:
    """Return the description of the queue's database: tables, migrations and version."""
    return Form(
        "review queue", "--queue ", migrations=MIGRATIONS, counter=counter.c.value, version_table="review_version"
    )


AT_ONCE = 500  # ids per query: SQLite allows 32,766 parameters, old versions 999


class Queue:
    """Review queue in a database, safe to use from several threads and processes.

    Each call may raise what `Database.change` raises, and ArtifactError for a row that does not match its checksum.
    """

    def __init__(self, database: Database) -> None:
        self.database = database

    @classmethod
    def open(cls, url: str) -> Queue:
        """Open the queue at a SQLAlchemy URL; create it if absent.

        Raises as `open_database`.
        """
        return cls(open_database(url, form()))

    def close(self) -> None:
        """Close the database connections."""
        self.database.close()

    def items(self, dataset: str) -> dict[str, ReviewItem]:
        """Return the items found in the Dataset with this id, ordered by item id."""
        column = items.c
        query = select(items).join(occurrences, occurrences.c.item == column.id).order_by(column.id)
        with self.database.read() as connection:
            rows = connection.execute(query.where(occurrences.c.dataset == dataset)).mappings().all()
        return {str(row["id"]): item_of(_verified_fields(dict(row), "item", row["id"])) for row in rows}

    def decisions(self, items: Iterable[str]) -> dict[str, list[Decision]]:
        """Return the decisions about these items by item, in the order in which they were stored."""
        result: dict[str, list[Decision]] = {}
        column = decisions.c
        with self.database.read() as connection:
            remaining_ids = iter(items)
            while batch := list(islice(remaining_ids, AT_ONCE)):
                query = select(column.key, column.item, column.said, column.checksum).where(column.item.in_(batch))
                for row in connection.execute(query.order_by(column.number)).mappings():
                    result.setdefault(str(row["item"]), []).append(
                        decision_of(_verified_fields(dict(row), "decision about", row["item"]))
                    )
        return result

    def samples(self, dataset: str) -> list[dict[str, Any]]:
        """Return the plans of the samples drawn from a Dataset."""
        query = select(samples).where(samples.c.dataset == dataset).order_by(samples.c.id)
        with self.database.read() as connection:
            return [_verified_fields(dict(row), "sample", row["id"]) for row in connection.execute(query).mappings()]

    def add(self, dataset: str, items: Iterable[ReviewItem], decisions: Iterable[Decision] = ()) -> tuple[int, int]:
        """Add items found in a Dataset, and decisions about items; return how many of each are new."""
        with self.database.change() as connection:
            added = sum(self._add(connection, dataset, item) for item in items)
            return added, sum(self._decide(connection, decision) for decision in decisions)

    def sample(self, dataset: str, plan: Mapping[str, Any], items: Iterable[ReviewItem]) -> None:
        """Store the plan of a sample, and an item for each of its rows."""
        identity = records.digest({"dataset": dataset, **plan})[:16]
        with self.database.change() as connection:
            for item in items:
                self._add(connection, dataset, item)
            if not _queue_is_there(connection, samples, id=identity):
                row = {"id": identity, "dataset": dataset, "said": records.canonical(dict(plan)).decode()}
                connection.execute(insert(samples).values(sealed(connection, row)))

    def _add(self, connection: Connection, dataset: str, item: ReviewItem) -> bool:
        is_new = not _queue_is_there(connection, items, id=item.id)
        if is_new:
            row = {"id": item.id, "said": records.canonical(item.as_json()).decode()}
            connection.execute(insert(items).values(sealed(connection, row)))
        if not _queue_is_there(connection, occurrences, item=item.id, dataset=dataset):
            connection.execute(insert(occurrences).values(item=item.id, dataset=dataset))
        return is_new

    def _decide(self, connection: Connection, decision: Decision) -> bool:
        key = records.digest(decision.as_json())[:32]
        if _queue_is_there(connection, decisions, key=key):
            return False
        row = {"key": key, "item": decision.item, "said": records.canonical(decision.as_json()).decode()}
        connection.execute(insert(decisions).values(sealed(connection, row)))
        return True


def _queue_is_there(connection: Connection, table: Table, **key: str) -> bool:
    return connection.execute(select(*(table.c[name] for name in key)).filter_by(**key)).first() is not None


def _verified_fields(row: Mapping[str, Any], kind: str, identity: str) -> dict[str, Any]:
    if not RowSeals().is_whole(row):
        raise ArtifactError(
            f"the {kind} {identity} does not match its checksum: the queue is damaged, or was edited",
            "cp BACKUP/review.sqlite to the place of the queue; or sartor review import DATASET review.jsonl into a "
            "new one",
        )
    return dict(json.loads(row["said"]))


VARIABLE = "SARTOR_REVIEW"
FILE = "review.sqlite"


@dataclass(frozen=True)
class ReviewPolicy:
    """Conditions under which an item counts as decided.

    reviewers: number of people who must agree.
    signed: whether only signed decisions count.
    """

    reviewers: int = 1
    signed: bool = False

    def __post_init__(self) -> None:
        if self.reviewers < 1:
            raise ConfigError(f"reviewers is {self.reviewers}", "--reviewers 1, or 2")


@dataclass(frozen=True)
class ReviewEntry:
    """Item with all of its decisions, and the state that follows from them."""

    item: ReviewItem
    decisions: tuple[Decision, ...]
    standing: ItemState

    @property
    def is_open(self) -> bool:
        """Whether the item still needs a decision or a settlement."""
        return self.standing.state != "decided"


class View:
    """Items of a Dataset, from its own files and from the queue if there is one."""

    def __init__(self, dataset: Artifact, queue: Queue | None, rule: ReviewPolicy) -> None:
        self.dataset, self.queue, self.rule = dataset, queue, rule

    @cached_property
    def ids(self) -> frozenset[str]:
        """Ids of the Dataset's rows."""
        return frozenset(column(origin_index.read(self.dataset, ["id"]), "id").to_pylist())

    def ids_of(self, split: str) -> list[str]:
        """Return the sorted ids of the rows of a split.

        Raises ConfigError for a split without rows.
        """
        ids: list[str] = []
        known_splits: set[str] = set()
        for file in origin_index.example_files(self.dataset):
            table = pq.read_table(file, columns=["id", "split"])
            known_splits.update(pc.unique(table["split"]).to_pylist())
            ids += table.filter(pc.equal(table["split"], split))["id"].to_pylist()
        if not ids:
            raise ConfigError(
                f"no row is in the split {split!r}",
                f"--split {sorted(known_splits)[0]}" if known_splits else "another Dataset",
            )
        return sorted(ids)

    @cached_property
    def lines(self) -> review_file.Lines:
        """Items, decisions and samples in the Dataset's own files."""
        return review_file.of_dataset(self.dataset)

    @cached_property
    def items(self) -> dict[str, ReviewItem]:
        """All items by id: those of the files first, in their order."""
        queued = self.queue.items(self.dataset.id) if self.queue else {}
        return {**self.lines.items, **{key: item for key, item in queued.items() if key not in self.lines.items}}

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """Samples in the queue that were drawn from this Dataset."""
        return self.queue.samples(self.dataset.id) if self.queue else []

    def entries(self) -> list[ReviewEntry]:
        """Return the items about rows of the Dataset, rows that would join it, or slices."""
        return [entry for entry in self.all_entries() if self.concerns(entry.item)]

    def all_entries(self) -> list[ReviewEntry]:
        """Return all items, including those whose rows have left the Dataset.

        Their decisions are part of the record.
        """
        decisions = self._decisions(self.items)
        return [
            ReviewEntry(item, tuple(decisions.get(key, ())), self.state_of(decisions.get(key, [])))
            for key, item in self.items.items()
        ]

    def entry(self, key: str) -> ReviewEntry:
        """Return the item whose id begins with `key`.

        Raises ConfigError if none or several do.
        """
        matches = [item for item in self.items if item.startswith(key)] if key else []
        if len(matches) != 1:
            problem = f"{len(matches)} items begin with {key!r}" if matches else f"there is no item {key!r}"
            raise ConfigError(
                f"{problem} among the {len(self.items):,} of {self.dataset.path.name}", "sartor review list DATASET"
            )
        decisions = self._decisions(matches).get(matches[0], [])
        return ReviewEntry(self.items[matches[0]], tuple(decisions), self.state_of(decisions))

    def concerns(self, item: ReviewItem) -> bool:
        """Return whether an item is about a current row, a proposed row or a slice of this Dataset."""
        return item.row is not None or not item.examples or any(example in self.ids for example in item.examples)

    def state_of(self, decisions: list[Decision]) -> ItemState:
        """Return the state that these decisions lead to under the policy."""
        valid = [decision for decision in decisions if signer(decision)] if self.rule.signed else decisions
        return item_state(valid, self.rule.reviewers)

    def _decisions(self, items: Collection[str]) -> dict[str, list[Decision]]:
        result: dict[str, list[Decision]] = {}
        queued = self.queue.decisions(items) if self.queue else {}
        of_files = (decision for decision in self.lines.decisions if decision.item in items)
        for decision in [*of_files, *(item for group in queued.values() for item in group)]:
            known = result.setdefault(decision.item, [])
            if decision not in known:
                known.append(decision)
        return result


def signer(decision: Decision) -> str:
    """Return the id of the trusted key that signed a decision; empty if unsigned or signed by an unknown key.

    Raises SignatureError if a trusted key's signature does not match the decision, or if the key is revoked.
    """
    identity = str(decision.signature.get("key_id", ""))
    if not identity or identity not in signing.trusted_ids("review") | signing.revoked_ids():
        return ""
    name = f"the decision of {decision.by} about {decision.item}"
    return signing.check_signature(decision.document, dict(decision.signature), Path(name), name, None, "review")


def queue_url(dataset: Path, queue: str) -> str:
    """Return the URL of the queue.

    `queue` (a URL or a file) comes first, then the variable SARTOR_REVIEW, then `review.sqlite` beside the Dataset.
    """
    location = queue or os.environ.get(VARIABLE, "")
    if "://" in location:
        return location
    return f"sqlite:///{Path(location).absolute() if location else dataset.absolute().parent / FILE}"


@contextmanager
def open_review(
    dataset: Path | str, queue: str = "", rule: ReviewPolicy | None = None, *, make: bool = False
) -> Iterator[View]:
    """Open a View of a Dataset.

    A missing SQLite file of the queue is created only with `make`, so reading leaves no file behind.
    """
    path = Path(dataset).absolute()
    artifact = Dataset(path, read_manifest(path, ("dataset",)))
    url = queue_url(path, queue)
    opened_queue = Queue.open(url) if make or _is_there(url) else None
    try:
        yield View(artifact, opened_queue, rule or ReviewPolicy())
    finally:
        if opened_queue:
            opened_queue.close()


def _is_there(url: str) -> bool:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        return True  # Queue.open reports what is wrong with the URL
    return parsed.get_backend_name() != "sqlite" or Path(parsed.database or "").exists()


def open_items(dataset: Path | str | Artifact, queue: str = "", *, reviewers: int = 1, signed: bool = False) -> int:
    """Count the open items of a Dataset, conflicts included; the gate asks for this number.

    Findings in the Dataset's files count even if the queue does not know them yet. reviewers: number of people who
    must agree. signed: count only decisions signed by a key that this machine trusts.
    """
    path = dataset.path if isinstance(dataset, Artifact) else Path(dataset)
    with open_review(path, queue, ReviewPolicy(reviewers, signed)) as view:
        return sum(entry.is_open for entry in view.entries())
