"""Planted rows of trace.py: how well methods find them, and proof and truth about suspicions.

Every plant that counts (trace_plants.py) is asked once. Its rank among the rows is that of the better of its two rows.
`gradient` is what the verb does, by the packaged weights; `fit_packaged` fits them on the kinds that are not scored.
`gradient_fitted` is the same with weights fitted in this call, and `swapped` the other half of the kinds, with weights
fitted on the first. `cross_fitted` has plants of both halves, each ranked with weights fitted on the half that it is
not of.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import parts
import trace_methods
import trace_plants
from numpy.typing import NDArray
from trace_lds import Retrains
from trace_plants import Plant
from trace_setup import Row, Size, chat_row, notice, queries_of, recipe_of, row_indices, tune_traced

from sartor.trace.ensemble import PACKAGED, PARTS, EnsembleWeights, combine, fit_weights
from sartor.trace.traced_adapter import TracedAdapter, TraceQuery

F64 = NDArray[np.float64]
# of the tuning on the rows with plants
RATE = 1e-3
# replies by unrolling among all the rows
FEW_UNROLLED = 2


@dataclass(frozen=True)
class PlantedSet:
    """An adapter tuned on rows with plants, and the plants that count.

    reasons: why a plant does not count, by name. found: effects of those whose wording is closed.
    """

    traced: TracedAdapter
    counted: list[Plant]
    reasons: dict[str, str]
    found: dict[str, dict[str, Any]]

    def queries(self, plants: Sequence[Plant]) -> list[TraceQuery]:
        """Return the replies that are asked."""
        return queries_of(self.traced, asked(plants))

    def scored(self, size: Size, *, is_swapped: bool = False) -> list[Plant]:
        """Return the plants of the kinds that are scored, or with `is_swapped` those of the other kinds."""
        kinds = trace_plants.scored_kinds()
        if is_swapped:
            kinds = sorted({plant.kind for plant in self.counted} - set(kinds))
        return trace_plants.choose_scored(self.counted, kinds, size.plants)

    def of_all_kinds(self, size: Size) -> list[Plant]:
        """Return the plants that are scored where no weights are fitted, or on the kinds of other plants."""
        return trace_plants.choose_scored(self.counted, sorted({plant.kind for plant in self.counted}), size.plants)


def counted_plants(size: Size, folder: Path, earlier: Path | None) -> list[Plant]:
    """Return the plants that count: those of an earlier results file, or measured."""
    return counted_earlier(size, earlier) if earlier else make_planted(size, folder).counted


def counted_earlier(size: Size, earlier: Path) -> list[Plant]:
    """Return the plants that count by an earlier results file."""
    found = json.loads(earlier.read_text(encoding="utf-8"))["result"]["planted"]
    names = found["effects"].keys() - found["discarded"].keys()
    return [plant for plant in trace_plants.read_plants(size.asked_plants) if plant.name in names]


def asked(plants: Sequence[Plant]) -> list[Row]:
    """Return the pairs that are asked as rows."""
    return [chat_row(plant.prompt, plant.reply) for plant in plants]


def make_planted(size: Size, folder: Path, earlier: Path | None = None) -> PlantedSet:
    """Return the planted set, checked: the wording by words, the effects by retrains. A part of the call each.

    earlier: results file that says which plants count; nothing is retrained then.
    """
    plants = trace_plants.read_plants(size.asked_plants)
    reasons = parts.run("plants: wording", lambda: trace_plants.split_closed(plants, size)[1])
    closed = [plant for plant in plants if plant.name not in reasons]
    sources = trace_plants.planted_rows(size.planted_rows, closed)
    traced = tune_planted(folder / "planted", sources, size)
    if earlier:
        return PlantedSet(traced, counted_earlier(size, earlier), reasons, {})
    found = measure_effects("plants", traced, closed, size)
    for name, facts in found.items():
        if not facts["counts"]:
            reasons[name] = f"without it {facts['effect']:+.2f} nats, without others up to {facts['placebo']:+.2f}"
    counted = [plant for plant in closed if found[plant.name]["counts"]]
    notice(f"{len(plants)} plants: {len(closed)} of closed wording, {len(counted)} of them with an effect")
    return PlantedSet(traced, counted, reasons, found)


def measure_effects(
    label: str, traced: TracedAdapter, plants: Sequence[Plant], size: Size
) -> dict[str, dict[str, Any]]:
    """Return the effect of each plant by name, by retrains that each leave out a plant of every kind."""
    retrains = Retrains(label, traced, queries_of(traced, asked(plants)))
    full = retrains.losses("with all rows")
    weights = trace_plants.left_out_weights(plants, row_indices(traced), len(traced.rows))
    rounds = [retrains.losses(f"without a plant of each kind, {index + 1}", row) for index, row in enumerate(weights)]
    return trace_plants.effects(plants, full, rounds, size.min_effect)


def tune_planted(folder: Path, sources: dict[str, list[Row]], size: Size) -> TracedAdapter:
    """Return the adapter tuned on rows with plants, an epoch."""
    rows = [row for part in sources.values() for row in part]
    recipe = recipe_of(rows, epochs=1, rate=RATE, batch_rows=2 * size.batch_rows)
    return tune_traced(folder, sources, {**recipe, **size.recipe})


def measure(size: Size, folder: Path) -> dict[str, Any]:
    """Return the counts of each method but unrolling."""
    planted = make_planted(size, folder)
    traced, queries = planted.traced, planted.queries(planted.counted)
    scorers = {**trace_methods.SKETCHES, **trace_methods.PEERS}
    scores = trace_methods.scores_of("plants", scorers, traced, queries)
    seconds = parts.run("plants: seconds of a reply", lambda: _seconds(traced, queries[:1]))
    return {
        **_counts(planted, scores, size),
        "swapped": _counts(planted, scores, size, is_swapped=True),
        "cross_fitted": _cross_fitted(planted, scores, size),
        "gradient_seconds": seconds,
        "rows": len(traced.rows),
        "kinds": trace_plants.scored_kinds(),
        "tried": len(planted.found.keys() | planted.reasons.keys()),
        "closed": len(planted.found),
        "counted": len(planted.counted),
        "discarded": planted.reasons,
        "effects": {name: facts["effect"] for name, facts in planted.found.items()},
    }


def measure_unrolled(size: Size, folder: Path, earlier: Path | None) -> dict[str, Any]:
    """Return the counts of unrolling on few rows, and for two replies among all.

    Few rows are few updates, after which not every plant has an effect: `few_rows` has the effects too, by retrains,
    and under `causes` the counts of the plants that have one.

    earlier: results file that says which plants count.
    """
    planted = make_planted(size, folder, earlier)
    plants = planted.of_all_kinds(size)
    few = tune_planted(folder / "few", trace_plants.planted_rows(size.few_rows, plants), size)
    few_rows = _unrolled(few, plants, "few rows", size.group)
    found = measure_effects("few rows", few, plants, size)
    causes = [rank for rank, name in zip(few_rows["ranks"], few_rows["plants"], strict=True) if found[name]["counts"]]
    effects = {name: facts["effect"] for name, facts in found.items()}
    return {
        "few_rows": {**few_rows, "causes": trace_plants.summary(causes), "effects": effects},
        "all_rows": _unrolled(planted.traced, plants[:FEW_UNROLLED], "all rows", size.group),
    }


def _seconds(traced: TracedAdapter, queries: Sequence[TraceQuery]) -> float:
    """Return the seconds of the gradient method for these replies; the sketches of the rows are there."""
    started = time.monotonic()
    trace_methods.sketched(traced, queries)
    return time.monotonic() - started


def _counts(
    planted: PlantedSet, scores: trace_methods.Scores, size: Size, *, is_swapped: bool = False
) -> dict[str, dict[str, Any]]:
    """Return the counts of each method for the scored plants. scores: (Q, N) of all plants that count."""
    indices = row_indices(planted.traced)
    scored, fitted = planted.scored(size, is_swapped=is_swapped), planted.scored(size, is_swapped=not is_swapped)
    places = {plant.name: place for place, plant in enumerate(planted.counted)}
    weights = _fit(scores, [places[plant.name] for plant in fitted], fitted, indices)
    # packaged weights are fitted on the kinds that `swapped` scores
    methods = trace_methods.with_ensemble(scores) | {"gradient_fitted": combine(scores, weights)}
    if is_swapped:
        methods["gradient"] = methods.pop("gradient_fitted")
    result: dict[str, dict[str, Any]] = {}
    for name, matrix in methods.items():
        ranks = trace_plants.plant_ranks(matrix[[places[plant.name] for plant in scored]], scored, indices)
        result[name] = {**trace_plants.summary(ranks), "by_kind": trace_plants.by_kind(scored, ranks), "ranks": ranks}
    result["gradient" if is_swapped else "gradient_fitted"]["weights"] = asdict(weights)
    result["gradient"].setdefault("weights", asdict(PACKAGED))
    return result


def _cross_fitted(planted: PlantedSet, scores: trace_methods.Scores, size: Size) -> dict[str, Any]:
    """Return the counts for plants of all kinds, each by weights that were fitted on the other half of the kinds."""
    indices = row_indices(planted.traced)
    half = trace_plants.scored_kinds()
    places = {plant.name: place for place, plant in enumerate(planted.counted)}
    chosen = planted.of_all_kinds(size)
    ranks = []
    for plant in chosen:
        others = [other for other in planted.counted if (other.kind in half) != (plant.kind in half)]
        weights = _fit(scores, [places[other.name] for other in others], others, indices)
        of_plant = {name: scores[name][[places[plant.name]]] for name in PARTS}
        ranks += trace_plants.plant_ranks(combine(of_plant, weights), [plant], indices)
    by_kind = trace_plants.by_kind(chosen, ranks)
    return {
        **trace_plants.summary(ranks),
        "by_kind": by_kind,
        "ranks": ranks,
        "plants": [plant.name for plant in chosen],
    }


def fit_packaged(size: Size, folder: Path) -> EnsembleWeights:
    """Return weights fitted on the plants that count of the kinds that are not scored, for trace/ensemble.py."""
    planted = make_planted(size, folder)
    queries = planted.queries(planted.counted)
    scores = trace_methods.scores_of("plants", trace_methods.SKETCHES, planted.traced, queries)
    fitted = planted.scored(size, is_swapped=True)
    places = {plant.name: place for place, plant in enumerate(planted.counted)}
    return _fit(scores, [places[plant.name] for plant in fitted], fitted, row_indices(planted.traced))


def _fit(
    scores: trace_methods.Scores,
    places: Sequence[int],
    plants: Sequence[Plant],
    indices: dict[tuple[str, str], int],
) -> EnsembleWeights:
    """Return the weights that rank these plants best. places: of each plant's reply in the scores (Q, N)."""
    # each of a plant's rows is a cause of its reply
    pairs = [(place, indices[pair]) for place, plant in zip(places, plants, strict=True) for pair in plant.rows]
    ours = {name: scores[name][[place for place, _ in pairs]] for name in PARTS}
    kinds = sorted({plant.kind for plant in plants})
    return fit_weights(ours, [row for _, row in pairs], origin=f"planted rows of the kinds {', '.join(kinds)}")


def _unrolled(traced: TracedAdapter, plants: Sequence[Plant], label: str, group: int) -> dict[str, Any]:
    """Return the counts of unrolling, a part of the call for each `group` of replies, which share a replay."""
    lines, queries = [], queries_of(traced, asked(plants))
    for start in range(0, len(plants), group):
        part = f"plants, {label}, {', '.join(plant.name for plant in plants[start : start + group])}"
        some = queries[start : start + group]
        lines.append(trace_methods.scores_of(part, {"unrolling": trace_methods.unrolled}, traced, some)["unrolled"])
    ranks = trace_plants.plant_ranks(np.concatenate(lines), plants, row_indices(traced))
    names = [plant.name for plant in plants]
    return {**trace_plants.summary(ranks), "rows": len(traced.rows), "ranks": ranks, "plants": names}
