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
where replies are long.

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sartor.core import config, statistics
from sartor.core.artifacts import Adapter, open_artifact
from sartor.core.errors import ArtifactError, ConfigError, ModelError
from sartor.core.filesystem import create_directory_atomic
from sartor.core.line_ledger import LineLedger
from sartor.tune.plan import TuningPlan, plan
from sartor.tune.recipe import Recipe, Sft
from sartor.tune.recipe import load as load_recipe
from sartor.tune.trainer import tune

Notice = Callable[[str], object]
# More trials than anybody can wait for on one machine; --trials draws some of a larger grid
MOST_TRIALS = 64
FACTOR = 3
# With fewer updates a rung's scores say nothing of the whole run
LEAST_UPDATES = 4
CONFIDENCE = 0.95
_LEDGER = LineLedger("journal of a sweep", 1, lambda line: "question" in line or "trial" in line, "rm {file}")


@dataclass(frozen=True)
class SweepTrial:
    """A measured trial.

    trial: its number. rung: from 0. fraction: of the budget.
    values: option -> value as it was given.
    score: exact match, or the negative loss; None for a run that failed, and `problem` says why.
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
        """Sort key: higher is better; of equal scores the lower loss."""
        missing = -math.inf
        return (missing if self.score is None else self.score, missing if self.loss is None else -self.loss)


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

    def corrected_interval(self) -> tuple[float, float] | None:
        """Return the winner's interval, corrected for its choice; None for a loss.

        Clopper-Pearson at confidence 1 - 0.05 / K of K measured trials: the interval of each covers its true score
        with all others at 95 %, so it also does for the one that was chosen.
        """
        winner = self.winner
        if winner.metric != "exact_match" or winner.score is None:
            return None
        measured = sum(trial.score is not None for trial in self.trials)
        level = 1 - (1 - CONFIDENCE) / measured
        return statistics.interval(round(winner.score * winner.rows), winner.rows, level)

    def as_json(self) -> dict[str, Any]:
        """Return the command's JSON."""
        interval = self.corrected_interval()
        low, high = interval or (None, None)
        return {
            "adapter": str(self.adapter.path),
            "winner": {**asdict(self.winner), "low": low, "high": high, "chosen_among": len(self.trials)},
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
                    f"(95 %, corrected for the choice among {len(self.trials)} measurements)",
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
    resume: go on with a sweep that was stopped or killed, within the trial that it was in.

    Raises ConfigError (recipe, grid, taken `out`, another sweep in its folder, nothing held out), ModelError if every
    trial failed, and what `tune` raises but ModelError: a trial whose loss explodes is out of the race.
    """
    recipe, out = load_recipe(recipe), Path(out).absolute()
    chosen = _trials_of(recipe, grid, trials)
    if factor < 2:
        raise ConfigError(f"the factor is {factor}; it must be at least 2", "--halving 3")
    folder = out.with_name(f"{out.name}.sweep")
    if out.exists() and not replace:
        raise ConfigError(f"{out} exists", "--replace, or another --out")
    planned = plan(recipe, notice=notice)
    for refusal in planned.refusals:
        raise ConfigError(f"the recipe is refused before any trial: {refusal.problem}", refusal.remedy)
    sizes = _rung_sizes(len(chosen), factor)
    fractions = [factor ** (index - len(sizes) + 1) for index in range(len(sizes))]
    _check_budget(planned, fractions[0], len(chosen))
    question = {"recipe": config.dump(recipe), "trials": chosen, "factor": factor}
    race = _Race(recipe, planned, folder, question, show=show, notice=notice)
    race.open(resume=resume, replace=replace)
    whole = sum(size * fraction for size, fraction in zip(sizes, fractions, strict=True))
    notice(
        f"{len(chosen)} trials in {len(sizes)} rungs: {whole:.2g} times the work of one run" + _time(planned, whole)
    )
    racing = list(range(len(chosen)))
    for rung, (size, fraction) in enumerate(zip(sizes, fractions, strict=True)):
        racing = racing[:size]
        results = [race.measure(trial, rung, fraction, chosen[trial]) for trial in racing]
        if all(result.score is None for result in results):
            raise ModelError(
                f"all {len(results)} trials of rung {rung} failed: {results[0].problem}",
                f"lower values of {' or '.join(grid)}, then --replace",
            )
        racing = [result.trial for result in sorted(results, key=lambda result: result.rank, reverse=True)]
    plot_sweep(race.measured, folder / "sweep.png")
    with create_directory_atomic(out, replace=True) as copied:
        shutil.copytree(race.folder_of(len(sizes) - 1, racing[0]), copied, dirs_exist_ok=True)
    return Sweep(_adapter(out), race.measured, folder)


def parse_grid(sweeps: Sequence[str]) -> dict[str, list[str]]:
    """Return option -> values of texts such as `method.rank=8,16`. Raises ConfigError for a text of another form."""
    grid: dict[str, list[str]] = {}
    for text in sweeps:
        option, _, values = text.partition("=")
        grid[option] = [value.strip() for value in values.split(",") if value.strip()]
        if not option or len(set(grid[option])) < 2:
            raise ConfigError(
                f"--sweep {text} does not name an option and at least two values of it",
                "--sweep optimizer.learning_rate=1e-4,5e-4",
            )
    return grid


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
        if lines and lines[0]["question"] != json.loads(json.dumps(self.question)):
            raise ConfigError(f"{self.folder} has the sweep of another recipe or grid", "--replace, or another --out")
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
        self.notice(f"rung {rung}, trial {trial}: {', '.join(f'{key} {value}' for key, value in values.items())}")
        try:
            tuned = tune(
                self._recipe_of(fraction, values),
                self.folder_of(rung, trial),
                resume=True,
                show=self.show,
                notice=self.notice,
            )
            result = _scored(result, tuned.adapter.manifest["run"])
        except ModelError as error:
            result = SweepTrial(trial, rung, fraction, values, problem=error.problem)
        self._note({"trial": asdict(result)})
        self.measured.append(result)
        return result

    def _recipe_of(self, fraction: float, values: Mapping[str, str]) -> Recipe:
        """Return the recipe of a trial: a part of each limit of the budget, and one measurement at the end."""
        limits = {name: limit * fraction for name, limit in self.budget.items() if limit is not None}
        whole = {name: max(round(limit), 1) for name, limit in limits.items() if name in ("updates", "tokens")}
        weights = "best" if isinstance(self.recipe.objective, Sft) else "last"
        flags = [part for option, value in values.items() for part in (f"--{option}", value)]
        options = {**config.dump(self.recipe), "budget": {**limits, **whole}, "evaluations": 1, "weights": weights}
        return load_recipe(options, flags)

    def _note(self, line: dict[str, Any]) -> None:
        _LEDGER.write_lines(self.file, [*_LEDGER.read_lines(self.file), {"schema": _LEDGER.schema, **line}])


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
                    "--sweep optimizer.learning_rate=1e-4,5e-4",
                )
        load_recipe(recipe, [part for option, value in values.items() for part in (f"--{option}", value)])
    return combined


def _rung_sizes(count: int, factor: int) -> list[int]:
    """Return the number of trials of each rung, down to one.

    >>> _rung_sizes(12, 3)
    [12, 4, 1]
    """
    sizes = [count]
    while sizes[-1] > 1:
        sizes.append(max(sizes[-1] // factor, 1))
    return sizes


def _check_budget(planned: TuningPlan, fraction: float, count: int) -> None:
    updates = planned.counters.updates * fraction
    if updates < LEAST_UPDATES:
        raise ConfigError(
            f"the first of the rungs for {count} trials would have {updates:.1f} of {planned.counters.updates} "
            f"updates; at least {LEAST_UPDATES} are needed",
            "fewer values, a smaller --optimizer.batch_tokens, or a larger --budget.epochs",
        )


def _time(planned: TuningPlan, runs: float) -> str:
    if planned.time_s is None:
        return ""
    minutes = planned.time_s * (runs / 60)
    return f", about {minutes.estimate:.0f} minutes ({minutes.low:.0f} to {minutes.high:.0f})"


def _scored(trial: SweepTrial, run: Mapping[str, Any]) -> SweepTrial:
    """Return the trial with the figures of its run. Raises ConfigError if nothing was held out."""
    loss, selection = run["loss"].get("eval"), run.get("selection")
    if loss is None:
        raise ConfigError(
            "no row is held out, so trials cannot be compared", "--data.eval_fraction 0.1 and --data.eval_rows 64"
        )
    metric, score, rows = "loss", -float(loss), 0
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
    axes.set_ylabel("exact match of held-out rows" if winner.metric == "exact_match" else "negative loss, nats")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file)
