"""A round's manifest for a task that is called by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sartor.core import config
from sartor.federate import updates as arrays
from sartor.federate.recipe import FederateRecipe, Settings
from sartor.federate.rounds.round_manifest import Manifest, Rules, Work, terms_for
from sartor.federate.tuning.simulated_clients import Clients
from sartor.models.lora_tensors import Tensors


def manifest(asked: FederateRecipe, people: Clients, shared: Tensors, number: int = 1, **work: Any) -> Manifest:
    said = Work("lora", arrays.digest(arrays.pack(shared)), people.resident.ref.digest, people.resident.digest)
    said = replace(said, **{"settings": config.dump(Settings.of(asked)), **work})
    return Manifest("test", number, "coordinator", said, terms_for(("a", "b", "c"), shared, Rules()), 0)
