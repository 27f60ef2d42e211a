"""Personal adapters of clients after the rounds.

They are trained sequentially, after the shared one, as in FedDPA-F (Yang et al. 2024, arXiv:2403.19211). Local
training after averaging is as good as far more elaborate methods (Cheng, Chadha & Duchi 2021, arXiv:2108.07313), and
no message of any round depends on what is private. The result is one PEFT directory, like a person's delta on a device
(`edge.personal`), and works without the shared one.

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

from sartor.core import config, records
from sartor.core import parquet_io as stored
from sartor.core.artifacts import Artifact
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
from sartor.personalization.benefit_report import SHORT_TOKENS, ClientRows
from sartor.personalization.stacked_adapter import Losses, StackedAdapter
from sartor.tune import resume, sampler
from sartor.tune.checkpoint import CheckpointState, full_disk
from sartor.tune.recipe import StopCriteria
from sartor.tune.shared_base import SharedBase
from sartor.tune.tokenized_dataset import TokenizedDataset


def examples_of(clients: Clients) -> dict[str, Example]:
    """Return every row of every Dataset, by its id."""
    return {example.id: example for dataset in clients.datasets for example in stored.read_examples(dataset)}


def own_rows(clients: Clients, name: str, examples: Mapping[str, Example]) -> ClientRows:
    """Return the held-out rows that a client's adapters are evaluated on.

    If the replies are too long to be generated, the rows are evaluated by their loss alone.
    """
    encoded, base = clients.rows[name].held_out, clients.resident.base
    selected = [examples[row.example_id] for row in encoded]
    groups = [group_of(example) for example in selected]
    folder = clients.dataset_of(name).path
    if not selected or (limit := predictions.reply_limit(base, selected)) > SHORT_TOKENS + predictions.SPARE_TOKENS:
        return ClientRows(encoded, groups, HeldOut([], folder, {"reply_too_long": len(selected)} if selected else {}))
    answerable: list[Example] = []
    left_out: Counter[str] = Counter()
    for example in selected:
        reason = "no_reply" if example.is_document else ask_refusal(base, example, folder, limit)[0]
        if reason:
            left_out[reason] += 1
        else:
            answerable.append(example)
    return ClientRows(encoded, groups, HeldOut(answerable, folder, dict(left_out)), limit)


Notice = Callable[[str], object]
WEIGHTS, REPORT = "adapter_model.safetensors", "personal.json"


def folder_of(out: Path) -> Path:
    """Return the folder of the clients' Adapters beside a shared one."""
    return out.with_name(f"{out.name}.personal")


def check_free(out: Path, *, is_meant: bool) -> None:
    """Raise ConfigError if clients' Adapters exist already, unless `is_meant` allows it."""
    if folder_of(out).exists() and not is_meant:
        problem = f"Adapters of clients stand in {folder_of(out)}"
        raise ConfigError(problem, "add --resume to make what is missing, or --replace to start over")


def personalise(
    clients: Clients, shared: Artifact, recipe: FederateRecipe, personal: PersonalRanks, *, again: bool, notice: Notice
) -> dict[str, Any]:
    """Write an Adapter for each client beside the shared one, and a report on them.

    recipe: of the rounds. again: replace existing Adapters; else they are reused if they are of this very run.
    Afterwards the clients' base has the ranks of both adapters. Raises ConfigError for Adapters of another run,
    ModelError for a loss that explodes.
    """
    folder = folder_of(shared.path)
    folder.mkdir(parents=True, exist_ok=True)
    with full_disk(f"{folder} could not be written"), writer_lock(folder / REPORT):
        tuning = PersonalTuning.open(clients, shared, recipe, personal)
        client_adapters = {}
        for name in clients.rows:
            client_adapters[name] = tuning.client_adapter(name, folder / name, again=again)
            notice(f"{name}: {client_adapters[name].path}")
        report = _judge(tuning, client_adapters, notice)
        write_file_atomic(folder / REPORT, records.canonical(report) + b"\n")
    return {"folder": str(folder), **report}


@dataclass(frozen=True)
class PersonalTuning:
    """Common parts of the clients' personal tunings.

    adapter: the shared one.
    stack: the base with room for the shared and the personal ranks.
    """

    clients: Clients
    adapter: Artifact
    recipe: FederateRecipe
    personal: PersonalRanks
    stack: StackedAdapter

    @classmethod
    def open(
        cls, clients: Clients, adapter: Artifact, recipe: FederateRecipe, personal: PersonalRanks
    ) -> PersonalTuning:
        """Return the tuning, with a base that has room for both adapters."""
        stack = StackedAdapter.open(clients.resident, load_file(adapter.path / WEIGHTS), personal.rank)
        return cls(clients, adapter, recipe, personal, stack)

    @property
    def resident(self) -> SharedBase:
        """Base of the clients."""
        return self.clients.resident

    def client_adapter(self, name: str, out: Path, *, again: bool) -> Artifact:
        """Return a client's Adapter: the one that exists and matches, or a new one."""
        fingerprint = self._fingerprint(name)
        if not again and (finished := resume.finished(out, CheckpointState(), fingerprint)):
            return finished
        began = time.monotonic()
        updates = updates_of(self.clients.rows[name], self.personal, self.recipe)
        budget, rows = StopCriteria(updates=updates), self.clients.rows[name]
        tuned, losses = self.stack.tuned(rows, self.stack.start, self.stack.personal_ranks, budget, self._rate)
        facts = self._facts(name, updates, losses) | {
            "recipe": fingerprint["recipe"],
            "fingerprint": {key: digest for key, digest in fingerprint.items() if key != "recipe"},
        }
        facts["run"]["wall_s"] = round(time.monotonic() - began, 3)
        return self.stack.write(tuned, out, facts, replace=again)

    def train_alone(self, rows: TokenizedDataset, updates: int) -> Tensors:
        """Return the factors A (R, in), B (out, R) tuned on these rows without any shared adapter.

        Both factors are trained, at the learning rate of the rounds.
        """
        ranks, rate = slice(self.recipe.method.rank + self.personal.rank), self.recipe.optimizer.learning_rate
        return self.stack.tuned(rows, self.stack.fresh, ranks, StopCriteria(updates=updates), rate)[0]

    def all_updates(self, name: str) -> int:
        """Return the number of a client's updates, in the rounds and after them."""
        rows = self.clients.rows[name]
        personal_updates = updates_of(rows, self.personal, self.recipe)
        return self.recipe.rounds * updates_of(rows, self.recipe.local, self.recipe) + personal_updates

    @property
    def _rate(self) -> float:
        return self.personal.learning_rate or self.recipe.optimizer.learning_rate

    def _fingerprint(self, name: str) -> dict[str, Any]:
        personal = {option: value for option, value in config.dump(self.personal).items() if option != "compare"}
        return {
            "recipe": {**config.dump(self.recipe), "personal": personal},
            "shared": self.adapter.id,
            "base": self.resident.ref.digest,
            "rows": self.clients.rows[name].digest(),
        }

    def _facts(self, name: str, updates: int, losses: Losses) -> dict[str, Any]:
        """Return the manifest of a client's Adapter."""
        summary = {"client": name, "rank": self.personal.rank, "examples": len(self.clients.rows[name].train)}
        parents, run = [self.clients.dataset_of(name), self.adapter], {"personal": summary, "updates": updates}
        return self.stack.facts(parents, self.clients.sources, run, losses)


def updates_of(rows: TokenizedDataset, local: LocalTraining, recipe: FederateRecipe) -> int:
    """Return the number of optimiser updates that this local training takes on these rows."""
    if local.updates is not None:
        return local.updates
    lengths, position = [len(row.ids) for row in rows.train], sampler.START
    for count, chosen in enumerate(sampler.iterate_updates(lengths, recipe.optimizer.batch_tokens, recipe.seed), 1):
        position = position.after(len(chosen), len(lengths))
        if position.epoch >= (local.epochs or 1):
            return count
    raise AssertionError("updates are endless")


def _judge(tuning: PersonalTuning, client_adapters: Mapping[str, Artifact], notice: Notice) -> dict[str, Any]:
    """Return the report: every client's adapters, each on that client's held-out rows."""
    examples = examples_of(tuning.clients)
    all_rows = TokenizedDataset(train=[row for rows in tuning.clients.rows.values() for row in rows.train])
    central = None
    if tuning.personal.compare:
        notice("tuning all clients' rows as one, to compare with")
        central = tuning.train_alone(all_rows, sum(tuning.all_updates(name) for name in client_adapters))
    benefits = {}
    for name, adapter in client_adapters.items():
        held_out = own_rows(tuning.clients, name, examples)
        sides = {
            side_name: benefit_report.score_adapter(tuning.resident, tensors, held_out)
            for side_name, tensors in _adapters(tuning, name, adapter, central, held_out)
        }
        benefits[name] = benefit_report.ClientBenefit(held_out, sides, len(tuning.clients.rows[name].train))
        notice(f"{name}: {benefits[name]}")
    client_row_ids = {row.example_id for rows in tuning.clients.rows.values() for row in rows.held_out}
    return {
        **benefit_report.report(benefits),
        "not_dealt": sum(row.example_id not in client_row_ids for row in tuning.clients.held_out),
    }


def _adapters(
    tuning: PersonalTuning, name: str, adapter: Artifact, central: Tensors | None, held_out: benefit_report.ClientRows
) -> Iterator[tuple[str, Tensors]]:
    """Yield (name, tensors) of each adapter that a client is evaluated with; none without held-out rows."""
    if not held_out.encoded:
        return
    yield "base", zero_adapter(tuning.stack.fresh)
    yield "shared", tuning.stack.unchanged
    if central is not None:
        yield "local_only", tuning.train_alone(tuning.clients.rows[name], tuning.all_updates(name))
        yield "centralised", central
    yield "personal", load_file(adapter.path / WEIGHTS)
