"""Metrics of two models with intervals.

Every metric is a function of sums over rows, so that it can be recomputed for each set of groups. Macro-F1 and the
word error rate are metrics of the whole set, not means over rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from sartor.core.errors import ConfigError, one_of
from sartor.core.reply_markup import is_reasoning, without_reasoning
from sartor.evaluate import bootstrap
from sartor.evaluate.bootstrap import Comparison, FlipTest
from sartor.evaluate.reply_labels import WHOLE, is_no_object, known_fields, label_of
from sartor.evaluate.scorers import SCORERS, is_mismatch, word_errors

Array = NDArray[np.float64]
OF_LABELS = ("accuracy", "macro_f1")
# Values of `--scorer`
NAMES = (*SCORERS, "wer", *OF_LABELS)
# Values of `--metrics`: scores of a reply, of its confidence, and of the reference
ALL_METRICS = (*NAMES, "ece", "loss")
LOWER_IS_BETTER = frozenset({"loss", "wer", "ece"})
BINS = 15


@dataclass(frozen=True)
class ModelOutputs:
    """Outputs of one side on the rows of a task, row by row. What was not measured may be empty.

    replies: as they were written.
    loss: nats per supervised token.
    tokens: number of supervised tokens.
    confidence: probability of the label that the reply names, the product over the tokens that spell it; 0 if it
    names none.
    is_cut: whether the reply was stopped early because its scores were decided.
    is_opened: whether the chat template opens the reasoning of each reply.
    """

    replies: Sequence[str]
    loss: Sequence[float] = ()
    tokens: Sequence[int] = ()
    confidence: Sequence[float] = ()
    is_cut: Sequence[bool] = ()
    is_opened: bool = False

    @cached_property
    def answers(self) -> list[str]:
        """Each reply without its reasoning. Answers are scored, since a reference has no reasoning."""
        return [without_reasoning(reply, is_opened=self.is_opened) for reply in self.replies]


class MetricSet:
    """Metrics of rows with these references.

    groups: rows of one group fail together.
    field: where JSON replies name a class (`reply_labels.py`).
    labels: class of each reference, None for a row without one; by default read at `field`.
    transcripts: indices of the rows whose reference is the transcript of a recording.

    - exact_match, f1, rouge_l: means over rows (`scorers.py`). loss: nats per token.
    - accuracy: the fraction of replies that name the reference's class. A reply without a class is wrong.
    - macro_f1: the mean over the classes of the references of F1 = 2 TP / (predicted + expected). A reply without a
      class, or with one that no reference has, lowers the recall of the right class alone.
    - ece: expected calibration error (Guo et al. 2017, arXiv:1706.04599, eq. 3), 15 equal bins of confidence.
    - wer: word errors over reference words, of all transcripts together.

    Raises ConfigError if no reference has the field.
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
        self.labels: list[str | None] = [None] * len(references)
        if labels is not None:
            self.labels = list(labels)
        elif field:
            self.labels = [label_of(text, field) for text in references]
        self.labelled = [index for index, label in enumerate(self.labels) if label is not None]
        self.transcripts = sorted(transcripts)
        if field and not self.labelled:
            fields = known_fields(self.references)
            raise ConfigError(f"no reference has the field {field!r}", one_of("--label", fields or [WHOLE]))
        self.classes = sorted({str(self.labels[index]) for index in self.labelled})

    @property
    def classes_or_references(self) -> list[str]:
        """Class of each labelled row; without labels, each reference."""
        return [str(self.labels[index]) for index in self.labelled] or self.references

    @property
    def names(self) -> list[str]:
        """Metrics of replies that these rows have."""
        return [*SCORERS, *(["wer"] if self.transcripts else []), *(OF_LABELS if self.labelled else ())]

    def check(self, name: str, *, flag: str = "--scorer") -> None:
        """Raise ConfigError unless these rows have the metric `name`. flag: by which it was named."""
        if name in self.names:
            return
        reason = "; it needs --label FIELD" if name in OF_LABELS else "; it needs recordings with their transcripts"
        raise ConfigError(
            f"there is no {name} of these rows{reason if name in NAMES else ''}", one_of(flag, self.names)
        )

    def of(self, indices: Sequence[int]) -> MetricSet:
        """Return the metrics of a subset of the rows, in the order of `indices`."""
        labels = [self.labels[index] for index in indices]
        transcripts = set(self.transcripts)
        new_transcripts = [new for new, index in enumerate(indices) if index in transcripts]
        # an empty field avoids the ConfigError for a subset without labels; the whole set was checked already
        field = self.field if any(label is not None for label in labels) else ""
        return MetricSet(
            [self.references[index] for index in indices],
            [self.groups[index] for index in indices],
            field=field,
            labels=labels,
            transcripts=new_transcripts,
        )

    def is_decided(self, index: int, reply_so_far: str, metrics: Iterable[str]) -> bool:
        """Return whether no continuation of the reply to a row can change one of `metrics`."""
        return all(self._is_metric_decided(name, index, reply_so_far) for name in metrics)

    def _is_metric_decided(self, name: str, index: int, reply_so_far: str) -> bool:
        """Return whether no continuation of the reply to a row can change one metric."""
        label = self.labels[index]
        answer, has_answer = without_reasoning(reply_so_far), not is_reasoning(reply_so_far)
        if name in SCORERS:
            return has_answer and SCORERS[name].is_decided(answer, self.references[index])
        if name == "loss":  # computed on the reference, not on the reply
            return True
        if name == "wer":
            return index not in self.transcripts
        if label is None or self.field != WHOLE:  # a reply that is no JSON object names no label, at confidence 0
            return label is None or (has_answer and is_no_object(answer))
        if name == "ece":
            return False
        possible_labels = [label] if name == "accuracy" else self.classes
        return has_answer and all(is_mismatch(answer, possible) for possible in possible_labels)

    def check_all(self, names: Sequence[str]) -> None:
        """Raise ConfigError unless the rows have every metric of `names`, and one of them scores a reply."""
        for name in names:
            if name == "ece" and not self.labelled:
                raise ConfigError("there is no ece of these rows; it needs --label FIELD", "--label FIELD")
            if name not in ("ece", "loss"):
                self.check(name, flag="--metrics")
        if names and not set(names) & set(self.names):
            raise ConfigError(f"--metrics {' '.join(names)} scores no reply", one_of("--metrics", self.names))

    def compared(self, before: ModelOutputs, after: ModelOutputs, only: Collection[str] = ()) -> dict[str, Comparison]:
        """Return the comparison of both sides by every metric, or by those of `only`."""
        only = only or (*self.names, "ece", "loss")
        result = {name: self.compare(name, before, after) for name in self.names if name in only}
        if self.labelled and before.confidence and after.confidence and "ece" in only:
            result["ece"] = bootstrap.corpus_bootstrap(
                self._binned(before), self._binned(after), self._groups(self.labelled), _gap
            )
        if before.loss and after.loss and "loss" in only:
            result["loss"] = bootstrap.paired_bootstrap(
                before.loss, after.loss, self.groups, before.tokens, is_bounded=False
            )
        return result

    def compare(
        self, name: str, before: ModelOutputs, after: ModelOutputs, test: FlipTest | None = None
    ) -> Comparison:
        """Return the comparison by one metric of `names`. Raises ConfigError for another."""
        test = test or FlipTest()
        self.check(name)
        if name == "macro_f1":
            return self._macro_f1(before, after, test)
        if name == "wer":
            return self._word_error_rate(before, after, test)
        indices = self.labelled if name == "accuracy" else range(len(self.references))
        base = [self._score(name, before, index) for index in indices]
        tuned = [self._score(name, after, index) for index in indices]
        return bootstrap.paired_bootstrap(base, tuned, self._groups(indices), seed=test.seed, tail=test.tail)

    def by_row(self, side: ModelOutputs, only: Collection[str] = ()) -> dict[str, list[float | None]]:
        """Return the scores of each row; None where a row has no such score.

        A row without a label has no accuracy, and one without a transcript no word error rate.

        only: metrics; the result holds those that are scores of a row, or accuracy where macro_f1 is among them.
        """
        indices = range(len(self.references))
        result: dict[str, list[float | None]] = {}
        for name in SCORERS:
            if not only or name in only:
                result[name] = [self._score(name, side, index) for index in indices]
        if self.labelled and (not only or set(OF_LABELS) & set(only)):
            result["accuracy"] = [
                None if self.labels[index] is None else self._score("accuracy", side, index) for index in indices
            ]
        if self.transcripts and (not only or "wer" in only):
            rates: list[float | None] = [None] * len(self.references)
            for index in self.transcripts:
                errors, words = self._errors(side, index)
                rates[index] = errors / max(words, 1)
            result["wer"] = rates
        return result

    def _score(self, name: str, side: ModelOutputs, index: int) -> float:
        """Return one score of the answer to a row."""
        if name == "accuracy":
            return float(label_of(side.answers[index], self.field) == self.labels[index])
        return SCORERS[name].score(side.answers[index], self.references[index])

    def _errors(self, side: ModelOutputs, index: int) -> tuple[int, int]:
        return word_errors(side.answers[index], self.references[index])

    def _groups(self, indices: Iterable[int]) -> list[str]:
        return [self.groups[index] for index in indices]

    def _word_error_rate(self, before: ModelOutputs, after: ModelOutputs, test: FlipTest) -> Comparison:
        """Return the comparison of word error rates over all transcripts."""
        base = np.array([self._errors(before, index) for index in self.transcripts], float)
        tuned = np.array([self._errors(after, index) for index in self.transcripts], float)
        groups, widest = self._groups(self.transcripts), max(1.0, float(_rate(base).max()), float(_rate(tuned).max()))
        return bootstrap.corpus_bootstrap(base, tuned, groups, _rate, widest=widest, test=test)

    def _macro_f1(self, before: ModelOutputs, after: ModelOutputs, test: FlipTest) -> Comparison:
        """Return the comparison of macro-F1 over the labelled rows."""
        count, class_index = len(self.classes), {label: index for index, label in enumerate(self.classes)}
        base, tuned = (self._counted(side, class_index) for side in (before, after))

        def macro(sums: Array) -> Array:
            """Return macro-F1, (R,), of the counts of `_counted` summed over sets, (R, 3 classes)."""
            correct, predicted, expected = (sums[:, start : start + count] for start in (0, count, 2 * count))
            # (R, classes) each: F1_c = 2 TP_c / (predicted_c + expected_c), averaged over the classes that the set has
            is_present, f1 = expected > 0, 2 * correct / (predicted + expected).clip(1)
            return np.asarray((f1 * is_present).sum(1) / is_present.sum(1).clip(1))

        return bootstrap.corpus_bootstrap(base, tuned, self._groups(self.labelled), macro, test=test)

    def _counted(self, side: ModelOutputs, class_index: Mapping[str, int]) -> Array:
        """Return per-class counts of each labelled row, (rows with a label, 3 classes).

        The three blocks are 1 for the class that is correctly predicted, predicted, and expected.
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

    def _binned(self, side: ModelOutputs) -> Array:
        """Return the calibration gaps of each labelled row, (rows with a label, BINS + 1).

        Confidence minus accuracy stands in the bin (a, b] of the confidence. The last column is 1, to count rows.
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
    """Return word error rates, (R,), of sums (R, 2): word errors and reference words.

    A reference without words counts as one word.
    """
    # WER = sum of word errors / max(sum of reference words, 1)
    return np.asarray(sums[:, 0] / sums[:, 1].clip(1))


def _gap(sums: Array) -> Array:
    """Return the expected calibration error, (R,), of sums (R, BINS + 1) of `_binned`."""
    # ECE = sum_bins |sum_{rows in bin} (confidence - accuracy)| / N
    return np.asarray(np.abs(sums[:, :-1]).sum(1) / sums[:, -1])
