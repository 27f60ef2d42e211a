"""Verb tune: Dataset to Adapter.

    Dataset --encode--> rows --order--> updates --pack--> micro-batches --loss--> gradients --AdamW--> Adapter

The base is frozen; only what the method puts on it, in fp32, has gradients and optimiser state.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sartor.core import catalogue, config, evaluation_ledger, numerics, records
from sartor.core.artifacts import Adapter, Artifact, open_artifact, write_artifact
from sartor.core.errors import ConfigError
from sartor.core.filesystem import writer_lock
from sartor.core.licences import compliance
from sartor.core.lineage import ancestry
from sartor.core.processes import DeferredSignals
from sartor.core.result_display import ShownResult
from sartor.core.row_warnings import DataWarning
from sartor.inference.generate import context_tokens
from sartor.models import adapters
from sartor.models.base import Base, machine_facts
from sartor.tune import auto_settings, plan_warnings, preflight, trackers
from sartor.tune import resume as resumption
from sartor.tune.auto_settings import Setting
from sartor.tune.checkpoint import CheckpointState, Saver, clear, folder_of, full_disk, sweep
from sartor.tune.checkpoint_selection import CheckpointSelection
from sartor.tune.dataset_encoding import encode_rows
from sartor.tune.distil_teachers import DistilTeacher, open_teacher
from sartor.tune.distillation import DistilRun
from sartor.tune.gradient_features import FeatureRecorder
from sartor.tune.grpo_training import GrpoRun, GrpoSetup, open_grpo
from sartor.tune.model_setup import (
    calibrate,
    inject_recipe_adapter,
    open_recipe_base,
    start_of,
    stored_bytes,
)
from sartor.tune.preference_training import PreferenceRun
from sartor.tune.recipe import Distil, Recipe, ResolvedRecipe, Sft, Tracking
from sartor.tune.recipe import load as load_recipe
from sartor.tune.rehearsal import hold_at_base, rehearsal_of
from sartor.tune.teacher_scores import token_bytes
from sartor.tune.tokenized_dataset import TokenizedDataset, lessons
from sartor.tune.training_log import OnStep, TrainingLog, plot_losses
from sartor.tune.training_loop import Resolved, TrainingRun

Notice = Callable[[str], object]


@dataclass(frozen=True, repr=False)
class Tuned(ShownResult):
    """Result of `tune`: the Adapter, with the cost of its run in the manifest."""

    adapter: Adapter

    def as_json(self) -> dict[str, Any]:
        """Return the command's JSON."""
        run = self.adapter.manifest["run"]
        return {"adapter": str(self.adapter.path), **run}


def tune(
    recipe: Recipe | Mapping[str, Any] | Path | str,
    out: Path | str,
    *,
    resume: bool = False,
    replace: bool = False,
    prove: bool = False,
    show: bool = True,
    on_step: OnStep | None = None,
    notice: Notice = lambda line: None,
) -> Tuned:
    """Fine-tune a base on a Dataset and write the Adapter to `out`.

    recipe: a Recipe, a mapping in its form, or the path of a YAML file.
    resume: continue from the state saved in `OUT.checkpoints`, to the bits of an uninterrupted run. An Adapter that is
    already finished is returned.
    replace: start over.
    prove: first compare losses and every gradient of the next update's first micro-batch with the plain computation,
    without shared prefixes and stored activations.
    show: draw a progress line. on_step: called with a TrainingStep after each update; an error that it raises ends the
    run, which `resume` continues from the last state that was saved.
    notice: receives lines about the run, first about what will be trained.

    Raises ConfigError (recipe, taken `out`, a checkpoint of another recipe, Dataset, base or arithmetic),
    ArtifactError (Dataset; a damaged ledger of evaluations), ModelError (base; a loss that is not finite or has
    exploded; a failed proof), SourceError (no row that could be learnt from), StoppedError (SIGTERM or Ctrl-C, after a
    save), MissingError (a full disk), ExtraError (the package of a tracker).
    """
    recipe = load_recipe(recipe)
    # where the log is copied to is no part of the Adapter: its manifest and the runs made from it do not have it
    tracking, recipe = recipe.track, dataclasses.replace(recipe, track=Tracking())
    trackers.check_packages(tracking.to)
    out = Path(out).absolute()
    resume_state = resumption.find_resume_point(out, resume=resume, replace=replace, notice=notice)
    dataset = open_artifact(recipe.data.path, "dataset")
    for refusal in preflight.of_base(recipe):
        raise refusal.error
    base = open_recipe_base(recipe, notice)
    earlier = resumption.earlier_run(out, resume_state) if resume else None
    recipe, rehearsal_setting = auto_settings.choose_rehearsal(recipe, dataset, base, earlier)
    rehearsal, start = rehearsal_of(recipe), start_of(recipe, base)
    data = encode_rows(dataset, recipe, base.chat, rehearsal)
    resolved, settings = auto_settings.resolve(recipe, data, base, rehearsal=rehearsal_setting, earlier=earlier)
    if recipe.weights == "best" and not data.held_out:
        notice("warning: weights: best chooses by held-out rows, and no row is held out: the last weights are kept")
    calibrate(base, data)
    hold_at_base(recipe, base, data)
    for refusal in preflight.of_room(resolved, context_tokens(base.model), data):
        raise refusal.error
    teacher = open_teacher(resolved, base, notice)
    grpo = open_grpo(resolved, base, data, notice)
    parent_of_teacher = teacher.parent if teacher else None
    context = TuningContext(
        recipe=resolved,
        settings=settings,
        parents=[dataset, *(item for item in (rehearsal, start, parent_of_teacher) if item)],
        base=base,
        data=data,
        resume_state=resume_state,
        fingerprint=resumption.fingerprint(
            resolved, dataset, base, data=data, start=start, teacher=teacher.identity if teacher else ""
        ),
        prove=prove,
        teacher=teacher,
        grpo=grpo,
    )
    if resume and (adapter := resumption.finished(out, resume_state, context.fingerprint)):
        notice(f"{out} is finished: nothing is left to do")
    else:
        tags = trackers.base_tags(base.as_manifest(), context.dataset_ids)
        run = trackers.run_of(out.name, context.fingerprint, tags)
        with trackers.LogCopies(tracking, run, notice) as copies:
            adapter = _tune(context, out, copies, replace=replace, show=show, on_step=on_step, notice=notice)
            copies.finish(adapter)
    # clear only under the writer's lock: another run may be starting over
    with contextlib.suppress(ConfigError), writer_lock(out):
        clear(folder_of(out))
    return Tuned(adapter)


@dataclass(frozen=True)
class TuningContext:
    """Inputs of a run, opened and compared with the files of earlier runs.

    settings: of the options that were `auto`.
    parents: the Dataset, then the rehearsal Dataset, the artefact that tuning starts from and the teacher, if there
    are any.
    fingerprint: digests and options that decide the result.
    """

    recipe: ResolvedRecipe
    settings: dict[str, Setting]
    parents: list[Artifact]
    base: Base
    data: TokenizedDataset
    resume_state: CheckpointState
    fingerprint: dict[str, Any]
    prove: bool
    teacher: DistilTeacher | None = None
    grpo: GrpoSetup | None = None

    @property
    def dataset_ids(self) -> list[str]:
        """Ids of the Datasets whose rows are read."""
        return [parent.id for parent in self.parents if parent.kind == "dataset"]


def _tune(
    context: TuningContext,
    out: Path,
    copies: trackers.LogCopies,
    *,
    replace: bool,
    show: bool,
    on_step: OnStep | None,
    notice: Notice,
) -> Adapter:
    """Run the tuning that `context` describes, from its checkpoint if there is one, and write the Adapter to `out`."""
    recipe, base, checkpoint = context.recipe, context.base, context.resume_state.checkpoint
    model = inject_recipe_adapter(recipe, base)
    for line in [*describe(context.data, base, model), *auto_settings.lines(context.settings)]:
        notice(line)
    for refusal in preflight.of_rows(recipe, base.chat, context.data):
        raise refusal.error
    scores_bytes = 0
    if isinstance(recipe.objective, Distil):
        scores_bytes = context.data.supervised_tokens * token_bytes(recipe.objective.top_k)
    preflight.check_disk(
        out.absolute(),
        adapters.trainable(model)[0],
        recipe.checkpoints.keep,
        adapter_bytes=stored_bytes(recipe, model),
        beside_bytes=scores_bytes,
    )
    if recipe.weights == "best":
        evaluation_ledger.check_ledger()  # before time is spent on evaluations that it could not record
    environment = resumption.environment(base)
    replaces = ""
    if checkpoint:
        replaces = checkpoint.manifest["replaces"]
    elif replace:
        replaces = resumption.standing_id(out)
    unchanging = {
        "fingerprint": context.fingerprint,
        "environment": environment,
        "numerics": numerics.numerics(str(base.dtype)),
        "replaces": replaces,
        "settings": {name: setting.as_json() for name, setting in context.settings.items()},
    }
    saver = Saver(folder_of(out), recipe.checkpoints, unchanging, checkpoint)
    runs: list[TrainingRun] = []

    def fill(temp_folder: Path) -> Mapping[str, Any]:
        # the writer's lock is held from here on, so no other run uses what is removed
        if checkpoint and not checkpoint.path.is_dir():
            raise ConfigError(
                f"another process went on from {checkpoint.path} meanwhile", f"sartor tune RECIPE --out {out} --resume"
            )
        clear(saver.folder) if replace else sweep(saver.folder, context.resume_state)
        earlier_log = {"lines": checkpoint.lines(), "wall_s": checkpoint.manifest["wall_s"]} if checkpoint else {}
        copies.begin(earlier_log.get("lines", []))
        with full_disk(f"{out} could not be written"):
            with TrainingLog(
                temp_folder / "log.jsonl", show=show, on_step=on_step, on_line=copies.add, **earlier_log
            ) as journal:
                run = _new_run(context, model, journal=journal, saver=saver, notice=notice)
                if checkpoint:
                    run.restore(checkpoint)
                    notice(f"going on after update {checkpoint.update}, from {checkpoint.path}")
                    current = {**environment, "path": run.path.name}
                    for line in resumption.changed(
                        {**checkpoint.manifest["environment"], **checkpoint.manifest}, current
                    ):
                        notice(line)
                _begin_recording(context, run, out)
                runs.append(run)
                notice(f"path {run.path.name}: {run.path.reason}")
                notice(run.forecast.line)
                warnings = _warnings(context, run, notice)
                saver.facts = {**unchanging, "warnings": warnings}
                if context.prove:
                    notice(run.prove())
                with DeferredSignals(notice) as signals:
                    run.train(signals)
                warnings += _warnings_afterwards(run, notice)
                selection = run.keep_best_weights(notice)
                facts = _facts(context, run, warnings, selection)  # here, so that wall_s excludes drawing and writing
            plot_losses(journal.lines, temp_folder / "loss.png")
            adapters.write_adapter(model, temp_folder, base.ref.name)
        return facts

    adapter = write_artifact(out, "adapter", fill, replace=replace or bool(replaces))
    catalogue.register(adapter)
    _keep_recording(context, runs[-1], adapter, notice)
    _record_looks(adapter, context.data)
    return adapter


def _new_run(context: TuningContext, model: Any, *, journal: TrainingLog, saver: Saver, notice: Notice) -> TrainingRun:
    """Return the run of the recipe's objective before its first update."""
    recipe, checkpoint = context.recipe, context.resume_state.checkpoint
    kind: type[TrainingRun] = TrainingRun if isinstance(recipe.objective, Sft) else PreferenceRun
    if context.teacher is not None:
        kind = DistilRun
    if context.grpo is not None:
        kind = GrpoRun
    resolved = Resolved(**checkpoint.manifest["resolved"]) if checkpoint else None
    run = kind(recipe, context.base, model, data=context.data, journal=journal, saver=saver, resolved=resolved)
    if isinstance(run, DistilRun) and context.teacher is not None:
        run.set_teacher(context.teacher, notice)
    if isinstance(run, GrpoRun) and context.grpo is not None:
        run.setup = context.grpo
    if recipe.weights == "best" and context.data.held_out:
        run.selection = CheckpointSelection(context.base.chat, context.data.held_out, context.data.held_out_groups)
    return run


def _begin_recording(context: TuningContext, run: TrainingRun, out: Path) -> None:
    """Let the run record sketches of its rows' gradients, if the recipe says so."""
    if context.recipe.trace.features:
        is_resumed = context.resume_state.checkpoint is not None
        run.features = FeatureRecorder.begin(out, context.dataset_ids, run, is_resumed=is_resumed)


def _keep_recording(context: TuningContext, run: TrainingRun, adapter: Artifact, notice: Notice) -> None:
    if run.features is not None:
        folder = run.features.finish(adapter, context.dataset_ids, run.optimizer)
        notice(f"sketches of the rows' gradients are in {folder}" if folder else "the rows' sketches were erased")


def _record_looks(adapter: Artifact, data: TokenizedDataset) -> None:
    """Write the evaluations by which the weights were chosen to the ledger, as looks at their rows."""
    row_ids = [row.example_id for row in data.held_out]
    for evaluation in adapter.manifest["run"].get("selection", {}).get("evaluations", []):
        evaluation_ledger.record_evaluation(f"{adapter.id} after update {evaluation['update']}", row_ids, "eval")


def describe(data: TokenizedDataset, base: Base, model: Any) -> Iterator[str]:
    """Yield lines about the rows and parameters that will be trained."""
    trained, total = adapters.trainable(model)
    yield (
        f"{len(data.train):,} rows, {data.tokens:,} tokens, {data.supervised_tokens:,} supervised "
        f"({data.supervised_tokens / data.tokens:.0%}); {len(data.held_out):,} held-out rows measured on the way; "
        f"{trained:,} of {total:,} parameters trained ({trained / total:.2%}); "
        f"base {base.ref.name} in {str(base.dtype).removeprefix('torch.')} on {base.device.type}"
    )
    if preferences := lessons(data.train):
        counts = records.count_values(item.term for item in preferences)
        terms = ", ".join(f"{count:,} {term}" for term, count in counts.items())
        yield f"preferences: {terms}; {len(data.train) - len(preferences):,} rows by sft"
    if data.rehearsal:
        yield f"rehearsal: {len(data.rehearsal):,} rows are mixed in, against forgetting"
    for reason, ids in data.left_out.items():
        yield f"left out: {len(ids):,} rows, {reason}"
    for name, count in data.reasoning.items():
        yield f"reasoning: {count:,} rows, {name}"
    if not base.chat.has_template:
        yield "the base has no chat template; a plain one is used (models/chat.py)"


def _warnings(context: TuningContext, run: TrainingRun, notice: Notice) -> list[dict[str, str]]:
    """Return the warnings of `plan` after printing them; for a resumed run those in its checkpoint.

    A checkpoint of an older Sartor has none. They are not computed then: the model has learnt since, so its losses no
    longer describe the base.
    """
    checkpoint, updates = context.resume_state.checkpoint, run.forecast.updates
    if checkpoint:
        warnings = [DataWarning(**fields) for fields in checkpoint.manifest.get("warnings", [])]
    else:
        warnings = plan_warnings.run_warnings(
            context.recipe,
            dataset=context.parents[0],
            base=context.base,
            path=run.path,
            updates=updates,
            row_tokens=[row.tokens for row in context.data.train],
        )
    for warning in warnings:
        notice(str(warning))
    return [dict(vars(warning)) for warning in warnings]


def _warnings_afterwards(run: TrainingRun, notice: Notice) -> list[dict[str, str]]:
    """Return the warnings about a run that has ended, after printing them."""
    warning = run.silence() if isinstance(run, GrpoRun) else None
    if warning is None:
        return []
    notice(str(warning))
    return [dict(vars(warning))]


def _facts(
    context: TuningContext,
    run: TrainingRun,
    warnings: Sequence[Mapping[str, str]],
    selection: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return the manifest of the Adapter."""
    trained, total = adapters.trainable(run.model)
    packing_difference = run.path.packing_difference
    if packing_difference is not None and not math.isfinite(packing_difference):
        packing_difference = None  # rows of this base cannot be packed; JSON has no infinity
    counters, wall_s = run.counters, run.journal.wall_s
    base = context.base
    return {
        "base": base.as_manifest() | ({"use": list(context.recipe.base.use)} if context.recipe.base.use else {}),
        "recipe": config.dump(context.recipe),
        "settings": {name: setting.as_json() for name, setting in context.settings.items()},
        "parents": [parent.as_parent() | _role(parent, index) for index, parent in enumerate(context.parents)],
        "sources": _sources(context.parents),
        "licence": compliance.combine(
            [
                *(parent.licence for parent in context.parents),
                base.ref.licence,
                *base.tower_licences,
                *([context.teacher.licence] if context.teacher and context.teacher.licence else []),
            ]
        ),
        "left_out": context.data.left_out,
        **({"reasoning": context.data.reasoning} if context.data.reasoning else {}),
        "fingerprint": {name: digest for name, digest in context.fingerprint.items() if name != "recipe"},
        "run": {
            "updates": counters.updates,
            "tokens": counters.tokens,
            "supervised_tokens": counters.supervised_tokens,
            "tokens_per_s": round(counters.tokens / wall_s, 1),
            "peak_memory_bytes": run.journal.peak_memory_bytes,
            "forecast": run.forecast.as_json(),
            "forecast_error": run.forecast.errors(wall_s, run.journal.peak_memory_bytes),
            "micro_batch_tokens": run.resolved.micro_batch_tokens,
            "micro_batch_reason": run.forecast.settled.reason,
            "loss": run.losses,
            "trainable": trained,
            "trainable_fraction": trained / total,
            "wall_s": round(wall_s, 3),
            "resumed_at": [line["resumed_at"] for line in run.journal.lines if "resumed_at" in line],
            **({"rehearsal_factor": context.data.rehearsal_factor} if context.data.rehearsal else {}),
            "path": run.path.name,
            "path_reason": run.path.reason,
            "packed": run.path.name != "one-row",
            "packing_difference_nats": packing_difference,
            "proof": run.proof,
            "warnings": warnings,
            **({"selection": selection} if selection else {}),
            **({"teacher": run.teacher_facts()} if isinstance(run, DistilRun) else {}),
            **({"verifier": run.verifier_facts()} if isinstance(run, GrpoRun) else {}),
        },
        "machine": machine_facts(),
        "versions": {name: importlib.metadata.version(name) for name in ("sartor", "torch", "transformers", "peft")},
    }


def _role(parent: Artifact, index: int) -> dict[str, str]:
    """Return the role of a parent: a Dataset after the first is rehearsal, whose held-out rows are
    not the Adapter's.
    """
    return {"role": ancestry.REHEARSAL} if index and parent.kind == "dataset" else {}


def _sources(parents: Sequence[Artifact]) -> list[dict[str, Any]]:
    """Return the sources of all parents, each once; those of rehearsal are marked."""
    result: list[dict[str, Any]] = []
    for index, parent in enumerate(parents):
        for source in parent.manifest.get("sources", []):
            fields = {**source, "rehearsal": True} if _role(parent, index) else source
            if fields not in result:
                result.append(fields)
    return result
