"""Log of a training run (`log.jsonl`) as a page shows it, also while it is written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sartor.core.filesystem import FileSystem
from sartor.studio.jobs.job_files import modified_at, tail

TRAINING_LOG = "log.jsonl"
# points of a drawn curve
MAX_POINTS = 400
MAX_LOG_BYTES = 16 << 20


@dataclass(frozen=True)
class Losses:
    """Losses of a training run, with what else its log says.

    updates, held_out: (update, loss) of each update and of the held-out rows.
    rates: (update, learning rate). tokens: read up to the update of each point of `updates`.
    held_out_tokens: read up to each evaluation.
    fraction: of the budget; None for a log of an older Sartor. left_s: seconds left after the last update; None if
        unknown. wall_s: seconds of the run so far, without the time between a kill and its resumption.
    forecast: the run's own, as in a manifest; empty before it.
    resumed_at: updates after which it was resumed. changed_at: Unix time of the log's last line, s.
    """

    updates: Sequence[tuple[int, float]]
    held_out: Sequence[tuple[int, float]]
    tokens_per_s: float = 0.0
    memory_bytes: int = 0
    rates: Sequence[tuple[int, float]] = ()
    tokens: Sequence[int] = ()
    held_out_tokens: Sequence[int] = ()
    fraction: float | None = None
    left_s: float | None = None
    wall_s: float = 0.0
    forecast: Mapping[str, Any] = field(default_factory=dict)
    resumed_at: Sequence[int] = ()
    changed_at: float = 0.0


def log_of(adapter: Path) -> Path | None:
    """Return the log of an Adapter, finished or in work; None if there is none."""
    candidates = [adapter / TRAINING_LOG]
    candidates += [folder / TRAINING_LOG for folder in FileSystem().leftovers(adapter)]
    existing = [file for file in candidates if file.is_file()]
    return max(existing, key=lambda file: file.stat().st_mtime) if existing else None


def read_losses(file: Path) -> Losses | None:
    """Return the losses in the log of a training run; None if there are none. Damaged lines are left out."""
    updates: list[tuple[int, float]] = []
    rates: list[tuple[int, float]] = []
    tokens: list[tuple[int, float]] = []
    held_out: list[tuple[int, float]] = []
    held_out_tokens: list[int] = []
    resumed_at: list[int] = []
    read, last, wall_s = 0, dict[str, Any](), 0.0
    forecast: Mapping[str, Any] = {}
    for line in json_lines(tail(file, MAX_LOG_BYTES)):
        update = line.get("update")
        wall_s = max(wall_s, _number(line.get("wall_s")))
        if isinstance(line.get("forecast"), dict):
            forecast = line["forecast"]
        if isinstance(line.get("resumed_at"), int):
            resumed_at.append(line["resumed_at"])
        if isinstance(update, int) and isinstance(line.get("loss"), (int, float)):
            read, last = read + int(_number(line.get("tokens"))), line
            updates.append((update, float(line.get("own_loss", line["loss"]))))
            rates.append((update, _number(line.get("learning_rate"))))
            tokens.append((update, float(read)))
        elif isinstance(update, int) and isinstance(line.get("eval_loss"), (int, float)):
            held_out.append((update, float(line["eval_loss"])))
            held_out_tokens.append(read)
    if not updates:
        return None
    progress = last["progress"] if isinstance(last.get("progress"), dict) else {}
    return Losses(
        updates=_thinned(updates),
        held_out=_thinned(held_out),
        tokens_per_s=_number(last.get("tokens_per_s")),
        memory_bytes=int(_number(last.get("memory_bytes"))),
        rates=_thinned(rates),
        tokens=[int(value) for _, value in _thinned(tokens)],
        held_out_tokens=held_out_tokens[:MAX_POINTS],
        fraction=_number(progress["fraction"]) if "fraction" in progress else None,
        left_s=_number(progress["left_s"]) if isinstance(progress.get("left_s"), (int, float)) else None,
        wall_s=wall_s,
        forecast=forecast,
        resumed_at=resumed_at,
        changed_at=modified_at(file),
    )


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return at most MAX_POINTS points, each the mean of its neighbours."""
    if len(points) <= MAX_POINTS:
        return points
    result = []
    for index in range(MAX_POINTS):
        part = points[len(points) * index // MAX_POINTS : len(points) * (index + 1) // MAX_POINTS]
        result.append((part[-1][0], sum(value for _, value in part) / len(part)))
    return result


def json_lines(text: str) -> list[dict[str, Any]]:
    """Return the JSON objects among lines of text; the first may be cut, the last unfinished."""
    result = []
    for line in text.splitlines():
        with suppress(ValueError, RecursionError):
            value = json.loads(line)
            if isinstance(value, dict):
                result.append(value)
    return result
