"""Recipe -> Dataset of synthetic rows: seeds read, ways asked in order, answers remembered, everything accounted for.

OUT.synthesizing/    the work, beside the output until it stands
  answers/           what the teacher said (or in the recipe's `cache`)
  media/, clips/     pictures and recordings
OUT/                 the Dataset, in one rename. Nobody has validated it: `sartor validate` holds it against reality.
"""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from sartor.core import config
from sartor.core.artifacts import Artifact, check_free, kind_of, open_artifact
from sartor.core.errors import ConfigError, MissingError, StoppedError
from sartor.core.filesystem import DISK_FULL
from sartor.core.records import Drop, canonical_text, digest
from sartor.core.teachers import Answer, Question, Teacher
from sartor.curate.dataset_writer import DatasetWriter, write_dataset
from sartor.curate.pipeline import workplace
from sartor.curate.review.row_edits import masked_text
from sartor.curate.synthesize import reading, seeds, writing
from sartor.curate.synthesize.answers import Answers
from sartor.curate.synthesize.contract import Ask, AskingWay, Made, Skipped, Unusable
from sartor.curate.synthesize.recipe import SynthesizeRecipe
from sartor.curate.synthesize.synthesized import Synthesized
from sartor.curate.synthesize.teachers import Endpoint, Price
from sartor.curate.synthesize.ways import asks_teacher, make

Notice = Callable[[str], object]
# Asks that are in memory at once, for each that is asked at once
AHEAD = 16
SECONDS_BETWEEN_LINES = 10.0
_REPAIRED = ("no_json", "schema_mismatch")


def synthesize(
    recipe: SynthesizeRecipe | Mapping[str, Any] | Path | str,
    out: Path | str,
    *,
    teacher: Teacher | None = None,
    resume: bool = False,
    replace: bool = False,
    notice: Notice = lambda line: None,
) -> Synthesized:
    """Make rows by the ways of a recipe, and write them as a Dataset to `out`.

    `recipe` is a SynthesizeRecipe, a mapping in its form, or the path of a YAML file. `teacher` stands in for the recipe's. An
    interrupted run is gone on with by the same call: what was answered is not asked again, also under `replace`. `resume` also
    takes a finished Dataset of the same recipe and seeds for an answer. The rows depend on the recipe, the seeds and the
    answers, not on time, threads or failures. Raises ConfigError for a bad recipe or a taken `out`, SourceError when no row is
    made, what the teacher raises when its patience is at an end, BudgetError when the money is, StoppedError on a signal.
    """
    began = time.monotonic()
    recipe = load_recipe(recipe)
    _check_teacher(recipe, teacher)
    out = Path(out).absolute()
    if resume and kind_of(out) == "dataset":
        return Synthesized(_finished(recipe, out), None, time.monotonic() - began, found=True)
    check_free(out, replace=replace)
    work = out.with_name(f"{out.name}.synthesizing")
    with workplace(work, anew=False):
        run = Run(recipe, work, teacher, notice)
        try:
            dataset = write_dataset(out, run.write, replace=replace)
        except (KeyboardInterrupt, SystemExit) as stop:  # Ctrl-C, and SIGTERM as the command line turns it
            number = signal.SIGTERM if isinstance(stop, SystemExit) else signal.SIGINT
            raise StoppedError(
                f"interrupted; answers stand in {run.folder}", "the same command goes on there", number
            ) from None
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise MissingError(
                f"the disk is full; answers stand in {run.folder}", "free some space, then the same command"
            ) from error
        shutil.rmtree(work, ignore_errors=True)
    return Synthesized(dataset, run.answers.spent if run.answers else None, time.monotonic() - began)


def load_recipe(recipe: SynthesizeRecipe | Mapping[str, Any] | Path | str, flags: Sequence[str] = ()) -> SynthesizeRecipe:
    """The recipe in any of the forms that `synthesize` takes, with flags (`--seed 1`) on top."""
    return config.load_any(SynthesizeRecipe, recipe, flags)


def _check_teacher(recipe: SynthesizeRecipe, teacher: Teacher | None) -> None:
    asking = [way.kind for way in recipe.ways if asks_teacher(way)]
    if asking and teacher is None and recipe.teacher is None:
        raise ConfigError(f"{asking[0]} asks a teacher, and the recipe names none", "teacher: local")


def _said(recipe: SynthesizeRecipe) -> dict[str, Any]:
    """The recipe as a manifest has it: without what changes nothing in the Dataset."""
    said = {name: value for name, value in config.dump(recipe).items() if name != "cache"}
    if said["teacher"]:
        said["teacher"] = {name: value for name, value in said["teacher"].items() if name not in _OF_A_RUN}
    return said


_OF_A_RUN = ("at_once", "requests_per_minute", "tokens_per_minute", "price", "tries", "pause_s", "timeout_s", "key_env")


def _finished(recipe: SynthesizeRecipe, out: Path) -> Artifact:
    """The Dataset at `out`. Raises ConfigError if another recipe, or other seeds, made it."""
    there = open_artifact(out, "dataset")
    said = there.manifest.get("synthetic")
    if not said or digest(there.manifest["recipe"]) != digest(_said(recipe)):
        raise ConfigError(f"{out} is a finished Dataset of another recipe", "choose another --out, or --replace")
    work = out.with_name(f"{out.name}.synthesizing")
    with workplace(work, anew=False):
        found = seeds.read(recipe.sources, recipe.max_row_bytes, work)
        shutil.rmtree(work, ignore_errors=True)
    if found.digest != said["of"]:
        raise ConfigError(f"{out} is a finished Dataset of sources that have changed", "choose another --out, or --replace")
    return there


@dataclass(frozen=True)
class Outcome:
    """What came of an ask: the last question and answer, and the JSON in it or what is wrong with it."""

    ask: Ask
    question: Question
    answer: Answer
    value: dict[str, Any] | Unusable


class Run:
    """One run of a recipe."""

    def __init__(self, recipe: SynthesizeRecipe, work: Path, teacher: Teacher | None, notice: Notice) -> None:
        self.recipe, self.work, self.notice = recipe, work, notice
        self.folder = Path(recipe.cache).expanduser() if recipe.cache else work / "answers"
        self.answers: Answers | None = None
        self._given = teacher
        self._said_at = time.monotonic()

    def write(self, writer: DatasetWriter) -> dict[str, Any]:
        """Fill the Dataset's directory; returns what its manifest says."""
        found = seeds.read(self.recipe.sources, self.recipe.max_row_bytes, self.work)
        if any(map(asks_teacher, self.recipe.ways)):
            self.answers = self._open_answers()
        of_teacher = self.recipe.teacher.licence if self.recipe.teacher else ""
        self.rows = writing.Rows((self.recipe.licence, of_teacher), {row.id: row.origins[0].locator for row in found.rows})
        for way in self.recipe.ways:
            if asks_teacher(way):
                self._ask(way, found)
            else:
                self._make(way, found)
        name = self.answers.teacher.name if self.answers else ""
        return writing.write(
            writer, self.work, self.rows, found, {"recipe": _said(self.recipe), "teacher": name, "of": found.digest}
        )

    def _open_answers(self) -> Answers:
        configured = self.recipe.teacher
        teacher = self._given or (configured.open(self.notice) if configured else None)
        assert teacher is not None  # looked at when the run began
        return Answers(teacher, self.folder, configured.price if isinstance(configured, Endpoint) else Price())

    def _make(self, way: Any, found: seeds.Seeds) -> None:
        for one in make(way, found.rows, self.recipe.seed, self.work):
            if isinstance(one, Skipped):
                self.rows.count(way.kind, f"skipped:{one.reason}")
            elif isinstance(one, Drop):
                self.rows.drop(way.kind, one, "")
            else:
                self.rows.add(way.kind, one, writing.Asked(seed=self.recipe.seed))

    def _ask(self, way: AskingWay, found: seeds.Seeds) -> None:
        for outcome in self._outcomes(way, found):
            self._take(way, outcome)
            self._tell(way.kind)

    def _outcomes(self, way: AskingWay, found: seeds.Seeds) -> Iterator[Outcome]:
        """In the order of the asks, some of which are under way at once."""
        assert self.answers is not None
        at_once = self.answers.teacher.at_once
        coming = self._counted(way, found)
        with ThreadPoolExecutor(at_once, "sartor-teacher") as pool:
            while some := list(islice(coming, at_once * AHEAD)):
                under_way = [pool.submit(self._outcome, way.kind, ask) for ask in some]
                try:
                    for future in under_way:
                        yield future.result()
                except BaseException:
                    # what is asked already is waited for, and kept; nothing more is asked
                    pool.shutdown(wait=True, cancel_futures=True)
                    raise

    def _counted(self, way: AskingWay, found: seeds.Seeds) -> Iterator[Ask]:
        for one in way.asks(found.rows, self.recipe.seed):
            if isinstance(one, Skipped):
                self.rows.count(way.kind, f"skipped:{one.reason}")
            else:
                yield one

    def _outcome(self, kind: str, ask: Ask) -> Outcome:
        assert self.answers is not None
        number = int(digest([self.recipe.seed, kind, ask.number])[:8], 16) >> 1  # endpoints take 31 bits
        schema = canonical_text(ask.schema)
        question = Question(ask.messages, number, self.recipe.max_tokens, self.recipe.temperature, schema)
        answer = self.answers.answer(question)
        value = reading.read(answer, ask.schema)
        if isinstance(value, Unusable) and value.reason in _REPAIRED and self.recipe.repairs:
            question = reading.repair(question, answer, value)
            answer = self.answers.answer(question)
            value = reading.read(answer, ask.schema)
        return Outcome(ask, question, answer, value)

    def _take(self, way: AskingWay, outcome: Outcome) -> None:
        assert self.answers is not None
        made = outcome.value if isinstance(outcome.value, Unusable) else way.made(outcome.ask, outcome.value)
        if isinstance(made, Made):
            of = outcome.question
            asked = writing.Asked(self.answers.teacher.name, of.prompt_digest, outcome.answer.digest, of.seed)
            self.rows.add(way.kind, made, asked)
            return
        parents = outcome.ask.parents
        origin = parents[0].origins[0] if parents else None
        # a reason may quote the answer, in which people may be named; of the answer itself only the digest is kept
        detail = f"{masked_text(made.detail)} (answer {outcome.answer.digest} to {way.kind} {outcome.ask.number})"
        place = (origin.source, origin.locator) if origin else ("", "")
        self.rows.drop(way.kind, Drop(made.reason, *place, detail), outcome.ask.number)

    def _tell(self, kind: str) -> None:
        if time.monotonic() - self._said_at > SECONDS_BETWEEN_LINES and self.answers:
            spent, self._said_at = self.answers.spent, time.monotonic()
            made = sum(counts["made"] for counts in self.rows.ways.values())
            self.notice(f"{kind}: {made:,} rows made, {spent.calls:,} calls, {spent.cached:,} from disk, cost {spent.cost:.4f}")
