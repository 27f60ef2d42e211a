"""Verb `curate`: plan, run, write; with a local and a Ray executor.

OUT.curating/      work directory beside the output; an interrupted run resumes from it
  media/           images and audio by digest
  pass-1/000000/   a Shard: what one worker made of one piece
OUT/               the Dataset, written by one rename
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import math
import os
import pickle
import shutil
import signal
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sartor.core import config, parquet_io, records
from sartor.core.artifacts import Artifact, Dataset, check_output_free, kind_of, open_artifact
from sartor.core.errors import ConfigError, MissingError, SartorError, SourceError, StoppedError, missing_package
from sartor.core.filesystem import DISK_FULL, make_parent, writer_lock
from sartor.core.licences.spdx import UNKNOWN
from sartor.core.processes import WorkerPool
from sartor.core.progress import ProgressBar, is_live
from sartor.core.records import canonical, digest
from sartor.core.result_display import ShownResult
from sartor.core.row_warnings import DataWarning, dataset_warnings
from sartor.curate import augmentation, curation_outcome
from sartor.curate.dataset_writer import DatasetWriter, write_dataset
from sartor.curate.passes import Passes, PassState, evidence_of, with_final_dedup
from sartor.curate.recipe import CurateRecipe, with_rows
from sartor.curate.shards import Shard, ShardTask, execute
from sartor.curate.sources import planner, python_rows
from sartor.curate.sources.column_options import fields_option
from sartor.curate.sources.row_formats import UNREAD_CONTEXT, UNREAD_LABEL
from sartor.curate.sources.safe_paths import WORK_SUFFIX
from sartor.curate.sources.source_files import ROWS
from sartor.curate.steps import makes_copies
from sartor.curate.steps.personal_data import PersonalData, personal_data_warning

FILES_LISTED = 20


def find_warnings(dataset: Artifact) -> list[DataWarning]:
    """Return the deficits of a Dataset's rows as training and evaluation data."""
    warnings = dataset_warnings(
        parquet_io.read_own_examples(dataset),
        parquet_io.count_own_groups(dataset),
        dataset.manifest.get("recipe") or {},
    )
    if PersonalData.kind not in dataset.manifest.get("steps", {}):
        personal = personal_data_warning(parquet_io.read_own_examples(dataset))
        warnings += [personal] if personal else []
    for source in dataset.manifest.get("sources", []):
        for note, count in source.get("notes", {}).items():
            if note.startswith(UNREAD_LABEL):
                label = note.removeprefix(UNREAD_LABEL)
                problem = (
                    f"{source['path']}: {count:,} rows are learnt as texts, and their column {label!r} is not read"
                )
                remedy = f"{fields_option(prompt='text', completion=label)} at the source, if it is the answer"
                warnings.append(DataWarning("unread_label", problem, remedy))
            elif note.startswith(UNREAD_CONTEXT):
                column = note.removeprefix(UNREAD_CONTEXT)
                problem = (
                    f"{source['path']}: {count:,} rows are learnt without their column {column!r}, which is not read"
                )
                remedy = f"{fields_option(system=column)} at the source, if the question needs it as system prompt"
                warnings.append(DataWarning("unread_context", problem, remedy))
    return warnings


@dataclass(frozen=True, repr=False)
class Curated(ShownResult):
    """Result of `curate`.

    found: number of shards that an interrupted run had left.
    """

    dataset: Dataset
    found: int
    wall_s: float

    @functools.cached_property
    def warnings(self) -> list[DataWarning]:
        """Deficits of the rows as training and evaluation data."""
        return find_warnings(self.dataset)

    @property
    def counts(self) -> dict[str, Any]:
        """The manifest's counts."""
        return dict(self.dataset.manifest["counts"])

    @property
    def read(self) -> int:
        """Rows read."""
        return int(self.counts["read"])

    @property
    def made(self) -> int:
        """Copies that steps made from rows, including dropped ones: read + made = kept + dropped."""
        return int(self.counts.get("made", 0))  # Datasets of older versions have no such count

    @property
    def kept(self) -> int:
        """Rows kept."""
        return int(self.counts["kept"])

    @property
    def dropped(self) -> dict[str, int]:
        """Rows dropped, by reason."""
        return dict(self.counts["dropped"])

    @property
    def rows_per_s(self) -> float:
        """Rows read per second of wall time."""
        return self.read / self.wall_s if self.wall_s else math.inf

    def as_json(self) -> dict[str, Any]:
        """Return the command's JSON."""
        manifest = self.dataset.manifest
        return {
            "dataset": str(self.dataset.path),
            "read": self.read,
            "made": self.made,
            "kept": self.kept,
            "dropped": self.dropped,
            "licences": sorted({source["licence"] for source in manifest["sources"]}),
            "forms": _forms(manifest["sources"]),
            "splits": manifest["counts"]["splits"],
            "steps": manifest["steps"],
            "warnings": [asdict(warning) for warning in self.warnings],
            "digest": manifest["digest"],
            "parts_found": self.found,
            "wall_s": round(self.wall_s, 3),
            "rows_per_s": round(self.rows_per_s, 1),
        }

    def table(self) -> list[tuple[str, Any]]:
        """Return the lines shown to the user, with short facts of the steps.

        Longer facts are in the manifest and on the card.
        """
        fields = self.as_json()
        steps = []
        for kind, facts in fields["steps"].items():
            steps.append((kind, {name: value for name, value in facts.items() if _is_short(value)}))
        names = ("dataset", "read", *(["made"] if self.made else []), "kept", "dropped", "splits", "licences", "forms")
        warnings = [("warning", f"{warning.problem}\n  try: {warning.remedy}") for warning in self.warnings]
        last = [*warnings, ("card", str(self.dataset.path / "card.html")), ("rows_per_s", fields["rows_per_s"])]
        return [*((name, fields[name]) for name in names), *steps, *last]


def _forms(sources: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the form found in each file; for many files, the number of files of each form by source."""
    labels: dict[str, str] = {}
    if len(sources) <= FILES_LISTED:
        for source in sources:
            name, path = source["source"], source["path"]
            # two sources may hold files of the same name; of rows from Python the source says it all
            is_whole = name.endswith(path) or name.startswith(ROWS)
            labels[name if is_whole else f"{name}/{path}"] = source["form"]
        return labels
    form_counts: dict[str, Counter[str]] = {}
    for source in sources:
        form_counts.setdefault(source["source"], Counter())[source["form"]] += 1
    for name, counts in form_counts.items():
        labels[name] = ", ".join(f"{form} ({count} files)" for form, count in counts.most_common())
    return labels


def _is_short(value: Any) -> bool:
    if not isinstance(value, (dict, list)):
        return True
    return len(value) <= 6 and not any(isinstance(item, (dict, list)) for item in value)


# Bytes of rows whose reading takes about as long as starting a worker.
WORTH_A_WORKER = 4 << 20


def run_local(tasks: Sequence[ShardTask], sizes: Sequence[int], workers: int = 0) -> Iterator[dict[str, Any]]:
    """Yield the summaries of the tasks' shards, in order.

    sizes: approximate bytes of each task. workers: 0 uses one process per core.

    The first error, in the order of the tasks, ends the work. Finished shards stay.
    """
    workers = min(workers or len(os.sched_getaffinity(0)), len(tasks))
    if workers < 2 or sum(sizes) < WORTH_A_WORKER:
        yield from map(execute, tasks)
        return
    with WorkerPool(workers) as pool:
        yield from pool.spread(execute, ((task,) for task in tasks))


def run_on_ray(tasks: Sequence[ShardTask], sizes: Sequence[int], workers: int = 0) -> Iterator[dict[str, Any]]:
    """Yield the summaries of the tasks' shards, in order, as `run_local` does.

    workers: 0 lets Ray decide how many run at once.

    The cluster is the one that RAY_ADDRESS names; without it, one is started on this machine. Raises ExtraError,
    MissingError.
    """
    try:
        import ray
    except ImportError:
        raise missing_package("ray", "ray") from None
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
        try:
            ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, configure_logging=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            first = str(error).splitlines()[0]
            raise MissingError(f"no Ray cluster: {first}", "ray start --head, or unset RAY_ADDRESS") from None
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    items = [{"task": pickle.dumps(task)} for task in tasks]
    results = ray.data.from_items(items, override_num_blocks=len(items)).map(_row, concurrency=workers or None)
    for row in results.iter_rows():
        fields = json.loads(row["summary"])
        if "error" in fields:
            raise pickle.loads(row["raised"])  # trusted: pickled by `_row` in our own cluster
        yield fields


def _row(row: dict[str, Any]) -> dict[str, Any]:
    """Execute one task on a Ray worker. A SartorError is returned as a value, since Ray would wrap it."""
    try:
        return {"summary": json.dumps(execute(pickle.loads(row["task"]))), "raised": b""}
    except SartorError as error:
        return {"summary": json.dumps({"error": error.kind}), "raised": pickle.dumps(error)}


# Interval of progress lines if stderr is not a terminal.
SECONDS_BETWEEN_LINES = 10.0


class CurationProgress:
    """Progress display of a curation, a context manager.

    It measures bytes, since the number of rows is unknown before they are read.
    """

    def __init__(self, notice: Callable[[str], None]) -> None:
        self._notice, self._is_live = notice, is_live()
        self._bar = ProgressBar("curate", "looking at the files ...", is_shown=self._is_live)

    def __enter__(self) -> CurationProgress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def take(self, rows: int) -> None:
        """Show that so many rows from Python were written."""
        self._bar.show(0.0, f"{rows:,} rows taken over")

    def begin(self, name: str, total_bytes: int) -> None:
        """Start a pass over that many bytes."""
        self._name, self._total, self._bytes, self._rows = name, max(total_bytes, 1), 0, 0
        self._began = self._last_notice = time.monotonic()
        self._bar.restart(name)

    def advance(self, done_bytes: int, rows: int) -> None:
        """Record a finished piece."""
        self._bytes, self._rows = self._bytes + done_bytes, self._rows + rows
        now = time.monotonic()
        rate = self._rows / max(now - self._began, 1e-3)
        text = f"{self._name}  {self._rows:,} rows  {rate:,.0f} rows/s"
        self._bar.show(min(self._bytes / self._total, 1.0), text)
        if not self._is_live and now - self._last_notice > SECONDS_BETWEEN_LINES:
            remaining_s = (now - self._began) * (self._total - self._bytes) / max(self._bytes, 1)
            self._notice(f"{text}  {self._bytes / self._total:.0%}, about {remaining_s:.0f} s left")
            self._last_notice = now


Notice = Callable[[str], None]
# Terms of a source, besides the licence, that are copied to its files' entries in the manifest;
# core/licences/compliance.py reads them there.
TERMS = ("share_alike", "non_commercial", "expires", "consent")
Engine = Literal["local", "ray"]


def curate(
    recipe: CurateRecipe | Mapping[str, Any] | Path | str | None = None,
    out: Path | str | None = None,
    *,
    rows: Any = None,
    licence: str = "",
    fields: Mapping[str, str] | None = None,
    system: str = "",
    on: Engine = "local",
    strict: bool = False,
    resume: bool = False,
    replace: bool = False,
    notice: Notice = lambda line: None,
) -> Curated:
    """Read the sources of a recipe, apply its steps, split by group, write a Dataset to `out`.

    recipe: a CurateRecipe, a mapping in its form, or the path of a YAML file; with `rows` it may lack sources, or be
    left out.
    rows: an iterable of mappings, a DataFrame of pandas or Polars, a table of pyarrow, a Dataset of the `datasets`
    library; or several of them by name, as a DatasetDict: parts called eval, test or validation are held out. Their
    source is `rows:` (`rows:NAME`), and the locator of the fifth row `rows:5`.
    licence, fields, system: of `rows`: `own` or an SPDX expression; Sartor's field -> the column, where their form is
    not known by the columns' names; the system prompt of every row.
    on: the engine. Either engine writes the same Dataset, row by row.
    resume: accept a finished Dataset of the same recipe and sources as the result.
    replace: start anew. Without it, an interrupted run of the same recipe is resumed.

    Raises ConfigError for a bad recipe, a taken `out` or rows of no known form, SourceError if no row is kept, for a
    value that no row can hold or, under `strict`, at the first row that cannot be used, GuardError if a step would
    remove too much.
    """
    began = time.monotonic()
    if out is None:
        raise ConfigError("no place for the Dataset is named", 'sartor.curate(recipe, out="data/faq")')
    given = {} if rows is None else python_rows.named_rows(rows)
    recipe = load_recipe(with_rows(recipe, list(given), licence=licence, fields=fields, system=system))
    out = Path(out).absolute()
    work_folder = out.with_name(f"{out.name}{WORK_SUFFIX}")
    run = CurationRun(recipe, work_folder, on, notice, given)
    if resume and kind_of(out) == "dataset":
        with workplace(work_folder, anew=False):
            try:
                run.write_given_rows()
                finished = _finished(recipe, out, run.rows_folder)
            finally:
                shutil.rmtree(work_folder / "rows", ignore_errors=True)
            shutil.rmtree(work_folder, ignore_errors=True)  # of a run that was killed once the Dataset was written
        return Curated(finished, 0, time.monotonic() - began)
    check_output_free(out, replace=replace)
    next_time = "begins anew, as --replace says" if replace else "goes on there"
    with workplace(work_folder, anew=replace):
        try:
            with run.progress:
                run.write_given_rows()
                state = run.run(strict)
            dataset = write_dataset(out, lambda writer: run.write(state, writer), replace=replace)
        except (KeyboardInterrupt, SystemExit) as stop:  # Ctrl-C, and SIGTERM as the command line converts it
            number = signal.SIGTERM if isinstance(stop, SystemExit) else signal.SIGINT
            problem = f"interrupted; what is done stands in {work_folder}"
            raise StoppedError(problem, f"the same command {next_time}", number) from None
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            problem = f"the disk is full; what is done stands in {work_folder}"
            raise MissingError(problem, f"free some space, then the same command {next_time}") from error
        shutil.rmtree(work_folder, ignore_errors=True)
    return Curated(dataset, run.resumed_parts, wall_s=time.monotonic() - began)


def load_recipe(recipe: CurateRecipe | Mapping[str, Any] | Path | str, flags: Sequence[str] = ()) -> CurateRecipe:
    """Return the recipe from any form that `curate` takes.

    flags: options such as `--split.eval_fraction 0.2`, applied on top.
    """
    return config.load_any(CurateRecipe, recipe, flags)


def _finished(recipe: CurateRecipe, out: Path, rows_folder: Path | None) -> Dataset:
    """Return the Dataset at `out` if it was made by this recipe from the current sources.

    Raises ConfigError if it was made by another recipe or from sources that have changed.
    """
    dataset = open_artifact(out, "dataset")
    manifest_digests = {(file["source"], file["path"]): file["sha256"] for file in dataset.manifest["sources"]}
    current_digests = {
        (file.source, file.path): file.sha256
        for file in planner.plan_reading(recipe.sources, recipe.max_row_bytes, rows_folder).files
    }
    is_same_recipe = dataset.manifest["recipe"] == json.loads(canonical(_recipe_fields(recipe)))
    if not is_same_recipe or manifest_digests != current_digests:
        difference = "sources that have changed" if is_same_recipe else "another recipe"
        raise ConfigError(f"{out} is a finished Dataset of {difference}", "choose another --out, or --replace")
    return dataset


@contextlib.contextmanager
def workplace(work_folder: Path, *, anew: bool) -> Iterator[None]:
    """Hold the locked work directory. It stays after an interruption, so that the same command can resume."""
    make_parent(work_folder)
    with writer_lock(work_folder):
        if anew:
            shutil.rmtree(work_folder, ignore_errors=True)
        work_folder.mkdir(exist_ok=True)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                work_folder.rmdir()  # succeeds only if it is empty


class CurationRun:
    """One run of a recipe: its sources, engine, progress and counts."""

    def __init__(
        self,
        recipe: CurateRecipe,
        work_folder: Path,
        engine: Engine,
        notice: Notice,
        given: Mapping[str, Any] = types.MappingProxyType({}),
    ) -> None:
        self.recipe, self.work_folder, self.notice = recipe, work_folder, notice
        self.given = given  # rows from Python, by name
        self.rows_folder = work_folder / "rows" if given else None
        self.declared = {source.path: source for source in recipe.sources}
        self.engine = run_on_ray if engine == "ray" else run_local
        self.progress = CurationProgress(notice)
        self.resumed_parts = 0
        self.read: Counter[tuple[str, str]] = Counter()
        self.notes: dict[tuple[str, str], Counter[str]] = {}
        self.tally: dict[str, Counter[str]] = {}

    def write_given_rows(self) -> None:
        """Write the rows from Python below the work directory, in whose place an interrupted run may have left some.

        Raises what `python_rows.write_rows` and `check_form` raise.
        """
        if self.rows_folder is None:
            return
        shutil.rmtree(self.rows_folder, ignore_errors=True)
        for name, rows in self.given.items():
            source = self.declared[python_rows.source_path(name)]
            try:
                written = python_rows.write_rows(
                    rows,
                    self.rows_folder,
                    name,
                    on_head=functools.partial(python_rows.check_form, source),
                    on_rows=self.progress.take,
                )
            except BaseException:
                shutil.rmtree(self.rows_folder, ignore_errors=True)
                raise
            for note in written.notes:
                self.notice(f"{name}: {note}")
            if source.licence == UNKNOWN:
                self.notice(f"{name}: no licence is stated, so the gate holds a Release back; own rows: licence='own'")

    def run(self, strict: bool) -> PassState:
        """Run every pass, the split, and the copies of training rows."""
        self.planned = planner.plan_reading(self.recipe.sources, self.recipe.max_row_bytes, self.rows_folder)
        for file in self.planned.files:
            if file.encoding and not self.declared[file.source].encoding:
                self.notice(
                    f"{file.path} is read as {file.encoding}; `encoding: CODE-PAGE` of the source reads it by another "
                    "one"
                )
        tasks = []
        for unit in self.planned.chunks:
            # the result of a query is unknown before it runs: its key is new each time, its shards are never reused
            key = unit.digest if unit.files else digest([unit.digest, time.time_ns()])
            tasks.append(
                ShardTask(
                    Path(),
                    key,
                    folder=self.work_folder,
                    steps=(),
                    sets=(),
                    unit=unit,
                    source=self.recipe.sources[unit.source],
                    strict=strict,
                )
            )
        workers = self.recipe.workers or len(os.sched_getaffinity(0))
        passes = Passes(self.work_folder, self._execute, workers, self.notice)
        state = passes.first(tasks, with_final_dedup([step for step in self.recipe.steps if not makes_copies(step)]))
        self.outcome = curation_outcome.SplitDecision(state, self.recipe)
        self.copies = augmentation.run_augmentation(passes, state, self.outcome, self.recipe)
        return state

    def _execute(self, name: str, tasks: Sequence[ShardTask]) -> list[Shard]:
        sizes = []
        for task in tasks:
            if task.unit:
                sizes.append(task.unit.bytes)
            else:
                sizes.append((task.before / "examples.parquet").stat().st_size if task.before else 0)
        result = []
        resumed_before = self.resumed_parts
        self.progress.begin(name, sum(sizes))
        for task, size, summary in zip(tasks, sizes, self.engine(tasks, sizes, self.recipe.workers), strict=True):
            self.resumed_parts += summary["was_there"]
            self.progress.advance(size, summary["kept"] + summary["dropped"])
            self._count(task, summary)
            result.append(Shard(task.part, summary))
        if resumed := self.resumed_parts - resumed_before:
            self.notice(f"{name}: going on with {resumed} parts that an interrupted run had finished")
        return result

    def _count(self, task: ShardTask, summary: Mapping[str, Any]) -> None:
        if task.source is not None:
            for file, count in summary["read"].items():
                self.read[task.source.path, file] += count
            for file, note, count in summary["notes"]:
                self.notes.setdefault((task.source.path, file), Counter())[note] += count
        for kind, counts in summary["tally"].items():
            self.tally.setdefault(kind, Counter()).update(counts)

    def write(self, state: PassState, writer: DatasetWriter) -> dict[str, Any]:
        """Fill the directory of the Dataset; return the facts of its manifest."""
        removed = curation_outcome.with_last_ids(
            state, [*state.removed, *curation_outcome.leaks(state, self.outcome), *self.copies.removed]
        )
        writer.examples(itertools.chain(curation_outcome.kept_tables(state, self.outcome), self.copies.tables()))
        masks = curation_outcome.Masks()
        personal_data = next((step for step in self.recipe.steps if isinstance(step, PersonalData)), None)
        if personal_data is not None:
            masks = curation_outcome.Masks(personal_data.masker(), personal_data.row_masker(), are_none=False)
        writer.drops(curation_outcome.drop_tables(state, removed, masks))
        read_count, copy_count, dropped_count = sum(self.read.values()), self.copies.total, writer.dropped.total()
        assert read_count + copy_count == writer.row_count + dropped_count, (
            f"{read_count} rows read, {copy_count} made, {writer.row_count} kept, {dropped_count} dropped"
        )
        if not writer.row_count:
            raise _nothing_kept(read_count, writer.folder)
        writer.set_aside(curation_outcome.set_aside_rows(removed, masks))
        writer.media(self.work_folder / "media")
        for name, table in evidence_of(state):
            writer.evidence(name, curation_outcome.mask_quotes(table, masks))
        if self.copies.steps:
            writer.evidence("copies", self.copies.evidence())
        tallied = {kind: dict(counts.most_common()) for kind, counts in self.tally.items()}
        sources = []
        for file in self.planned.files:
            key = file.source, file.path
            terms = {name: getattr(self.declared[file.source], name) for name in (*TERMS, "rehearsal")}
            sources.append({**asdict(file), **terms, "read": self.read[key], "notes": dict(self.notes.get(key, {}))})
        return writer.finish(
            recipe=_recipe_fields(self.recipe),
            sources=writer.sources_with_kept(sources),
            steps=curation_outcome.masked_facts({**state.facts, **tallied, **self.copies.facts()}, masks),
            counts={"read": read_count, "made": copy_count},
        )


def _recipe_fields(recipe: CurateRecipe) -> dict[str, Any]:
    """Return the recipe for the manifest, without options that do not change the Dataset."""
    fields = {name: value for name, value in config.dump(recipe).items() if name != "workers"}
    if not recipe.split.test_fraction:  # without a test split, the manifest is the same as before the option existed
        del fields["split"]["test_fraction"]
    return fields


_ENCODING_OPTION = "(`sartor tailor`), or `encoding` at the source in the recipe"
# Remedy by the reason of the first Drop where no row is left
_REMEDIES = {
    "unknown_encoding": f"--encoding cp1252, or utf-16-le without a byte order mark {_ENCODING_OPTION}",
    "binary_file": f"save it as text in UTF-8; --encoding utf-16-le if it is that without a mark {_ENCODING_OPTION}",
    "bad_json": "mend the JSON there; rows of several lines are read in a file called .json, and not in .jsonl",
    "bad_csv": "close the quote there, or save the table as .xlsx",
    "no_sheet": "end the source with #SHEET, one of the sheets that the workbook has: path: FILE.xlsx#SHEET",
    "duplicate_columns": "give each column of the header a name of its own",
    "empty_file": "give a file with rows",
}
_NAME_COLUMNS = "mend the rows as the first one's reason says, or name the columns: " + (
    "fields: {prompt: COLUMN, completion: COLUMN} at the source; --fields prompt=COLUMN,completion=COLUMN of "
    "`sartor tailor`"
)


def _nothing_kept(rows_read: int, folder: Path) -> SourceError:
    drops: list[dict[str, Any]] = []
    for file in sorted((folder / "drops").glob("*.parquet")):
        drops += parquet_io.read_file(file)
    if not drops:
        return SourceError(f"no row is left of {rows_read}", "a file with rows: at most a header was found")
    remedy = _REMEDIES.get(drops[0]["reason"], _NAME_COLUMNS)
    counts = records.count_values(drop["reason"] for drop in drops)
    reasons = ", ".join(f"{reason} {count}" for reason, count in counts.items())
    first = f"{drops[0]['locator']}: {drops[0]['detail']}"
    return SourceError(f"no row is left of {rows_read} ({reasons}; the first: {first})", remedy)
