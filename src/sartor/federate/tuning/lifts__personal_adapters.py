"""Part of federate.tuning.lifts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from sartor.core import parquet_io as stored
from sartor.core.records import Example
from sartor.core.splits import group_of
from sartor.evaluate import predictions
from sartor.evaluate.predictions import HeldOut, refusal
from sartor.federate.tuning.clients import Clients
from sartor.personalization.benefit_report import SHORT_TOKENS, Own


def examples_of(people: Clients) -> dict[str, Example]:
    """Every row of every Dataset, by its id."""
    return {one.id: one for dataset in people.datasets for one in stored.read_examples(dataset)}


def own_rows(people: Clients, name: str, examples: Mapping[str, Example]) -> Own:
    """What a client is judged by. Rows whose replies are too long to be said word by word are judged by their loss alone."""
    encoded, base = people.rows[name].held_out, people.resident.base
    found = [examples[row.example_id] for row in encoded]
    groups = [group_of(one) for one in found]
    folder = people.dataset_of(name).path
    if not found or (limit := predictions.reply_limit(base, found)) > SHORT_TOKENS + predictions.SPARE_TOKENS:
        return Own(encoded, groups, HeldOut([], folder, {"reply_too_long": len(found)} if found else {}))
    asked: list[Example] = []
    left_out: Counter[str] = Counter()
    for one in found:
        reason = "no_reply" if one.is_document else refusal(base, one, folder, limit)[0]
        if reason:
            left_out[reason] += 1
        else:
            asked.append(one)
    return Own(encoded, groups, HeldOut(asked, folder, dict(left_out)), limit)
