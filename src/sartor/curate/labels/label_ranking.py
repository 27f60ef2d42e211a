"""From sketches to a Ruling: what the labels are, what they are judged by, and what the card says of it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sartor.curate.labels import target
from sartor.curate.labels.disagreement import disagreement
from sartor.curate.labels.folds import I64
from sartor.curate.labels.queue import BY_LABEL, BY_REPLY, NOT_JUDGED, Ruling
from sartor.curate.labels.suspects import LEAST_ROWS, judge, number
from sartor.curate.steps.contract import Gathered
from sartor.text.encoders import Texts, choose

FEW = 5  # rows of a label under which the count of wrong ones is loose
SYSTEM_CHARACTERS = 500


@dataclass(frozen=True)
class Settings:
    """The step's options that matter here; see SuspiciousLabels."""

    label: str
    encoder: str
    likeness: float | None
    agreement: float
    seed: int


def rule(gathered: Gathered, settings: Settings) -> Ruling:
    """Judge rows with a label by their label, others by their replies where `label` is auto or text.

    Documents and rows with media are not judged.
    """
    count = len(gathered)
    replies, prompts = Texts(gathered.table["reply"]), Texts(gathered.table["prompt"])
    documents = np.array(gathered.table["document"].to_pylist(), bool)
    media = np.array(gathered.table["media"].to_pylist(), bool)
    unread = documents | media
    found = target.find(list(replies), settings.label)
    asked = _asked(without_frame(list(prompts)), Texts(gathered.table["system"]))
    chosen = choose(settings.encoder)
    gathered.notice(f"suspicious labels: the label is {found.chosen} ({found.why}); encoder {chosen.encoder.name}")
    vectors = chosen.encoder.encode(asked) if count else np.zeros((0, 1), np.float32)

    def given(row: int) -> str:
        label = found.labels[row]
        return replies[row] if label is None else found.spelling.get(label, label)

    ruling = Ruling.blank(count, given, vectors)
    labelled = np.array([label is not None for label in found.labels], bool) & ~unread
    free = ~labelled & ~unread & (settings.label in ("auto", "text"))
    facts: dict[str, Any] = {"label": found.chosen, "label_because": found.why, "other_labels": list(found.others)}
    facts |= {**chosen.facts(), "documents": int(documents.sum()), "prompts_cut": sum(gathered.table["cut"].to_pylist())}
    if media.any():
        facts["rows_with_media"] = int(media.sum())
    facts |= _by_label(ruling, np.flatnonzero(labelled), asked, found, settings.seed)
    likeness = chosen.likeness if settings.likeness is None else settings.likeness
    facts |= _by_replies(ruling, np.flatnonzero(free), (prompts, replies), likeness, settings.agreement)
    facts["not_judged"] = ruling.kinds.count(NOT_JUDGED)
    facts["suspicious"] = int(ruling.wrong.sum())
    facts["estimated_errors"] = facts.get("label_errors", 0) + facts.get("reply_errors", 0)
    ruling.facts = facts
    return ruling


def without_frame(prompts: list[str]) -> list[str]:
    """The prompts without the words that all of them begin and end with: an instruction says nothing about one row's label."""
    if len(prompts) < LEAST_ROWS:
        return prompts
    before = os.path.commonprefix([min(prompts), max(prompts)])
    turned = [prompt[::-1] for prompt in prompts]
    after = os.path.commonprefix([min(turned), max(turned)])
    # whole words only, and something must be left of the shortest
    start = len(before) - len(before.split()[-1]) if before.split() and not before[-1].isspace() else len(before)
    end = len(after) - len(after.split()[-1]) if after.split() and not after[-1].isspace() else len(after)
    if start + end >= min(map(len, prompts)):
        return prompts
    return [prompt[start : len(prompt) - end] for prompt in prompts]


def _asked(prompts: Sequence[str], systems: Texts) -> list[str]:
    """What labels are judged by: the prompt, after the start of what the system is told where that is not one and the same."""
    if len(Counter(systems)) <= 1:
        return list(prompts)
    return [
        f"{system[:SYSTEM_CHARACTERS]}\n{prompt}" if system else prompt for system, prompt in zip(systems, prompts, strict=True)
    ]


def _by_label(ruling: Ruling, rows: I64, asked: Sequence[str], found: target.Target, seed: int) -> dict[str, Any]:
    """Judge the rows that have a label."""
    if not len(rows):
        return {}
    labels = [found.labels[row] or "" for row in rows.tolist()]
    names = sorted(set(labels))
    places = {name: place for place, name in enumerate(names)}
    numbers = np.array([places[label] for label in labels], np.int64)
    prompts = [asked[row] for row in rows.tolist()]
    judged = judge(prompts, ruling.vectors[rows], numbers, seed=seed)
    sizes = np.bincount(numbers)
    facts = {
        "labelled": len(rows),
        "labels": len(names),
        "labels_of_few_rows": int((sizes < FEW).sum()),
        "prompts_with_several_labels": _contested(prompts, numbers),
        "judged_by": judged.method,
        "label_errors": judged.estimated_errors,
        "label_errors_are": "an estimate" if len(rows) >= FEW * len(names) * 2 else "a loose estimate: too few rows per label",
    }
    if judged.why:
        return {**facts, "not_judged_because": judged.why}
    ruling.quality[rows], ruling.wrong[rows] = judged.quality, judged.wrong
    for row, suggested in zip(rows.tolist(), judged.suggested.tolist(), strict=True):
        ruling.kinds[row] = BY_LABEL
        ruling.suggested[row] = found.spelling.get(names[suggested], names[suggested])
    return facts


def _contested(prompts: Sequence[str], labels: I64) -> int:
    """Prompts that stand with more than one label."""
    pairs = np.unique(np.stack([number(prompts), labels]), axis=1)
    return int((np.bincount(pairs[0]) > 1).sum())


def _by_replies(ruling: Ruling, rows: I64, texts: tuple[Texts, Texts], likeness: float, agreement: float) -> dict[str, Any]:
    """Judge the rows whose replies are free text."""
    if not len(rows):
        return {}
    prompts, replies = texts
    found = disagreement(
        [prompts[row] for row in rows.tolist()],
        [replies[row] for row in rows.tolist()],
        ruling.vectors[rows],
        likeness=likeness,
        agreement=agreement,
    )
    ruling.quality[rows], ruling.wrong[rows] = found.quality, found.wrong
    for place, row in enumerate(rows.tolist()):
        ruling.kinds[row] = BY_REPLY
        ruling.near[row] = [(int(rows[other]), score) for other, score in found.near.get(place, ())]
        if found.suggested[place] >= 0:
            ruling.suggested[row] = replies[int(rows[found.suggested[place]])]
    return {
        "free_text": len(rows),
        "free_text_compared": found.compared,
        "like_prompts": found.pairs,
        "contradicting_replies": found.contradicting,
        "reply_errors": found.estimated_errors,
    }
