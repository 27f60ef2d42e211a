"""Probes of the options of rounds: whole rounds of five clients that add small numbers, with real keys and journals."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from federating import COORDINATOR, write_keys
from option_probes import Probe, Workspace, probes_of
from round_parties import House
from sartor.core.config import load
from sartor.core.errors import SartorError
from sartor.federate.flower import flower_client, flower_coordinator
from sartor.federate.flower.flower_client import ClientOptions
from sartor.federate.flower.flower_coordinator import CoordinatorOptions
from sartor.federate.flower.round_driver import RoundOptions
from sartor.federate.privacy.accountant import PrivacyBudget, calibrated
from sartor.federate.recipe import load as load_recipe
from sartor.federate.rounds.round_manifest import UpdateRules, read_manifest
from sartor.federate.rounds.transport import run_round

RULES = {"clip": 1.0, "most_examples": 10}


def _round(values: Any, workspace: Workspace) -> Any:
    """How a round ends, what its tensors are, and what its clients were told of it."""
    house = House()
    plan: dict[str, Any] = {"task": "pull", "cohort": list(house.names), "rules": RULES, "stage_s": 0, "work_s": 0, **values}
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


ROUND_PROBES = (
    *probes_of(
        "RoundOptions",
        _round,
        {
            "task": ("pull", "push"),
            "settings": (None, {"rate": 0.05}),
            "rules": (RULES, {**RULES, "clip": 0.001}),
            "trained": ([], ["tail.weight"]),
            "base": ("", "b" * 64),
            "recipe": ("", "c" * 64),
            "degree": (0, 2),
            "threshold": (0, 5),
            "stage_s": (300, 200),
            "work_s": (3600, 100),
            "length_s": (86_400, 50_000),
        },
    ),
    Probe("RoundOptions.cohort", ({}, {"cohort": list(House(4).names)}), _round),
    *probes_of("UpdateRules", _rules, {"clip": (1.0, 0.001), "most_examples": (10, 1), "mode": ("private", "inspectable")}),
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
    round_options = flower_coordinator._round(setup, chosen, SimpleNamespace(rows=dict.fromkeys(cohort), resident=None))  # type: ignore[arg-type]
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
    return member.identity.name, member.coordinator, flower_client._journal("a", chosen).name, heard


ENROLMENT_PROBES = (
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
        },
    ),
)

PROBES: tuple[Probe, ...] = (*ROUND_PROBES, *BUDGET_PROBES, *ENROLMENT_PROBES)
