"""A recipe of rounds, clients that tune by it in this process, and a round's manifest for a task that is called by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sartor.core import config
from sartor.federate import updates as arrays
from sartor.federate.recipe import FederateRecipe, RoundSettings, load
from sartor.federate.rounds.round_manifest import ClientWork, Manifest, UpdateRules, terms_for
from sartor.federate.tuning.simulated_clients import Clients, open_clients
from sartor.models.lora_tensors import Tensors


def manifest(asked: FederateRecipe, people: Clients, shared: Tensors, number: int = 1, **work: Any) -> Manifest:
    said = ClientWork(
        "lora", arrays.digest(arrays.pack_tensors(shared)), people.resident.ref.digest, people.resident.digest
    )
    said = replace(said, **{"settings": config.dump(RoundSettings.of(asked)), **work})
    return Manifest("test", number, "coordinator", said, terms_for(("a", "b", "c"), shared, UpdateRules()), 0)


def recipe(base: Path, dataset: Path, **changes: Any) -> dict[str, Any]:
    return {
        "base": str(base),
        "data": {"path": str(dataset), "attack_rows": 0},
        "method": {"rank": 8, "alpha": 16},
        "rounds": 2,
        "local": {"updates": 2},
        "optimizer": {"learning_rate": 1e-2, "batch_tokens": 128},
        **changes,
    }


@pytest.fixture
def people(tiny_base: Path, dataset: Path, fp32: None) -> tuple[FederateRecipe, Clients]:
    asked = load(recipe(tiny_base, dataset))
    return asked, open_clients(asked, [dataset], None)
