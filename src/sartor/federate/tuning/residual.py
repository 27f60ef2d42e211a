"""Rounds of the mode `residual` (FedEx-LoRA, arXiv:2410.09432): the mean of both factors, and beside it what it misses.

Every client's factors are seen. What their mean misses is not folded into the base, which an Adapter is bound to, but kept as
ranks beyond the shared R that all clients hold still: the same weights, since W + s E + s B A = W + s [B, B_E] [A; A_E]. Rounds
add up, so after each the residual is brought to the fewest ranks that compute it, at most min(in, out) of a module.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sartor.core.errors import BudgetError
from sartor.federate.aggregate import exactness
from sartor.federate.aggregate.modes import Combined, Residual
from sartor.federate.aggregate.tensors__updates import Update, mean
from sartor.federate.robust.rules import AnyRule
from sartor.federate.rounds.task import Learnt
from sartor.federate.tuning.running import InspectedRounds, Setting
from sartor.federate.tuning.task import LoraTask
from sartor.models.lora_tensors import A, Array, B, Pair, Tensors, cut, joined, modules, pair, plus, rank_of

# a singular value below this, of the largest, is rounding in fp64
_NOTHING = 1e-12


class ResidualRounds(InspectedRounds):
    """`shared` has the R shared ranks first, then the residual's. The tasks' base follows it."""

    def __init__(self, setting: Setting, rule: AnyRule) -> None:
        super().__init__(setting, rule)
        self._fit(self._shared)

    def _learnt(self, shared: Tensors, number: int, declined: dict[str, BudgetError]) -> dict[str, Learnt]:
        self._fit(shared)
        whole = super()._learnt(shared, number, declined)
        return {name: replace(one, tensors=cut(one.tensors, self._rank)[0]) for name, one in whole.items()}

    def _made(self, shared: Tensors, updates: list[Update], pooled: Tensors, seed: int) -> tuple[Tensors, float]:
        means, residual = cut(shared, self._rank)
        whole = [replace(one, tensors=plus(means, one.tensors)) for one in updates]
        combined = Residual().combine(means, whole, 1)
        missed = {
            module: Pair(*_together(combined.residual[module], pair(residual, module) if residual else None))
            for module in modules(means)
        }
        made = joined(combined.tensors, fewest(missed))
        canary = exactness.draw(means, seed)
        before = {module: pair(residual, module) for module in modules(means)} if residual else {}
        answers = [replace(one, tensors=canary.responses(one.tensors, before)) for one in whole]
        self._fit(made)
        return made, exactness.exactness_error(canary, Combined(made), mean(answers))

    @property
    def _rank(self) -> int:
        """R, of what clients train."""
        return self._setting.recipe.method.rank

    def _fit(self, shared: Tensors) -> None:
        """Give the tasks a base with room for all ranks, of which they train the first R."""
        self._setting.resident.refit(rank_of(shared))
        for task in self._setting.tasks.values():
            if isinstance(task, LoraTask):
                task.rank = self._rank


def _together(one: Pair, other: Pair | None) -> tuple[Array, Array]:
    """(A, B) of the sum of two products, in fp64."""
    parts = [one, *([other] if other else [])]
    return (
        np.concatenate([part.a.astype(np.float64) for part in parts]),
        np.concatenate([part.b.astype(np.float64) for part in parts], axis=1),
    )


def fewest(residual: dict[str, Pair]) -> dict[str, Array]:
    """The factors of these products in fp32, by PEFT's names, at the fewest ranks that compute every one; at least one.

    By a singular value decomposition of the product of the triangles of two QR decompositions.
    """
    found = {module: _decomposed(one) for module, one in residual.items()}
    rank = max(1, *(len(one.a) for one in found.values()))
    tensors: dict[str, Array] = {}
    for module, one in found.items():
        spare = rank - len(one.a)
        tensors[module + A] = np.pad(one.a, ((0, spare), (0, 0))).astype(np.float32)
        tensors[module + B] = np.pad(one.b, ((0, 0), (0, spare))).astype(np.float32)
    return tensors


def _decomposed(one: Pair) -> Pair:
    left, upper = np.linalg.qr(one.b)
    right, lower = np.linalg.qr(one.a.T)
    u, sizes, v = np.linalg.svd(upper @ lower.T)
    rank = int((sizes > _NOTHING * max(float(sizes[0]), np.finfo(np.float64).tiny)).sum())
    root = np.sqrt(sizes[:rank])
    return Pair((right @ (v[:rank].T * root)).T, left @ (u[:, :rank] * root))
