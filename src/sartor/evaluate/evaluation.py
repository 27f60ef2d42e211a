"""Verb evaluate: Report of base against tuned.

Both sides answer each prompt of the rows greedily. The same scorers compare their replies with the references.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from sartor.core import catalogue, evaluation_ledger, parquet_io
from sartor.core.artifacts import Artifact, ArtifactPath, Report, check_output_free, open_artifact, write_artifact
from sartor.core.config import load_any
from sartor.core.errors import ArtifactError, ConfigError, SartorError, missing_package, one_of
from sartor.core.lazy_import import import_module
from sartor.core.lineage import ancestry
from sartor.core.progress import Progress
from sartor.core.records import Example
from sartor.core.result_display import ShownResult
from sartor.core.row_warnings import DataWarning, evaluation_warnings
from sartor.core.splits import TEST, group_of, group_of_stored
from sartor.evaluate import report_page
from sartor.evaluate.audit import audit as run
from sartor.evaluate.audit import forgetting_probes
from sartor.evaluate.audit.audit import AuditOptions
from sartor.evaluate.audit.counterfactual_bias import outcomes_of
from sartor.evaluate.audit.model_pair import ModelPair
from sartor.evaluate.bootstrap import paired_bootstrap
from sartor.evaluate.judge import JudgedRow, JudgePlan
from sartor.evaluate.judge_options import JudgeOptions
from sartor.evaluate.limits import BiasLimits, judge_bias
from sartor.evaluate.media_ablation import ablate, media_of, modalities
from sartor.evaluate.metrics import ALL_METRICS, LOWER_IS_BETTER, NAMES, MetricSet, ModelOutputs
from sartor.evaluate.paired_measurement import measure_models
from sartor.evaluate.predictions import (
    HeldOut,
    TrainingForm,
    fitting,
    held_out,
    losses,
    model_side,
    reply_cap_warnings,
)
from sartor.evaluate.reply_labels import is_json
from sartor.evaluate.report_page import thumbnails
from sartor.evaluate.scorers import count_words
from sartor.models.content_shielding import reply_text
from sartor.models.tuned_model import open_tuned

Notice = Callable[[str], object]
# Up to this median number of words in the references exact match is the natural metric, above it F1
SHORT_REFERENCE_WORDS = 12
_DATA_TEXTS = {"eval": "held-out rows of the Dataset", TEST: "test rows of the Dataset"}


@dataclass(frozen=True, repr=False)
class Evaluated(ShownResult):
    """Result of `evaluate`: the Report."""

    report: Report

    def as_json(self) -> dict[str, Any]:
        """Return the JSON of the command."""
        manifest = self.report.manifest
        keys = (
            "primary",
            "metrics",
            "label",
            "modalities",
            "ablation",
            "forgetting",
            "probes",
            "audit",
            "rows",
            "groups",
            "left_out",
            "warnings",
            "chosen",
            "split",
            "wall_s",
        )
        optional: Sequence[str] = ("cut_replies", "tasks", "judge")
        asked = {key: manifest[key] for key in optional if key in manifest}
        return {"report": str(self.report.path), **{key: manifest[key] for key in keys}, **asked}


@dataclass(frozen=True)
class EvaluationResult:
    """Result of an evaluation.

    facts: for the manifest.
    table: one mapping per row.
    pictures: data URL of the first picture of each row that the page shows, by row.
    task_table: one mapping per document and metric of the tasks.
    """

    facts: dict[str, Any]
    table: list[dict[str, Any]]
    pictures: dict[int, str]
    task_table: list[dict[str, Any]]


def evaluate(
    path: ArtifactPath,
    *,
    out: Path | str | None = None,
    data: Path | str | None = None,
    split: Literal["eval", "test"] = "eval",
    scorer: str = "",
    label: str = "",
    audit: bool = False,
    favourable: Sequence[str] = (),
    metrics: Sequence[str] = (),
    tasks: str = "",
    judge: JudgeOptions | Mapping[str, Any] | Path | str | None = None,
    judge_labels: Path | str | None = None,
    most_rows: int = 200,
    replace: bool = False,
    notice: Notice = lambda line: None,
) -> Evaluated:
    """Measure an Adapter (or a Release) against its base and write a Report.

    out: by default `PATH-report`; `PATH-test-report` of the split `test`.
    data: a file of rows in any input form, instead of those that the Dataset holds out.
    split: `test` takes the rows that the Dataset keeps for the release (`split.test_fraction`).
    scorer: metric that the gate checks. By default macro-F1 with a label, the word error rate of transcripts, exact
        match where references are short, else F1.
    label: field of the JSON replies that names a class, by a dotted path, or `.`: the whole reply is the class.
    audit: also measure bias, memorisation and changed refusals (`audit/`).
    favourable: desirable outcomes for the audit, of those that replies name.
    metrics: the ones to measure, by default all that the rows have. A reply ends as soon as none of them can change
        (`scorers.py`), and its row says so.
    tasks: `lm-eval:NAME,NAME`, tasks of lm-evaluation-harness or paths of their YAML files (`harness_tasks.py`).
    judge: options of a judge that compares the replies of both sides (`judge.py`).
    judge_labels: a JSONL file of pairs that people labelled.
    most_rows: of the rows, and documents of each task, at most.

    Where tasks or the judge fail once the rows are measured, the Report says so and has the rest. The evaluation is
    written to the ledger of evaluations, and the Report says how many of its rows are known
    (`core/evaluation_ledger.py`).

    Raises ArtifactError, ModelError, ConfigError, and SourceError when there is no row to evaluate on. A damaged
    ledger is an ArtifactError before anything is measured. Raises ExtraError for tasks without the extra `eval`, and
    AssetError for one whose data is not on this machine.
    """
    start_time = time.monotonic()
    adapter = open_artifact(path, ("adapter", "release"))
    if data and split == TEST:
        raise ConfigError(
            "--data and --split test name two sets of rows",
            "--data FILE without --split, or --split test without --data",
        )
    suffix = "test-report" if split == TEST else "report"
    out = Path(out) if out else adapter.path.with_name(f"{adapter.path.name}-{suffix}")
    check_output_free(out.absolute(), replace=replace)
    if scorer and scorer not in (*NAMES, "loss"):
        raise ConfigError(f"there is no scorer {scorer!r}", one_of("--scorer", NAMES))
    evaluation_ledger.check_ledger()
    _check_metrics(metrics, scorer)
    judge_plan = _judge_plan(judge, judge_labels, metrics)
    task_names = _task_names(tasks) if tasks else []
    harness_tasks = None
    if task_names:
        if importlib.util.find_spec("lm_eval") is None:
            raise missing_package("lm_eval", "eval")
        harness = import_module("sartor.evaluate.harness_tasks")
        harness_tasks = harness.open_tasks(task_names, most_rows, notice)
    with tempfile.TemporaryDirectory() as media:
        eval_set = held_out(adapter, Path(data) if data else None, most_rows=most_rows, media=Path(media), split=split)
        measured = _measure(
            adapter,
            eval_set,
            label=label,
            scorer=scorer,
            notice=notice,
            audit_options=AuditOptions(label, tuple(favourable)) if audit else None,
            metrics=metrics,
            tasks=harness_tasks,
            judge=judge_plan,
        )
    rows_split = "file" if data else split
    row_ids = [row["id"] for row in measured.table]
    # the id of the Adapter in a Release: both are evaluated as one
    parents = adapter.manifest["parents"] if adapter.kind == "release" else []
    tuned_id = next((parent["id"] for parent in parents if parent["kind"] == "adapter"), adapter.id)
    chosen = evaluation_ledger.record_evaluation(tuned_id, row_ids, rows_split)
    notice(chosen.sentence)
    facts = {
        "name": adapter.path.name,
        "parents": [adapter.as_parent()],
        "sources": adapter.manifest["sources"],
        "licence": adapter.licence,
        **measured.facts,
        "data": str(data) if data else _DATA_TEXTS[split],
        "split": rows_split,
        "chosen": chosen.as_json(),
        "wall_s": round(time.monotonic() - start_time, 2),
        "versions": {name: importlib.metadata.version(name) for name in ("sartor", "torch", "transformers", "peft")},
    }

    def fill(part: Path) -> Mapping[str, Any]:
        """Write the table and the page of the Report into `part` and return its facts."""
        parquet_io.write_rows(part / "rows.parquet", pa.Table.from_pylist(measured.table).schema, measured.table)
        if measured.task_table:
            task_schema = pa.Table.from_pylist(measured.task_table).schema
            parquet_io.write_rows(part / "tasks.parquet", task_schema, measured.task_table)
        (part / "report.html").write_text(
            report_page.render(facts, adapter, measured.table, measured.pictures), encoding="utf-8"
        )
        return facts

    report = write_artifact(out, "report", fill, replace=replace)
    catalogue.register(report)
    return Evaluated(report)


def _check_metrics(metrics: Sequence[str], scorer: str) -> None:
    """Raise ConfigError for an unknown metric, or for a scorer that `metrics` leaves out."""
    if unknown := [name for name in metrics if name not in ALL_METRICS]:
        raise ConfigError(f"there is no metric {unknown[0]!r}", one_of("--metrics", ALL_METRICS))
    if metrics and scorer and scorer not in metrics:
        raise ConfigError(f"the gate cannot look at {scorer}, which --metrics leaves out", f"--metrics {scorer}")


def _judge_plan(
    judge: JudgeOptions | Mapping[str, Any] | Path | str | None, labels: Path | str | None, metrics: Sequence[str]
) -> JudgePlan | None:
    """Return the judge that is asked for; None without one. Raises ConfigError for options that exclude each other."""
    if judge is None:
        if labels is not None:
            raise ConfigError("--judge-labels has no judge to compare with", "--judge JUDGE.yaml --judge-labels FILE")
        return None
    if metrics:
        raise ConfigError(
            "--judge reads whole replies, and --metrics ends a reply as soon as its scores are decided",
            "--judge JUDGE.yaml without --metrics",
        )
    return JudgePlan.of(load_any(JudgeOptions, judge), Path(labels) if labels is not None else None)


def _task_names(tasks: str) -> list[str]:
    """Return the names and paths of `lm-eval:NAME,NAME`. Raises ConfigError for another form."""
    prefix, _, text = tasks.partition(":")
    names = [name.strip() for name in text.split(",") if name.strip()]
    if prefix != "lm-eval" or not names:
        raise ConfigError(f"--tasks is {tasks!r}", "--tasks lm-eval:NAME,NAME or --tasks lm-eval:OWN.yaml")
    return names


def _measure(
    adapter: Artifact,
    eval_set: HeldOut,
    label: str,
    scorer: str,
    notice: Notice,
    audit_options: AuditOptions | None = None,
    metrics: Sequence[str] = (),
    tasks: Any = None,
    judge: JudgePlan | None = None,
) -> EvaluationResult:
    """Measure both sides on all rows.

    Raises ConfigError, before a model is opened, for a label, a scorer or a favourable outcome that the rows lack.
    """
    asked_measures = _measures(eval_set, label)
    _check_scorer(scorer, asked_measures, eval_set.examples)
    asked_measures.check_all(metrics)
    if audit_options:
        outcomes_of([row.reply for row in eval_set.examples], label, audit_options.favourable)
    base, model = open_tuned(adapter, notice)
    form = TrainingForm.of(adapter)
    base = form.base(base)
    eval_set = fitting(base, eval_set, form)
    measures = _measures(eval_set, label)
    warnings = evaluation_warnings(measures.classes_or_references, measures.groups)
    warnings += _document_warnings(eval_set.examples) + reply_cap_warnings(base, eval_set.examples)
    for warning in warnings:
        notice(str(warning))
    notice(f"evaluating base and tuned on {len(eval_set.examples)} held-out rows")
    primary = scorer or _natural_metric(measures, eval_set.examples)
    if metrics and primary not in metrics:
        primary = next(name for name in metrics if name in measures.names)
    decisive = set(metrics)
    # the media ablation scores whole replies, so that exact_match must be decided as well
    if metrics and any(map(media_of, eval_set.examples)):
        decisive |= {primary, "exact_match"}
    row_count = len(eval_set.examples)
    with Progress("evaluate", row_count, "rows", notice) as progress:
        before, after = measure_models(
            base,
            model,
            eval_set,
            label,
            is_decided=(lambda index, reply: measures.is_decided(index, reply, decisive)) if decisive else None,
            progress=lambda fraction: progress.show(fraction * row_count),
        )
    comparisons = measures.compared(before, after, metrics)
    ablation = ablate(base, model, eval_set, measures=measures, full=after, metric=primary, notice=notice)
    notice("measuring what was forgotten")
    probe_results = forgetting_probes.measure_probes(base, model, notice)
    audit: dict[str, Any] = {}
    if audit_options:
        sides = ModelPair(base, model, eval_set.folder)
        audit = run.audit(adapter, sides, eval_set.examples, options=audit_options, notice=notice)
        check = judge_bias(audit["bias"], BiasLimits())
        notice(f"bias: {check.outcome}: {check.detail}")
    facts = {
        "base": base.as_manifest(),
        "primary": primary,
        "warnings": [dataclasses.asdict(warning) for warning in warnings],
        "metrics": {name: dataclasses.asdict(comparison) for name, comparison in comparisons.items()},
        "label": label,
        "modalities": modalities(eval_set.examples),
        "ablation": ablation,
        "forgetting": forgetting_probes.worst_probe(probe_results),
        "probes": probe_results,
        "audit": audit,
        "rows": len(eval_set.examples),
        "groups": len(set(measures.groups)),
        "left_out": eval_set.left_out,
    }
    if metrics:
        facts["cut_replies"] = {"base": sum(before.is_cut), "tuned": sum(after.is_cut)}
    table = _table(eval_set.examples, measures, before=before, after=after, metrics=metrics)
    if judge:
        judged = judge.run(_judged_rows(eval_set.examples, measures, before, after), notice)
        facts["judge"] = judged.facts
        for row, winner in zip(table, judged.winners, strict=True):
            row["judge"] = winner
    task_table: list[dict[str, Any]] = []
    if tasks:
        try:
            results = tasks.measure(base, model, notice)
            facts["tasks"], task_table = results.facts, results.table
        except SartorError as error:
            notice(f"the tasks failed, and the rest of the Report is kept: {error.problem}")
            facts["tasks"] = {"failure": {"kind": error.kind, "problem": error.problem, "remedy": error.remedy}}
    pictures = thumbnails(eval_set, report_page.rows_to_show(table, primary))
    return EvaluationResult(facts, table, pictures, task_table)


def _judged_rows(
    examples: Sequence[Example], measures: MetricSet, before: ModelOutputs, after: ModelOutputs
) -> list[JudgedRow | None]:
    """Return what a judge sees of each row: texts alone, answers without reasoning; None for a row with media."""
    rows: list[JudgedRow | None] = []
    for index, example in enumerate(examples):
        if example.is_document or media_of(example):
            rows.append(None)
            continue
        turns = [f"{message.role}: {message.text}" for message in example.prompt]
        prompt = example.prompt[0].text if len(example.prompt) == 1 else "\n\n".join(turns)
        rows.append(
            JudgedRow(
                prompt,
                measures.references[index],
                base=before.answers[index],
                tuned=after.answers[index],
                group=measures.groups[index],
            )
        )
    return rows


def _measures(eval_set: HeldOut, label: str) -> MetricSet:
    """Return the metrics that the rows have. A row with a recording whose reference is no JSON is a transcript."""
    transcripts = []
    for index, row in enumerate(eval_set.examples):
        has_recording = any(part.kind == "audio" for part in media_of(row))
        if has_recording and not is_json(row.reply):
            transcripts.append(index)
    return MetricSet(
        [reply_text(row.messages[-1]) for row in eval_set.examples],
        [group_of(row) for row in eval_set.examples],
        label,
        transcripts=transcripts,
    )


def _check_scorer(scorer: str, measures: MetricSet, examples: Sequence[Example]) -> None:
    """Raise ConfigError unless the gate can look at this metric of the rows. scorer: empty for the natural one."""
    # a later version is measured by the metric of an earlier one, which of documents is the loss
    if scorer == "loss" and _are_documents(examples):
        return
    measures.check(scorer or "exact_match")


def _are_documents(examples: Sequence[Example]) -> bool:
    return all(example.is_document for example in examples)


def _document_warnings(examples: Sequence[Example]) -> list[DataWarning]:
    """Return the warning that some rows have no prompt, and so no reply that could be scored."""
    count = sum(example.is_document for example in examples)
    if not count:
        return []
    problem = (
        f"{count} of {len(examples)} rows are documents without a prompt: they get no reply and score 0 by every "
        "metric of replies"
    )
    return [DataWarning("documents", problem, "go by `loss`, or give rows with prompts: --data FILE")]


def _natural_metric(measures: MetricSet, examples: Sequence[Example]) -> str:
    """Return the natural metric of the rows.

    It is loss if all are documents, macro_f1 with labels, wer if every row is a transcript, exact_match for short
    references, else f1.
    """
    if _are_documents(examples):
        return "loss"
    if measures.labelled:
        return "macro_f1"
    if len(measures.transcripts) == len(measures.references):
        return "wer"
    words = statistics.median(map(count_words, measures.references))
    return "exact_match" if words <= SHORT_REFERENCE_WORDS else "f1"


def _table(
    examples: Sequence[Example],
    measures: MetricSet,
    before: ModelOutputs,
    after: ModelOutputs,
    metrics: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Return one mapping per row, for rows.parquet and the page."""
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
        columns |= {
            "label": measures.labels,
            "base_confidence": before.confidence,
            "tuned_confidence": after.confidence,
        }
    if any(before.is_cut) or any(after.is_cut):  # the model would have written more
        columns |= {"base_is_cut": before.is_cut, "tuned_is_cut": after.is_cut}
    tuned_scores = measures.by_row(after, metrics)
    for name, scores in measures.by_row(before, metrics).items():
        columns |= {f"base_{name}": scores, f"tuned_{name}": tuned_scores[name]}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


# score of a row that a metric of the whole set is computed from
_OF_A_ROW = {"macro_f1": "accuracy"}


@dataclass(frozen=True)
class VersionScores:
    """Scores of two versions on the same rows.

    metric: name of the metric; every score is stored so that higher is better.
    table: one mapping per row with `id, group, reference, live_reply, new_reply, live, new`.
    """

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
    """Let `live` (a Release or an Adapter) answer the rows of the Report of `adapter`, and score it alike.

    only: ids of the rows to compare on; all by default. The rows are looked up in the Dataset of `adapter`. Rows
    without a score of the primary metric are left out. Raises ArtifactError if the Dataset or one of the rows is
    missing, and ModelError.
    """
    new_version = open_artifact(adapter, "adapter")
    report_artifact = open_artifact(report, "report")
    live_version = open_artifact(live, ("adapter", "release"))
    rows = [
        row
        for row in parquet_io.read_file(report_artifact.path / "rows.parquet")
        if only is None or str(row["id"]) in only
    ]
    base, model = open_tuned(live_version, notice)
    form = TrainingForm.of(new_version)  # both versions answer the rows as they stand in the Report
    base = form.base(base)
    eval_set = _find_eval_set(new_version, rows)
    eval_set = dataclasses.replace(eval_set, examples=[form.example(row, base.chat) for row in eval_set.examples])
    notice(f"{live_version.path} answers the same {len(rows)} rows")
    outputs = measure_models(base, model, eval_set, report_artifact.manifest["label"], sides=[True])[0]
    primary = str(report_artifact.manifest["primary"])
    metric = _OF_A_ROW.get(primary, primary)
    transcripts = []
    if metric == "wer":
        transcripts = [index for index, row in enumerate(rows) if row.get("tuned_wer") is not None]
    measures = MetricSet(
        [row["reference"] for row in rows],
        [group_of_stored(row) for row in rows],
        field=report_artifact.manifest["label"],
        transcripts=transcripts,
    )
    live_scores = outputs.loss if metric == "loss" else measures.by_row(outputs)[metric]
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    table = []
    for row, reply, score in zip(rows, outputs.replies, live_scores, strict=True):
        new_score = row[f"tuned_{metric}"]
        if score is None or new_score is None:
            continue
        fields = {
            "id": row["id"],
            "reference": row["reference"],
            "group": group_of_stored(row),
            "live_reply": reply,
            "new_reply": row["tuned_reply"],
            "live": sign * score,
            "new": sign * new_score,
        }
        table.append(fields)
    return VersionScores(metric, table)


def compare_reports(before: Path | str, after: Path | str) -> dict[str, Any] | None:
    """Return the primary metric of an earlier Report in a later one, on the rows that both have.

    The keys are those of a Comparison, whose base is the earlier Report's tuned model, with the `name` of the metric
    and the number of `rows`. None if no row is in both.
    """
    earlier_report, later_report = open_artifact(before, "report"), open_artifact(after, "report")
    primary = str(earlier_report.manifest["primary"])
    metric = _OF_A_ROW.get(primary, primary)
    earlier_rows = {row["id"]: row for row in parquet_io.read_file(earlier_report.path / "rows.parquet")}
    earlier_scores, later_scores, groups = [], [], []
    for row in parquet_io.read_file(later_report.path / "rows.parquet"):
        earlier = earlier_rows.get(row["id"], {}).get(f"tuned_{metric}")
        later = row.get(f"tuned_{metric}")
        if earlier is not None and later is not None:
            earlier_scores.append(float(earlier))
            later_scores.append(float(later))
            groups.append(group_of_stored(row))
    if not groups:
        return None
    compared = paired_bootstrap(earlier_scores, later_scores, groups)
    return {"name": metric, "rows": len(groups), **dataclasses.asdict(compared)}


def write_beside(file: Path, scores: VersionScores) -> None:
    """Write the rows as Parquet, which `parquet_io.read_file` reads."""
    parquet_io.write_rows(file, pa.Table.from_pylist(scores.table).schema, scores.table)


def likelihoods(
    path: Path | str, examples: Sequence[Example], notice: Callable[[str], object] = lambda line: None
) -> list[float]:
    """Return the mean log-likelihood of each row's own reply under a Release or Adapter.

    The values are negative nats per token: the higher, the likelier. Only for text rows.
    """
    base, model = open_tuned(open_artifact(path, ("adapter", "release")), notice)
    with model_side(model, tuned=True):
        means, _ = losses(base, model, [base.chat.encode(example) for example in examples])
    return [-mean for mean in means]


def _find_eval_set(adapter: Artifact, rows: Sequence[dict[str, Any]]) -> HeldOut:
    """Return the examples of the Report's rows, from the Datasets of `adapter`. Raises ArtifactError if one is
    missing.
    """
    datasets = ancestry.find_parents(adapter, "dataset")
    examples = {example.id: example for dataset in datasets for example in parquet_io.read_examples(dataset, "eval")}
    missing_ids = [row["id"] for row in rows if row["id"] not in examples]
    if missing_ids or not datasets:
        raise ArtifactError(
            f"{len(missing_ids) or 'all'} rows of the Report are in no Dataset of {adapter.path} that is still there",
            "evaluate on the Dataset's own rows; sartor index DIR finds one that was moved",
        )
    return HeldOut([examples[row["id"]] for row in rows], datasets[0].path)
