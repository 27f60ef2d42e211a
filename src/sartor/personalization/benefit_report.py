"""Gain of a personal adapter on its owner's rows.

Measures are losses of whole rows, in nats per supervised token, and where replies are short exact match of greedy
ones. Each difference (the client's own adapter minus another) has its 95 % interval over groups, by the sign-flip
test of `evaluate/bootstrap.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sartor.core.reply_markup import without_reasoning
from sartor.core.splits import group_of
from sartor.evaluate import predictions
from sartor.evaluate.bootstrap import Comparison, paired_bootstrap
from sartor.evaluate.predictions import HeldOut
from sartor.evaluate.scorers import exact_match
from sartor.models.lora_tensors import Tensors
from sartor.models.packing import TokenizedExample
from sartor.personalization.acceptance import JudgedRows, PairedLosses
from sartor.tune.shared_base import SharedBase

SCHEMA, KIND = 1, "personal-report"
# longer replies hardly ever match word for word
SHORT_TOKENS = 64


@dataclass(frozen=True)
class ClientRows(JudgedRows):
    """Held-out rows of a client.

    answerable: rows that are answered, with replies of at most `limit` tokens.
    """

    answerable: HeldOut
    limit: int = 0

    @property
    def answerable_groups(self) -> list[str]:
        """Group of each row that is answered."""
        return [group_of(example) for example in self.answerable.examples]


@dataclass(frozen=True)
class AdapterScores:
    """Scores of one adapter on a client's rows.

    losses: (N,) nats per supervised token.
    matches: (M,) 0 or 1, of the rows that are answered.
    """

    losses: list[float]
    matches: list[float]


@dataclass(frozen=True)
class ClientBenefit:
    """Scores of all adapters on one client's rows; `personal` is the client's own.

    trained: number of the client's training rows.
    """

    rows: ClientRows
    sides: Mapping[str, AdapterScores]
    trained: int = 0

    def __str__(self) -> str:
        if not self.sides:
            return "no held-out row to judge by"
        means = {side_name: _mean(side.losses, self.rows.tokens) for side_name, side in self.sides.items()}
        return "loss " + ", ".join(f"{mean:.3f} {side_name.replace('_', ' ')}" for side_name, mean in means.items())


def row_losses(resident: SharedBase, adapter: Tensors, rows: Sequence[TokenizedExample]) -> list[float]:
    """Return the loss of each row under an adapter, in nats per supervised token.

    adapter: factors A (R, inputs) and B (outputs, R) by name; it replaces the resident's factors.
    """
    resident.put(adapter)
    resident.model.eval()
    return predictions.losses(resident.base, resident.model, rows)[0]


@torch.no_grad()
def score_adapter(resident: SharedBase, adapter: Tensors, client_rows: ClientRows) -> AdapterScores:
    """Return the scores of an adapter on a client's rows.

    adapter: factors A (R, inputs) and B (outputs, R) by name; it replaces the resident's factors.
    """
    losses = row_losses(resident, adapter, client_rows.encoded)
    rows = client_rows.answerable.examples
    replies = (
        predictions.replies(resident.base, resident.model, client_rows.answerable, client_rows.limit) if rows else []
    )
    texts = [resident.base.chat.decode(item.ids) for item in replies]
    is_opened = predictions.template_opens_reasoning(resident.base.chat, client_rows.answerable)
    answers = [without_reasoning(text, is_opened=is_opened) for text in texts]
    return AdapterScores(losses, [exact_match(answer, row.reply) for answer, row in zip(answers, rows, strict=True)])


def report(benefits: Mapping[str, ClientBenefit]) -> dict[str, Any]:
    """Return the report of each client, and of all their rows together.

    It has means, differences with intervals, and the number of clients by verdict.
    """
    clients = {name: _benefit_fields(benefit) for name, benefit in benefits.items()}
    others = {side_name for item in benefits.values() for side_name in item.sides} - {"personal"}
    with_held_out = [client for client in clients.values() if client["held_out"]]
    verdicts: dict[str, dict[str, int]] = {}
    for side_name in sorted(others):
        comparison = f"over_{side_name}"
        verdicts[comparison] = dict(Counter(client[comparison]["loss"]["verdict"] for client in with_held_out))
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "clients": clients,
        "all": _benefit_fields(_pool_clients(benefits)),
        "verdicts": verdicts,
    }


def _pool_clients(benefits: Mapping[str, ClientBenefit]) -> ClientBenefit:
    """Return all clients' rows as one set."""
    with_rows = [benefit for benefit in benefits.values() if benefit.sides]
    client_rows = ClientRows(
        [row for benefit in with_rows for row in benefit.rows.encoded],
        [group for benefit in with_rows for group in benefit.rows.groups],
        HeldOut([row for benefit in with_rows for row in benefit.rows.answerable.examples], Path()),
    )
    sides: dict[str, AdapterScores] = {}
    for side_name in with_rows[0].sides if with_rows else ():
        sides[side_name] = AdapterScores(
            [loss for benefit in with_rows for loss in benefit.sides[side_name].losses],
            [match for benefit in with_rows for match in benefit.sides[side_name].matches],
        )
    return ClientBenefit(client_rows, sides, sum(item.trained for item in benefits.values()))


def _benefit_fields(benefit: ClientBenefit) -> dict[str, Any]:
    """Return the fields of one client's report."""
    client_rows, sides = benefit.rows, benefit.sides
    fields: dict[str, Any] = {
        "rows": benefit.trained,
        "held_out": len(client_rows.encoded),
        "asked": len(client_rows.answerable.examples),
        "not_asked": client_rows.answerable.left_out,
        "loss": {side_name: _mean(scores.losses, client_rows.tokens) for side_name, scores in sides.items()},
        "exact_match": {side_name: _mean(scores.matches) for side_name, scores in sides.items()},
    }
    for side_name, other in sides.items():
        if side_name != "personal":
            fields[f"over_{side_name}"] = _compare_with(client_rows, other, sides["personal"])
    return fields


def _compare_with(client_rows: ClientRows, other: AdapterScores, personal: AdapterScores) -> dict[str, Any]:
    """Return the differences of the personal adapter to another one."""
    losses = PairedLosses(client_rows, other.losses, personal.losses)
    result = {"loss": _difference(losses.compare(), higher_is_better=False)}
    if personal.matches:
        result["exact_match"] = _difference(
            paired_bootstrap(other.matches, personal.matches, client_rows.answerable_groups), higher_is_better=True
        )
    return result


def _difference(comparison: Comparison, *, higher_is_better: bool) -> dict[str, Any]:
    verdict = comparison.verdict(higher_is_better=higher_is_better)
    return {"estimate": comparison.difference, "low": comparison.low, "high": comparison.high, "verdict": verdict}


def _mean(values: Sequence[float], weights: Sequence[float] | None = None) -> float | None:
    """Return the weighted mean, or None without weight."""
    weights = weights or [1.0] * len(values)
    total = sum(weights)
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / total if total else None
