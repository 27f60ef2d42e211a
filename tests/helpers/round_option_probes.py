"""Probes of the options of rounds: whole rounds of five clients that add small numbers, with real keys and journals."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import yaml

from clock import Clock
from federating import COORDINATOR, write_keys
from option_probes import Probe, Workspace, beside_default, probes_of
from round_parties import START, House
from sartor.core.config import load
from sartor.core.errors import MissingError, SartorError
from sartor.federate import updates as arrays
from sartor.federate.flower import flower_client, flower_coordinator, flower_run, local_rpc
from sartor.federate.flower.driver_options import RoundDriverOptions, RoundOptions, drive_rounds
from sartor.federate.flower.flower_client import ClientOptions
from sartor.federate.flower.flower_coordinator import CoordinatorOptions
from sartor.federate.privacy.accountant import PrivacyBudget, calibrated
from sartor.federate.privacy.client_noise import noise_of
from sartor.federate.recipe import load as load_recipe
from sartor.federate.rounds.round_journal import RoundJournal
from sartor.federate.rounds.round_manifest import UpdateRules, read_manifest
from sartor.federate.rounds.transport import run_round
from sartor.federate.tuning.round_schedule import LoraOptions, LoraSchedule
from sartor.federate.updates import Update

RULES = {"clip": 1.0, "most_examples": 10}


def _round(values: Any, workspace: Workspace) -> Any:
    """How a round ends, what its tensors are, and what its clients were told of it."""
    house = House()
    plan: dict[str, Any] = {
        "task": "pull",
        "cohort": list(house.names),
        "rules": RULES,
        "stage_s": 0,
        "work_s": 0,
        **values,
    }
    try:
        result = run_round(house.coordinator, house.transport, load(RoundOptions, plan).plan())
    except SartorError as error:
        return type(error).__name__, error.problem
    (stored,) = house.journals[COORDINATOR].rounds("triage")
    manifest = read_manifest(stored.manifest, COORDINATOR, house.roster)
    terms = manifest.terms
    told = (
        manifest.stage_s,
        manifest.work_s,
        manifest.deadline,
        manifest.work.base,
        manifest.work.recipe,
        terms.threshold,
        terms.degree,
    )
    return (
        result.state,
        len(result.active),
        {name: value.round(4).tolist() for name, value in house.coordinator.shared.items()},
        told,
    )


def _rules(values: Any, workspace: Workspace) -> Any:
    return _round({"rules": {**RULES, **values}}, workspace)


def _noised(values: Any, workspace: Workspace) -> Any:
    """How a round of clients ends that have no noise to add."""
    return _round({"rules": {"most_examples": 1, **values}}, workspace)


def _assumed(values: Any, workspace: Workspace) -> Any:
    """How many clients share the noise of a round."""
    house = House()
    plan = {"task": "pull", "cohort": list(house.names), "rules": {"noise": 1.0, "most_examples": 1, **values}}
    return noise_of(house.coordinator.begin(load(RoundOptions, plan).plan(), ())).sharers


def _stale(values: Any, workspace: Workspace) -> Any:
    """How often a client computed for two rounds, of which the first never ended."""
    house = House()
    plan = {"task": "pull", "cohort": list(house.names), "rules": {**RULES, **values}, "stage_s": 0, "work_s": 0}
    house.coordinator.begin(load(RoundOptions, plan).plan(), ())
    manifest = house.coordinator.manifest
    assert manifest
    for number in (1, 2):
        house.clients[house.names[0]]._learn(
            replace(manifest, number=number), arrays.pack_tensors(house.coordinator.shared)
        )
    return house.tasks[house.names[0]].calls


ROUND_PROBES = (
    *beside_default(
        "RoundOptions",
        _round,
        {
            "task": "push",
            "settings": {"rate": 0.05},
            "rules": {**RULES, "clip": 0.001},
            "trained": ["tail.weight"],
            "base": "b" * 64,
            "recipe": "c" * 64,
            "degree": 2,
            "threshold": 5,
            "stage_s": 200,
            "work_s": 100,
            "length_s": 50_000,
            "cohort": list(House(4).names),
        },
    ),
    *beside_default("UpdateRules", _rules, {"clip": 0.001, "most_examples": 1, "mode": "inspectable"}),
    *probes_of("UpdateRules", _noised, {"noise": (0.0, 1.0)}),
    *probes_of("UpdateRules", _assumed, {"assumed_colluders": (None, 2)}),
    *probes_of("UpdateRules", _stale, {"stale_rounds": (0, 1)}),
)

# --- what drives rounds


def _driven(values: Any, workspace: Workspace) -> Any:
    """The rounds that the file of a driver leads to, with whom, from where and in which journal."""
    folder, house = workspace.folder(), House()
    write_keys(folder, house.me, house.roster)
    for name, start in (("start", START), ("other", {"head.weight": np.ones((2, 3), np.float32)})):
        (folder / f"{name}.tensors").write_bytes(arrays.pack_tensors(start))
    (folder / "empty").mkdir()
    plan = {"task": "pull", "cohort": list(house.names), "rules": RULES, "stage_s": 0, "work_s": 0}
    paths = {"key": f"{COORDINATOR}.key", "roster": "roster", "journal": "journal.sqlite", "start": "start.tensors"}
    (folder / "lead.yaml").write_text(yaml.safe_dump({"run": "triage", **paths, "round": plan, **values}))
    lead = RoundDriverOptions.open(folder / "lead.yaml")
    try:
        lines = [json.loads(line) for line in drive_rounds(lead, house.transport)]
    except SartorError as error:
        return type(error).__name__, error.problem.replace(str(folder), "")
    with contextlib.closing(RoundJournal(Path(lead.journal))) as journal:
        shared = arrays.unpack_tensors(journal.load("shared triage") or arrays.pack_tensors({}))
        rounds = [stored.run for run in ("triage", "other") for stored in journal.rounds(run)]
    return (
        [(line["number"], line["state"], len(line["active"])) for line in lines],
        rounds,
        {name: value.round(4).tolist() for name, value in shared.items()},
        sorted(file.name for file in folder.glob("*.sqlite")),
    )


FACTORS = {"layer.lora_A.weight": np.ones((2, 3), np.float32), "layer.lora_B.weight": np.ones((3, 2), np.float32)}


def _course(values: Any, workspace: Workspace) -> Any:
    """What the first round of a driver trains."""
    plan = RoundOptions(task="pull", cohort=("a", "b", "c"), rules=UpdateRules(clip=1.0))
    lead = RoundDriverOptions("run", "key", "roster", str(workspace.path / "journal"), "start", plan, **values)
    with contextlib.closing(RoundJournal(None)) as journal:
        return lead.schedule(journal).plan(1, FACTORS)[0].trained


def _lora(values: Any, workspace: Workspace) -> Any:
    """What a round of adapters trains, asks for besides, pays for privacy, and makes of five updates."""
    options = load(LoraOptions, {"mode": "freeze_a", **values})
    plan = RoundOptions(task="lora", cohort=("a", "b", "c"), rules=UpdateRules(clip=1.0)).plan()
    account = workspace.folder() / "privacy.json"
    with contextlib.closing(RoundJournal(None)) as journal:
        schedule = LoraSchedule(options, plan, journal, account)
        trained, side_tensors = schedule.plan(1, FACTORS)
        house = House(3)
        noised = {"task": "pull", "cohort": list(house.names), "rules": {"noise": 9.0, "most_examples": 1}}
        schedule.pay(house.coordinator.begin(load(RoundOptions, noised).plan(), ()))
        updates = [Update(str(index), {"weight": np.full(2, float(index**2))}) for index in range(5)]
        pooled = schedule.pool(updates)["weight"].tolist() if options.robust else []
    bounds = [
        (tensor.name, tensor.inputs.tolist() if hasattr(tensor, "inputs") else repr(tensor)) for tensor in side_tensors
    ]
    return trained.trained, bounds, json.loads(account.read_text()) if account.exists() else {}, pooled


DRIVER_PROBES = (
    *beside_default(
        "RoundDriverOptions",
        _driven,
        {
            "rounds": 2,
            "run": "other",
            "key": "nowhere",
            "roster": "empty",
            "journal": "other.sqlite",
            "start": "other.tensors",
            "name": "ward-0001",
            "round": {"task": "pull", "cohort": list(House(4).names), "rules": RULES, "stage_s": 0, "work_s": 0},
        },
    ),
    *probes_of("RoundDriverOptions", _course, {"lora": (None, LoraOptions("freeze_a"))}),
    *probes_of(
        "LoraOptions",
        _lora,
        {
            "mode": ("freeze_a", "factors"),
            "seed": (0, 1),
            "privacy": (None, {"epsilon": 50.0, "delta": 1e-5}),
            "robust": (None, "median"),
        },
    ),
)

BUDGET_PROBES = probes_of(
    "PrivacyBudget",
    lambda values, workspace: calibrated(PrivacyBudget(**{"epsilon": 5.0, "delta": 1e-5, **values}), 3),
    {"epsilon": (5.0, 1.0), "delta": (1e-5, 1e-7)},
)

# --- enrolment


def _enrolled(workspace: Workspace) -> Path:
    folder = workspace.path / "enrolment"
    if not folder.is_dir():
        folder.mkdir()
        house = House()
        write_keys(folder, house.me, house.roster)
        (folder / "empty").mkdir()
    return folder


def _cohort(values: Any, workspace: Workspace) -> Any:
    """Who takes part in a coordinator's rounds, and how long each of its exchanges may take."""
    folder = _enrolled(workspace)
    options = {"key": f"{COORDINATOR}.key", "roster": "roster", **values}
    options |= {name: str(folder / options[name]) for name in ("key", "roster")}
    chosen = load(CoordinatorOptions, options)
    recipe = load_recipe({"base": "tiny", "rules": {"most_examples": 10}})
    try:
        cohort = flower_coordinator._cohort(recipe, chosen)
    except SartorError as error:
        return type(error).__name__
    workspace.patch.setattr(flower_coordinator, "work_of", lambda recipe, resident: {"task": "pull"})
    setup = SimpleNamespace(rules=UpdateRules(), recipe=recipe)
    round_options = flower_coordinator._round(
        setup, chosen, SimpleNamespace(rows=dict.fromkeys(cohort), resident=None)
    )  # type: ignore[arg-type]
    plan = round_options.plan()
    return plan.cohort, plan.stage_s, plan.work_s, plan.length_s


def _member(values: Any, workspace: Workspace) -> Any:
    """Who a client is, whose rounds it hears, where its journal is, and whose processes may speak to it."""
    folder = _enrolled(workspace)
    options = {"key": f"{COORDINATOR}.key", "roster": "roster", "socket": "x", **values}
    options |= {name: str(folder / options[name]) for name in ("key", "roster")}
    chosen = load(ClientOptions, options)
    recipe = load_recipe({"base": "tiny"})
    try:
        member = flower_client.enrol(recipe, COORDINATOR, chosen)
        heard = flower_client._users(chosen.hear), flower_client._group(chosen.group)
    except SartorError as error:
        return type(error).__name__
    journal = flower_client._journal("a", chosen).name
    return member.identity.name, member.coordinator, journal, heard, member.policy.least_cohort


def _coordinated(values: Any, workspace: Workspace) -> Any:
    """Licences of the sources of an Adapter whose clients agreed to one, and what is done while no SuperLink answers."""
    folder = _enrolled(workspace)
    options = {"key": str(folder / f"{COORDINATOR}.key"), "roster": str(folder / "roster"), **values}
    recipe = {"base": "tiny", "rules": {"most_examples": 10}}
    lines: list[str] = []
    ended: list[str] = []
    out = workspace.folder() / "adapter"
    plan = RoundOptions(task="pull", cohort=("a", "b", "c"))
    lead = RoundDriverOptions("run", "key", "roster", str(out.with_name("journal.sqlite")), "start", plan, rounds=0)
    resident = SimpleNamespace(dtype="fp32")
    written: list[Any] = []
    stubs: dict[str, Any] = {
        "_open_clients": lambda recipe, cohort, notice: SimpleNamespace(resident=resident, held_out=[], rows={}),
        "_setup": lambda recipe, clients, folder: folder.mkdir(parents=True, exist_ok=True),
        "fingerprint_of": lambda recipe, resident, **of_clients: {},
        "check_same": lambda folder, fingerprint, dtype: None,
        "_write_lead": lambda setup, options, clients, name: lead,
        "lines_of": lambda journal, run: [{"round": 1}],
        "_shared": lambda journal, run: {},
        "round_line": lambda line, rounds: "",
        "facts_of": lambda setup, clients, lines, shared, fingerprint: {
            "licence": "MIT",
            "sources": [],
            "run": {"federated": {}},
        },
        "AttackTarget": lambda *arguments, **fields: None,
        "run_attacks": lambda target, notice: None,
        "write_adapter": lambda out, resident, lines, shared, facts, report, replace: written.append(facts),
        "Simulated": lambda adapter: None,
    }
    for name, stub in stubs.items():
        workspace.patch.setattr(flower_coordinator, name, stub)
    clock = Clock()
    began = SimpleNamespace(poll=lambda: 1, wait=lambda s: None, terminate=lambda: None)
    workspace.patch.setattr(flower_run, "_begun", lambda watch: began)
    workspace.patch.setattr(flower_run, "_is_over", lambda journal, lead: bool(lines))
    passes = SimpleNamespace(monotonic=clock, sleep=lambda seconds: setattr(clock, "now", clock.now + 100 * seconds))
    workspace.patch.setattr(flower_run, "time", passes)
    workspace.patch.setattr(flower_run, "_given_up", lambda watch: MissingError(f"given up at {clock.now}", ""))
    try:
        flower_coordinator.coordinate(recipe, out, options, notice=lines.append)
    except SartorError as error:
        ended.append(error.problem)
    licences = [(facts["licence"], facts["sources"][0]["licence"]) for facts in written]
    return licences, [line.partition(":")[0] for line in lines], ended


class _Answering(Exception):
    """Where a client answers."""


def _joined(values: Any, workspace: Workspace) -> Any:
    """The socket that a client makes."""
    folder = _enrolled(workspace)
    sockets = workspace.folder()
    sockets.chmod(0o700)

    def bind(self: Any, name: str, answer: Any) -> None:
        raise _Answering(sorted(file.name for file in sockets.glob("*") if file.is_socket()))

    workspace.patch.setattr(local_rpc.LocalRpcServer, "serve", bind)
    workspace.patch.setattr(local_rpc.signal, "signal", lambda number, handler: None)
    rows = SimpleNamespace(left_out={}, train=[])
    workspace.patch.setattr(flower_client, "task_of", lambda *arguments: SimpleNamespace(rows=rows, guard=None))
    workspace.patch.setattr(flower_client, "round_client", lambda *arguments: None)
    options = {"key": str(folder / f"{COORDINATOR}.key"), "roster": str(folder / "roster")}
    options |= {"journal": str(sockets / "journal.sqlite"), "socket": str(sockets / values["socket"])}
    try:
        flower_client.join_rounds({"base": "tiny"}, "rows", COORDINATOR, options)
    except _Answering as answering:
        return answering.args


ENROLMENT_PROBES = (
    *probes_of("CoordinatorOptions", _coordinated, {"licence": ("", "Apache-2.0"), "link": ("", "superlink")}),
    *probes_of(
        "CoordinatorOptions",
        lambda values, workspace: _coordinated({"link": "superlink", **values}, workspace),
        {"patience_s": (600.0, 60.0)},
    ),
    *probes_of("ClientOptions", _joined, {"socket": ("one", "two")}),
    *probes_of(
        "CoordinatorOptions",
        _cohort,
        {
            "key": (f"{COORDINATOR}.key", "nowhere"),
            "roster": ("roster", "empty"),
            "name": (COORDINATOR, "ward-0001"),
            "clients": ([], list(House().names[:3])),
            "stage_s": (300, 200),
            "work_s": (3600, 100),
        },
    ),
    *probes_of(
        "ClientOptions",
        _member,
        {
            "key": (f"{COORDINATOR}.key", "nowhere"),
            "roster": ("roster", "empty"),
            "journal": ("", "other.sqlite"),
            "coordinator": (COORDINATOR, "nobody"),
            "hear": ([], [str(os.getuid() + 1)]),
            "group": ("", str(os.getgid() + 1)),
            "min_cohort": (0, 5),
        },
    ),
)

PROBES: tuple[Probe, ...] = (*ROUND_PROBES, *DRIVER_PROBES, *BUDGET_PROBES, *ENROLMENT_PROBES)
