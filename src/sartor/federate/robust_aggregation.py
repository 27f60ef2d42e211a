"""Robust aggregation rules: norm bound, median, trimmed mean, Krum, Multi-Krum and screening.

    robust: {trimmed: {fraction: 0.2}}

n: clients of the round. f: how many of them may be malicious. P: values of an update, all tensors flattened.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from sartor.core.config import option
from sartor.core.errors import ConfigError, GuardError
from sartor.federate.updates import Update, cohort, mean
from sartor.models.lora_tensors import Array, Tensors

Numbers = NDArray[np.float64]


def stacked(updates: Sequence[Update], name: str) -> Numbers:
    """Return one tensor of all updates, flattened: (N, P) fp64, one row a client."""
    return np.stack([update.tensors[name].ravel() for update in updates]).astype(np.float64)


def by_value(updates: Sequence[Update], pooled: Callable[[Numbers], Numbers]) -> dict[str, Array]:
    """Return tensors whose values combine the clients' values at the same index.

    pooled: (N, P) -> (P,), applied to each tensor flattened. The result has the shapes and dtypes of an update.
    """
    like = updates[0].tensors
    return {
        name: pooled(stacked(updates, name)).reshape(value.shape).astype(value.dtype) for name, value in like.items()
    }


def products(updates: Sequence[Update]) -> Numbers:
    """Return inner products of the updates as vectors: (N, N), with values <u_i, u_j>."""
    inner = np.zeros((len(updates), len(updates)))
    for name in updates[0].tensors:
        values = stacked(updates, name)
        inner += values @ values.T
    return inner


def norms(updates: Sequence[Update]) -> Numbers:
    """Return Euclidean norms of the updates: (N,)."""
    return np.sqrt(np.diag(products(updates)))


def squared_distances(updates: Sequence[Update]) -> Numbers:
    """Return squared Euclidean distances between the updates: (N, N).

    ||u_i - u_j||^2 = <u_i, u_i> + <u_j, u_j> - 2 <u_i, u_j>, with negative rounding errors set to 0.
    """
    inner = products(updates)
    squares = np.diag(inner)
    return np.maximum(squares[:, None] + squares[None, :] - 2 * inner, 0)


def cosines(updates: Sequence[Update], to: Tensors) -> Numbers:
    """Return the cosine of each update to `to`: (N,), -1..1; 0 where one of them is zero.

    `to` has the tensors of an update, in their shapes.
    """
    inner = products([*updates, Update("", to)])
    lengths = np.sqrt(np.diag(inner))
    scale = lengths[:-1] * lengths[-1]
    return np.divide(inner[:-1, -1], scale, out=np.zeros(len(updates)), where=scale > 0)


Action = Literal["refused", "bounded"]


@dataclass(frozen=True)
class ClientAction:
    """Treatment of a client's update that was not used as it came, and the reason."""

    client: str
    action: Action
    reason: str


@dataclass(frozen=True)
class Pooled:
    """Result of a robust rule: the tensors used as the mean, and the clients treated otherwise."""

    tensors: Tensors
    verdicts: tuple[ClientAction, ...] = ()


class RobustRule(Protocol):
    """Rule that turns the updates of a round into one."""

    @property
    def kind(self) -> str:
        """Name of the rule in a manifest."""
        ...

    @property
    def sees_updates(self) -> bool:
        """True if the rule needs the individual updates, which excludes a secure sum."""
        ...

    def pool(self, updates: Sequence[Update]) -> Pooled:
        """Return the result that replaces the mean.

        Raises InputError or ConfigError for updates or cohorts that the rule cannot handle.
        """
        ...


@dataclass(frozen=True)
class Mean:
    """The mean, weighted by examples. A single client can shift it arbitrarily far."""

    kind: Literal["mean"] = "mean"
    sees_updates = False

    def pool(self, updates: Sequence[Update]) -> Pooled:
        """Return the mean of the updates, weighted by examples."""
        return Pooled(mean(_checked_cohort(updates)))


@dataclass(frozen=True)
class NormBound:
    """The mean of updates scaled down to a norm bound, which limits how far one client shifts it.

    Sun et al. 2019, arXiv:1911.07963. The bound is `times_median` times the median norm of the round: u_i' = u_i
    min(1, bound / ||u_i||). All clients have the same weight.
    """

    times_median: float = option(1.0, "the norm that an update may have, in medians of the round's norms")
    kind: Literal["norm_bound"] = "norm_bound"
    sees_updates = True

    def __post_init__(self) -> None:
        if self.times_median <= 0:
            raise ConfigError(f"times_median is {self.times_median}; it must be above 0", "times_median: 1.0")

    def pool(self, updates: Sequence[Update]) -> Pooled:
        """Return the mean of the bounded updates, and a verdict for each that was scaled down."""
        lengths = norms(_checked_cohort(updates))
        max_norm = self.times_median * float(np.median(lengths))
        factors = [min(1.0, max_norm / length) if length else 1.0 for length in lengths]
        bounded = [_scaled(update, factor) for update, factor in zip(updates, factors, strict=True)]
        verdicts = tuple(
            ClientAction(update.client, "bounded", f"its norm is {length:.3g}; the bound is {max_norm:.3g}")
            for update, length, factor in zip(updates, lengths, factors, strict=True)
            if factor < 1
        )
        return Pooled(_plain(bounded), verdicts)


@dataclass(frozen=True)
class Median:
    """The median of each value, robust while fewer than half of the clients are malicious.

    Yin et al. 2018, arXiv:1803.01498, definition 1 (coordinate-wise median). All clients have the same weight.
    """

    kind: Literal["median"] = "median"
    sees_updates = True

    def pool(self, updates: Sequence[Update]) -> Pooled:
        """Return the coordinate-wise median of the updates."""
        return Pooled(by_value(_checked_cohort(updates), lambda values: np.median(values, axis=0)))


@dataclass(frozen=True)
class Trimmed:
    """The mean of each value without its lowest and highest ones.

    Yin et al. 2018, arXiv:1803.01498, definition 2 (coordinate-wise trimmed mean). f = ceil(fraction n) values are
    dropped at either end, and the n - 2 f others averaged with the same weight.
    """

    fraction: float = option(
        0.2, "of the clients, that may lie: so many are left out at either end of each value, 0..0.5"
    )
    kind: Literal["trimmed"] = "trimmed"
    sees_updates = True

    def __post_init__(self) -> None:
        _check_fraction("fraction", self.fraction)

    def pool(self, updates: Sequence[Update]) -> Pooled:
        """Return the coordinate-wise trimmed mean. Raises ConfigError unless n > 2 f."""
        count = _liars(self.fraction, _checked_cohort(updates))
        if 2 * count >= len(updates):
            raise _too_few(len(updates), count, 2 * count + 1)
        return Pooled(
            by_value(updates, lambda values: np.sort(values, axis=0)[count : len(values) - count].mean(axis=0))
        )


@dataclass(frozen=True)
class Krum:
    """The one update that is closest to its nearest neighbours.

    Blanchard et al. 2017, arXiv:1703.02757: the update with the least score, which is the sum of squared distances to
    its n - f - 2 nearest others.
    """

    fraction: float = option(0.2, "of the clients, that may lie, 0..0.5")
    kind: Literal["krum"] = "krum"
    sees_updates = True

    def __post_init__(self) -> None:
        _check_fraction("fraction", self.fraction)

    def pool(self, updates: Sequence[Update]) -> Pooled:
        """Return the selected update. Raises ConfigError unless n >= 2 f + 3."""
        return _nearest(updates, _liars(self.fraction, updates), 1)


@dataclass(frozen=True)
class MultiKrum:
    """The mean of the n - f updates with the best Krum scores.

    Blanchard et al. 2017, arXiv:1703.02757; f = ceil(fraction n). All selected clients have the same weight.
    """

    fraction: float = option(0.2, "of the clients, that may lie, 0..0.5")
    kind: Literal["multi_krum"] = "multi_krum"
    sees_updates = True

    def __post_init__(self) -> None:
        _check_fraction("fraction", self.fraction)

    def pool(self, updates: Sequence[Update]) -> Pooled:
        """Return the mean of the selected updates. Raises ConfigError unless n >= 2 f + 3."""
        count = _liars(self.fraction, updates)
        return _nearest(updates, count, len(updates) - count)


@dataclass(frozen=True)
class Screened:
    """The mean of the updates that pass a test of norm and direction; rejected ones are named with the reason.

    An update is rejected if its norm exceeds `most_times_median` medians of the round's norms, or its cosine to the
    round's median update is below `least_cosine`. A round that would lose half of its clients or more is stopped,
    since then it is unknown which half is malicious. All accepted clients have the same weight.
    """

    least_cosine: float = option(0.0, "to the median of all updates, -1..1")
    most_times_median: float = option(3.0, "norm of an update, in medians of the round's norms")
    kind: Literal["screened"] = "screened"
    sees_updates = True

    def __post_init__(self) -> None:
        if not -1 <= self.least_cosine < 1 or self.most_times_median < 1:
            problem = f"least_cosine is {self.least_cosine}, most_times_median {self.most_times_median}"
            raise ConfigError(problem, "least_cosine in -1..1, most_times_median at least 1")

    def pool(self, updates: Sequence[Update]) -> Pooled:
        """Return the mean of the accepted updates, and a verdict for each rejected one.

        Raises GuardError if half of the clients or more would be rejected.
        """
        reasons = self._reasons(_checked_cohort(updates))
        odd = tuple(ClientAction(client, "refused", reason) for client, reason in reasons.items())
        if 2 * len(odd) >= len(updates):
            problem = (
                f"screening would leave out {len(odd)} of {len(updates)} clients, the first {odd[0].client!r}: "
                f"{odd[0].reason}"
            )
            raise GuardError(problem, "look at the clients, or lower least_cosine and raise most_times_median")
        return Pooled(_plain([update for update in updates if update.client not in reasons]), odd)

    def _reasons(self, updates: Sequence[Update]) -> dict[str, str]:
        """Return client -> reason, for each rejected client."""
        lengths = norms(updates)
        max_norm = self.most_times_median * float(np.median(lengths))
        similarities = cosines(updates, Median().pool(updates).tensors)
        reasons = {}
        for update, length, cosine in zip(updates, lengths, similarities, strict=True):
            if length > max_norm:
                reasons[update.client] = f"its norm is {length:.3g}; the limit is {max_norm:.3g}"
            elif length and cosine < self.least_cosine:
                reasons[update.client] = (
                    f"its cosine to the median update is {cosine:.2f}; the limit is {self.least_cosine:.2f}"
                )
        return reasons


AnyRule = Mean | NormBound | Median | Trimmed | Krum | MultiKrum | Screened


def _checked_cohort(updates: Sequence[Update]) -> Sequence[Update]:
    cohort(updates, updates[0].tensors if updates else {})
    return updates


def _plain(updates: Sequence[Update]) -> Tensors:
    """Return the mean of the updates with the same weight for each client."""
    return mean([Update(update.client, update.tensors) for update in updates])


def _scaled(update: Update, factor: float) -> Update:
    if factor == 1:
        return update
    return Update(
        update.client, {name: (value * factor).astype(value.dtype) for name, value in update.tensors.items()}
    )


def _nearest(updates: Sequence[Update], liars: int, keep: int) -> Pooled:
    """Return the mean of the `keep` updates with the lowest Krum scores.

    s_i = sum of ||u_i - u_j||^2 over the n - f - 2 nearest j != i, with f = `liars` (Blanchard et al. 2017,
    arXiv:1703.02757, section 4). Raises ConfigError unless n >= 2 f + 3.
    """
    neighbours = len(_checked_cohort(updates)) - liars - 2
    if len(updates) < 2 * liars + 3:
        raise _too_few(len(updates), liars, 2 * liars + 3)
    # s_i = sum of the n - f - 2 smallest d_ij, j != i; distances: (N, N), scores: (N,)
    distances = squared_distances(updates)
    np.fill_diagonal(distances, np.inf)
    scores = np.sort(distances, axis=1)[:, :neighbours].sum(axis=1)
    order = np.argsort(scores, kind="stable")
    worst_score = scores[order[keep - 1]]
    reasons = [
        f"its distance to its {neighbours} nearest is {scores[index] ** 0.5:.3g}; taken were up to "
        f"{worst_score**0.5:.3g}"
        for index in order[keep:]
    ]
    verdicts = tuple(
        ClientAction(updates[index].client, "refused", reason)
        for index, reason in zip(order[keep:], reasons, strict=True)
    )
    return Pooled(_plain([updates[index] for index in sorted(order[:keep])]), verdicts)


def _liars(fraction: float, updates: Sequence[Update]) -> int:
    """Return f, how many of these clients may be malicious: ceil(fraction n)."""
    return math.ceil(round(fraction * len(updates), 9))


def _check_fraction(name: str, value: float) -> None:
    if not 0 <= value < 0.5:
        raise ConfigError(f"{name} is {value}; it must be at least 0 and below 0.5", f"{name}: 0.2")


def _too_few(clients: int, liars: int, min_clients: int) -> ConfigError:
    return ConfigError(
        f"{clients} clients, of which {liars} may lie; this rule needs {min_clients}",
        f"wait for {min_clients - clients} more, or robust: median",
    )
