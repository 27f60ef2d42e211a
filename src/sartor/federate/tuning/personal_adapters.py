"""Personal adapters of clients after the rounds.

One after the other, as FedDPA-F does (Yang et al. 2024, arXiv:2403.19211): local training after averaging is as good as what is
far more elaborate (Cheng, Chadha & Duchi 2021, arXiv:2108.07313), and no message of any round depends on what is private. What
is written is one PEFT directory, as a person's delta on a device is (`edge.personal`), and works without the shared one.

    OUT.personal/CLIENT/         its Adapter: it stays with that client
    OUT.personal/personal.json   the report (`personalization/benefit_report.py`)
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from sartor.core import catalogue, config, records
from sartor.core import parquet_io as stored
from sartor.core.artifacts import Artifact, write_artifact
from sartor.core.errors import ConfigError
from sartor.core.filesystem import write_file_atomic, writer_lock
from sartor.core.records import Example
from sartor.core.splits import group_of
from sartor.evaluate import predictions
from sartor.evaluate.predictions import HeldOut, ask_refusal
from sartor.federate.recipe import FederateRecipe, LocalTraining, PersonalRanks
from sartor.federate.tuning.simulated_clients import Clients
from sartor.models.lora_tensors import Tensors, zero_adapter
from sartor.personalization import benefit_report
from sartor.personalization.benefit_report import SHORT_TOKENS, Own
from sartor.personalization.stacked_adapter import Losses, StackedAdapter
from sartor.tune import resume, sampler
from sartor.tune.checkpoint import CheckpointState, full_disk
from sartor.tune.recipe import StopCriteria
from sartor.tune.shared_base import SharedBase
from sartor.tune.tokenized_dataset import TokenizedDataset


def examples_of(people: Clients) -> dict[str, Example]:
    """Every row of every Dataset, by its id."""
    return {example.id: example for dataset in people.datasets for example in stored.read_examples(dataset)}


def own_rows(people: Clients, name: str, examples: Mapping[str, Example]) -> Own:
    """What a client is judged by. Rows whose replies are too long to be said word by word are judged by their loss alone."""
    encoded, base = people.rows[name].held_out, people.resident.base
    found = [examples[row.example_id] for row in encoded]
    groups = [group_of(one) for one in found]
    folder = people.dataset_of(name).path
    if not found or (limit := predictions.reply_limit(base, found)) > SHORT_TOKENS + predictions.SPARE_TOKENS:
        return Own(encoded, groups, HeldOut([], folder, {"reply_too_long": len(found)} if found else {}))
    asked: list[Example] = []
    left_out: Counter[str] = Counter()
    for item in found:
        reason = "no_reply" if item.is_document else ask_refusal(base, item, folder, limit)[0]
        if reason:
            left_out[reason] += 1
        else:
            asked.append(item)
    return Own(encoded, groups, HeldOut(asked, folder, dict(left_out)), limit)


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
    people: Clients, shared: Artifact, recipe: FederateRecipe, asked: PersonalRanks, *, again: bool, notice: Notice
) -> dict[str, Any]:
    """An Adapter for each client beside the shared one, and the report on them.

    recipe: of the rounds. again: replace what stands there; else it is taken as it is, if it is of this very run. The people's
    base has the ranks of both afterwards. Raises ConfigError for what is of another run, ModelError for a loss that explodes.
    """
    folder = folder_of(shared.path)
    folder.mkdir(parents=True, exist_ok=True)
    with full_disk(f"{folder} could not be written"), writer_lock(folder / REPORT):
        desk = PersonalTuning.open(people, shared, recipe, asked)
        made = {}
        for name in people.rows:
            made[name] = desk.written(name, folder / name, again=again)
            notice(f"{name}: {made[name].path}")
        report = _judged(desk, made, notice)
        write_file_atomic(folder / REPORT, records.canonical(report) + b"\n")
    return {"folder": str(folder), **report}


@dataclass(frozen=True)
class PersonalTuning:
    """What the clients' own tunings have in common. adapter: the shared one."""

    people: Clients
    adapter: Artifact
    recipe: FederateRecipe
    asked: PersonalRanks
    stack: StackedAdapter

    @classmethod
    def open(cls, people: Clients, adapter: Artifact, recipe: FederateRecipe, asked: PersonalRanks) -> PersonalTuning:
        """Give the people's base room for both."""
        stack = StackedAdapter.open(people.resident, load_file(adapter.path / WEIGHTS), asked.rank)
        return cls(people, adapter, recipe, asked, stack)

    @property
    def resident(self) -> SharedBase:
        """The base."""
        return self.people.resident

    def written(self, name: str, out: Path, *, again: bool) -> Artifact:
        """A client's Adapter: the one that stands there, or a new one."""
        now = self._fingerprint(name)
        if not again and (standing := resume.finished(out, CheckpointState(), now)):
            return standing
        began = time.monotonic()
        updates = updates_of(self.people.rows[name], self.asked, self.recipe)
        budget, rows = StopCriteria(updates=updates), self.people.rows[name]
        tuned, losses = self.stack.tuned(rows, self.stack.start, self.stack.own, budget, self._rate)
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

    def alone(self, rows: TokenizedDataset, updates: int) -> Tensors:
        """What these rows make without anybody else's adapter: both factors, at the rate of the rounds."""
        ranks, rate = slice(self.recipe.method.rank + self.asked.rank), self.recipe.optimizer.learning_rate
        return self.stack.tuned(rows, self.stack.fresh, ranks, StopCriteria(updates=updates), rate)[0]

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

    def _facts(self, name: str, updates: int, losses: Losses) -> dict[str, Any]:
        """The manifest of a client's Adapter."""
        about = {"client": name, "rank": self.asked.rank, "examples": len(self.people.rows[name].train)}
        parents, run = [self.people.dataset_of(name), self.adapter], {"personal": about, "updates": updates}
        return self.stack.facts(parents, self.people.sources, run, losses)


def updates_of(rows: TokenizedDataset, local: LocalTraining, recipe: FederateRecipe) -> int:
    """How many updates of the optimiser a piece of local work takes on these rows."""
    if local.updates is not None:
        return local.updates
    lengths, position = [len(row.ids) for row in rows.train], sampler.START
    for count, chosen in enumerate(sampler.iterate_updates(lengths, recipe.optimizer.batch_tokens, recipe.seed), 1):
        position = position.after(len(chosen), len(lengths))
        if position.epoch >= (local.epochs or 1):
            return count
    raise AssertionError("updates are endless")


def _judged(desk: PersonalTuning, made: Mapping[str, Artifact], notice: Notice) -> dict[str, Any]:
    """The report: every client's adapters, each on that client's held-out rows."""
    examples = examples_of(desk.people)
    everyone = TokenizedDataset(train=[row for rows in desk.people.rows.values() for row in rows.train])
    central = None
    if desk.asked.compare:
        notice("tuning all clients' rows as one, to compare with")
        central = desk.alone(everyone, sum(desk.all_updates(name) for name in made))
    judged = {}
    for name, adapter in made.items():
        own = own_rows(desk.people, name, examples)
        sides = {
            what: benefit_report.side(desk.resident, one, own) for what, one in _adapters(desk, name, adapter, central, own)
        }
        judged[name] = benefit_report.ClientBenefit(own, sides, len(desk.people.rows[name].train))
        notice(f"{name}: {judged[name]}")
    mine = {row.example_id for rows in desk.people.rows.values() for row in rows.held_out}
    return {**benefit_report.report(judged), "not_dealt": sum(row.example_id not in mine for row in desk.people.held_out)}


def _adapters(
    desk: PersonalTuning, name: str, adapter: Artifact, central: Tensors | None, own: benefit_report.Own
) -> Iterator[tuple[str, Tensors]]:
    """(what, the tensors) of all that a client is judged with. One without held-out rows is judged with none."""
    if not own.encoded:
        return
    yield "base", zero_adapter(desk.stack.fresh)
    yield "shared", desk.stack.unchanged
    if central is not None:
        yield "local_only", desk.alone(desk.people.rows[name], desk.all_updates(name))
        yield "centralised", central
    yield "personal", load_file(adapter.path / WEIGHTS)
