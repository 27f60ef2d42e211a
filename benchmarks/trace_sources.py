"""Mislabelled source of trace.py: ten sources of commands, of which one has a wrong label for one intent.

Every source has as many rows. Of one intent the mislabelled source has most rows, all with the label of another
intent; the other sources have one row each, with the right label. The bad replies are what the tuned model says to
held-out commands of that intent where it gives the wrong label. `--by source` names a source if its rows' scores have
the largest sum.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from trace_setup import Row, Size, chat_row, notice, texts_of, with_reply

from sartor.core import assets
from sartor.demo import home_intents
from sartor.inference.engine import Sampling
from sartor.inference.generate import generate
from sartor.models.tuned_model import open_tuned
from sartor.trace.credit import sum_by_source
from sartor.trace.retrieval import RowSources
from sartor.trace.traced_adapter import TracedAdapter

F64 = NDArray[np.float64]
SOURCES = 10
BAD = "team-4"
# part of the mislabelled source's rows that have the wrong label
WRONG = 0.75
REPLY_TOKENS = 64


def relabelled(reply: str, intent: str) -> str:
    """Return a reply with another intent, its slots unchanged."""
    return json.dumps({**json.loads(reply), "intent": intent}, ensure_ascii=False, separators=(",", ":"))


def source_rows(size: Size) -> tuple[dict[str, list[Row]], list[Row], str]:
    """Return the rows by source, the held-out commands of the mislabelled intent, and the wrong label."""
    mislabelled = round(WRONG * size.source_rows)
    per_intent = mislabelled + SOURCES - 1 + 2 * size.bad_replies
    by_intent: dict[str, list[Row]] = {}
    for row in home_intents.rows(assets.install("home-intents"), per_intent=per_intent):
        command, reply = texts_of(row)
        plain = chat_row(command, reply)
        by_intent.setdefault(json.loads(reply)["intent"], []).append(plain)
    intent, wrong = sorted(by_intent)[:2]
    rows, held_out = by_intent[intent][: mislabelled + SOURCES - 1], by_intent[intent][mislabelled + SOURCES - 1 :]
    others = [row for name in sorted(by_intent) if name != intent for row in by_intent[name]]
    random.Random(0).shuffle(others)
    sources: dict[str, list[Row]] = {}
    for number in range(SOURCES):
        name = f"team-{number}"
        own = rows[:mislabelled] if name == BAD else [rows.pop()]
        if name == BAD:
            own = [with_reply(row, relabelled(texts_of(row)[1], wrong)) for row in own]
        more = [others.pop() for _ in range(size.source_rows - len(own))]
        sources[name] = [*own, *more]
    return sources, held_out, wrong


def bad_replies(traced: TracedAdapter, held_out: Sequence[Row], wrong: str, size: Size) -> list[Row]:
    """Return held-out commands with the model's own replies of the wrong label, up to `size.bad_replies`.

    A tiny base says nothing of sense: if no reply is of the wrong label, the references with it are taken instead.
    """
    base, model = open_tuned(traced.artifact)
    prompts = [
        base.chat.prompt_ids(traced.query(texts_of(row)[0], "?").prompt) for row in held_out[: 2 * size.bad_replies]
    ]
    sampling = Sampling(REPLY_TOKENS)
    replies = generate(model, prompts, stop=base.chat.stops, pad=base.chat.pad, sampling=sampling)
    texts = [base.chat.decode(reply.ids).strip() for reply in replies]
    said = [with_reply(row, text) for row, text in zip(held_out, texts, strict=False) if f'"{wrong}"' in text]
    if not said:
        notice("the model gives no bad reply; the references with the wrong label are asked instead")
        said = [with_reply(row, relabelled(texts_of(row)[1], wrong)) for row in held_out]
    return said[: size.bad_replies]


def named_source(traced: TracedAdapter, scores: F64) -> str:
    """Return the name of the source with the largest sum of scores."""
    return Path(sum_by_source(RowSources.of([row.example for row in traced.rows]), scores)[0].source).stem
