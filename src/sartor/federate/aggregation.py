"""Aggregation modes and their distance to the exact mean.

    mode: freeze_a          # or alternate, residual, factors

The mean of factors is no mean: mean(B_i) mean(A_i) is not mean(B_i A_i). A mode is exact if what it makes computes
mean(B_i A_i), and linear if that follows from the sum of what is sent, so that a secure sum, which shows nothing else,
will do.

| mode | exact | linear | source |
|---|---|---|---|
| freeze_a | yes | yes | FFA-LoRA, arXiv:2403.12313 |
| alternate | yes | yes | RoLoRA, arXiv:2409.02346 |
| residual | yes | no | FedEx-LoRA, arXiv:2410.09432 |
| factors | no | yes | FedIT, arXiv:2305.05644: a baseline to compare with |

The canary is some modules with random inputs X (in, K), drawn from the round's seed: ||(P - mean(B_i A_i)) X|| over
||mean(B_i A_i) X||. For Gaussian X its squares are the Frobenius norms' in expectation. A client's response B_i A_i X
is a few thousand numbers and linear in its product, so under a secure sum it goes along in the sum, and no server sees
one. Where noise is added for privacy nobody sends a response: it would be a second release, without noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from sartor.core.errors import ConfigError, InputError
from sartor.federate.updates import Update, cohort, mean
from sartor.models.lora_tensors import A, Array, B, LoraPair, Tensors, add_changes, modules, pad_ranks, pair


@dataclass(frozen=True)
class Combined:
    """What a round made: the shared adapter, and module -> what is to be added to its frozen weight (`fold`), as
    factors.
    """

    tensors: Tensors
    residual: dict[str, LoraPair] = field(default_factory=dict)


class Mode(Protocol):
    """How a round's adapters become one. Rounds count from 1."""

    @property
    def kind(self) -> str:
        """Its word in a manifest."""
        ...

    @property
    def is_exact(self) -> bool:
        """Whether what is made computes the mean of the clients' products, but for rounding."""
        ...

    @property
    def is_linear(self) -> bool:
        """Whether it needs the weighted mean of what is sent and nothing else: only then `applied` may be called."""
        ...

    def trains(self, name: str, number: int) -> bool:
        """Whether clients train the tensor `name` in round `number`."""
        ...

    def sent(self, shared: Tensors, number: int) -> Tensors:
        """Tensors with the names and shapes of an upload, to check one against (`updates.checked`)."""
        ...

    def upload(self, shared: Tensors, trained: Tensors, number: int) -> Tensors:
        """What a client sends, who began with the shared adapter and ended with `trained`.

        Raises InputError where a tensor was trained that the round holds still.
        """
        ...

    def applied(self, shared: Tensors, mean: Tensors, number: int) -> Tensors:
        """The next shared adapter from the mean of the uploads. Of one upload it is that client's own adapter."""
        ...

    def combine(self, shared: Tensors, updates: Sequence[Update], number: int) -> Combined:
        """The next shared adapter where the uploads are seen one by one. Raises InputError for one that cannot be
        used.
        """
        ...


class _Changes:
    """Sends the change of what is trained: of one half of each pair, so the product is linear in it."""

    is_exact = is_linear = True

    def trains(self, name: str, number: int) -> bool:
        """See Mode."""
        raise NotImplementedError

    def sent(self, shared: Tensors, number: int) -> Tensors:
        """See Mode."""
        return {name: value for name, value in shared.items() if self.trains(name, number)}

    def upload(self, shared: Tensors, trained: Tensors, number: int) -> Tensors:
        """See Mode. `trained` may be of a lower rank (`lora_tensors.split_ranks`)."""
        padded = pad_ranks(trained, shared)
        if mismatched := sorted(set(padded) ^ set(shared)):
            raise InputError(
                f"{mismatched[0]} is not in both, what was shared and what was trained", "train the shared adapter"
            )
        frozen = [name for name in shared if not self.trains(name, number)]
        if changed := [name for name in frozen if not np.array_equal(padded[name], shared[name])]:
            problem = f"{len(changed)} tensors were trained that round {number} holds still, the first is {changed[0]}"
            raise InputError(problem, "set requires_grad as the mode's `trains` says")
        return {
            name: (padded[name].astype(np.float64) - shared[name]).astype(padded[name].dtype)
            for name in shared
            if self.trains(name, number)
        }

    def applied(self, shared: Tensors, mean: Tensors, number: int) -> Tensors:
        """See Mode."""
        return add_changes(shared, mean)

    def combine(self, shared: Tensors, updates: Sequence[Update], number: int) -> Combined:
        """See Mode."""
        cohort(updates, self.sent(shared, number))
        return Combined(self.applied(shared, mean(updates), number))


@dataclass(frozen=True)
class FreezeA(_Changes):
    """A is random, the same everywhere, and never trained; B is. Half of the upload; noise, if any, is in one
    factor.
    """

    kind: Literal["freeze_a"] = "freeze_a"

    def trains(self, name: str, number: int) -> bool:
        """See Mode."""
        return not name.endswith(A)


@dataclass(frozen=True)
class Alternate(_Changes):
    """B in odd rounds, A in even ones. B first: it begins at zero, and until it moved A has no gradient."""

    kind: Literal["alternate"] = "alternate"

    def trains(self, name: str, number: int) -> bool:
        """See Mode."""
        return not name.endswith(A if number % 2 else B)


class _Whole:
    """Sends both factors as they are."""

    def trains(self, name: str, number: int) -> bool:
        """See Mode."""
        return True

    def sent(self, shared: Tensors, number: int) -> Tensors:
        """See Mode."""
        return shared

    def upload(self, shared: Tensors, trained: Tensors, number: int) -> Tensors:
        """See Mode."""
        return dict(trained)


@dataclass(frozen=True)
class Residual(_Whole):
    """Means of both factors, and what they miss, mean(B_i A_i) - mean(B_i) mean(A_i), added to the frozen weights.

    The one who sums sees every client's factors. The residual goes to the clients, of rank (clients + 1) R at most.
    """

    kind: Literal["residual"] = "residual"
    is_exact = True
    is_linear = False

    def applied(self, shared: Tensors, mean: Tensors, number: int) -> Tensors:
        """See Mode: right of one upload alone, of which nothing is missed."""
        return mean

    def combine(self, shared: Tensors, updates: Sequence[Update], number: int) -> Combined:
        """See Mode."""
        cohort(updates, shared)
        means = mean(updates)
        return Combined(means, {module: _missed(module, means, updates) for module in modules(shared)})


def _missed(module: str, means: Tensors, updates: Sequence[Update]) -> LoraPair:
    """mean(B_i A_i) - B A as one pair of factors: [w_1 B_1 .. w_n B_n, -B] times all A above each other."""
    total = sum(update.examples for update in updates)
    pairs, mean_pair = [pair(update.tensors, module) for update in updates], pair(means, module)
    weighted = [
        client_pair.b * np.float64(update.examples / total) for client_pair, update in zip(pairs, updates, strict=True)
    ]
    b = np.concatenate([*weighted, -mean_pair.b.astype(np.float64)], axis=1)
    return LoraPair(np.concatenate([*(client_pair.a for client_pair in pairs), mean_pair.a]).astype(np.float64), b)


@dataclass(frozen=True)
class FactorMean(_Whole):
    """Means of both factors, and nothing for what they miss: not exact, here to be compared with, never a default."""

    kind: Literal["factors"] = "factors"
    is_exact = False
    is_linear = True

    def applied(self, shared: Tensors, mean: Tensors, number: int) -> Tensors:
        """See Mode."""
        return mean

    def combine(self, shared: Tensors, updates: Sequence[Update], number: int) -> Combined:
        """See Mode."""
        cohort(updates, shared)
        return Combined(mean(updates))


AnyMode = FreezeA | Alternate | Residual | FactorMean


def fold(weight: Array, residual: LoraPair, scale: float) -> Array:
    """A frozen weight (out, in) with a residual added, as the adapter's product is: times scale, alpha / R."""
    return (weight + scale * residual.product).astype(weight.dtype)


PREFIX = "canary."


@dataclass(frozen=True)
class ExactnessProbe:
    """Module -> inputs X (in, K)."""

    inputs: Mapping[str, Array]

    def responses(self, tensors: Tensors, residual: Mapping[str, LoraPair] | None = None) -> dict[str, Array]:
        """`canary.MODULE` -> B A X (out, K) in fp32: what a client sends beside its upload, of its own trained
        adapter.
        """
        residuals = residual or {}
        responses = {}
        for module, inputs in self.inputs.items():
            parts = [pair(tensors, module), *([residuals[module]] if module in residuals else [])]
            sums = [part.b.astype(np.float64) @ (part.a.astype(np.float64) @ inputs) for part in parts]
            responses[PREFIX + module] = np.sum(sums, axis=0).astype(np.float32)
        return responses


def draw(shared: Tensors, seed: int, most_modules: int = 4, columns: int = 8) -> ExactnessProbe:
    """A canary of some modules, the same on every machine. columns: K; 0 takes whole products, which is for tests.

    Raises ConfigError for an adapter without factors.
    """
    names = modules(shared)
    if not names:
        raise ConfigError(
            "the adapter has no factors, so there is no product to measure", "tune with method.kind: lora"
        )
    rng = np.random.default_rng(seed)
    chosen = sorted(rng.choice(names, size=min(most_modules, len(names)), replace=False).tolist())
    widths = {name: shared[name + A].shape[1] for name in chosen}
    inputs = {
        name: rng.standard_normal((width, columns)) if columns else np.eye(width) for name, width in widths.items()
    }
    return ExactnessProbe(inputs)


def exactness_error(canary: ExactnessProbe, combined: Combined, expected: Tensors) -> float:
    """The relative distance of what was made from `expected`, the weighted mean of the clients' responses. 0 if both
    are zero.
    """
    responses = canary.responses(combined.tensors, combined.residual)
    squared_error = sum(
        float(np.square(responses[name] - value, dtype=np.float64).sum()) for name, value in expected.items()
    )
    squared_norm = sum(float(np.square(value, dtype=np.float64).sum()) for value in expected.values())
    if not squared_norm:
        return 0.0 if not squared_error else float("inf")
    return float(np.sqrt(squared_error / squared_norm))


def seen_error(
    canary: ExactnessProbe, mode: Mode, shared: Tensors, updates: Sequence[Update], combined: Combined, number: int
) -> float:
    """`exactness_error` where the uploads are seen one by one."""
    responses = [
        Update(update.client, canary.responses(mode.applied(shared, update.tensors, number)), update.examples)
        for update in updates
    ]
    return exactness_error(canary, combined, mean(responses))
