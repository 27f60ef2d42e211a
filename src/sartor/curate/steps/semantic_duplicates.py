"""Step semantic_duplicates: removes rows with the same meaning in other words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from sartor.core.config import option
from sartor.core.errors import ConfigError
from sartor.core.records import Example
from sartor.curate.dedup import clusters
from sartor.curate.dedup.clusters import components, rank_positions
from sartor.curate.dedup.pair_scoring import DuplicateRules as pair_scoring_Rules
from sartor.curate.dedup.pair_scoring import ScoredPairs
from sartor.curate.step import Removal, StepInput, StepResult
from sartor.curate.steps.text_duplicates import KEEP_HELP, Field, Keep, has_media_or_rating, ranks
from sartor.text import encoders, equivalence

EVIDENCE = "semantic_pairs"
METHOD = "vectors and words"


@dataclass(frozen=True)
class SemanticDuplicates:
    """Remove rows close by their vectors and alike by their words; numbers, negations and antonyms must agree.

    Rows with an image, a recording or a rating are not compared, since their text is incomplete. `image_duplicates`
    compares images.
    """

    field: Field = option(
        "both", "what must be alike: prompt, reply, both (each of the two), or all (the row as one text)"
    )
    threshold: float | None = option(
        None, "cosine of the vectors from which a pair is looked at, 0..1; by default 0.8, tfidf's 0.4"
    )
    agreement: float = option(0.9, "share of words in common, rare ones weighing more, from which it is a pair, 0..1")
    encoder: str = option(
        "auto", "auto (minilm where it is installed, else tfidf), minilm, tfidf, or a model's directory"
    )
    keep: Keep = option("longest", KEEP_HELP)
    neighbours: int = option(20, "nearest rows of each row that are looked at")
    max_fraction: float = option(0.9, "the most of all rows that may be removed, 0..1; beyond, it stops and asks")
    max_source_fraction: float = option(0.75, "the most of one source that one cluster may remove, 0..1")
    allow: tuple[str, ...] = option((), "sources of which any part may be removed")
    kind: Literal["semantic_duplicates"] = "semantic_duplicates"

    def __post_init__(self) -> None:
        for name in ("threshold", "agreement", "max_fraction", "max_source_fraction"):
            if (value := getattr(self, name)) is not None and not 0 <= value <= 1:
                raise ConfigError(f"{name} is {value}, not between 0 and 1", f"{name}: {min(max(value, 0.0), 1.0):g}")
        if self.neighbours < 1:
            raise ConfigError(f"neighbours is {self.neighbours}, not 1 or more", "neighbours: 20")

    def sketch(self, examples: Sequence[Example], folder: Path) -> Any:
        """Return the columns text, reply, cut (whether a text was cut) and rank."""
        texts = [self._text(example)[: encoders.MOST_CHARACTERS] for example in examples]
        replies = [example.reply[: encoders.MOST_CHARACTERS] if self.field == "both" else "" for example in examples]
        return pa.table(
            {
                "text": pa.array(texts, pa.large_string()),
                "reply": pa.array(replies, pa.large_string()),
                "cut": pa.array(
                    [
                        encoders.is_cut(example) or len(self._text(example)) > encoders.MOST_CHARACTERS
                        for example in examples
                    ]
                ),
                "rank": ranks(examples, self.keep, self.field),
            }
        )

    def _text(self, example: Example) -> str:
        if has_media_or_rating(example):
            return ""  # an empty text is not compared
        prompt = encoders.prompt_text(example)
        if self.field == "all":
            return "\n".join(message.text for message in example.messages)
        return example.reply if self.field == "reply" or (self.field == "both" and not prompt) else prompt

    def decide(self, step_input: StepInput) -> StepResult:
        """Find the duplicates; return the removals, and the verified pairs as evidence.

        Raises GuardError if too many rows would be removed.
        """
        compared = self._compared(step_input)
        choice = encoders.choose_encoder(self.encoder)
        step_input.notice(
            f"semantic duplicates: {len(compared):,} of {len(step_input):,} rows; encoder {choice.encoder.name}"
        )
        table = step_input.table.take(pa.array(compared)) if len(compared) < len(step_input) else step_input.table
        texts, replies = encoders.Texts(table["text"]), encoders.Texts(table["reply"])
        threshold = choice.likeness if self.threshold is None else self.threshold
        semantic_pairs = SemanticPairs()
        if len(compared) > 1:
            embedded = choice.encoder.encode(texts)
            rules = SemanticRules(threshold, self.agreement, self.neighbours)
            compared_replies = replies if self.field == "both" else None
            semantic_pairs = pairs(
                texts,
                embedded,
                rules=rules,
                replies=compared_replies,
                rank=step_input.table["rank"].to_numpy()[compared],
            )
        removals = self._removals(step_input, compared, semantic_pairs)
        encoder_facts = {"encoder": "none", "encoder_because": "there is nothing to compare"}
        if len(compared) > 1:
            encoder_facts = choice.facts()
        facts = {
            **encoder_facts,
            "threshold": threshold,
            "compared": len(compared),
            "too_long_to_compare": sum(step_input.table["cut"].to_pylist()),
            "near_by_vectors": semantic_pairs.candidates,
            "rows_with_perhaps_more_near": semantic_pairs.crowded,
            "pairs": len(semantic_pairs.pairs),
            "refused_by_words": dict(sorted(semantic_pairs.refused.items())),
        }
        return StepResult(
            removals, {EVIDENCE: self._evidence(step_input, compared, semantic_pairs)}, facts, set_aside=True
        )

    def _compared(self, step_input: StepInput) -> Any:
        """Return the numbers of the rows with a complete text; cut texts may differ in the missing part."""
        whole = [not cut for cut in step_input.table["cut"].to_pylist()]
        has_text = [bool(text.strip()) for text in encoders.Texts(step_input.table["text"])]
        return np.flatnonzero(np.array(whole, bool) & np.array(has_text, bool))

    def _removals(self, step_input: StepInput, compared: Any, semantic_pairs: SemanticPairs) -> list[Removal]:
        if not semantic_pairs.pairs:
            return []
        scores = np.array([min(pair.likeness, pair.words) for pair in semantic_pairs.pairs], np.float32)
        a = np.array(compared[[pair.a for pair in semantic_pairs.pairs]], np.int64)
        b = np.array(compared[[pair.b for pair in semantic_pairs.pairs]], np.int64)
        edges = ScoredPairs(a, b, jaccard=scores, containment=np.zeros_like(scores), exact=np.zeros(len(a), bool))
        removals = clusters.resolve_clusters(
            edges, step_input.table["rank"].to_numpy(), pair_scoring_Rules(threshold=0.0, floor=0.0, contained=0.0)
        )
        limits = clusters.RemovalLimits(self.max_source_fraction, self.max_fraction, allow=self.allow, in_recipe=True)
        locators = step_input.table["locator"]
        sources = np.array(step_input.table["source"].to_pylist(), np.int64)
        clusters.check_removals(
            removals, sources, names=step_input.sources, limits=limits, describe=lambda row: str(locators[row].as_py())
        )
        row_removals = []
        for row, kept_row, score in zip(
            removals.rows.tolist(), removals.kept_rows.tolist(), removals.score.tolist(), strict=True
        ):
            row_removals.append(
                Removal(
                    row,
                    "semantic_duplicate",
                    detail=f"says the same as {locators[kept_row].as_py()}",
                    kept_row=kept_row,
                    score=round(float(score), 4),
                    method=METHOD,
                )
            )
        return row_removals

    def _evidence(self, step_input: StepInput, compared: Any, semantic_pairs: SemanticPairs) -> Any:
        ids, locators = step_input.table["id"], step_input.table["locator"]
        ends = [(int(compared[pair.a]), int(compared[pair.b]), pair) for pair in semantic_pairs.pairs]
        return pa.table(
            {
                "a": pa.array([ids[a].as_py() for a, _, _ in ends], pa.string()),
                "b": pa.array([ids[b].as_py() for _, b, _ in ends], pa.string()),
                "locator_a": pa.array([locators[a].as_py() for a, _, _ in ends], pa.string()),
                "locator_b": pa.array([locators[b].as_py() for _, b, _ in ends], pa.string()),
                "score": pa.array([min(pair.likeness, pair.words) for _, _, pair in ends], pa.float32()),
                "likeness": pa.array([pair.likeness for _, _, pair in ends], pa.float32()),
                "words": pa.array([pair.words for _, _, pair in ends], pa.float32()),
                "method": pa.array([METHOD] * len(ends), pa.string()),
            }
        )


# Replies with at most this many content words, and JSON, are labels or values: equal or different, but never alike.
FEW_WORDS = 3
_ROUNDS = 8


@dataclass(frozen=True)
class SemanticPair:
    """Rows a < b with the same meaning.

    likeness: cosine of their vectors.
    words: fraction of words in common; of two fields the lower one.
    """

    a: int
    b: int
    likeness: float
    words: float


@dataclass
class SemanticPairs:
    """Verified pairs, with counts of the candidates.

    candidates: pairs that were close by their vectors.
    crowded: rows with as many close rows as are examined, and perhaps more; equivalent rows of those were searched
    for.
    refused: objection of the words -> number of pairs.
    """

    pairs: list[SemanticPair] = field(default_factory=list)
    candidates: int = 0
    crowded: int = 0
    refused: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class SemanticRules:
    """Conditions for a pair.

    threshold: cosine of the vectors from which a pair is examined.
    agreement: fraction of words in common from which it is a pair.
    neighbours: nearest rows of each row that are examined.
    """

    threshold: float
    agreement: float
    neighbours: int


class _Verifier:
    """Verifier of pairs of rows, which collects those with the same meaning."""

    def __init__(
        self, texts: Sequence[str], vectors: Any, rules: SemanticRules, replies: Sequence[str] | None
    ) -> None:
        self.semantic_pairs, self.rules = SemanticPairs(), rules
        self._vectors, self._replies = vectors, replies
        self._read, self._weights = equivalence.reader(texts), equivalence.idf_weights(texts)
        self._answer = equivalence.reader(replies or ())
        self._answer_weights = equivalence.idf_weights(replies or ())
        self._tried: set[tuple[int, int]] = set()

    def verify(self, a: int, b: int) -> bool:
        """Return whether two rows have the same meaning; a pair is examined once, and False on later calls."""
        a, b = min(a, b), max(a, b)
        likeness = min(float(self._vectors[a] @ self._vectors[b]), 1.0)
        if (a, b) in self._tried or likeness < self.rules.threshold:
            return False
        self._tried.add((a, b))
        self.semantic_pairs.candidates += 1
        verdict = equivalence.compare_texts(self._read(a), self._read(b), self._weights)
        prefix = ""
        if self._replies is not None and not verdict.objection and verdict.score >= self.rules.agreement:
            reply = same_reply(
                (self._replies[a], self._replies[b]), self._answer(a), self._answer(b), self._answer_weights
            )
            prefix = "" if reply.score >= self.rules.agreement else "reply_"
            verdict = min((verdict, reply), key=lambda candidate: candidate.score)
        if verdict.objection or verdict.score < self.rules.agreement:
            self.semantic_pairs.refused[prefix + (verdict.objection or "words")] += 1
            return False
        self.semantic_pairs.pairs.append(SemanticPair(a, b, likeness, verdict.score))
        return True


def pairs(
    texts: Sequence[str], vectors: Any, rules: SemanticRules, replies: Sequence[str] | None, rank: Any
) -> SemanticPairs:
    """Return the pairs of N texts with the same meaning, by vectors (N, D) and words.

    replies: if given, the replies of a pair must agree as well.
    rank: (N,); the row of the highest rank stays. In a large group of equivalent rows, more than the nearest rows of a
    row are examined, so that each row is compared with the one that stays.
    """
    verifier = _Verifier(texts, vectors, rules, replies)
    near = encoders.NearPairs(vectors, rules.threshold, rules.neighbours)
    for a, b, _ in near:
        verifier.verify(a, b)
    if near.crowded:
        _complete(verifier, len(texts), rank_positions(rank))
    verifier.semantic_pairs.crowded = near.crowded
    verifier.semantic_pairs.pairs.sort(key=lambda pair: (pair.a, pair.b))
    return verifier.semantic_pairs


def _complete(verifier: _Verifier, count: int, positions: Any) -> None:
    """Compare the rows of each connected component with its highest-ranked row.

    Those that are not equivalent to it are compared with the next one.
    """
    ends = np.array([(pair.a, pair.b) for pair in verifier.semantic_pairs.pairs], np.int64).reshape(-1, 2)
    labels: Any = components(count, ends[:, 0], ends[:, 1])
    rows_by_label: dict[int, list[int]] = {}
    for row in np.unique(ends).tolist():
        rows_by_label.setdefault(int(labels[row]), []).append(row)
    linked_pairs = {(pair.a, pair.b) for pair in verifier.semantic_pairs.pairs}
    for rows in rows_by_label.values():
        rows.sort(key=lambda row: int(positions[row]))
        for _ in range(_ROUNDS):
            if len(rows) < 3:
                break
            head = rows[0]
            rows = [
                row
                for row in rows[1:]
                if (min(head, row), max(head, row)) not in linked_pairs and not verifier.verify(head, row)
            ]


def same_reply(
    texts: tuple[str, str], first: equivalence.TextReading, second: equivalence.TextReading, weights: dict[str, float]
) -> equivalence.EquivalenceVerdict:
    """Compare two replies as `equivalence.compare_texts` does; values and JSON must be equal.

    In a value, one letter may change the meaning.
    """
    if is_value(texts[0], first) or is_value(texts[1], second):
        return equivalence.EquivalenceVerdict(1.0 if texts[0].split() == texts[1].split() else 0.0)
    return equivalence.compare_texts(first, second, weights)


def is_value(text: str, read: equivalence.TextReading) -> bool:
    """Return whether a reply is a value and not a sentence."""
    return text.lstrip()[:1] in ("{", "[", "<") or len(read.content({})) <= FEW_WORDS
