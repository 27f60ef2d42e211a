"""Artefacts as the commands write them, made in milliseconds, for tests of pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sartor.core.artifacts import Artifact, write_artifact
from sartor.core.parquet_io import examples_table, write_drops, write_examples, write_rows
from sartor.core.records import Drop, Example, Message, Origin

COUNT = 500


def example(number: int) -> Example:
    messages = (Message.of("user", f"question {number}"), Message.of("assistant", f"Answer {number % 7} of Käse"))
    rejected = (Message.of("assistant", "needle"),) if number == 321 else ()
    split = "eval" if number % 5 == 0 else "train"
    return Example(messages, (Origin("rows.jsonl", f"rows.jsonl:{number}"),), split=split, rejected=rejected)


def dataset_of(path: Path, rows: int = COUNT, group: int = 64) -> Artifact:
    def fill(part: Path) -> dict[str, object]:
        (part / "examples").mkdir()
        (part / "drops").mkdir()
        for index, numbers in enumerate((range(rows // 2), range(rows // 2, rows))):
            pq.write_table(
                examples_table(map(example, numbers)), part / f"examples/{index}.parquet", row_group_size=group
            )
        kept = example(3)
        drops = [
            Drop(
                "near_duplicates",
                "rows.jsonl",
                "rows.jsonl:9",
                "like another",
                kept=kept.id,
                text="user: question 33",
                score=0.9,
            ),
            Drop("too_long", "rows.jsonl", "rows.jsonl:10", "1,000 words", text="LONG"),
        ]
        write_drops(part / "drops/0.parquet", drops)
        return {
            "licence": "MIT",
            "parents": [],
            "counts": {"splits": {"train": 400, "eval": 100}, "dropped": {"too_long": 1}},
        }

    return write_artifact(path, "dataset", fill)


def dataset_with(path: Path, examples: Sequence[Example], drops: Sequence[Drop] = ()) -> Artifact:
    """A Dataset of these rows."""

    def fill(part: Path) -> dict[str, object]:
        write_examples(part / "examples/0.parquet", examples)
        write_drops(part / "drops/0.parquet", drops)
        return {"licence": "MIT", "parents": [], "counts": {"splits": {"train": len(examples)}, "dropped": {}}}

    return write_artifact(path, "dataset", fill)


def adapter_of(path: Path, dataset: Artifact) -> Artifact:
    """An Adapter by its manifest and its training log."""

    def fill(part: Path) -> dict[str, object]:
        lines = [f'{{"update": {step}, "loss": {3 - step / 20}}}' for step in range(1, 41)]
        (part / "log.jsonl").write_text("\n".join([*lines, '{"update": 40, "eval_loss": 1.2}']) + "\n")
        return {
            "licence": "MIT",
            "parents": [dataset.as_parent()],
            "sources": [],
            "base": {"name": "starter"},
            "run": {"updates": 40},
        }

    return write_artifact(path, "adapter", fill)


def report_of(
    path: Path,
    adapter: Artifact,
    rows: Sequence[Mapping[str, Any]] | None = None,
    probes: Mapping[str, Any] | None = None,
    **facts: Any,
) -> Artifact:
    """A Report in which the tuned model won two rows, lost one, and both were right of one."""
    if rows is None:
        scores = (("won", 0.0, 1.0), ("won", 0.0, 1.0), ("lost", 1.0, 0.0), ("same", 1.0, 1.0))
        rows = [report_row(f"{name} {index}", base, tuned) for index, (name, base, tuned) in enumerate(scores)]

    def fill(part: Path) -> dict[str, object]:
        write_rows(part / "rows.parquet", pa.Table.from_pylist(list(rows)).schema, map(dict, rows))
        (part / "report.html").write_text("<html>")
        metric = {"base": 0.5, "tuned": 0.75, "difference": 0.25, "low": -0.1, "high": 0.6}
        return {
            "name": "adapter",
            "parents": [adapter.as_parent()],
            "licence": "MIT",
            "base": {"name": "starter", "digest": "0" * 64},
            "primary": "exact_match",
            "metrics": {
                "exact_match": metric,
                "loss": {"base": 3.0, "tuned": 1.0, "difference": -2.0, "low": -3.0, "high": -1.0},
            },
            "probes": dict(probes or {}),
            "warnings": [{"problem": "four rows are few", "remedy": "add rows"}],
            "rows": len(rows),
            "groups": len(rows),
            **facts,
        }

    return write_artifact(path, "report", fill)


def report_row(text: str, base: float | None, tuned: float | None) -> dict[str, Any]:
    return {
        "id": text,
        "group": text,
        "media": "",
        "prompt": f"prompt {text}",
        "reference": f"reference {text}",
        "base_reply": f"base {text}",
        "tuned_reply": f"tuned {text}",
        "base_exact_match": base,
        "tuned_exact_match": tuned,
    }


def release_of(path: Path, adapter: Artifact, report: Artifact) -> Artifact:
    """A Release by its manifest, unsigned."""

    def fill(part: Path) -> dict[str, object]:
        (part / "x").write_text("x")
        gate = {"gain": {"outcome": "pass", "detail": "above 0"}, "licence": {"outcome": "waived", "detail": "by ada"}}
        return {
            "licence": "MIT",
            "parents": [adapter.as_parent(), report.as_parent()],
            "name": "faq",
            "version": "1.0",
            "base": {"name": "starter"},
            "gate": gate,
        }

    return write_artifact(path, "release", fill)


def write_specialist(folder: Path) -> None:
    """faq/data, faq/adapter, faq/report and faq/faq-1.0 below a folder, as `sartor tailor` names them."""
    data = dataset_of(folder / "faq" / "data")
    adapter = adapter_of(folder / "faq" / "adapter", data)
    report = report_of(folder / "faq" / "report", adapter)
    release_of(folder / "faq" / "faq-1.0", adapter, report)
