"""Proof of trace.py: verdicts of `sartor ablate` on true and false suspicions, against the truth by other seeds.

On few rows with plants. A true suspicion is the two rows of a plant for its reply. A false one, for the reply of
another plant, is two rows that have nothing to do with it: in every other case the nearest by BM25, else random rows
of the plant's own source. The truth is the rise of the reply's loss without the suspects, by retrains with two other
seeds: a suspicion is true if it is at least `min_effect` nats in both, false if it is less in both. A case in which
the seeds disagree, or say other than was meant, is named and does not count.
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
from trace_lds import Retrains
from trace_planted import PlantedSet, asked, make_few
from trace_plants import Plant
from trace_setup import Size, notice, queries_of, row_indices

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


def suspicions_of(traced: TracedAdapter, plants: Sequence[Plant], size: Size) -> list[Suspicion]:
    """Return true suspicions, then false ones, of different plants where there are enough."""
    indices = row_indices(traced)
    planted = {indices[pair] for plant in plants for pair in plant.rows}
    nearest = trace_methods.bm25(traced, queries_of(traced, asked(plants)))["bm25"]
    result = []
    for plant in plants[: size.suspicions]:
        result.append(Suspicion(plant, tuple(indices[pair] for pair in plant.rows), "true"))
    for number, plant in enumerate(plants[::-1][: size.suspicions]):
        order = [int(row) for row in np.argsort(-nearest[plants.index(plant)]) if row not in planted]
        if number % 2:
            source = traced.rows[indices[plant.rows[0]]].example.origins[0].source
            order = [row for row in order if traced.rows[row].example.origins[0].source == source]
            random.Random(number).shuffle(order)
        result.append(Suspicion(plant, tuple(order[: len(plant.rows)]), "random" if number % 2 else "nearest"))
    return result


def measure(planted: PlantedSet, size: Size, folder: Path) -> dict[str, Any]:
    """Return how many verdicts are right, of true and of false suspicions; each case is a part of the call."""
    traced = make_few(planted, size, folder)
    plants = planted.scored(size)
    cases = suspicions_of(traced, plants, size)
    truths = true_effects(traced, cases, size)
    if not (folder / "keys").is_dir():
        sartor.keygen(folder / "keys", purposes=("proof",))
    counts = {"true": {"right": 0, "of": 0}, "false": {"right": 0, "of": 0}}
    unclear, listed = [], []
    for case, truth in zip(cases, truths, strict=True):
        is_true = [effect >= size.min_effect for effect in truth]
        if any(value != (case.kind == "true") for value in is_true):
            unclear.append(case.name)
            continue
        proof = parts.run(f"proof: {case.name}", lambda case=case: _proof(traced, case, size, folder))
        expected = Verdict.PROVEN if case.kind == "true" else Verdict.NOT_PROVEN
        count = counts["true" if case.kind == "true" else "false"]
        count["of"] += 1
        count["right"] += proof["verdict"] == expected
        listed.append({"case": case.name, "verdict": proof["verdict"], "effect": proof["effect"], "truth": truth})
    notice(f"proof: {counts}, {len(unclear)} unclear")
    return {**counts, "unclear": unclear, "cases": listed, "rows": len(traced.rows), "controls": size.controls}


def true_effects(traced: TracedAdapter, cases: Sequence[Suspicion], size: Size) -> list[list[float]]:
    """Return the rise of the reply's loss without the suspects, in nats, by each seed of the truth."""
    plants = list({case.plant.name: case.plant for case in cases}.values())
    retrains = Retrains("proof", traced, queries_of(traced, asked(plants)))
    effects: list[list[float]] = [[] for _ in cases]
    for seed in size.truth_seeds:
        full = retrains.losses(f"with all rows, seed {seed}", seed=seed)
        for case, by_seed in zip(cases, effects, strict=True):
            weights = np.ones(len(traced.rows))
            weights[list(case.rows)] = 0
            changes = retrains.losses(f"{case.name}, seed {seed}", weights, seed) - full
            by_seed.append(float(changes[plants.index(case.plant)]))
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
