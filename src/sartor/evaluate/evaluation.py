"""Adapter -> Report: what it gained on held-out rows and what it forgot, base against tuned, with intervals.

A Task is rows with prompts and references; both sides answer each prompt greedily and are scored by the same scorers.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from sartor.core import catalogue, parquet_io
from sartor.core.artifacts import Artifact, check_free, open_artifact, write_artifact
from sartor.core.errors import AssetError, ConfigError, ModelError, SourceError
from sartor.core.records import Example
from sartor.core.splits import group_of
from sartor.evaluate import compare, page
from sartor.evaluate.ablation import ablate, media_of, modalities
from sartor.evaluate.answering import answer, losses, reply_limit, side
from sartor.evaluate.audit import probe as audit
from sartor.evaluate.audit import run
from sartor.evaluate.audit.outcomes import outcomes_of
from sartor.evaluate.audit.run import Options
from sartor.evaluate.audit.sides import Sides
from sartor.evaluate.held_out import HeldOut, fitting, held_out
from sartor.evaluate.labels import is_json
from sartor.evaluate.measures import NAMES, Measures, Side
from sartor.evaluate.pictures import thumbnails
from sartor.models import adapters, composed_model
from sartor.models.base import Base, open_base
from sartor.models.content_shielding import reply_text

Notice = Callable[[str], object]
# Up to this median length of the references an exact match is the natural metric, above it the overlap of words
SHORT_REFERENCE_WORDS = 12


@dataclass(frozen=True)
class Evaluated:
    """What `evaluate` made: the Report."""

    report: Artifact

    def as_json(self) -> dict[str, Any]:
        """The command's JSON."""
        manifest = self.report.manifest
        known = (
            "primary", "metrics", "label", "modalities", "ablation", "forgetting", "audit", "rows", "groups", "left_out",
            "wall_s",
        )  # fmt: skip
        return {"report": str(self.report.path), **{key: manifest[key] for key in known}}


@dataclass(frozen=True)
class Measured:
    """What was found on rows: for the manifest, row by row, and of the rows that the page shows their first picture."""

    facts: dict[str, Any]
    table: list[dict[str, Any]]
    pictures: dict[int, str]


def evaluate(
    path: Path | str,
    *,
    out: Path | str | None = None,
    data: Path | str | None = None,
    scorer: str = "",
    label: str = "",
    audit: bool = False,
    favourable: Sequence[str] = (),
    most_rows: int = 200,
    replace: bool = False,
    notice: Notice = lambda line: None,
) -> Evaluated:
    """Measure an Adapter (or a Release) against its base and write a Report.

    The rows are those its Dataset holds out, or those of the file `data` in any input form. `label` is the field of the JSON
    replies that names a class, by a dotted path, or `.`: the whole reply is the class. `scorer` names the metric that the gate
    looks at; by default macro-F1 with a label, the word error rate of transcripts, exact match where references are short,
    else F1. `audit` also looks for bias, for what was learnt by heart and for refusals that changed (`audit/`); `favourable`:
    outcomes that are to be wished for, of those that replies name. `out` defaults to `PATH-report`. Raises ArtifactError,
    ModelError, ConfigError, and SourceError when there is no row to evaluate on.
    """
    began = time.monotonic()
    adapter = open_artifact(path, ("adapter", "release"))
    out = Path(out) if out else adapter.path.with_name(f"{adapter.path.name}-report")
    check_free(out.absolute(), replace=replace)
    if scorer and scorer not in NAMES:
        raise ConfigError(f"there is no scorer {scorer!r}", f"--scorer {' | '.join(NAMES)}")
    with tempfile.TemporaryDirectory() as media:
        asked = held_out(adapter, Path(data) if data else None, most_rows, Path(media))
        options = Options(label, tuple(favourable)) if audit else None
        measured = _measure(adapter, asked, label, scorer, notice, options)
    facts = {
        "name": adapter.path.name,
        "parents": [adapter.as_parent()],
        "sources": adapter.manifest["sources"],
        "licence": adapter.licence,
        **measured.facts,
        "data": str(data) if data else "held-out rows of the Dataset",
        "wall_s": round(time.monotonic() - began, 2),
        "versions": {name: importlib.metadata.version(name) for name in ("sartor", "torch", "transformers", "peft")},
    }

    def fill(part: Path) -> Mapping[str, Any]:
        parquet_io.write_rows(part / "rows.parquet", pa.Table.from_pylist(measured.table).schema, measured.table)
        (part / "report.html").write_text(page.render(facts, adapter, measured.table, measured.pictures), encoding="utf-8")
        return facts

    report = write_artifact(out, "report", fill, replace=replace)
    catalogue.register(report)
    return Evaluated(report)


def _measure(
    adapter: Artifact, asked: HeldOut, label: str, scorer: str, notice: Notice, audited: Options | None = None
) -> Measured:
    """Ask both sides everything.

    Raises ConfigError, before a model is opened, for a label, a scorer or a favourable outcome that the rows lack.
    """
    _measures(asked, label).check(scorer or "exact_match")
    if audited:
        outcomes_of([row.reply for row in asked.examples], label, audited.favourable)
    base, model = open_tuned(adapter, notice)
    notice(f"evaluating base and tuned on {len(asked.examples)} held-out rows")
    asked = fitting(base, asked, reply_limit(base, asked.examples))
    measures = _measures(asked, label)
    primary = scorer or _primary(measures)
    before, after = (answer(base, model, asked, label, tuned=tuned) for tuned in (False, True))
    found = measures.compared(before, after)
    ablation = ablate(base, model, asked, measures, after, primary, notice)
    notice("measuring what was forgotten")
    facts = {
        "base": base.as_manifest(),
        "primary": primary,
        "metrics": {name: dataclasses.asdict(comparison) for name, comparison in found.items()},
        "label": label,
        "modalities": modalities(asked.examples),
        "ablation": ablation,
        "forgetting": measure_forgetting(base, model),
        "audit": _audited(adapter, base, model, asked, audited, notice) if audited else {},
        "rows": len(asked.examples),
        "groups": len(set(measures.groups)),
        "left_out": asked.left_out,
    }
    table = _table(asked.examples, measures, before, after)
    return Measured(facts, table, thumbnails(asked, page.shown(table, primary)))


def _audited(adapter: Artifact, base: Base, model: Any, asked: HeldOut, options: Options, notice: Notice) -> dict[str, Any]:
    return run.audit(adapter, Sides(base, model, asked.folder), asked.examples, options, notice)


def _measures(asked: HeldOut, label: str) -> Measures:
    """What can be measured of the rows. A row with a recording whose reference is text is a transcript."""
    heard = [
        place
        for place, row in enumerate(asked.examples)
        if any(part.kind == "audio" for part in media_of(row)) and not is_json(row.reply)
    ]
    return Measures(
        [reply_text(row.messages[-1]) for row in asked.examples],
        [group_of(row) for row in asked.examples],
        label,
        transcripts=heard,
    )


def open_tuned(adapter: Artifact, notice: Notice = lambda line: None, base_name: str = "") -> tuple[Base, Any]:
    """The base that an Adapter or Release is bound to, and the model with the adapter on it.

    `base_name` gives another place of the same base. Raises ModelError when the base there is not the one that the
    adapter was tuned on, or its chat template differs.
    """
    said = adapter.manifest["base"]
    # a quantised base answers a little differently: what was tuned on one is measured and asked on one
    bits = said["bits"] if said.get("quantisation", "none") != "none" else "auto"
    base = open_base(base_name or said["name"], licence=said["licence"], bits=bits, notice=notice)
    check_base(adapter, base.ref.digest, base.chat.template_digest, base.ref.name)
    if towers := composed_model.read_towers(adapter.path):
        names = {kind: tower.name for kind, tower in towers.items()}
        base = composed_model.compose(base, composed_model.open_towers(names, base.device, notice))
    return base, adapters.open_adapter(base.model, adapter.path)


def check_base(adapter: Artifact, digest: str, template_digest: str, name: str) -> None:
    """Raise ModelError unless a base and its chat template are those that `adapter` is bound to."""
    said = adapter.manifest["base"]
    for what, wanted, found in (
        ("base", said["digest"], digest),
        ("chat template", said["template_digest"], template_digest),
    ):
        if wanted != found:
            raise ModelError(
                f"{adapter.path.name} is bound to the {what} {wanted[:12]} of {said['name']!r}; {name!r} here has {found[:12]}",
                f"use the {what} that it was tuned on, or tune again on this one",
            )


def measure_forgetting(base: Base, model: Any) -> dict[str, Any]:
    """Nats per token on the chitchat probe, before and after, with an interval. `skipped` says why when it has none."""
    try:
        probe = audit.chitchat_rows()
    except AssetError as error:
        return {"skipped": f"{error.problem} ({error.remedy})"}
    encoded, problem = [], ""
    for example in probe:
        try:
            encoded.append(base.chat.encode(example))
        except SourceError as error:
            problem = error.problem
    if not encoded:  # a base that only hears
        return {"skipped": f"the base takes none of the {len(probe)} rows of the probe: {problem}"}
    groups, found = {example.id: group_of(example) for example in probe}, []
    for tuned in (False, True):
        with side(model, tuned=tuned):
            found.append(losses(base, model, encoded))
    (before, tokens), (after, _) = found
    comparison = compare.paired(before, after, [groups[row.example_id] for row in encoded], tokens, is_bounded=False)
    return {"unit": "nats per token", "rows": len(encoded), **dataclasses.asdict(comparison)}


def _primary(measures: Measures) -> str:
    if measures.labelled:
        return "macro_f1"
    if len(measures.transcripts) == len(measures.references):
        return "wer"
    words = statistics.median(len(text.split()) for text in measures.references)
    return "exact_match" if words <= SHORT_REFERENCE_WORDS else "f1"


def _table(examples: Sequence[Example], measures: Measures, before: Side, after: Side) -> list[dict[str, Any]]:
    """One mapping per row, for rows.parquet and the page."""
    columns: dict[str, Sequence[Any]] = {
        "id": [example.id for example in examples],
        "group": measures.groups,
        "media": [",".join(part.kind for part in media_of(example)) for example in examples],
        "prompt": [example.prompt[-1].text if example.prompt else "" for example in examples],
        "reference": measures.references,
        "base_reply": before.replies,
        "tuned_reply": after.replies,
        "base_loss": before.loss,
        "tuned_loss": after.loss,
    }
    if measures.field:
        columns |= {"label": measures.labels, "base_confidence": before.confidence, "tuned_confidence": after.confidence}
    for name, scores in measures.by_row(before).items():
        columns |= {f"base_{name}": scores, f"tuned_{name}": measures.by_row(after)[name]}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
