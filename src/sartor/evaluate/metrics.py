"""Metrics of two models with intervals.

Every metric is a function of sums over rows, so that it can be computed for each set of groups anew: macro-F1 and
the word error rate are of the whole set, and no mean over rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sartor.core.errors import ConfigError
from sartor.evaluate import bootstrap
from sartor.evaluate.bootstrap import Comparison
from sartor.evaluate.reply_labels import WHOLE, known_fields, label_of
from sartor.evaluate.scorers import SCORERS, word_errors

Array = NDArray[np.float64]
OF_LABELS = ("accuracy", "macro_f1")
# What `--scorer` may name
NAMES = (*SCORERS, "wer", *OF_LABELS)
LOWER_IS_BETTER = frozenset({"loss", "wer", "ece"})
BINS = 15


@dataclass(frozen=True)
class ModelOutputs:
    """What one side did with the rows of a task, row by row.

    loss: nats per supervised token, of which there are `tokens`. confidence: the probability that the side gave to the label
    that it named, the product over the tokens that spell it; 0 where it named none. What was not measured may be empty.
    """

    replies: Sequence[str]
    loss: Sequence[float] = ()
    tokens: Sequence[int] = ()
    confidence: Sequence[float] = ()


class MetricSet:
    """The metrics of rows with these references.

    groups: rows of one group fail together. field: where JSON replies name a class (`labels.py`). labels: the class of
    each reference, None for a row without one; by default read at `field`. transcripts: places of the rows whose reference is
    what was said in a recording.

    - exact_match, f1, rouge_l: means over rows (`scorers.py`). loss: nats per token.
    - accuracy: the fraction of replies that name the reference's class. A reply without a class is wrong.
    - macro_f1: the mean over the classes of the references, of each the harmonic mean of precision and recall. A reply without
      a class, or with one that no reference has, is a class of its own: the recall of the right one falls.
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
        self.labels = list(labels) if labels is not None else [label_of(text, field) if field else None for text in references]
        self.labelled = [place for place, label in enumerate(self.labels) if label is not None]
        self.transcripts = sorted(transcripts)
        if field and not self.labelled:
            known = known_fields(self.references)
            raise ConfigError(f"no reference has the field {field!r}", f"--label {' | '.join(known) or WHOLE}")
        self.classes = sorted({str(self.labels[place]) for place in self.labelled})

    @property
    def names(self) -> list[str]:
        """The metrics of replies that these rows have."""
        return [*SCORERS, *(["wer"] if self.transcripts else []), *(OF_LABELS if self.labelled else ())]

    def check(self, name: str) -> None:
        """Raise ConfigError unless these rows have the metric `name`."""
        if name in self.names:
            return
        why = "; it needs --label FIELD" if name in OF_LABELS else "; it needs recordings with their transcripts"
        raise ConfigError(
            f"there is no {name} of these rows{why if name in NAMES else ''}", f"--scorer {' | '.join(self.names)}"
        )

    def of(self, places: Sequence[int]) -> MetricSet:
        """The same of some of the rows, in the order of `places`."""
        labels = [self.labels[place] for place in places]
        said = set(self.transcripts)
        heard = [new for new, place in enumerate(places) if place in said]
        # where none of them is labelled the field has been checked already
        field = self.field if any(label is not None for label in labels) else ""
        return MetricSet([self.references[p] for p in places], [self.groups[p] for p in places], field, labels, heard)

    def compared(self, before: ModelOutputs, after: ModelOutputs) -> dict[str, Comparison]:
        """Every metric of both sides."""
        found = {name: self.one(name, before, after) for name in self.names}
        if self.labelled and before.confidence and after.confidence:
            found["ece"] = self._calibration(before, after)
        if before.loss and after.loss:
            found["loss"] = bootstrap.paired_bootstrap(before.loss, after.loss, self.groups, before.tokens, is_bounded=False)
        return found

    def one(self, name: str, before: ModelOutputs, after: ModelOutputs) -> Comparison:
        """One metric of `names`. Raises ConfigError for another."""
        self.check(name)
        if name == "macro_f1":
            return self._macro_f1(before, after)
        if name == "wer":
            return self._word_error_rate(before, after)
        places = self.labelled if name == "accuracy" else range(len(self.references))
        base, tuned = ([self._score(name, side, place) for place in places] for side in (before, after))
        return bootstrap.paired_bootstrap(base, tuned, self._groups(places))

    def by_row(self, side: ModelOutputs) -> dict[str, list[float | None]]:
        """Scores of each row; None where it has none: accuracy of a row without a label, word errors of no transcript."""
        places = range(len(self.references))
        found: dict[str, list[float | None]] = {name: [self._score(name, side, place) for place in places] for name in SCORERS}
        if self.labelled:
            found["accuracy"] = [None if self.labels[p] is None else self._score("accuracy", side, p) for p in places]
        if self.transcripts:
            said = set(self.transcripts)
            found["wer"] = [self._errors(side, p)[0] / max(self._errors(side, p)[1], 1) if p in said else None for p in places]
        return found

    def _score(self, name: str, side: ModelOutputs, place: int) -> float:
        if name == "accuracy":
            return float(label_of(side.replies[place], self.field) == self.labels[place])
        return SCORERS[name](side.replies[place], self.references[place])

    def _errors(self, side: ModelOutputs, place: int) -> tuple[int, int]:
        return word_errors(side.replies[place], self.references[place])

    def _groups(self, places: Iterable[int]) -> list[str]:
        return [self.groups[place] for place in places]

    def _word_error_rate(self, before: ModelOutputs, after: ModelOutputs) -> Comparison:
        base, tuned = (np.array([self._errors(side, place) for place in self.transcripts], float) for side in (before, after))
        groups, widest = self._groups(self.transcripts), max(1.0, float(_rate(base).max()), float(_rate(tuned).max()))
        return bootstrap.corpus_bootstrap(base, tuned, groups, _rate, widest=widest)

    def _macro_f1(self, before: ModelOutputs, after: ModelOutputs) -> Comparison:
        count, number = len(self.classes), {label: place for place, label in enumerate(self.classes)}
        base, tuned = (self._counted(side, number) for side in (before, after))

        def macro(found: Array) -> Array:
            right, said, wanted = (found[:, start : start + count] for start in (0, count, 2 * count))
            # a class that a set of groups has no row of is no class of it
            has, f1 = wanted > 0, 2 * right / (said + wanted).clip(1)
            return np.asarray((f1 * has).sum(1) / has.sum(1).clip(1))

        return bootstrap.corpus_bootstrap(base, tuned, self._groups(self.labelled), macro)

    def _counted(self, side: ModelOutputs, number: Mapping[str, int]) -> Array:
        """(rows with a label, 3 classes): whether each is the one that is rightly said, that is said, that is wanted."""
        count = len(number)
        counted = np.zeros((len(self.labelled), 3 * count))
        for row, place in enumerate(self.labelled):
            wanted, label = number[str(self.labels[place])], label_of(side.replies[place], self.field)
            counted[row, 2 * count + wanted] = 1
            if label is not None and label in number:
                said = number[label]
                counted[row, count + said] = 1
                counted[row, said] = float(said == wanted)
        return counted

    def _calibration(self, before: ModelOutputs, after: ModelOutputs) -> Comparison:
        base, tuned = (self._binned(side) for side in (before, after))
        return bootstrap.corpus_bootstrap(base, tuned, self._groups(self.labelled), _gap)

    def _binned(self, side: ModelOutputs) -> Array:
        """(rows with a label, bins + 1): confidence less whether it was right, in its bin (a, b]; and 1, to count rows."""
        binned = np.zeros((len(self.labelled), BINS + 1))
        binned[:, -1] = 1
        for row, place in enumerate(self.labelled):
            sure = side.confidence[place]
            binned[row, max(int(np.ceil(sure * BINS)) - 1, 0)] = sure - self._score("accuracy", side, place)
        return binned


def _rate(found: Array) -> Array:
    """(R, 2) words wrong and words said -> (R,); silence that something was heard in counts as one word."""
    return np.asarray(found[:, 0] / found[:, 1].clip(1))


def _gap(found: Array) -> Array:
    """(R, bins + 1) -> (R,)."""
    return np.asarray(np.abs(found[:, :-1]).sum(1) / found[:, -1])
