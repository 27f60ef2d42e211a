"""Training log (log.jsonl), progress line and loss curve."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sartor.core.progress import ProgressBar, record_progress, whole_progress
from sartor.models import hardware


@dataclass(frozen=True)
class TrainingStep:
    """One optimiser update of a run, as `tune(..., on_step=...)` reports it.

    update: number of the update, from 1.
    fraction: of the budget, 0 to 1.
    loss: of its rows, in nats per supervised token (for preferences: of the objective).
    learning_rate: of the adapter's factors in this update.
    tokens_per_s: mean since the first update began.
    seconds_left: about, with the evaluations to come; infinite until the pace is known.
    eval_loss: of the held-out rows when they were last measured; None before that.
    """

    update: int
    fraction: float
    loss: float
    learning_rate: float
    tokens_per_s: float
    seconds_left: float
    eval_loss: float | None = None


class TrainingLog:
    """Writer of `log.jsonl` and of the progress line (stderr). Use it as a context manager.

    on_step: called after each update.
    lines, wall_s: log and seconds of a resumed run up to its checkpoint; the log and the clock continue there.
    on_line: receives each further line once it is written.
    """

    def __init__(
        self,
        file: Path,
        *,
        show: bool = True,
        on_step: OnStep | None = None,
        lines: Sequence[dict[str, Any]] = (),
        wall_s: float = 0.0,
        on_line: Callable[[Mapping[str, Any]], object] = lambda line: None,
    ) -> None:
        self._on_step = on_step
        self.lines: list[dict[str, Any]] = list(lines)
        self._on_line = on_line
        self._stream = file.open("w", encoding="utf-8")
        self._stream.writelines(json.dumps(line) + "\n" for line in self.lines)
        self._began = time.monotonic() - wall_s
        self._whole = whole_progress()
        is_shown = show and self._whole is None
        self._bar = ProgressBar("tune", "first update ...", is_shown=is_shown, is_kept=True)

    def __enter__(self) -> TrainingLog:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()
        self._stream.close()

    @property
    def wall_s(self) -> float:
        """Seconds since the run began, without the time between a kill and its resumption."""
        return time.monotonic() - self._began

    @property
    def peak_memory_bytes(self) -> int:
        """Most resident memory of any process of this run."""
        return max([hardware.peak_bytes(), *(line["memory_bytes"] for line in self.lines if "memory_bytes" in line)])

    def note(self, **facts: Any) -> None:
        """Write one JSON line with the facts and the seconds since the run began."""
        line = {"wall_s": round(self.wall_s, 3), **facts}
        self.lines.append(line)
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()
        self._on_line(line)

    def show(self, step: TrainingStep) -> None:
        """Update the progress line: loss, speed, memory, time left. Then tell the caller of the run."""
        text = f"loss {step.loss:.3f}  {step.tokens_per_s:,.0f} tokens/s  {hardware.peak_bytes() / 1e9:.1f} GB"
        self._bar.show(step.fraction, text)
        if self._whole is not None:
            self._whole.show("tune", step.fraction, text, step.seconds_left)
        else:
            record_progress("tune", step.fraction, text, step.seconds_left)
        if self._on_step is not None:
            self._on_step(step)


OnStep = Callable[[TrainingStep], object]


def plot_losses(lines: list[dict[str, Any]], file: Path) -> None:
    """Write the loss curve as PNG: every update, their running mean, and the held-out losses.

    The losses are of the own rows, without those of rehearsal.
    """
    from matplotlib.figure import Figure  # no pyplot: it keeps global state and wants a display

    updates = [(line["update"], line.get("own_loss", line["loss"])) for line in lines if "loss" in line]
    held_out = [(line["update"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    figure = Figure(figsize=(7, 3.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    x, y = [update for update, _ in updates], [loss for _, loss in updates]
    axes.plot(x, y, color="#b9c4d0", linewidth=1, label="each update")
    smooth, mean = [], y[0] if y else 0.0
    for loss in y:
        mean = 0.9 * mean + 0.1 * loss
        smooth.append(mean)
    axes.plot(x, smooth, color="#1f5f8b", linewidth=2, label="running mean")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o", color="#d1495b", label="held out")
    axes.set_xlabel("update")
    is_sft = not any("agreement" in line for line in lines)
    axes.set_ylabel("loss (nats per supervised token)" if is_sft else "loss")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file)
