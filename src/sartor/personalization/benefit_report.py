"""Gain of a personal adapter on its owner's rows.

Losses of whole rows, in nats per supervised token, and where replies are short exact match of greedy ones; each difference
(the client's own adapter minus another) with its 95 % interval over groups (`evaluate.compare`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sartor.core.splits import group_of
from sartor.evaluate import predictions
from sartor.evaluate.bootstrap import Comparison, paired_bootstrap
from sartor.evaluate.predictions import HeldOut
from sartor.evaluate.scorers import exact_match
from sartor.models.lora_tensors import Tensors
from sartor.models.packing import TokenizedExample
from sartor.tune.shared_base import SharedBase

SCHEMA, KIND = 1, "personal-report"
# what is longer is hardly ever said word by word
SHORT_TOKENS = 64


@dataclass(frozen=True)
class Own:
    """A client's held-out rows. groups: of each; asked: those that may be answered, with replies of `limit` tokens at most."""

    encoded: Sequence[TokenizedExample]
    groups: Sequence[str]
    asked: HeldOut
    limit: int = 0

    @property
    def asked_groups(self) -> list[str]:
        """Of the rows that are asked."""
        return [group_of(one) for one in self.asked.examples]

    @property
    def tokens(self) -> list[float]:
        """Supervised tokens of each row."""
        return [float(row.supervised_tokens) for row in self.encoded]


@dataclass(frozen=True)
class AdapterScores:
    """One adapter on a client's rows. losses: (N,) nats per supervised token; matches: (M,) 0 or 1 of the rows asked."""

    losses: list[float]
    matches: list[float]


@dataclass(frozen=True)
class ClientBenefit:
    """All adapters on one client's rows; `personal` is the client's own. trained: rows that it has to train on."""

    own: Own
    sides: Mapping[str, AdapterScores]
    trained: int = 0

    def __str__(self) -> str:
        if not self.sides:
            return "no held-out row to judge by"
        means = {what: _mean(side.losses, self.own.tokens) for what, side in self.sides.items()}
        return "loss " + ", ".join(f"{mean:.3f} {what.replace('_', ' ')}" for what, mean in means.items())


@torch.no_grad()
def side(resident: SharedBase, adapter: Tensors, own: Own) -> AdapterScores:
    """What an adapter makes of a client's rows."""
    resident.put(adapter)
    resident.model.eval()
    losses, _ = predictions.losses(resident.base, resident.model, own.encoded)
    rows = own.asked.examples
    said = predictions.replies(resident.base, resident.model, own.asked, own.limit) if rows else []
    texts = [resident.base.chat.decode(one.ids) for one in said]
    return AdapterScores(losses, [exact_match(text, row.reply) for text, row in zip(texts, rows, strict=True)])


def report(judged: Mapping[str, ClientBenefit]) -> dict[str, Any]:
    """Of each client, and of all their rows together: means, differences with intervals, and how many are better or worse."""
    clients = {name: _said(one) for name, one in judged.items()}
    others = {what for one in judged.values() for what in one.sides} - {"personal"}
    verdicts = {
        f"over_{what}": dict(Counter(said[f"over_{what}"]["loss"]["verdict"] for said in clients.values() if said["held_out"]))
        for what in sorted(others)
    }
    return {"schema": SCHEMA, "kind": KIND, "clients": clients, "all": _said(_pooled(judged)), "verdicts": verdicts}


def _pooled(judged: Mapping[str, ClientBenefit]) -> ClientBenefit:
    """All clients' rows as one set."""
    with_rows = {name: one for name, one in judged.items() if one.sides}
    whats = next(iter(with_rows.values())).sides if with_rows else {}
    own = Own(
        [row for one in with_rows.values() for row in one.own.encoded],
        [group for one in with_rows.values() for group in one.own.groups],
        HeldOut([row for one in with_rows.values() for row in one.own.asked.examples], Path()),
    )
    sides = {
        what: AdapterScores(
            [loss for one in with_rows.values() for loss in one.sides[what].losses],
            [match for one in with_rows.values() for match in one.sides[what].matches],
        )
        for what in whats
    }
    return ClientBenefit(own, sides, sum(one.trained for one in judged.values()))


def _said(one: ClientBenefit) -> dict[str, Any]:
    own, sides = one.own, one.sides
    said: dict[str, Any] = {
        "rows": one.trained,
        "held_out": len(own.encoded),
        "asked": len(own.asked.examples),
        "not_asked": own.asked.left_out,
        "loss": {what: _mean(found.losses, own.tokens) for what, found in sides.items()},
        "exact_match": {what: _mean(found.matches) for what, found in sides.items()},
    }
    for what, other in sides.items():
        if what != "personal":
            said[f"over_{what}"] = _over(own, other, sides["personal"])
    return said


def _over(own: Own, other: AdapterScores, mine: AdapterScores) -> dict[str, Any]:
    found = {
        "loss": _difference(
            paired_bootstrap(other.losses, mine.losses, own.groups, own.tokens, is_bounded=False), higher_is_better=False
        )
    }
    if mine.matches:
        found["exact_match"] = _difference(
            paired_bootstrap(other.matches, mine.matches, own.asked_groups), higher_is_better=True
        )
    return found


def _difference(compared: Comparison, *, higher_is_better: bool) -> dict[str, Any]:
    verdict = compared.verdict(higher_is_better=higher_is_better)
    return {"estimate": compared.difference, "low": compared.low, "high": compared.high, "verdict": verdict}


def _mean(values: Sequence[float], weights: Sequence[float] | None = None) -> float | None:
    weights = weights or [1.0] * len(values)
    total = sum(weights)
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / total if total else None
