"""Step suspicious_labels: ranks likely label errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from sartor.core.config import option
from sartor.core.errors import ConfigError, GuardError
from sartor.core.records import Example
from sartor.curate.labels import class_labels
from sartor.curate.labels.label_ranking import (
    BY_LABEL,
    SHOWN_CHARACTERS,
    LabelRanking,
    LabelSettings,
    rank_labels,
    table,
)
from sartor.curate.step import Removal, StepInput, StepResult
from sartor.curate.steps.text_duplicates import has_media
from sartor.text import encoders

__all__ = ["BY_LABEL", "EVIDENCE", "SHOWN_CHARACTERS", "SuspiciousLabels"]  # the constants describe the evidence
EVIDENCE = "suspicious_labels"


@dataclass(frozen=True)
class SuspiciousLabels:
    """Rank rows by how little their label or answer agrees with similar rows.

    Rows with an image or a recording are not judged: their text does not show their content.
    """

    label: str = option(
        "auto",
        "where the label is: auto, reply, json:KEY, regex:PATTERN (its first group), or text: replies are compared",
    )
    encoder: str = option(
        "auto", "auto (minilm where it is installed, else tfidf), minilm, tfidf, or a model's directory"
    )
    queue_fraction: float = option(
        0.25, "part of the rows that the queue holds, 0..1; never fewer than those that look wrong"
    )
    action: Literal["review", "drop"] = option("review", "drop also removes the rows that look wrong")
    max_fraction: float = option(0.1, "the most of the rows that drop may remove, 0..1; beyond, it stops and asks")
    likeness: float | None = option(
        None, "free text: cosine from which two prompts are compared, 0..1; by default 0.8, tfidf's 0.4"
    )
    agreement: float = option(
        0.9, "free text: share of two prompts' words in common from which they ask the same, 0..1"
    )
    seed: int = option(0, "of the folds")
    kind: Literal["suspicious_labels"] = "suspicious_labels"

    def __post_init__(self) -> None:
        class_labels.check(self.label)
        for name in ("queue_fraction", "max_fraction", "likeness", "agreement"):
            if (value := getattr(self, name)) is not None and not 0 <= value <= 1:
                raise ConfigError(f"{name} is {value}, not between 0 and 1", f"{name}: {min(max(value, 0.0), 1.0):g}")

    def sketch(self, examples: Sequence[Example], folder: Path) -> Any:
        """Return the columns prompt, system and reply, and flags for cut texts, documents and media."""
        cut = encoders.MOST_CHARACTERS
        return pa.table(
            {
                "prompt": pa.array([encoders.prompt_text(example) for example in examples], pa.large_string()),
                "system": pa.array([encoders.system_text(example) for example in examples], pa.large_string()),
                "reply": pa.array([example.reply[:cut] for example in examples], pa.large_string()),
                "cut": pa.array([encoders.is_cut(example) for example in examples], pa.bool_()),
                "document": pa.array([example.is_document for example in examples], pa.bool_()),
                "media": pa.array([has_media(example) for example in examples], pa.bool_()),
            }
        )

    def decide(self, step_input: StepInput) -> StepResult:
        """Rank the rows; write the queue, and remove rows if the action is `drop`.

        Raises GuardError if `drop` would remove more than `max_fraction`.
        """
        ranking = rank_labels(
            step_input,
            LabelSettings(self.label, self.encoder, likeness=self.likeness, agreement=self.agreement, seed=self.seed),
        )
        removals = self._removals(step_input, ranking) if self.action == "drop" else []
        queue_size = max(int(np.ceil(self.queue_fraction * len(step_input))), int(ranking.wrong.sum()))
        queue = table(step_input, ranking, queue_size)
        return StepResult(removals, {EVIDENCE: queue}, {**ranking.facts, "queue": queue.num_rows})

    def _removals(self, step_input: StepInput, ranking: LabelRanking) -> list[Removal]:
        rows = np.flatnonzero(ranking.wrong)
        if len(rows) > self.max_fraction * len(step_input):
            # rounded up to hundredths
            fraction = np.ceil(100 * (len(rows) / len(step_input)) - 1e-9) / 100
            raise GuardError(
                f"{len(rows):,} of {len(step_input):,} labels look wrong, more than the fraction "
                f"{self.max_fraction:g} that may go without asking",
                f"action: review, and look at evidence/{EVIDENCE}.parquet; else max_fraction: {fraction:g}",
            )
        return [
            Removal(
                row,
                "suspicious_label",
                ranking.sentence(row),
                score=float(ranking.quality[row]),
                method=ranking.kinds[row],
            )
            for row in rows.tolist()
        ]
