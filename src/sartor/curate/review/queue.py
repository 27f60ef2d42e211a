"""Items and decisions in SQL: a file beside the Datasets, or a Postgres database that many people share.

Each change is one transaction, kept whole or not at all; several processes may review at once, and what one of them decides is
added beside what others did, never over it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from sqlalchemy import Connection, Table, insert, select

from sartor.core import records
from sartor.core.database import Database, is_whole, open_database, sealed
from sartor.core.errors import ArtifactError
from sartor.curate.review import tables
from sartor.curate.review.items import Decision, Item, decision_of, item_of

AT_ONCE = 500  # ids in one question: SQLite takes 32,766 values, old ones 999


class Queue:
    """One queue. Safe to use from several threads and processes. Each call may raise what `Database.change` raises, and
    ArtifactError for a row that was changed from outside.
    """

    def __init__(self, database: Database) -> None:
        self.database = database

    @classmethod
    def open(cls, url: str) -> Queue:
        """The queue at a SQLAlchemy URL, made if absent. Raises as `open_database`."""
        return cls(open_database(url, tables.form()))

    def close(self) -> None:
        """Give the connections back."""
        self.database.close()

    def items(self, dataset: str) -> dict[str, Item]:
        """The items found in the Dataset of this id, in the order of their ids."""
        column = tables.items.c
        query = select(tables.items).join(tables.found, tables.found.c.item == column.id).order_by(column.id)
        with self.database.read() as connection:
            rows = connection.execute(query.where(tables.found.c.dataset == dataset)).mappings().all()
        return {str(row["id"]): item_of(_said(dict(row), "item", row["id"])) for row in rows}

    def decisions(self, items: Iterable[str]) -> dict[str, list[Decision]]:
        """Every decision about these items, by item, in the order in which they came in."""
        found: dict[str, list[Decision]] = {}
        column = tables.decisions.c
        with self.database.read() as connection:
            for some in _batched(items):
                query = select(column.key, column.item, column.said, column.checksum).where(column.item.in_(some))
                for row in connection.execute(query.order_by(column.number)).mappings():
                    found.setdefault(str(row["item"]), []).append(decision_of(_said(dict(row), "decision about", row["item"])))
        return found

    def samples(self, dataset: str) -> list[dict[str, Any]]:
        """The samples that were drawn from a Dataset."""
        query = select(tables.samples).where(tables.samples.c.dataset == dataset).order_by(tables.samples.c.id)
        with self.database.read() as connection:
            return [_said(dict(row), "sample", row["id"]) for row in connection.execute(query).mappings()]

    def add(self, dataset: str, items: Iterable[Item], decisions: Iterable[Decision] = ()) -> tuple[int, int]:
        """Put items found in a Dataset into the queue, and decisions about them; returns how many of each are new."""
        with self.database.change() as connection:
            added = sum(self._add(connection, dataset, item) for item in items)
            return added, sum(self._decide(connection, decision) for decision in decisions)

    def sample(self, dataset: str, plan: Mapping[str, Any], items: Iterable[Item]) -> None:
        """Keep a sample's plan, and an item for each row of it."""
        identity = records.digest({"dataset": dataset, **plan})[:16]
        with self.database.change() as connection:
            for item in items:
                self._add(connection, dataset, item)
            if not _is_there(connection, tables.samples, id=identity):
                row = {"id": identity, "dataset": dataset, "said": records.canonical(dict(plan)).decode()}
                connection.execute(insert(tables.samples).values(sealed(row)))

    def _add(self, connection: Connection, dataset: str, item: Item) -> bool:
        is_new = not _is_there(connection, tables.items, id=item.id)
        if is_new:
            row = {"id": item.id, "said": records.canonical(item.as_json()).decode()}
            connection.execute(insert(tables.items).values(sealed(row)))
        if not _is_there(connection, tables.found, item=item.id, dataset=dataset):
            connection.execute(insert(tables.found).values(item=item.id, dataset=dataset))
        return is_new

    def _decide(self, connection: Connection, decision: Decision) -> bool:
        key = records.digest(decision.as_json())[:32]
        if _is_there(connection, tables.decisions, key=key):
            return False
        row = {"key": key, "item": decision.item, "said": records.canonical(decision.as_json()).decode()}
        connection.execute(insert(tables.decisions).values(sealed(row)))
        return True


def _is_there(connection: Connection, table: Table, **key: str) -> bool:
    return connection.execute(select(*(table.c[name] for name in key)).filter_by(**key)).first() is not None


def _said(row: Mapping[str, Any], what: str, identity: str) -> dict[str, Any]:
    if not is_whole(dict(row)):
        raise ArtifactError(f"the {what} {identity} was changed from outside", "restore the queue from a copy")
    return dict(json.loads(row["said"]))


def _batched(ids: Iterable[str]) -> Iterator[Sequence[str]]:
    source = iter(ids)
    while some := list(islice(source, AT_ONCE)):
        yield some
