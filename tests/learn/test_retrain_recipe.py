"""The tuning recipe of a retrain: what it takes over of the live version's, and what is chosen by its own rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sartor.core import config
from sartor.core.lineage import ancestry
from sartor.learn import retrain
from sartor.tune import auto_settings
from sartor.tune.recipe import Recipe

AUTO = {"optimizer.batch_tokens": {"value": 4096, "reason": "the largest that leaves 64 updates"}}
# as a tuning with every default writes it
RECIPE = {
    "base": "tiny",
    "data": {"path": "own", "rehearsal": {"path": "asset:small-talk", "fraction": 0.25}},
    "optimizer": {"learning_rate": 1e-3, "batch_tokens": 4096},
    "budget": {"epochs": 3.0},
    "weights": "best",
    "evaluations": 4,
    "method": {"rank": 8},
}

Tuned = Callable[..., SimpleNamespace]


@pytest.fixture
def tuned(tmp_path: Path) -> Tuned:
    """Write the manifest of a tuned version: the settings that were `auto`, and the batch."""

    def write(name: str, settings: Mapping[str, Any] | None, batch_tokens: int = 4096) -> SimpleNamespace:
        recipe = {**RECIPE, "optimizer": {"learning_rate": 1e-3, "batch_tokens": batch_tokens}}
        (tmp_path / name).mkdir()
        fields = {"recipe": recipe} | ({} if settings is None else {"settings": settings})
        (tmp_path / name / "sartor.json").write_text(json.dumps(fields))
        return SimpleNamespace(path=tmp_path / name)

    return write


def recipe_of(
    monkeypatch: pytest.MonkeyPatch,
    live: SimpleNamespace,
    *,
    leg: str = "sft",
    tuning: Mapping[str, Any] | None = None,
    earlier: Mapping[str, SimpleNamespace] | None = None,
) -> dict[str, Any]:
    """Return the recipe of a leg. earlier: versions that the live one goes on from, by kind."""
    monkeypatch.setattr(retrain, "open_artifact", lambda path, kind: live)
    parents = earlier or {}
    monkeypatch.setattr(ancestry, "find_all", lambda artifact, kind: [parents[kind]] if kind in parents else [])
    record = SimpleNamespace(live=SimpleNamespace(release=live.path))
    job: Any = SimpleNamespace(run=SimpleNamespace(record=record), rules=SimpleNamespace(tuning=tuning), at=Path)
    return retrain.recipe_of(job, leg, live.path)


def test_batch_that_auto_chose_is_chosen_by_the_new_rows(tuned: Tuned, monkeypatch: pytest.MonkeyPatch) -> None:
    """15,000 tokens, read twice, made 8 updates of 4,096 tokens. All else is as the live version has it, or named."""
    recipe = recipe_of(monkeypatch, tuned("live", AUTO))
    assert recipe["optimizer"] == {"learning_rate": 1e-3 * retrain.GENTLE, "batch_tokens": "auto"}
    loaded, rehearsal = auto_settings.choose_rehearsal(config.load(Recipe, recipe), None, None)  # type: ignore[arg-type]
    assert rehearsal is None
    data: Any = SimpleNamespace(tokens=15_000)
    resolved, settings = auto_settings.resolve(loaded, data, None, rehearsal)  # type: ignore[arg-type]
    assert set(settings) == {"optimizer.batch_tokens"} and resolved.optimizer.batch_tokens == 256
    assert (resolved.weights, resolved.evaluations, resolved.data.rehearsal.path) == ("last", 4, "asset:small-talk")


def test_batch_of_a_person_stays(tuned: Tuned, monkeypatch: pytest.MonkeyPatch) -> None:
    for index, settings in enumerate(({}, None, {"budget": {"value": {"epochs": 3.0}, "reason": ""}})):
        assert recipe_of(monkeypatch, tuned(f"live-{index}", settings))["optimizer"]["batch_tokens"] == 4096
    named = {"optimizer": {"batch_tokens": 512}}
    assert recipe_of(monkeypatch, tuned("live", AUTO), tuning=named)["optimizer"]["batch_tokens"] == 512


def test_batch_of_ratings_stays(tuned: Tuned, monkeypatch: pytest.MonkeyPatch) -> None:
    """No rule was measured for it."""
    assert recipe_of(monkeypatch, tuned("live", AUTO), leg="kto")["optimizer"]["batch_tokens"] == 4096


def test_batch_that_a_version_took_over_is_chosen_anew(tuned: Tuned, monkeypatch: pytest.MonkeyPatch) -> None:
    """A retrain by ratings, or of an older Sartor, has the number of the first tuning, and no setting of it."""
    first = tuned("first", AUTO)
    later = recipe_of(monkeypatch, tuned("later", {}), earlier={"release": first})
    assert later["optimizer"]["batch_tokens"] == "auto"
    other = recipe_of(monkeypatch, tuned("other", {}, 1024), earlier={"release": first})
    assert other["optimizer"]["batch_tokens"] == 1024
