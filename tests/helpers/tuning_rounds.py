"""A round's manifest for a task that is called by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sartor.core import config
from sartor.federate import updates as arrays
from sartor.federate.recipe import FederateRecipe, RoundSettings
from sartor.federate.rounds.round_manifest import ClientWork, Manifest, UpdateRules, terms_for
from sartor.federate.tuning.simulated_clients import Clients
from sartor.models.lora_tensors import Tensors


def manifest(asked: FederateRecipe, people: Clients, shared: Tensors, number: int = 1, **work: Any) -> Manifest:
    said = ClientWork("lora", arrays.digest(arrays.pack_tensors(shared)), people.resident.ref.digest, people.resident.digest)
    said = replace(said, **{"settings": config.dump(RoundSettings.of(asked)), **work})
    return Manifest("test", number, "coordinator", said, terms_for(("a", "b", "c"), shared, UpdateRules()), 0)
