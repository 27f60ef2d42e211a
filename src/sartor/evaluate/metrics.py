"""Metrics of two models with intervals.

Every metric is a function of sums over rows, so that it can be computed for each set of groups anew: macro-F1 and
the word error rate are of the whole set, and no mean over rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from sartor.core.errors import ConfigError
from sartor.core.reply_markup import is_reasoning, without_reasoning
from sartor.evaluate import bootstrap
from sartor.evaluate.bootstrap import Comparison
from sartor.evaluate.reply_labels import WHOLE, is_no_object, known_fields, label_of
from sartor.evaluate.scorers import SCORERS, is_mismatch, word_errors

Array = NDArray[np.float64]
OF_LABELS = ("accuracy", "macro_f1")
# What `--scorer` may name
NAMES = (*SCORERS, "wer", *OF_LABELS)
# What `--metrics` may name: of a reply, of its confidence, of the reference
ALL_METRICS = (*NAMES, "ece", "loss")
LOWER_IS_BETTER = frozenset({"loss", "wer", "ece"})
BINS = 15


@dataclass(frozen=True)
class ModelOutputs:
    """What one side did with the rows of a task, row by row.

    loss: nats per supervised token, of which there are `tokens`. confidence: the probability that the side gave to the
    label that it named, the product over the tokens that spell it; 0 where it named none. is_cut: whether a reply was
    not written on, since its scores were decided. What was not measured may be empty.

    replies: as they were written. answers: without the reasoning before them; these are scored, since a reference has
    none.
    is_opened: the chat template has opened the reasoning of each.
    """

    replies: Sequence[str]
    loss: Sequence[float] = ()
    tokens: Sequence[int] = ()
    confidence: Sequence[float] = ()
    is_cut: Sequence[bool] = ()
    is_opened: bool = False

    @cached_property
    def answers(self) -> list[str]:
        """Each reply without its reasoning."""
        return [without_reasoning(reply, is_opened=self.is_opened) for reply in self.replies]


class MetricSet:
    """The metrics of rows with these references.

    groups: rows of one group fail together. field: where JSON replies name a class (`labels.py`). labels: the class of
    each reference, None for a row without one; by default read at `field`. transcripts: places of the rows whose
    reference is what was said in a recording.

    - exact_match, f1, rouge_l: means over rows (`scorers.py`). loss: nats per token.
    - accuracy: the fraction of replies that name the reference's class. A reply without a class is wrong.
    - macro_f1: the mean over the classes of the references, of each the harmonic mean of precision and recall. A reply
      without a class, or with one that no reference has, is a class of its own: the recall of the right one falls.
    - ece: expected calibration error (Guo et al. 2017, arXiv:1706.04599), 15 equal bins of confidence.
    - wer: words wrong over words said, of all transcripts together.

    Raises ConfigError where no reference has the field.
    """

    def __init__(
        self,
        references: Sequence[str],
        groups: Sequence[str],
        field: str = "",
        labels: Sequence[str | None] | None = None,
        transcripts: Iterable[int] = (),
    ) -> None:
        self.references, self.groups, self.field = list(references), list(groups), field
        self.labels = (
            list(labels) if labels is not None else [label_of(text, field) if field else None for text in references]
        )
        self.labelled = [index for index, label in enumerate(self.labels) if label is not None]
        self.transcripts = sorted(transcripts)
        if field and not self.labelled:
            fields = known_fields(self.references)
            raise ConfigError(f"no reference has the field {field!r}", f"--label {' | '.join(fields) or WHOLE}")
        self.classes = sorted({str(self.labels[index]) for index in self.labelled})

    @property
    def classes_or_references(self) -> list[str]:
        """The class of each labelled row; without labels, each reference."""
        return [str(self.labels[index]) for index in self.labelled] or self.references

    @property
    def names(self) -> list[str]:
        """The metrics of replies that these rows have."""
        return [*SCORERS, *(["wer"] if self.transcripts else []), *(OF_LABELS if self.labelled else ())]

    def check(self, name: str) -> None:
        """Raise ConfigError unless these rows have the metric `name`."""
        if name in self.names:
            return
        reason = "; it needs --label FIELD" if name in OF_LABELS else "; it needs recordings with their transcripts"
        raise ConfigError(
            f"there is no {name} of these rows{reason if name in NAMES else ''}", f"--scorer {' | '.join(self.names)}"
        )

    def of(self, indices: Sequence[int]) -> MetricSet:
        """The same of some of the rows, in the order of `indices`."""
        labels = [self.labels[index] for index in indices]
        transcripts = set(self.transcripts)
        new_transcripts = [new for new, index in enumerate(indices) if index in transcripts]
        # where none of them is labelled the field has been checked already
        field = self.field if any(label is not None for label in labels) else ""
        return MetricSet(
            [self.references[index] for index in indices],
            [self.groups[index] for index in indices],
            field,
            labels,
            new_transcripts,
        )

    def is_decided(self, index: int, reply_so_far: str, metrics: Iterable[str]) -> bool:
        """Whether no continuation of the reply to a row can change one of `metrics`."""
        return all(self._is_metric_decided(name, index, reply_so_far) for name in metrics)

    def _is_metric_decided(self, name: str, index: int, reply_so_far: str) -> bool:
        label = self.labels[index]
        answer, has_answer = without_reasoning(reply_so_far), not is_reasoning(reply_so_far)
        if name in SCORERS:
            return has_answer and SCORERS[name].is_decided(answer, self.references[index])
        if name == "loss":  # of the reference
            return True
        if name == "wer":
            return index not in self.transcripts
        if label is None or self.field != WHOLE:  # what names no label has no confidence either
            return label is None or (has_answer and is_no_object(answer))
        if name == "ece":
            return False
        possible_labels = [label] if name == "accuracy" else self.classes
        return has_answer and all(is_mismatch(answer, possible) for possible in possible_labels)

    def check_all(self, names: Sequence[str]) -> None:
        """Raise ConfigError unless these rows have every metric of `names`, the scores of a reply among them."""
        for name in names:
            if name == "ece" and not self.labelled:
                raise ConfigError("there is no ece of these rows; it needs --label FIELD", "--label FIELD")
            if name not in ("ece", "loss"):
                self.check(name)
        if names and not set(names) & set(self.names):
            raise ConfigError(f"--metrics {' '.join(names)} scores no reply", f"--metrics {' | '.join(self.names)}")

    def compared(self, before: ModelOutputs, after: ModelOutputs, only: Collection[str] = ()) -> dict[str, Comparison]:
        """Every metric of both sides, or those of `only`."""
        only = only or (*self.names, "ece", "loss")
        result = {name: self.compare(name, before, after) for name in self.names if name in only}
        if self.labelled and before.confidence and after.confidence and "ece" in only:
            result["ece"] = self._calibration(before, after)
        if before.loss and after.loss and "loss" in only:
            result["loss"] = bootstrap.paired_bootstrap(
                before.loss, after.loss, self.groups, before.tokens, is_bounded=False
            )
        return result

    def compare(self, name: str, before: ModelOutputs, after: ModelOutputs) -> Comparison:
        """One metric of `names`. Raises ConfigError for another."""
        self.check(name)
        if name == "macro_f1":
            return self._macro_f1(before, after)
        if name == "wer":
            return self._word_error_rate(before, after)
        indices = self.labelled if name == "accuracy" else range(len(self.references))
        base, tuned = ([self._score(name, side, index) for index in indices] for side in (before, after))
        return bootstrap.paired_bootstrap(base, tuned, self._groups(indices))

    def by_row(self, side: ModelOutputs, only: Collection[str] = ()) -> dict[str, list[float | None]]:
        """Scores of each row; None where it has none: accuracy of a row without a label, word errors of no transcript.

        only: metrics, of which those are given that are scores of a row, or that such a score makes up.
        """
        indices = range(len(self.references))
        result: dict[str, list[float | None]] = {
            name: [self._score(name, side, index) for index in indices] for name in SCORERS if not only or name in only
        }
        if self.labelled and (not only or set(OF_LABELS) & set(only)):
            result["accuracy"] = [
                None if self.labels[index] is None else self._score("accuracy", side, index) for index in indices
            ]
        if self.transcripts and (not only or "wer" in only):
            transcripts = set(self.transcripts)
            result["wer"] = [
                self._errors(side, index)[0] / max(self._errors(side, index)[1], 1) if index in transcripts else None
                for index in indices
            ]
        return result

    def _score(self, name: str, side: ModelOutputs, index: int) -> float:
        if name == "accuracy":
            return float(label_of(side.answers[index], self.field) == self.labels[index])
        return SCORERS[name].score(side.answers[index], self.references[index])

    def _errors(self, side: ModelOutputs, index: int) -> tuple[int, int]:
        return word_errors(side.answers[index], self.references[index])

    def _groups(self, indices: Iterable[int]) -> list[str]:
        return [self.groups[index] for index in indices]

    def _word_error_rate(self, before: ModelOutputs, after: ModelOutputs) -> Comparison:
        base, tuned = (
            np.array([self._errors(side, index) for index in self.transcripts], float) for side in (before, after)
        )
        groups, widest = self._groups(self.transcripts), max(1.0, float(_rate(base).max()), float(_rate(tuned).max()))
        return bootstrap.corpus_bootstrap(base, tuned, groups, _rate, widest=widest)

    def _macro_f1(self, before: ModelOutputs, after: ModelOutputs) -> Comparison:
        count, class_index = len(self.classes), {label: index for index, label in enumerate(self.classes)}
        base, tuned = (self._counted(side, class_index) for side in (before, after))

        def macro(sums: Array) -> Array:
            correct, predicted, expected = (sums[:, start : start + count] for start in (0, count, 2 * count))
            # a class that a set of groups has no row of is no class of it
            is_present, f1 = expected > 0, 2 * correct / (predicted + expected).clip(1)
            return np.asarray((f1 * is_present).sum(1) / is_present.sum(1).clip(1))

        return bootstrap.corpus_bootstrap(base, tuned, self._groups(self.labelled), macro)

    def _counted(self, side: ModelOutputs, class_index: Mapping[str, int]) -> Array:
        """(rows with a label, 3 classes): whether each is the one that is rightly said, that is said, that is
        wanted.
        """
        count = len(class_index)
        counted = np.zeros((len(self.labelled), 3 * count))
        for row, index in enumerate(self.labelled):
            expected, label = class_index[str(self.labels[index])], label_of(side.answers[index], self.field)
            counted[row, 2 * count + expected] = 1
            if label is not None and label in class_index:
                predicted = class_index[label]
                counted[row, count + predicted] = 1
                counted[row, predicted] = float(predicted == expected)
        return counted

    def _calibration(self, before: ModelOutputs, after: ModelOutputs) -> Comparison:
        base, tuned = (self._binned(side) for side in (before, after))
        return bootstrap.corpus_bootstrap(base, tuned, self._groups(self.labelled), _gap)

    def _binned(self, side: ModelOutputs) -> Array:
        """(rows with a label, bins + 1): confidence less whether it was right, in its bin (a, b]; and 1, to count
        rows.
        """
        binned = np.zeros((len(self.labelled), BINS + 1))
        binned[:, -1] = 1
        for row, index in enumerate(self.labelled):
            confidence = side.confidence[index]
            binned[row, max(int(np.ceil(confidence * BINS)) - 1, 0)] = confidence - self._score(
                "accuracy", side, index
            )
        return binned


def _rate(sums: Array) -> Array:
    """(R, 2) words wrong and words said -> (R,); silence that something was heard in counts as one word."""
    return np.asarray(sums[:, 0] / sums[:, 1].clip(1))


def _gap(sums: Array) -> Array:
    """(R, bins + 1) -> (R,)."""
    return np.asarray(np.abs(sums[:, :-1]).sum(1) / sums[:, -1])
