"""Ranking of rows whose label or reply looks wrong.

For free text, prompts are paired by their vectors and verified by their words (`text/equivalence.py`). Replies are
compared by equality, numbers, negations, opposites and ROUGE-L. The quality of a row is the agreement of its reply
with the replies of similar prompts.
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
PRIOR = 0.5  # weight of the prior agreement 0.5, in neighbours: a lone contradiction weighs less than three
WRONG = 0.5  # a row of lower quality is contradicted more than confirmed


@dataclass(frozen=True)
class Disagreement:
    """Agreement of the replies of N rows.

    quality: (N,) 0..1; 1 if nothing contradicts.
    suggested: (N,) the row whose reply has most agreement, or -1.
    wrong: (N,) True if the reply looks wrong.
    near: row -> (other row, share of equal words) of similar prompts.
    compared: rows with a similar prompt. pairs: verified pairs of prompts. contradicting: pairs whose replies
    disagree.
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
        """Least number of wrong replies: of two contradicting replies one is wrong, of three the odd one."""
        wrong_rows = np.flatnonzero(self.wrong)
        return round(sum(0.5 if len(self.near[int(row)]) == 1 else 1.0 for row in wrong_rows))


def disagreement(
    prompts: Sequence[str], replies: Sequence[str], vectors: Any, *, likeness: float, agreement: float
) -> Disagreement:
    """Compare the replies of similar prompts.

    vectors: (N, D) of the prompts. likeness: least cosine of two prompts. agreement: least share of equal words.
    """
    read_prompt, read_reply = equivalence.reader(prompts), equivalence.reader(replies)
    near: dict[int, list[tuple[int, float]]] = defaultdict(list)
    agrees: dict[tuple[int, int], float] = {}
    weights = equivalence.idf_weights(prompts)
    for a, b, _ in encoders.NearPairs(vectors, likeness, MOST_NEIGHBOURS):
        verdict = equivalence.compare_texts(read_prompt(a), read_prompt(b), weights)
        if verdict.objection or verdict.score < agreement:
            continue
        agrees[a, b] = agrees[b, a] = replies_agree(read_reply(a), read_reply(b))
        near[a].append((b, verdict.score))
        near[b].append((a, verdict.score))
    quality = np.ones(len(prompts))
    suggested = np.full(len(prompts), -1, np.int64)
    for row, neighbours in near.items():
        # quality = (PRIOR * 0.5 + sum of agreements) / (PRIOR + n), over n neighbours
        quality[row] = (PRIOR * 0.5 + sum(agrees[row, other] for other, _ in neighbours)) / (PRIOR + len(neighbours))
        if quality[row] < WRONG:
            # the neighbour with which the other neighbours agree most; on a tie the nearest
            candidates = []
            for other, score in neighbours:
                support = sum(agrees.get((other, third), 0.0) for third, _ in neighbours)
                candidates.append((support, score, -other, other))
            suggested[row] = max(candidates)[-1]
    return Disagreement(
        quality,
        suggested,
        wrong=quality < WRONG,
        near=near,
        compared=len(near),
        pairs=len(agrees) // 2,
        contradicting=sum(a < b and share < WRONG for (a, b), share in agrees.items()),
    )


def replies_agree(first: equivalence.TextReading, second: equivalence.TextReading) -> float:
    """Return the agreement of two replies to the same question, 0..1.

    Different numbers, a negation or an opposite count as a contradiction.
    """
    from rapidfuzz.distance import LCSseq

    if first.tokens == second.tokens:
        return 1.0
    if not first.tokens or not second.tokens:
        return 0.0
    short, long = sorted((first, second), key=lambda read: len(read.tokens))
    # a reply that stands word for word in the other agrees with it, unless the other negates it
    is_contained = f" {' '.join(short.tokens)} " in f" {' '.join(long.tokens)} "
    if is_contained and not any(map(equivalence.is_negation, long.tokens)):
        return 1.0
    if first.numbers and second.numbers and not _is_within(first.numbers, second.numbers):
        return 0.0
    if first.negations % 2 != second.negations % 2 or equivalence.opposite(first, second):
        return 0.0
    common = LCSseq.similarity(first.tokens, second.tokens)
    return 2 * common / (len(first.tokens) + len(second.tokens))


def _is_within(first: tuple[str, ...], second: tuple[str, ...]) -> bool:
    """Return True if all numbers of the shorter list are in the longer."""
    short, long = sorted((list(first), list(second)), key=len)
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
    """Result of judging N rows.

    quality: (N,) 0..1; lowest for the most suspicious row. wrong: (N,) True if a row looks wrong.
    kinds: criterion for each row: BY_LABEL, BY_REPLY or NOT_JUDGED.
    given: returns a row's label, or its reply if it is free text.
    vectors: (N, D), used to find similar rows.
    suggested: likelier label or reply of the rows that have one.
    near: rows that a row was compared with, and their similarity; absent for a row that was compared with all.
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
        """Return a ranking of `count` rows in which no row is judged."""
        return cls(
            quality=np.ones(count),
            wrong=np.zeros(count, bool),
            kinds=[NOT_JUDGED] * count,
            given=given,
            vectors=vectors,
        )

    def sentence(self, row: int) -> str:
        """Return the reason of suspicion against a row, for its Drop."""
        given, suggested = shortened(self.given(row), 80), shortened(self.suggested.get(row, ""), 80)
        return f"labelled {given!r}; the other rows say {suggested!r}"

    def ranked(self) -> list[int]:
        """Return all rows, most suspicious first.

        Equal rows are in reading order. Rows that were not judged come last.
        """
        unknown = np.array([kind == NOT_JUDGED for kind in self.kinds], bool)
        return list(np.lexsort((np.arange(len(self.quality)), self.quality, unknown)).tolist())


def table(step_input: StepInput, ranking: LabelRanking, max_rows: int) -> Any:
    """Return the first `max_rows` rows of the ranking as a table of evidence."""
    rows = ranking.ranked()[:max_rows]
    ids, locators = step_input.table["id"], step_input.table["locator"]
    near = dict(_nearest(ranking, rows))
    prompts = step_input.table["prompt"]
    entries = []
    for rank, row in enumerate(rows, 1):
        evidence = [
            {"id": ids[other].as_py(), "label": shortened(ranking.given(other), 80), "likeness": likeness}
            for other, likeness in near.get(row, ())
        ]
        entries.append(
            {
                "rank": rank,
                "id": ids[row].as_py(),
                "locator": locators[row].as_py(),
                "prompt": shortened(prompts[row].as_py()),
                "given": shortened(ranking.given(row)),
                "suggested": shortened(ranking.suggested.get(row, "")),
                "score": float(ranking.quality[row]),
                "looks_wrong": bool(ranking.wrong[row]),
                "kind": ranking.kinds[row],
                "evidence": evidence,
            }
        )
    return pa.Table.from_pylist(entries, schema=SCHEMA)


def _nearest(ranking: LabelRanking, rows: Sequence[int]) -> Iterator[tuple[int, list[tuple[int, float]]]]:
    """Yield (row, nearest rows): rows it was compared with if known, else the nearest labelled rows."""
    for row in rows:
        if row in ranking.near:
            yield row, sorted(ranking.near[row], key=lambda pair: (-pair[1], pair[0]))[:SHOWN_NEIGHBOURS]
    labelled = np.array([row for row, kind in enumerate(ranking.kinds) if kind == BY_LABEL], np.int64)
    positions = {row: number for number, row in enumerate(labelled.tolist())}
    queries = np.array([positions[row] for row in rows if row in positions], np.int64)
    for query_positions, near_positions, likeness in encoders.nearest(
        ranking.vectors[labelled], queries, SHOWN_NEIGHBOURS
    ):
        for row, neighbours, scores in zip(
            labelled[query_positions].tolist(), labelled[near_positions].tolist(), likeness.tolist(), strict=True
        ):
            yield row, [(other, score) for other, score in zip(neighbours, scores, strict=True) if score > 0]


def shortened(text: str, max_characters: int = SHOWN_CHARACTERS) -> str:
    """Return a text cut to `max_characters`, with an ellipsis if it was cut."""
    return text if len(text) <= max_characters else text[: max_characters - 1] + "…"


FEW = 5  # rows per label; with fewer, the count of wrong labels is a loose estimate
SYSTEM_CHARACTERS = 500


@dataclass(frozen=True)
class LabelSettings:
    """Options of the step SuspiciousLabels that are used here."""

    label: str
    encoder: str
    likeness: float | None
    agreement: float
    seed: int


def rank_labels(step_input: StepInput, settings: LabelSettings) -> LabelRanking:
    """Judge rows with a label by that label, others by their replies if `label` is auto or text.

    Documents and rows with media are not judged.
    """
    count = len(step_input)
    replies, prompts = Texts(step_input.table["reply"]), Texts(step_input.table["prompt"])
    documents = np.array(step_input.table["document"].to_pylist(), bool)
    media = np.array(step_input.table["media"].to_pylist(), bool)
    skipped = documents | media
    row_labels = class_labels.find(list(replies), settings.label)
    inputs = _label_inputs(without_frame(list(prompts)), Texts(step_input.table["system"]))
    choice = choose_encoder(settings.encoder)
    step_input.notice(
        f"suspicious labels: the label is {row_labels.form} ({row_labels.explanation}); encoder {choice.encoder.name}"
    )
    vectors = choice.encoder.encode(inputs) if count else np.zeros((0, 1), np.float32)

    def given(row: int) -> str:
        label = row_labels.labels[row]
        return replies[row] if label is None else row_labels.spelling.get(label, label)

    ranking = LabelRanking.blank(count, given, vectors)
    labelled = np.array([label is not None for label in row_labels.labels], bool) & ~skipped
    free_text = ~labelled & ~skipped & (settings.label in ("auto", "text"))
    facts: dict[str, Any] = {
        "label": row_labels.form,
        "label_because": row_labels.explanation,
        "other_labels": list(row_labels.others),
        **choice.facts(),
        "documents": int(documents.sum()),
        "prompts_cut": sum(step_input.table["cut"].to_pylist()),
    }
    if media.any():
        facts["rows_with_media"] = int(media.sum())
    facts |= _by_label(ranking, np.flatnonzero(labelled), inputs=inputs, row_labels=row_labels, seed=settings.seed)
    likeness = choice.likeness if settings.likeness is None else settings.likeness
    facts |= _by_replies(
        ranking, np.flatnonzero(free_text), texts=(prompts, replies), likeness=likeness, agreement=settings.agreement
    )
    facts["not_judged"] = ranking.kinds.count(NOT_JUDGED)
    facts["suspicious"] = int(ranking.wrong.sum())
    facts["estimated_errors"] = facts.get("label_errors", 0) + facts.get("reply_errors", 0)
    ranking.facts = facts
    return ranking


def without_frame(prompts: list[str]) -> list[str]:
    """Return the prompts without the words that all of them begin and end with.

    A shared instruction says nothing about the label of one row.
    """
    if len(prompts) < LEAST_ROWS:
        return prompts
    prefix = os.path.commonprefix([min(prompts), max(prompts)])
    reversed_prompts = [prompt[::-1] for prompt in prompts]
    suffix = os.path.commonprefix([min(reversed_prompts), max(reversed_prompts)])
    # cut whole words only, and leave something of the shortest prompt
    start, end = len(prefix), len(suffix)
    if prefix and not prefix[-1].isspace():
        start -= len(prefix.split()[-1])
    if suffix and not suffix[-1].isspace():
        end -= len(suffix.split()[-1])
    if start + end >= min(map(len, prompts)):
        return prompts
    return [prompt[start : len(prompt) - end] for prompt in prompts]


def _label_inputs(prompts: Sequence[str], systems: Texts) -> list[str]:
    """Return the texts by which labels are judged.

    They are the prompts, each after the start of its system message unless all system messages are equal.
    """
    if len(Counter(systems)) <= 1:
        return list(prompts)
    return [
        f"{system[:SYSTEM_CHARACTERS]}\n{prompt}" if system else prompt
        for system, prompt in zip(systems, prompts, strict=True)
    ]


def _by_label(
    ranking: LabelRanking, rows: I64, inputs: Sequence[str], row_labels: class_labels.ClassLabels, seed: int
) -> dict[str, Any]:
    """Judge the rows that have a label; return the facts. rows: (n,) row numbers."""
    if not len(rows):
        return {}
    labels = [row_labels.labels[row] or "" for row in rows.tolist()]
    names = sorted(set(labels))
    positions = {name: index for index, name in enumerate(names)}
    numbers = np.array([positions[label] for label in labels], np.int64)
    prompts = [inputs[row] for row in rows.tolist()]
    label_quality = confident_learning(prompts, ranking.vectors[rows], numbers, seed=seed)
    sizes = np.bincount(numbers)
    # distinct (prompt, label): a prompt that occurs twice among them has more than one label
    pairs = np.unique(np.stack([number(prompts), numbers]), axis=1)
    is_estimate_loose = len(rows) < FEW * len(names) * 2
    facts = {
        "labelled": len(rows),
        "labels": len(names),
        "labels_of_few_rows": int((sizes < FEW).sum()),
        "prompts_with_several_labels": int((np.bincount(pairs[0]) > 1).sum()),
        "judged_by": label_quality.method,
        "label_errors": label_quality.estimated_errors,
        "label_errors_are": "a loose estimate: too few rows per label" if is_estimate_loose else "an estimate",
    }
    if label_quality.reason:
        return {**facts, "not_judged_because": label_quality.reason}
    ranking.quality[rows], ranking.wrong[rows] = label_quality.quality, label_quality.wrong
    for row, suggested in zip(rows.tolist(), label_quality.suggested.tolist(), strict=True):
        ranking.kinds[row] = BY_LABEL
        ranking.suggested[row] = row_labels.spelling.get(names[suggested], names[suggested])
    return facts


def _by_replies(
    ranking: LabelRanking, rows: I64, texts: tuple[Texts, Texts], likeness: float, agreement: float
) -> dict[str, Any]:
    """Judge the rows whose replies are free text; return the facts. rows: (n,) row numbers."""
    if not len(rows):
        return {}
    prompts, replies = texts
    comparison = disagreement(
        [prompts[row] for row in rows.tolist()],
        [replies[row] for row in rows.tolist()],
        ranking.vectors[rows],
        likeness=likeness,
        agreement=agreement,
    )
    ranking.quality[rows], ranking.wrong[rows] = comparison.quality, comparison.wrong
    for index, row in enumerate(rows.tolist()):
        ranking.kinds[row] = BY_REPLY
        ranking.near[row] = [(int(rows[other]), score) for other, score in comparison.near.get(index, ())]
        if comparison.suggested[index] >= 0:
            ranking.suggested[row] = replies[int(rows[comparison.suggested[index]])]
    return {
        "free_text": len(rows),
        "free_text_compared": comparison.compared,
        "like_prompts": comparison.pairs,
        "contradicting_replies": comparison.contradicting,
        "reply_errors": comparison.estimated_errors,
    }
