"""Every option that a recipe, TEAM.yaml or another file of options declares, as `Class.option`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

from sartor.curate.dedup.dedup_files import DedupOptions
from sartor.curate.recipe import CurateRecipe
from sartor.edge.tuning.energy_policy import EnergyPolicy
from sartor.edge.update.fleet_monitor import FleetPolicy
from sartor.edge.update.tuf_roles import Expiry
from sartor.evaluate.audit.audit import AuditOptions
from sartor.evaluate.judge_options import JudgeOptions
from sartor.federate.flower.driver_options import RoundDriverOptions
from sartor.federate.flower.flower_client import ClientOptions
from sartor.federate.flower.flower_coordinator import CoordinatorOptions
from sartor.federate.recipe import FederateRecipe
from sartor.federate.tuning.client_shards import Shards
from sartor.federate.tuning.edge_client import DeviceFile
from sartor.learn.personal_options import PersonalOptions
from sartor.release.gate import GateFile
from sartor.serving.team_config import Team
from sartor.synthesize.recipe import SynthesizeRecipe
from sartor.synthesize.validate.types import ValidateOptions
from sartor.tune.recipe import Recipe

ROOTS = (
    CurateRecipe,
    Recipe,
    GateFile,
    SynthesizeRecipe,
    ValidateOptions,
    FederateRecipe,
    Shards,
    DeviceFile,
    ClientOptions,
    CoordinatorOptions,
    Team,
    EnergyPolicy,
    DedupOptions,
    FleetPolicy,
    Expiry,
    PersonalOptions,
    RoundDriverOptions,
    AuditOptions,
    JudgeOptions,
)


def declared_options() -> set[str]:
    """Return `Class.option` of every option below the roots; `kind` is the name of a class and no option of it.

    The options of a class without `auto` (`ResolvedOptimizer`) are those of the class that it narrows.
    """
    return {
        f"{cls.__name__.removeprefix('Resolved')}.{field.name}"
        for cls in declared_classes()
        for field in dataclasses.fields(cls)
        if field.init and field.name != "kind"
    }


def declared_classes() -> set[Any]:
    """Return every class of options that the roots hold, at any depth, unions and lists included."""
    waiting, seen = list(ROOTS), set()
    while waiting:
        cls: Any = waiting.pop()
        if cls not in seen:
            seen.add(cls)
            for hint in get_type_hints(cls).values():
                waiting += _classes_of(hint)
    return seen


def _classes_of(hint: Any) -> Iterator[Any]:
    if dataclasses.is_dataclass(hint):
        yield hint
    for argument in get_args(hint):
        yield from _classes_of(argument)
