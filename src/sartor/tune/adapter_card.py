"""Model card of an Adapter: what it was made from, what was measured, and how it is loaded.

The YAML head is that of the Hugging Face Hub (hub-docs, modelcard.md). It has no row, prompt or reply, and no path of
the machine: a tracker gets it, and `sartor push` publishes it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import yaml

from sartor.curate.card.metadata import licence_fields
from sartor.curate.card.render import code

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# primary metric -> the task under which the hub lists it; every other metric is of generated text
_TASKS = {"macro_f1": "text-classification", "wer": "automatic-speech-recognition"}


def adapter_card(
    manifest: Mapping[str, Any], name: str, *, repo_id: str = "", report: Mapping[str, Any] | None = None
) -> str:
    """Return the card of an Adapter as Markdown with a YAML head.

    manifest: of the Adapter.
    repo_id: its repository, for the code that loads it; empty for a directory.
    report: manifest of its Report, whose figures are listed with their intervals.
    """
    base, run = manifest["base"], manifest["run"]
    head = {**_head(manifest, name, report), **licence_fields(str(manifest.get("licence", "")), "NOTICE.md")}
    front = yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=100)
    base_name = _public_name(str(base["name"]))
    ids = [f"`{parent['id'][:16]}`" for parent in manifest["parents"] if parent["kind"] == "dataset"]
    licence = code(str(manifest.get("licence", "NOASSERTION")))
    lines = [
        f"# {code(name)}",
        "",
        f"A LoRA adapter of the base {code(base_name)} (digest `{base['digest'][:16]}`), tuned by Sartor on the "
        f"Dataset {' and '.join(ids) or 'of another machine'}. No release gate has passed it.",
        "",
        "## Use",
        "",
        *_loading(base_name, repo_id),
        "",
        "## Training",
        "",
        "| | |",
        "|---|---|",
        *(f"| {label} | {value} |" for label, value in _training_facts(manifest, run)),
        "",
        *_evaluation(report),
        "## Licence",
        "",
        f"Together: {licence}. The licence of each source and of the base, and what they demand of whoever hands the "
        "adapter on, are in `NOTICE.md`, where it goes with this card.",
        "",
    ]
    return f"---\n{front}---\n\n" + "\n".join(lines)


def hub_base(name: str, relation: str) -> dict[str, str]:
    """Return the hub's fields for a base that is one of its models; none for a directory, a file or an asset."""
    if not _HUB_NAME.fullmatch(name) or name.startswith(".") or Path(name).exists():
        return {}
    return {"base_model": name, "base_model_relation": relation}


def _head(manifest: Mapping[str, Any], name: str, report: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the YAML head without the licence."""
    head: dict[str, Any] = {"library_name": "peft", "pipeline_tag": "text-generation"}
    head |= hub_base(str(manifest["base"]["name"]), "adapter")
    sources = (str(source.get("source", "")) for source in manifest.get("sources", ()))
    hub_names = (source.removeprefix("hub:").partition(":")[0] for source in sources if source.startswith("hub:"))
    if datasets := sorted({name for name in hub_names if _HUB_NAME.fullmatch(name)}):
        head["datasets"] = datasets
    objective = str(manifest["recipe"].get("objective", {}).get("kind", "sft"))
    head["tags"] = ["sartor", "lora", objective]
    if report:
        head["model-index"] = [{"name": name, "results": [_result(report)]}]
    return head


def _result(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry of `model-index`: for each metric its value, and the gain over the base with its interval.

    A metric without finite figures is left out, as the hub's head holds numbers alone.
    """
    metrics = []
    for metric, comparison in sorted(report["metrics"].items()):
        if not all(math.isfinite(comparison[key]) for key in ("tuned", "difference", "low", "high")):
            continue
        interval = f"95 % interval {comparison['low']:.3g} to {comparison['high']:.3g}"
        metrics += [
            {"type": metric, "name": metric, "value": _number(comparison["tuned"])},
            {
                "type": metric,
                "name": f"{metric}, difference to the base ({interval})",
                "value": _number(comparison["difference"]),
            },
        ]
    return {
        "task": {"type": _TASKS.get(str(report["primary"]), "text-generation")},
        "dataset": {"type": "private", "name": "held-out rows", "split": str(report.get("split", "eval"))},
        "metrics": metrics,
    }


def _number(value: Any) -> float:
    return round(float(value), 6)


def _public_name(base: str) -> str:
    """Return the name of a base without the directories of this machine."""
    return base if hub_base(base, "") else PurePath(base).name


def _loading(base: str, repo_id: str) -> list[str]:
    return [
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({base!r})",
        f"model = PeftModel.from_pretrained(base, {repo_id or 'ADAPTER'!r})",
        "```",
    ]


def _training_facts(manifest: Mapping[str, Any], run: Mapping[str, Any]) -> list[tuple[str, str]]:
    method, loss = manifest["recipe"].get("method", {}), run.get("loss", {})
    facts = [
        ("updates", f"{run['updates']:,}"),
        ("tokens read, supervised", f"{run['tokens']:,}, {run['supervised_tokens']:,}"),
        _method_fact(method),
        ("seed", str(manifest["recipe"].get("seed", 0))),
    ]
    for key, label in (("first", "first loss"), ("last", "last loss"), ("eval", "loss of held-out rows")):
        if isinstance(loss.get(key), (int, float)):
            facts.append((f"{label}, nats per supervised token", f"{loss[key]:.4f}"))
    versions = manifest.get("versions", {})
    facts.append(("versions", ", ".join(f"{package} {version}" for package, version in sorted(versions.items()))))
    return facts


def _method_fact(method: Mapping[str, Any]) -> tuple[str, str]:
    """Return label and text of the tuning method."""
    kind = method.get("kind", "lora")
    if kind == "lora":
        return "LoRA rank, alpha", f"{method.get('rank')}, {method.get('alpha')}"
    values = [f"{name} {method[name]}" for name in ("rank", "alpha", "block_size") if name in method]
    return "method", ", ".join([kind, *values])


def _evaluation(report: Mapping[str, Any] | None) -> list[str]:
    if report is None:
        return ["## Evaluation", "", "None: `sartor evaluate` measures it against the base.", ""]
    lines = [
        "## Evaluation",
        "",
        f"On {report.get('rows', 0):,} rows of the split {code(str(report.get('split', 'eval')))}, which were not "
        "trained on. The interval is of the difference, at 95 %.",
        "",
        "| metric | base | tuned | difference | interval |",
        "|---|---:|---:|---:|---|",
    ]
    for metric, comparison in sorted(report["metrics"].items()):
        figures = f"{comparison['base']:.3f} | {comparison['tuned']:.3f} | {comparison['difference']:+.3f}"
        lines.append(f"| {code(metric)} | {figures} | {comparison['low']:+.3f} to {comparison['high']:+.3f} |")
    return [*lines, ""]
