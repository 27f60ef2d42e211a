"""The verb `federate coordinator`: leads rounds over Flower and writes the Adapter.

    OUT.rounds/   lead.yaml, start.tensors    what the ServerApp leads, and from where
                  app/                        the folder that `flwr run` bundles
                  coordinator.sqlite          the journal: signed manifests, the transcript, what was made of each sum
                  coordinator.rounds.jsonl    a line for each round that ended

SuperLink runs the ServerApp on this machine. That process holds the journal while it leads
(`driver_options.drive_rounds`). This process starts a Flower run where none leads, and waits. Once all rounds are over
it writes the Adapter from the journal. After a kill, start it again with `resume`; rounds continue meanwhile.
"""

from __future__ import annotations

import re
import secrets
import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sartor.core import config
from sartor.core.artifacts import open_artifact
from sartor.core.config import REQUIRED, option
from sartor.core.errors import ConfigError, RoundError
from sartor.core.filesystem import write_file_atomic, writer_lock
from sartor.core.licences import compliance
from sartor.core.licences.spdx import UNKNOWN
from sartor.federate import updates as arrays
from sartor.federate.flower.driver_options import RoundDriverOptions, RoundOptions
from sartor.federate.flower.flower_run import RunWatcher, run_to_the_end, write_app
from sartor.federate.recipe import FederateRecipe, tuning
from sartor.federate.recipe import load as load_recipe
from sartor.federate.rounds.round_driver import lines_of
from sartor.federate.rounds.round_journal import RoundJournal
from sartor.federate.secure.identities import Identity, PinnedKeys
from sartor.federate.secure.secagg_terms import SecureSumPolicy
from sartor.federate.tuning.attack_runner import AttackTarget, run_attacks
from sartor.federate.tuning.lora_task import LoraTask
from sartor.federate.tuning.round_schedule import LoraOptions
from sartor.federate.tuning.simulated_clients import Clients, open_shared_base
from sartor.federate.tuning.simulated_rounds import SimulationSetup, TuningTask, work_of
from sartor.federate.tuning.simulation import (
    Simulated,
    check_outputs,
    check_same,
    facts_of,
    fingerprint_of,
    resolve_rules,
    round_line,
    write_adapter,
)
from sartor.models.lora_tensors import Tensors
from sartor.tune import resume as resumption
from sartor.tune.checkpoint import CheckpointState, full_disk
from sartor.tune.dataset_encoding import encode_rows
from sartor.tune.tokenized_dataset import TokenizedDataset

Notice = Callable[[str], object]


@dataclass(frozen=True)
class CoordinatorOptions:
    """Identity of the coordinator, its clients, and the SuperLink that it uses."""

    key: str = option(REQUIRED, "the coordinator's private key, as keygen writes it")
    roster: str = option(REQUIRED, "folder of NAME.pub: the coordinator's and each client's")
    name: str = option("coordinator", "what the roster calls the coordinator")
    clients: tuple[str, ...] = option((), "who takes part; everyone of the roster, if nothing is said")
    link: str = option(
        "", "the SuperLink's name in Flower's config.toml; without it `flwr run` is left to you, and waited for"
    )
    licence: str = option("", "SPDX licence that the clients' rows are under, as agreed with them; else it is unknown")
    stage_s: int = option(300, "seconds that an exchange may take; Flower alone takes ten")
    work_s: int = option(3_600, "seconds more for the first, in which clients compute")
    patience_s: float = option(600.0, "seconds for which a SuperLink that does not answer is tried again")

    def __post_init__(self) -> None:
        if min(self.stage_s, self.patience_s) <= 0 or self.work_s < 0:
            problem = f"stage_s is {self.stage_s}, work_s {self.work_s}, patience_s {self.patience_s}"
            raise ConfigError(problem, "stage_s and patience_s above 0, work_s from 0")


def coordinate(
    recipe: FederateRecipe | Mapping[str, Any] | Path | str,
    out: Path | str,
    options: CoordinatorOptions | Mapping[str, Any],
    *,
    resume: bool = False,
    replace: bool = False,
    notice: Notice = lambda line: None,
) -> Simulated:
    """Lead the recipe's rounds over Flower, and write the Adapter to `out` as `simulate` does.

    A coordinator that sees no update reports None for what it cannot know: losses of training, the number of clipped
    updates, and the effect of the ring's rounding. exactness_error comes from a probe whose responses go along in the
    sum. eval_loss is measured on the held-out rows of the Dataset at the recipe's data.path, if any.

    Raises ConfigError, BudgetError for an invalid recipe or enrolment, MissingError if SuperLink accepts no run for
    `patience_s`, RoundError if no round was done, and the error that ended the ServerApp.
    """
    recipe, options, out = load_recipe(recipe), config.load_any(CoordinatorOptions, options), Path(out).absolute()
    folder = out.with_name(f"{out.name}.rounds")
    cohort = _cohort(recipe, options)
    check_outputs(out, folder, resume=resume, replace=replace)
    with full_disk(f"{folder} could not be written"), writer_lock(folder):
        if replace:
            shutil.rmtree(folder, ignore_errors=True)
        clients = _open_clients(recipe, cohort, notice)
        setup = _setup(recipe, clients, folder)
        fingerprint = fingerprint_of(recipe, clients, clients=list(cohort))
        if resume and (finished := resumption.finished(out, CheckpointState(), fingerprint)):
            notice(f"{out} is finished: nothing is left to do")
            return Simulated(finished)
        check_same(folder, fingerprint, str(clients.resident.dtype))
        lead, began = _write_lead(setup, options, clients, out.name), time.monotonic()
        watch = RunWatcher(lead, folder / "lead.yaml", link=options.link, patience_s=options.patience_s, notice=notice)
        with run_to_the_end(watch) as journal:
            lines, shared = lines_of(journal, lead.run), _shared(journal, lead.run)
        for line in lines:
            notice(round_line(line, recipe.rounds))
        if not lines:
            raise RoundError(
                f"none of the {lead.rounds} rounds was done: {watch.reasons()}",
                "look at the clients, and begin with --replace",
            )
        facts = facts_of(setup, clients, lines, shared, fingerprint)
        # the sources of the rows are the clients, under the licence that was agreed with them
        licence = options.licence or UNKNOWN
        facts["sources"] += [{"source": f"client {name}", "licence": licence} for name in cohort]
        facts["licence"] = compliance.combine([facts["licence"], licence])
        target = AttackTarget(setup, shared, rows={}, held_out=clients.held_out, most_rows=recipe.data.attack_rows)
        report = run_attacks(target, notice)
        facts["run"]["wall_s"] = round(time.monotonic() - began, 3)
        abandoned = lead.rounds - len(lines)
        facts["run"]["federated"] |= {"transport": "flower", "run": lead.run, "abandoned": abandoned, "examples": None}
        return Simulated(write_adapter(out, clients.resident, lines, shared, facts, report, replace=replace))


def _cohort(recipe: FederateRecipe, options: CoordinatorOptions) -> tuple[str, ...]:
    """Return the names of the clients. Raises ConfigError for errors that can be found before the base is opened."""
    roster = PinnedKeys.open(Path(options.roster))
    Identity.open(options.name, Path(options.key)).check_in(roster)
    cohort = tuple(sorted(set(options.clients or roster.keys) - {options.name}))
    if unknown := sorted(set(cohort) - set(roster.keys)):
        problem = f"{unknown[0]} is to take part, and {options.roster} has no key of it"
        raise ConfigError(problem, f"put {unknown[0]}.pub there, as its owner hands it over")
    if len(cohort) < (min_cohort := SecureSumPolicy().least_cohort):
        problem = f"the cohort has {len(cohort)} clients; of two each could subtract its own update from the sum"
        roster_path = shlex.quote(options.roster)
        remedy = f"sartor federate keygen DIR --name NAME, and cp DIR/NAME.pub {roster_path}"
        raise ConfigError(problem, f"enrol {min_cohort - len(cohort)} more: {remedy}")
    for is_requested, feature in (
        (recipe.mode == "residual", "mode residual"),
        (recipe.method.ranks, "method.ranks"),
        (recipe.personal, "personal"),
    ):
        if is_requested:
            problem = f"{feature} is of simulations; rounds over a network do not have it yet"
            raise ConfigError(problem, f"leave {feature} out, or sartor federate simulate")
    if recipe.rules.most_examples == "auto" and not (recipe.privacy or recipe.noise_asked):
        problem = "rules.most_examples is auto, the largest client's number of rows, which stays with that client"
        raise ConfigError(
            problem, "rules.most_examples: 1000, or near the largest expected; 1: every client counts the same"
        )
    return cohort


def _open_clients(recipe: FederateRecipe, cohort: Sequence[str], notice: Notice) -> Clients:
    """Open the base and the coordinator's own held-out rows; of its clients only the names are known."""
    path = recipe.data.path
    (resident, start), held_out = open_shared_base(recipe, path, notice), []
    if path:
        held_out = encode_rows(open_artifact(Path(path), "dataset"), tuning(recipe, path), resident.base.chat).held_out
    return Clients(
        resident,
        datasets=[],
        rows={name: TokenizedDataset() for name in cohort},
        held_out=held_out,
        left_out={},
        start=start,
    )


def _setup(recipe: FederateRecipe, clients: Clients, folder: Path) -> SimulationSetup:
    resident, start = clients.resident, clients.resident.current_factors()
    # clients do not train here: only the simulated clients of the attack report run these tasks
    tasks: dict[str, TuningTask] = {name: LoraTask(resident, rows) for name, rows in clients.rows.items()}
    rules = resolve_rules(recipe, start, len(tasks), 1)
    return SimulationSetup(recipe, rules, resident, tasks=tasks, start=start, folder=folder)


def _write_lead(
    setup: SimulationSetup, options: CoordinatorOptions, clients: Clients, name: str
) -> RoundDriverOptions:
    """Write the options of the ServerApp to lead.yaml and return them.

    A resumed run writes them anew, with the times and paths given now and the name of the run that began.
    """
    folder, recipe, file = setup.folder, setup.recipe, setup.folder / "lead.yaml"
    if file.exists():
        run = RoundDriverOptions.open(file).run
    else:
        # a new name each time: clients take part in a round of a run only once
        run = f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')[:40] or 'run'}-{secrets.token_hex(4)}"
        shutil.rmtree(folder / "app", ignore_errors=True)  # left by an interrupted start
        write_app(folder / "app")
        write_file_atomic(folder / "start.tensors", arrays.pack_tensors(setup.start))
    lead = RoundDriverOptions(
        run=run,
        key=str(Path(options.key).absolute()),
        roster=str(Path(options.roster).absolute()),
        journal="coordinator.sqlite",
        start="start.tensors",
        round=_round(setup, options, clients),
        rounds=recipe.rounds,
        name=options.name,
        lora=LoraOptions(recipe.mode, recipe.seed, recipe.of_clients, recipe.robust),
    )
    write_file_atomic(file, yaml.safe_dump(config.dump(lead), sort_keys=False).encode())
    return RoundDriverOptions.open(file)


def _round(setup: SimulationSetup, options: CoordinatorOptions, clients: Clients) -> RoundOptions:
    exchanges = 5
    return RoundOptions(
        cohort=tuple(clients.rows),
        rules=setup.rules,
        stage_s=options.stage_s,
        work_s=options.work_s,
        length_s=exchanges * options.stage_s + options.work_s + 600,
        **work_of(setup.recipe, clients.resident),
    )


def _shared(journal: RoundJournal, run: str) -> Tensors:
    return arrays.unpack_tensors(journal.load(f"shared {run}") or b"")
