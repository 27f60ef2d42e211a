"""How lengths, labels and topics differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sartor.curate.validate.options import Limits
from sartor.curate.validate.sides import Pool
from sartor.curate.validate.space import F32, Space
from sartor.curate.validate.verdicts import F64, Finding, beyond_chance, finding_of, not_tested
from sartor.text.encoders import prompt_text
from sartor.text.example_text import words

SHOWN = 5


def lengths(pool: Pool, members: F32, limits: Limits) -> Finding:
    """Words of prompts and of replies: the larger of their Kolmogorov-Smirnov distances."""
    counted = {
        "prompts": np.array([len(words(prompt_text(row))) for row in pool.rows]),
        "replies": np.array([len(words(row.reply)) for row in pool.rows]),
    }
    distances = {name: _kolmogorov(values, members) for name, values in counted.items()}
    name = max(distances, key=lambda one: float(distances[one][0]))
    values, own = np.maximum(*distances.values()), pool.is_synthetic
    middle = [float(np.median(counted[name][side])) for side in (own, ~own)]
    detail = f"median words of {name}: {middle[0]:.0f} synthetic, {middle[1]:.0f} real"
    return finding_of("length", values, limits.length, detail, effect=beyond_chance(values))


def _kolmogorov(values: NDArray[np.int64], members: F32) -> F64:
    """(B,) the largest distance of the two cumulative distributions of (n,) values."""
    order = np.argsort(values, kind="stable")
    ends = np.flatnonzero(np.diff(values[order], append=values.max() + 1))  # only where the value changes
    inside = members[:, order].cumsum(1, dtype=np.float64)
    count = inside[:, -1:]
    outside = np.arange(1, len(values) + 1) - inside
    return np.asarray(np.abs(inside / count - outside / (len(values) - count))[:, ends].max(1))


def topics(space: Space, members: F32, limits: Limits) -> Finding:
    """Chi-squared of how the two sides fall into topics, over all ways in which the topics were drawn.

    The effect is the total variation beyond chance in the way where it is largest, against what chance gives there; the rows
    are of the topics that grew most.
    """
    beyond = np.stack([_beyond(_chi_squared(found, members)) for found in space.topics])
    measured = [_variation(found, members) for found in space.topics]
    chosen = int(np.argmax([_beyond(values)[0] for values, _ in measured]))
    found, (values, shift) = space.topics[chosen], measured[chosen]
    grown = np.argsort(-shift)[:SHOWN]
    own = space.pool.is_synthetic
    rows = [row for topic in grown.tolist() if shift[topic] > 0 for row in np.flatnonzero(own & (found == topic)).tolist()]
    detail = f"of {len(shift)} topics one gains {shift.max():+.0%}, one {shift.min():+.0%} ; they differ by {values[0]:.0%}"
    ids = [space.pool.rows[row].id for row in rows]
    return finding_of("topic", beyond.mean(0), limits.topic, detail, ids, effect=beyond_chance(values))


def labels(pool: Pool, named: Sequence[str | None], members: F32, limits: Limits) -> Finding:
    """Total variation of the labels; a row without one is of its own kind."""
    if not any(named):
        return not_tested("label", limits.label, "the replies are free text: there is no label")
    texts = np.array([name or "(none)" for name in named])
    names, member = np.unique(texts, return_inverse=True)
    values, shift = _variation(member, members)
    most = np.argsort(-np.abs(shift))[:SHOWN].tolist()
    moved = Counter({str(names[place])[:60]: float(shift[place]) for place in most})
    detail = "moved most: " + ", ".join(f"{name!r} {change:+.0%}" for name, change in moved.items())
    own = pool.is_synthetic
    rows = [row for place in most if shift[place] > 0 for row in np.flatnonzero(own & (member == place)).tolist()]
    return finding_of("label", values, limits.label, detail, [pool.rows[row].id for row in rows], effect=beyond_chance(values))


def _beyond(values: F64) -> F64:
    """(B,) how many deviations of the permutations each value is above their mean."""
    return np.asarray((values - values[1:].mean()) / max(float(values[1:].std()), 1e-9))


def _chi_squared(kinds: NDArray[np.int64], members: F32) -> F64:
    """(B,) Pearson's statistic of kinds of rows by side."""
    inside, outside = _counts(kinds, members)
    share = inside.sum(1, keepdims=True) / len(kinds)
    usual = (inside + outside) * share
    return np.asarray(((inside - usual) ** 2 / np.maximum(usual * (1 - share), 1e-9)).sum(1))


def _counts(kinds: NDArray[np.int64], members: F32) -> tuple[F64, F64]:
    """((B, K), (B, K)) how many rows of each kind are members, and how many are not."""
    one_hot = np.eye(int(kinds.max()) + 1, dtype=np.float32)[kinds]
    inside = (members @ one_hot).astype(np.float64)
    return inside, one_hot.sum(0) - inside


def _variation(kinds: NDArray[np.int64], members: F32) -> tuple[F64, F64]:
    """((B,) total variation of the kinds of rows between members and others, (K,) what each kind gained as it is)."""
    inside, outside = _counts(kinds, members)
    count = inside.sum(1, keepdims=True)
    shift = inside / count - outside / (len(kinds) - count)
    return np.abs(shift).sum(1) / 2, shift[0]
