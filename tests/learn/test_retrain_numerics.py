"""A retrain that was killed under another arithmetic measures its new version anew before it compares it with the live one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sartor.core.artifacts import write_artifact
from sartor.core.numerics import NUMERICS
from sartor.evaluate.evaluation import VersionScores
from sartor.learn import retrain


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the Report was to be replaced, each time that it was made."""
    found: list[bool] = []

    def measure(adapter: Path, *, out: Path, replace: bool, **_: Any) -> None:
        found.append(replace)
        report(out, replace=replace, dtype="bfloat16", numerics=NUMERICS["bfloat16"])

    monkeypatch.setattr(retrain, "measure", measure)
    monkeypatch.setattr(retrain, "compare_with_live", lambda *_: VersionScores("f1", []))
    monkeypatch.setattr(retrain, "write_beside", lambda *_: None)
    monkeypatch.setattr(retrain, "_liked", lambda *_: {"ratings": []})
    monkeypatch.setattr(retrain.look_ledger, "record_look", lambda *_: None)
    return found


def report(out: Path, *, replace: bool = False, **base: Any) -> None:
    facts: Mapping[str, Any] = {"base": base, "label": ""}
    write_artifact(out, "report", lambda part: facts, replace=replace)


def job(tmp_path: Path, notices: list[str]) -> Any:
    report(tmp_path / "live" / "report", dtype="bfloat16", numerics=NUMERICS["bfloat16"])
    work = SimpleNamespace(
        facts=lambda stage: {"adapter": "a"}, record=SimpleNamespace(live=SimpleNamespace(release=tmp_path / "live"))
    )
    rules = SimpleNamespace(gate=SimpleNamespace(rows=8))
    live = SimpleNamespace(manifest={"primary": "f1"})
    return SimpleNamespace(run=work, at=tmp_path.joinpath, live=lambda: live, rules=rules, notice=notices.append)


@pytest.mark.parametrize(
    ("base", "is_replaced"),
    [
        ({"dtype": "float32"}, False),
        ({"dtype": "bfloat16", "numerics": NUMERICS["bfloat16"]}, False),
        ({"dtype": "bfloat16"}, True),
        ({"dtype": "bfloat16", "numerics": NUMERICS["bfloat16"] + 1}, True),
    ],
)
def test_a_report_of_another_arithmetic_is_made_anew(
    base: dict[str, Any], is_replaced: bool, tmp_path: Path, measured: list[bool]
) -> None:
    report(tmp_path / "report", **base)
    notices: list[str] = []
    assert retrain.evaluate(job(tmp_path, notices))["metric"] == "f1"
    assert measured == ([True] if is_replaced else [])
    assert bool([line for line in notices if "measured anew: made by numerics" in line]) == is_replaced


def test_where_none_stands_it_is_made(tmp_path: Path, measured: list[bool]) -> None:
    retrain.evaluate(job(tmp_path, []))
    assert measured == [False]
