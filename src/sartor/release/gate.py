"""Gate checks: gain, forgetting, licence, privacy, regression cases, user rules.

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

`where` selects rows of the Report by fields of their references; all fields must match. A reply violates the rule if a
field in `forbid` has one of the listed values, or a field in `require` has none of them. **An unreadable reply, which
is
not JSON or lacks such a field, is a violation too**, because a reply that cannot be read cannot be trusted. Fields are
dotted paths; `.` is the whole reply. A value that is not text is compared by its JSON. `bias` and `memorisation` need
a
Report with an audit. No torch.

`federate/privacy/privacy_attacks.py` writes `attacks.json`. It is judged here, in a lower layer, so that the gate and
the authors of reports use the same rules. A lower bound of epsilon below the claim proves nothing; the detail names
the
largest bound that the audit could have shown.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sartor.core import config, parquet_io, statistics
from sartor.core.artifacts import Artifact
from sartor.core.config import REQUIRED, option
from sartor.core.errors import ConfigError, one_of
from sartor.core.licences import compliance
from sartor.core.licences.compliance import USES, Objection, Use
from sartor.core.licences.spdx import UNKNOWN
from sartor.core.lineage import ancestry, origin_index
from sartor.core.lineage.origin_index import Pair
from sartor.core.records import canonical_text
from sartor.core.reply_markup import without_reasoning
from sartor.core.splits import LEAST_GROUPS, TEST, group_of_stored, test_rows
from sartor.evaluate.bootstrap import groups_needed
from sartor.evaluate.limits import (
    BiasLimits,
    Check,
    ForgettingLimit,
    GainLimit,
    GateLimits,
    MemorisationLimits,
    ReviewLimit,
)
from sartor.evaluate.metrics import LOWER_IS_BETTER
from sartor.evaluate.regression_cases import CaseResult, describe_failures
from sartor.evaluate.reply_labels import known_fields, label_of, text_of
from sartor.evaluate.scorers import SCORERS
from sartor.release import notices

CONFIDENCE = 0.95
# Scores of a row in 0..1 of which more is better: only of these is a mean above a floor good
_FLOOR_METRICS = (*SCORERS, "accuracy")
_WHOLE_REPLIES = "the same sartor evaluate without --metrics, with --replace"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*$")


@dataclass(frozen=True)
class SliceRule:
    """Rule about some rows of the Report; it becomes the check `slice:NAME` of the gate."""

    name: str = option(REQUIRED, "letters, digits, '.', '_' and '-': the check is slice:NAME")
    where: Any = option(REQUIRED, "{field: value or list}: rows whose reference has one of the values in each field")
    forbid: Any = option(None, "{field: value or list}: what no reply to them may have")
    require: Any = option(None, "{field: value or list}: of what every reply to them must have one")
    at_most: float = option(0.0, "fraction of the replies that may offend")
    metric: str = option("", "with at_least: a score of the Report's rows (exact_match, f1, rouge_l, accuracy)")
    at_least: float | None = option(
        None, "the floor: what the mean of that score of the tuned replies must reach, 0..1"
    )

    def __post_init__(self) -> None:
        if not _NAME.match(self.name):
            raise ConfigError(f"the name of the slice is {self.name!r}", "letters, digits, '.', '_' and '-'")
        for key in ("where", "forbid", "require"):
            value = getattr(self, key)
            if value is not None and not (isinstance(value, Mapping) and all(isinstance(name, str) for name in value)):
                raise ConfigError(
                    f"{key} of {self.name} is {value!r}, no mapping of fields", f"{key}: {{field: value}}"
                )
        self._check_floor()
        if not (self.forbid or self.require or self.metric):
            problem = f"the slice {self.name} neither forbids nor requires anything, nor has it a floor"
            raise ConfigError(problem, "forbid: {field: [values]}; or metric: exact_match, at_least: 0.8")
        if not 0 <= self.at_most <= 1:
            raise ConfigError(f"at_most of {self.name} is {self.at_most}, no fraction", "at_most: 0.0")

    def _check_floor(self) -> None:
        """Raise ConfigError unless metric and at_least, if there are any, are a floor that can be judged."""
        if bool(self.metric) != (self.at_least is not None):
            raise ConfigError(
                f"the slice {self.name} has one of metric and at_least", "metric: exact_match, at_least: 0.8"
            )
        if self.at_least is None:
            return
        if self.metric not in _FLOOR_METRICS:
            raise ConfigError(
                f"metric of {self.name} is {self.metric!r}, no score of a row of which more is better",
                one_of("metric:", _FLOOR_METRICS),
            )
        if not 0 <= self.at_least <= 1:
            raise ConfigError(f"at_least of {self.name} is {self.at_least}, outside 0..1", "at_least: 0.8")

    def holds(self, reference: str) -> bool:
        """Return whether a row with this reference belongs to the slice."""
        return all(label_of(reference, name) in values for name, values in _values(self.where))

    def verdict(self, reply: str) -> str:
        """Return `right`, `wrong` or `unreadable` for a reply."""
        labels = {name: label_of(reply, name) for name in (*(self.forbid or {}), *(self.require or {}))}
        if None in labels.values():
            return "unreadable"
        is_wrong = any(labels[name] in values for name, values in _values(self.forbid))
        return (
            "wrong"
            if is_wrong or any(labels[name] not in values for name, values in _values(self.require))
            else "right"
        )


@dataclass(frozen=True)
class GateRules:
    """Rules and limits of a rules file.

    text: its original text, which is signed into the Release.
    """

    slices: tuple[SliceRule, ...]
    text: str
    limits: GateLimits = GateLimits()

    def as_manifest(self) -> dict[str, str]:
        """Return the rules as recorded in a Release."""
        return {"sha256": hashlib.sha256(self.text.encode()).hexdigest(), "text": self.text}

    def judged(self, report: Artifact) -> dict[str, Check]:
        """Return the checks of the slices on the rows of a Report."""
        table = list(parquet_io.read_file(report.path / "rows.parquet"))
        return {f"slice:{slice_name.name}": _judge(slice_name, table) for slice_name in self.slices}


@dataclass(frozen=True)
class GateFile:
    """Options of a rules file."""

    slices: tuple[SliceRule, ...] = option((), "rules about some of the rows")
    gain: GainLimit = option(GainLimit(), "what the tuned model must be better by")
    forgetting: ForgettingLimit = option(ForgettingLimit(), "what tuning may cost elsewhere")
    bias: BiasLimits | None = option(None, "what a group may fare worse by; asks for a Report with an audit")
    memorisation: MemorisationLimits | None = option(
        None, "what may be learnt by heart; asks for a Report with an audit"
    )
    review: ReviewLimit | None = option(None, "how much of the Dataset's queue may wait for a person")


def open_rules(rules: Mapping[str, Any] | Path | str) -> GateRules:
    """Read the rules of a YAML file, or of a mapping with its content.

    Raises ConfigError with the option that is wrong.
    """
    gate_file = config.load_any(GateFile, rules)
    if gate_file == GateFile():
        raise ConfigError(
            "the rules say nothing", "slices: [{name: ..., where: {...}, forbid: {...}}], or bias: {gap: 0.1}"
        )
    names = [slice_name.name for slice_name in gate_file.slices]
    if duplicates := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"two slices have the name {min(duplicates)!r}", "give each a name of its own")
    text = canonical_text(rules) if isinstance(rules, Mapping) else Path(rules).read_text(encoding="utf-8-sig")
    return GateRules(
        gate_file.slices,
        text,
        GateLimits(
            gain=gate_file.gain,
            forgetting=gate_file.forgetting,
            bias=gate_file.bias,
            memorisation=gate_file.memorisation,
            review=gate_file.review,
        ),
    )


def _judge(rule: SliceRule, table: Sequence[Mapping[str, Any]]) -> Check:
    rows = [row for row in table if rule.holds(row["reference"])]
    if not rows:
        fields = ", ".join(known_fields(row["reference"] for row in table)) or "none: they are no JSON"
        remedy = f"evaluate on rows that {dict(rule.where)} holds of (fields of the references: {fields})"
        return Check("fail", "nothing was asked of it: no row of the Report is in the slice", remedy)
    checks = [
        judge(rule, rows)
        for judge, is_asked in ((_offences, rule.forbid or rule.require), (_floor, rule.metric))
        if is_asked
    ]
    remedy = "; ".join(dict.fromkeys(check.remedy for check in checks if check.remedy))
    is_fit = all(check.outcome == "pass" for check in checks)
    return Check("pass" if is_fit else "fail", "; ".join(check.detail for check in checks), remedy)


def _offences(rule: SliceRule, rows: Sequence[Mapping[str, Any]]) -> Check:
    if cut := sum(bool(row.get("tuned_is_cut")) for row in rows):
        return Check(
            "fail",
            f"{cut} of {len(rows)} replies were not written to their end",
            _WHOLE_REPLIES,
        )
    # judged without its reasoning, whose opening tag the chat template may have written
    verdicts = []
    for row in rows:
        reply = row["tuned_reply"]
        verdicts.append(rule.verdict(without_reasoning(reply, is_opened="<think>" not in reply)))
    wrong, unreadable = verdicts.count("wrong"), verdicts.count("unreadable")
    offending = wrong + unreadable
    groups = {group_of_stored(row) for row in rows}
    is_wrong = [verdict != "right" for verdict in verdicts]
    # rows of one group fail together: the bound counts the group once
    offending_groups = {group_of_stored(row) for row in itertools.compress(rows, is_wrong)}
    bound = upper_bound(len(offending_groups), len(groups))
    grouped = f"; in {len(offending_groups)} of {len(groups)} groups of rows" if len(groups) < len(rows) else ""
    detail = (
        f"{offending} of {len(rows)} replies offend ({wrong} by what they say, {unreadable} unreadable): "
        f"{offending / len(rows):.3f}{grouped}, below {bound:.3f} with {CONFIDENCE:.0%} confidence; "
        f"the limit is {rule.at_most:g}"
    )
    if offending <= rule.at_most * len(rows):
        return Check("pass", detail)
    first = next(itertools.compress(rows, is_wrong))["id"]
    return Check("fail", f"{detail}; the first is row {first}", "give more rows of this slice, or tune longer")


def _floor(rule: SliceRule, rows: Sequence[Mapping[str, Any]]) -> Check:
    """Check whether the mean of a score of the tuned replies reaches the slice's floor."""
    column, floor = f"tuned_{rule.metric}", rule.at_least or 0.0
    if column not in rows[0]:
        present = [name for name in _FLOOR_METRICS if f"tuned_{name}" in rows[0]]
        remedy = one_of("metric:", present) if present else _WHOLE_REPLIES
        return Check("fail", f"the rows of the Report have no score {rule.metric!r}", remedy)
    scored = [(row["id"], float(row[column])) for row in rows if row[column] is not None]
    mean = sum(score for _, score in scored) / max(len(scored), 1)
    detail = f"{rule.metric} {mean:.3f} over {len(scored)} rows; the floor is {floor:g}"
    if scored and mean >= floor:
        return Check("pass", detail)
    worst = ", ".join(id for id, _ in sorted(scored, key=lambda pair: pair[1])[:3])
    return Check("fail", f"{detail}; the worst are {worst or 'none'}", "give more rows of this slice, or tune longer")


def upper_bound(count: int, total: int) -> float:
    """Return the one-sided upper confidence bound of a fraction, seen in `count` of `total`.

    Clopper & Pearson 1934, at CONFIDENCE.

    >>> round(upper_bound(0, 100), 3)
    0.03
    """
    return statistics.clopper_pearson_upper(count, total, CONFIDENCE)


def _values(fields: Mapping[str, Any] | None) -> Iterable[tuple[str, set[str]]]:
    for name, value in (fields or {}).items():
        yield name, {text_of(item) for item in (value if isinstance(value, list | tuple) else [value])}


FILE, SCHEMA, KIND = "attacks.json", 1, "attack-report"
WEIGHTS = "adapter_model.safetensors"
_AGAIN = "make the adapter again with attacks: sartor federate simulate, data.attack_rows above 0"
Fault = tuple[str, str]


def audit_refutes_claim(claimed: Mapping[str, Any] | None, audit: Mapping[str, Any] | None) -> Fault | None:
    """Return (problem, remedy) if an audit refutes a privacy claim or does not test it; else None.

    claimed: {epsilon, delta}; audit: as `federate.privacy.privacy_attacks.Audit`.
    """
    if claimed is None:
        return None
    claim_text = claim(claimed)
    if audit is None:
        return (
            f"{claim_text} is claimed, and no audit was made",
            "train on canaries by coin, and give their scores to `one_run`",
        )
    if audit["delta"] > claimed["delta"]:
        return (
            f"{claim_text} is claimed, and the audit was made at delta {audit['delta']:g}",
            f"audit at delta {claimed['delta']:g}",
        )
    if audit["epsilon_low"] > claimed["epsilon"]:
        evidence = f"{audit['right']} of {audit['guesses']} guesses show epsilon {audit['epsilon_low']:.2f} or more"
        return (
            f"{claim_text} is claimed; {evidence}",
            "look for rows that bypass the noise; claim nothing until it is found",
        )
    return None


def claim(claimed: Mapping[str, Any]) -> str:
    """Return a privacy claim as text."""
    return f"epsilon {claimed['epsilon']:g} at delta {claimed['delta']:g}"


def check_privacy(adapter: Artifact) -> dict[str, Check]:
    """Return the privacy check of a federated Adapter; none for other Adapters."""
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
        fields = json.loads((adapter.path / FILE).read_text(encoding="utf-8"))
        if (fields["schema"], fields["kind"]) != (SCHEMA, KIND):
            raise ValueError("another schema or kind")
        bound, audit = dict(fields["adapter"]), fields["audit"]
        fault = audit_refutes_claim(claimed, audit)
        audit_text = (
            ""
            if audit is None
            else f"an audit shows {audit['epsilon_low']:.2f} of {audit['most']:.2f} that it could have"
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return Check("fail", f"{FILE} is no attack report: {error!r}", _AGAIN)
    files = {name: entry["sha256"] for name, entry in adapter.manifest["files"].items()}
    if WEIGHTS not in bound or any(files.get(name) != digest for name, digest in bound.items()):
        return Check("fail", f"{FILE} speaks of another adapter than lies beside it", _AGAIN)
    if fault:
        return Check("fail", *fault)
    if claimed is None:
        skipped = "; ".join(f"{attack}: {reason}" for attack, reason in fields.get("skipped", {}).items())
        return Check("pass", f"no privacy is claimed{'; not measured: ' * bool(skipped)}{skipped}")
    return Check("pass", f"{claim(claimed)} is claimed; {audit_text}")


def check_use(use: str) -> None:
    """Raise ConfigError for an unknown use, with the closest known one."""
    if use not in USES:
        matches = difflib.get_close_matches(use, USES, n=1)
        raise ConfigError(
            f"there is no use {use!r}; there are {', '.join(USES)}", f"--use {matches[0] if matches else USES[0]}"
        )


def licence_refusals(adapter: Artifact, use: str) -> tuple[list[str], str]:
    """Return why the Adapter may not be released for this use, and the remedy; ([], "") if it may.

    A row that is also in a source that permits the use is no reason, since it may be used under that licence.
    """
    sources = compliance.made_from(adapter.manifest)
    objections = compliance.objections(sources, use)
    dataset = ancestry.find_parent(adapter, "dataset") if objections else None
    by_source: dict[str, list[Objection]] = {}
    for objection in objections:
        by_source.setdefault(objection.source, []).append(objection)
    refused: dict[str, str] = {}
    blamed = {(objection.source, objection.path) for objection in objections}
    for name, source_objections in by_source.items():
        count, rows = _rows(
            sources, dataset, blamed, {(objection.source, objection.path) for objection in source_objections}
        )
        if count != 0:
            refused[name] = (
                f"{name} {' and '.join(dict.fromkeys(objection.reason for objection in source_objections))}{rows}"
            )
    clashes = compliance.conflicts(sources) if use != "internal" else []
    if not (refused or clashes):
        return [], ""
    base = adapter.manifest.get("base")
    base_source = compliance.base_source(base) if base else ""
    return [*refused.values(), *clashes], _remedy(sources, dataset, list(refused), base_source=base_source, use=use)


def _rows(
    sources: Sequence[Mapping[str, Any]], dataset: Artifact | None, blamed: set[Pair], pairs: set[Pair]
) -> tuple[int | None, str]:
    """Return the number of affected rows, and a text with their number and the first of them.

    The number is None for the base, which has no rows. The rows come from the Dataset, or if it is gone, from the
    counts
    in the manifest.
    """
    if all(not path for _, path in pairs):  # the base
        return None, ""
    if dataset is None:
        count = sum(source["kept"] for source in sources if (source["source"], source.get("path", "")) in pairs)
        return count, f" ({count:,} rows)"
    sample = origin_index.rows_only_from(dataset, blamed, pairs)
    suffix = f" and {sample.count - len(sample.first):,} more" if sample.count > len(sample.first) else ""
    first = ", ".join(f"{locator} is {row[:12]}" for row, locator in sample.first)
    return sample.count, f" ({sample.count:,} rows{': ' if first else ''}{first}{suffix})"


def _remedy(
    sources: Sequence[Mapping[str, Any]], dataset: Artifact | None, refused: Sequence[str], base_source: str, use: str
) -> str:
    """Return the permitted uses, or else what to leave out or change.

    base_source: name of the base among the sources.
    """
    uses = compliance.permitted(sources)
    text = [f"--use {' or '.join(uses)} is permitted"] if uses else []
    removable = [name for name in refused if name != base_source]
    if len(removable) < len(refused):
        base = next(source for source in sources if source["source"] == base_source)
        if base["licence"] == UNKNOWN:
            text.append("state the licence of the base (base.licence in the tuning recipe), or tune another")
        elif not compliance.objections([{**base, "use": [use]}], use):
            text.append(
                f"state what you may use the base for (base.use: [{use}] in the tuning recipe), or tune another"
            )
        else:
            text.append("tune a base whose licence permits it")
    if removable:
        path = shlex.quote(str(dataset.path)) if dataset else "DATASET"
        text.append(
            f"leave out {', '.join(removable[:3])} and curate and tune again (sartor revoke {path} --source "
            f"{removable[0]})"
        )
    return "; ".join(text)


_OTHERS = {"image": "pictures: it does not look", "audio": "recordings: it does not listen"}
_NOUNS = {"image": "a picture", "audio": "a recording"}


def check_gain(
    name: str,
    metric: Mapping[str, float],
    limit: GainLimit = GateLimits.gain,
    groups: int = 0,
    *,
    has_test_split: bool = False,
) -> Check:
    """Check whether the whole confidence interval of the primary metric's gain is above the limit.

    name: the metric. groups: number of groups of rows; 0 in Reports of older versions.
    has_test_split: whether the release must be measured on a test split; then no other rows can replace it.
    """
    detail = (
        f"{name} {metric['base']:.3f} -> {metric['tuned']:.3f}, gain in [{metric['low']:.3f}, {metric['high']:.3f}]"
    )
    min_gain, is_lower = limit.at_least, name in LOWER_IS_BETTER
    is_better = metric["high"] < -min_gain if is_lower else metric["low"] > min_gain
    if is_better:
        return Check("pass", detail)
    shortfall = f" does not lie above the {min_gain:g} asked for" if min_gain else " does not exclude 0"
    groups_text = f", over {groups} groups of rows" if groups else ""
    few_text = f"; fewer than {LEAST_GROUPS} exclude nothing" if 0 < groups < LEAST_GROUPS else ""
    difference = metric["tuned"] - metric["base"]
    needed = groups_needed(difference, metric["low"], metric["high"], groups) if groups and not min_gain else 0
    remedy = ""
    if needed and (difference < 0) == is_lower:
        if has_test_split:
            remedy = (
                f"curate again with a larger split.test_fraction, for about {needed} groups in the test split if the "
                "gain stays as it is, and tune again"
            )
        else:
            remedy = (
                f"evaluate on about {needed} groups of rows, if the gain stays as it is (--data FILE); or tune or "
                "curate again"
            )
    elif few_text and not difference:
        if has_test_split:
            remedy = (
                f"curate again with a larger split.test_fraction, for {LEAST_GROUPS} groups or more in the test "
                "split, and tune again"
            )
        else:
            remedy = f"evaluate on {LEAST_GROUPS} groups of rows or more (--data FILE); or tune or curate again"
    return Check("cannot tell" if few_text else "fail", f"{detail}{shortfall}{groups_text}{few_text}", remedy)


def check_modality(adapter: Artifact, report: Mapping[str, Any]) -> dict[str, Check]:
    """Check whether the replies depend on each kind of media that the adapter reads.

    Text adapters have no such check.
    """
    counted = report.get("modalities", {})
    kinds = [kind for kind in _OTHERS if kind in adapter.manifest["base"].get("towers", {}) or counted.get(kind)]
    if not kinds:
        return {}
    if "ablation" not in report:
        detail = "the Report has no ablation: it is of an older version"
        return {
            "modality": Check(
                "fail", detail, f"evaluate again: sartor evaluate {shlex.quote(str(adapter.path))} --replace"
            )
        }
    results = [_judge_modality(kind, report["ablation"].get(kind)) for kind in kinds]
    remedies = dict.fromkeys(remedy for _, _, remedy in results if remedy)
    is_fit = all(passes for passes, _, _ in results)
    return {
        "modality": Check(
            "pass" if is_fit else "fail", "; ".join(detail for _, detail, _ in results), "; ".join(remedies)
        )
    }


def _judge_modality(kind: str, ablation: Mapping[str, Any] | None) -> tuple[bool, str, str]:
    """Return (whether other media of this kind lower the score, the finding, the remedy)."""
    if not ablation:
        return (
            False,
            f"no row of the Report holds {_NOUNS[kind]}",
            f"evaluate on rows with {_NOUNS[kind]}: --data FILE",
        )
    costs = {ablation["metric"]: ablation["shuffled"]}
    # either suffices, so that both count only at half the level each; Reports of older versions have the whole level
    if "exact_match" in ablation and "tail" in ablation:
        costs["exact_match"] = ablation["exact_match"]["shuffled"]
    cost_texts = [
        f"{name} {cost['difference']:+.3f} in [{cost['low']:.3f}, {cost['high']:.3f}]" for name, cost in costs.items()
    ]
    detail = f"what {_NOUNS[kind]} of another row cost: {', '.join(cost_texts)}"
    if any(cost["low"] > 0 for cost in costs.values()):
        return True, detail, ""
    remedy = f"give rows that only {_NOUNS[kind]} can answer, or train the projector for longer (align, budget)"
    return False, f"the model answers as well with other {_OTHERS[kind]}; {detail}", remedy


_FORGETTING_REMEDY = (
    "sartor tune RECIPE --out DIR --data.rehearsal '{path: asset:general-text, loss: kl, fraction: 0.4, weight: 2}'; "
    "or a lower optimizer.learning_rate, or fewer budget.epochs"
)


def check_forgetting(forgetting: Mapping[str, Any], limit: ForgettingLimit = GateLimits.forgetting) -> Check:
    """Check whether the worst probe's replies are still as likely, within the limit.

    Reports of older versions have one probe.
    """
    if "skipped" in forgetting:
        return Check("fail", f"not measured: {forgetting['skipped']}")
    is_fit = forgetting["high"] <= limit.at_most
    name = f"worst of its probes, {forgetting['probe'].replace('_', ' ')}: " if "probe" in forgetting else ""
    detail = (
        f"{name}{forgetting['difference']:+.3f} nats per token, in [{forgetting['low']:.3f}, {forgetting['high']:.3f}]"
    )
    remedy = "" if is_fit else _FORGETTING_REMEDY
    return Check("pass" if is_fit else "fail", f"{detail}; the limit is {limit.at_most:g}", remedy)


def check_test(adapter: Artifact, report: Mapping[str, Any]) -> dict[str, Check]:
    """Check whether the Report is on the test split of the Adapter's Dataset or of an ancestor.

    There is no check without a test split.
    """
    datasets = ancestry.test_datasets(adapter)
    rows = sum(test_rows(dataset.manifest) for dataset in datasets)
    if not rows:
        return {}
    chosen = report.get("chosen", {}).get("sentence", "how often they were looked at is not known")
    if report.get("split") == TEST:
        return {"test": Check("pass", f"measured on {report['rows']} of {rows} rows of the test split; {chosen}")}
    names = " and ".join(dataset.path.name for dataset in datasets)
    verb = "keeps" if len(datasets) == 1 else "keep"
    detail = f"{names} {verb} {rows} rows for the release, and the Report is not of them; {chosen}"
    return {
        "test": Check(
            "fail",
            detail,
            f"sartor evaluate {shlex.quote(str(adapter.path))} --split test, once, for the adapter that is to go out",
        )
    }


def check_licence(adapter: Artifact, use: Use, name: str = "") -> Check:
    """Check whether the licences of sources and base permit the use and their other rules are met.

    These rules concern the name of the Release and the texts that must accompany it.
    name: name of the Release; empty to skip the check of the name.
    """
    refusals, remedy = licence_refusals(adapter, use)
    name_objection = compliance.name_objection(compliance.made_from(adapter.manifest), name) if name else ""
    if name_objection and use != "internal":
        refusals.append(name_objection)
        remedy = "; ".join(filter(None, (remedy, f"--name llama-{name}")))
    problem, fix = notices.missing_texts(adapter.manifest)
    if problem and use != "internal":
        refusals.append(problem)
        remedy = "; ".join(filter(None, (remedy, fix)))
    wanted = notices.sentences(adapter.manifest)
    written = f"; {notices.FILE} will say {' and '.join(map(repr, wanted))}" if wanted else ""
    return Check(
        "fail" if refusals else "pass", "; ".join(refusals) or f"{adapter.licence} permits {use} use{written}", remedy
    )


def check_review(items: int, limit: ReviewLimit | None, where: str) -> dict[str, Check]:
    """Check whether few enough items of a Dataset wait for a review.

    There is no check if none waits and no limit is set. where: the Dataset.
    """
    if not items and limit is None:
        return {}
    max_items = (limit or ReviewLimit()).open
    detail = f"{items} items of {where} wait for a person's decision; the limit is {max_items}"
    return {
        "review": Check(
            "pass" if items <= max_items else "fail",
            detail,
            "" if items <= max_items else f"sartor review {shlex.quote(str(where))}",
        )
    }


@dataclass(frozen=True)
class CaseEvidence:
    """Measured regression cases of the Release that a version follows (`evaluate/regression_cases.py`).

    unknown_starts: paths of what its tuning started from and that is gone, so that its cases are not known.
    """

    results: tuple[CaseResult, ...] = ()
    unknown_starts: tuple[str, ...] = ()


def check_cases(evidence: CaseEvidence, adapter: Path) -> dict[str, Check]:
    """Check whether the version passes every regression case that it inherits or is given.

    There is no check without cases. It cannot tell if the Release that the tuning started from is not there.
    """
    results, unknown_starts = evidence.results, evidence.unknown_starts
    if not (results or unknown_starts):
        return {}
    failures = describe_failures(results)
    detail = f"{len(results) - len(failures)} of {len(results)} regression cases pass"
    if failures:
        command = f"sartor trace {shlex.quote(str(adapter))} --prompt P --reply R"
        remedy = f"{command} names the rows behind a reply; sartor fix removes them"
        return {"cases": Check("fail", f"{detail}; {'; '.join(failures)}", remedy)}
    if unknown_starts:
        missing = f"the cases of {', '.join(unknown_starts)}, which the tuning started from, are not known: it is gone"
        return {"cases": Check("cannot tell", f"{detail}; {missing}", "sartor index DIR finds what was moved")}
    return {"cases": Check("pass", detail)}
