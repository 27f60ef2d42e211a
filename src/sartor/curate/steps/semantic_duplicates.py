"""`semantic_duplicates`: rows that say the same in other words; one of each stays, every pair is evidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from sartor.core.config import option
from sartor.core.errors import ConfigError
from sartor.core.records import Example
from sartor.curate.dedup import clusters
from sartor.curate.dedup.pairs import Pairs
from sartor.curate.dedup.verify import Rules
from sartor.curate.likeness import meaning
from sartor.curate.steps.contract import Gathered, Removal, Verdicts
from sartor.curate.steps.survivor import KEEP_HELP, Field, Keep, is_apart, ranks
from sartor.text import encoders

EVIDENCE = "semantic_pairs"
METHOD = "vectors and words"


@dataclass(frozen=True)
class SemanticDuplicates:
    """Rows near by their vectors and alike by their words are one; numbers, negations and opposites must agree.

    Rows with an image or a recording are let be: their text does not tell what they show. `image_duplicates` compares them.
    """

    field: Field = option("both", "what must be alike: prompt, reply, both (each of the two), or all (the row as one text)")
    threshold: float | None = option(
        None, "cosine of the vectors from which a pair is looked at, 0..1; by default 0.8, tfidf's 0.4"
    )
    agreement: float = option(0.9, "share of words in common, rare ones weighing more, from which it is a pair, 0..1")
    encoder: str = option("auto", "auto (minilm where it is installed, else tfidf), minilm, tfidf, or a model's directory")
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
        """See SetStep: the texts that are compared, whether they were cut, and what the choice of a survivor goes by."""
        texts = [self._text(example)[: encoders.MOST_CHARACTERS] for example in examples]
        replies = [example.reply[: encoders.MOST_CHARACTERS] if self.field == "both" else "" for example in examples]
        return pa.table(
            {
                "text": pa.array(texts, pa.large_string()),
                "reply": pa.array(replies, pa.large_string()),
                "cut": pa.array(
                    [encoders.is_cut(example) or len(self._text(example)) > encoders.MOST_CHARACTERS for example in examples]
                ),
                "rank": ranks(examples, self.keep, self.field),
            }
        )

    def _text(self, example: Example) -> str:
        if is_apart(example):
            return ""  # compared with nothing
        prompt = encoders.prompt_text(example)
        if self.field == "all":
            return "\n".join(message.text for message in example.messages)
        return example.reply if self.field == "reply" or (self.field == "both" and not prompt) else prompt

    def decide(self, gathered: Gathered) -> Verdicts:
        """See SetStep. Raises GuardError when more would go than its guards allow."""
        compared = self._compared(gathered)
        chosen = encoders.choose(self.encoder)
        gathered.notice(f"semantic duplicates: {len(compared):,} of {len(gathered):,} rows; encoder {chosen.encoder.name}")
        table = gathered.table.take(pa.array(compared)) if len(compared) < len(gathered) else gathered.table
        texts, replies = encoders.Texts(table["text"]), encoders.Texts(table["reply"])
        threshold = chosen.likeness if self.threshold is None else self.threshold
        found = meaning.Found()
        if len(compared) > 1:
            embedded = chosen.encoder.encode(texts)
            rules = meaning.Rules(threshold, self.agreement, self.neighbours)
            said = replies if self.field == "both" else None
            found = meaning.pairs(texts, embedded, rules, said, gathered.table["rank"].to_numpy()[compared])
        removals = self._removals(gathered, compared, found)
        facts = {
            **(chosen.facts() if len(compared) > 1 else {"encoder": "none", "encoder_because": "there is nothing to compare"}),
            "threshold": threshold,
            "compared": len(compared),
            "too_long_to_compare": sum(gathered.table["cut"].to_pylist()),
            "near_by_vectors": found.candidates,
            "rows_with_perhaps_more_near": found.crowded,
            "pairs": len(found.pairs),
            "refused_by_words": dict(sorted(found.refused.items())),
        }
        return Verdicts(removals, {EVIDENCE: self._evidence(gathered, compared, found)}, facts, set_aside=True)

    def _compared(self, gathered: Gathered) -> Any:
        """Row numbers with a whole text. What was cut may differ where it was cut."""
        whole = [not cut for cut in gathered.table["cut"].to_pylist()]
        spoken = [bool(text.strip()) for text in encoders.Texts(gathered.table["text"])]
        return np.flatnonzero(np.array(whole, bool) & np.array(spoken, bool))

    def _removals(self, gathered: Gathered, compared: Any, found: meaning.Found) -> list[Removal]:
        if not found.pairs:
            return []
        scores = np.array([min(pair.likeness, pair.words) for pair in found.pairs], np.float32)
        a, b = (np.array(compared[[getattr(pair, end) for pair in found.pairs]], np.int64) for end in ("a", "b"))
        edges = Pairs(a, b, scores, np.zeros_like(scores), np.zeros(len(a), bool))
        gone = clusters.resolve(edges, gathered.table["rank"].to_numpy(), Rules(threshold=0.0, floor=0.0, contained=0.0))
        limits = clusters.Limits(self.max_source_fraction, self.max_fraction, allow=self.allow, in_recipe=True)
        locators = gathered.table["locator"]
        sources = np.array(gathered.table["source"].to_pylist(), np.int64)
        clusters.guard(gone, sources, gathered.sources, limits, lambda row: str(locators[row].as_py()))
        return [
            Removal(
                row, "semantic_duplicate", f"says the same as {locators[kept].as_py()}", kept, round(float(score), 4), METHOD
            )
            for row, kept, score in zip(*(np.asarray(end).tolist() for end in (gone.rows, gone.kept, gone.score)), strict=True)
        ]

    def _evidence(self, gathered: Gathered, compared: Any, found: meaning.Found) -> Any:
        ids, locators = gathered.table["id"], gathered.table["locator"]
        ends = [(int(compared[pair.a]), int(compared[pair.b]), pair) for pair in found.pairs]
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
