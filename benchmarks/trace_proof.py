"""Proof of trace.py: verdicts of `sartor ablate` on true and false suspicions, against the truth by other seeds.

On few rows with all plants that count. A true suspicion is the two rows of a plant for its reply. A false one, for the
reply of another plant, is two rows that have nothing to do with it: in every other case the nearest by BM25, else
random rows of the plant's own source. The truth is the rise of the reply's loss without the suspects, by retrains with
two other seeds: a suspicion is true if it is at least `clear_effect` nats in both, which a verdict by `controls` sets
sees with the chance 0.8 (`ablation_proof.py`), and false if it is less than `min_effect` in both, below which no row
is said to matter. Suspicions of which the seeds say neither, or other than was meant, are named and do not count; as
many are tried as it takes.

Sixteen rows an update make 12 updates. Four make 50, with which a plant moves its reply more, and so do control rows:
their effects had a standard deviation of 0.4 to 0.5 nats there and of 0.05 here, where a plant moves its reply by 0.1
to 1.4 nats. So a verdict sees smaller effects after fewer updates.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import parts
import trace_methods
import trace_plants
from trace_lds import Retrains
from trace_planted import RATE, asked
from trace_plants import Plant
from trace_setup import Size, notice, queries_of, recipe_of, row_indices, tune_traced

import sartor
from sartor.trace.ablation import ablate
from sartor.trace.ablation_proof import Verdict
from sartor.trace.traced_adapter import TracedAdapter


@dataclass(frozen=True)
class Suspicion:
    """Rows that are suspected of a plant's reply. kind: true, nearest or random."""

    plant: Plant
    rows: tuple[int, ...]
    kind: str

    @property
    def name(self) -> str:
        """Name of the case."""
        return f"{self.plant.name}, {self.kind}"


def true_suspicions(traced: TracedAdapter, plants: Sequence[Plant]) -> list[Suspicion]:
    """Return a true suspicion of each plant."""
    indices = row_indices(traced)
    return [Suspicion(plant, tuple(indices[pair] for pair in plant.rows), "true") for plant in plants]


def false_suspicions(traced: TracedAdapter, plants: Sequence[Plant]) -> list[Suspicion]:
    """Return a false suspicion of each plant."""
    indices = row_indices(traced)
    planted = {indices[pair] for plant in plants for pair in plant.rows}
    nearest = trace_methods.bm25(traced, queries_of(traced, asked(plants)))["bm25"]
    result = []
    for number, plant in enumerate(plants):
        order = [int(row) for row in np.argsort(-nearest[number]) if row not in planted]
        if number % 2:
            source = traced.rows[indices[plant.rows[0]]].example.origins[0].source
            order = [row for row in order if traced.rows[row].example.origins[0].source == source]
            random.Random(number).shuffle(order)
        result.append(Suspicion(plant, tuple(order[: len(plant.rows)]), "random" if number % 2 else "nearest"))
    return result


def measure(counted: Sequence[Plant], size: Size, folder: Path) -> dict[str, Any]:
    """Return how many verdicts are right, of true and of false suspicions; each case is a part of the call.

    counted: the plants that count.
    """
    scored = trace_plants.choose_scored(counted, trace_plants.scored_kinds(), size.plants)
    plants = [*scored, *(plant for plant in counted if plant not in scored)]
    sources = trace_plants.planted_rows(size.few_rows, plants)
    rows = [row for part in sources.values() for row in part]
    recipe = recipe_of(rows, epochs=1, rate=RATE, batch_rows=2 * size.batch_rows)
    traced = tune_traced(folder / "proof", sources, {**recipe, **size.recipe})
    if not (folder / "keys").is_dir():
        sartor.keygen(folder / "keys", purposes=("proof",))
    retrains = Retrains("proof", traced, queries_of(traced, asked(plants)))
    kinds = {"true": true_suspicions(traced, plants), "false": false_suspicions(traced, plants)}
    counts = {kind: {"right": 0, "of": 0} for kind in kinds}
    unclear, listed = {}, []
    for kind, cases in kinds.items():
        for case in cases:
            if counts[kind]["of"] == size.suspicions:
                break
            truth = true_effects(retrains, case, plants.index(case.plant), size)
            is_true, is_false = min(truth) >= size.clear_effect, max(truth) < size.min_effect
            if not (is_true if kind == "true" else is_false):
                unclear[case.name] = truth
                continue
            proof = parts.run(f"proof: {case.name}", lambda case=case: _proof(traced, case, size, folder))
            counts[kind]["of"] += 1
            counts[kind]["right"] += proof["verdict"] == (Verdict.PROVEN if is_true else Verdict.NOT_PROVEN)
            listed.append({"case": case.name, "verdict": proof["verdict"], "effect": proof["effect"], "truth": truth})
    notice(f"proof: {counts}, {len(unclear)} unclear")
    return {**counts, "unclear": unclear, "cases": listed, "rows": len(traced.rows), "controls": size.controls}


def true_effects(retrains: Retrains, case: Suspicion, query: int, size: Size) -> list[float]:
    """Return the rise of a reply's loss without the suspects, in nats, by each seed of the truth."""
    weights = np.ones(len(retrains.traced.rows))
    weights[list(case.rows)] = 0
    effects = []
    for seed in size.truth_seeds:
        full = retrains.losses(f"with all rows, seed {seed}", seed=seed)
        without = retrains.losses(f"{case.name}, seed {seed}", weights, seed)
        effects.append(float(without[query] - full[query]))
    return effects


def _proof(traced: TracedAdapter, case: Suspicion, size: Size, folder: Path) -> dict[str, Any]:
    """Return verdict and effect of `sartor ablate` on a suspicion."""
    name = case.name.replace(", ", "-")
    proof = ablate(
        traced.artifact.path,
        [traced.rows[row].example.id for row in case.rows],
        prompt=case.plant.prompt,
        reply=case.plant.reply,
        out=folder / f"proof-{name}",
        key=folder / "keys",
        controls=size.controls,
        notice=notice,
    ).as_json()
    return {"verdict": proof["verdict"], "effect": proof["effect"]}
