"""Verb `synthesize`: asks, parses, repairs, accounts.

OUT.synthesizing/    work directory beside the output, until it is complete
  answers/           the teacher's answers (or in the recipe's `cache`)
  media/, clips/     images and recordings
OUT/                 the Dataset, written by one rename

The Dataset is not validated here: `sartor validate` compares it with reality.
"""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from sartor.core import config, parquet_io
from sartor.core.artifacts import Dataset, check_output_free, kind_of, open_artifact
from sartor.core.errors import ConfigError, MissingError, StoppedError
from sartor.core.filesystem import DISK_FULL
from sartor.core.progress import Progress
from sartor.core.records import Drop, Example, canonical_text, digest
from sartor.curate.dataset_writer import DatasetWriter, write_dataset
from sartor.curate.pipeline import workplace
from sartor.curate.review.row_edits import masked_text
from sartor.synthesize import synthetic_dataset
from sartor.synthesize.answer_cache import AnswerCache, Spent
from sartor.synthesize.generator import GeneratedRow, PromptedGenerator, Skipped, TeacherRequest, Unusable, quoted
from sartor.synthesize.generators import asks_teacher, make
from sartor.synthesize.recipe import SynthesizeRecipe
from sartor.synthesize.teacher import Teacher, TeacherAnswer, TeacherQuestion
from sartor.synthesize.teacher_options import Endpoint, Price
from sartor.text.json_schema import violations

MOST_STARTS = 50
_SHOWN = 3000


def parse_answer(answer: TeacherAnswer, schema: Mapping[str, Any]) -> dict[str, Any] | Unusable:
    """Return the JSON object of an answer if it fits the schema, else the fault.

    Text and code fences around the object are ignored. Raises ConfigError for a `$ref` outside the schema.
    """
    if answer.finish == "refused":
        return Unusable("teacher_refused", "the teacher would not answer")
    result = _object_in(answer.text)
    if result is None:
        if answer.finish == "length":
            return Unusable("answer_cut", "the answer was cut at max_tokens, before its JSON ended")
        return Unusable("no_json", "there is no JSON object in the answer")
    if errors := violations(result, schema):
        return Unusable("schema_mismatch", errors[0])
    return result


def repair(question: TeacherQuestion, answer: TeacherAnswer, fault: Unusable) -> TeacherQuestion:
    """Return the second question, with the answer and its fault."""
    repair_prompt = (
        f"Your answer was:\n{quoted(answer.text[:_SHOWN])}\nIt cannot be used: {fault.detail}. "
        f"Answer again, with the JSON object alone, of this schema: {question.schema}"
    )
    messages = (*question.messages, ("assistant", answer.text[:_SHOWN]), ("user", repair_prompt))
    return TeacherQuestion(
        messages,
        question.seed,
        max_tokens=question.max_tokens,
        temperature=question.temperature,
        schema=question.schema,
    )


def _object_in(text: str) -> dict[str, Any] | None:
    """Return the first whole JSON object in a text, or None."""
    decoder = json.JSONDecoder()
    start = text.find("{")
    for _ in range(MOST_STARTS):
        if start < 0:
            return None
        try:
            value, _ = decoder.raw_decode(text, start)
            # a lone surrogate cannot be encoded, so it raises here
            json.dumps(value, ensure_ascii=False).encode()
        except (ValueError, RecursionError):
            start = text.find("{", start + 1)
            continue
        return value if isinstance(value, dict) else None
    return None


@dataclass(frozen=True)
class Synthesized:
    """Result of `synthesize`.

    spent: questions and costs of this run; None if no teacher was asked.
    found: whether a finished Dataset was found, at no cost.
    """

    dataset: Dataset
    spent: Spent | None
    wall_s: float
    found: bool = field(default=False)

    def examples(self) -> Iterator[Example]:
        """Return an iterator over the rows, in order."""
        return parquet_io.read_examples(self.dataset)

    @property
    def made(self) -> int:
        """Number of rows in the Dataset."""
        return int(self.dataset.manifest["counts"]["kept"])

    @property
    def dropped(self) -> dict[str, int]:
        """Drops by reason: unusable answers, duplicate rows, unreadable sources."""
        return dict(self.dataset.manifest["counts"]["dropped"])

    def as_json(self) -> dict[str, Any]:
        """Return the command's JSON."""
        spent = self.spent or Spent(0, 0, tokens_in=0, tokens_out=0, estimated=0, cost=0.0)
        fields = self.dataset.manifest["synthetic"]
        return {
            "dataset": str(self.dataset.path),
            "made": self.made,
            "dropped": self.dropped,
            "seeds": fields["seeds"],
            "ways": fields["ways"],
            "teacher": fields["teacher"],
            "calls": spent.calls,
            "cached": spent.cached,
            "tokens": {"input": spent.tokens_in, "output": spent.tokens_out, "estimated_calls": spent.estimated},
            "cost": round(spent.cost, 6),
            "licence": self.dataset.licence,
            "digest": self.dataset.manifest["digest"],
            "wall_s": round(self.wall_s, 3),
        }

    def table(self) -> list[tuple[str, Any]]:
        """Return the lines shown to the user."""
        fields = self.as_json()
        ways = [(kind, counts) for kind, counts in fields.pop("ways").items()]
        names = ("dataset", "made", "dropped", "teacher", "calls", "cached", "tokens", "cost", "licence")
        return [*((name, fields[name]) for name in names), *ways, ("card", str(self.dataset.path / "card.html"))]


Notice = Callable[[str], object]
# Requests in memory for each question that may be asked at once
AHEAD = 16
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
    """Make rows by the generators (`ways`) of a recipe, and write them as a Dataset to `out`.

    recipe: a SynthesizeRecipe, a mapping in its form, or the path of a YAML file.
    teacher: replaces the recipe's.
    resume: accept a finished Dataset of the same recipe and seeds as the result.
    replace: replace an existing output; cached answers are still used.

    The same call resumes an interrupted run without repeating answered questions. The rows depend on the recipe, the
    seeds and the answers, not on time, threads or failures.

    Raises ConfigError for a bad recipe or a taken `out`, SourceError if no row is made, the teacher's errors once its
    tries are used, BudgetError at the spending limit, StoppedError on a signal.
    """
    started = time.monotonic()
    recipe = load_recipe(recipe)
    asking = [way.kind for way in recipe.ways if asks_teacher(way)]
    if asking and teacher is None and recipe.teacher is None:
        raise ConfigError(f"{asking[0]} asks a teacher, and the recipe names none", "teacher: local")
    out = Path(out).absolute()
    if resume and kind_of(out) == "dataset":
        return Synthesized(_finished(recipe, out), None, time.monotonic() - started, found=True)
    check_output_free(out, replace=replace)
    work = out.with_name(f"{out.name}.synthesizing")
    with workplace(work, anew=False):
        run = SynthesisRun(recipe, work, teacher, notice)
        try:
            dataset = write_dataset(out, run.write, replace=replace)
        except (KeyboardInterrupt, SystemExit) as stop:  # Ctrl-C, and SIGTERM as the command line converts it
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
    return Synthesized(dataset, run.answers.spent if run.answers else None, time.monotonic() - started)


def load_recipe(
    recipe: SynthesizeRecipe | Mapping[str, Any] | Path | str, flags: Sequence[str] = ()
) -> SynthesizeRecipe:
    """Return the recipe from any form that `synthesize` takes, with flags such as `--seed 1` applied."""
    return config.load_any(SynthesizeRecipe, recipe, flags)


def _manifest_recipe(recipe: SynthesizeRecipe) -> dict[str, Any]:
    """Return the recipe for the manifest, without options that do not change the Dataset."""
    fields = {name: value for name, value in config.dump(recipe).items() if name != "cache"}
    if fields["teacher"]:
        fields["teacher"] = {name: value for name, value in fields["teacher"].items() if name not in _OF_A_RUN}
    return fields


_OF_A_RUN = (
    "at_once",
    "requests_per_minute",
    "tokens_per_minute",
    "price",
    "tries",
    "pause_s",
    "timeout_s",
    "key_env",
)


def _finished(recipe: SynthesizeRecipe, out: Path) -> Dataset:
    """Return the Dataset at `out`. Raises ConfigError if it was made by another recipe or from other seeds."""
    dataset = open_artifact(out, "dataset")
    synthetic_fields = dataset.manifest.get("synthetic")
    if not synthetic_fields or digest(dataset.manifest["recipe"]) != digest(_manifest_recipe(recipe)):
        raise ConfigError(f"{out} is a finished Dataset of another recipe", "choose another --out, or --replace")
    work = out.with_name(f"{out.name}.synthesizing")
    with workplace(work, anew=False):
        seeds = synthetic_dataset.read_seeds(recipe.sources, recipe.max_row_bytes, work)
        shutil.rmtree(work, ignore_errors=True)
    if seeds.digest != synthetic_fields["of"]:
        raise ConfigError(
            f"{out} is a finished Dataset of sources that have changed", "choose another --out, or --replace"
        )
    return dataset


@dataclass(frozen=True)
class AskOutcome:
    """Outcome of a request: the last question and answer, and its JSON or its fault."""

    request: TeacherRequest
    question: TeacherQuestion
    answer: TeacherAnswer
    value: dict[str, Any] | Unusable


class SynthesisRun:
    """One run of a recipe."""

    def __init__(self, recipe: SynthesizeRecipe, work: Path, teacher: Teacher | None, notice: Notice) -> None:
        self.recipe, self.work, self.notice = recipe, work, notice
        self.folder = Path(recipe.cache).expanduser() if recipe.cache else work / "answers"
        self.answers: AnswerCache | None = None
        self._teacher = teacher

    def write(self, writer: DatasetWriter) -> dict[str, Any]:
        """Fill the directory of the Dataset; return the facts of its manifest."""
        seeds = synthetic_dataset.read_seeds(self.recipe.sources, self.recipe.max_row_bytes, self.work)
        if any(map(asks_teacher, self.recipe.ways)):
            configured = self.recipe.teacher
            teacher = self._teacher or (configured.open(self.notice) if configured else None)
            assert teacher is not None  # checked when the run began
            price = configured.price if isinstance(configured, Endpoint) else Price()
            self.answers = AnswerCache(teacher, self.folder, price)
        of_teacher = self.recipe.teacher.licence if self.recipe.teacher else ""
        self.rows = synthetic_dataset.SyntheticRows(
            (self.recipe.licence, of_teacher), {row.id: row.origins[0].locator for row in seeds.rows}
        )
        for generator in self.recipe.ways:
            if asks_teacher(generator):
                self._ask(generator, seeds)
            else:
                self._make(generator, seeds)
        name = self.answers.teacher.name if self.answers else ""
        return synthetic_dataset.write(
            writer,
            self.work,
            synthetic_rows=self.rows,
            seeds=seeds,
            fields={"recipe": _manifest_recipe(self.recipe), "teacher": name, "of": seeds.digest},
        )

    def _make(self, generator: Any, seeds: synthetic_dataset.Seeds) -> None:
        for item in make(generator, seeds.rows, self.recipe.seed, self.work):
            if isinstance(item, Skipped):
                self.rows.count(generator.kind, f"skipped:{item.reason}")
            elif isinstance(item, Drop):
                self.rows.drop(generator.kind, item, "")
            else:
                self.rows.add(generator.kind, item, synthetic_dataset.Provenance(seed=self.recipe.seed))

    def _ask(self, generator: PromptedGenerator, seeds: synthetic_dataset.Seeds) -> None:
        requests = generator.requests(seeds.rows, self.recipe.seed)
        asks = sum(not isinstance(item, Skipped) for item in requests)
        with Progress(generator.kind, asks, "asked", self._with_cost) as progress:
            for outcome in self._outcomes(generator, seeds):
                self._take(generator, outcome)
                progress.advance()

    def _outcomes(self, generator: PromptedGenerator, seeds: synthetic_dataset.Seeds) -> Iterator[AskOutcome]:
        """Yield the outcomes in the order of the requests, several of which are in progress at once."""
        assert self.answers is not None
        at_once = self.answers.teacher.at_once
        requests = self._counted(generator, seeds)
        with ThreadPoolExecutor(at_once, "sartor-teacher") as pool:
            while batch := list(islice(requests, at_once * AHEAD)):
                under_way = [pool.submit(self._outcome, generator.kind, request) for request in batch]
                try:
                    for future in under_way:
                        yield future.result()
                except BaseException:
                    # wait for the questions in progress and keep their answers; cancel the others
                    pool.shutdown(wait=True, cancel_futures=True)
                    raise

    def _counted(self, generator: PromptedGenerator, seeds: synthetic_dataset.Seeds) -> Iterator[TeacherRequest]:
        for item in generator.requests(seeds.rows, self.recipe.seed):
            if isinstance(item, Skipped):
                self.rows.count(generator.kind, f"skipped:{item.reason}")
            else:
                yield item

    def _outcome(self, kind: str, request: TeacherRequest) -> AskOutcome:
        assert self.answers is not None
        number = int(digest([self.recipe.seed, kind, request.number])[:8], 16) >> 1  # endpoints accept 31 bits
        schema = canonical_text(request.schema)
        question = TeacherQuestion(
            request.messages,
            number,
            max_tokens=self.recipe.max_tokens,
            temperature=self.recipe.temperature,
            schema=schema,
        )
        answer = self.answers.answer(question)
        value = parse_answer(answer, request.schema)
        if isinstance(value, Unusable) and value.reason in _REPAIRED and self.recipe.repairs:
            question = repair(question, answer, value)
            answer = self.answers.answer(question)
            value = parse_answer(answer, request.schema)
        return AskOutcome(request, question, answer, value)

    def _take(self, generator: PromptedGenerator, outcome: AskOutcome) -> None:
        assert self.answers is not None
        generated: GeneratedRow | Unusable
        if isinstance(outcome.value, Unusable):
            generated = outcome.value
        else:
            generated = generator.build_row(outcome.request, outcome.value)
        if isinstance(generated, GeneratedRow):
            question = outcome.question
            provenance = synthetic_dataset.Provenance(
                self.answers.teacher.name, question.prompt_digest, outcome.answer.digest, question.seed
            )
            self.rows.add(generator.kind, generated, provenance)
            return
        parents = outcome.request.parents
        origin = parents[0].origins[0] if parents else None
        # the detail may quote the answer, which may name people, so it is masked; only the answer's digest is kept
        detail = (
            f"{masked_text(generated.detail)} (answer {outcome.answer.digest} to {generator.kind} "
            f"{outcome.request.number})"
        )
        source_locator = (origin.source, origin.locator) if origin else ("", "")
        self.rows.drop(generator.kind, Drop(generated.reason, *source_locator, detail), outcome.request.number)

    def _with_cost(self, line: str) -> None:
        """Report a line of progress, with the cost of the answers so far."""
        if self.answers:
            spent = self.answers.spent
            line = f"{line}; {spent.calls:,} calls, {spent.cached:,} from disk, cost {spent.cost:.4f}"
        self.notice(line)
