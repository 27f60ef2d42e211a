"""The checks of the gate that every Release passes, or somebody waives. Rules of one's own: `rules.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sartor.core.artifacts import Artifact
from sartor.core.licences.compliance import Use
from sartor.evaluate import permission
from sartor.evaluate.bootstrap import LEAST_GROUPS, groups_needed
from sartor.evaluate.limits import (
    Check,  # noqa: F401
    ForgettingLimit,
    GainLimit,
    Limits,
    ReviewLimit,
)
from sartor.evaluate.metrics import LOWER_IS_BETTER

_OTHERS = {"image": "pictures: it does not look", "audio": "recordings: it does not listen"}
_NOUNS = {"image": "a picture", "audio": "a recording"}


def gain(name: str, metric: Mapping[str, float], limit: GainLimit = Limits.gain, groups: int = 0) -> Check:
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


def modality(adapter: Artifact, report: Mapping[str, Any]) -> dict[str, Check]:
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


def forgetting(found: Mapping[str, Any], limit: ForgettingLimit = Limits.forgetting) -> Check:
    """Whether the general talk of the probe is still as likely, but for the limit."""
    if "skipped" in found:
        return Check("fail", f"not measured: {found['skipped']}")
    fits = found["high"] <= limit.at_most
    detail = f"{found['difference']:+.3f} nats per token, in [{found['low']:.3f}, {found['high']:.3f}]"
    source = "{path: asset:small-talk/*.jsonl, rehearsal: true}"
    remedy = "" if fits else f"more general talk among the sources of the curation recipe, {source}; or tune slower"
    return Check("pass" if fits else "fail", f"{detail}; the limit is {limit.at_most:g}", remedy)


def licence(adapter: Artifact, use: Use) -> Check:
    """Whether the licences of sources and base permit the use."""
    refusals, remedy = permission.refusals(adapter, use)
    return Check("fail" if refusals else "pass", "; ".join(refusals) or f"{adapter.licence} permits {use} use", remedy)


def review(items: int, limit: ReviewLimit | None, where: str) -> dict[str, Check]:
    """Whether few enough items wait for a person; no check where none does and no limit was given. where: the Dataset."""
    if not items and limit is None:
        return {}
    most = (limit or ReviewLimit()).open
    detail = f"{items} items of {where} wait for a person's decision; the limit is {most}"
    return {"review": Check("pass" if items <= most else "fail", detail, "" if items <= most else f"sartor review {where}")}
