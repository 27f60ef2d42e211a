"""A client's part of a round's noise, as `privacy.clients` draws it: what a RoundClient is given."""

from __future__ import annotations

from sartor.core.errors import RoundError
from sartor.federate.privacy.clients import ClientNoise
from sartor.federate.rounds.manifest import Manifest
from sartor.federate.rounds.tensors import WEIGHT
from sartor.models.lora_tensors import Tensors


def noise_of(manifest: Manifest) -> ClientNoise:
    """The noise that a manifest asks for: shared by as many clients as must stay to the end, in units of the ring.

    Raises RoundError where its tensors have unlike units, or units too coarse for the noise.
    """
    units = {slot.scale for slot in manifest.terms.layout if slot.name != WEIGHT}
    if len(units) != 1:
        problem = f"the tensors of the round have {len(units)} different units, and noise is fitted to one"
        raise RoundError(problem, "terms_for makes such a layout", "noise")
    return ClientNoise(manifest.rules.clip, manifest.rules.noise, manifest.terms.threshold, units.pop())


def values_of(manifest: Manifest) -> int:
    """How many values of an update are summed."""
    return sum(slot.size for slot in manifest.terms.layout if slot.name != WEIGHT)


def noised(tensors: Tensors, manifest: Manifest) -> Tensors:
    """See `rounds.task.Noise`: the update in whole units of the ring, with this client's share added."""
    how = noise_of(manifest)
    how.effective_multiplier(values_of(manifest))
    return {name: units * how.step for name, units in how.encoded(tensors).items()}
