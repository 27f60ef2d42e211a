"""Step domain: keeps rows of a domain by a classifier fitted on a few labelled examples.

The classifier is logistic regression with balanced class weights on TF-IDF of words (1- and 2-grams) and of character
n-grams within words (2 to 5). It is fitted once per process, from the examples alone, and deterministic. The facts
give its accuracy on the examples by stratified cross-validation with at most 5 folds: each example is predicted by a
classifier that was not fitted on it.
"""

from __future__ import annotations

import csv
import difflib
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from sartor.core.config import REQUIRED, option
from sartor.core.errors import ConfigError, missing_package
from sartor.core.records import Example, MalformedRow
from sartor.curate.sources import row_readers
from sartor.curate.step import Removal, StepInput, StepResult
from sartor.text.example_text import FIELD_TEXT, Field, texts

FEWEST = 5  # examples that each label needs
_MAX_CHARACTERS = 4000  # characters of a row that are read
_MOST_BYTES = 4 << 20


@dataclass(frozen=True)
class Labelled:
    """Text with its label."""

    text: str = option(REQUIRED, "a text as the rows have them")
    label: str = option(REQUIRED, "its label")


@dataclass(frozen=True)
class Domain:
    """Keep the rows to which a classifier, fitted on labelled examples, assigns the wanted labels."""

    examples: str | tuple[Labelled, ...] = option(
        REQUIRED, "a JSONL, JSON, CSV or Parquet file with text and label, or a list of them"
    )
    keep: tuple[str, ...] = option(REQUIRED, "labels that stay")
    min_probability: float = option(
        0.5, "probability that a row is of one of them, from which on it stays; above 0, below 1"
    )
    field: Field = option("all", FIELD_TEXT)
    kind: Literal["domain"] = "domain"

    def __post_init__(self) -> None:
        if not self.keep:
            raise ConfigError("keep names no label, so every row would go", "keep: [label]")
        if not 0 < self.min_probability < 1:
            raise ConfigError(
                f"min_probability is {self.min_probability}; it must be above 0 and below 1", "min_probability: 0.5"
            )
        if not isinstance(self.examples, str):
            _check(self.examples, self.keep, "examples")

    def files(self) -> Sequence[Path]:
        """Return the file of examples, if there is one."""
        file = Path(self.examples).expanduser() if isinstance(self.examples, str) else None
        return [file] if file and file.is_file() else []

    def sketch(self, examples: Sequence[Example], folder: Path) -> Any:
        """Return the columns label (most probable), wanted (probability of the wanted labels) and is_blank."""
        model = self._model()
        row_texts = ["\n".join(texts(example, self.field))[:_MAX_CHARACTERS] for example in examples]
        probabilities = model.probabilities(row_texts) if row_texts else np.empty((0, len(model.labels)))
        wanted_probabilities = probabilities[
            :, [index for index, label in enumerate(model.labels) if label in self.keep]
        ].sum(axis=1)
        best = probabilities.argmax(axis=1) if len(row_texts) else np.empty(0, int)
        return pa.table(
            {
                "label": pa.array([model.labels[index] for index in best], pa.string()),
                "wanted": pa.array(wanted_probabilities, pa.float32()),
                "is_blank": pa.array([not text.strip() for text in row_texts], pa.bool_()),
            }
        )

    def decide(self, step_input: StepInput) -> StepResult:
        """Return the removals of rows whose probability of the wanted labels is too low; rows without text stay."""
        model = self._model()
        labels = step_input.table["label"].to_pylist()
        wanted_probabilities = step_input.table["wanted"].to_numpy()
        blank = step_input.table["is_blank"].to_pylist()
        removals = []
        for row in np.flatnonzero(wanted_probabilities < np.float32(self.min_probability)):
            text = (
                f"likeliest {labels[row]!r}; {', '.join(self.keep)} with {wanted_probabilities[row]:.2f}, at least "
                f"{self.min_probability}"
            )
            accuracy = f"the classifier's accuracy on its own examples, cross-validated: {model.accuracy:.2f}"
            if not blank[row]:
                removals.append(
                    Removal(int(row), "domain", f"{text}; {accuracy}", score=float(wanted_probabilities[row]))
                )
        facts = {
            "labels": dict(
                Counter(label for label, is_blank in zip(labels, blank, strict=True) if not is_blank).most_common()
            ),
            "without_text_kept": sum(blank),
            "examples": model.counts,
            "accuracy": round(model.accuracy, 4),
            "accuracy_by_chance": round(max(model.counts.values()) / sum(model.counts.values()), 4),
        }
        if model.accuracy < 0.8:
            step_input.notice(
                f"domain: the classifier is right on {model.accuracy:.0%} of its own examples; give it more of them"
            )
        return StepResult(removals, facts=facts)

    def _model(self) -> _Model:
        if not isinstance(self.examples, str):
            return _fitted(self.examples)
        examples = _read(self.examples, Path(self.examples).stat().st_mtime_ns if Path(self.examples).is_file() else 0)
        _check(examples, self.keep, self.examples)
        return _fitted(examples)


@dataclass(frozen=True)
class _Model:
    labels: list[str]
    pipeline: Any
    accuracy: float
    counts: dict[str, int]

    def probabilities(self, row_texts: Sequence[str]) -> Any:
        """Return the probabilities of the labels, (N, L); rows sum to 1."""
        return self.pipeline.predict_proba(row_texts)


def _check(examples: Sequence[Labelled], keep: Sequence[str], where: str) -> None:
    counts = Counter(example.label for example in examples)
    if len(counts) < 2:
        raise ConfigError(
            f"{where} has {len(counts)} label(s); a classifier needs at least 2", "add examples of what should go"
        )
    for label in keep:
        if label not in counts:
            meant = [next(iter(difflib.get_close_matches(name, counts, n=1)), "") for name in keep]
            remedy = f"keep: [{', '.join(meant)}]" if all(meant) else "keep: some of these labels"
            raise ConfigError(f"keep names {label!r}, but {where} has only {', '.join(sorted(counts))}", remedy)
    if all(label in keep for label in counts):
        raise ConfigError("keep names every label, so no row would go", "leave out the labels of what should go")
    fewest, count = min(counts.items(), key=lambda item: (item[1], item[0]))
    if count < FEWEST:
        raise ConfigError(
            f"{where} has {count} examples of {fewest!r}; at least {FEWEST} are needed",
            f'add {FEWEST - count} or more rows {{"text": "...", "label": "{fewest}"}}',
        )
    if any(not example.text.strip() for example in examples):
        raise ConfigError(f"{where} has an example without text", 'delete its rows with "text": ""')


@cache
def _read(path: str, stamp: int) -> tuple[Labelled, ...]:
    """Read the examples in a file.

    Raises ConfigError that names the first unusable row.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(
            f"examples: there is no file {path!r}",
            f"ls {shlex.quote(str(file.parent))}; the path is taken from the current directory",
        )
    examples = []
    try:
        for line, row in row_readers.read_rows(file, _MOST_BYTES):
            if isinstance(row, MalformedRow):
                raise ConfigError(
                    f"{path}:{line}: {row.detail}",
                    f'write line {line} as {{"text": "...", "label": "..."}}, or delete it',
                )
            text, label = (row.get("text"), row.get("label")) if isinstance(row, dict) else (None, None)
            if not isinstance(text, str) or not isinstance(label, (str, int)):
                raise ConfigError(
                    f"{path}:{line} has no text and label", 'rows such as {"text": "...", "label": "..."}'
                )
            examples.append(Labelled(text, str(label)))
    except csv.Error as error:
        raise ConfigError(
            f"{path} is no CSV: {error}",
            f'write {path} as JSONL instead: {{"text": "...", "label": "..."}} on each line',
        ) from None
    return tuple(examples)


@cache
def _fitted(examples: tuple[Labelled, ...]) -> _Model:
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedKFold, cross_val_predict
        from sklearn.pipeline import make_pipeline, make_union
    except ImportError:
        raise missing_package("scikit-learn") from None
    # sorted, so that the order of the examples has no effect
    ordered = sorted(set(examples), key=lambda example: (example.label, example.text))
    example_texts, labels = (
        [example.text[:_MAX_CHARACTERS] for example in ordered],
        [example.label for example in ordered],
    )
    counts = Counter(labels)
    pipeline = make_pipeline(
        make_union(
            TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b"),
            TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True),
        ),
        LogisticRegression(C=20.0, class_weight="balanced", max_iter=2000, random_state=0),
    )
    folds = (
        StratifiedKFold(min(5, min(counts.values())), shuffle=True, random_state=0)
        if min(counts.values()) > 1
        else None
    )
    predictions = cross_val_predict(pipeline, example_texts, labels, cv=folds) if folds else [""] * len(labels)
    accuracy = float(np.mean([prediction == label for prediction, label in zip(predictions, labels, strict=True)]))
    pipeline.fit(example_texts, labels)
    return _Model([str(label) for label in pipeline.classes_], pipeline, accuracy, dict(sorted(counts.items())))
