"""Verb bias: outcome rates by group, with mitigation."""

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
from sartor.core.errors import ConfigError, SourceError
from sartor.core.records import Drop, Example, drop_of
from sartor.curate.bias import mitigation as cells
from sartor.curate.bias import mitigation as pairs
from sartor.curate.bias import mitigation as weights
from sartor.curate.bias.group_membership import Memberships, memberships, outcomes, spoken_of
from sartor.curate.bias.mitigation import Cell
from sartor.curate.bias.outcome_rates import OutcomeRates, measure_rates
from sartor.curate.dataset_writer import write_dataset_from
from sartor.text import equivalence
from sartor.text.demographics import group_terms
from sartor.text.example_text import words

RESAMPLES = 400
FEWEST, MOST_WORDS, SHOWN = 5, 400, 5


@dataclass(frozen=True)
class WordAssociation:
    """A word that rows of a group have, and in how many. pmi: log2 of how much more often than in all rows that name a group,
    with a 95 % interval by bootstrap over rows.
    """

    attribute: str
    group: str
    word: str
    rows: int
    pmi: float
    low: float
    high: float


def associated_words(rows: Sequence[Example], people: Memberships, seed: int = 0) -> list[dict[str, Any]]:
    """The words that stand beside each group more than beside the others: those that are beyond chance, strongest first.

    Words that name the group are left out: that he is a man is no finding.
    """
    said = [_telling(row) for row in rows]
    found: list[WordAssociation] = []
    for attribute, values in people.items():
        spoken = [place for place, value in enumerate(values) if value is not None]
        counts = Counter(word for place in spoken for word in said[place])
        vocabulary = [word for word, count in counts.most_common(MOST_WORDS) if FEWEST <= count < len(spoken)]
        if not vocabulary:
            continue
        has = np.array([[word in said[place] for word in vocabulary] for place in spoken], np.float32)
        drawn = np.random.default_rng(seed).multinomial(len(spoken), np.full(len(spoken), 1 / len(spoken)), RESAMPLES)
        times = np.concatenate([np.ones((1, len(spoken))), drawn]).astype(np.float32)
        for group in sorted({values[place] or "" for place in spoken}):
            inside = np.array([values[place] == group for place in spoken], np.float32)
            found += _strongest(attribute, group, vocabulary, has, inside, times)
    return [asdict(one) for one in found]


def _strongest(
    attribute: str, group: str, vocabulary: Sequence[str], has: NDArray[Any], inside: NDArray[Any], times: NDArray[Any]
) -> list[WordAssociation]:
    rows = times.shape[1]
    joint, alone, share = times @ (has * inside[:, None]), times @ has, times @ inside
    with np.errstate(divide="ignore", invalid="ignore"):
        pmi = np.log2(joint * rows / (alone * share[:, None]))
    again = np.nan_to_num(pmi[1:], neginf=-20, nan=0.0)
    low, high = np.quantile(again, [0.025, 0.975], axis=0)
    # named only where even an interval for all words at once (Bonferroni, normal) excludes 0: of 400 words ten would by chance
    sure = pmi[0] - stats.norm.isf(0.025 / len(vocabulary)) * again.std(0)
    together = (has * inside[:, None]).sum(0)
    order = [place for place in np.argsort(-low).tolist() if sure[place] > 0 and together[place] >= FEWEST]
    return [
        WordAssociation(attribute, group, vocabulary[at], int(together[at]), float(pmi[0, at]), float(low[at]), float(high[at]))
        for at in order[:SHOWN]
    ]


def _telling(row: Example) -> frozenset[str]:
    """The words of a row, without those that only join others and those that name a group."""
    text = f"{spoken_of(row)}\n{row.reply}"
    named = {word for kind in group_terms.KINDS for one in group_terms.mentions(text, kind) for word in words(one.text)}
    return frozenset(word for word in words(text) if not word.isdigit()) - named - equivalence.words().function


Mitigation = Literal["", "reweight", "counterfactual", "substitute", "drop", "generate"]
# (group, outcome), how many rows of it are wanted, the rows that there are -> new rows
Generate = Callable[[Cell, int, Sequence[Example]], Iterable[Example]]
STEP = "bias"


@dataclass(frozen=True)
class Biased:
    """What was found of the training rows, and after mitigation. `needed`: rows that targeted generation would add."""

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
        """The command's JSON."""
        return {
            "dataset": str(self.dataset),
            "rows": self.rows,
            "outcome": self.outcome,
            "before": self.before.as_json(),
            "words": list(self.words),
            "needed": {
                attribute: [{"group": group, "outcome": outcome, "rows": more} for (group, outcome), more in some.items()]
                for attribute, some in self.needed.items()
            },
            "mitigation": self.mitigation,
            "after": self.after.as_json() if self.after else None,
            "changed": self.changed,
            "out": str(self.written.path) if self.written else "",
        }

    def table(self) -> list[tuple[str, Any]]:
        """What a person reads."""
        lines: list[tuple[str, Any]] = [("rows", self.rows), ("outcome", self.outcome)]
        for name, found in (("before", self.before), ("after", self.after)):
            if found is not None:
                lines += [(name, [_line(gap) for gap in found.gaps[:8]] or "nothing can be compared")]
                ratios = [one for one in found.ratios if not one.passes_four_fifths]
                lines += [
                    (f"{name}: under four fifths", [f"{one.attribute}, {one.outcome!r:.40}: {one.ratio:.2f}" for one in ratios])
                ]
        lines += [("words", [f"{one['group']}: {one['word']} (PMI {one['pmi']:.2f})" for one in self.words[:8]])]
        if self.written:
            lines += [("changed", self.changed), ("out", str(self.written.path))]
        return lines


def _line(gap: Any) -> str:
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
    """Outcome rates by group of a Dataset's training rows; with `mitigate` and `out`, a Dataset in which they are even.

    group: `lexicon`, and fields of the rows' JSON or `Name: value` lines; by default the lexicon and well-known fields.
    outcome: auto, reply, json:KEY (or KEY), regex:PATTERN. mitigate: `reweight` sets weights, `counterfactual` adds each row
    again about another group, `substitute` makes each row one about a group that is dealt to it, `drop` removes the fewest
    rows, `generate` asks `generate` for the rows that are needed. Held-out rows stay as they are. Raises ConfigError for a
    field that no row has, SourceError where no group or outcome is found.
    """
    if mitigate not in get_args(Mitigation):
        known = " | ".join(name for name in get_args(Mitigation) if name)
        raise ConfigError(f"there is no mitigation {mitigate!r}", f"--mitigate {known}")
    if bool(mitigate) != (out is not None):
        raise ConfigError("--mitigate and --out go together", "--mitigate reweight --out DATASET")
    if mitigate == "generate" and generate is None:
        raise ConfigError(
            "generation needs somebody who generates", "sartor.bias(..., generate=...), or add the rows `needed` lists"
        )
    opened = open_artifact(dataset, "dataset")
    if out is not None:
        check_output_free(Path(out).absolute(), replace=replace)
    everything = list(parquet_io.read_examples(opened))
    training = [row for row in everything if row.split != "eval"]
    people, target = _people(training, group), outcomes(training, outcome)
    if not any(target.labels):
        raise SourceError("the replies have no outcome: they are free text", "--outcome KEY, or regex:PATTERN")
    tables = {name: cells.table(values, target.labels) for name, values in people.items()}
    needed = {name: more for name, some in tables.items() if (more := cells.rows_to_add(some))}
    found = Biased(
        opened.path,
        len(training),
        target.why,
        measure_rates(people, target.labels, [row.weight for row in training]),
        associated_words(training, people, seed),
        needed,
    )
    if out is None:
        return found
    work = _Mitigation(training, people, target.labels, seed)
    new, drops = work.run(mitigate, tables, needed, generate)
    after_people, after = _people(new, group), outcomes(new, target.chosen if target.chosen != "text" else outcome)
    after_rates = measure_rates(after_people, after.labels, [row.weight for row in new])
    # they stand first: a new row that equals one of them is that one, and is not trained on
    held_out = [row for row in everything if row.split == "eval"]
    facts = {"mitigation": mitigate, "changed": work.changed, "before": found.before.as_json(), "after": after_rates.as_json()}
    written = write_dataset_from(out, [opened], [*held_out, *new], drops, step={STEP: facts}, replace=replace)
    return dataclasses.replace(found, mitigation=mitigate, after=after_rates, changed=work.changed, written=written)


def _people(some: Sequence[Example], group: Sequence[str]) -> Memberships:
    found = memberships(some, group)
    if not found:
        raise SourceError("the rows name no two groups of people", "--group FIELD: of their JSON, or of `Name: value` lines")
    return found


class _Mitigation:
    """Training rows -> other training rows. `changed` counts what was done."""

    def __init__(self, training: Sequence[Example], people: Memberships, labels: Sequence[str | None], seed: int) -> None:
        self.training, self.people, self.labels, self.seed = training, people, labels, seed
        self.changed: dict[str, int] = {}

    def run(
        self, kind: Mitigation, tables: dict[str, Any], needed: dict[str, dict[Cell, int]], generate: Generate | None
    ) -> tuple[list[Example], list[Drop]]:
        """(the new rows, Drops)."""
        if kind == "reweight":
            return self._weighed(), []
        if kind == "counterfactual":
            return self._paired(), []
        if kind == "substitute":
            return self._substituted(), []
        if kind == "drop":
            return self._dropped(tables)
        assert generate is not None
        return self._generated(tables, needed, generate), []

    def _weighed(self) -> list[Example]:
        found = weights.reweighing_factors(self.people, self.labels, [row.weight for row in self.training])
        new = []
        for place, row in enumerate(self.training):
            said = {name: values[place] for name, values in self.people.items()}
            factor = weights.weight_of(found, said, self.labels[place])
            new.append(dataclasses.replace(row, weight=row.weight * factor))
        self.changed = {"weights": sum(one.weight != row.weight for one, row in zip(new, self.training, strict=True))}
        return new

    def _attributes(self) -> list[str]:
        """Those by which a row can be said of somebody else."""
        attributes = [name for name in self.people if name in pairs.ATTRIBUTES]
        if not attributes:
            known = ", ".join(pairs.ATTRIBUTES)
            raise ConfigError(
                f"no counterfactual is known of {', '.join(self.people)}; of {known} it is", "--mitigate reweight"
            )
        return attributes

    def _substituted(self) -> list[Example]:
        new, stuck = pairs.substituted(self.training, self.labels, self._attributes(), self.seed)
        distinct = list({row.id: row for row in new}.values())
        moved = sum(one.id != row.id for one, row in zip(new, self.training, strict=True))
        self.changed = {"substituted": moved, "rows_without_a_pair": stuck, "became_equal": len(new) - len(distinct)}
        return distinct

    def _paired(self) -> list[Example]:
        attributes = self._attributes()
        new, known_ids = list(self.training), {row.id for row in self.training}
        unchanged = 0
        for place, row in enumerate(self.training):
            if not any(values[place] for values in self.people.values()):
                continue
            copies = [copy for copy, _ in pairs.counterfactuals(row, attributes) if copy.id not in known_ids]
            unchanged += not copies
            known_ids |= {copy.id for copy in copies}
            new += copies
        self.changed = {"added": len(new) - len(self.training), "rows_without_a_pair": unchanged}
        return new

    def _dropped(self, tables: dict[str, dict[Cell, list[int]]]) -> tuple[list[Example], list[Drop]]:
        name = self._only(tables)
        gone = set(cells.rows_to_drop(tables[name], self.seed))
        drops = []
        for place in sorted(gone):
            why = f"{name} {self.people[name][place]}, {self.labels[place]!r:.60}: more of it than of the other groups"
            drops.append(drop_of(self.training[place], "group_outcome", why, step=STEP))
        self.changed = {"dropped": len(gone)}
        return [row for place, row in enumerate(self.training) if place not in gone], drops

    def _generated(
        self, tables: dict[str, dict[Cell, list[int]]], needed: dict[str, dict[Cell, int]], generate: Generate
    ) -> list[Example]:
        name = self._only(tables)
        made: list[Example] = []
        short = Counter[str]()
        for cell, more in needed.get(name, {}).items():
            some = list(generate(cell, more, [self.training[place] for place in tables[name][cell]]))[:more]
            made += [dataclasses.replace(row, split="train") for row in some]
            short["not_generated"] += more - len(some)
        self.changed = {"added": len(made), **short}
        return [*self.training, *made]

    def _only(self, tables: dict[str, Any]) -> str:
        """The one attribute: rows that are dropped for two of them at once would be too many of one."""
        if len(tables) > 1:
            raise ConfigError(f"the rows name {', '.join(tables)}; choose one", f"--group {next(iter(tables))}")
        return next(iter(tables))
