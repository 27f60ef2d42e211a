"""Ranks rows whose label or reply looks wrong.

Prompts are paired by their vectors and verified by their words (`text/equivalence.py`), replies compared by equality,
numbers, negations, opposites and ROUGE-L. A row's quality is how far the replies of its like prompts agree with its
own.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sartor.curate.labels import class_labels
from sartor.curate.labels.confident_learning import I64, LEAST_ROWS, confident_learning, number
from sartor.curate.step import StepInput
from sartor.text import encoders, equivalence
from sartor.text.encoders import Texts, choose_encoder

MOST_NEIGHBOURS = 10
PRIOR = 0.5  # of agreement, as much as half a neighbour says: a lone contradiction weighs less than three
WRONG = 0.5  # quality under which more contradicts a row than agrees


@dataclass(frozen=True)
class Disagreement:
    """Of N rows: `quality` 0..1 (1 where nothing contradicts), `suggested` the row whose reply has most agreement, or -1.

    `compared` rows had a like prompt; `pairs` verified pairs of prompts, `contradicting` those whose replies do not agree.
    """

    quality: NDArray[np.float64]
    suggested: I64
    wrong: NDArray[np.bool_]
    near: dict[int, list[tuple[int, float]]]
    compared: int
    pairs: int
    contradicting: int

    @property
    def estimated_errors(self) -> int:
        """Wrong replies at least: of two that contradict each other one is, of three the odd one."""
        certain = np.flatnonzero(self.wrong)
        return round(sum(0.5 if len(self.near[int(row)]) == 1 else 1.0 for row in certain))


def disagreement(
    prompts: Sequence[str], replies: Sequence[str], vectors: Any, *, likeness: float, agreement: float
) -> Disagreement:
    """Compare the replies of like prompts: a cosine of `likeness` and a share of words of `agreement` at least."""
    asked, said = equivalence.reader(prompts), equivalence.reader(replies)
    near: dict[int, list[tuple[int, float]]] = defaultdict(list)
    agrees: dict[tuple[int, int], float] = {}
    weights = equivalence.idf_weights(prompts)
    for a, b, _ in encoders.NearPairs(vectors, likeness, MOST_NEIGHBOURS):
        verdict = equivalence.compare_texts(asked(a), asked(b), weights)
        if verdict.objection or verdict.score < agreement:
            continue
        agrees[a, b] = agrees[b, a] = replies_agree(said(a), said(b))
        near[a].append((b, verdict.score))
        near[b].append((a, verdict.score))
    quality = np.ones(len(prompts))
    suggested = np.full(len(prompts), -1, np.int64)
    for row, found in near.items():
        quality[row] = (PRIOR * 0.5 + sum(agrees[row, other] for other, _ in found)) / (PRIOR + len(found))
        if quality[row] < WRONG:
            # the neighbour that the other neighbours bear out; the nearest where none is
            suggested[row] = max(
                found, key=lambda pair: (sum(agrees.get((pair[0], o), 0.0) for o, _ in found), pair[1], -pair[0])
            )[0]
    contradicting = sum(1 for (a, b), share in agrees.items() if a < b and share < WRONG)
    return Disagreement(quality, suggested, quality < WRONG, near, len(near), len(agrees) // 2, contradicting)


def replies_agree(one: equivalence.Read, other: equivalence.Read) -> float:
    """0..1: how far two replies to the same question agree. Other numbers, a negation or an opposite are a contradiction."""
    from rapidfuzz.distance import LCSseq

    if one.tokens == other.tokens:
        return 1.0
    if not one.tokens or not other.tokens:
        return 0.0
    short, long = sorted((one, other), key=lambda read: len(read.tokens))
    if _contains(long.tokens, short.tokens):
        return 1.0
    if one.numbers and other.numbers and not _is_within(one.numbers, other.numbers):
        return 0.0
    if one.negations % 2 != other.negations % 2 or equivalence.opposite(one, other):
        return 0.0
    common = LCSseq.similarity(one.tokens, other.tokens)
    return 2 * common / (len(one.tokens) + len(other.tokens))


def _contains(tokens: tuple[str, ...], part: tuple[str, ...]) -> bool:
    return f" {' '.join(part)} " in f" {' '.join(tokens)} " and len(part) >= 1 and not any(map(equivalence.is_negation, tokens))


def _is_within(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """Whether all numbers of the shorter are in the longer."""
    short, long = sorted((list(one), list(other)), key=len)
    for value in short:
        if value not in long:
            return False
        long.remove(value)
    return True


SHOWN_CHARACTERS = 300
SHOWN_NEIGHBOURS = 3
BY_LABEL, BY_REPLY, NOT_JUDGED = "label", "reply", "not_judged"
_NEIGHBOUR = pa.struct([("id", pa.string()), ("label", pa.string()), ("likeness", pa.float32())])
SCHEMA = pa.schema(
    [
        ("rank", pa.int64()),
        ("id", pa.string()),
        ("locator", pa.string()),
        ("prompt", pa.string()),
        ("given", pa.string()),
        ("suggested", pa.string()),
        ("score", pa.float64()),
        ("looks_wrong", pa.bool_()),
        ("kind", pa.string()),
        ("evidence", pa.list_(_NEIGHBOUR)),
    ]
)


@dataclass
class LabelRanking:
    """What was found of N rows. `quality` 0..1 is lowest where most speaks against a row; `kinds` says by what it was judged.

    `given` tells a row's label, or its reply in free text; `suggested` the likelier one of rows that have one; `near` the rows
    that a row was held against, with their likeness, where it was not held against all. `vectors` (N, D) find the others.
    """

    quality: NDArray[np.float64]
    wrong: NDArray[np.bool_]
    kinds: list[str]
    given: Callable[[int], str]
    vectors: Any
    suggested: dict[int, str] = field(default_factory=dict)
    near: dict[int, list[tuple[int, float]]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def blank(cls, count: int, given: Callable[[int], str], vectors: Any) -> LabelRanking:
        """Nothing speaks against any row."""
        return cls(np.ones(count), np.zeros(count, bool), [NOT_JUDGED] * count, given, vectors)

    def sentence(self, row: int) -> str:
        """What speaks against a row, for its Drop."""
        given, suggested = shortened(self.given(row), 80), shortened(self.suggested.get(row, ""), 80)
        return f"labelled {given!r}; the other rows say {suggested!r}"

    def ranked(self) -> list[int]:
        """All rows, most suspicious first; of equals the first read, and last those that were not judged."""
        unknown = np.array([kind == NOT_JUDGED for kind in self.kinds], bool)
        return list(np.lexsort((np.arange(len(self.quality)), self.quality, unknown)).tolist())


def table(gathered: StepInput, ruling: LabelRanking, most: int) -> Any:
    """The first `most` rows of the queue as evidence."""
    rows = ruling.ranked()[:most]
    ids, locators = gathered.table["id"], gathered.table["locator"]
    near = dict(_nearest(ruling, rows))
    prompts = gathered.table["prompt"]
    return pa.Table.from_pylist(
        [
            {
                "rank": rank,
                "id": ids[row].as_py(),
                "locator": locators[row].as_py(),
                "prompt": shortened(prompts[row].as_py()),
                "given": shortened(ruling.given(row)),
                "suggested": shortened(ruling.suggested.get(row, "")),
                "score": float(ruling.quality[row]),
                "looks_wrong": bool(ruling.wrong[row]),
                "kind": ruling.kinds[row],
                "evidence": [
                    {"id": ids[other].as_py(), "label": shortened(ruling.given(other), 80), "likeness": likeness}
                    for other, likeness in near.get(row, ())
                ],
            }
            for rank, row in enumerate(rows, 1)
        ],
        schema=SCHEMA,
    )


def _nearest(ruling: LabelRanking, rows: Sequence[int]) -> Iterator[tuple[int, list[tuple[int, float]]]]:
    """(row, nearest rows): those that it was held against where these are known, else the nearest of those with a label."""
    for row in rows:
        if row in ruling.near:
            yield row, sorted(ruling.near[row], key=lambda pair: (-pair[1], pair[0]))[:SHOWN_NEIGHBOURS]
    labelled = np.array([row for row, kind in enumerate(ruling.kinds) if kind == BY_LABEL], np.int64)
    place = {row: number for number, row in enumerate(labelled.tolist())}
    asked = np.array([place[row] for row in rows if row in place], np.int64)
    for found, near, likeness in encoders.nearest(ruling.vectors[labelled], asked, SHOWN_NEIGHBOURS):
        for row, who, how in zip(labelled[found].tolist(), labelled[near].tolist(), likeness.tolist(), strict=True):
            yield row, [(other, score) for other, score in zip(who, how, strict=True) if score > 0]


def shortened(text: str, most: int = SHOWN_CHARACTERS) -> str:
    """A text cut for reading, with a sign that it was."""
    return text if len(text) <= most else text[: most - 1] + "…"


FEW = 5  # rows of a label under which the count of wrong ones is loose
SYSTEM_CHARACTERS = 500


@dataclass(frozen=True)
class LabelSettings:
    """The step's options that matter here; see SuspiciousLabels."""

    label: str
    encoder: str
    likeness: float | None
    agreement: float
    seed: int


def rank_labels(gathered: StepInput, settings: LabelSettings) -> LabelRanking:
    """Judge rows with a label by their label, others by their replies where `label` is auto or text.

    Documents and rows with media are not judged.
    """
    count = len(gathered)
    replies, prompts = Texts(gathered.table["reply"]), Texts(gathered.table["prompt"])
    documents = np.array(gathered.table["document"].to_pylist(), bool)
    media = np.array(gathered.table["media"].to_pylist(), bool)
    unread = documents | media
    found = class_labels.find(list(replies), settings.label)
    asked = _asked(without_frame(list(prompts)), Texts(gathered.table["system"]))
    chosen = choose_encoder(settings.encoder)
    gathered.notice(f"suspicious labels: the label is {found.chosen} ({found.why}); encoder {chosen.encoder.name}")
    vectors = chosen.encoder.encode(asked) if count else np.zeros((0, 1), np.float32)

    def given(row: int) -> str:
        label = found.labels[row]
        return replies[row] if label is None else found.spelling.get(label, label)

    ruling = LabelRanking.blank(count, given, vectors)
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


def _by_label(
    ruling: LabelRanking, rows: I64, asked: Sequence[str], found: class_labels.ClassLabels, seed: int
) -> dict[str, Any]:
    """Judge the rows that have a label."""
    if not len(rows):
        return {}
    labels = [found.labels[row] or "" for row in rows.tolist()]
    names = sorted(set(labels))
    places = {name: index for index, name in enumerate(names)}
    numbers = np.array([places[label] for label in labels], np.int64)
    prompts = [asked[row] for row in rows.tolist()]
    judged = confident_learning(prompts, ruling.vectors[rows], numbers, seed=seed)
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


def _by_replies(
    ruling: LabelRanking, rows: I64, texts: tuple[Texts, Texts], likeness: float, agreement: float
) -> dict[str, Any]:
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
    for index, row in enumerate(rows.tolist()):
        ruling.kinds[row] = BY_REPLY
        ruling.near[row] = [(int(rows[other]), score) for other, score in found.near.get(index, ())]
        if found.suggested[index] >= 0:
            ruling.suggested[row] = replies[int(rows[found.suggested[index]])]
    return {
        "free_text": len(rows),
        "free_text_compared": found.compared,
        "like_prompts": found.pairs,
        "contradicting_replies": found.contradicting,
        "reply_errors": found.estimated_errors,
    }
