"""The form of a recipe: a field for each option of the schema, the same recipe back, each error beside its field."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import sartor
from sartor.core import config
from sartor.core.errors import ConfigError
from sartor.studio.option_schema import Control
from sartor.studio.recipe_form import (
    FilledForm,
    FormField,
    FormGroup,
    RecipeForm,
    check_recipe,
    recipe_yaml,
)

SOURCE = {"path": "rows.csv", "licence": "own"}


@pytest.fixture(scope="module")
def form() -> RecipeForm:
    return RecipeForm(sartor.schema("curate").schema)


def groups_of(filled: FilledForm) -> Iterator[FormGroup]:
    waiting = [*(group for groups in filled.lists.values() for group in groups), *filled.others]
    while waiting:
        group = waiting.pop()
        yield group
        waiting += group.nested


def fields_of(filled: FilledForm) -> dict[str, FormField]:
    return {field.name: field for group in groups_of(filled) for field in group.fields}


def posted(filled: FilledForm) -> dict[str, str]:
    """What a browser sends of a form."""
    sent = {name: field.value.replace("\n", "\r\n") for name, field in fields_of(filled).items()}
    return sent | {f"{group.name}.kind": group.kind for group in groups_of(filled) if group.kind}


def test_each_option_of_each_step_has_a_field(form: RecipeForm) -> None:
    kinds = form.step_kinds()
    filled = form.fill({"sources": [SOURCE], "steps": list(kinds)})
    shown = {name.partition(".")[2] for name in fields_of(filled) if name.startswith("steps")}
    options = [name for name, _, _ in sartor.options(sartor.CurateRecipe) if name.startswith("steps[].")]
    # what is below an option of a step is YAML
    declared = {name.removeprefix("steps[].").partition(".")[0].removesuffix("[]") for name in options}
    assert {name for name in declared if not name.startswith("kind")} == {name.partition(".")[0] for name in shown}
    assert {"exact_duplicates", "personal_data", "counterfactuals"} <= set(kinds) and all(kinds.values())


def test_fields_have_help_defaults_and_choices(form: RecipeForm) -> None:
    fields = fields_of(
        form.fill({"sources": [SOURCE], "steps": ["repair_text", {"length": {"max_words": 9}}, "rules"]})
    )
    assert fields["sources[0].path"].is_required and fields["sources[0].path"].value == "rows.csv"
    assert fields["sources[0].rehearsal"].choices == ["true", "false"]
    assert fields["sources[0].split"].choices == ["train", "eval"]
    assert fields["steps[0].normal_form"].choices[:2] == ["NFC", "NFKC"]
    assert fields["steps[0].normal_form"].default == "NFC" and fields["steps[0].normal_form"].value == ""
    assert (fields["steps[1].min_words"].default, fields["steps[1].max_words"].value) == ("1", "9")
    controls = {
        name: fields[name].control for name in ("seed", "split.eval_fraction", "sources[0].use", "steps[2].rules")
    }
    assert controls == {
        "seed": Control.NUMBER,
        "split.eval_fraction": Control.NUMBER,
        "sources[0].use": Control.CHOICES,
        "steps[2].rules": Control.YAML,
    }
    assert all(field.text for name, field in fields.items())


RECIPES: list[dict[str, Any]] = [
    {"sources": [SOURCE]},
    {"sources": [SOURCE, {"path": "b.jsonl", "licence": "MIT", "use": ["commercial", "research"], "rehearsal": True}]},
    {"sources": [{**SOURCE, "fields": {"prompt": "Frage", "completion": "Antwort"}, "system": "Be short.\nBe kind."}]},
    {
        "sources": [{**SOURCE, "inbox": {"most_rows": 5, "alpha": 0.02}}],
        "seed": 7,
        "max_row_bytes": 1000,
        "workers": 2,
    },
    {
        "sources": [SOURCE],
        "steps": [
            "repair_text",
            {"length": {"min_words": 3}},
            {"kind": "language", "allow": ["en", "de"]},
            {"rules": [{"match": "a: [b]\\d", "action": "replace", "with": "x"}, {"match": "'"}]},
            {"near_duplicates": {"threshold": 0.7}},
            "exact_duplicates",
        ],
        "split": {"eval_fraction": 0.25, "test_fraction": 0.1, "by": "prompt"},
    },
    {"sources": [SOURCE], "steps": []},
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_filled_form_says_the_same_recipe(form: RecipeForm, recipe: dict[str, Any]) -> None:
    given = {"steps": ["exact_duplicates"], **recipe}
    read = form.read(posted(form.fill(given)))
    assert sartor.load_curate_recipe(read) == sartor.load_curate_recipe(given)
    # and a third time, of what the first form said
    assert form.read(posted(form.fill(read))) == read


def test_whole_recipe_of_a_manifest_fits_the_form(form: RecipeForm) -> None:
    for recipe in RECIPES:
        whole = config.dump(sartor.load_curate_recipe(recipe))
        assert sartor.load_curate_recipe(form.read(posted(form.fill(whole)))) == sartor.load_curate_recipe(recipe)


@pytest.mark.parametrize(
    ("change", "option"),
    [
        ({"sources": [{"path": ""}, {**SOURCE, "split": "tset"}]}, "sources[1].split"),
        ({"sources": [{**SOURCE, "date": "yesterday"}]}, "sources[0].date"),
        ({"steps": [{"kind": "length", "min_words": "x"}]}, "steps[0].min_words"),
        ({"split": {"eval_fraction": 2}}, "split.eval_fraction"),
        ({"seed": "x"}, "seed"),
        ({"workers": -1}, "workers"),
    ],
)
def test_error_stands_beside_its_field(form: RecipeForm, change: dict[str, Any], option: str) -> None:
    recipe = {"sources": [SOURCE], **change}
    filled = form.fill(recipe, check_recipe(recipe))
    wrong = {name for name, field in fields_of(filled).items() if field.error}
    assert wrong == {option} and filled.problems == []


def test_several_errors_are_found_at_once(form: RecipeForm) -> None:
    recipe = {
        "sources": [{**SOURCE, "split": "tset", "licens": "x"}],
        "seed": "x",
        "split": {"by": "row", "eval_fraction": 2},
    }
    filled = form.fill(recipe, check_recipe(recipe))
    wrong = {name for name, field in fields_of(filled).items() if field.error}
    assert wrong == {"sources[0].split", "seed", "split.by", "split.eval_fraction"}
    assert [str(error.problem) for error in filled.problems] == [
        "there is no option 'sources[0].licens'; 'licence' was probably meant"
    ]


def test_unknown_step_is_named_at_the_step(form: RecipeForm) -> None:
    recipe = {"sources": [SOURCE], "steps": ["lenght"]}
    filled = form.fill(recipe, check_recipe(recipe))
    group = filled.lists["steps"][0]
    assert group.kind == "lenght" and group.error and group.error.remedy == "steps[0].kind: length"


def test_yaml_that_cannot_be_read_is_named(form: RecipeForm) -> None:
    with pytest.raises(ConfigError) as caught:
        form.read({"sources[0].path": "a", "steps[0].kind": "rules", "steps[0].rules": "[{match: "})
    assert caught.value.option == "steps[0].rules"


@pytest.mark.parametrize("value", [None, 5, "x", [], [[]], [{"kind": []}], {"a": {}}, [None, 5, {"path": {"a": 1}}]])
def test_any_value_makes_a_form(form: RecipeForm, value: Any) -> None:
    """A recipe as YAML may hold anything."""
    recipe = {"sources": value, "steps": value, "split": value, "seed": value}
    filled = form.fill(recipe, check_recipe(recipe))
    assert fields_of(filled) and check_recipe(recipe)
    form.read(posted(filled))


def test_yaml_reads_back() -> None:
    recipe = {"sources": [{**SOURCE, "system": "ä\n: #"}], "steps": [{"kind": "length", "min_words": 3}]}
    assert config.parse_yaml(recipe_yaml(recipe), "x") == recipe
