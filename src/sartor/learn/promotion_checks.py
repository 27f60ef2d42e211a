"""Comparison of a new version with the live one.

Three kinds of rows are compared: `held_out`, which the live version's own Dataset holds out; `feedback`, corrections
that were not trained on; and `ratings`, replies that people rated. Corrections were chosen because the live version
erred on them, so the choice alone puts it behind. A gain there must be one over a control and over the live version
(`gain_test`). Only the held-out rows can show that nothing else suffered.

Each key's ratings are compared with all others by the evidence of the monitors (`core/confidence_sequences.py`), in
both directions. A key that is named has not necessarily done anything wrong: whoever asks harder questions differs
from the others. A person decides (`--believe`, `--ignore`).
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sartor.core.confidence_sequences import FailureRate, log_evidence
from sartor.core.errors import GateError
from sartor.core.splits import FEW_GROUPS, LEAST_GROUPS, group_of_stored
from sartor.evaluate import bootstrap
from sartor.evaluate.bootstrap import Comparison
from sartor.evaluate.limits import Check
from sartor.evaluate.reply_labels import known_fields, label_of
from sartor.learn import gain_test
from sartor.learn.gain_test import Claim
from sartor.serving.team_config import NotWorse

Row = Mapping[str, Any]
GAIN, NOT_WORSE = "gain over live", "not worse"
# most values of a field: more would cut the rows into slices too small to judge
MOST_VALUES = 40
MOST_NAMED = 8


def of_rows(table: Sequence[Row]) -> Comparison:
    """Return the new version's scores less the live one's, with the interval over groups."""
    return bootstrap.paired_bootstrap(
        [row["live"] for row in table], [row["new"] for row in table], [group_of_stored(row) for row in table]
    )


@dataclass(frozen=True)
class Judgement:
    """Checks of a new version against the live one, by name.

    comparisons: new less live by kind of rows, each with its own 95 % interval; for a person to read, none proves a
    gain.
    claims: what may show a gain, tested as far as the opponents were measured.
    """

    checks: Mapping[str, Check]
    comparisons: Mapping[str, Comparison]
    claims: Sequence[Claim]

    @property
    def decisive(self) -> Claim:
        """First claim that shows a gain, else that of the held-out rows."""
        return next((claim for claim in self.claims if claim.is_gain), self.claims[0])

    @property
    def refused(self) -> str:
        """Checks that hold the version back, with their numbers; empty if none does."""
        return "; ".join(f"{name}: {check.detail}" for name, check in self.checks.items() if check.holds_back)

    @property
    def needless_control(self) -> str:
        """Reason why no control could change the decision; empty if one could."""
        failed = [name for name, check in self.checks.items() if check.holds_back]
        if GAIN not in failed:
            return f"{self.decisive.kind} shows the gain"
        if others := [name for name in failed if name != GAIN]:
            return f"refused anyway: {', '.join(others)}"
        untested = [claim for claim in self.claims if claim.result is None]
        if not untested:
            return "no held-out feedback of enough groups that a control could be compared on"
        if not any(claim.may_be_gain for claim in untested):
            return f"no better than the live version on {', '.join(claim.kind for claim in untested)}"
        return ""


def judge(kinds: Mapping[str, Sequence[Row]], looks: Mapping[str, int], rules: NotWorse) -> Judgement:
    """Compare the new version with the live one, and with the control where rows have its scores.

    kinds: `held_out`, `feedback` and `ratings` rows with `live`, `new` and maybe `control`.
    looks: row id -> number of other retrains that looked at it.
    Raises GateError for fewer than two held-out rows.
    """
    if len(kinds["held_out"]) < 2:
        raise GateError(
            "the live version's Dataset holds out too few rows to tell what would suffer",
            "sartor curate RECIPE --out DATASET --replace --split.eval_fraction 0.1, then tune and release on it",
        )
    comparisons = {kind: of_rows(rows) for kind, rows in kinds.items() if len(rows) > 1}
    claims = gain_test.judge_claims(gain_test.plan_claims(kinds, looks))
    harmless = not_worse(comparisons["held_out"], rules.margin)
    if thin_slices := unjudged(kinds["held_out"], rules):
        harmless = replace(harmless, detail=f"{harmless.detail}; slices of too few rows to be judged: {thin_slices}")
    checks = {GAIN: gain(claims, comparisons), NOT_WORSE: harmless, **slices(kinds["held_out"], rules)}
    return Judgement(checks, comparisons, claims)


def gain(claims: Sequence[Claim], comparisons: Mapping[str, Comparison]) -> Check:
    """Return the check of a gain, which a claim must show at its share of one level of error.

    The detail lists all comparisons.
    """
    lines = [format_claim(claim) for claim in claims if claim.result is not None]
    tested = {claim.kind for claim in claims if claim.result is not None}
    lines += [
        f"{kind}, of which no gain follows without a control: {format_comparison(comparison)}"
        for kind, comparison in comparisons.items()
        if kind not in tested
    ]
    if any(claim.is_gain for claim in claims):
        return Check("pass", "; ".join(lines))
    remedy = "more feedback, or a longer tuning (retrain.tuning)"
    if any(claim.look > 1 for claim in claims):
        remedy += "; held-out rows that no retrain has looked at (sartor curate with more of them) tell most"
    return Check("fail", f"no interval lies above 0: {'; '.join(lines)}", remedy)


def format_claim(claim: Claim) -> str:
    """Return a claim as one line."""
    if claim.result is None:
        return f"{claim.kind}: not compared with the {claim.opponent}"
    level = f"({claim.confidence:.2%} interval, look {claim.look})"
    if claim.over_live is None:
        return f"{claim.kind}: {format_comparison(claim.result)} {level}"
    results = f"{format_comparison(claim.result)}, and over the live version: {format_comparison(claim.over_live)}"
    return f"{claim.kind} over the control: {results} {level}"


def not_worse(comparison: Comparison, margin: float) -> Check:
    """Return the check of non-inferiority on the held-out rows: the mean may fall by `margin` at most.

    It passes if the interval's lower end is at least -margin.
    """
    fits = comparison.low >= -margin or comparison.low > 0
    remedy = (
        ""
        if fits
        else "more rehearsal (retrain.rehearsal), fewer epochs (retrain.tuning), or more held-out rows to tell"
    )
    if not fits and comparison.difference >= -margin:
        remedy = f"held-out rows of {FEW_GROUPS} groups or more to tell; {remedy}"
    return Check("pass" if fits else "fail", f"{format_comparison(comparison)}; it may fall by {margin:g}", remedy)


def slices(table: Sequence[Row], rules: NotWorse) -> dict[str, Check]:
    """Return a check of each slice: it may not fall by more than the margin, with an interval that excludes 0.

    Empty without slices. A slice with too few groups for a verdict "cannot tell" if it was seen to fall by more.
    Otherwise it has no check (`unjudged`).
    """
    checks = {}
    for name, rows in slice_rows(table, rules.slices, rules.slice_rows):
        comparison, groups = of_rows(rows), _groups(rows)
        if groups < LEAST_GROUPS:
            if -comparison.difference > rules.slice_margin:
                detail = (
                    f"cannot tell: {format_comparison(comparison)} over {groups} groups of rows; "
                    f"{LEAST_GROUPS} are the least that tell"
                )
                checks[f"slice:{name}"] = Check(
                    "cannot tell", detail, f"more held-out rows of {name}, or look at what was said of it"
                )
            continue
        is_worse = comparison.high < 0 and -comparison.difference > rules.slice_margin
        remedy = f"rows of {name} among the rehearsal, or look at what was said of it" if is_worse else ""
        detail = f"{format_comparison(comparison)} over {len(rows)} rows; it may fall by {rules.slice_margin:g}"
        checks[f"slice:{name}"] = Check("fail" if is_worse else "pass", detail, remedy)
    return checks


def unjudged(table: Sequence[Row], rules: NotWorse) -> str:
    """Return the slices with too few rows or groups to be judged, as text; empty if there are none."""
    few = [
        f"{name} ({len(rows)} rows)"
        for name, rows in slice_rows(table, rules.slices, rules.slice_rows, with_few=True)
        if len(rows) < rules.slice_rows or _groups(rows) < LEAST_GROUPS
    ]
    suffix = f" and {len(few) - MOST_NAMED} more" if len(few) > MOST_NAMED else ""
    return ", ".join(few[:MOST_NAMED]) + suffix


def _groups(rows: Sequence[Row]) -> int:
    return len({group_of_stored(row) for row in rows})


def slice_rows(
    table: Sequence[Row], fields: Sequence[str], min_rows: int, *, with_few: bool = False
) -> Iterator[tuple[str, list[Row]]]:
    """Yield (field=value, rows) of each slice with enough rows, or of each.

    fields: if empty, each field of the references that has few values.
    """
    references = [row["reference"] for row in table]
    field_names = fields or [name for name in known_fields(references) if _has_few(table, name, min_rows)]
    for field in field_names:
        by_value: dict[str, list[Row]] = {}
        for row in table:
            if (value := label_of(row["reference"], field)) is not None:
                by_value.setdefault(value, []).append(row)
        for value, rows in sorted(by_value.items()):
            if with_few or len(rows) >= min_rows:
                yield f"{field}={value}", rows


def _has_few(table: Sequence[Row], field: str, min_rows: int) -> bool:
    """Return whether a field distinguishes kinds of rows, as an intent does.

    A field that distinguishes single rows, as a name does, is none.
    """
    counts = Counter(value for row in table if (value := label_of(row["reference"], field)) is not None)
    return (
        1 < len(counts) <= MOST_VALUES and statistics.median(counts.values()) > 1 and max(counts.values()) >= min_rows
    )


def format_comparison(result: Comparison) -> str:
    """Return a comparison as one line."""
    return (
        f"{result.base:.3f} -> {result.tuned:.3f}, {result.difference:+.3f} in [{result.low:+.3f}, {result.high:+.3f}]"
    )


# difference allowed between a key's rate of bad ratings and that of all others
MARGIN = 0.15
# probability that any key is named although all rate alike, within the margin
FALSE_ALARM = 0.01


@dataclass(frozen=True)
class Suspect:
    """Ratings of one key, and of all others."""

    key: str
    rate: FailureRate
    others: FailureRate

    def __str__(self) -> str:
        return (
            f"{self.key} found {self.rate.bad} of {self.rate.seen} bad, all others {self.others.bad} of "
            f"{self.others.seen}"
        )


def by_key(ratings: Iterable[tuple[str, float]]) -> dict[str, FailureRate]:
    """Return key -> its rate of bad ratings, from (key, rating) pairs; a rating of 0 does not count."""
    rates: dict[str, FailureRate] = {}
    for key, rating in ratings:
        if rating:
            rates.setdefault(key, FailureRate()).count(rating < 0)
    return rates


def suspects(rates: Mapping[str, FailureRate]) -> list[Suspect]:
    """Return the keys that differ, strongest evidence first; a single key is never named.

    A key is named if its log evidence reaches ln(2 keys / FALSE_ALARM), a Bonferroni correction over keys and
    directions.
    """
    limit = math.log(2 * max(len(rates), 1) / FALSE_ALARM)
    ranked = []
    for key, key_rate in rates.items():
        other_rates = [rate for name, rate in rates.items() if name != key]
        others = FailureRate(sum(rate.seen for rate in other_rates), sum(rate.bad for rate in other_rates))
        evidence = (
            max(log_evidence(key_rate, others, MARGIN), log_evidence(others, key_rate, MARGIN)) if others.seen else 0.0
        )
        if evidence >= limit:
            ranked.append((evidence, Suspect(key, key_rate, others)))
    # of two keys each differs from the other alike, so only the one with the strongest evidence is named
    return (
        [suspect for _, suspect in sorted(ranked, key=lambda pair: -pair[0])[:1]]
        if len(rates) <= 2
        else [suspect for _, suspect in sorted(ranked, key=lambda pair: -pair[0])]
    )


def check(rates: Mapping[str, FailureRate], believed: Iterable[str] = ()) -> Check:
    """Return the check that keys rate alike, except those that a person believes."""
    flagged = [suspect for suspect in suspects(rates) if suspect.key not in set(believed)]
    if not flagged:
        return Check("pass", f"{len(rates)} keys rate alike, within {MARGIN:g}")
    names = ", ".join(suspect.key for suspect in flagged)
    return Check(
        "fail",
        "; ".join(map(str, flagged)),
        f"look at what {names} rated; then --ignore or --believe {flagged[0].key}",
    )
