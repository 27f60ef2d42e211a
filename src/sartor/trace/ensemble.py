"""The method gradient: gradients, hidden states and retrieval, combined with weights.

Each part ranks all rows. The combination is the mean of the ranks' normal quantiles by the weights PACKAGED.

The rows' hidden states have to be there; where a run recorded sketches and nobody prepared the states, gradients rank
alone, and the result says so.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from sartor.core.errors import ConfigError
from sartor.core.sketch_matrix import SketchMatrix
from sartor.trace import hidden_states
from sartor.trace import prepare as preparation
from sartor.trace.attribution import Attribution, Method
from sartor.trace.gradient import gradient_scores, mean_normal_scores, normalized, sketched_labels
from sartor.trace.retrieval_store import retrieval_scores
from sartor.trace.traced_adapter import TracedAdapter, TraceQuery, rows_folder
from sartor.trace.traced_model import TracedModel

Notice = Callable[[str], object]
Array = np.ndarray[Any, np.dtype[Any]]
PARTS = ("gradient", "hidden_states", "retrieval")
# steps of a weight in a fit
_STEPS = 10


@dataclass(frozen=True)
class EnsembleWeights:
    """Weights of the parts, which add up to 1.

    origin: how they were found, for the JSON of a trace. planted: number of planted rows of the fit; 0 for no fit.
    """

    gradient: float
    hidden_states: float
    retrieval: float
    origin: str
    planted: int = 0

    @property
    def values(self) -> tuple[float, ...]:
        """Weights in the order of PARTS."""
        return self.gradient, self.hidden_states, self.retrieval


# Equal until they are fitted on planted rows of half of the kinds of benchmarks/trace_plants.yaml, which
# `python benchmarks/trace.py --work trace-work --only weights --json` prints.
PACKAGED = EnsembleWeights(1 / 3, 1 / 3, 1 / 3, "equal: not fitted on planted rows")


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
        note = f"gradients rank alone; sartor trace {traced.artifact.path} --prepare adds what hidden states show"
        return replace(alone, facts={**alone.facts, "ensemble": None}, notes=(note,))
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
        "retrieval": retrieval_scores(traced, queries).scores,
    }
    return parts, gradient.facts


def hidden_scores(
    traced: TracedAdapter, queries: Sequence[TraceQuery], *, model: TracedModel, notice: Notice = lambda line: None
) -> Array:
    """Return the scores (Q, N) by hidden states: mean normal quantile of the cosines' ranks at both layers.

    Rows that have no hidden states yet get them.
    """
    folder = rows_folder(traced)
    matrix = SketchMatrix.open(folder / preparation.HIDDEN)
    if not preparation.is_complete(traced, matrix):
        preparation.prepare(traced, model=model, labels=[preparation.HIDDEN], notice=notice)
        matrix = SketchMatrix.open(folder / preparation.HIDDEN)
    assert matrix is not None
    changes = hidden_states.changes(model, [model.query(query) for query in queries])
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


def combine(parts: Mapping[str, Array], weights: EnsembleWeights) -> Array:
    """Return the weighted mean (Q, N) of the parts' normal quantiles. parts: (Q, N) scores of each of PARTS."""
    scaled = [
        weight * mean_normal_scores(parts[name][None]) for name, weight in zip(PARTS, weights.values, strict=True)
    ]
    return np.asarray(np.sum(scaled, 0))


def fit_weights(parts: Mapping[str, Array], true_rows: Sequence[int], *, origin: str) -> EnsembleWeights:
    """Return the weights whose combination ranks planted rows best, by mean reciprocal rank.

    parts: (Q, N) scores of each of PARTS for replies of known cause. true_rows: (Q,) index of each reply's planted
    row. origin: which plants these are. Of equally good weights the most even ones are taken.
    Raises ConfigError for no planted row.
    """
    if not true_rows:
        raise ConfigError("no planted row is given", "give rows of benchmarks/trace_plants.py")
    best: tuple[float, float, EnsembleWeights] | None = None
    for steps in itertools.product(range(_STEPS + 1), repeat=len(PARTS)):
        if sum(steps) != _STEPS:
            continue
        gradient, hidden, retrieval = shares = [step / _STEPS for step in steps]
        weights = EnsembleWeights(gradient, hidden, retrieval, origin, len(true_rows))
        ranks = ranks_of(combine(parts, weights), true_rows)
        quality = float(np.mean(1 / ranks))
        evenness = -max(shares)
        if best is None or (quality, evenness) > best[:2]:
            best = quality, evenness, weights
    assert best is not None
    return best[2]


def ranks_of(scores: Array, true_rows: Sequence[int]) -> Array:
    """Return the rank (Q,), from 1, of each reply's true row. scores: (Q, N)."""
    own = scores[np.arange(len(scores)), list(true_rows)]
    return np.asarray(1 + (scores > own[:, None]).sum(1))
