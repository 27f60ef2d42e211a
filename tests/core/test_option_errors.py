"""Each error of a recipe names the option that is wrong, so that a form can show it beside its field."""

from __future__ import annotations

from typing import Any

import pytest

import sartor
from sartor.core.config import parse_yaml
from sartor.core.errors import ConfigError

SOURCE = {"path": "rows.jsonl", "licence": "own"}


@pytest.mark.parametrize(
    ("recipe", "option"),
    [
        ({}, "sources"),
        ({"sources": []}, "sources"),
        ({"sources": [{"licence": "own"}]}, "sources[0].path"),
        ({"sources": [SOURCE, {**SOURCE, "path": 5}]}, "sources[1].path"),
        ({"sources": [{**SOURCE, "licens": "own"}]}, "sources[0].licens"),
        ({"sources": [{**SOURCE, "split": "tset"}]}, "sources[0].split"),
        ({"sources": [{**SOURCE, "date": "yesterday"}]}, "sources[0].date"),
        ({"sources": [{**SOURCE, "encoding": "cp9999"}]}, "sources[0].encoding"),
        ({"sources": [{**SOURCE, "inbox": {"most_rows": -1}}]}, "sources[0].inbox.most_rows"),
        ({"sources": [SOURCE], "workers": -1}, "workers"),
        ({"sources": [SOURCE], "seed": "x"}, "seed"),
        ({"sources": [SOURCE], "split": {"eval_fraction": 2}}, "split.eval_fraction"),
        ({"sources": [SOURCE], "split": {"by": "row"}}, "split.by"),
        ({"sources": [SOURCE], "steps": ["lenght"]}, "steps[0].kind"),
        ({"sources": [SOURCE], "steps": ["length", {"kind": "length", "min_words": "x"}]}, "steps[1].min_words"),
        (
            {"sources": [SOURCE], "steps": [{"kind": "rules", "rules": [{"action": "drop"}]}]},
            "steps[0].rules[0].match",
        ),
    ],
)
def test_error_names_its_option(recipe: dict[str, Any], option: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sartor.load_curate_recipe(recipe)
    assert caught.value.option == option, caught.value


def test_yaml_text_is_read_with_its_name_in_the_error() -> None:
    assert parse_yaml("seed: 3", "the recipe") == {"seed": 3}
    with pytest.raises(ConfigError, match=r"the recipe line 2, column \d+ is not YAML"):
        parse_yaml("seed: 3\n  x: [", "the recipe")
