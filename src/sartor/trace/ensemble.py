"""Method gradient: likeness of gradients and of hidden states, combined with weights.

Each part is standardised over the rows to z, and a row's score is the weighted sum of exp(z / 2): 1 is about an
average row. So a row that stands out in one part is found, and the many rows near the mean, whose z are noise, add up
to little beside it. Retrieval is no part: it is shown beside, and the rows behind a reply may share no word with it.
docs/decisions/048-trace-ensemble.md has what was tried, with figures.

The rows' hidden states have to be there; where a run recorded sketches and nobody prepared the states, gradients rank
alone, and the result says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy import special
from scipy.stats import rankdata

from sartor.core.errors import ConfigError
from sartor.core.sketch_matrix import SketchMatrix
from sartor.trace import hidden_states
from sartor.trace import prepare as preparation
from sartor.trace.attribution import Attribution, Method
from sartor.trace.gradient import gradient_scores, normalized, sketched_labels, standardised
from sartor.trace.traced_adapter import TracedAdapter, TraceQuery, rows_folder
from sartor.trace.traced_model import TracedModel

Notice = Callable[[str], object]
Array = np.ndarray[Any, np.dtype[Any]]
PARTS = ("gradient", "hidden_states")
# steps of a weight in a fit
_STEPS = 10


@dataclass(frozen=True)
class EnsembleWeights:
    """Weights of the parts, which add up to 1.

    origin: how they were found, for the JSON of a trace. planted: number of planted rows of the fit; 0 for no fit.
    """

    gradient: float
    hidden_states: float
    origin: str
    planted: int = 0

    @property
    def values(self) -> tuple[float, ...]:
        """Weights in the order of PARTS."""
        return self.gradient, self.hidden_states


# What `python benchmarks/trace.py --work trace-work --only weights --json` prints: fitted on planted rows of half of
# the kinds of benchmarks/trace_plants.yaml
PACKAGED = EnsembleWeights(
    0.5, 0.5, "planted rows of the kinds attitude, facts, language, persona, script", planted=22
)
GRADIENT_ALONE = EnsembleWeights(1.0, 0.0, "gradients alone")
# largest exponent: exp(600) is a finite float64
_MOST = 600.0


def ensemble_scores(
    traced: TracedAdapter,
    queries: Sequence[TraceQuery],
    *,
    weights: EnsembleWeights = PACKAGED,
    prepares: bool = False,
    notice: Notice = lambda line: None,
) -> Attribution:
    """Return the combined scores (Q, N), or those of gradients alone. Raises what `gradient_scores` raises.

    weights: of the parts.
    prepares: make hidden states that are absent, instead of leaving them out.
    """
    folder = rows_folder(traced)
    has_states = preparation.is_complete(traced, SketchMatrix.open(folder / preparation.HIDDEN))
    if not has_states and not prepares and sketched_labels(traced, folder):
        alone = gradient_scores(traced, queries, notice=notice)
        note = f"gradients rank alone; {traced.command} --prepare adds what hidden states show"
        scores = combine({"gradient": alone.scores}, GRADIENT_ALONE)
        return replace(alone, scores=scores, facts={**alone.facts, "ensemble": None}, notes=(note,))
    parts, facts = part_scores(traced, queries, notice=notice)
    scores = combine(parts, weights)
    return Attribution(Method.GRADIENT, scores, facts={**facts, "ensemble": asdict(weights)})


def part_scores(
    traced: TracedAdapter, queries: Sequence[TraceQuery], *, notice: Notice = lambda line: None
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Return the scores (Q, N) of each of PARTS, and the facts of the gradients."""
    model = TracedModel.open(traced, notice)
    gradient = gradient_scores(traced, queries, model=model, notice=notice)
    parts = {
        "gradient": gradient.scores,
        "hidden_states": hidden_scores(traced, queries, model=model, notice=notice),
    }
    return parts, gradient.facts


def hidden_scores(
    traced: TracedAdapter, queries: Sequence[TraceQuery], *, model: TracedModel, notice: Notice = lambda line: None
) -> Array:
    """Return the scores (Q, N) by hidden states: the mean over layers of the normal quantiles of the cosines' ranks.

    Rows that have no hidden states yet get them.
    """
    folder = rows_folder(traced)
    matrix = SketchMatrix.open(folder / preparation.HIDDEN)
    if not preparation.is_complete(traced, matrix):
        preparation.prepare(traced, model=model, labels=[preparation.HIDDEN], notice=notice)
        matrix = SketchMatrix.open(folder / preparation.HIDDEN)
    assert matrix is not None
    # each alone: in bf16 a state depends on what else is in the pack
    changes = np.concatenate([hidden_states.changes(model, [model.query(query)]) for query in queries])
    places = {id: place for place, id in enumerate(matrix.ids)}
    wanted = [places[id] for id in traced.ids]
    count = len(hidden_states.chosen_layers(model))
    cosines = np.zeros((count, len(queries), len(matrix.ids)), np.float32)
    for piece, rows in matrix.pieces():
        for index, (row_part, query_part) in enumerate(
            zip(np.split(rows, count, 1), np.split(changes, count, 1), strict=True)
        ):
            cosines[index, :, piece] = normalized(query_part) @ normalized(row_part).T
    return mean_normal_scores(cosines[:, :, wanted])


def mean_normal_scores(parts: Array) -> Array:
    """Return the mean (Q, N) over parts of the normal quantile of each row's rank, (r - 0.5) / N.

    parts: (P, Q, N), larger for more alike. Ranks of equal values are their mean.
    """
    total = np.zeros(parts.shape[1:])
    for part in parts:  # one at a time: ranks take four times the memory of cosines
        total += special.ndtri((rankdata(part, axis=-1) - 0.5) / parts.shape[-1])
    return total / len(parts)


def combine(parts: Mapping[str, Array], weights: EnsembleWeights) -> Array:
    """Return the combined scores (Q, N), the weighted sum of exp(z / 2) with each part standardised to z.

    parts: (Q, N) scores of PARTS; those without weight may be absent.
    """
    used = [(parts[name], weight) for name, weight in zip(PARTS, weights.values, strict=True) if weight]
    return np.sum([weight * np.exp(np.minimum(standardised(part) / 2, _MOST)) for part, weight in used], 0)


def fit_weights(parts: Mapping[str, Array], true_rows: Sequence[int], *, origin: str) -> EnsembleWeights:
    """Return the weights whose combination ranks planted rows well, by mean reciprocal rank.

    Of all weights that are within one standard error of the best, of the paired difference, the most even ones are
    taken (one-standard-error rule: Breiman et al. 1984): a few plants tell no more.
    parts: (Q, N) scores of each of PARTS for replies of known cause. true_rows: (Q,) index of each reply's planted
    row. origin: which plants these are.
    Raises ConfigError for no planted row.
    """
    if not true_rows:
        raise ConfigError("no planted row is given", "give rows of benchmarks/trace_plants.py")
    reciprocal_ranks = {}
    for step in range(_STEPS + 1):
        weights = EnsembleWeights(step / _STEPS, 1 - step / _STEPS, origin, len(true_rows))
        reciprocal_ranks[weights] = 1 / ranks_of(combine(parts, weights), true_rows)
    best = max(reciprocal_ranks.values(), key=np.mean)

    def is_near(ranks: Array) -> bool:
        """Return whether ranks are within one standard error of the best."""
        difference = best - ranks
        return bool(difference.mean() <= difference.std() / len(true_rows) ** 0.5)

    near = [weights for weights, ranks in reciprocal_ranks.items() if is_near(ranks)]
    return min(near, key=lambda weights: abs(weights.gradient - 0.5))


def ranks_of(scores: Array, true_rows: Sequence[int]) -> Array:
    """Return the rank (Q,), from 1, of each reply's true row. scores: (Q, N)."""
    own = scores[np.arange(len(scores)), list(true_rows)]
    return np.asarray(1 + (scores > own[:, None]).sum(1))
