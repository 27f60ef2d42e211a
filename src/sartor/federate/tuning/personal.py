"""After the rounds: each client tunes ranks of its own on top of the shared adapter, which is held still.

    a client's Adapter = [A_shared; A_own], [B_shared B_own], whose product is the sum of both products, exactly

One after the other, as FedDPA-F does (Yang et al. 2024, arXiv:2403.19211): local training after averaging is as good as what is
far more elaborate (Cheng, Chadha & Duchi 2021, arXiv:2108.07313), and no message of any round depends on what is private. What
is written is one PEFT directory, as a person's delta on a device is (`edge.personal`), and works without the shared one.

    OUT.personal/CLIENT/         its Adapter: it stays with that client
    OUT.personal/personal.json   the report (`lifts.py`)
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from sartor.core import catalogue, config, licences, records
from sartor.core.artifacts import Artifact, write_artifact, writer_lock
from sartor.core.errors import ConfigError, ModelError
from sartor.edge.files import write_whole
from sartor.federate.aggregate.ranks import cut, joined, nothing, rank_of
from sartor.federate.aggregate.tensors import Tensors
from sartor.federate.tuning import lifts
from sartor.federate.tuning.clients import Clients
from sartor.federate.tuning.recipe import FederateRecipe, Local, Personal
from sartor.federate.tuning.resident import Resident
from sartor.federate.tuning.task import train
from sartor.models import adapters, memory
from sartor.models.base import machine
from sartor.tune import order, resume
from sartor.tune.checkpoint import Found, full_disk
from sartor.tune.recipe import Budget
from sartor.tune.tokenised import Rows

Notice = Callable[[str], object]
WEIGHTS, REPORT = "adapter_model.safetensors", "personal.json"


def folder_of(out: Path) -> Path:
    """Where the clients' Adapters beside a shared one are."""
    return out.with_name(f"{out.name}.personal")


def check_free(out: Path, *, is_meant: bool) -> None:
    """Raise ConfigError where there are Adapters of clients already, unless to go on or to start over was asked for."""
    if folder_of(out).exists() and not is_meant:
        problem = f"Adapters of clients stand in {folder_of(out)}"
        raise ConfigError(problem, "add --resume to make what is missing, or --replace to start over")


def personalise(
    people: Clients, shared: Artifact, recipe: FederateRecipe, asked: Personal, *, again: bool, notice: Notice
) -> dict[str, Any]:
    """An Adapter for each client beside the shared one, and the report on them.

    recipe: of the rounds. again: replace what stands there; else it is taken as it is, if it is of this very run. The people's
    base has the ranks of both afterwards. Raises ConfigError for what is of another run, ModelError for a loss that explodes.
    """
    folder = folder_of(shared.path)
    folder.mkdir(parents=True, exist_ok=True)
    with full_disk(f"{folder} could not be written"), writer_lock(folder / REPORT):
        desk = Desk.open(people, shared, recipe, asked)
        made = {}
        for name in people.rows:
            made[name] = desk.written(name, folder / name, again=again)
            notice(f"{name}: {made[name].path}")
        report = _judged(desk, made, notice)
        write_whole(folder / REPORT, records.canonical(report) + b"\n")
    return {"folder": str(folder), **report}


@dataclass(frozen=True)
class Desk:
    """What the clients' own tunings have in common. shared: of R ranks; fresh: of as many as a client's, changing nothing."""

    people: Clients
    adapter: Artifact
    recipe: FederateRecipe
    asked: Personal
    shared: Tensors
    fresh: Tensors

    @classmethod
    def open(cls, people: Clients, adapter: Artifact, recipe: FederateRecipe, asked: Personal) -> Desk:
        """Give the people's base room for both."""
        shared = load_file(adapter.path / WEIGHTS)
        people.resident.refit(rank_of(shared) + asked.rank)
        return cls(people, adapter, recipe, asked, shared, people.resident.taken())

    @property
    def resident(self) -> Resident:
        """The base."""
        return self.people.resident

    def written(self, name: str, out: Path, *, again: bool) -> Artifact:
        """A client's Adapter: the one that stands there, or a new one."""
        now = self._fingerprint(name)
        if not again and (standing := resume.finished(out, Found(), now)):
            return standing
        began, rank = time.monotonic(), rank_of(self.shared)
        start = joined(self.shared, cut(self.fresh, rank)[1])
        updates = updates_of(self.people.rows[name], self.asked, self.recipe)
        tuned, losses = self.tuned(self.people.rows[name], start, slice(rank, None), updates, self._rate)
        facts = self._facts(name, updates, losses) | {
            "recipe": now["recipe"],
            "fingerprint": {what: digest for what, digest in now.items() if what != "recipe"},
        }
        facts["run"]["wall_s"] = round(time.monotonic() - began, 3)

        def fill(part: Path) -> Mapping[str, Any]:
            self.resident.write(tuned, part)
            return facts

        adapter = write_artifact(out, "adapter", fill, replace=again)
        catalogue.register(adapter)
        return adapter

    def tuned(
        self, rows: Rows, start: Tensors, ranks: slice, updates: int, learning_rate: float
    ) -> tuple[Tensors, dict[str, float | None]]:
        """(the adapter after so many updates of these ranks, losses of the first and the last)."""
        self.resident.put(start)
        self.resident.hold(lambda name: True, ranks)
        recipe = self.resident.recipe
        optimizer = replace(recipe.optimizer, learning_rate=learning_rate)
        try:
            run = train(self.resident, rows, replace(recipe, budget=Budget(updates=updates), optimizer=optimizer))
        except ModelError as error:
            problem = f"a client's own tuning: {error.problem.partition(';')[0]}"
            raise ModelError(problem, "lower personal.learning_rate, or look at this client's rows") from None
        return self.resident.taken(), run.losses

    def alone(self, rows: Rows, updates: int) -> Tensors:
        """What these rows make without anybody else's adapter: both factors, at the rate of the rounds."""
        ranks = slice(self.recipe.method.rank + self.asked.rank)
        return self.tuned(rows, self.fresh, ranks, updates, self.recipe.optimizer.learning_rate)[0]

    def all_updates(self, name: str) -> int:
        """Of a client, in the rounds and after them."""
        rows = self.people.rows[name]
        after = updates_of(rows, self.asked, self.recipe)
        return self.recipe.rounds * updates_of(rows, self.recipe.local, self.recipe) + after

    @property
    def _rate(self) -> float:
        return self.asked.learning_rate or self.recipe.optimizer.learning_rate

    def _fingerprint(self, name: str) -> dict[str, Any]:
        own = {option: value for option, value in config.dump(self.asked).items() if option != "compare"}
        return {
            "recipe": {**config.dump(self.recipe), "personal": own},
            "shared": self.adapter.id,
            "base": self.resident.ref.digest,
            "rows": self.people.rows[name].digest(),
        }

    def _facts(self, name: str, updates: int, losses: Mapping[str, float | None]) -> dict[str, Any]:
        """The manifest of a client's Adapter."""
        dataset, base = self.people.dataset_of(name), self.resident.base
        self.resident.hold(lambda name: True)
        trained, everything = adapters.trainable(self.resident.model)
        return {
            "base": base.as_manifest(),
            "parents": [dataset.as_parent(), self.adapter.as_parent()],
            "sources": self.people.sources,
            "licence": licences.combine([dataset.licence, self.adapter.licence, base.ref.licence]),
            "left_out": {},
            "run": {
                "personal": {"client": name, "rank": self.asked.rank, "examples": len(self.people.rows[name].train)},
                "updates": updates,
                "loss": {"first": losses["first"], "last": losses["last"], "eval": None},
                "peak_memory_bytes": memory.peak_bytes(),
                "trainable": trained * self.asked.rank // self.resident.rank,
                "trainable_fraction": trained * self.asked.rank / self.resident.rank / everything,
            },
            "machine": machine(),
            "versions": {name: importlib.metadata.version(name) for name in ("sartor", "torch", "transformers", "peft")},
        }


def updates_of(rows: Rows, local: Local, recipe: FederateRecipe) -> int:
    """How many updates of the optimiser a piece of local work takes on these rows."""
    if local.updates is not None:
        return local.updates
    lengths, position = [len(row.ids) for row in rows.train], order.START
    for count, chosen in enumerate(order.updates(lengths, recipe.optimizer.batch_tokens, recipe.seed), 1):
        position = position.after(len(chosen), len(lengths))
        if position.epoch >= (local.epochs or 1):
            return count
    raise AssertionError("updates are endless")


def _judged(desk: Desk, made: Mapping[str, Artifact], notice: Notice) -> dict[str, Any]:
    """The report: every client's adapters, each on that client's held-out rows."""
    examples = lifts.examples_of(desk.people)
    everyone = Rows(train=[row for rows in desk.people.rows.values() for row in rows.train])
    central = None
    if desk.asked.compare:
        notice("tuning all clients' rows as one, to compare with")
        central = desk.alone(everyone, sum(desk.all_updates(name) for name in made))
    judged = {}
    for name, adapter in made.items():
        own = lifts.own_rows(desk.people, name, examples)
        sides = {what: lifts.side(desk.resident, one, own) for what, one in _adapters(desk, name, adapter, central, own)}
        judged[name] = lifts.Judged(own, sides, len(desk.people.rows[name].train))
        notice(f"{name}: {judged[name]}")
    mine = {row.example_id for rows in desk.people.rows.values() for row in rows.held_out}
    return {**lifts.report(judged), "not_dealt": sum(row.example_id not in mine for row in desk.people.held_out)}


def _adapters(
    desk: Desk, name: str, adapter: Artifact, central: Tensors | None, own: lifts.Own
) -> Iterator[tuple[str, Tensors]]:
    """(what, the tensors) of all that a client is judged with. One without held-out rows is judged with none."""
    if not own.encoded:
        return
    yield "base", nothing(desk.fresh)
    yield "shared", joined(desk.shared, nothing(cut(desk.fresh, rank_of(desk.shared))[1]))
    if central is not None:
        yield "local_only", desk.alone(desk.people.rows[name], desk.all_updates(name))
        yield "centralised", central
    yield "personal", load_file(adapter.path / WEIGHTS)
