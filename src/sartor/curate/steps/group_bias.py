"""Steps bias, weigh and counterfactuals."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from sartor.core.config import option
from sartor.core.errors import ConfigError
from sartor.core.records import Drop, Example
from sartor.curate.bias import mitigation
from sartor.curate.bias.group_membership import Memberships, of_replies, row_memberships
from sartor.curate.bias.mitigation import ATTRIBUTES, counterfactuals
from sartor.curate.bias.outcome_rates import OutcomeRates, measure_rates
from sartor.curate.labels import class_labels
from sartor.curate.step import AugmentedRow, CopyFunction, Removal, RowFunction, StepInput, StepResult

EVIDENCE = "bias"
_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("when", "attribute", "group", "outcome")]
    + [(name, pa.float64()) for name in ("rows", "rate", "low", "high")]
)


@dataclass(frozen=True)
class Bias:
    """Outcome rates by group with intervals and tests, before and after mitigation.

    The rates are in the manifest and in `evidence/bias.parquet`. `mitigate: reweight` sets weights that make group and
    outcome independent (Kamiran and Calders 2012), `drop` removes the fewest rows for it. For counterfactual pairs
    there is the step `counterfactuals`.
    """

    group: tuple[str, ...] = option(
        (), "lexicon, sex, age, ..., or fields of the rows; empty: the lexicon and well-known fields"
    )
    outcome: str = option("auto", "what a reply's outcome is: auto, reply, json:KEY or regex:PATTERN")
    mitigate: Literal["none", "reweight", "drop"] = option("none", "what is done about it")
    seed: int = option(0, "of the rows that are dropped")
    kind: Literal["bias"] = "bias"

    def sketch(self, examples: Sequence[Example], folder: Path) -> Any:
        """Return the columns people (attribute -> group, as JSON), reply and weight."""
        people = row_memberships(examples, self.group)
        people_json = []
        for row in range(len(examples)):
            people_json.append(json.dumps({name: values[row] for name, values in people.items()}))
        return pa.table(
            {
                "people": pa.array(people_json, pa.string()),
                "reply": pa.array([example.reply for example in examples], pa.string()),
                "weight": pa.array([example.weight for example in examples], pa.float64()),
            }
        )

    def decide(self, step_input: StepInput) -> StepResult:
        """Measure the rates, and return the mitigation that the options ask for.

        Raises ConfigError if a mitigation is set and the rows have no groups or no outcome, or name several attributes
        with `drop`.
        """
        people = _people(step_input.table["people"].to_pylist())
        outcomes = of_replies(step_input.table["reply"].to_pylist(), self.outcome)
        weight = step_input.table["weight"].to_pylist()
        if not people or not any(outcomes.labels):
            problem = "name no two groups of people" if not people else "have no outcome: their replies are free text"
            if self.mitigate != "none":
                raise ConfigError(f"bias: the rows {problem}", "name group and outcome, or leave out mitigate")
            return StepResult(facts={"outcome": outcomes.explanation, "not_measured": f"the rows {problem}"})
        before = measure_rates(people, outcomes.labels, weight)
        removals, then, after = self._mitigated(people, outcomes, weight, step_input)
        facts = {"outcome": outcomes.explanation, "mitigate": self.mitigate, "before": before.as_json()}
        if after is not None:
            facts["after"] = after.as_json()
        return StepResult(removals, {EVIDENCE: _table(before, after)}, facts, then)

    def _mitigated(
        self, people: Memberships, outcomes: class_labels.ClassLabels, weight: Sequence[float], step_input: StepInput
    ) -> tuple[list[Removal], Weigh | None, OutcomeRates | None]:
        if self.mitigate == "reweight":
            factors = mitigation.reweighing_factors(people, outcomes.labels, weight)
            then = Weigh(tuple((*key, factor) for key, factor in sorted(factors.items())), self.group, outcomes.form)
            new_weights = []
            for row, (row_weight, outcome) in enumerate(zip(weight, outcomes.labels, strict=True)):
                groups = {name: values[row] for name, values in people.items()}
                new_weights.append(row_weight * mitigation.weight_factor(factors, groups, outcome))
            return [], then, measure_rates(people, outcomes.labels, new_weights)
        if self.mitigate == "drop":
            if len(people) > 1:
                raise ConfigError(
                    f"bias: the rows name {', '.join(people)}; drop takes one", f"group: [{next(iter(people))}]"
                )
            (name, values), *_ = people.items()
            dropped_rows = mitigation.rows_to_drop(mitigation.table(values, outcomes.labels), self.seed)
            removals = []
            for row in dropped_rows:
                detail = f"{name} {values[row]}, {outcomes.labels[row]!r:.60}: more of it than of the other groups"
                removals.append(Removal(row, "group_outcome", detail))
            remaining_rows = sorted(set(range(len(step_input))) - set(dropped_rows))
            remaining_people = {name: [values[row] for row in remaining_rows]}
            remaining_labels = [outcomes.labels[row] for row in remaining_rows]
            remaining_weights = [weight[row] for row in remaining_rows]
            return removals, None, measure_rates(remaining_people, remaining_labels, remaining_weights)
        return [], None, None


@dataclass(frozen=True)
class Weigh:
    """Multiplication of row weights by the factors that `bias` with `reweight` determined.

    factors: tuples (attribute, group, outcome, factor).
    """

    factors: tuple[tuple[str, str, str, float], ...]
    group: tuple[str, ...]
    outcome: str
    kind: Literal["bias"] = "bias"

    def open(self, folder: Path) -> RowFunction:
        """Return the function that multiplies a row's weight."""
        factors = {(attribute, group, outcome): factor for attribute, group, outcome, factor in self.factors}

        def apply(example: Example) -> Example | Drop:
            fields = {name: values[0] for name, values in row_memberships([example], self.group).items()}
            factor = mitigation.weight_factor(
                factors, fields, class_labels.find([example.reply], self.outcome).labels[0]
            )
            return example if factor == 1 else replace(example, weight=example.weight * factor)

        return apply


def _people(json_rows: Sequence[str]) -> Memberships:
    """Return attribute -> the group of each row, for attributes with at least two groups."""
    rows: list[Mapping[str, str | None]] = [json.loads(item) for item in json_rows]
    people = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        if len({value for value in values if value}) > 1:
            people[name] = values
    return people


def _table(before: OutcomeRates, after: OutcomeRates | None) -> Any:
    rows = []
    for when, rates in (("before", before), ("after", after)):
        if rates is None:
            continue
        for attribute, groups in rates.rates.items():
            for group, outcomes in groups.items():
                for outcome, rate in outcomes.items():
                    labels = {"when": when, "attribute": attribute, "group": group, "outcome": outcome}
                    rows.append({**labels, **asdict(rate)})
    return pa.Table.from_pylist(rows, _SCHEMA)


@dataclass(frozen=True)
class Counterfactuals:
    """Add copies of training rows about a person of one group, rewritten to another group.

    The reply's outcome is kept. English, by the lexicon of `text/demographics/group_terms.py`. A row gets no copy if
    grammar or meaning cannot be kept, or if it mentions people of several groups.
    """

    group: tuple[str, ...] = option(("sex",), f"by what: {', '.join(ATTRIBUTES)}")
    rehearsal: bool = option(False, "copy rows of rehearsal sources too")
    kind: Literal["counterfactuals"] = "counterfactuals"

    def __post_init__(self) -> None:
        if unknown := [name for name in self.group if name not in ATTRIBUTES]:
            raise ConfigError(f"group is {unknown[0]!r}", f"group: [{', '.join(ATTRIBUTES)}]")

    def open(self, folder: Path) -> CopyFunction:
        """Return the function that yields the counterfactual copies of a row."""

        def copies(example: Example) -> Iterator[AugmentedRow | Drop]:
            for copy, changes in counterfactuals(example, self.group):
                yield AugmentedRow(copy, changes)

        return copies
