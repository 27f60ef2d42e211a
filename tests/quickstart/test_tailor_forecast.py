"""What tailor foresees: by --plan before anything is made, and of the stages to come when it goes on after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import sartor
from sartor.cli import main
from sartor.core.errors import ConfigError
from sartor.quickstart import tailor as verb
from sartor.tune.plan import TuningPlan

ROWS = "prompt,completion\n" + "".join(f"where is {number}?,on shelf {number % 3}\n" for number in range(40))


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("sartor.tune.auto_settings.UPDATES", 12)
    monkeypatch.setattr(verb, "_ASSETS", ("small-talk",))
    file = tmp_path / "rows.csv"
    file.write_text(ROWS)
    return file


def test_plan_says_time_and_memory_and_keeps_nothing(
    rows: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(rows.parent.iterdir())
    with pytest.raises(SystemExit) as ended:
        main(["tailor", str(rows), "--name", "faq", "--base", str(tiny_base), "--plan", "--json"])
    assert ended.value.code == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (said["kept"], said["dropped"], said["budget"]) == (40, {}, {})
    plan = said["plan"]
    assert plan["time_s"]["low"] <= plan["time_s"]["estimate"] <= plan["time_s"]["high"]
    assert plan["peak_memory_bytes"]["estimate"] > 1e6 and plan["updates"] > 0 and plan["refusals"] == []
    assert sorted(path for path in rows.parent.iterdir() if path.name != "sartor-home") == before


def test_plan_refuses_what_tailor_refuses(rows: Path, tiny_base: Path) -> None:
    with pytest.raises(ConfigError, match="too few"):
        sartor.plan_tailor(rows, name="faq", base=str(tiny_base), minutes=0.01)
    rows.write_text(ROWS.replace("prompt,completion", "Frage,Antwort"))
    with pytest.raises(ConfigError, match="Frage"):
        sartor.plan_tailor(rows, name="faq", base=str(tiny_base))


def forecast(folder: Path, **changes: Any) -> None:
    facts = {"time_s": {"estimate": 100.0}, "evaluation_s": {"estimate": 40.0}, "tokens": 80_000, **changes}
    (folder / "forecast.json").write_text(json.dumps(facts))


def test_stages_to_come_are_known_from_the_disk(tmp_path: Path) -> None:
    """Tuning and evaluation by the plan; forgetting by the tokens of its probes, at the pace of the tuning."""
    (tmp_path / "tune.yaml").write_text("base: starter\n")
    assert verb._stage_seconds(tmp_path) == {}
    forecast(tmp_path)
    assert verb._stage_seconds(tmp_path) == {"tune": 100.0, "evaluate": 30.0, "forgetting": pytest.approx(10.0)}
    (tmp_path / "tune.yaml").write_text("base: starter\nbudget: {minutes: 0.5}\n")
    forecast(tmp_path, evaluation_s=None)
    assert verb._stage_seconds(tmp_path) == {"tune": 30.0, "evaluate": 50.0, "forgetting": pytest.approx(10.0)}
    for damaged in ("", "[]", '{"time_s": null}'):
        (tmp_path / "forecast.json").write_text(damaged)
        assert verb._stage_seconds(tmp_path) == {}


def test_forecast_on_disk_is_the_plan(tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is written before the tuning begins, with the keys of `sartor plan --json`."""
    from sartor.tune.cost_model import Interval

    foreseen = TuningPlan(time_s=Interval(9.0, 8.0, 11.0))
    monkeypatch.setattr(verb, "plan", lambda recipe, notice: foreseen)
    job = verb._job(rows, name="faq", base="starter", fields={}, system="", licence="", test=None)
    with verb._planned(tmp_path, job, minutes=0.0, start_time=0.0, notice=lambda line: None):
        assert json.loads((tmp_path / "forecast.json").read_text()) == {"schema": 1, **foreseen.as_json()}
        assert (tmp_path / "tune.yaml").is_file()
