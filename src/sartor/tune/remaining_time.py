"""Seconds that a run of `tune` will still take.

Updates and evaluations are timed apart, since an evaluation may cost as much as many updates and comes a few times
only. Only what this process did gives the pace, so a run that was resumed at 40 % does not count the 40 % as done in
no time. The seconds of an evaluation before the resumption are read from the log.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sartor.tune.cost_model import FORWARD_FRACTION

# Updates after which the pace is known; the first is slower (kernels are prepared) and left out
LEAST_UPDATES = 3


class RemainingTime:
    """Clock of one process of a run.

    evaluation_tokens: tokens that one evaluation reads, from which its first is forecast.
    limit_s: limit of the budget in seconds; None without one.
    lines: log of the run up to its resumption.
    """

    def __init__(self, evaluation_tokens: float, limit_s: float | None, lines: Sequence[Mapping[str, Any]]) -> None:
        self._evaluation_tokens, self._limit_s = evaluation_tokens, limit_s
        self._evaluation_s: float | None = None
        for earlier, line in zip(lines, lines[1:], strict=False):
            if "eval_loss" in line:
                self._evaluation_s = line["wall_s"] - earlier["wall_s"]
        self._evaluated_s = 0.0  # by this process
        self._wall_s = 0.0
        # (seconds without evaluations, fraction of the budget, tokens read) after each update of this process
        self._points: list[tuple[float, float, int]] = []

    def observe_update(self, fraction: float, tokens: int, wall_s: float) -> None:
        """Record the end of an update.

        fraction: of the budget. tokens: read by the run so far. wall_s: of the run so far.
        """
        self._wall_s = wall_s
        self._points.append((wall_s - self._evaluated_s, fraction, tokens))

    def observe_evaluation(self, seconds: float) -> None:
        """Record an evaluation."""
        self._evaluated_s += seconds
        self._evaluation_s = seconds

    def seconds(self, evaluations: int) -> float | None:
        """Return the seconds that are left after the last update; None until the pace is known.

        evaluations: number of those to come.
        """
        if len(self._points) < LEAST_UPDATES:
            return None
        # the newest half: later updates read stored activations, and kernels are prepared for each new length
        (first_s, first_fraction, first_tokens) = self._points[(len(self._points) - 1) // 2]
        (last_s, last_fraction, last_tokens) = self._points[-1]
        if last_fraction <= first_fraction:
            return None
        updates_s = max(1 - last_fraction, 0.0) * (last_s - first_s) / (last_fraction - first_fraction)
        evaluation_s = self._evaluation_s
        if evaluation_s is None:
            token_s = (last_s - first_s) / max(last_tokens - first_tokens, 1)
            evaluation_s = self._evaluation_tokens * FORWARD_FRACTION * token_s
        left_s = updates_s + evaluations * evaluation_s
        if self._limit_s is not None:  # evaluations within the run use up minutes, the last one comes after them
            left_s = min(left_s, max(self._limit_s - self._wall_s, 0.0) + min(evaluations, 1) * evaluation_s)
        return max(left_s, 0.0)
