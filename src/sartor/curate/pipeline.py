"""Sources -> Dataset: plan, read and step in passes, hold out, copy, write. `read` and `made` are always `kept` and every Drop.

OUT.curating/      the work, beside the output until it stands; what is there is gone on from
  media/           images and audio by digest
  pass-1/000000/   a Part: what one worker made of one piece
OUT/               the Dataset, in one rename
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from sartor.core import config, parquet_io, records
from sartor.core.artifacts import Artifact, check_free, kind_of, open_artifact
from sartor.core.errors import ConfigError, MissingError, SourceError, StoppedError
from sartor.core.filesystem import DISK_FULL, make_parent, writer_lock
from sartor.core.records import canonical, digest
from sartor.curate import copies, finish, local, on_ray
from sartor.curate.curated import Curated
from sartor.curate.dataset_writer import DatasetWriter, write_dataset
from sartor.curate.parts import Part
from sartor.curate.passes import Passes, State, evidence_of, whole
from sartor.curate.progress import Progress
from sartor.curate.recipe import CurateRecipe
from sartor.curate.sources import planning, reading
from sartor.curate.steps import makes_copies
from sartor.curate.steps.personal_data import PersonalData
from sartor.curate.work import Task

Notice = Callable[[str], None]
# Of a Source, what its files' entries in the manifest say besides the licence: core/licences/compliance.py reads them there.
TERMS = ("share_alike", "non_commercial", "expires", "consent")
Engine = Literal["local", "ray"]


def curate(
    recipe: CurateRecipe | Mapping[str, Any] | Path | str,
    out: Path | str,
    *,
    on: Engine = "local",
    strict: bool = False,
    resume: bool = False,
    replace: bool = False,
    notice: Notice = lambda line: None,
) -> Curated:
    """Read the sources of a recipe, apply its steps, split by group, write a Dataset to `out`.

    `recipe` is a CurateRecipe, a mapping in its form, or the path of a YAML file. `on` is the engine; the Dataset is the
    same on either, row by row. A run of the same recipe that was interrupted is gone on with; `replace` begins anew; `resume`
    also takes a finished Dataset of the same recipe and sources for an answer. Raises ConfigError for a bad recipe or a taken
    `out`, SourceError when no row is kept or, under `strict`, at the first row that cannot be used, GuardError when a step
    would remove too much.
    """
    began = time.monotonic()
    recipe = load_recipe(recipe)
    out = Path(out).absolute()
    work = out.with_name(f"{out.name}.curating")
    if resume and (there := _finished(recipe, out)):
        with workplace(work, anew=True):  # a run that was killed between the Dataset and its end has left its work
            return Curated(there, 0, time.monotonic() - began)
    check_free(out, replace=replace)
    with workplace(work, anew=replace):
        line = Line(recipe, work, on, notice)
        try:
            with line.progress:
                state = line.run(strict)
            dataset = write_dataset(out, lambda writer: line.write(state, writer), replace=replace)
        except (KeyboardInterrupt, SystemExit) as stop:  # Ctrl-C, and SIGTERM as the command line turns it
            number = signal.SIGTERM if isinstance(stop, SystemExit) else signal.SIGINT
            problem = f"interrupted; what is done stands in {work}"
            raise StoppedError(problem, "the same command goes on there", number) from None
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            problem = f"the disk is full; what is done stands in {work}"
            raise MissingError(problem, "free some space, then the same command goes on there") from error
        shutil.rmtree(work, ignore_errors=True)
    return Curated(dataset, line.found, wall_s=time.monotonic() - began)


def load_recipe(recipe: CurateRecipe | Mapping[str, Any] | Path | str, flags: Sequence[str] = ()) -> CurateRecipe:
    """The recipe in any of the forms that `curate` takes, with flags (`--split.eval_fraction 0.2`) on top."""
    return config.load_any(CurateRecipe, recipe, flags)


def _finished(recipe: CurateRecipe, out: Path) -> Artifact | None:
    """The Dataset at `out` if the recipe makes it of its sources as they are now. Raises ConfigError if it is another."""
    if kind_of(out) != "dataset":
        return None
    there = open_artifact(out, "dataset")
    made = {(file["source"], file["path"]): file["sha256"] for file in there.manifest["sources"]}
    now = {(file.source, file.path): file.sha256 for file in planning.plan(recipe.sources, recipe.max_row_bytes).files}
    same = there.manifest["recipe"] == json.loads(canonical(_said(recipe)))
    if not same or made != now:
        what = "sources that have changed" if same else "another recipe"
        raise ConfigError(f"{out} is a finished Dataset of {what}", "choose another --out, or --replace")
    return there


@contextlib.contextmanager
def workplace(work: Path, *, anew: bool) -> Iterator[None]:
    """The work's directory, locked. It stays when the work is interrupted, so that the same command can go on."""
    make_parent(work)
    with writer_lock(work):
        if anew:
            shutil.rmtree(work, ignore_errors=True)
        work.mkdir(exist_ok=True)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                work.rmdir()  # only if nothing is in it


class Line:
    """One run of a recipe: its files, its engine, its progress, its Dataset."""

    def __init__(self, recipe: CurateRecipe, work: Path, on: Engine, notice: Notice) -> None:
        self.recipe, self.work, self.notice = recipe, work, notice
        self.declared = {source.path: source for source in recipe.sources}
        self.engine = on_ray.run if on == "ray" else local.run
        self.progress = Progress(notice)
        self.found = 0
        self.read: Counter[tuple[str, str]] = Counter()
        self.notes: dict[tuple[str, str], Counter[str]] = {}
        self.tally: dict[str, Counter[str]] = {}

    def run(self, strict: bool) -> State:
        """Every pass, the split, and the copies of training rows."""
        self.planned = planning.plan(self.recipe.sources, self.recipe.max_row_bytes)
        tasks = [
            Task(Path(), _key(unit), self.work, (), (), unit, self.recipe.sources[unit.source], strict)
            for unit in self.planned.units
        ]
        workers = self.recipe.workers or len(os.sched_getaffinity(0))
        passes = Passes(self.work, self._execute, workers, self.notice)
        state = passes.first(tasks, whole([step for step in self.recipe.steps if not makes_copies(step)]))
        self.outcome = finish.Outcome(state, self.recipe)
        self.copies = copies.made(passes, state, self.outcome, self.recipe)
        return state

    def _execute(self, name: str, tasks: Sequence[Task]) -> list[Part]:
        sizes = [task.unit.bytes if task.unit else _size(task.before) for task in tasks]
        made = []
        self.progress.begin(name, sum(sizes))
        for task, size, summary in zip(tasks, sizes, self.engine(tasks, sizes, self.recipe.workers), strict=True):
            self.found += summary["was_there"]
            self.progress.advance(size, summary["kept"] + summary["dropped"])
            self._count(task, summary)
            made.append(Part(task.part, summary))
        if self.found:
            self.notice(f"{name}: going on with {self.found} parts that an interrupted run had finished")
        return made

    def _count(self, task: Task, summary: Mapping[str, Any]) -> None:
        if task.source is not None:
            for file, count in summary["read"].items():
                self.read[task.source.path, file] += count
            for file, note, count in summary["notes"]:
                self.notes.setdefault((task.source.path, file), Counter())[note] += count
        for kind, counts in summary["tally"].items():
            self.tally.setdefault(kind, Counter()).update(counts)

    def write(self, state: State, writer: DatasetWriter) -> dict[str, Any]:
        """Fill the Dataset's directory; returns what its manifest says."""
        removed = finish.with_last_ids(state, [*state.removed, *finish.leaks(state, self.outcome), *self.copies.removed])
        writer.examples(itertools.chain(finish.kept_tables(state, self.outcome), self.copies.tables()))
        masks = self._masks()
        writer.drops(finish.drop_tables(state, removed, masks))
        read, made, dropped = sum(self.read.values()), self.copies.total, writer.dropped.total()
        assert read + made == writer.kept + dropped, f"{read} rows read, {made} made, {writer.kept} kept, {dropped} dropped"
        if not writer.kept:
            raise SourceError(_nothing_kept(read, writer.folder), "mend the rows or the sources")
        writer.set_aside(finish.set_aside_rows(removed, masks))
        writer.media(self.work / "media")
        for name, table in evidence_of(state):
            writer.evidence(name, finish.masked(table, masks))
        if self.copies.steps:
            writer.evidence("copies", self.copies.evidence())
        tallied = {kind: dict(counts.most_common()) for kind, counts in self.tally.items()}
        return writer.finish(
            recipe=_said(self.recipe),
            sources=writer.sources_with_kept(self._sources()),
            steps=finish.masked_facts({**state.facts, **tallied, **self.copies.facts()}, masks),
            counts={"read": read, "made": made},
        )

    def _masks(self) -> finish.Masks:
        for step in self.recipe.steps:
            if isinstance(step, PersonalData):
                return finish.Masks(step.masker(), step.row_masker(), are_none=False)
        return finish.Masks()

    def _sources(self) -> Iterator[dict[str, Any]]:
        """An entry for each file that was planned, with what its owner allows and what was read of it."""
        for file in self.planned.files:
            place = file.source, file.path
            terms = {name: getattr(self.declared[file.source], name) for name in (*TERMS, "rehearsal")}
            yield {**asdict(file), **terms, "read": self.read[place], "notes": dict(self.notes.get(place, {}))}


def _key(unit: reading.Unit) -> str:
    """What a unit will read. Nobody knows that of a query before it is asked, so its parts are never found again."""
    return unit.digest if unit.files else digest([unit.digest, time.time_ns()])


def _said(recipe: CurateRecipe) -> dict[str, Any]:
    """The recipe as the manifest has it: without what changes nothing in the Dataset."""
    return {name: value for name, value in config.dump(recipe).items() if name != "workers"}


def _size(before: Path | None) -> int:
    return (before / "examples.parquet").stat().st_size if before else 0


def _nothing_kept(read: int, folder: Path) -> str:
    drops = [drop for file in sorted((folder / "drops").glob("*.parquet")) for drop in parquet_io.read_file(file)]
    reasons = ", ".join(f"{reason} {count}" for reason, count in records.tally(drop["reason"] for drop in drops).items())
    first = f"; the first: {drops[0]['locator']}: {drops[0]['detail']}" if drops else ""
    return f"no row is left of {read}" + (f" ({reasons}{first})" if reasons else "")
