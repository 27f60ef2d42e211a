"""Verb evaluate: Report of base against tuned.

A Task is rows with prompts and references; both sides answer each prompt greedily and are scored by the same scorers.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from sartor.core import catalogue, parquet_io
from sartor.core.artifacts import Artifact, check_output_free, open_artifact, write_artifact
from sartor.core.errors import ArtifactError, AssetError, ConfigError, ModelError, SourceError
from sartor.core.lineage import ancestry
from sartor.core.records import Example
from sartor.core.row_warnings import evaluation_warnings
from sartor.core.splits import group_of, group_of_stored
from sartor.evaluate import bootstrap, report_page
from sartor.evaluate.audit import audit as run
from sartor.evaluate.audit import probes
from sartor.evaluate.audit.audit import AuditOptions
from sartor.evaluate.audit.counterfactual_bias import outcomes_of
from sartor.evaluate.audit.model_pair import ModelPair
from sartor.evaluate.limits import BiasLimits, judge_bias
from sartor.evaluate.media_ablation import ablate, media_of, modalities
from sartor.evaluate.metrics import LOWER_IS_BETTER, NAMES, MetricSet, ModelOutputs
from sartor.evaluate.predictions import HeldOut, fitting, held_out, losses, measure_model, model_side, reply_limit
from sartor.evaluate.reply_labels import is_json
from sartor.evaluate.report_page import thumbnails
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
        keys = (
            "primary", "metrics", "label", "modalities", "ablation", "forgetting", "audit", "rows", "groups", "left_out",
            "warnings", "wall_s",
        )  # fmt: skip
        return {"report": str(self.report.path), **{key: manifest[key] for key in keys}}


@dataclass(frozen=True)
class EvaluationResult:
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
    start_time = time.monotonic()
    adapter = open_artifact(path, ("adapter", "release"))
    out = Path(out) if out else adapter.path.with_name(f"{adapter.path.name}-report")
    check_output_free(out.absolute(), replace=replace)
    if scorer and scorer not in NAMES:
        raise ConfigError(f"there is no scorer {scorer!r}", f"--scorer {' | '.join(NAMES)}")
    with tempfile.TemporaryDirectory() as media:
        eval_set = held_out(adapter, Path(data) if data else None, most_rows, Path(media))
        options = AuditOptions(label, tuple(favourable)) if audit else None
        measured = _measure(adapter, eval_set, label, scorer, notice, options)
    facts = {
        "name": adapter.path.name,
        "parents": [adapter.as_parent()],
        "sources": adapter.manifest["sources"],
        "licence": adapter.licence,
        **measured.facts,
        "data": str(data) if data else "held-out rows of the Dataset",
        "wall_s": round(time.monotonic() - start_time, 2),
        "versions": {name: importlib.metadata.version(name) for name in ("sartor", "torch", "transformers", "peft")},
    }

    def fill(part: Path) -> Mapping[str, Any]:
        parquet_io.write_rows(part / "rows.parquet", pa.Table.from_pylist(measured.table).schema, measured.table)
        (part / "report.html").write_text(
            report_page.render(facts, adapter, measured.table, measured.pictures), encoding="utf-8"
        )
        return facts

    report = write_artifact(out, "report", fill, replace=replace)
    catalogue.register(report)
    return Evaluated(report)


def _measure(
    adapter: Artifact, eval_set: HeldOut, label: str, scorer: str, notice: Notice, audit_options: AuditOptions | None = None
) -> EvaluationResult:
    """Ask both sides everything.

    Raises ConfigError, before a model is opened, for a label, a scorer or a favourable outcome that the rows lack.
    """
    asked_measures = _measures(eval_set, label)
    asked_measures.check(scorer or "exact_match")
    warnings = evaluation_warnings(asked_measures.classes_or_references, asked_measures.groups)
    for warning in warnings:
        notice(str(warning))
    if audit_options:
        outcomes_of([row.reply for row in eval_set.examples], label, audit_options.favourable)
    base, model = open_tuned(adapter, notice)
    notice(f"evaluating base and tuned on {len(eval_set.examples)} held-out rows")
    eval_set = fitting(base, eval_set, reply_limit(base, eval_set.examples))
    measures = _measures(eval_set, label)
    primary = scorer or _primary(measures)
    before, after = (measure_model(base, model, eval_set, label, tuned=tuned) for tuned in (False, True))
    comparisons = measures.compared(before, after)
    ablation = ablate(base, model, eval_set, measures, after, primary, notice)
    notice("measuring what was forgotten")
    facts = {
        "base": base.as_manifest(),
        "primary": primary,
        "warnings": [dataclasses.asdict(warning) for warning in warnings],
        "metrics": {name: dataclasses.asdict(comparison) for name, comparison in comparisons.items()},
        "label": label,
        "modalities": modalities(eval_set.examples),
        "ablation": ablation,
        "forgetting": measure_forgetting(base, model),
        "audit": _audited(adapter, base, model, eval_set, audit_options, notice) if audit_options else {},
        "rows": len(eval_set.examples),
        "groups": len(set(measures.groups)),
        "left_out": eval_set.left_out,
    }
    table = _table(eval_set.examples, measures, before, after)
    return EvaluationResult(facts, table, thumbnails(eval_set, report_page.rows_to_show(table, primary)))


def _audited(
    adapter: Artifact, base: Base, model: Any, eval_set: HeldOut, options: AuditOptions, notice: Notice
) -> dict[str, Any]:
    audit = run.audit(adapter, ModelPair(base, model, eval_set.folder), eval_set.examples, options, notice)
    check = judge_bias(audit["bias"], BiasLimits())
    notice(f"bias: {check.outcome}: {check.detail}")
    return audit


def _measures(eval_set: HeldOut, label: str) -> MetricSet:
    """What can be measured of the rows. A row with a recording whose reference is text is a transcript."""
    transcripts = [
        index
        for index, row in enumerate(eval_set.examples)
        if any(part.kind == "audio" for part in media_of(row)) and not is_json(row.reply)
    ]
    return MetricSet(
        [reply_text(row.messages[-1]) for row in eval_set.examples],
        [group_of(row) for row in eval_set.examples],
        label,
        transcripts=transcripts,
    )


def open_tuned(adapter: Artifact, notice: Notice = lambda line: None, base_name: str = "") -> tuple[Base, Any]:
    """The base that an Adapter or Release is bound to, and the model with the adapter on it.

    `base_name` gives another place of the same base. Raises ModelError when the base there is not the one that the
    adapter was tuned on, or its chat template differs.
    """
    base_manifest = adapter.manifest["base"]
    # a quantised base answers a little differently: what was tuned on one is measured and asked on one
    bits = base_manifest["bits"] if base_manifest.get("quantisation", "none") != "none" else "auto"
    base = open_base(base_name or base_manifest["name"], licence=base_manifest["licence"], bits=bits, notice=notice)
    check_base(adapter, base.ref.digest, base.chat.template_digest, base.ref.name)
    if towers := composed_model.read_towers(adapter.path):
        names = {kind: tower.name for kind, tower in towers.items()}
        base = composed_model.compose_base(base, composed_model.open_towers(names, base.device, notice))
    return base, adapters.open_adapter(base.model, adapter.path)


def check_base(adapter: Artifact, digest: str, template_digest: str, name: str) -> None:
    """Raise ModelError unless a base and its chat template are those that `adapter` is bound to."""
    base = adapter.manifest["base"]
    for part, bound, actual in (
        ("base", base["digest"], digest),
        ("chat template", base["template_digest"], template_digest),
    ):
        if bound != actual:
            raise ModelError(
                f"{adapter.path.name} is bound to the {part} {bound[:12]} of {base['name']!r}; {name!r} here has {actual[:12]}",
                f"use the {part} that it was tuned on, or tune again on this one",
            )


def measure_forgetting(base: Base, model: Any) -> dict[str, Any]:
    """Nats per token on the chitchat probe, before and after, with an interval. `skipped` says why when it has none."""
    try:
        probe = probes.chitchat_rows()
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
    groups, outputs = {example.id: group_of(example) for example in probe}, []
    for tuned in (False, True):
        with model_side(model, tuned=tuned):
            outputs.append(losses(base, model, encoded))
    (before, tokens), (after, _) = outputs
    comparison = bootstrap.paired_bootstrap(
        before, after, [groups[row.example_id] for row in encoded], tokens, is_bounded=False
    )
    return {"unit": "nats per token", "rows": len(encoded), **dataclasses.asdict(comparison)}


def _primary(measures: MetricSet) -> str:
    if measures.labelled:
        return "macro_f1"
    if len(measures.transcripts) == len(measures.references):
        return "wer"
    words = statistics.median(len(text.split()) for text in measures.references)
    return "exact_match" if words <= SHORT_REFERENCE_WORDS else "f1"


def _table(examples: Sequence[Example], measures: MetricSet, before: ModelOutputs, after: ModelOutputs) -> list[dict[str, Any]]:
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


# of a metric of the whole set, the score of a row that it is made of
_OF_A_ROW = {"macro_f1": "accuracy"}


@dataclass(frozen=True)
class VersionScores:
    """Scores of `metric`, the higher the better; of each row `id, group, reference, live_reply, new_reply, live, new`."""

    metric: str
    table: list[dict[str, Any]]


def compare_with_live(
    adapter: Path | str,
    report: Path | str,
    live: Path | str,
    notice: Callable[[str], object] = lambda line: None,
    *,
    only: Collection[str] | None = None,
) -> VersionScores:
    """Let `live` (a Release or an Adapter) answer what the Report of `adapter` was made of, and score it as the Report did.

    only: ids of the rows to compare on; all by default. The rows are looked up in the Dataset of `adapter`. Rows without a
    score of the primary metric are left out. Raises ArtifactError where the Dataset or one of the rows is gone, ModelError.
    """
    new_version, report_artifact, live_version = (
        open_artifact(adapter, "adapter"), open_artifact(report, "report"), open_artifact(live, ("adapter", "release"))
    )  # fmt: skip
    rows = [
        row for row in parquet_io.read_file(report_artifact.path / "rows.parquet") if only is None or str(row["id"]) in only
    ]
    eval_set = _find_eval_set(new_version, rows)
    base, model = open_tuned(live_version, notice)
    notice(f"{live_version.path} answers the same {len(rows)} rows")
    outputs = measure_model(base, model, eval_set, report_artifact.manifest["label"], tuned=True)
    primary = str(report_artifact.manifest["primary"])
    metric = _OF_A_ROW.get(primary, primary)
    transcripts = [index for index, row in enumerate(rows) if row.get(f"tuned_{metric}") is not None] if metric == "wer" else []
    measures = MetricSet(
        [row["reference"] for row in rows],
        [group_of_stored(row) for row in rows],
        report_artifact.manifest["label"],
        None,
        transcripts,
    )
    live_scores = outputs.loss if metric == "loss" else measures.by_row(outputs)[metric]
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    table = [
        {
            **{name: row[name] for name in ("id", "reference")},
            "group": group_of_stored(row),
            "live_reply": reply,
            "new_reply": row["tuned_reply"],
            "live": sign * score,
            "new": sign * row[f"tuned_{metric}"],
        }
        for row, reply, score in zip(rows, outputs.replies, live_scores, strict=True)
        if score is not None and row[f"tuned_{metric}"] is not None
    ]
    return VersionScores(metric, table)


def write_beside(file: Path, scores: VersionScores) -> None:
    """The rows as Parquet, for a person and for `parquet_io.read_file`."""
    parquet_io.write_rows(file, pa.Table.from_pylist(scores.table).schema, scores.table)


def likelihoods(
    path: Path | str, examples: Sequence[Example], notice: Callable[[str], object] = lambda line: None
) -> list[float]:
    """Nats per token that a Release or Adapter gives to each row's own reply, negative: the higher, the likelier. Text rows."""
    base, model = open_tuned(open_artifact(path, ("adapter", "release")), notice)
    with model_side(model, tuned=True):
        means, _ = losses(base, model, [base.chat.encode(example) for example in examples])
    return [-mean for mean in means]


def _find_eval_set(adapter: Artifact, rows: Sequence[dict[str, Any]]) -> HeldOut:
    datasets = ancestry.find_parents(adapter, "dataset")
    examples = {example.id: example for dataset in datasets for example in parquet_io.read_examples(dataset, "eval")}
    missing_ids = [row["id"] for row in rows if row["id"] not in examples]
    if missing_ids or not datasets:
        raise ArtifactError(
            f"{len(missing_ids) or 'all'} rows of the Report are in no Dataset of {adapter.path} that is still there",
            "evaluate on the Dataset's own rows; sartor index DIR finds one that was moved",
        )
    return HeldOut([examples[row["id"]] for row in rows], datasets[0].path)
