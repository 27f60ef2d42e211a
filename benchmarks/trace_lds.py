"""Linear datamodelling score (LDS) of attribution methods, by retrains that each leave out a random tenth of the rows.

The score is that of `sartor trace --calibrate` (trace/calibration.py): of a reply, Spearman's correlation over the
retrains of the true change of its loss with the predicted change, the sum of the scores of the rows that are left out.
A row is left out by the weight 0; divisor, order and seed stay.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import defaults
import numpy as np
import parts
import smallest
import trace_methods
from numpy.typing import NDArray
from trace_setup import Size, notice, queries_of, recipe_of, set_rows, tune_traced

from sartor.evaluate.bootstrap import paired_bootstrap
from sartor.trace.calibration import leave_out_subsets, linear_datamodelling_scores
from sartor.trace.replay import Replay
from sartor.trace.traced_adapter import TracedAdapter, TraceQuery

F64 = NDArray[np.float64]
# option of recipe_of -> (its name, values); the others are CURVE_POINT's meanwhile
CURVES: dict[str, tuple[str, tuple[float, ...]]] = {
    "rate": ("learning rate", (1e-4, 5e-4, 2e-3)),
    "batch_rows": ("rows of an update", (8, 32)),
    "epochs": ("epochs", (1, 2, 3)),
}
CURVE_POINT: dict[str, Any] = {"rate": 5e-4, "batch_rows": 8, "epochs": 2}
# methods that are compared with each peer
OURS = ("unrolled", "gradient", "gradient_alone")
# a point is about 34 tunings: the retrains, and 12 to unroll five replies together
CURVE_SET, CURVE_ROWS, CURVE_RETRAINS, CURVE_QUERIES = "home-intents", 48, 20, 5


class Retrains:
    """Losses of queries by the tuning with all rows and by tunings without some. Each is a part of the call."""

    def __init__(self, label: str, traced: TracedAdapter, queries: Sequence[TraceQuery]) -> None:
        self.label, self.traced, self.queries = label, traced, queries

    @functools.cached_property
    def replay(self) -> Replay:
        """Replay of the tuning; opened by the first part that no earlier call has measured."""
        return Replay.open(self.traced, notice=notice)

    def losses(self, name: str, weights: F64 | None = None, seed: int | None = None) -> F64:
        """Return the queries' losses (Q,) in nats after a tuning with these weights (N,) of the rows."""

        def retrain() -> list[float]:
            parameters = self.replay.retrain(weights, seed=seed)
            return [float(loss) for loss in self.replay.losses(parameters, self.queries)]

        return np.asarray(parts.run(f"{self.label}: retrain {name}", retrain))


def true_changes(retrains: Retrains, left_out: Sequence[Sequence[int]]) -> F64:
    """Return the change of each query's loss (R, Q) in nats by each retrain."""
    full = retrains.losses("with all rows")
    changes = []
    for index, rows in enumerate(left_out):
        weights = np.ones(len(retrains.traced.rows))
        weights[list(rows)] = 0
        changes.append(retrains.losses(f"{index + 1} of {len(left_out)}", weights) - full)
    return np.stack(changes)


def measure(name: str, options: defaults.Options, size: Size, folder: Path, *, is_small: bool) -> dict[str, Any]:
    """Return the LDS of each method on a set, and ours less each peer's, with intervals over the queries."""
    train, held_out = set_rows(name, options, size.rows, size.queries)
    recipe = recipe_of(train, updates=size.updates, batch_rows=size.batch_rows)
    traced = tune_traced(folder / name, {name: train}, {**recipe, **size.recipe})
    queries = queries_of(traced, held_out)
    left_out = leave_out_subsets(len(traced.rows), size.retrains)
    changes = true_changes(Retrains(name, traced, queries), left_out)
    scores = _all_scores(name, {**trace_methods.OURS, **trace_methods.PEERS}, traced, queries, size.group)
    peer = {"failed": smallest.LEFT_OUT} if is_small else _bergson(name, traced, queries)
    if "scores" in peer:
        scores["bergson"] = np.asarray(peer["scores"])
    by_query = {
        method: linear_datamodelling_scores(values, left_out, changes).tolist() for method, values in scores.items()
    }
    peers = [method for method in (*trace_methods.PEER_NAMES, "bergson") if method in by_query]
    return {
        **{method: _statistics(values) for method, values in by_query.items()},
        "differences": {
            ours: {other: _difference(by_query[ours], by_query[other]) for other in peers} for ours in OURS
        },
        "slope": _slope(scores["unrolled"], changes, left_out),
        "rows": len(traced.rows),
        "updates": traced.artifact.manifest["run"]["updates"],
        "retrains": len(left_out),
        "queries": len(queries),
        "absent": {"bergson": peer["failed"]} if "failed" in peer else {},
    }


def _bergson(label: str, traced: TracedAdapter, queries: Sequence[TraceQuery]) -> dict[str, Any]:
    """Return the scores of bergson, a part of the call, or under `failed` why there are none."""
    found: dict[str, Any] = parts.run(
        f"{label}: bergson", lambda: trace_methods.bergson(traced, queries), is_final=lambda result: "scores" in result
    )
    return found


def _all_scores(
    label: str,
    scorers: Mapping[str, trace_methods.Scorer],
    traced: TracedAdapter,
    queries: Sequence[TraceQuery],
    group: int,
) -> trace_methods.Scores:
    """Return the scores of every method, `gradient` as the verb ranks; unrolling in parts of `group` queries."""
    others = {name: scorer for name, scorer in scorers.items() if name != "unrolling"}
    scores = trace_methods.scores_of(label, others, traced, queries)
    if "sketches" in scorers:
        scores = trace_methods.with_ensemble(scores)
    lines = []
    for start in range(0, len(queries), group):
        some = queries[start : start + group]
        part = f"{label}, replies {start + 1} to {start + len(some)}"
        lines.append(trace_methods.scores_of(part, {"unrolling": trace_methods.unrolled}, traced, some)["unrolled"])
    return {**scores, "unrolled": np.concatenate(lines)}


def _statistics(values: Sequence[float]) -> dict[str, Any]:
    compared = _difference(values, [0.0] * len(values))
    return {"mean": compared["estimate"], "min": min(values), **compared, "by_query": list(values)}


def _difference(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Return the mean difference of LDS with its interval, paired by query."""
    compared = paired_bootstrap(theirs, ours, [str(index) for index in range(len(ours))])
    return {"estimate": compared.difference, "low": compared.low, "high": compared.high}


def _slope(scores: F64, changes: F64, left_out: Sequence[Sequence[int]]) -> float:
    """Return the slope of true on predicted changes through 0, over all queries; 1 for exact scores in nats."""
    predicted = np.stack([scores[:, list(rows)].sum(1) for rows in left_out])
    return float((predicted * changes).sum() / max(float((predicted**2).sum()), 1e-30))


def curves(options: defaults.Options, size: Size, folder: Path, plot: Path | None) -> dict[str, Any]:
    """Return the LDS of unrolling and of gradient cosine by learning rate, batch and epochs; a plot is written too."""
    train, held_out = set_rows(CURVE_SET, options, min(size.rows, CURVE_ROWS), min(size.queries, CURVE_QUERIES))
    scorers = {"plain gradients": trace_methods.gradients}
    lines: dict[str, list[dict[str, Any]]] = {}
    for option, (_, values) in CURVES.items():
        for value in values[: size.curve_points]:
            settings = {**CURVE_POINT, option: value}
            # by what it is tuned with: a point that several lines share is computed once
            name = "-".join(f"{setting:g}" for setting in settings.values())
            label = f"curve, {name}"
            traced = tune_traced(
                folder / f"curve-{name}", {CURVE_SET: train}, {**recipe_of(train, **settings), **size.recipe}
            )
            queries = queries_of(traced, held_out)
            left_out = leave_out_subsets(len(traced.rows), min(size.retrains, CURVE_RETRAINS))
            changes = true_changes(Retrains(label, traced, queries), left_out)
            scores = _all_scores(label, scorers, traced, queries, size.group)
            points = {
                method: _statistics(linear_datamodelling_scores(matrix, left_out, changes).tolist())
                for method, matrix in scores.items()
            }
            lines.setdefault(option, []).append({"value": value, **points})
    if plot:
        write_plot(lines, plot)
    counts = {
        "rows": len(train),
        "retrains": min(size.retrains, CURVE_RETRAINS),
        "queries": len(held_out),
    }
    return {"set": CURVE_SET, **counts, "lines": lines}


def write_plot(lines: Mapping[str, Sequence[Mapping[str, Any]]], file: Path) -> None:
    """Write the curves as a picture, a panel for each axis."""
    from matplotlib.figure import Figure  # no pyplot: it keeps global state and wants a display

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    panels = figure.subplots(1, len(lines), sharey=True)
    for panel, (option, points) in zip(panels, lines.items(), strict=True):
        x = [point["value"] for point in points]
        for method in ("unrolled", "gradient_cosine"):
            panel.plot(x, [point[method]["mean"] for point in points], marker="o", label=method)
            # from the least reply to the greatest: an interval over so few of them would fill the panel
            low = [min(point[method]["by_query"]) for point in points]
            high = [max(point[method]["by_query"]) for point in points]
            panel.fill_between(x, low, high, alpha=0.2)
        panel.set(xlabel=CURVES[option][0], xscale="log", ylim=(-0.2, 1.05))
        panel.set_xticks(x, [f"{value:g}" for value in x])
        panel.minorticks_off()
    panels[0].set_ylabel("LDS: mean, least and greatest reply")
    panels[-1].legend(loc="lower left")
    figure.savefig(file)
