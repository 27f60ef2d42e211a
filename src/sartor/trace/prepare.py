"""Preparation of a traced adapter: sketches of all of its rows, at up to three sets of weights.

    SARTOR_HOME/trace/ADAPTER_ID/
      final/        sketches of the rows at the adapter's weights, and the second moments that preconditioned them
      state-1/      at a third of the tuning, if the run kept its factors (`trace: {features: true}`); on demand
      state-2/      at two thirds
      hidden/       what tuning changed in the hidden states of replies
      recorded/     what the run recorded while it tuned (tune/gradient_features.py)

A pass over the rows is a forward pass, and a backward pass down to the lowest sketched layer, so it takes less than an
epoch of the tuning. A killed preparation goes on with the rows that are not written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from sartor.core.errors import ConfigError, StoppedError
from sartor.core.filesystem import make_private_folder, writer_lock
from sartor.core.sketch_matrix import SketchMatrix
from sartor.trace import hidden_states
from sartor.trace.attribution import Method
from sartor.trace.methods import check_rows
from sartor.trace.retrieval_store import open_index
from sartor.trace.traced_adapter import TracedAdapter, open_traced, rows_folder
from sartor.trace.traced_model import TracedModel
from sartor.tune.gradient_features import (
    KEPT_AT,
    MOMENTS,
    WEIGHTS,
    Moments,
    read_moments,
    write_moments,
)

Notice = Callable[[str], object]
FINAL, HIDDEN = "final", "hidden"
STATES = tuple(f"state-{index + 1}" for index in range(len(KEPT_AT)))
# rows that are written at once
CHUNK_ROWS = 64
# Passes in epochs of the tuning, of which forward and backward take half each: sketches take a forward pass and two
# thirds of a backward pass; hidden states two forward passes of the lower 0.7 of the layers
_SKETCH_EPOCHS, _HIDDEN_EPOCHS = 0.85, 0.7
# rows by whose tokens an epoch's are estimated
_COUNTED_ROWS = 256


@dataclass(frozen=True)
class Preparation:
    """Result of a preparation.

    labels: sets of weights with sketches of all rows. row_bytes: bytes of a row on disk, by folder.
    """

    folder: Path
    labels: tuple[str, ...]
    rows: int
    row_bytes: dict[str, int]
    wall_s: float

    def as_json(self) -> dict[str, Any]:
        """Return the command's JSON."""
        return {
            "folder": str(self.folder),
            "prepared": list(self.labels),
            "rows": self.rows,
            "row_bytes": self.row_bytes,
            "wall_s": round(self.wall_s, 3),
        }


def prepare_trace(
    target: Path | str, *, data: Path | str | None = None, notice: Notice = lambda line: None
) -> Preparation:
    """Make what the methods retrieval and gradient need for an adapter.

    It takes two passes over all rows, also those against forgetting, of which a tuning reads few: of a small file it
    takes longer than the tuning.

    target: Adapter, Release or personal adapter. data: a Dataset whose rows are prepared, where those of the tuning
        are not here.
    Raises ArtifactError if the rows of the tuning are not here, ConfigError for an adapter that was tuned elsewhere,
    and what `prepare` raises.
    """
    traced = open_traced(target, data)
    check_rows(traced, Method.GRADIENT)
    open_index(traced, notice)
    return prepare(traced, notice=notice)


def prepare(
    traced: TracedAdapter,
    *,
    model: TracedModel | None = None,
    labels: Sequence[str] | None = None,
    notice: Notice = lambda line: None,
) -> Preparation:
    """Write the sketches of all rows; rows that an earlier call wrote are kept.

    model: of `traced`, if the caller has opened it.
    labels: by default the adapter's weights and the hidden states. The states that the run kept take as long as the
        former, each, and what the run recorded stands for the way to the weights.
    Raises ConfigError if another process prepares the same adapter, and what `TracedModel.open` raises.
    """
    started_s = time.monotonic()
    folder = rows_folder(traced)
    labels = [FINAL, HIDDEN] if labels is None else labels
    row_bytes = {}
    make_private_folder(folder)
    with writer_lock(folder / "prepare"):
        model = model or TracedModel.open(traced, notice)
        notice(_estimate(model, folder, [label for label in labels if not _is_there(traced, folder / label)]))
        for label in labels:
            if label == HIDDEN:
                matrix = _write_rows(
                    open_hidden(traced, folder, model), lambda indices: hidden_rows(model, indices), label, notice
                )
            else:
                matrix = _sketch(model, folder / label, label, notice)
            row_bytes[label] = matrix.row_bytes
        model.put(model.final)
    return Preparation(folder, tuple(labels), len(traced.rows), row_bytes, time.monotonic() - started_s)


def prepared_labels(traced: TracedAdapter, folder: Path) -> list[str]:
    """Return the sets of weights in `folder` with a sketch of every row of `traced`."""
    return [label for label in (FINAL, *STATES) if is_complete(traced, SketchMatrix.open(folder / label))]


def is_complete(traced: TracedAdapter, matrix: SketchMatrix | None) -> bool:
    """Return whether a matrix holds every row of `traced`."""
    if matrix is None:
        return False
    written = {id for id, is_written in zip(matrix.ids, matrix.written(), strict=True) if is_written}
    return written.issuperset(traced.ids)


def moments_at(model: TracedModel, folder: Path) -> Moments:
    """Return the second moments that precondition the sketches in a folder, estimated and kept if there are none.

    The model has the folder's weights. Those that the run kept at its end are taken for the final weights.
    """
    if not (folder / MOMENTS).is_file():
        moments = read_moments(folder.parent / "recorded") if folder.name == FINAL else {}
        write_moments(folder, moments or model.estimate_moments())
    return read_moments(folder)


def put_weights(model: TracedModel, folder: Path) -> None:
    """Give the model the weights of a folder; those of the adapter if it has none."""
    model.put(load_file(folder / WEIGHTS) if (folder / WEIGHTS).is_file() else model.final)


def open_hidden(traced: TracedAdapter, folder: Path, model: TracedModel) -> SketchMatrix:
    """Return the matrix of hidden states, created if absent."""
    layers = hidden_states.chosen_layers(model)
    size = len(layers) * model.model.config.get_text_config().hidden_size
    return SketchMatrix.create(folder / HIDDEN, traced.ids, size, {"layers": layers})


def hidden_rows(model: TracedModel, indices: Sequence[int]) -> Any:
    """Return the (n, K) changes of hidden states of some rows."""
    return hidden_states.changes(model, [model.row(index) for index in indices])


def _sketch(model: TracedModel, folder: Path, label: str, notice: Notice) -> SketchMatrix:
    put_weights(model, folder)
    sketcher = model.sketcher(moments_at(model, folder))
    fields = {"layout": model.layout.as_json(), "label": label}
    matrix = SketchMatrix.create(folder, model.traced.ids, model.layout.size, fields)
    return _write_rows(
        matrix, lambda indices: model.sketches([model.row(index) for index in indices], sketcher), label, notice
    )


def _write_rows(
    matrix: SketchMatrix, compute: Callable[[Sequence[int]], Any], label: str, notice: Notice
) -> SketchMatrix:
    """Compute and write the rows of a matrix that are not written yet."""
    missing = np.flatnonzero(~matrix.written()).tolist()
    if len(missing) < len(matrix.ids) and missing:
        notice(f"{label}: going on with the last {len(missing):,} of {len(matrix.ids):,} rows")
    started_s = time.monotonic()
    for start in range(0, len(missing), CHUNK_ROWS):
        chunk = missing[start : start + CHUNK_ROWS]
        if matrix.is_removed:
            raise ConfigError(
                f"{matrix.folder} was removed meanwhile, by an erasure or by hand", "type the same command again"
            )
        try:
            matrix.write(chunk, compute(chunk))
            matrix.flush()
        except KeyboardInterrupt:
            raise StoppedError(
                f"stopped; {label} has {len(matrix.ids) - len(missing) + start:,} of {len(matrix.ids):,} rows",
                "the same command goes on there",
            ) from None
        done = start + len(chunk)
        left_s = (time.monotonic() - started_s) / done * (len(missing) - done)
        notice(f"{label}: {done:,} of {len(missing):,} rows, about {left_s:,.0f} s left")
    return matrix


def _estimate(model: TracedModel, folder: Path, labels: Sequence[str]) -> str:
    """Return a line about the time that a preparation takes, by the speed of the tuning."""
    traced, count = model.traced, len(model.traced.rows)
    if not labels:
        return f"the sketches of {count:,} rows are in {folder}"
    epochs = sum(_HIDDEN_EPOCHS if label == HIDDEN else _SKETCH_EPOCHS for label in labels)
    line = f"sketches of {count:,} rows in {folder}: {', '.join(labels)}; about {epochs:.1f} passes over them"
    tokens_per_s = traced.manifest.get("run", {}).get("tokens_per_s")
    if not tokens_per_s:
        return line
    sample = range(0, count, max(count // _COUNTED_ROWS, 1))
    tokens = sum(len(sequence.tokens.ids) for index in sample for sequence in model.row(index))
    seconds = epochs * count * tokens / len(sample) / tokens_per_s
    return f"{line}, about {seconds:,.0f} s on the machine of the tuning"


def _is_there(traced: TracedAdapter, folder: Path) -> bool:
    """Return whether a folder has the sketches of all rows."""
    return is_complete(traced, SketchMatrix.open(folder))
