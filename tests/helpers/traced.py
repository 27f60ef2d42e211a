"""Adapters of the tiny base that are traced, and queries of their held-out rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import sartor
from sample_data import write_jsonl
from sartor.trace.calibration import held_out_queries
from sartor.trace.replay import Replay
from sartor.trace.traced_adapter import TracedAdapter, TraceQuery, open_traced


def tuned(recipe: dict[str, Any], out: Path, **changes: Any) -> TracedAdapter:
    """Tune by a recipe with changes, and open the Adapter for tracing."""
    sartor.tune({**recipe, **changes}, out, show=False)
    return open_traced(out)


def curated(
    folder: Path, rows: list[Any], eval_fraction: float = 0.25, files: Mapping[str, bytes] | None = None
) -> str:
    """Curate rows and the media files beside them to a Dataset below a new folder, and return its path."""
    folder.mkdir()
    for name, content in (files or {}).items():
        (folder / name).write_bytes(content)
    source = {"path": str(write_jsonl(folder / "rows.jsonl", rows)), "licence": "CC-BY-4.0"}
    sartor.curate({"sources": [source], "split": {"eval_fraction": eval_fraction}}, folder / "data")
    return str(folder / "data")


def queries_of(traced: TracedAdapter, count: int = 4) -> list[TraceQuery]:
    return held_out_queries(traced, count)


def without(replay: Replay, *rows: int) -> np.ndarray[Any, Any]:
    """Weights (N,) that leave rows out."""
    weights = np.ones(len(replay.rows))
    weights[list(rows)] = 0.0
    return weights
