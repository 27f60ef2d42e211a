"""How far a router's probabilities can be trusted: risk by coverage, and calibration. All prompts carry a weight."""

from __future__ import annotations

from typing import Any

import numpy as np

from sartor.evaluate.metrics import BINS


def risk_coverage(confidence: Any, is_right: Any, weight: Any) -> tuple[Any, Any]:
    """(coverage, risk), (N,) each: of the most confident prompts up to each, their share of all and the share that is wrong.

    A foreign prompt is wrong at any place: whoever gets it is not whom it is for.
    """
    order = np.argsort(-confidence, kind="stable")
    covered = np.cumsum(weight[order])
    return covered / covered[-1], np.cumsum((weight * ~is_right)[order]) / covered


def aurc(confidence: Any, is_right: Any, weight: Any) -> float:
    """The mean risk over coverage (Geifman, Uziel and El-Yaniv 2019, arXiv:1805.08206); less is better."""
    coverage, risk = risk_coverage(confidence, is_right, weight)
    return float(np.sum(risk * np.diff(coverage, prepend=0.0)))


def ece(confidence: Any, is_right: Any, weight: Any) -> float:
    """Expected calibration error (Guo et al. 2017) in BINS equal bins of confidence."""
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gap = np.bincount(place, weight * (confidence - is_right), BINS)
    return float(np.abs(gap).sum() / weight.sum())
