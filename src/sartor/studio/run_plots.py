"""Curves of tunings as SVG: the learning rate of one run, the losses of several in one plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sartor.studio.jobs.training_logs import Losses

WIDTH, HEIGHT, RATE_HEIGHT = 700, 240, 60
# weight of the past in the running mean of losses, which are noisy
_PAST = 0.9


@dataclass(frozen=True)
class RateCurve:
    """Learning rate of a run. points: of a polyline. peak: largest rate."""

    points: str
    peak: float


@dataclass(frozen=True)
class ComparedCurves:
    """Losses of several runs over the tokens that they had read.

    points: of each run, for a polyline. dots: held-out losses of each run.
    low, high: losses at the lower and upper end. tokens: at the right end.
    """

    points: Sequence[str]
    dots: Sequence[Sequence[tuple[float, float]]]
    low: float
    high: float
    tokens: int


def draw_rates(losses: Losses | None) -> RateCurve | None:
    """Return the curve of the learning rate; None without two updates."""
    if losses is None or len(losses.rates) < 2:
        return None
    peak = max(rate for _, rate in losses.rates)
    if not peak:  # a log that does not state it
        return None
    first, last = losses.rates[0][0], losses.rates[-1][0]
    points = []
    for update, rate in losses.rates:
        x = (update - first) / max(last - first, 1) * WIDTH
        points.append(f"{x:.1f},{RATE_HEIGHT - rate / max(peak, 1e-30) * RATE_HEIGHT:.1f}")
    return RateCurve(" ".join(points), peak)


def draw_compared(runs: Sequence[Losses]) -> ComparedCurves | None:
    """Return the losses of runs in one plot, each as its running mean; None if none has two updates."""
    means = [_running_means([loss for _, loss in losses.updates]) for losses in runs]
    values = [value for mean in means if len(mean) > 1 for value in mean]
    if not values:
        return None
    values += [loss for losses in runs for _, loss in losses.held_out]
    low, high = min(values), max(values)
    tokens = max(losses.tokens[-1] for losses in runs if losses.tokens)

    def place(read: int, loss: float) -> tuple[float, float]:
        x = read / max(tokens, 1) * WIDTH
        return round(x, 1), round(HEIGHT - (loss - low) / max(high - low, 1e-9) * HEIGHT, 1)

    points, dots = [], []
    for losses, mean in zip(runs, means, strict=True):
        placed = [place(read, loss) for read, loss in zip(losses.tokens, mean, strict=True)]
        points.append(" ".join(f"{x},{y}" for x, y in placed))
        evaluations = zip(losses.held_out_tokens, losses.held_out, strict=False)
        dots.append([place(read, loss) for read, (_, loss) in evaluations])
    return ComparedCurves(points, dots, low, high, tokens)


def _running_means(losses: Sequence[float]) -> list[float]:
    """Return the running mean at each loss: m = 0.9 m + 0.1 l, begun with the first."""
    means: list[float] = []
    for loss in losses:
        means.append(loss if not means else _PAST * means[-1] + (1 - _PAST) * loss)
    return means
