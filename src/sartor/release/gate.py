"""Gate checks: gain, forgetting, licence, privacy, user rules.

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

`attacks.json` is written by `federate/privacy/privacy_attacks.py`, and judged here, below it, so that the gate and whoever
makes a report say the same. A bound of epsilon below the claim proves nothing; the detail says what could have been shown.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sartor.core import config, parquet_io, statistics
from sartor.core.artifacts import Artifact
from sartor.core.config import REQUIRED, option
from sartor.core.errors import ConfigError
from sartor.core.licences import compliance
from sartor.core.licences.compliance import USES, Objection, Use
from sartor.core.lineage import ancestry, origin_index
from sartor.core.lineage.origin_index import Pair
from sartor.core.records import canonical_text
from sartor.evaluate.bootstrap import LEAST_GROUPS, groups_needed
from sartor.evaluate.limits import BiasLimits, Check, ForgettingLimit, GainLimit, GateLimits, MemorisationLimits, ReviewLimit
from sartor.evaluate.metrics import LOWER_IS_BETTER
from sartor.evaluate.reply_labels import known_fields, label_of, text_of

CONFIDENCE = 0.95
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*$")


@dataclass(frozen=True)
class SliceRule:
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
class GateRules:
    """What a rules file says. text: as it stood, and is signed into the Release."""

    slices: tuple[SliceRule, ...]
    text: str
    limits: GateLimits = GateLimits()

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

    slices: tuple[SliceRule, ...] = option((), "rules about some of the rows")
    gain: GainLimit = option(GainLimit(), "what the tuned model must be better by")
    forgetting: ForgettingLimit = option(ForgettingLimit(), "what tuning may cost elsewhere")
    bias: BiasLimits | None = option(None, "what a group may fare worse by; asks for a Report with an audit")
    memorisation: MemorisationLimits | None = option(None, "what may be learnt by heart; asks for a Report with an audit")
    review: ReviewLimit | None = option(None, "how much of the Dataset's queue may wait for a person")


def open_rules(rules: Mapping[str, Any] | Path | str) -> GateRules:
    """The rules of a YAML file, or of what one holds. Raises ConfigError with the option that is wrong."""
    said = config.load_any(GateFile, rules)
    if said == GateFile():
        raise ConfigError("the rules say nothing", "slices: [{name: ..., where: {...}, forbid: {...}}], or bias: {gap: 0.1}")
    names = [one.name for one in said.slices]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"two slices have the name {min(twice)!r}", "give each a name of its own")
    text = canonical_text(rules) if isinstance(rules, Mapping) else Path(rules).read_text(encoding="utf-8-sig")
    return GateRules(said.slices, text, GateLimits(said.gain, said.forgetting, said.bias, said.memorisation, said.review))


def _judge(one: SliceRule, table: Sequence[Mapping[str, Any]]) -> Check:
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


def _offences(one: SliceRule, asked: Sequence[Mapping[str, Any]]) -> Check:
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


def _floor(one: SliceRule, asked: Sequence[Mapping[str, Any]]) -> Check:
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
    return statistics.clopper_pearson_upper(count, of, CONFIDENCE)


def _values(said: Mapping[str, Any] | None) -> Iterable[tuple[str, set[str]]]:
    for name, value in (said or {}).items():
        yield name, {text_of(one) for one in (value if isinstance(value, list | tuple) else [value])}


FILE, SCHEMA, KIND = "attacks.json", 1, "attack-report"
WEIGHTS = "adapter_model.safetensors"
_AGAIN = "make the adapter again with attacks: sartor federate simulate, data.attack_rows above 0"
Fault = tuple[str, str]


def audit_refutes_claim(claimed: Mapping[str, Any] | None, audit: Mapping[str, Any] | None) -> Fault | None:
    """(problem, remedy) where an audit refutes a claim, or is none of it; None where there is nothing to say against it.

    claimed: {epsilon, delta}; audit: as `federate.privacy.attacks.audit.Audit`.
    """
    if claimed is None:
        return None
    said = claim(claimed)
    if audit is None:
        return f"{said} is claimed, and no audit was made", "train on canaries by coin, and give their scores to `one_run`"
    if audit["delta"] > claimed["delta"]:
        return f"{said} is claimed, and the audit was made at delta {audit['delta']:g}", f"audit at delta {claimed['delta']:g}"
    if audit["epsilon_low"] > claimed["epsilon"]:
        shown = f"{audit['right']} of {audit['guesses']} guesses show epsilon {audit['epsilon_low']:.2f} or more"
        return f"{said} is claimed; {shown}", "look for rows that bypass the noise; claim nothing until it is found"
    return None


def claim(claimed: Mapping[str, Any]) -> str:
    """As a sentence says it."""
    return f"epsilon {claimed['epsilon']:g} at delta {claimed['delta']:g}"


def check_privacy(adapter: Artifact) -> dict[str, Check]:
    """The check of a federated Adapter; none of another."""
    if "federated" not in adapter.manifest.get("run", {}):
        return {}
    claimed = adapter.manifest["recipe"].get("privacy")
    if FILE not in adapter.manifest["files"]:
        if claimed is None:
            return {"privacy": Check("pass", "no privacy is claimed, and no attack report is there")}
        return {"privacy": Check("fail", f"{claim(claimed)} is claimed, and there is no attack report", _AGAIN)}
    return {"privacy": _judged(adapter, claimed)}


def _judged(adapter: Artifact, claimed: Mapping[str, Any] | None) -> Check:
    try:
        said = json.loads((adapter.path / FILE).read_text(encoding="utf-8"))
        if (said["schema"], said["kind"]) != (SCHEMA, KIND):
            raise ValueError("another schema or kind")
        bound, audit = dict(said["adapter"]), said["audit"]
        found = audit_refutes_claim(claimed, audit)
        shown = "" if audit is None else f"an audit shows {audit['epsilon_low']:.2f} of {audit['most']:.2f} that it could have"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return Check("fail", f"{FILE} is no attack report: {error!r}", _AGAIN)
    files = {name: one["sha256"] for name, one in adapter.manifest["files"].items()}
    if WEIGHTS not in bound or any(files.get(name) != digest for name, digest in bound.items()):
        return Check("fail", f"{FILE} speaks of another adapter than lies beside it", _AGAIN)
    if found:
        return Check("fail", *found)
    if claimed is None:
        left_out = "; ".join(f"{attack}: {why}" for attack, why in said.get("skipped", {}).items())
        return Check("pass", f"no privacy is claimed{'; not measured: ' * bool(left_out)}{left_out}")
    return Check("pass", f"{claim(claimed)} is claimed; {shown}")


def check_use(use: str) -> None:
    """Raise ConfigError for a use that there is not, naming the one meant."""
    if use not in USES:
        meant = difflib.get_close_matches(use, USES, n=1)
        raise ConfigError(f"there is no use {use!r}; there are {', '.join(USES)}", f"--use {meant[0] if meant else USES[0]}")


def licence_refusals(adapter: Artifact, use: str) -> tuple[list[str], str]:
    """Why the Adapter may not be released for this use, in sentences, and what would help; nothing when it may.

    A row that a second source also holds, which permits the use, is no reason: the licence that permits is the one used.
    """
    sources = compliance.made_from(adapter.manifest)
    objections = compliance.objections(sources, use)
    dataset = ancestry.find_parent(adapter, "dataset") if objections else None
    of_source: dict[str, list[Objection]] = {}
    for objection in objections:
        of_source.setdefault(objection.source, []).append(objection)
    refused: dict[str, str] = {}
    blamed = {(objection.source, objection.path) for objection in objections}
    for name, found in of_source.items():
        count, rows = _rows(sources, dataset, blamed, {(objection.source, objection.path) for objection in found})
        if count != 0:
            refused[name] = f"{name} {' and '.join(dict.fromkeys(objection.why for objection in found))}{rows}"
    clashes = compliance.conflicts(sources) if use != "internal" else []
    if not (refused or clashes):
        return [], ""
    base = adapter.manifest.get("base")
    of_base = compliance.base_source(base) if base else ""
    return [*refused.values(), *clashes], _remedy(sources, dataset, list(refused), of_base)


def _rows(
    sources: Sequence[Mapping[str, Any]], dataset: Artifact | None, blamed: set[Pair], pairs: set[Pair]
) -> tuple[int | None, str]:
    """Return how many rows (None for the base, which has none), and these and the first of them as text.

    They are from the Dataset, or where it is gone from what the manifest counted.
    """
    if all(not path for _, path in pairs):  # the base
        return None, ""
    if dataset is None:
        count = sum(source["kept"] for source in sources if (source["source"], source.get("path", "")) in pairs)
        return count, f" ({count:,} rows)"
    found = origin_index.rows_only_from(dataset, blamed, pairs)
    more = f" and {found.count - len(found.first):,} more" if found.count > len(found.first) else ""
    first = ", ".join(f"{locator} is {row[:12]}" for row, locator in found.first)
    return found.count, f" ({found.count:,} rows{': ' if first else ''}{first}{more})"


def _remedy(sources: Sequence[Mapping[str, Any]], dataset: Artifact | None, refused: Sequence[str], of_base: str) -> str:
    """Uses that would pass, else what to leave out. of_base: the name of the base among the sources."""
    uses = compliance.permitted(sources)
    said = [f"--use {' or '.join(uses)} is permitted"] if uses else []
    named = [name for name in refused if name != of_base]
    if len(named) < len(refused):
        said.append("state the licence of the base (base.licence in the tuning recipe), or tune another")
    if named:
        where = dataset.path if dataset else "DATASET"
        said.append(f"leave out {', '.join(named[:3])} and curate and tune again (sartor revoke {where} --source {named[0]})")
    return "; ".join(said)


_OTHERS = {"image": "pictures: it does not look", "audio": "recordings: it does not listen"}
_NOUNS = {"image": "a picture", "audio": "a recording"}


def check_gain(name: str, metric: Mapping[str, float], limit: GainLimit = GateLimits.gain, groups: int = 0) -> Check:
    """Whether the primary metric, `name`, is better by an interval that lies above the limit. groups: 0 of an older Report."""
    detail = f"{name} {metric['base']:.3f} -> {metric['tuned']:.3f}, gain in [{metric['low']:.3f}, {metric['high']:.3f}]"
    least, is_lower = limit.at_least, name in LOWER_IS_BETTER
    is_better = metric["high"] < -least if is_lower else metric["low"] > least
    if is_better:
        return Check("pass", detail)
    short = f" does not lie above the {least:g} asked for" if least else " does not exclude 0"
    over = f", over {groups} groups of rows" if groups else ""
    few = f"; fewer than {LEAST_GROUPS} exclude nothing" if 0 < groups < LEAST_GROUPS else ""
    difference = metric["tuned"] - metric["base"]
    needed = groups_needed(difference, metric["low"], metric["high"], groups) if groups and not least else 0
    remedy = ""
    if needed and (difference < 0) == is_lower:
        remedy = f"evaluate on about {needed} groups of rows, if the gain stays as it is (--data FILE); or tune or curate again"
    elif few and not difference:
        remedy = f"evaluate on {LEAST_GROUPS} groups of rows or more (--data FILE); or tune or curate again"
    return Check("cannot tell" if few else "fail", f"{detail}{short}{over}{few}", remedy)


def check_modality(adapter: Artifact, report: Mapping[str, Any]) -> dict[str, Check]:
    """Whether the replies take something from each kind of media that the adapter reads; no check of one that reads text."""
    counted = report.get("modalities", {})
    kinds = [kind for kind in _OTHERS if kind in adapter.manifest["base"].get("towers", {}) or counted.get(kind)]
    if not kinds:
        return {}
    if "ablation" not in report:
        detail = "the Report has no ablation: it is of an older version"
        return {"modality": Check("fail", detail, f"evaluate again: sartor evaluate {adapter.path}")}
    said = [_looks(kind, report["ablation"].get(kind)) for kind in kinds]
    remedies = dict.fromkeys(remedy for _, _, remedy in said if remedy)
    is_fit = all(passes for passes, _, _ in said)
    return {"modality": Check("pass" if is_fit else "fail", "; ".join(detail for _, detail, _ in said), "; ".join(remedies))}


def _looks(kind: str, found: Mapping[str, Any] | None) -> tuple[bool, str, str]:
    """(whether other media of a kind cost something, what was found, what would help)."""
    if not found:
        return False, f"no row of the Report holds {_NOUNS[kind]}", f"evaluate on rows with {_NOUNS[kind]}: --data FILE"
    costs = {
        found["metric"]: found["shuffled"],
        **({"exact_match": found["exact_match"]["shuffled"]} if "exact_match" in found else {}),
    }
    said = [f"{name} {cost['difference']:+.3f} in [{cost['low']:.3f}, {cost['high']:.3f}]" for name, cost in costs.items()]
    detail = f"what {_NOUNS[kind]} of another row cost: {', '.join(said)}"
    if any(cost["low"] > 0 for cost in costs.values()):
        return True, detail, ""
    remedy = f"give rows that only {_NOUNS[kind]} can answer, or train the projector for longer (align, budget)"
    return False, f"the model answers as well with other {_OTHERS[kind]}; {detail}", remedy


def check_forgetting(found: Mapping[str, Any], limit: ForgettingLimit = GateLimits.forgetting) -> Check:
    """Whether the general talk of the probe is still as likely, but for the limit."""
    if "skipped" in found:
        return Check("fail", f"not measured: {found['skipped']}")
    fits = found["high"] <= limit.at_most
    detail = f"{found['difference']:+.3f} nats per token, in [{found['low']:.3f}, {found['high']:.3f}]"
    source = "{path: asset:small-talk/*.jsonl, rehearsal: true}"
    remedy = "" if fits else f"more general talk among the sources of the curation recipe, {source}; or tune slower"
    return Check("pass" if fits else "fail", f"{detail}; the limit is {limit.at_most:g}", remedy)


def check_licence(adapter: Artifact, use: Use) -> Check:
    """Whether the licences of sources and base permit the use."""
    refusals, remedy = licence_refusals(adapter, use)
    return Check("fail" if refusals else "pass", "; ".join(refusals) or f"{adapter.licence} permits {use} use", remedy)


def check_review(items: int, limit: ReviewLimit | None, where: str) -> dict[str, Check]:
    """Whether few enough items wait for a person; no check where none does and no limit was given. where: the Dataset."""
    if not items and limit is None:
        return {}
    most = (limit or ReviewLimit()).open
    detail = f"{items} items of {where} wait for a person's decision; the limit is {most}"
    return {"review": Check("pass" if items <= most else "fail", detail, "" if items <= most else f"sartor review {where}")}
