"""How far the adapter that a round made is from the mean of the clients' products: measured on a canary, in every round.

The canary is some modules with random inputs X (in, K), drawn from the round's seed: ||(P - mean(B_i A_i)) X|| over
||mean(B_i A_i) X||. For Gaussian X its squares are the Frobenius norms' in expectation. A client's response B_i A_i X is a
few thousand numbers and linear in its product, so under a secure sum it goes along in the sum, and no server sees one. Where
noise is added for privacy nobody sends a response: it would be a second release, without noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sartor.core.errors import ConfigError
from sartor.federate.aggregate.modes import Combined, Mode
from sartor.federate.aggregate.tensors__updates import Update, mean
from sartor.models.lora_tensors import A, Array, Pair, Tensors, modules, pair

PREFIX = "canary."


@dataclass(frozen=True)
class Canary:
    """Module -> inputs X (in, K)."""

    inputs: Mapping[str, Array]

    def responses(self, tensors: Tensors, residual: Mapping[str, Pair] | None = None) -> dict[str, Array]:
        """`canary.MODULE` -> B A X (out, K) in fp32: what a client sends beside its upload, of its own trained adapter."""
        extra = residual or {}
        found = {}
        for module, inputs in self.inputs.items():
            parts = [pair(tensors, module), *([extra[module]] if module in extra else [])]
            sums = [part.b.astype(np.float64) @ (part.a.astype(np.float64) @ inputs) for part in parts]
            found[PREFIX + module] = np.sum(sums, axis=0).astype(np.float32)
        return found


def draw(shared: Tensors, seed: int, most_modules: int = 4, columns: int = 8) -> Canary:
    """A canary of some modules, the same on every machine. columns: K; 0 takes whole products, which is for tests.

    Raises ConfigError for an adapter without factors.
    """
    names = modules(shared)
    if not names:
        raise ConfigError("the adapter has no factors, so there is no product to measure", "tune with method.kind: lora")
    source = np.random.default_rng(seed)
    chosen = sorted(source.choice(names, size=min(most_modules, len(names)), replace=False).tolist())
    widths = {name: shared[name + A].shape[1] for name in chosen}
    drawn = {name: source.standard_normal((width, columns)) if columns else np.eye(width) for name, width in widths.items()}
    return Canary(drawn)


def exactness_error(canary: Canary, made: Combined, wanted: Tensors) -> float:
    """The relative distance of what was made from `wanted`, the weighted mean of the clients' responses. 0 if both are zero."""
    found = canary.responses(made.tensors, made.residual)
    off = sum(float(np.square(found[name] - value, dtype=np.float64).sum()) for name, value in wanted.items())
    whole = sum(float(np.square(value, dtype=np.float64).sum()) for value in wanted.values())
    if not whole:
        return 0.0 if not off else float("inf")
    return float(np.sqrt(off / whole))


def seen_error(canary: Canary, mode: Mode, shared: Tensors, updates: Sequence[Update], made: Combined, number: int) -> float:
    """`exactness_error` where the uploads are seen one by one."""
    each = [Update(one.client, canary.responses(mode.applied(shared, one.tensors, number)), one.examples) for one in updates]
    return exactness_error(canary, made, mean(each))
