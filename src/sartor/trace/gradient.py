"""Scores of rows by the likeness of their gradient to that of a reply.

At each set of weights and in each layer, a row's score is the cosine of its sketch and the reply's, in the metric of
AdamW's second moment (tune/gradient_features.py). Of a cosine, long rows and rows of high loss have no more than
others. The cosines of a layer are standardised over the rows before layers and weights are averaged, since a few
layers of large cosines would otherwise decide alone. Ranks in place of standardised cosines lose how far a row stands
out, and predict the effect of leaving rows out worse (docs/decisions/048-trace-ensemble.md).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sartor.core.errors import ArtifactError, ConfigError
from sartor.core.sketch_matrix import SketchMatrix
from sartor.trace import prepare as preparation
from sartor.trace.attribution import Attribution, Method
from sartor.trace.traced_adapter import TracedAdapter, TraceQuery, rows_folder
from sartor.trace.traced_model import TracedModel
from sartor.tune.gradient_features import MOMENTS, RECORDED, read_moments

Notice = Callable[[str], object]
Array = np.ndarray[Any, np.dtype[Any]]
# rows whose sketches are made unasked where none are there
MAX_UNPREPARED_ROWS = 2_000
# queries whose cosines are in memory at once
_QUERIES_AT_ONCE = 16


def gradient_scores(
    traced: TracedAdapter,
    queries: Sequence[TraceQuery],
    *,
    model: TracedModel | None = None,
    notice: Notice = lambda line: None,
) -> Attribution:
    """Return the scores (Q, N) of rows: the mean over layers and weights of standardised cosines.

    Sketches that were prepared or recorded are read. Without any, those at the adapter's weights are made and kept.
    model: of `traced`, if the caller has opened it.
    Raises ConfigError if there are none and the rows are more than MAX_UNPREPARED_ROWS, or if a reply is longer than
    the base's context; SourceError for a reply that the template refuses; and what `TracedModel.open` raises.
    """
    folder = rows_folder(traced)
    labels = sketched_labels(traced, folder)
    if not labels and len(traced.rows) > MAX_UNPREPARED_ROWS:
        raise ConfigError(
            f"{len(traced.rows):,} rows of {traced.artifact.path} have no sketches; up to {MAX_UNPREPARED_ROWS:,} are "
            "made at once",
            f"{traced.command} --prepare",
        )
    model = model or TracedModel.open(traced, notice)
    labels = [label for label in labels if has_layout(folder / label, model)]
    if not labels:
        labels = [preparation.FINAL]
        preparation.prepare(traced, model=model, labels=labels, notice=notice)
    sketches = {label: _query_sketches(model, folder / label, queries) for label in labels}
    scores = np.zeros((len(queries), len(traced.rows)))
    for start in range(0, len(queries), _QUERIES_AT_ONCE):
        some = slice(start, start + _QUERIES_AT_ONCE)
        parts = [layer_cosines(traced, folder / label, values[some], model) for label, values in sketches.items()]
        for cosines in itertools.chain.from_iterable(parts):  # a layer at a time: the memory of one more
            scores[some] += standardised(cosines)
        scores[some] /= sum(map(len, parts))
    facts = {"sketches": labels, "row_bytes": preparation_bytes(folder, labels)}
    return Attribution(Method.GRADIENT, scores, facts=facts)


def sketched_labels(traced: TracedAdapter, folder: Path) -> list[str]:
    """Return the sets of weights with a sketch of every row: the prepared ones, and what the run recorded."""
    labels = preparation.prepared_labels(traced, folder)
    if preparation.is_complete(traced, SketchMatrix.open(folder / RECORDED)):
        labels.append(RECORDED)
    return labels


def has_layout(folder: Path, model: TracedModel) -> bool:
    """Return whether the sketches in a folder are those that this version makes of the model's factors."""
    matrix = SketchMatrix.open(folder)
    layout = model.layout.as_json()
    return matrix is not None and matrix.header.get("layout") == {
        "seed": layout["seed"],
        "factors": [[name, list(shape), list(size)] for name, shape, size in layout["factors"]],
    }


def preparation_bytes(folder: Path, labels: Sequence[str]) -> dict[str, int]:
    """Return the bytes of a row on disk for each set of weights."""
    matrices = {label: SketchMatrix.open(folder / label) for label in labels}
    return {label: matrix.row_bytes for label, matrix in matrices.items() if matrix is not None}


def _query_sketches(model: TracedModel, folder: Path, queries: Sequence[TraceQuery]) -> Array:
    """Return the sketches (Q, K) of the replies' gradients at the weights of a folder."""
    preparation.put_weights(model, folder)
    file = folder / MOMENTS
    if not file.is_file() and folder.name != RECORDED:  # rows were preconditioned by them, and replies would not be
        raise ArtifactError(f"{file} is gone", f"rm -r {folder}; the sketches are computed again")
    sketcher = model.sketcher(read_moments(folder))
    sketches = model.sketches([model.query(query) for query in queries], sketcher)
    model.put(model.final)
    return sketches


def layer_cosines(traced: TracedAdapter, folder: Path, sketches: Array, model: TracedModel) -> Array:
    """Return the cosines (L, Q, N) of replies and rows in each layer.

    sketches: (Q, K) of the replies. A row or reply without a gradient in a layer has the cosine 0 there.
    """
    matrix = SketchMatrix.open(folder)
    assert matrix is not None
    layers = list(model.layout.layers.values())
    # the matrix may have other rows beside those of `traced`, in another order
    places = {id: place for place, id in enumerate(matrix.ids)}
    wanted = np.array([places[id] for id in traced.ids])
    cosines = np.zeros((len(layers), len(sketches), len(matrix.ids)), np.float32)
    for piece, rows in matrix.pieces():
        for index, layer in enumerate(layers):
            cosines[index, :, piece] = normalized(sketches[:, layer]) @ normalized(rows[:, layer]).T
    return cosines[:, :, wanted]


def normalized(vectors: Array) -> Array:
    """Return (n, K) vectors of length 1; zeros stay zeros."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, np.finfo(np.float32).tiny))


def standardised(scores: Array) -> Array:
    """Return scores (..., N) less their mean over the N rows, over their standard deviation; zeros for equal ones."""
    deviations = scores.std(-1, keepdims=True)
    return np.asarray((scores - scores.mean(-1, keepdims=True)) / np.where(deviations > 0, deviations, 1.0))
