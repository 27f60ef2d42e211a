"""sartor doctor, init and show."""

from __future__ import annotations

import csv
import io
import json
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

import sartor
from sartor.cli import main
from sartor.core.artifacts import Artifact
from sartor.core.errors import ArtifactError, ConfigError
from sartor.core.installation import install_command
from sartor.quickstart import doctor as doctors
from sartor.quickstart import show as showing


def test_doctor_says_what_is_here_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    found = sartor.doctor().as_json()
    assert {"cpu", "bf16", "memory_bytes", "gpu", "compiler", "assets", "extras", "cache_bytes", "advice"} <= set(
        found
    )
    assert found["cpu"]["cores"] >= 1 and found["memory_bytes"] > 1 << 28 and found["extras"]["tune"]["installed"]
    monkeypatch.setattr(doctors, "missing_by_extra", lambda: {"tune": ["torch"], "serve": []})
    monkeypatch.setattr(doctors.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctors.importlib.util, "find_spec", lambda name: None)
    found = sartor.doctor().as_json()
    assert found["advice"][0].startswith(install_command("tune")) and "g++" in found["advice"][1]
    assert found["compiler"] is None and found["gpu"] is None


def test_doctor_of_a_broken_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with the library of another CUDA: it is what the doctor is asked about."""
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    found = sartor.doctor().as_json()
    assert found["gpu"] is None and any("cannot be imported" in line for line in found["advice"])


def test_doctor_knows_every_extra() -> None:
    assert {"tune", "serve", "office", "edge", "federated", "quant", "hub"} <= set(doctors.missing_by_extra())


def test_init_names_the_columns_of_a_table(tmp_path: Path) -> None:
    file = tmp_path / "faq.csv"
    file.write_bytes(
        b"Frage;Antwort\r\n" + b"".join(f"Wie öffne ich {n}?;So {n}.\r\n".encode("cp1252") for n in range(20))
    )
    made = sartor.init(file, out=tmp_path / "recipes")
    recipe = yaml.safe_load(made.curate.read_text())
    assert recipe["sources"][0]["fields"] == {"prompt": "Frage", "completion": "Antwort"}
    assert sartor.curate(made.curate, tmp_path / "data").kept == 20
    tuning = yaml.safe_load(made.tune.read_text())
    assert tuning == {"base": "starter", "data": "data/faq"} and sartor.load_recipe(made.tune)
    with pytest.raises(ConfigError, match="is there already"):
        sartor.init(file, out=tmp_path / "recipes")
    assert sartor.init(file, out=tmp_path / "recipes", replace=True) == made


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("rows.csv", ("No", "Yes")),
        ("null.csv", ("null", "1e5")),
        ("it's: a #file.csv", ("Frage\n(Kunde)", 'Antwort: "kurz", # ja')),
        ("Übung 1.csv", ("{Frage}", "- Antwort")),
        ("'.csv", ("\x80\u2028a", "~")),
    ],
)
def test_init_writes_yaml_of_any_name(name: str, columns: tuple[str, str], tmp_path: Path) -> None:
    text = io.StringIO()
    csv.writer(text, delimiter=";").writerows([columns, ("how", "so")])
    (tmp_path / name).write_text(text.getvalue(), encoding="utf-8")
    made = sartor.init(tmp_path / name, out=tmp_path)
    (source,) = yaml.safe_load(made.curate.read_text(encoding="utf-8"))["sources"]
    assert source["path"] == str(tmp_path / name)
    assert source["fields"] == dict(zip(("prompt", "completion"), (column.strip() for column in columns), strict=True))
    assert yaml.safe_load(made.tune.read_text(encoding="utf-8"))["data"].startswith("data/")


def test_init_quotes_its_commands_for_a_shell(rows_file: Path, tmp_path: Path) -> None:
    recipes = sartor.init(rows_file, out=tmp_path / "mein ordner")
    for recipe, verb in ((recipes.curate, "curate"), (recipes.tune, "tune")):
        line = next(line for line in recipe.read_text().splitlines() if f"sartor {verb} " in line and "--out" in line)
        assert shlex.split(line)[1:4] == ["sartor", verb, str(recipe)]


def test_init_of_a_known_form_leaves_columns_out(rows_file: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load(sartor.init(rows_file, out=tmp_path / "recipes").curate.read_text())
    assert "fields" not in recipe["sources"][0]


def test_show_a_dataset(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = sartor.show(dataset, rows=2).as_json()
    assert shown["kind"] == "dataset" and len(shown["rows"]) == 2
    assert [turn["learnt"] for turn in shown["rows"][0]["turns"]][-2:] == [False, True]
    assert sartor.show(dataset, rows=3, split="dropped").as_json()["rows"] == []
    with pytest.raises(SystemExit) as ended:
        main(["show", str(dataset), "-n", "1", "--json"])
    assert ended.value.code == 0 and len(json.loads(capsys.readouterr().out)["rows"]) == 1


def test_show_names_the_weight_of_a_turn(tmp_path: Path) -> None:
    user = {"role": "user", "content": "a"}
    replies = [{"role": "assistant", "content": text, "weight": weight} for text, weight in (("b", 0.5), ("c", 0))]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"messages": [user, reply]}) for reply in replies))
    recipe = {"sources": [{"path": str(tmp_path / "rows.jsonl")}], "split": {"eval_fraction": 0.0}}
    shown = sartor.show(sartor.curate(recipe, tmp_path / "d").dataset.path)
    assert [turn["learnt"] for row in shown.rows for turn in row["turns"]] == [False, True, False, False]
    console = Console(file=io.StringIO(), width=100)
    with console.capture() as capture:
        shown.draw(console)
    text = capture.get()
    assert "user: a" in text and "assistant (weight 0.5): b" in text and "assistant (weight 0): c" in text


def test_show_counts_the_files_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "letters"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text(f"Letter {name}.")
    sartor.curate({"sources": [{"path": str(folder)}], "split": {"eval_fraction": 0.0}}, tmp_path / "data")
    assert sartor.show(tmp_path / "data").as_json()["sources"] == [f"{folder} (utf-8, text): 2 files"]


@pytest.mark.parametrize(
    ("primary", "column", "worst_first"),
    [
        ("exact_match", "exact_match", ["b", "c", "a"]),
        ("wer", "wer", ["a", "c", "b"]),
        ("macro_f1", "accuracy", ["b", "c", "a"]),
    ],
)
def test_show_a_report_worst_rows_first(
    primary: str, column: str, worst_first: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error rate that rises is a loss; of a metric of the whole set the score of its rows is looked at."""
    scores = {"a": (0.0, 1.0), "b": (1.0, 0.0), "c": (0.5, 0.5)}
    table = [{"id": name, f"base_{column}": base, f"tuned_{column}": tuned} for name, (base, tuned) in scores.items()]
    monkeypatch.setattr(showing.parquet_io, "read_file", lambda file: iter(table))
    metric = {"base": 0.5, "tuned": 0.5, "low": -1.0, "high": 1.0}
    report = Artifact(
        tmp_path, {"kind": "report", "rows": 3, "groups": 3, "primary": primary, "metrics": {primary: metric}}
    )
    assert [row["id"] for row in showing._report(report, 3).rows] == worst_first


def test_show_an_adapter_and_what_is_none(adapter: Path, rows_file: Path) -> None:
    facts = sartor.show(adapter).as_json()
    assert facts["loss"]["first"] > 0 and set(facts["curve"]) <= set("▁▂▃▄▅▆▇█") and facts["rows"] == []
    with pytest.raises(ArtifactError):
        sartor.show(rows_file)
    with pytest.raises(ConfigError, match="0 or more"):
        sartor.show(adapter, rows=-1)
