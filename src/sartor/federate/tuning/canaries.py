"""`exactness_error` of a round whose updates nobody sees: each client's response to a canary goes along in the secure sum.

What a client adds is R_i = (B_i A_i - B A) X, of its clipped update: how the response of the shared adapter changes with it
(`aggregate.exactness` has X, drawn from the recipe's seed and the round's number). The sum of them, over the sum of the
weights, is the mean of what no server sees; the coordinator holds the adapter that it made against that. Both have been through
the ring, so what is measured includes the ring's rounding. In the exact modes R_i is linear in the update: its sum tells
nothing that the sum of the updates does not tell. Under noise nobody is asked for one.
"""

from __future__ import annotations

import numpy as np

from sartor.federate.aggregate import exactness
from sartor.federate.aggregate.exactness import PREFIX, Canary
from sartor.federate.aggregate.modes import Combined
from sartor.federate.rounds import tensors as arrays
from sartor.federate.rounds.manifest import Beside, Manifest
from sartor.models.lora_tensors import A, Array, B, Tensors, norm, plus

# of X: enough for a figure, and half a percent of the upload of a model of 100 M weights
_COLUMNS = 2
# of a module that nothing of is trained, whose response does not change
_LEAST = 1e-9


def of_round(shared: Tensors, seed: int, number: int) -> Canary:
    """The canary of a round. seed: the recipe's."""
    return exactness.draw(shared, seed + number, columns=_COLUMNS)


def besides(canary: Canary, shared: Tensors, trained: Tensors, clip: float) -> list[Beside]:
    """What the round asks for: a change (out, K) for each module, and how large it can be where an update has the norm `clip`.

    trained: the tensors that change. ||dB A x|| <= clip ||A x||, ||B dA x|| <= clip ||B|| ||x||.
    """
    found = []
    for module, inputs in canary.inputs.items():
        a, b = shared[module + A].astype(np.float64), shared[module + B].astype(np.float64)
        bound, longest = 0.0, float(np.linalg.norm(inputs, axis=0).max())
        if module + B in trained:
            bound += clip * float(np.linalg.norm(a @ inputs, axis=0).max())
        if module + A in trained:
            bound += clip * norm({"": b}) * longest
        if {module + A, module + B} <= set(trained):
            bound += clip**2 * longest
        # a hair more, as responses are rounded to float32
        found.append(Beside(PREFIX + module, (b.shape[0], _COLUMNS), max(bound, _LEAST) * (1 + 1e-5)))
    return found


def responses(manifest: Manifest, shared: Tensors, change: Tensors, seed: int) -> dict[str, Array]:
    """What a client adds to the sum besides its change: nothing, where the round does not ask for it."""
    if not any(slot.name.startswith(PREFIX) for slot in manifest.terms.layout):
        return {}
    canary = of_round(shared, seed, manifest.number)
    changed = canary.responses(plus(shared, arrays.clipped(change, manifest.rules.clip)))
    return plus(changed, canary.responses(shared), -1.0)


def error_of(shared: Tensors, mean: Tensors, seed: int, number: int) -> float | None:
    """How far the adapter of the mean change is from the mean of the clients' products, relative; None if none was asked for.

    mean: of the updates and, by the names of a canary, of the responses.
    """
    canary = of_round(shared, seed, number)
    if not all(PREFIX + module in mean for module in canary.inputs):
        return None
    wanted = plus(canary.responses(shared), mean)
    return exactness.exactness_error(canary, Combined(plus(shared, mean)), wanted)
