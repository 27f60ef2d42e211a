"""Aggregation modes of LoRA updates, and the distance of their result to the exact mean.

    mode: freeze_a          # or alternate, residual, factors

Averaging the factors does not average the products: mean(B_i) mean(A_i) differs from mean(B_i A_i). A mode is exact if
its result computes mean(B_i A_i). It is linear if that result follows from the sum of the uploads alone. A secure sum
shows nothing else, so it needs a linear mode.

| mode | exact | linear | source |
|---|---|---|---|
| freeze_a | yes | yes | FFA-LoRA, arXiv:2403.12313 |
| alternate | yes | yes | RoLoRA, arXiv:2409.02346 |
| residual | yes | no | FedEx-LoRA, arXiv:2410.09432 |
| factors | no | yes | FedIT, arXiv:2305.05644: a baseline to compare with |

The exactness probe compares the product P that the round made on a few modules. Its inputs X (in, K) are Gaussian and
drawn from the round's seed. With M = mean(B_i A_i):

    error = ||(P - M) X||_F / ||M X||_F,   E ||M X||_F^2 = K ||M||_F^2

so the error estimates the relative Frobenius error of the products. A client's response B_i A_i X has a few thousand
numbers and is linear in its product. Under a secure sum it is therefore summed too, and no server sees a single one.
Where noise is added for privacy no client sends a response: it would be a second release, without noise.
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
    """Result of a round.

    tensors: the next shared adapter.
    residual: module -> factors of the matrix to be added to its frozen weight (`fold`).
    """

    tensors: Tensors
    residual: dict[str, LoraPair] = field(default_factory=dict)


class Mode(Protocol):
    """Aggregation mode: turns the adapters of a round into one.

    number: number of a round, from 1.
    """

    @property
    def kind(self) -> str:
        """Name of the mode in a manifest."""
        ...

    @property
    def is_exact(self) -> bool:
        """True if the result computes the mean of the clients' products, up to rounding."""
        ...

    @property
    def is_linear(self) -> bool:
        """True if the weighted mean of the uploads suffices; else `applied` is right for a single upload only."""
        ...

    def trains(self, name: str, number: int) -> bool:
        """Return whether clients train the tensor `name` in round `number`."""
        ...

    def sent(self, shared: Tensors, number: int) -> Tensors:
        """Return tensors with the names and shapes of an upload, to check one with `updates.check_update`."""
        ...

    def upload(self, shared: Tensors, trained: Tensors, number: int) -> Tensors:
        """Return the upload of a client that started from `shared` and ended with `trained`.

        The tensors have the names and shapes of `sent`. Raises InputError if a tensor that the round freezes was
        trained.
        """
        ...

    def applied(self, shared: Tensors, mean: Tensors, number: int) -> Tensors:
        """Return the next shared adapter, in the shapes of `shared`, from the mean of the uploads.

        Applied to a single upload, it returns that client's own adapter.
        """
        ...

    def combine(self, shared: Tensors, updates: Sequence[Update], number: int) -> Combined:
        """Return the next shared adapter, in the shapes of `shared`, from the individual uploads.

        Raises InputError for an upload that cannot be used.
        """
        ...


class _Changes:
    """Modes that send the change of the trained tensors: one factor of each pair, so the product is linear in it.

    With A fixed, mean(B_i A) = (B + mean(B_i - B)) A; with B fixed, mean(B A_i) = B (A + mean(A_i - A)).
    """

    is_exact = is_linear = True

    def trains(self, name: str, number: int) -> bool:
        """Return whether clients train the tensor; each mode defines it."""
        raise NotImplementedError

    def sent(self, shared: Tensors, number: int) -> Tensors:
        """Return the tensors of `shared`, in their shapes, that the round trains."""
        return {name: value for name, value in shared.items() if self.trains(name, number)}

    def upload(self, shared: Tensors, trained: Tensors, number: int) -> Tensors:
        """Return trained minus shared for each trained tensor, in the shapes of `shared`.

        `trained` may have a lower rank (`lora_tensors.split_ranks`): it is first padded to the shared rank. Raises
        InputError if the tensor names differ or a frozen tensor was changed.
        """
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
        """Return shared + mean for the trained tensors, in the shapes of `shared`; the others stay as they are."""
        return add_changes(shared, mean)

    def combine(self, shared: Tensors, updates: Sequence[Update], number: int) -> Combined:
        """Return shared + mean of the uploads, in the shapes of `shared`, without a residual."""
        cohort(updates, self.sent(shared, number))
        return Combined(self.applied(shared, mean(updates), number))


@dataclass(frozen=True)
class FreezeA(_Changes):
    """LoRA with A random, equal on all clients and never trained; clients train B.

    The upload is half as large, and noise for privacy enters one factor only.
    """

    kind: Literal["freeze_a"] = "freeze_a"

    def trains(self, name: str, number: int) -> bool:
        """Return whether the tensor is trained: every tensor except A."""
        return not name.endswith(A)


@dataclass(frozen=True)
class Alternate(_Changes):
    """LoRA whose clients train B in odd rounds and A in even ones.

    B comes first: it starts at zero, and A has no gradient until B has changed.
    """

    kind: Literal["alternate"] = "alternate"

    def trains(self, name: str, number: int) -> bool:
        """Return whether the tensor is trained: all but A in odd rounds, all but B in even ones."""
        return not name.endswith(A if number % 2 else B)


class _Whole:
    """Modes that send both factors as they are."""

    def trains(self, name: str, number: int) -> bool:
        """Return True: every tensor is trained in every round."""
        return True

    def sent(self, shared: Tensors, number: int) -> Tensors:
        """Return `shared`, in its shapes: an upload has all its tensors."""
        return shared

    def upload(self, shared: Tensors, trained: Tensors, number: int) -> Tensors:
        """Return the trained tensors unchanged, in the shapes of `shared`."""
        return dict(trained)


@dataclass(frozen=True)
class Residual(_Whole):
    """Means of both factors, with the missing part of the product added to the frozen weights.

    The missing part is mean(B_i A_i) - mean(B_i) mean(A_i), of rank (clients + 1) R at most; it is sent to the
    clients. The aggregator sees every client's factors.
    """

    kind: Literal["residual"] = "residual"
    is_exact = True
    is_linear = False

    def applied(self, shared: Tensors, mean: Tensors, number: int) -> Tensors:
        """Return `mean`, in its shapes; exact only for a single upload, whose residual is zero."""
        return mean

    def combine(self, shared: Tensors, updates: Sequence[Update], number: int) -> Combined:
        """Return the means of both factors, in the shapes of `shared`, and one residual per module."""
        cohort(updates, shared)
        means = mean(updates)
        return Combined(means, {module: _missed(module, means, updates) for module in modules(shared)})


def _missed(module: str, means: Tensors, updates: Sequence[Update]) -> LoraPair:
    """Return mean(B_i A_i) - B A of one module as a pair of factors.

    With n clients of weights w_i: B' = [w_1 B_1 .. w_n B_n, -B] (out, (n + 1) R), A' = [A_1; ..; A_n; A] ((n + 1) R,
    in), so B' A' = sum_i w_i B_i A_i - B A (FedEx-LoRA, arXiv:2410.09432).
    """
    total = sum(update.examples for update in updates)
    pairs, mean_pair = [pair(update.tensors, module) for update in updates], pair(means, module)
    weighted = [
        client_pair.b * np.float64(update.examples / total) for client_pair, update in zip(pairs, updates, strict=True)
    ]
    b = np.concatenate([*weighted, -mean_pair.b.astype(np.float64)], axis=1)
    return LoraPair(np.concatenate([*(client_pair.a for client_pair in pairs), mean_pair.a]).astype(np.float64), b)


@dataclass(frozen=True)
class FactorMean(_Whole):
    """Means of both factors without a correction: not exact, a baseline to compare with, never a default."""

    kind: Literal["factors"] = "factors"
    is_exact = False
    is_linear = True

    def applied(self, shared: Tensors, mean: Tensors, number: int) -> Tensors:
        """Return `mean`, in its shapes."""
        return mean

    def combine(self, shared: Tensors, updates: Sequence[Update], number: int) -> Combined:
        """Return the means of both factors, in the shapes of `shared`, without a residual."""
        cohort(updates, shared)
        return Combined(mean(updates))


AnyMode = FreezeA | Alternate | Residual | FactorMean


def fold(weight: Array, residual: LoraPair, scale: float) -> Array:
    """Return a frozen weight with a residual added: W + scale * B' A', with scale = alpha / R.

    weight and the result: shape (out, in).
    """
    return (weight + scale * residual.product).astype(weight.dtype)


PREFIX = "canary."


@dataclass(frozen=True)
class ExactnessProbe:
    """Random inputs with which the products of a few modules are compared.

    inputs: module -> X (in, K).
    """

    inputs: Mapping[str, Array]

    def responses(self, tensors: Tensors, residual: Mapping[str, LoraPair] | None = None) -> dict[str, Array]:
        """Return `canary.MODULE` -> (B A + residual) X, shape (out, K), fp32.

        Without residuals it is what a client sends beside its upload, computed from its own trained adapter.
        """
        residuals = residual or {}
        responses = {}
        for module, inputs in self.inputs.items():
            parts = [pair(tensors, module), *([residuals[module]] if module in residuals else [])]
            sums = [part.b.astype(np.float64) @ (part.a.astype(np.float64) @ inputs) for part in parts]
            responses[PREFIX + module] = np.sum(sums, axis=0).astype(np.float32)
        return responses


def draw(shared: Tensors, seed: int, most_modules: int = 4, columns: int = 8) -> ExactnessProbe:
    """Draw a probe of some modules, the same on every machine.

    columns: K of the inputs X, shape (in, K); 0 gives the identity (in, in), so that whole products are compared, for
    tests. Raises ConfigError for an adapter without factors.
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
    """Return the relative distance of the round's result to the weighted mean of the clients' responses.

    expected: `canary.MODULE` -> mean response, shape (out, K). 0 if both are zero, infinite if only `expected` is.
    """
    responses = canary.responses(combined.tensors, combined.residual)
    # error = sqrt(sum_m ||R_m - E_m||_F^2 / sum_m ||E_m||_F^2), R_m and E_m: (out, K) of module m
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
    """Return `exactness_error` where the individual uploads are visible.

    The mean response is computed from the uploads, whose tensors have the shapes of `mode.sent`.
    """
    responses = [
        Update(update.client, canary.responses(mode.applied(shared, update.tensors, number)), update.examples)
        for update in updates
    ]
    return exactness_error(canary, combined, mean(responses))
