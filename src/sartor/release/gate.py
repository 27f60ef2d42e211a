"""Rules of one's own for the gate (`gate.yaml`): its limits, and what replies to some of the rows must reach, say, or not say.

    gain: {at_least: 0.05}                       # limits.py has all of them
    forgetting: {at_most: 0.3}
    bias: {gap: 0.1, ratio: 0.8}
    memorisation: {secrets: 0, extracted: 0.1, members: 0.1}
    review: {open: 0}
    slices:
      - name: critical_not_only_repaired
        where: {severity: critical}              # of the reference
        forbid: {action: ["R1: cut the edge"]}   # of the reply
        at_most: 0.0
      - name: german_floor
        where: {language: de}
        metric: exact_match
        at_least: 0.8                            # the mean of the tuned replies' scores

`where` chooses rows of the Report by fields of their references, all of which must hold. A reply offends if a field that
`forbid` names has one of its values, or one that `require` names has none of its values. **A reply that cannot be read, since
it is no JSON or lacks such a field, offends too**: what nobody can read nobody can trust. Fields are dotted paths, `.` is the
whole reply; a value that is no text is compared by its JSON. `bias` and `memorisation` ask for a Report with an audit.
No torch.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sartor.core import config, parquet_io, statistics
from sartor.core.artifacts import Artifact
from sartor.core.config import REQUIRED, option
from sartor.core.errors import ConfigError
from sartor.core.records import canonical_text
from sartor.evaluate.limits import BiasLimits, Check, ForgettingLimit, GainLimit, Limits, MemorisationLimits, ReviewLimit
from sartor.evaluate.reply_labels import known_fields, label_of, text_of

CONFIDENCE = 0.95
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*$")


@dataclass(frozen=True)
class Slice:
    """One rule, and the check `slice:NAME` of the gate."""

    name: str = option(REQUIRED, "letters, digits, '.', '_' and '-': the check is slice:NAME")
    where: Any = option(REQUIRED, "{field: value or list}: rows whose reference has one of the values in each field")
    forbid: Any = option(None, "{field: value or list}: what no reply to them may have")
    require: Any = option(None, "{field: value or list}: of what every reply to them must have one")
    at_most: float = option(0.0, "fraction of the replies that may offend")
    metric: str = option("", "with at_least: a score of the Report's rows (exact_match, f1, rouge_l, accuracy)")
    at_least: float | None = option(None, "the floor: what the mean of that score of the tuned replies must reach, 0..1")

    def __post_init__(self) -> None:
        if not _NAME.match(self.name):
            raise ConfigError(f"the name of the slice is {self.name!r}", "letters, digits, '.', '_' and '-'")
        for key in ("where", "forbid", "require"):
            said = getattr(self, key)
            if said is not None and not (isinstance(said, Mapping) and all(isinstance(name, str) for name in said)):
                raise ConfigError(f"{key} of {self.name} is {said!r}, no mapping of fields", f"{key}: {{field: value}}")
        if bool(self.metric) != (self.at_least is not None):
            raise ConfigError(f"the slice {self.name} has one of metric and at_least", "metric: exact_match, at_least: 0.8")
        if not (self.forbid or self.require or self.metric):
            problem = f"the slice {self.name} neither forbids nor requires anything, nor has it a floor"
            raise ConfigError(problem, "forbid: {field: [values]}; or metric: exact_match, at_least: 0.8")
        if not 0 <= self.at_most <= 1:
            raise ConfigError(f"at_most of {self.name} is {self.at_most}, no fraction", "at_most: 0.0")

    def holds(self, reference: str) -> bool:
        """Whether a row with this reference is asked about."""
        return all(label_of(reference, name) in values for name, values in _values(self.where))

    def verdict(self, reply: str) -> str:
        """`right`, `wrong`, or `unreadable`."""
        labels = {name: label_of(reply, name) for name in (*(self.forbid or {}), *(self.require or {}))}
        if None in labels.values():
            return "unreadable"
        is_wrong = any(labels[name] in values for name, values in _values(self.forbid))
        return "wrong" if is_wrong or any(labels[name] not in values for name, values in _values(self.require)) else "right"


@dataclass(frozen=True)
class Rules:
    """What a rules file says. text: as it stood, and is signed into the Release."""

    slices: tuple[Slice, ...]
    text: str
    limits: Limits = Limits()

    def as_manifest(self) -> dict[str, str]:
        """How a Release names its rules."""
        return {"sha256": hashlib.sha256(self.text.encode()).hexdigest(), "text": self.text}

    def judged(self, report: Artifact) -> dict[str, Check]:
        """The checks of the slices, by the rows of a Report."""
        table = list(parquet_io.read_file(report.path / "rows.parquet"))
        return {f"slice:{one.name}": _judge(one, table) for one in self.slices}


@dataclass(frozen=True)
class GateFile:
    """The options of a rules file."""

    slices: tuple[Slice, ...] = option((), "rules about some of the rows")
    gain: GainLimit = option(GainLimit(), "what the tuned model must be better by")
    forgetting: ForgettingLimit = option(ForgettingLimit(), "what tuning may cost elsewhere")
    bias: BiasLimits | None = option(None, "what a group may fare worse by; asks for a Report with an audit")
    memorisation: MemorisationLimits | None = option(None, "what may be learnt by heart; asks for a Report with an audit")
    review: ReviewLimit | None = option(None, "how much of the Dataset's queue may wait for a person")


def open_rules(rules: Mapping[str, Any] | Path | str) -> Rules:
    """The rules of a YAML file, or of what one holds. Raises ConfigError with the option that is wrong."""
    said = config.load_any(GateFile, rules)
    if said == GateFile():
        raise ConfigError("the rules say nothing", "slices: [{name: ..., where: {...}, forbid: {...}}], or bias: {gap: 0.1}")
    names = [one.name for one in said.slices]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"two slices have the name {min(twice)!r}", "give each a name of its own")
    text = canonical_text(rules) if isinstance(rules, Mapping) else Path(rules).read_text(encoding="utf-8-sig")
    return Rules(said.slices, text, Limits(said.gain, said.forgetting, said.bias, said.memorisation, said.review))


def _judge(one: Slice, table: Sequence[Mapping[str, Any]]) -> Check:
    asked = [row for row in table if one.holds(row["reference"])]
    if not asked:
        known = ", ".join(known_fields(row["reference"] for row in table)) or "none: they are no JSON"
        remedy = f"evaluate on rows that {dict(one.where)} holds of (fields of the references: {known})"
        return Check("fail", "nothing was asked of it: no row of the Report is in the slice", remedy)
    found = [
        judge(one, asked) for judge, is_asked in ((_offences, one.forbid or one.require), (_floor, one.metric)) if is_asked
    ]
    remedy = "; ".join(dict.fromkeys(check.remedy for check in found if check.remedy))
    is_fit = all(check.outcome == "pass" for check in found)
    return Check("pass" if is_fit else "fail", "; ".join(check.detail for check in found), remedy)


def _offences(one: Slice, asked: Sequence[Mapping[str, Any]]) -> Check:
    verdicts = [one.verdict(row["tuned_reply"]) for row in asked]
    wrong, unreadable = verdicts.count("wrong"), verdicts.count("unreadable")
    offending = wrong + unreadable
    detail = (
        f"{offending} of {len(asked)} replies offend ({wrong} by what they say, {unreadable} unreadable): "
        f"{offending / len(asked):.3f}, below {upper_bound(offending, len(asked)):.3f} with {CONFIDENCE:.0%} confidence; "
        f"the limit is {one.at_most:g}"
    )
    if offending <= one.at_most * len(asked):
        return Check("pass", detail)
    first = next(row["id"] for row, verdict in zip(asked, verdicts, strict=True) if verdict != "right")
    return Check("fail", f"{detail}; the first is row {first}", "give more rows of this slice, or tune longer")


def _floor(one: Slice, asked: Sequence[Mapping[str, Any]]) -> Check:
    """Whether the mean of a score of the tuned replies reaches the slice's floor."""
    column, least = f"tuned_{one.metric}", one.at_least or 0.0
    if column not in asked[0]:
        known = " | ".join(
            name.removeprefix("tuned_") for name in asked[0] if name.startswith("tuned_") and name != "tuned_reply"
        )
        return Check("fail", f"the rows of the Report have no score {one.metric!r}", f"metric: {known}")
    scored = [(row["id"], float(row[column])) for row in asked if row[column] is not None]
    mean = sum(score for _, score in scored) / max(len(scored), 1)
    detail = f"{one.metric} {mean:.3f} over {len(scored)} rows; the floor is {least:g}"
    if scored and mean >= least:
        return Check("pass", detail)
    worst = ", ".join(id for id, _ in sorted(scored, key=lambda pair: pair[1])[:3])
    return Check("fail", f"{detail}; the worst are {worst or 'none'}", "give more rows of this slice, or tune longer")


def upper_bound(count: int, of: int) -> float:
    """The one-sided upper bound of a fraction of which `count` in `of` were seen (Clopper & Pearson 1934).

    >>> round(upper_bound(0, 100), 3)
    0.03
    """
    return statistics.upper_bound(count, of, CONFIDENCE)


def _values(said: Mapping[str, Any] | None) -> Iterable[tuple[str, set[str]]]:
    for name, value in (said or {}).items():
        yield name, {text_of(one) for one in (value if isinstance(value, list | tuple) else [value])}
