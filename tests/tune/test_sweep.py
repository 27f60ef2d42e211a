"""`sartor tune --sweep`: successive halving, kills, what is counted, what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import sartor
from sample_data import write_jsonl
from sartor.core import evaluation_ledger
from sartor.core.artifacts import open_artifact
from sartor.core.errors import BudgetError, BusyError, ConfigError, ModelError, StoppedError, about_option
from sartor.tune import sweep as sweeping
from sartor.tune.auto_settings import Setting
from sartor.tune.plan import PlanAdvice, TuningPlan
from sartor.tune.recipe import Recipe
from sartor.tune.sweep import Sweep, SweepTrial, parse_grid, sweep
from sartor.tune.training_loop import Counters

BUDGET = {"budget": Setting({"updates": 16}, "")}
RATES = {"optimizer.learning_rate": ["1e-5", "1e-3", "1e-2", "3e-3"]}


@pytest.fixture
def recipe(tune_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Sixteen updates, a third of the rows held out; plots are not drawn."""
    monkeypatch.setattr("sartor.tune.trainer.plot_losses", lambda lines, file: file.touch())
    data = {**tune_recipe["data"], "eval_fraction": 0.33}
    return {**tune_recipe, "data": data, "budget": {"updates": 16}, "optimizer": {"batch_tokens": 128}}


class FakeTune:
    """Runs whose score is the learning rate. fails: rates whose loss explodes; stops_at: which call is interrupted."""

    def __init__(self, fails: tuple[float, ...] = (), stops_at: int = 0) -> None:
        self.fails, self.stops_at, self.calls = fails, stops_at, list[tuple[float, int]]()

    def __call__(self, recipe: Recipe, out: Path, **options: Any) -> Any:
        assert options["resume"] and recipe.budget != "auto" and recipe.optimizer.learning_rate != "auto"
        rate = recipe.optimizer.learning_rate
        self.calls.append((rate, recipe.budget.updates or 0))
        if len(self.calls) == self.stops_at:
            raise StoppedError("stopped by SIGTERM", "--resume")
        if rate in self.fails:
            raise ModelError("the loss is inf", "lower it")
        out.mkdir(exist_ok=True)
        (out / "rate").write_text(str(rate))
        selection = {"metric": "exact_match", "rows": 20, "evaluations": [{"score": min(10 * rate, 1.0)}]}
        run = {"loss": {"eval": 1 - rate}, "selection": selection, "updates": recipe.budget.updates, "wall_s": 1.0}
        return type("Tuned", (), {"adapter": type("Adapter", (), {"manifest": {"run": run}})})


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTune:
    tuned = FakeTune()
    monkeypatch.setattr(sweeping, "tune", tuned)
    monkeypatch.setattr(sweeping, "_adapter", lambda out: type("Adapter", (), {"path": out}))
    return tuned


def test_the_better_third_goes_on_with_three_times_the_budget(
    tmp_path: Path, recipe: dict[str, Any], fake: FakeTune
) -> None:
    rates = [f"{number}e-4" for number in range(1, 10)]
    recipe["budget"] = {"updates": 36}
    lines: list[str] = []
    result = sweep(recipe, {"optimizer.learning_rate": rates}, tmp_path / "a", notice=lines.append)
    budgets = [updates for _, updates in fake.calls]
    assert budgets == [4] * 9 + [12] * 3 + [36]
    assert sorted(rate for rate, updates in fake.calls if updates == 12) == [7e-4, 8e-4, 9e-4]
    assert result.winner.values == {"optimizer.learning_rate": "9e-4"} and result.winner.fraction == 1
    assert (tmp_path / "a" / "rate").read_text() == "0.0009"
    assert any(line.startswith("9 trials in 3 rungs: 3 times the work of one run") for line in lines)
    assert (tmp_path / "a.sweep" / "sweep.png").stat().st_size > 5_000
    cells = dict(result.table())["trials"]
    assert cells[0]["budget"] == "100%" and len(cells) == 13


def test_the_winner_s_interval_is_wider_than_that_of_a_single_run(
    tmp_path: Path, recipe: dict[str, Any], fake: FakeTune
) -> None:
    result = sweep(recipe, {"optimizer.learning_rate": ["0.05", "0.06", "0.07"]}, tmp_path / "a")
    said = result.as_json()["winner"]
    # 14 of 20 right: Clopper-Pearson has 0.457 to 0.881 at 95 %; of four measurements 98.75 % each
    assert said["chosen_among"] == 4 and said["score"] == pytest.approx(0.7)
    assert said["low"] == pytest.approx(0.38, abs=0.02) and said["high"] == pytest.approx(0.92, abs=0.02)
    assert "corrected for the choice among 4" in dict(result.table())["winner"]
    failed = dataclasses.replace(result.trials[0], score=None, problem="its loss is not finite")
    said = dataclasses.replace(result, trials=[*result.trials, failed])
    assert said.as_json()["winner"] == result.as_json()["winner"]  # a trial without a score was no choice


def test_a_killed_sweep_goes_on_where_it_was(
    tmp_path: Path, recipe: dict[str, Any], fake: FakeTune, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sweep(recipe, RATES, tmp_path / "whole", factor=2)
    first = FakeTune(stops_at=3)
    monkeypatch.setattr(sweeping, "tune", first)
    with pytest.raises(StoppedError):
        sweep(recipe, RATES, tmp_path / "a", factor=2)
    assert not (tmp_path / "a").exists()
    with pytest.raises(ConfigError, match="has a sweep") as error:
        sweep(recipe, RATES, tmp_path / "a", factor=2)
    assert "--resume" in error.value.remedy
    with pytest.raises(ConfigError, match="another recipe or grid") as error:
        sweep({**recipe, "seed": 7}, RATES, tmp_path / "a", factor=2, resume=True)
    assert error.value.remedy.startswith("--replace in place of --resume")
    second = FakeTune()
    monkeypatch.setattr(sweeping, "tune", second)
    resumed = sweep(recipe, RATES, tmp_path / "a", factor=2, resume=True)
    assert first.calls[:2] + second.calls == fake.calls
    assert [trial.score for trial in resumed.trials] == [trial.score for trial in whole.trials]


def test_a_trial_that_explodes_is_out_and_said(
    tmp_path: Path, recipe: dict[str, Any], fake: FakeTune, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeping, "tune", FakeTune(fails=(1e-2,)))
    result = sweep(recipe, RATES, tmp_path / "a", factor=2)
    assert result.winner.values["optimizer.learning_rate"] == "3e-3"
    (failed,) = [trial for trial in result.trials if trial.problem]
    assert failed.score is None and failed.problem == "the loss is inf"
    monkeypatch.setattr(sweeping, "tune", FakeTune(fails=(1e-5, 1e-3, 1e-2, 3e-3)))
    with pytest.raises(ModelError, match="all 4 trials of rung 0 failed"):
        sweep(recipe, RATES, tmp_path / "b", factor=2)


@pytest.mark.parametrize(
    ("grid", "options", "words"),
    [
        ({"method.rank": ["8"]}, {}, "the sweep has 1 trials"),
        ({"method.rank": [str(rank) for rank in range(1, 67)]}, {}, "the sweep has 66 trials"),
        ({"budget.updates": ["8", "9"]}, {}, "budget.updates cannot be swept"),
        ({"seed": ["1", "2"]}, {}, "seed cannot be swept"),
        ({"method.rank": ["8", "zero"]}, {}, "zero"),
        ({"method.rang": ["8", "9"]}, {}, "rang"),
        (RATES, {"factor": 1}, "the factor is 1"),
        (RATES, {"trials": 1}, "1 trials cannot be compared"),
        ({"method.rank": [str(rank) for rank in range(1, 30)]}, {}, "the first of the rungs for 29 trials"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    tmp_path: Path, recipe: dict[str, Any], grid: Any, options: Any, words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        sweep(recipe, grid, tmp_path / "a", **options)
    assert error.value.remedy
    assert not (tmp_path / "a.sweep" / "sweep.jsonl").exists()


PAIRS = [
    {"prompt": f"switch {place} {word}", "chosen": f"{word}:{place}", "rejected": f"{place}, {word}"}
    for word in ("on", "off", "up", "dim")
    for place in ("kitchen", "hall", "attic", "garage", "patio", "office", "cellar", "porch")
]


@pytest.fixture
def pairs(tmp_path: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe of dpo on pairs, a quarter of them held out."""
    source = {"path": str(write_jsonl(tmp_path / "pairs.jsonl", PAIRS)), "licence": "CC-BY-4.0"}
    sartor.curate({"sources": [source], "split": {"eval_fraction": 0.25}, "workers": 1}, tmp_path / "pairs")
    return {**recipe, "data": {"path": str(tmp_path / "pairs")}, "objective": {"kind": "dpo"}}


def test_preferences_are_compared_by_agreement(tmp_path: Path, pairs: dict[str, Any]) -> None:
    """The losses of two values of beta differ by beta itself. Each trial has the weights of its own objective."""
    result = sartor.sweep(pairs, {"objective.beta": ["0.01", "0.5"]}, tmp_path / "a", show=False)
    assert {trial.metric for trial in result.trials} == {"agreement"}
    lines = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    agreement = [line["eval_agreement"] for line in lines if "eval_agreement" in line]
    assert result.winner.score == agreement[-1] and result.corrected_interval() is None
    first = result.trials[0]
    assert first.rank == (first.score, 0.0)
    looks = evaluation_ledger.ledger_file().read_text(encoding="utf-8").splitlines()
    assert len(looks) == len(result.trials) and {len(json.loads(look)["rows"]) for look in looks} == {len(PAIRS) // 4}


def test_weights_are_chosen_by_each_trial_s_objective(
    tmp_path: Path, pairs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = []

    def refuses(recipe: Recipe, out: Path, **options: Any) -> Any:
        weights.append((recipe.objective.kind, recipe.weights))
        raise ModelError("the loss is inf", "lower it")

    monkeypatch.setattr(sweeping, "tune", refuses)
    asked = {**pairs, "objective": "sft"}
    with pytest.raises(ModelError, match="all 3 trials"):
        sweep(asked, {"objective.kind": ["orpo", "simpo", "dpo"]}, tmp_path / "a")
    assert weights == [("orpo", "last"), ("simpo", "last"), ("dpo", "last")]


@pytest.mark.parametrize(
    ("objective", "grid", "words"),
    [
        ({"kind": "sft"}, {"objective.kind": ["sft", "dpo"]}, "trials of dpo, sft cannot be compared"),
        ({"kind": "dpo"}, {"objective.kind": ["kto", "dpo"]}, "trials of dpo, kto cannot be compared"),
        ({"kind": "distil", "teacher": "base"}, {"objective.top_k": ["4", "8"]}, "objective.top_k cannot be swept"),
        (
            {"kind": "grpo", "verifier": {"kind": "json_fields"}},
            {"objective.verifier.kind": ["json_fields", "numeric"]},
            "objective.verifier.kind cannot be swept",
        ),
    ],
)
def test_scores_of_different_measures_are_refused(
    tmp_path: Path, recipe: dict[str, Any], objective: dict[str, Any], grid: Any, words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        sweep({**recipe, "objective": objective}, grid, tmp_path / "a")
    assert "--sweep" in error.value.remedy and not (tmp_path / "a.sweep").exists()


def test_bases_are_compared_by_replies_alone(
    tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, fake: FakeTune
) -> None:
    grid = {"base.name": [str(recipe["base"]), f"{recipe['base']}/."]}
    recipe["optimizer"]["learning_rate"] = 1e-3
    assert sweep(recipe, grid, tmp_path / "a").winner.metric == "exact_match"
    monkeypatch.setattr(sweeping, "natural_metric", lambda rows: "loss")
    with pytest.raises(ConfigError, match="base.name cannot be swept"):
        sweep(recipe, grid, tmp_path / "b")


def test_a_trial_that_is_refused_is_out(
    tmp_path: Path, recipe: dict[str, Any], fake: FakeTune, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values that do not fit the base or the memory; but a busy endpoint ends the sweep, which resumes there."""
    errors: dict[float, Exception] = {
        1e-5: ConfigError("method.block_size is 48", "--method.block_size 32"),
        1e-3: BudgetError("a micro-batch needs 9 GB", "--method.rank 4"),
    }

    def refuses(recipe: Recipe, out: Path, **options: Any) -> Any:
        if error := errors.get(float(recipe.optimizer.learning_rate)):
            raise error
        return fake(recipe, out, **options)

    monkeypatch.setattr(sweeping, "tune", refuses)
    result = sweep(recipe, RATES, tmp_path / "a", factor=2)
    problems = [trial.problem for trial in result.trials if trial.problem]
    assert problems == ["method.block_size is 48", "a micro-batch needs 9 GB"]
    errors[1e-5] = BusyError("the teacher is busy", "later")
    with pytest.raises(BusyError):
        sweep(recipe, RATES, tmp_path / "b", factor=2)


def test_what_every_trial_would_meet_ends_the_sweep_with_its_own_remedy(
    tmp_path: Path, recipe: dict[str, Any], fake: FakeTune, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a verifier that hangs; with more time for it the sweep goes on, and no trial is out."""
    asked = {**recipe, "objective": {"kind": "grpo", "verifier": {"kind": "python", "function": "m:f", "time_s": 1.0}}}
    hung = about_option(BudgetError("took more than 1 s", "--objective.verifier.time_s 2"), "objective.verifier")

    class Hanging(FakeTune):
        def __call__(self, recipe: Recipe, out: Path, **options: Any) -> Any:
            if len(self.calls) == 1:
                raise hung
            return super().__call__(recipe, out, **options)

    monkeypatch.setattr(sweeping, "_check_budget", lambda *arguments: None)
    monkeypatch.setattr(sweeping, "_LOGGED", {})  # these runs have no log
    monkeypatch.setattr(sweeping, "plan", lambda recipe, **options: TuningPlan(advice=PlanAdvice(settings=BUDGET)))
    monkeypatch.setattr(sweeping, "tune", Hanging())
    with pytest.raises(BudgetError, match="took more than 1 s") as error:
        sweep(asked, RATES, tmp_path / "a", factor=2)
    assert error.value.remedy == "--objective.verifier.time_s 2"
    asked["objective"]["verifier"]["time_s"] = 2.0
    second = FakeTune()
    monkeypatch.setattr(sweeping, "tune", second)
    result = sweep(asked, RATES, tmp_path / "a", factor=2, resume=True)
    assert len(second.calls) == 6 and not any(trial.problem for trial in result.trials)
    asked["objective"]["verifier"]["function"] = "m:g"
    with pytest.raises(ConfigError, match="exists"):
        sweep(asked, RATES, tmp_path / "a", factor=2, resume=True)


def test_a_swept_option_that_fails_is_out_of_the_race(
    tmp_path: Path, recipe: dict[str, Any], fake: FakeTune, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing(FakeTune):
        def __call__(self, recipe: Recipe, out: Path, **options: Any) -> Any:
            if recipe.optimizer.learning_rate == 1e-2:
                raise about_option(ConfigError("too high", "lower"), "optimizer.learning_rate")
            return super().__call__(recipe, out, **options)

    monkeypatch.setattr(sweeping, "tune", Refusing())
    result = sweep(recipe, RATES, tmp_path / "a", factor=2)
    assert [trial.problem for trial in result.trials if trial.problem] == ["too high"]


def test_options_that_trials_of_another_kind_lack_are_named(
    tmp_path: Path, recipe: dict[str, Any], fake: FakeTune
) -> None:
    lines: list[str] = []
    own = {**recipe, "method": {"kind": "lora", "rank": 8}, "optimizer": {"learning_rate": 1e-3}}
    sweep(own, {"method.kind": ["lora", "dora"]}, tmp_path / "a", notice=lines.append)
    (warning,) = [line for line in lines if line.startswith("warning: trials of dora")]
    assert "method.rank. " in warning and "--sweep method.rank=VALUE" in warning
    lines.clear()
    sweep(own, {"method.kind": ["lora", "dora"], "method.rank": ["8"]}, tmp_path / "b", notice=lines.append)
    assert not [line for line in lines if "trials of dora" in line]


def test_two_spellings_of_a_value_are_one_trial(tmp_path: Path, recipe: dict[str, Any], fake: FakeTune) -> None:
    with pytest.raises(ConfigError, match="1e-2 and 0.01 are the same"):
        sweep(recipe, {"optimizer.learning_rate": ["1e-2", "1e-3", "0.01"]}, tmp_path / "a")


def test_some_of_a_large_grid_are_drawn_by_the_seed(tmp_path: Path, recipe: dict[str, Any], fake: FakeTune) -> None:
    grid = {"method.rank": [str(rank) for rank in range(1, 10)], "optimizer.learning_rate": ["1e-3", "2e-3"]}
    drawn = [sweep(recipe, grid, tmp_path / name, trials=3).as_json()["trials"][:3] for name in "ab"]
    assert drawn[0] == drawn[1] and len({json.dumps(trial["values"]) for trial in drawn[0]}) == 3


def test_a_sweep_is_read_from_the_command_line() -> None:
    assert parse_grid(["method.rank=8, 16", "optimizer.epsilon=1e-8,1e-6"]) == {
        "method.rank": ["8", "16"],
        "optimizer.epsilon": ["1e-8", "1e-6"],
    }
    lists = "method.targets=[q_proj,v_proj],{modules: [q_proj, k_proj], layers: all},all-linear"
    assert parse_grid([lists])["method.targets"] == [
        "[q_proj,v_proj]",
        "{modules: [q_proj, k_proj], layers: all}",
        "all-linear",
    ]
    nested = "method.targets={layers: all, modules: [q_proj, k_proj]},all-linear,'a,b',[a,[b,c]]"
    assert parse_grid([nested])["method.targets"] == [
        "{layers: all, modules: [q_proj, k_proj]}",
        "all-linear",
        "'a,b'",
        "[a,[b,c]]",
    ]
    for text in ("method.rank", "method.rank=8", "method.rank=8,8", "=1,2"):
        with pytest.raises(ConfigError, match="does not name an option and at least two values"):
            parse_grid([text])
    with pytest.raises(ConfigError, match="names method.rank twice") as refused:
        parse_grid(["method.rank=8,16", "method.rank=32,64"])
    assert refused.value.remedy == "--sweep method.rank=8,16,32,64"


def test_without_rows_held_out_nothing_is_compared(tmp_path: Path, recipe: dict[str, Any]) -> None:
    recipe["data"] = {**recipe["data"], "eval_rows": 0}
    with pytest.raises(ConfigError, match="no row is held out") as error:
        sweep(recipe, {"method.rank": ["2", "4"]}, tmp_path / "a", show=False)
    assert error.value.remedy == "--data.eval_fraction 0.1 and --data.eval_rows 64"


def test_too_small_a_budget_names_its_own_limits() -> None:
    planned = TuningPlan(counters=Counters(updates=8))
    with pytest.raises(ConfigError, match="the first of the rungs") as error:
        sweeping._check_budget(planned, {"epochs": None, "tokens": 4000.0, "minutes": 1.0}, 0.1, 9)
    assert error.value.remedy.endswith("or a larger --budget.tokens and --budget.minutes")


def test_without_a_preference_held_out_more_pairs_are_curated(tmp_path: Path) -> None:
    """--data.eval_fraction does nothing where the Dataset itself holds rows out."""
    (tmp_path / "log.jsonl").write_text("{}\n")
    adapter: Any = SimpleNamespace(path=tmp_path, manifest={"run": {"loss": {"eval": 1.0}}})
    with pytest.raises(ConfigError, match="no held-out row has a preference") as error:
        sweeping._scored(SweepTrial(0, 0, 1.0, {}), adapter, "agreement")
    assert error.value.remedy.startswith("sartor curate RECIPE --out DATASET with a larger --split.eval_fraction")


def test_a_real_sweep_keeps_the_winner_and_each_trial_is_a_look(tmp_path: Path, recipe: dict[str, Any]) -> None:
    grid = {"optimizer.learning_rate": ["1e-5", "1e-2"]}
    result: Sweep = sartor.sweep(recipe, grid, tmp_path / "a", show=False)
    assert [trial.updates for trial in result.trials] == [5, 5, 16]
    assert all(isinstance(trial, SweepTrial) and trial.rows for trial in result.trials)
    adapter = open_artifact(tmp_path / "a", "adapter")
    assert adapter.manifest["recipe"]["optimizer"]["learning_rate"] == float(
        result.winner.values["optimizer.learning_rate"]
    )
    assert adapter.manifest["run"]["updates"] == 16
    assert evaluation_ledger.ledger_file().read_text(encoding="utf-8").count("after update") == 3
    again = sartor.sweep(recipe, grid, tmp_path / "a", show=False, resume=True, replace=True)
    assert again.as_json() == result.as_json()
    assert sartor.sweep(recipe, grid, tmp_path / "a", show=False, resume=True).as_json() == result.as_json()
    with pytest.raises(ConfigError, match="exists"):
        sartor.sweep({**recipe, "seed": 7}, grid, tmp_path / "a", show=False, resume=True)
