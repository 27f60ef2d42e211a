"""Verb `bias`: outcome rates by demographic group, with mitigation."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from sartor.core import parquet_io
from sartor.core.artifacts import Artifact, check_output_free, open_artifact
from sartor.core.errors import ConfigError, SourceError, one_of
from sartor.core.records import Drop, Example, drop_of
from sartor.core.splits import HELD_OUT_SPLITS
from sartor.curate.bias import mitigation as cells
from sartor.curate.bias import mitigation as pairs
from sartor.curate.bias import mitigation as weights
from sartor.curate.bias.group_membership import Memberships, memberships, outcomes, spoken_of
from sartor.curate.bias.mitigation import Cell
from sartor.curate.bias.outcome_rates import Gap, OutcomeRates, measure_rates
from sartor.curate.dataset_writer import write_dataset_from
from sartor.text import equivalence
from sartor.text.demographics import group_terms
from sartor.text.example_text import words

RESAMPLES = 400
FEWEST, MOST_WORDS, SHOWN = 5, 400, 5


@dataclass(frozen=True)
class WordAssociation:
    """A word associated with a group, and the number of rows of the group that contain it.

    pmi: log2 of the word's frequency in the group over its frequency in all rows that name a group.
    low, high: 95 % bootstrap interval over rows.
    """

    attribute: str
    group: str
    word: str
    rows: int
    pmi: float
    low: float
    high: float


def associated_words(rows: Sequence[Example], people: Memberships, seed: int = 0) -> list[dict[str, Any]]:
    """Return the words that occur with each group more than by chance, strongest first.

    people: attribute -> group of each of the N rows. Words that name the group itself are left out.
    """
    word_sets = [_content_words(row) for row in rows]
    associations: list[WordAssociation] = []
    for attribute, values in people.items():
        named_rows = [index for index, value in enumerate(values) if value is not None]
        named_count = len(named_rows)
        counts = Counter(word for index in named_rows for word in word_sets[index])
        vocabulary = [word for word, count in counts.most_common(MOST_WORDS) if FEWEST <= count < named_count]
        if not vocabulary:
            continue
        has_word = np.zeros((named_count, len(vocabulary)), np.float32)
        for position, index in enumerate(named_rows):
            has_word[position] = [word in word_sets[index] for word in vocabulary]
        resamples = np.random.default_rng(seed).multinomial(
            named_count, np.full(named_count, 1 / named_count), RESAMPLES
        )
        multiplicities = np.concatenate([np.ones((1, named_count)), resamples]).astype(np.float32)
        for group in sorted({values[index] or "" for index in named_rows}):
            associations += _strongest(
                attribute,
                group,
                vocabulary,
                has_word=has_word,
                in_group=np.array([values[index] == group for index in named_rows], np.float32),
                multiplicities=multiplicities,
            )
    return [asdict(item) for item in associations]


def _strongest(
    attribute: str,
    group: str,
    vocabulary: Sequence[str],
    has_word: NDArray[Any],
    in_group: NDArray[Any],
    multiplicities: NDArray[Any],
) -> list[WordAssociation]:
    """Return the words of one group whose PMI is above 0 beyond chance, by descending lower bound.

    vocabulary: V words. has_word: (N, V) 0/1. in_group: (N,) 0/1.
    multiplicities: (1 + R, N) weights of the rows; row 0 is the data, the others are bootstrap resamples.
    """
    rows = multiplicities.shape[1]
    joint = multiplicities @ (has_word * in_group[:, None])
    word_rows = multiplicities @ has_word
    group_rows = multiplicities @ in_group
    # PMI(w, g) = log2( c(w, g) * N / (c(w) * c(g)) ), (1 + R, V), with counts c over each (re)sample of N rows
    with np.errstate(divide="ignore", invalid="ignore"):
        pmi = np.log2(joint * rows / (word_rows * group_rows[:, None]))
    resampled = np.nan_to_num(pmi[1:], neginf=-20, nan=0.0)
    low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
    # A word is reported only if a simultaneous interval excludes 0 (Bonferroni over V words, normal approximation):
    #   pmi_0 - z_{1 - 0.025 / V} * sd(pmi_resampled) > 0
    # Without it, 2.5 % of 400 words, ten, would be reported by chance.
    lower_bound = pmi[0] - stats.norm.isf(0.025 / len(vocabulary)) * resampled.std(0)
    joint_counts = (has_word * in_group[:, None]).sum(0)
    order = [index for index in np.argsort(-low).tolist() if lower_bound[index] > 0 and joint_counts[index] >= FEWEST]
    return [
        WordAssociation(
            attribute,
            group,
            word=vocabulary[index],
            rows=int(joint_counts[index]),
            pmi=float(pmi[0, index]),
            low=float(low[index]),
            high=float(high[index]),
        )
        for index in order[:SHOWN]
    ]


def _content_words(row: Example) -> frozenset[str]:
    """Return the words of a row without function words, numbers and words that name a group."""
    text = f"{spoken_of(row)}\n{row.reply}"
    group_words: set[str] = set()
    for kind in group_terms.KINDS:
        for mention in group_terms.mentions(text, kind):
            group_words.update(words(mention.text))
    return frozenset(word for word in words(text) if not word.isdigit()) - group_words - equivalence.words().function


Mitigation = Literal["", "reweight", "counterfactual", "substitute", "drop", "generate"]
# (group, outcome), number of rows wanted, existing rows of the cell -> new rows
Generate = Callable[[Cell, int, Sequence[Example]], Iterable[Example]]
STEP = "bias"


@dataclass(frozen=True)
class Biased:
    """Result of `bias`: outcome rates of the training rows before and after mitigation.

    words: the associated words, as JSON.
    needed: attribute -> cell -> rows that targeted generation would add.
    changed: counts of changed rows, by kind of change.
    """

    dataset: Path
    rows: int
    outcome: str
    before: OutcomeRates
    words: Sequence[dict[str, Any]]
    needed: dict[str, dict[Cell, int]]
    mitigation: Mitigation = ""
    after: OutcomeRates | None = None
    changed: dict[str, int] = dataclasses.field(default_factory=dict)
    written: Artifact | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the command's JSON."""
        needed = {}
        for attribute, counts in self.needed.items():
            needed[attribute] = [
                {"group": group, "outcome": outcome, "rows": count} for (group, outcome), count in counts.items()
            ]
        return {
            "dataset": str(self.dataset),
            "rows": self.rows,
            "outcome": self.outcome,
            "before": self.before.as_json(),
            "words": list(self.words),
            "needed": needed,
            "mitigation": self.mitigation,
            "after": self.after.as_json() if self.after else None,
            "changed": self.changed,
            "out": str(self.written.path) if self.written else "",
        }

    def table(self) -> list[tuple[str, Any]]:
        """Return the lines shown to the user."""
        lines: list[tuple[str, Any]] = [("rows", self.rows), ("outcome", self.outcome)]
        for name, rates in (("before", self.before), ("after", self.after)):
            if rates is None:
                continue
            lines.append((name, [_gap_line(gap) for gap in rates.gaps[:8]] or "nothing can be compared"))
            failing = [
                f"{ratio.attribute}, {ratio.outcome!r:.40}: {ratio.ratio:.2f}"
                for ratio in rates.ratios
                if not ratio.passes_four_fifths
            ]
            lines.append((f"{name}: under four fifths", failing))
        shown_words = [f"{word['group']}: {word['word']} (PMI {word['pmi']:.2f})" for word in self.words[:8]]
        lines.append(("words", shown_words))
        if self.written:
            lines += [("changed", self.changed), ("out", str(self.written.path))]
        return lines


def _gap_line(gap: Gap) -> str:
    mark = " (notable)" if gap.is_notable else ""
    return (
        f"{gap.attribute} {gap.group}, {gap.outcome!r:.40}: {gap.rate:.0%} against {gap.others:.0%}, "
        f"{gap.difference:+.2f} in [{gap.low:+.2f}, {gap.high:+.2f}]{mark}"
    )


def bias(
    dataset: Path | str,
    *,
    group: Sequence[str] = (),
    outcome: str = "auto",
    mitigate: Mitigation = "",
    out: Path | str | None = None,
    generate: Generate | None = None,
    seed: int = 0,
    replace: bool = False,
) -> Biased:
    """Measure outcome rates by group; with `mitigate` and `out`, write a Dataset with equal rates.

    Only training rows are measured and changed. Held-out rows stay as they are.

    group: `lexicon`, and fields of the rows' JSON or `Name: value` lines; by default the lexicon and well-known
    fields.
    outcome: auto, reply, json:KEY (or KEY), regex:PATTERN.
    mitigate: `reweight` sets weights. `counterfactual` adds each row again about another group. `substitute` rewrites
    each row about the group assigned to it. `drop` removes the fewest rows. `generate` calls `generate` for the rows
    that are needed.

    Raises ConfigError for a field that no row has, SourceError if no group or outcome is found.
    """
    if mitigate not in get_args(Mitigation):
        known = one_of("--mitigate", [name for name in get_args(Mitigation) if name])
        raise ConfigError(f"there is no mitigation {mitigate!r}", known)
    if bool(mitigate) != (out is not None):
        raise ConfigError("--mitigate and --out go together", "--mitigate reweight --out DATASET")
    if mitigate == "generate" and generate is None:
        raise ConfigError(
            "generation needs somebody who generates", "sartor.bias(..., generate=...), or add the rows `needed` lists"
        )
    artifact = open_artifact(dataset, "dataset")
    if out is not None:
        check_output_free(Path(out).absolute(), replace=replace)
    all_rows = list(parquet_io.read_examples(artifact))
    training = [row for row in all_rows if row.split not in HELD_OUT_SPLITS]
    people, target = _people(training, group), outcomes(training, outcome)
    if not any(target.labels):
        raise SourceError("the replies have no outcome: they are free text", "--outcome KEY, or regex:PATTERN")
    tables = {name: cells.table(values, target.labels) for name, values in people.items()}
    needed = {}
    for name, table in tables.items():
        missing_rows = cells.rows_to_add(table)
        if missing_rows:
            needed[name] = missing_rows
    result = Biased(
        artifact.path,
        rows=len(training),
        outcome=target.explanation,
        before=measure_rates(people, target.labels, [row.weight for row in training]),
        words=associated_words(training, people, seed),
        needed=needed,
    )
    if out is None:
        return result
    mitigator = _Mitigation(training, people, target.labels, seed)
    new_rows, drops = mitigator.run(mitigate, tables, needed, generate)
    after_people = _people(new_rows, group)
    after_outcomes = outcomes(new_rows, target.form if target.form != "text" else outcome)
    after_rates = measure_rates(after_people, after_outcomes.labels, [row.weight for row in new_rows])
    # held-out rows come first: a new row equal to one of them is merged into it, and is not trained on
    held_out = [row for row in all_rows if row.split in HELD_OUT_SPLITS]
    facts = {
        "mitigation": mitigate,
        "changed": mitigator.changed,
        "before": result.before.as_json(),
        "after": after_rates.as_json(),
    }
    written = write_dataset_from(out, [artifact], [*held_out, *new_rows], drops, step={STEP: facts}, replace=replace)
    return dataclasses.replace(
        result, mitigation=mitigate, after=after_rates, changed=mitigator.changed, written=written
    )


def _people(rows: Sequence[Example], group: Sequence[str]) -> Memberships:
    result = memberships(rows, group)
    if not result:
        raise SourceError(
            "the rows name no two groups of people", "--group FIELD: of their JSON, or of `Name: value` lines"
        )
    return result


class _Mitigation:
    """Mitigation of training rows. changed: counts of the changed rows."""

    def __init__(
        self, training: Sequence[Example], people: Memberships, labels: Sequence[str | None], seed: int
    ) -> None:
        self.training, self.people, self.labels, self.seed = training, people, labels, seed
        self.changed: dict[str, int] = {}

    def run(
        self, kind: Mitigation, tables: dict[str, Any], needed: dict[str, dict[Cell, int]], generate: Generate | None
    ) -> tuple[list[Example], list[Drop]]:
        """Return the new training rows and the Drops."""
        if kind == "reweight":
            return self._reweight(), []
        if kind == "counterfactual":
            return self._add_counterfactuals(), []
        if kind == "substitute":
            return self._substitute(), []
        if kind == "drop":
            return self._drop(tables)
        assert generate is not None
        return self._generate(tables, needed, generate), []

    def _reweight(self) -> list[Example]:
        factors = weights.reweighing_factors(self.people, self.labels, [row.weight for row in self.training])
        new_rows = []
        for index, row in enumerate(self.training):
            fields = {name: values[index] for name, values in self.people.items()}
            factor = weights.weight_factor(factors, fields, self.labels[index])
            new_rows.append(dataclasses.replace(row, weight=row.weight * factor))
        self.changed = {
            "weights": sum(new_row.weight != row.weight for new_row, row in zip(new_rows, self.training, strict=True))
        }
        return new_rows

    def _attributes(self) -> list[str]:
        """Return the attributes whose groups can be swapped in a text."""
        attributes = [name for name in self.people if name in pairs.ATTRIBUTES]
        if not attributes:
            known = ", ".join(pairs.ATTRIBUTES)
            raise ConfigError(
                f"no counterfactual is known of {', '.join(self.people)}; of {known} it is", "--mitigate reweight"
            )
        return attributes

    def _substitute(self) -> list[Example]:
        new_rows, unpaired_count = pairs.substituted(self.training, self.labels, self._attributes(), self.seed)
        distinct = list({row.id: row for row in new_rows}.values())
        moved = sum(new_row.id != row.id for new_row, row in zip(new_rows, self.training, strict=True))
        self.changed = {
            "substituted": moved,
            "rows_without_a_pair": unpaired_count,
            "became_equal": len(new_rows) - len(distinct),
        }
        return distinct

    def _add_counterfactuals(self) -> list[Example]:
        attributes = self._attributes()
        new_rows, known_ids = list(self.training), {row.id for row in self.training}
        unchanged = 0
        for index, row in enumerate(self.training):
            if not any(values[index] for values in self.people.values()):
                continue
            copies = [copy for copy, _ in pairs.counterfactuals(row, attributes) if copy.id not in known_ids]
            unchanged += not copies
            known_ids |= {copy.id for copy in copies}
            new_rows += copies
        self.changed = {"added": len(new_rows) - len(self.training), "rows_without_a_pair": unchanged}
        return new_rows

    def _drop(self, tables: dict[str, dict[Cell, list[int]]]) -> tuple[list[Example], list[Drop]]:
        name = self._single_attribute(tables)
        dropped_indices = set(cells.rows_to_drop(tables[name], self.seed))
        drops = []
        for index in sorted(dropped_indices):
            reason = (
                f"{name} {self.people[name][index]}, {self.labels[index]!r:.60}: more of it than of the other groups"
            )
            drops.append(drop_of(self.training[index], "group_outcome", reason, step=STEP))
        self.changed = {"dropped": len(dropped_indices)}
        return [row for index, row in enumerate(self.training) if index not in dropped_indices], drops

    def _generate(
        self, tables: dict[str, dict[Cell, list[int]]], needed: dict[str, dict[Cell, int]], generate: Generate
    ) -> list[Example]:
        name = self._single_attribute(tables)
        generated: list[Example] = []
        shortfall = Counter[str]()
        for cell, count in needed.get(name, {}).items():
            new_rows = list(generate(cell, count, [self.training[index] for index in tables[name][cell]]))[:count]
            generated += [dataclasses.replace(row, split="train") for row in new_rows]
            shortfall["not_generated"] += count - len(new_rows)
        self.changed = {"added": len(generated), **shortfall}
        return [*self.training, *generated]

    def _single_attribute(self, tables: dict[str, Any]) -> str:
        """Return the only attribute; raise ConfigError if there are several.

        Rows dropped or added for two attributes at once would be too many for either.
        """
        if len(tables) > 1:
            raise ConfigError(f"the rows name {', '.join(tables)}; choose one", f"--group {next(iter(tables))}")
        return next(iter(tables))
