"""Verb show: rows of a Dataset with their supervised turns, losses of an Adapter, replies in a Report."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from sartor.core import parquet_io
from sartor.core.artifacts import Artifact, ArtifactPath, open_artifact
from sartor.core.errors import ArtifactError, ConfigError
from sartor.core.records import Message
from sartor.core.terminal import printable
from sartor.curate.pipeline import find_warnings
from sartor.curate.sources.row_readers import read_rows
from sartor.evaluate.metrics import LOWER_IS_BETTER

ROWS = 5
_LEARNT, _READ = "bold green", "dim"
_CURVE_WIDTH, _CURVE = 60, "▁▂▃▄▅▆▇█"
_LONGEST = 2000  # characters of a turn or a reply that are shown


@dataclass(frozen=True)
class ArtifactPreview:
    """Content of an artefact: facts about the whole, and some of its rows."""

    artifact: Artifact
    facts: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]

    def as_json(self) -> dict[str, Any]:
        """Return the JSON output of the command."""
        return {"kind": self.artifact.kind, "path": str(self.artifact.path), **self.facts, "rows": list(self.rows)}

    def table(self) -> list[tuple[str, Any]]:
        """Return the content as a table, for output without a terminal."""
        lines = [(key.replace("_", " "), value) for key, value in self.facts.items()]
        return [*lines, *(("row", row) for row in self.rows)]

    def draw(self, console: Console) -> None:
        """Print the content to a terminal: supervised turns are green, other turns dim."""
        console.print(_shown(f"{self.artifact.kind} {self.artifact.path}", style="bold"))
        for key, value in self.facts.items():
            console.print(_shown(f"{key.replace('_', ' ')}: ", style="cyan"), _shown(_plain(value)), sep="")
        for row in self.rows:
            console.print(_panel(row))


def show(
    path: ArtifactPath, *, rows: int = ROWS, split: Literal["train", "eval", "test", "dropped"] = "train"
) -> ArtifactPreview:
    """Return the content of a Dataset, an Adapter or a Report.

    rows: number of rows to show; 0 for none. split: split of a Dataset. Raises ArtifactError for another artefact,
    ConfigError for a number of rows below 0.
    """
    if rows < 0:
        raise ConfigError(f"rows is {rows}; it must be 0 or more", "-n 5")
    artifact = open_artifact(path, ("dataset", "adapter", "report"))
    try:
        if artifact.kind == "dataset":
            return _dataset(artifact, rows, split)
        return _adapter(artifact) if artifact.kind == "adapter" else _report(artifact, rows)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        # the manifest's id fits whoever wrote it; what stands in it may be anything
        raise ArtifactError(
            f"{artifact.path} does not state what a {artifact.kind} states ({type(error).__name__}: {error})",
            "get it again from its maker, or make it again: sartor curate, tune or evaluate",
        ) from None


def _dataset(dataset: Artifact, count: int, split: str) -> ArtifactPreview:
    """Return the facts and rows of a Dataset."""
    manifest = dataset.manifest
    reasons = Counter(drop.reason for drop in parquet_io.read_drops(dataset))
    # the files of a folder in one line
    files = Counter(
        f"{source['source']} ({source.get('encoding') or 'utf-8'}, {source['form']})" for source in manifest["sources"]
    )
    facts = {
        "rows_by_split": manifest["counts"]["splits"],
        "licence": manifest["licence"],
        "dropped": dict(reasons.most_common()),
        "sources": [f"{text}: {count:,} files" if count > 1 else text for text, count in files.items()],
        "warnings": [warning.problem for warning in find_warnings(dataset)],
    }
    if split == "dropped":
        drops = itertools.islice(parquet_io.read_drops(dataset), count)
        return ArtifactPreview(
            dataset, facts, [{"locator": drop.locator, "reason": drop.reason, "detail": drop.detail} for drop in drops]
        )
    rows = []
    for example in itertools.islice(parquet_io.read_examples(dataset, split), count):
        row: dict[str, Any] = {
            "id": example.id,
            "locators": [origin.locator for origin in example.origins],
            "group": example.group,
            "turns": [_turn(turn) for turn in example.messages],
        }
        if example.rejected:
            row["rejected"] = _text(example.rejected[-1])
        rows.append(row)
    return ArtifactPreview(dataset, facts, rows)


def _turn(turn: Message) -> dict[str, Any]:
    """Return role, text and weight of a turn, and whether it is supervised, as every template treats it."""
    is_learnt = turn.role == "assistant" and turn.weight > 0
    return {"role": turn.role, "text": _text(turn), "weight": turn.weight, "learnt": is_learnt}


def _text(turn: Message) -> str:
    """Return a turn's reasoning and text, with media as paths and tool calls as JSON, at most _LONGEST characters."""
    parts = [part.text if part.kind == "text" else f"<{part.kind} {part.media}>" for part in turn.content]
    if turn.reasoning_content:
        parts.insert(0, f"{turn.reasoning_content}\n")
    if turn.tool_calls:
        parts.append(f"\n{turn.tool_calls}")
    return "".join(parts)[:_LONGEST]


def _adapter(adapter: Artifact) -> ArtifactPreview:
    """Return the facts of an Adapter."""
    manifest = adapter.manifest
    run = manifest.get("run", {})
    settings = manifest.get("settings", {})
    facts = {
        "base": manifest["base"]["name"],
        "licence": manifest["licence"],
        "loss": run.get("loss", {}),
        "curve": "".join(_curve(adapter)),
        "updates": run.get("updates"),
        "tokens": run.get("tokens"),
        "settings": {name: f"{setting['value']} ({setting['reason']})" for name, setting in settings.items()},
        "warnings": [warning["problem"] for warning in run.get("warnings", ())],
    }
    return ArtifactPreview(
        adapter, {name: value for name, value in facts.items() if value not in (None, "", {}, [])}, []
    )


def _curve(adapter: Artifact) -> Iterator[str]:
    """Yield the training loss as block characters, the highest loss as the tallest block."""
    file = adapter.path / "log.jsonl"
    if not file.is_file():
        return
    losses = []
    for _, row in read_rows(file, 1 << 20):
        if isinstance(row, dict) and isinstance(row.get("loss"), (int, float)):
            losses.append(row["loss"])
    width = min(_CURVE_WIDTH, len(losses))
    parts = [losses[len(losses) * index // width : len(losses) * (index + 1) // width] for index in range(width)]
    levels = [sum(part) / len(part) for part in parts if part]
    low, high = min(levels, default=0.0), max(levels, default=0.0)
    for level in levels:
        height = (level - low) / (high - low) if high > low else 0.0
        yield _CURVE[round(height * (len(_CURVE) - 1))]


def _report(report: Artifact, count: int) -> ArtifactPreview:
    """Return the facts of a Report and the rows on which the tuned model lost most against the base."""
    manifest = report.manifest
    metrics = {
        name: f"{metric['base']:.3f} -> {metric['tuned']:.3f}, difference in [{metric['low']:+.3f}, "
        f"{metric['high']:+.3f}]"
        for name, metric in manifest["metrics"].items()
    }
    facts = {
        "rows_measured": manifest["rows"],
        "groups": manifest["groups"],
        "primary": manifest["primary"],
        **metrics,
    }
    table = list(parquet_io.read_file(report.path / "rows.parquet"))
    primary = manifest["primary"]

    # macro-F1 is a metric of the whole set, so rows are ordered by the accuracy of each
    column, sign = {"macro_f1": "accuracy"}.get(primary, primary), -1.0 if primary in LOWER_IS_BETTER else 1.0

    def lost(row: Mapping[str, Any]) -> float:
        """Compute how much worse the tuned model's score of a row is than the base's."""
        base, tuned = row.get(f"base_{column}"), row.get(f"tuned_{column}")
        loss = sign * (float(base) - float(tuned)) if base is not None and tuned is not None else 0.0
        return loss if math.isfinite(loss) else 0.0

    worst = sorted(table, key=lost, reverse=True)[:count]
    keys = ("id", "prompt", "reference", "base_reply", "tuned_reply")
    facts["page"] = str(report.path / "report.html")
    rows = []
    for row in worst:
        rows.append({key: row.get(key) for key in keys})
    return ArtifactPreview(report, facts, rows)


def _panel(row: Mapping[str, Any]) -> RenderableType:
    """Return a row as a panel."""
    if "turns" in row:
        body = []
        for turn in row["turns"]:
            role = turn["role"] if turn["weight"] == 1 else f"{turn['role']} (weight {turn['weight']:g})"
            body.append(_shown(f"{role}: {turn['text']}", style=_LEARNT if turn["learnt"] else _READ))
        return Panel(Group(*body), title=_shown(f"{row['id'][:12]}  {', '.join(row['locators'])}"), title_align="left")
    if "detail" in row:
        title = _shown(f"{row['locator']}: {row['reason']}")
        return Panel(_shown(str(row["detail"])), title=title, title_align="left")
    table = Table(show_header=False, box=None)
    for key, value in row.items():
        style = "green" if key == "tuned_reply" and value == row.get("reference") else ""
        table.add_row(key.replace("_", " "), _shown(str(value)[:_LONGEST], style=style))
    return Panel(table)


def _shown(text: str, style: str = "") -> Text:
    """Return a text as it stands: neither rich's markup nor control characters in it have an effect."""
    return Text(printable(text), style=style)


def _plain(value: Any) -> str:
    """Return a value as text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return "; ".join(map(_plain, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
