"""sartor.tailor with rows from Python, on the tiny base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas
import pytest
import yaml

import sartor
from release_fixtures import probe_rows
from sartor.core.errors import ConfigError, SourceError
from sartor.evaluate.audit import probes
from sartor.quickstart import tailor as verb

ROWS = [{"Frage": f"Wie öffne ich Konto {number}?", "Antwort": f"Über die App, {number % 3}."} for number in range(30)]
FIELDS = {"prompt": "Frage", "completion": "Antwort"}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few updates, no picture of the losses, and nothing is fetched."""
    monkeypatch.setattr("sartor.tune.auto_settings.UPDATES", 6)
    monkeypatch.setattr("sartor.tune.trainer.plot_losses", lambda lines, file: file.touch())
    monkeypatch.setattr(verb, "_ASSETS", ("small-talk",))
    monkeypatch.setattr(probes, "chitchat_rows", probe_rows)


def tailored(rows: Any, out: Path, base: Path, **options: Any) -> verb.Tailored:
    given = {"fields": FIELDS, "licence": "own", "show": False, **options}
    return sartor.tailor(rows=rows, name="konto", base=str(base), out=out, **given)


def test_frame_becomes_a_specialist_whose_recipe_runs_again(tmp_path: Path, tiny_base: Path, quick: None) -> None:
    steps: list[sartor.TrainingStep] = []
    made = tailored(pandas.DataFrame(ROWS), tmp_path / "konto", tiny_base, on_step=steps.append)
    assert len(steps) == made.adapter.manifest["run"]["updates"]
    assert made.dataset.manifest["counts"]["splits"] == {"train": 24, "eval": 6}
    assert repr(made).startswith("Tailored(dataset=Dataset(") and "<table>" in made._repr_html_()
    recipe = yaml.safe_load((tmp_path / "konto/curate.yaml").read_text())
    assert recipe["sources"][0]["path"] == str(tmp_path / "konto/rows/rows.jsonl")
    again = sartor.curate(tmp_path / "konto/curate.yaml", tmp_path / "again").dataset
    assert again.manifest["digest"] == made.dataset.manifest["digest"]
    second = tailored(ROWS, tmp_path / "konto", tiny_base)
    assert (second.adapter.id, second.report.id) == (made.adapter.id, made.report.id)
    with pytest.raises(ConfigError, match="was made of other rows"):
        tailored(ROWS[1:], tmp_path / "konto", tiny_base)
    assert len((tmp_path / "konto/rows/rows.jsonl").read_text().splitlines()) == 30


def test_parts_called_test_are_measured_on(tmp_path: Path, tiny_base: Path, quick: None) -> None:
    made = tailored({"train": ROWS[:20], "test": ROWS[20:]}, tmp_path / "konto", tiny_base)
    assert made.dataset.manifest["counts"]["splits"] == {"train": 20, "eval": 10}


def test_file_with_a_label_beside_its_text_is_asked_about(tmp_path: Path, tiny_base: Path, quick: None) -> None:
    """Once named, the columns are those of a file that is evaluated, too."""
    lines = [f"wie öffne ich konto {number}?,{'offen' if number % 2 else 'zu'}" for number in range(40)]
    (tmp_path / "a.csv").write_text("\n".join(["text,label", *lines[:30]]), encoding="utf-8")
    (tmp_path / "more.csv").write_text("\n".join(["text,label", *lines[30:]]), encoding="utf-8")
    given: dict[str, Any] = {"name": "konto", "base": str(tiny_base), "licence": "own", "out": tmp_path / "konto"}
    with pytest.raises(ConfigError, match="has a column 'label' beside `text`") as refused:
        sartor.tailor(tmp_path / "a.csv", **given)
    assert refused.value.remedy.startswith("--fields prompt=text,completion=label;")
    made = sartor.tailor(tmp_path / "a.csv", fields={"prompt": "text", "completion": "label"}, **given)
    measured = sartor.evaluate(made.adapter.path, data=tmp_path / "more.csv", out=tmp_path / "report")
    assert measured.report.manifest["rows"] == 10


def test_test_rows_that_are_the_training_rows_are_named(tmp_path: Path, tiny_base: Path) -> None:
    pandas.DataFrame(ROWS).to_csv(tmp_path / "a.csv", index=False)
    options: dict[str, Any] = {
        "fields": FIELDS,
        "licence": "own",
        "out": tmp_path / "konto",
        "test": tmp_path / "a.csv",
    }
    with pytest.raises(SourceError, match="is left to learn from .*exact_duplicate 30.*rows that are in .*a.csv too"):
        sartor.tailor(tmp_path / "a.csv", name="konto", base=str(tiny_base), **options)


def test_rows_where_they_do_not_belong_are_refused(tmp_path: Path, tiny_base: Path) -> None:
    out = tmp_path / "konto"
    with pytest.raises(ConfigError, match="data and rows are both given"):
        sartor.tailor("a.csv", rows=ROWS, name="konto", out=out)
    for rows in (ROWS, pandas.DataFrame(ROWS)):
        with pytest.raises(ConfigError, match="data names files, and rows are given"):
            sartor.tailor(rows, name="konto", out=out)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="all test rows"):
        tailored({"test": ROWS}, out, tiny_base)
    with pytest.raises(ConfigError, match="several sets of test rows"):
        tailored({"train": ROWS, "test": ROWS, "dev": ROWS}, out, tiny_base)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").touch()
    with pytest.raises(ConfigError, match="files that tailor has not made"):
        tailored(ROWS, tmp_path / "mine", tiny_base)
