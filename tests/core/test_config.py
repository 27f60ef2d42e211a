"""One declaration per option: YAML, flags and manifest say the same, and a typo names the option meant."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sartor.core import config
from sartor.core.errors import ConfigError
from sartor.curate.recipe import CurateRecipe
from sartor.curate.steps.text_duplicates import ExactDuplicates
from sartor.curate.steps.text_filters import Length
from sartor.tune.recipe import Recipe, StopCriteria

TUNE = {"base": "starter", "data": {"path": "d"}}
CURATE = {"sources": [{"path": "f.jsonl"}]}


def test_a_dumped_recipe_loads_back_equal() -> None:
    recipe = config.load(Recipe, TUNE, ["--method.rank", "8", "--method.targets", "[q_proj, v_proj]"])
    assert config.load(Recipe, config.dump(recipe)) == recipe
    assert recipe.method.targets.modules == ("q_proj", "v_proj")


def test_shorthands() -> None:
    recipe = config.load(
        CurateRecipe, {"sources": "f.jsonl", "steps": ["exact_duplicates", {"length": {"min_words": 3}}]}
    )
    assert recipe.sources[0].path == "f.jsonl"
    assert recipe.steps == (ExactDuplicates(), Length(min_words=3))
    assert config.load(Recipe, TUNE).base.name == "starter"


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        (["--optimizer.learning_rate", "1e-3"], 1e-3),
        (["--optimizer.learning-rate=0.5"], 0.5),
        (["--base.revision", "main"], "main"),
    ],
)
def test_flags_override(flags: list[str], value: object) -> None:
    recipe = config.load(Recipe, TUNE, flags)
    assert value in (recipe.optimizer.learning_rate, recipe.base.revision)


@pytest.mark.parametrize(
    ("cls", "data", "flags", "said", "meant"),
    [
        (Recipe, {**TUNE, "optimizer": {"learing_rate": 1}}, [], "'optimizer.learing_rate'", "learning_rate"),
        (Recipe, {**TUNE, "methd": {}}, [], "'methd'", "method"),
        (Recipe, TUNE, ["--data.max_lenght_tokens", "5"], "'data.max_lenght_tokens'", "max_length_tokens"),
        (Recipe, {"data": {"path": "d"}}, [], "'base' is missing", "base"),
        (Recipe, {**TUNE, "seed": "one"}, [], "seed is 'one'; it must be a whole number", "seed"),
        (Recipe, {**TUNE, "seed": True}, [], "seed is True", "seed"),
        (Recipe, {**TUNE, "method": {"kind": "lara"}}, [], "'lara'", "lora"),
        (Recipe, {**TUNE, "objective": {"sft": 5}}, [], "sft has no options, and 5 was given", "write sft alone"),
        (Recipe, {**TUNE, "method": {"rank": 0}}, [], "rank is 0; it must be at least 1", "rank: 1"),
        (Recipe, {**TUNE, "budget": {}}, [], "sets no limit", "epochs"),
        (Recipe, {**TUNE, "base": {"name": "starter", "bits": 5}}, [], "base.bits is 5", "bits"),
        (Recipe, TUNE, ["--method", "lorra"], "'lorra'", "--method.kind lora"),
        (Recipe, TUNE, ["--weights", "x"], "weights is 'x'", "weights: <"),
        (Recipe, TUNE, ["--method.rank", "0"], "rank is 0; it must be at least 1", "--method.rank 1"),
        (Recipe, TUNE, ["--seed", "one"], "seed is 'one'", "--seed <whole number>"),
        (Recipe, TUNE, ["--seed"], "--seed has no value", "--seed VALUE"),
        (Recipe, TUNE, ["seed", "1"], "'seed' stands where an option is expected", "--option"),
        (CurateRecipe, {**CURATE, "steps": ["exact_duplicate"]}, [], "exact_duplicate", "exact_duplicates"),
        (CurateRecipe, {**CURATE, "steps": [{"lenght": {}}]}, [], "lenght", "length"),
        (CurateRecipe, {"sources": []}, [], "names no source", "sources"),
        (CurateRecipe, {"sources": [{"path": "f", "licens": "MIT"}]}, [], "sources[0].licens", "licence"),
        (CurateRecipe, {**CURATE, "split": {"eval_fraction": 1.5}}, [], "split: eval_fraction is 1.5", "0.1"),
    ],
)
def test_a_wrong_option_names_itself_and_the_one_meant(
    cls: type, data: dict, flags: list[str], said: str, meant: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(cls, data, flags)
    assert said in caught.value.problem
    assert meant in caught.value.problem + caught.value.remedy


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base: [", "is not YAML"),
        ("- a\n- b\n", "holds a list"),
        ("", "holds nothing"),
        ("seed: 1\nseed: 2\n", "'seed' stands twice"),
        ("a: !!python/object/apply:os.system ['echo']\n", "is not YAML"),
    ],
)
def test_a_broken_file_is_a_clear_error(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said.replace("[", r"\[")):
        config.read_yaml(tmp_path / "r.yaml")


def test_yaml_reads_1e4_as_text_and_we_do_not(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("base: starter\ndata: {path: d}\noptimizer: {learning_rate: 2e-4}\n")
    assert config.load(Recipe, config.read_yaml(tmp_path / "r.yaml")).optimizer.learning_rate == 2e-4


@given(
    st.dictionaries(
        st.text(max_size=8),
        st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), st.lists, max_leaves=5),
        max_size=4,
    )
)
def test_no_mapping_ends_in_anything_but_a_config_error(data: dict) -> None:
    for cls in (Recipe, CurateRecipe):
        try:
            config.load(cls, data)
        except ConfigError as error:
            assert error.remedy


def test_every_option_has_a_help_text() -> None:
    for cls in (Recipe, CurateRecipe):
        lines = list(config.describe(cls))
        assert len(lines) > 5
        assert all(text for _, _, text in lines)


def test_flags_complete_a_file_that_is_not_whole() -> None:
    assert config.load(Recipe, {"base": "starter"}, ["--data.path", "d"]).data.path == "d"
    assert config.load(Recipe, TUNE, ["--budget.updates", "3"]).budget == StopCriteria(updates=3)


def test_a_remedy_can_be_typed_as_it_stands() -> None:
    with pytest.raises(ConfigError) as refused:
        config.load(Recipe, TUNE, ["--method.rnak", "8"])
    assert refused.value.remedy == "--method.rank VALUE"
    with pytest.raises(ConfigError) as refused:
        config.load(Recipe, TUNE, ["--methd.rank", "8"])
    assert refused.value.remedy == "--method VALUE"
    with pytest.raises(ConfigError) as refused:
        config.load(Recipe, {**TUNE, "method": {"rnak": 8}})
    assert refused.value.remedy == "method.rank: ..."
    with pytest.raises(ConfigError) as refused:
        config.load(Recipe, TUNE, ["--objective.kind", "sft", "--objective.beta", "0.3"])
    assert refused.value.remedy == "leave objective.beta out"


def test_a_flag_names_an_item_of_a_list_as_errors_do() -> None:
    data = {"sources": [{"path": "a.csv"}, {"path": "b.csv"}], "steps": ["length"]}
    flags = ["--sources[1].path", "c.csv", "--sources.0.licence", "MIT", "--steps[0]", "exact_duplicates"]
    recipe = config.load(CurateRecipe, data, flags)
    assert [(source.path, source.licence) for source in recipe.sources] == [("a.csv", "MIT"), ("c.csv", "NOASSERTION")]
    assert recipe.steps == (ExactDuplicates(),)
    assert data["sources"] == [{"path": "a.csv"}, {"path": "b.csv"}]  # the caller's own


@pytest.mark.parametrize(
    ("option", "problem", "remedy"),
    [
        ("sources[2].path", "sources[2].path is item 2 of 'sources', counted from 0; it has 1", "--sources '[...]'"),
        ("sources.path", "goes below the list 'sources'", "--sources.0.path '...'"),
        ("sources[x].path", "goes below the list 'sources'", "--sources.0"),
        ("steps[0].kind", "is an item of 'steps', which is not given", "--steps '[...]'"),
        ("sources[0].licence.name", "goes below 'sources[0].licence', which is 'MIT'", "--sources[0].licence '{...}'"),
        ("sources.0.licens", "no option 'sources[0].licens'", "--sources[0].licence VALUE"),
    ],
)
def test_a_flag_below_a_list_that_is_wrong_says_how_to_write_it(option: str, problem: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config.load(CurateRecipe, {"sources": [{"path": "a.csv", "licence": "MIT"}]}, [f"--{option}", "x"])
    assert problem in refused.value.problem and remedy in refused.value.remedy


def test_a_file_takes_dotted_keys_as_remedies_write_them() -> None:
    dotted = {
        **TUNE,
        "optimizer.batch_tokens": 256,
        "budget.epochs": 2,
        "objective.beta": 0.2,
        "objective.kind": "dpo",
    }
    nested = {**TUNE, "optimizer": {"batch_tokens": 256}, "budget": {"epochs": 2}, "objective": {"dpo": {"beta": 0.2}}}
    assert config.load(Recipe, dotted) == config.load(Recipe, nested)
    assert config.load(Recipe, dotted, ["--budget.epochs", "3"]).budget.epochs == 3
    sources = config.load(CurateRecipe, {"sources": [{"path": "a"}], "sources[0].licence": "MIT"}).sources
    assert sources[0].licence == "MIT"
    with pytest.raises(ConfigError, match="'method.rank' stands twice, also under 'method'"):
        config.load(Recipe, {**TUNE, "method": {"rank": 4}, "method.rank": 8})
    with pytest.raises(ConfigError) as refused:
        config.load(Recipe, {**TUNE, "method.rank.size": 8})
    assert refused.value.problem == "method.rank is {'size': 8}; it must be a whole number"


@pytest.mark.parametrize(
    ("name", "meant"),
    [("learning_rate", "optimizer.learning_rate"), ("epochs", "budget.epochs"), ("rank", "method.rank")],
)
def test_an_option_at_the_wrong_level_is_found(name: str, meant: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config.load(Recipe, {**TUNE, name: 1})
    assert refused.value.problem == f"there is no option {name!r}; {meant!r} was probably meant"
    assert refused.value.remedy == f"{meant}: ..."
    with pytest.raises(ConfigError) as refused:
        config.load(Recipe, TUNE, [f"--{name}", "1"])
    assert refused.value.remedy == f"--{meant} VALUE"


def test_a_flag_comes_before_those_below_it_wherever_it_stands() -> None:
    flags = ["--objective.verifier.kind", "regex", "--objective.verifier.pattern", "x", "--objective", "grpo"]
    recipe = config.load(Recipe, TUNE, flags)
    assert recipe.objective.kind == "grpo" and recipe.objective.verifier.pattern == "x"
