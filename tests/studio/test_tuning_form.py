"""The form of a recipe: every declared option, typed values, errors beside their fields."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import sartor
from sartor.studio.option_schema import Control
from sartor.studio.tuning_drafts import TuningDrafts
from sartor.studio.tuning_form import COMMON, check_form, default_values, recipe_fields


def checked(**changes: str) -> Any:
    values = {**default_values(), **{key.replace("__", "."): text for key, text in changes.items()}}
    return check_form(values, "data")


def test_each_declared_option_is_a_field() -> None:
    """Beside the Dataset, which the page itself asks for; what a person sets often is among them."""
    declared = {name for name, _, _ in sartor.options(sartor.Recipe) if ".kind" not in name}
    names = {field.name for field in recipe_fields()} | {"data.path"}
    assert declared - names == {"budget"}  # auto, or one of the limits below it
    assert set(COMMON) <= names and len({field.key for field in recipe_fields()}) == len(recipe_fields())
    assert all(field.text for field in recipe_fields())


def test_fields_know_their_controls() -> None:
    fields = {field.key: field for field in recipe_fields()}
    assert fields["optimizer.learning_rate"].control is Control.NUMBER
    assert fields["optimizer.learning_rate"].allows_auto and not fields["method.rank@lora"].allows_auto
    assert fields["objective"].choices[:3] == ("sft", "dpo", "kto") and fields["objective"].default == "sft"
    assert fields["objective.beta@kto"].kind == "kto" and fields["base.bits"].choices == (4, 8, 16, 32, "auto")
    assert fields["compute.share_prefixes"].choice_texts == ["true", "false"]
    assert (
        fields["base.use"].control is Control.CHOICES
        and fields["method.targets.modules@lora"].control is Control.LINES
    )
    units = {key: fields[key].unit for key in ("budget.minutes", "data.max_length_tokens", "compute.cache_gb", "seed")}
    assert units == {"budget.minutes": "min", "data.max_length_tokens": "tokens", "compute.cache_gb": "GB", "seed": ""}


def test_untouched_form_is_the_shortest_recipe() -> None:
    form = check_form(default_values(), "data")
    assert form.recipe == {"base": {"name": "starter"}} and form.errors == {}


def test_values_are_typed_and_load() -> None:
    form = checked(
        base__bits="8",
        base__use="commercial\nresearch",
        budget__epochs="2",
        optimizer__learning_rate="1e-4",
        **{"method.rank@lora": "8", "method.targets.modules@lora": "q_proj\r\nv_proj"},
        compute__share_prefixes="false",
        data__rehearsal="none",
        evaluations="3",
    )
    assert form.errors == {}
    assert form.recipe == {
        "base": {"name": "starter", "bits": 8, "use": ["commercial", "research"]},
        "data": {"rehearsal": "none"},
        "method": {"kind": "lora", "rank": 8, "targets": {"modules": ["q_proj", "v_proj"]}},
        "budget": {"epochs": 2},
        "optimizer": {"learning_rate": 1e-4},
        "compute": {"share_prefixes": False},
        "evaluations": 3,
    }
    recipe = sartor.load_recipe({**form.recipe, "data": {"path": "data", **form.recipe["data"]}})
    assert recipe.budget.epochs == 2.0 and recipe.method.targets.modules == ("q_proj", "v_proj")


def test_options_of_another_kind_do_not_count() -> None:
    form = check_form(
        {**default_values(), "objective": "dpo", "objective.beta@dpo": "0.2", "objective.beta@kto": "-1"}, "data"
    )
    assert form.errors == {} and form.recipe["objective"] == {"kind": "dpo", "beta": 0.2}


def test_options_of_a_kind_within_a_kind_load() -> None:
    """A verifier is an option of grpo and has kinds of its own."""
    values = {
        **default_values(),
        "objective": "grpo",
        "objective.group_size@grpo": "4",
        "objective.verifier@grpo": "regex",
        "objective.verifier.pattern@regex": "^on",
    }
    form = check_form(values, "data")
    assert form.errors == {}
    verifier = {"kind": "regex", "pattern": "^on"}
    assert form.recipe["objective"] == {"kind": "grpo", "group_size": 4, "verifier": verifier}
    unfinished = check_form({**values, "objective.verifier.pattern@regex": ""}, "data")
    running = check_form({**values, "objective.verifier@grpo": "unit_tests"}, "data")
    assert list(running.errors) == ["objective.verifier@grpo"]
    assert list(unfinished.errors) == [""] and "objective.verifier.pattern" in unfinished.errors[""].problem
    assert check_form({**values, "objective": "dpo"}, "data").recipe["objective"] == "dpo"


@pytest.mark.parametrize(
    ("key", "text", "problem"),
    [
        ("method.rank@lora", "0", "rank is 0; it must be at least 1"),
        ("method.rank@lora", "many", "must be a whole number"),
        ("optimizer.learning_rate", "fast", "must be auto | number"),
        ("budget.epochs", "-1", "epochs is -1"),
        ("base.name", "", "the base has no name"),
        ("base.bits", "7", "base.bits"),
        ("data.eval_fraction", "1.5", "below 1"),
        ("track.folder", "/etc", "below its own folder"),
        ("track.folder", "a/../../b", "below its own folder"),
        ("compute.recompute", "perhaps", "compute.recompute"),
    ],
)
def test_error_stands_beside_its_field(key: str, text: str, problem: str) -> None:
    """And no other field is blamed for it."""
    form = check_form({**default_values(), key: text}, "data")
    assert list(form.errors) == [key] and problem in form.errors[key].problem and form.errors[key].remedy


def test_several_errors_are_named_at_once() -> None:
    form = checked(
        **{"method.rank@lora": "0"}, budget__minutes="0", data__rehearsal="none", data__rehearsal__fraction="0.3"
    )
    assert set(form.errors) == {"method.rank@lora", "budget.minutes", "data.rehearsal.fraction"}


def test_error_of_several_fields_is_of_none() -> None:
    form = checked(objective="kto", weights="best")
    assert list(form.errors) == [""] and "kto" in form.errors[""].problem


def test_draft_is_a_recipe_that_the_command_reads(tmp_path: Path) -> None:
    drafts = TuningDrafts(tmp_path / "drafts", tmp_path)
    form = checked(**{"method.rank@lora": "8"}, data__rows="50")
    draft = drafts.save(default_values(), ["a", "b/data"], name="faq", recipe=form.recipe)
    recipe = sartor.load_recipe(drafts.recipe_file(draft, "b/data"))
    assert (recipe.data.path, recipe.data.rows, recipe.method.rank) == (str(tmp_path / "b/data"), 50, 8)
    assert list(yaml.safe_load(drafts.recipe_text(draft, "a"))) == ["base", "data", "method"]
    planned = drafts.with_plans(draft, {"a": "job"})
    again = drafts.save(default_values(), ["a", "b/data"], name="other", recipe=form.recipe)
    assert (again.id, again.plans) == (planned.id, {"a": "job"}) and drafts.load(draft.id).name == "other"
    assert all(file.stat().st_mode & 0o077 == 0 for file in (tmp_path / "drafts").rglob("*"))
