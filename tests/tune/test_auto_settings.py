"""`auto` of rate, batch, budget and rehearsal: the rules, a run that takes them, a plan that warns, a resume that keeps them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import sartor
from killed_tuning import SETTINGS, WEIGHTS, killed, tune
from sample_data import write_jsonl
from sartor.core import config
from sartor.core.artifacts import read_manifest
from sartor.tune import auto_settings, plan_warnings
from sartor.tune.recipe import Recipe, Rehearsal, ResolvedRecipe, StopCriteria

RECIPE = {"base": "starter", "data": {"path": "d"}}


@pytest.mark.parametrize(
    ("tokens", "batch"),
    [
        (1_000, 256),
        (18_000, 256),
        (32_768, 512),
        (65_535, 512),
        (262_144, 1024),
        (2_047_999, 1024),
        (2_048_000, 2048),
        (10**8, 4096),
    ],
)
def test_batch_is_the_largest_that_leaves_64_updates_or_above_1024_a_thousand(tokens: int, batch: int) -> None:
    assert auto_settings.batch_tokens(tokens).value == batch


@pytest.mark.parametrize(("width", "rate"), [(64, 1e-3), (576, 1e-3), (2000, 5e-4), (4096, 2.9e-4)])
def test_rate_falls_with_the_width_and_is_bounded(width: int, rate: float) -> None:
    assert auto_settings.learning_rate(width).value == rate


@pytest.mark.parametrize(
    ("row_tokens", "batch", "wanted", "epochs"),
    [
        ([45] * 400, 256, 300, 5),
        ([150] * 400, 512, 200, 2),
        ([45] * 100, 256, 300, 10),
        ([45] * 40_000, 4096, 300, 2),
        ([45] * 40_000, 1024, 300, 1),
        ([90] * 300, 256, 700, 8),
    ],
)
def test_budget_is_epochs_until_there_are_enough_updates(
    row_tokens: list[int], batch: int, wanted: int, epochs: int
) -> None:
    setting = auto_settings.budget(row_tokens, batch, wanted)
    assert setting.value == StopCriteria(epochs=epochs)


def test_auto_is_the_default_and_a_flag_goes_below_it() -> None:
    recipe = config.load(Recipe, RECIPE)
    assert (recipe.budget, recipe.optimizer.learning_rate, recipe.data.rehearsal) == ("auto", "auto", "auto")
    flags = ["--budget.epochs", "3", "--data.rehearsal", "none"]
    changed = config.load(Recipe, {**RECIPE, "budget": "auto"}, flags)
    assert (changed.budget, changed.data.rehearsal) == (StopCriteria(epochs=3.0), "none")
    assert config.load(Recipe, RECIPE, ["--data.rehearsal", "rows"]).data.rehearsal == Rehearsal("rows")


def test_resolved_recipe_has_numbers_by_default() -> None:
    recipe = config.load(ResolvedRecipe, RECIPE)
    assert (recipe.budget.epochs, recipe.optimizer.learning_rate, recipe.optimizer.batch_tokens) == (1, 2e-4, 4096)
    assert recipe.data.rehearsal.path == ""


def auto_recipe(tune_recipe: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**{name: tune_recipe[name] for name in ("base", "data", "method")}, "budget": {"updates": 2}, **changes}


def test_settings_are_planned_and_saved_with_reasons(tmp_path: Path, tune_recipe: dict[str, Any]) -> None:
    recipe, notices = auto_recipe(tune_recipe), []
    plan = sartor.plan(recipe).as_json()
    manifest = tune(recipe, tmp_path / "a", notice=notices.append).adapter.manifest
    assert manifest["settings"] == plan["settings"]
    assert sorted(manifest["settings"]) == [
        "data.rehearsal",
        "evaluations",
        "optimizer.batch_tokens",
        "optimizer.learning_rate",
        "weights",
    ]
    assert manifest["recipe"]["weights"] == "best" and len(manifest["run"]["selection"]["evaluations"]) == 2
    assert (
        manifest["recipe"]["optimizer"] | {"learning_rate": 1e-3, "batch_tokens": 256}
        == manifest["recipe"]["optimizer"]
    )
    assert any(line.startswith("optimizer.batch_tokens auto: 256 (") for line in notices)
    assert manifest["parents"][1]["role"] == "rehearsal"
    assert manifest["recipe"]["data"]["rehearsal"] == {
        "path": "asset:general-text",
        "fraction": 0.2,
        "loss": "kl",
        "weight": 1.0,
    }
    assert [warning["reason"] for warning in plan["warnings"]] == [plan_warnings.FEW_UPDATES]
    assert "--budget.updates 50" in plan["warnings"][0]["remedy"]
    assert manifest["run"]["warnings"] == plan["warnings"]
    assert f"warning: {plan['warnings'][0]['problem']}; {plan['warnings'][0]['remedy']}" in notices


def test_an_objective_that_is_not_measured_has_the_old_numbers(tmp_path: Path, tune_recipe: dict[str, Any]) -> None:
    rows = [{"prompt": f"say {n}", "completion": f"{n}", "rating": 1.0} for n in range(12)]
    file = write_jsonl(tmp_path / "rated.jsonl", rows)
    sartor.curate({"sources": [{"path": str(file), "licence": "CC0-1.0"}]}, tmp_path / "rated")
    recipe = auto_recipe(tune_recipe, data={"path": str(tmp_path / "rated")}, objective={"kind": "kto"}, budget="auto")
    settings = sartor.plan(recipe).as_json()["settings"]
    values = {name: setting["value"] for name, setting in settings.items()}
    assert values["optimizer.learning_rate"] == 2e-4 and values["optimizer.batch_tokens"] == 4096
    assert values["budget"] == {"epochs": 1.0} and values["data.rehearsal"]["path"] == ""


def test_a_resumed_run_keeps_the_values_that_it_began_with(
    tmp_path: Path, tune_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version of the rules chooses otherwise; the run that goes on does not."""
    recipe = auto_recipe(tune_recipe, checkpoints={"every_minutes": 0})
    tune(recipe, tmp_path / "whole")
    killed(monkeypatch, recipe, tmp_path / "a", update=2)
    monkeypatch.setattr(auto_settings, "SMALLEST_BATCH", 64)
    monkeypatch.setattr(auto_settings, "MAX_RATE", 1e-4)
    monkeypatch.setattr(auto_settings, "GENERAL_TEXT", "")
    tune(recipe, tmp_path / "a", resume=True)
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    assert read_manifest(tmp_path / "a")["settings"] == read_manifest(tmp_path / "whole")["settings"]


def test_of_an_older_run_the_numbers_are_taken_over() -> None:
    old = auto_settings.EarlierRun(
        {"optimizer": {"batch_tokens": 4096}, "budget": {"epochs": 1.0}, "data": {"path": "d"}}
    )
    assert [
        setting and setting.value
        for setting in map(old.setting, (auto_settings.BATCH_TOKENS, auto_settings.REHEARSAL))
    ] == [
        4096,
        None,
    ]
    choices = map(old.setting, (auto_settings.WEIGHTS, auto_settings.EVALUATIONS))
    assert [choice and choice.value for choice in choices] == ["last", 2]
    named = auto_settings.EarlierRun({"optimizer": {"batch_tokens": 4096}, "weights": "best"}, {})
    assert named.setting(auto_settings.WEIGHTS) is None
    assert named.setting(auto_settings.BATCH_TOKENS) is None


def test_warnings_change_no_weight_and_survive_a_kill(
    tmp_path: Path, tune_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pass through the base moves no generator (dropout is on); a resumed run repeats it not, and warns the same."""
    recipe = {**tune_recipe, **SETTINGS, "budget": {"updates": 3}}
    tune(recipe, tmp_path / "english")
    monkeypatch.setattr(plan_warnings, "_foreign_languages", lambda pieces: (["de"], list(pieces)))
    monkeypatch.setattr(plan_warnings, "UNKNOWN_RATIO", 0.1)
    whole = tune(recipe, tmp_path / "whole").adapter.manifest["run"]["warnings"]
    assert [warning["reason"] for warning in whole] == [plan_warnings.FEW_UPDATES, plan_warnings.LANGUAGE]
    killed(monkeypatch, recipe, tmp_path / "a", update=2)
    monkeypatch.setattr(plan_warnings, "run_warnings", None)  # a call would raise
    notices: list[str] = []
    resumed = tune(recipe, tmp_path / "a", resume=True, notice=notices.append)
    assert resumed.adapter.manifest["run"]["warnings"] == whole
    assert sum(line.startswith("warning: ") for line in notices) == 2
    weights = {name: (tmp_path / name / WEIGHTS).read_bytes() for name in ("english", "whole", "a")}
    assert len(set(weights.values())) == 1


@pytest.mark.parametrize("part", ["rows", "replies"])
@pytest.mark.parametrize(
    ("languages", "ratio", "count"), [(["de"], 1.9, 1), (["de", "sv"], 1.9, 1), (["de"], 1.2, 0), ([], 1.9, 0)]
)
def test_language_is_warned_of_where_the_base_does_not_know_it(
    monkeypatch: pytest.MonkeyPatch, part: str, languages: list[str], ratio: float, count: int
) -> None:
    texts = {"rows": ["rows"], "replies": []} | {part: ["asked"]}
    monkeypatch.setattr(plan_warnings, "_texts", lambda dataset: texts)
    monkeypatch.setattr(
        plan_warnings,
        "_foreign_languages",
        lambda pieces: (languages if pieces == ["asked"] else [], list(pieces)),
    )
    monkeypatch.setattr(plan_warnings, "_nats_per_letter", lambda pieces, *_: ratio if pieces == ["asked"] else 1.0)
    anything: Any = None
    found = list(plan_warnings.unknown_language(anything, anything, anything))
    assert len(found) == count and all(f"the {part}' language" in warning.problem for warning in found)


def test_best_weights_without_held_out_rows_are_said_to_be_the_last(
    tune_recipe: dict[str, Any], tmp_path: Path
) -> None:
    notices: list[str] = []
    data = {**tune_recipe["data"], "eval_rows": 0}
    tune({**tune_recipe, "data": data, "weights": "best"}, tmp_path / "a", notice=notices.append)
    assert any("no row is held out: the last weights are kept" in notice for notice in notices)


def test_losses_of_a_run_are_those_of_its_own_rows(tmp_path: Path, tune_recipe: dict[str, Any]) -> None:
    """The loss of rehearsal by `kl` begins at 0: the mean of both would rise while each falls."""
    talk = [{"prompt": f"talk about the weather {n}", "completion": f"it is fine {n}"} for n in range(30)]
    file = write_jsonl(tmp_path / "talk.jsonl", talk)
    sartor.curate({"sources": [{"path": str(file), "licence": "CC0-1.0"}]}, tmp_path / "talk")
    data = {**tune_recipe["data"], "rehearsal": {"path": str(tmp_path / "talk"), "fraction": 0.5, "loss": "kl"}}
    made = tune({**tune_recipe, "data": data, "budget": {"updates": 6}}, tmp_path / "a")
    lines = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    updates = [line for line in lines if "loss" in line]
    assert all(line["own_loss"] > line["loss"] for line in updates), "of which a part begins near 0"
    loss = made.adapter.manifest["run"]["loss"]
    assert (loss["first"], loss["last"]) == (updates[0]["own_loss"], updates[-1]["own_loss"])


@pytest.mark.parametrize(("reply", "wanted"), [("yes", 300), ("a long reply " * 40, 200)])
def test_long_replies_get_fewer_updates(tmp_path: Path, tune_recipe: dict[str, Any], reply: str, wanted: int) -> None:
    rows = [{"prompt": f"say {n}", "completion": f"{reply} {n}"} for n in range(12)]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    sartor.curate({"sources": [{"path": str(file), "licence": "CC0-1.0"}]}, tmp_path / "rows")
    recipe = auto_recipe(tune_recipe, data={"path": str(tmp_path / "rows")}, budget="auto")
    settings = sartor.plan(recipe).as_json()["settings"]
    assert f"; {wanted} are wanted" in settings["budget"]["reason"]


def test_of_documents_the_weights_of_least_loss_are_kept(tmp_path: Path, tune_recipe: dict[str, Any]) -> None:
    """Texts that a tuning at a high rate learns by heart, and held-out ones of other words."""
    sources = []
    for split, text in (("train", "the sky is blue " * 8), ("eval", '{"area": "kitchen", "place": %d} ' * 4)):
        rows = [{"text": text.replace("%d", str(number)), "group": f"{split}-{number}"} for number in range(12)]
        file = write_jsonl(tmp_path / f"{split}.jsonl", rows)
        sources.append({"path": str(file), "licence": "MIT", "split": split})
    sartor.curate({"sources": sources, "steps": []}, tmp_path / "pages")
    recipe = {
        "base": tune_recipe["base"],
        "data": {"path": str(tmp_path / "pages"), "rehearsal": "none"},
        "optimizer": {"learning_rate": 0.05},
        "budget": {"updates": 12},
    }
    manifest = tune(recipe, tmp_path / "a").adapter.manifest
    assert manifest["settings"]["weights"] == {
        "value": "best",
        "reason": "an earlier evaluation's if better beyond chance, by the loss of 12 held-out documents",
    }
    selection, losses = (
        manifest["run"]["selection"],
        [item["loss"] for item in manifest["run"]["selection"]["evaluations"]],
    )
    assert selection["metric"] == "loss" and len(losses) == 4
    assert manifest["run"]["loss"]["eval"] == min(losses) < losses[-1]
    assert selection["reason"].startswith("better beyond chance")
