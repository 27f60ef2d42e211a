"""Verb tune --sweep: trials of recipe options by successive halving.

    OUT                     the winner's Adapter
    OUT.sweep/
      sweep.jsonl           the question, then one line per finished trial
      sweep.png             score over the fraction of the budget, a line per trial
      RUNG-TRIAL/           the Adapter of each trial, RUNG and TRIAL from 0

Of n trials all are tuned with a small part of the budget, the better 1/factor of them with `factor` times as much, and
so on until one is left with the whole budget (Jamieson & Talwalkar 2016, arXiv:1502.07943, algorithm 1, with fixed n).
Each rung starts anew, since the course of the learning rate depends on the budget. All trials have the recipe's seed,
rows and held-out rows; the measure is taken once, at the end of each run: the exact match of replies, or the loss
where replies are long. Preferences are measured by the fraction of held-out rows that the model agrees with, and grpo
by the reward of held-out rows. The loss of one objective or base cannot be compared with another's, so that sweeps
whose trials would differ in that are refused.

The winner was chosen by its score, so that score is too high on average. Its interval is therefore that of all trials
measured with the whole budget and before (Bonferroni), and each measurement is a look in the ledger that a Report
counts.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sartor.core import config, evaluation_ledger, statistics
from sartor.core.artifacts import Adapter, kind_of, open_artifact
from sartor.core.errors import ArtifactError, BudgetError, BusyError, ConfigError, DeadlineError, ModelError
from sartor.core.filesystem import create_directory_atomic
from sartor.core.line_ledger import LineLedger
from sartor.core.model_refs import locate_base
from sartor.models.base import read_chat
from sartor.tune.checkpoint_selection import natural_metric
from sartor.tune.dataset_encoding import encode_rows
from sartor.tune.plan import TuningPlan, plan
from sartor.tune.recipe import PAIRED, Grpo, Kto, Objective, Recipe, Sft
from sartor.tune.recipe import load as load_recipe
from sartor.tune.resume import changed_options
from sartor.tune.tokenized_dataset import TokenizedDataset
from sartor.tune.trainer import tune

Notice = Callable[[str], object]
# More trials than anybody can wait for on one machine; --trials draws some of a larger grid
MOST_TRIALS = 64
FACTOR = 3
# With fewer updates a rung's scores say nothing of the whole run
LEAST_UPDATES = 4
CONFIDENCE = 0.95
# A sweep goes on with other values of these
_FREE_OPTIONS = (
    "checkpoints.",
    "track.",
    *(f"objective.teacher.{name}" for name in ("url", "key_env", "tries", "at_once")),
)
_OTHER_OPTION = "--sweep optimizer.learning_rate=1e-4,5e-4"
# metric of a trial -> key of its evaluation in the log, and label of the plot
_LOGGED = {"agreement": "eval_agreement", "reward": "eval_reward"}
_LABELS = {
    "exact_match": "exact match of held-out rows",
    "agreement": "agreement with held-out preferences",
    "reward": "reward of held-out rows",
}
_LEDGER = LineLedger("journal of a sweep", 1, lambda line: "question" in line or "trial" in line, "rm {file}")


@dataclass(frozen=True)
class SweepTrial:
    """A measured trial.

    trial: its number. rung: from 0. fraction: of the budget.
    values: option -> value as it was given.
    metric: exact_match, agreement, reward or loss.
    score: by the metric, the loss negative; None for a run that failed, and `problem` says why.
    rows: held-out rows.
    """

    trial: int
    rung: int
    fraction: float
    values: dict[str, str]
    metric: str = ""
    score: float | None = None
    loss: float | None = None
    rows: int = 0
    updates: int = 0
    wall_s: float = 0.0
    problem: str = ""

    @property
    def rank(self) -> tuple[float, float]:
        """Sort key: higher is better; of equal scores the lower loss, where losses can be compared."""
        missing = -math.inf
        score = missing if self.score is None else self.score
        if any(_changes_loss(option) for option in self.values):
            return score, 0.0
        return score, missing if self.loss is None else -self.loss


@dataclass(frozen=True)
class Sweep:
    """Result of `sweep`: the winner's Adapter, all trials, and where the plot is."""

    adapter: Adapter
    trials: Sequence[SweepTrial]
    folder: Path

    @property
    def winner(self) -> SweepTrial:
        """The trial whose Adapter was kept."""
        last = max(trial.rung for trial in self.trials)
        return max((trial for trial in self.trials if trial.rung == last), key=lambda trial: trial.rank)

    @property
    def _measured_count(self) -> int:
        """Number of measurements among which the winner was chosen: those of failed trials are none."""
        return sum(trial.score is not None for trial in self.trials)

    def corrected_interval(self) -> tuple[float, float] | None:
        """Return the winner's interval, corrected for its choice; None for a loss.

        Clopper-Pearson at confidence 1 - 0.05 / K of K measured trials: the interval of each covers its true score
        with all others at 95 %, so it also does for the one that was chosen.
        """
        winner = self.winner
        if winner.metric != "exact_match" or winner.score is None:
            return None
        level = 1 - (1 - CONFIDENCE) / self._measured_count
        return statistics.interval(round(winner.score * winner.rows), winner.rows, level)

    def as_json(self) -> dict[str, Any]:
        """Return the command's JSON."""
        interval = self.corrected_interval()
        low, high = interval or (None, None)
        return {
            "adapter": str(self.adapter.path),
            "winner": {**asdict(self.winner), "low": low, "high": high, "chosen_among": self._measured_count},
            "trials": [asdict(trial) for trial in self.trials],
            "plot": str(self.folder / "sweep.png"),
        }

    def table(self) -> list[tuple[str, Any]]:
        """Return the trials as (label, text) lines for a reader."""
        cells = []
        for trial in sorted(self.trials, key=lambda trial: (-trial.rung, [-value for value in trial.rank])):
            score = trial.problem or f"{trial.score:.3f}"
            loss = "" if trial.loss is None else f"{trial.loss:.3f}"
            cells.append(
                {"budget": f"{trial.fraction:.0%}", **trial.values, trial.metric or "score": score, "loss": loss}
            )
        lines: list[tuple[str, Any]] = [("adapter", str(self.adapter.path)), ("trials", cells)]
        if interval := self.corrected_interval():
            lines.append(
                (
                    "winner",
                    f"{self.winner.score:.3f}, {interval[0]:.3f} to {interval[1]:.3f} "
                    f"(95 %, corrected for the choice among {self._measured_count} measurements)",
                )
            )
        return [*lines, ("plot", str(self.folder / "sweep.png"))]


def sweep(
    recipe: Recipe | Mapping[str, Any] | Path | str,
    grid: Mapping[str, Sequence[str]],
    out: Path | str,
    *,
    trials: int | None = None,
    factor: int = FACTOR,
    resume: bool = False,
    replace: bool = False,
    show: bool = True,
    notice: Notice = lambda line: None,
) -> Sweep:
    """Tune trials of a grid of recipe options by successive halving, and write the winner's Adapter to `out`.

    grid: dotted option -> values, as they would be given as flags: {"optimizer.learning_rate": ["1e-4", "5e-4"]}.
    trials: so many of the grid, drawn by the recipe's seed; all of them without it.
    factor: 1/factor of the trials go on, with `factor` times the budget.
    resume: go on with a sweep that was stopped or killed, within the trial that it was in. A finished one is returned.

    Raises ConfigError (recipe, grid, scores that cannot be compared, taken `out`, another sweep in its folder, nothing
    held out), ModelError if every trial failed, and what `tune` raises. Of its ModelError, ConfigError and BudgetError
    only those of an option that is not swept, as a verifier that hangs: a trial whose loss explodes, or whose values
    do not fit the base or the memory, is out of the race.
    """
    recipe, out = load_recipe(recipe), Path(out).absolute()
    chosen = _trials_of(recipe, grid, trials)
    if factor < 2:
        raise ConfigError(f"the factor is {factor}; it must be at least 2", "--halving 3")
    folder = out.with_name(f"{out.name}.sweep")
    sizes = _rung_sizes(len(chosen), factor)
    question = {"recipe": config.dump(recipe), "trials": chosen, "factor": factor}
    if out.exists() and not replace:
        if resume and (finished := _finished(out, folder, question, len(sizes) - 1)):
            notice(f"{out} is finished: nothing is left to do")
            return finished
        raise ConfigError(f"{out} exists", "--replace, or another --out")
    _check_comparable(recipe, chosen)
    planned = plan(recipe, notice=notice)
    for refusal in planned.refusals:
        raise ConfigError(f"the recipe is refused before any trial: {refusal.problem}", refusal.remedy)
    fractions = [factor ** (index - len(sizes) + 1) for index in range(len(sizes))]
    race = _Race(recipe, planned, folder, question, show=show, notice=notice)
    _check_budget(planned, race.budget, fractions[0], len(chosen))
    race.open(resume=resume, replace=replace)
    whole = sum(size * fraction for size, fraction in zip(sizes, fractions, strict=True))
    notice(
        f"{len(chosen)} trials in {len(sizes)} rungs: {whole:.2g} times the work of one run" + _time(planned, whole)
    )
    for line in _options_of_one_kind(recipe, grid):
        notice(line)
    racing = list(range(len(chosen)))
    for rung, (size, fraction) in enumerate(zip(sizes, fractions, strict=True)):
        racing = racing[:size]
        results = [race.measure(trial, rung, fraction, chosen[trial]) for trial in racing]
        if all(result.score is None for result in results):
            raise ModelError(
                f"all {len(results)} trials of rung {rung} failed: {results[0].problem}",
                f"other values of {' or '.join(grid)}, lower ones where losses exploded; then --replace",
            )
        racing = [result.trial for result in sorted(results, key=lambda result: result.rank, reverse=True)]
    plot_sweep(race.measured, folder / "sweep.png")
    with create_directory_atomic(out, replace=True) as copied:
        shutil.copytree(race.folder_of(len(sizes) - 1, racing[0]), copied, dirs_exist_ok=True)
    return Sweep(_adapter(out), race.measured, folder)


def parse_grid(sweeps: Sequence[str]) -> dict[str, list[str]]:
    """Return option -> values of texts such as `method.rank=8,16`; a value may be a list or a mapping in brackets.

    Raises ConfigError for a text of another form.
    """
    grid: dict[str, list[str]] = {}
    for text in sweeps:
        option, _, values = text.partition("=")
        if option in grid:
            raise ConfigError(
                f"--sweep names {option} twice",
                f"--sweep {option}={','.join(grid[option])},{values.strip()}",
            )
        grid[option] = [value.strip() for value in _split_values(values) if value.strip()]
        if not option or len(set(grid[option])) < 2:
            raise ConfigError(
                f"--sweep {text} does not name an option and at least two values of it",
                "--sweep optimizer.learning_rate=1e-4,5e-4",
            )
    return grid


def _split_values(text: str) -> list[str]:
    """Return the parts of a text between commas; one within brackets, or in a value that begins with a quote, is none.

    >>> _split_values("[a,[b,c]],'d,e',f")
    ['[a,[b,c]]', "'d,e'", 'f']
    """
    values, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and not values[-1].strip():
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        if letter == "," and not depth and not quote:
            values.append("")
        else:
            values[-1] += letter
    return values


class _Race:
    """Trials of one sweep, measured once each. `measured` holds those that are finished."""

    def __init__(
        self,
        recipe: Recipe,
        planned: TuningPlan,
        folder: Path,
        question: dict[str, Any],
        *,
        show: bool,
        notice: Notice,
    ) -> None:
        self.recipe, self.folder, self.question = recipe, folder, question
        self.show, self.notice = show, notice
        settings = planned.advice.settings
        self.budget = settings["budget"].value if recipe.budget == "auto" else config.dump(recipe.budget)
        self.measured: list[SweepTrial] = []

    @property
    def file(self) -> Path:
        """The journal."""
        return self.folder / "sweep.jsonl"

    def folder_of(self, rung: int, trial: int) -> Path:
        """Return where a trial's Adapter is."""
        return self.folder / f"{rung}-{trial}"

    def open(self, *, resume: bool, replace: bool) -> None:
        """Read the journal of an earlier call, or begin one. Raises ConfigError if it is of another sweep."""
        if replace and not resume:
            shutil.rmtree(self.folder, ignore_errors=True)
        lines = _LEDGER.read_lines(self.file)
        if lines and not resume:
            raise ConfigError(f"{self.folder} has a sweep", "--resume goes on with it, --replace starts over")
        if lines and not _is_same(lines[0]["question"], self.question):
            raise ConfigError(
                f"{self.folder} has the sweep of another recipe or grid",
                "--replace in place of --resume, or another --out",
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        if not lines:
            self._note({"question": self.question})
        self.measured = [SweepTrial(**line["trial"]) for line in lines[1:]]

    def measure(self, trial: int, rung: int, fraction: float, values: dict[str, str]) -> SweepTrial:
        """Return a trial's result, from the journal if it is there."""
        for result in self.measured:
            if (result.trial, result.rung) == (trial, rung) and (
                result.score is None or self.folder_of(rung, trial).is_dir()
            ):
                return result
        result = SweepTrial(trial, rung, fraction, values)
        settings = ", ".join(f"{key} {value}" for key, value in values.items())
        self.notice(f"rung {rung}, trial {trial}, with {fraction:.0%} of the budget: {settings}")
        try:
            trial_recipe = self._recipe_of(fraction, values)
            tuned = tune(trial_recipe, self.folder_of(rung, trial), resume=True, show=self.show, notice=self.notice)
        except (BusyError, DeadlineError):  # of an endpoint, and not of the trial's values
            raise
        except (ModelError, ConfigError, BudgetError) as error:
            if error.option and not any(_is_within(error.option, option) for option in values):
                raise  # every trial has it
            result = dataclasses.replace(result, problem=error.problem)
            self.notice(f"rung {rung}, trial {trial} is out: {error.problem}")
        else:
            result = _scored(result, tuned.adapter, _metric_of(trial_recipe.objective))
            self._record_look(trial_recipe, tuned.adapter)
        self._note({"trial": asdict(result)})
        self.measured.append(result)
        return result

    def _record_look(self, recipe: Recipe, adapter: Adapter) -> None:
        """Write a trial's measurement to the ledger of looks at its held-out rows, unless `tune` did.

        `tune` does where these rows choose the weights; the sweep chooses the trial by them in any case.
        """
        run = adapter.manifest["run"]
        if run.get("selection", {}).get("evaluations"):
            return
        rows = _encoded(recipe).held_out
        label = f"{adapter.id} after update {run['updates']}"
        evaluation_ledger.record_evaluation(label, [row.example_id for row in rows], "eval")

    def _recipe_of(self, fraction: float, values: Mapping[str, str]) -> Recipe:
        """Return the recipe of a trial: a part of each limit of the budget, and one measurement at the end."""
        limits = {name: limit * fraction for name, limit in self.budget.items() if limit is not None}
        whole = {name: max(round(limit), 1) for name, limit in limits.items() if name in ("updates", "tokens")}
        trial_recipe = _with_values(self.recipe, values)
        options = {**config.dump(trial_recipe), "budget": {**limits, **whole}, "evaluations": 1}
        weights = "best" if isinstance(trial_recipe.objective, Sft) else "last"
        return load_recipe({**options, "weights": weights})

    def _note(self, line: dict[str, Any]) -> None:
        _LEDGER.write_lines(self.file, [*_LEDGER.read_lines(self.file), {"schema": _LEDGER.schema, **line}])


def _with_values(recipe: Recipe, values: Mapping[str, str]) -> Recipe:
    """Return the recipe with a trial's values. Its weights are chosen by the trial's objective, so they are `auto`."""
    flags = [part for option, value in values.items() for part in (f"--{option}", value)]
    return load_recipe({**config.dump(recipe), "weights": "auto"}, flags)


def _options_of_one_kind(recipe: Recipe, grid: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yield what trials of another kind than the recipe's do not have: options that the recipe gives for its own."""
    for section in ("method", "objective"):
        own = getattr(recipe, section)
        others = [kind for kind in grid.get(f"{section}.kind", ()) if kind != own.kind]
        stated = [
            f"{section}.{field.name}"
            for field in dataclasses.fields(own)
            if field.default is not dataclasses.MISSING
            and field.name != "kind"
            and getattr(own, field.name) != field.default
            and f"{section}.{field.name}" not in grid
        ]
        if others and stated:
            yield (
                f"warning: trials of {', '.join(others)} have the defaults of their kind, and not the recipe's "
                f"{', '.join(stated)}. An option that all kinds have can be given to all: --sweep {stated[0]}=VALUE"
            )


def _trials_of(recipe: Recipe, grid: Mapping[str, Sequence[str]], trials: int | None) -> list[dict[str, str]]:
    """Return the values of each trial, after checking that the recipe takes all of them."""
    combined = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    if trials is not None:
        if trials < 2:
            raise ConfigError(f"{trials} trials cannot be compared", "--trials 9")
        if trials < len(combined):
            combined = random.Random(recipe.seed).sample(combined, trials)
    if not 2 <= len(combined) <= MOST_TRIALS:
        raise ConfigError(
            f"the sweep has {len(combined)} trials; between 2 and {MOST_TRIALS} can be compared",
            "--sweep optimizer.learning_rate=1e-4,5e-4" if len(combined) < 2 else "--trials 27 draws some of them",
        )
    fixed = {"budget", "evaluations", "weights", "data", "seed", "track", "trace"}
    for values in combined:
        for option in values:
            if option.partition(".")[0] in fixed and option != "data.rehearsal.fraction":
                raise ConfigError(
                    f"{option} cannot be swept: trials must have the same budget, rows and measure",
                    _OTHER_OPTION,
                )
    dumps = [config.dump(_with_values(recipe, values)) for values in combined]
    for index, dump in enumerate(dumps):
        if (first := dumps.index(dump)) < index:
            first_text, text = (", ".join(combined[place].values()) for place in (first, index))
            raise ConfigError(
                f"--sweep names one trial twice: {first_text} and {text} are the same", f"leave out {text}"
            )
    return combined


def _metric_of(objective: Objective) -> str:
    """Return the metric of an objective's trials; of sft `loss`, which the replies' exact match replaces if short."""
    if isinstance(objective, Grpo):
        return "reward"
    return "agreement" if isinstance(objective, (*PAIRED, Kto)) else "loss"


def _changes_loss(option: str) -> bool:
    """Return whether losses under two values of an option cannot be compared."""
    return option.partition(".")[0] == "objective" or option in ("base", "base.name", "base.text")


def _check_comparable(recipe: Recipe, trials: Sequence[Mapping[str, str]]) -> None:
    """Raise ConfigError if the scores of trials with these values could not be compared."""
    options = [option for option in trials[0] if _changes_loss(option)]
    if not options:
        return
    if verifiers := [option for option in options if option.startswith("objective.verifier")]:
        raise ConfigError(f"{verifiers[0]} cannot be swept: each verifier gives other rewards", _OTHER_OPTION)
    recipes = [_with_values(recipe, values) for values in trials]
    # kto judges single replies, and the objectives of pairs which of two is better
    measures = {"pairs" if isinstance(each.objective, PAIRED) else each.objective.kind for each in recipes}
    if len(measures) > 1:
        kinds = ", ".join(sorted({each.objective.kind for each in recipes}))
        raise ConfigError(
            f"trials of {kinds} cannot be compared: their scores are different measures",
            f"one --sweep of objective.kind among {', '.join(sorted(cls.kind for cls in PAIRED))}; "
            "or a run of each kind and sartor evaluate",
        )
    bases = {each.base.name: each for each in recipes}
    for each in bases.values():
        if _metric_of(each.objective) != "loss" or _is_matched(each):
            continue
        raise ConfigError(
            f"{options[0]} cannot be swept: the trials' score would be their loss, which it changes by itself",
            f"{_OTHER_OPTION}; or a run of each value and sartor evaluate",
        )


def _is_matched(recipe: Recipe) -> bool:
    """Return whether trials of a recipe are scored by the exact match of replies."""
    if not isinstance(recipe.objective, Sft):
        return False
    if recipe.base.towers:  # rows with media cannot be encoded without the towers
        return True
    return natural_metric(_encoded(recipe).held_out) == "exact_match"


def _encoded(recipe: Recipe) -> TokenizedDataset:
    """Return the rows of a recipe for a base without towers, as tokens."""
    chat = read_chat(locate_base(recipe.base.name, recipe.base.revision, recipe.base.licence))
    return encode_rows(open_artifact(recipe.data.path, "dataset"), recipe, chat)


def _rung_sizes(count: int, factor: int) -> list[int]:
    """Return the number of trials of each rung, down to one.

    >>> _rung_sizes(12, 3)
    [12, 4, 1]
    """
    sizes = [count]
    while sizes[-1] > 1:
        sizes.append(max(sizes[-1] // factor, 1))
    return sizes


def _check_budget(planned: TuningPlan, budget: Mapping[str, float | None], fraction: float, count: int) -> None:
    """Raise ConfigError if a trial of the first rung, with a fraction of the budget, makes too few updates."""
    updates = planned.counters.updates * fraction
    if updates < LEAST_UPDATES:
        limits = " and ".join(f"--budget.{name}" for name, limit in budget.items() if limit is not None)
        raise ConfigError(
            f"the first of the rungs for {count} trials would have {updates:.1f} of {planned.counters.updates} "
            f"updates; at least {LEAST_UPDATES} are needed",
            f"fewer values, a smaller --optimizer.batch_tokens, or a larger {limits}",
        )


def _time(planned: TuningPlan, runs: float) -> str:
    if planned.time_s is None:
        return ""
    minutes = planned.time_s * (runs / 60)
    return f", about {minutes.estimate:.0f} minutes ({minutes.low:.0f} to {minutes.high:.0f})"


def _is_within(option: str, other: str) -> bool:
    """Return whether one of two options is the other or a part of it."""
    return f"{option}.".startswith(f"{other}.") or f"{other}.".startswith(f"{option}.")


def _is_same(question: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether the question of a journal is that of a sweep, but for options on which no score depends."""
    old, new = dict(question), json.loads(json.dumps(other))
    before, after = old.pop("recipe"), new.pop("recipe")
    return old == new and not changed_options(before, after, _FREE_OPTIONS)


def _finished(out: Path, folder: Path, question: Mapping[str, Any], last_rung: int) -> Sweep | None:
    """Return the sweep whose winner is at `out`; None if it is not finished, or of another question."""
    lines = _LEDGER.read_lines(folder / "sweep.jsonl")
    if not lines or not _is_same(lines[0]["question"], question) or kind_of(out) != "adapter":
        return None
    trials = [SweepTrial(**line["trial"]) for line in lines[1:]]
    winners = [trial for trial in trials if trial.rung == last_rung and trial.score is not None]
    if not winners or kind_of(folder / f"{last_rung}-{winners[0].trial}") != "adapter":
        return None
    adapter = _adapter(out)
    is_winner = adapter.id == _adapter(folder / f"{last_rung}-{winners[0].trial}").id
    return Sweep(adapter, trials, folder) if is_winner else None


def _scored(trial: SweepTrial, adapter: Adapter, metric: str) -> SweepTrial:
    """Return the trial with the figures of its run.

    Raises ConfigError if nothing was held out, or no preference among what was.
    """
    run = adapter.manifest["run"]
    loss, selection = run["loss"].get("eval"), run.get("selection")
    if loss is None:
        raise ConfigError(
            "no row is held out, so trials cannot be compared", "--data.eval_fraction 0.1 and --data.eval_rows 64"
        )
    score, rows = -float(loss), 0
    if key := _LOGGED.get(metric):
        logged = [json.loads(line) for line in (adapter.path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        scores = [line[key] for line in logged if key in line]
        if not scores:
            raise ConfigError(
                "no held-out row has a preference, so trials cannot be compared",
                "sartor curate RECIPE --out DATASET with a larger --split.eval_fraction, or with more pairs; "
                "--data.eval_fraction 0.2 only if the Dataset itself holds out nothing",
            )
        score = float(scores[-1])
    if selection is not None:
        rows = selection["rows"]
        if selection["metric"] == "exact_match":
            metric, score = "exact_match", selection["evaluations"][-1]["score"]
    return dataclasses.replace(
        trial, metric=metric, score=score, loss=loss, rows=rows, updates=run["updates"], wall_s=run["wall_s"]
    )


def _adapter(out: Path) -> Adapter:
    adapter = open_artifact(out, "adapter")
    if not isinstance(adapter, Adapter):
        raise ArtifactError(f"{out} is no Adapter", f"rm -r {out}")
    return adapter


def plot_sweep(trials: Sequence[SweepTrial], file: Path) -> None:
    """Write the trials' scores over the fraction of the budget as PNG, the winner's line in colour."""
    from matplotlib.figure import Figure  # no pyplot: it keeps global state and wants a display

    last = max(trial.rung for trial in trials)
    winner = max((trial for trial in trials if trial.rung == last), key=lambda trial: trial.rank)
    figure = Figure(figsize=(7, 3.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    by_trial: dict[int, list[SweepTrial]] = {}
    for trial in trials:
        if trial.score is not None:
            by_trial.setdefault(trial.trial, []).append(trial)
    for number, results in by_trial.items():
        ordered = sorted(results, key=lambda trial: trial.rung)
        x = [trial.fraction for trial in ordered]
        y = [trial.score for trial in ordered if trial.score is not None]
        is_winner = number == winner.trial
        label = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in winner.values.items())
        axes.plot(
            x,
            y,
            "o-",
            color="#1f5f8b" if is_winner else "#b9c4d0",
            zorder=3 if is_winner else 2,
            label=label if is_winner else None,
        )
    axes.set_xscale("log")
    fractions = sorted({trial.fraction for trial in trials})
    axes.set_xticks(fractions, [f"{fraction:.0%}" for fraction in fractions])
    axes.minorticks_off()
    axes.set_xlabel("part of the budget")
    axes.set_ylabel(_LABELS.get(winner.metric, "negative loss, nats"))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file)
