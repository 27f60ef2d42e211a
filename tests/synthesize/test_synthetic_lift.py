"""Tuning with and without synthetic rows on a tiny base: the same real held-out rows, a paired interval, what each run was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import sartor
from sartor import cli
from sartor.core.errors import SourceError
from sartor.core.parquet_io import read_examples

PLACES = ("kitchen", "hall", "attic", "garage", "patio", "office", "cellar", "porch", "den", "loft")


def write(folder: Path, name: str, words: tuple[str, ...], held_out: float) -> Path:
    rows = [
        {"prompt": f"switch {place} {word}", "completion": f"{word}:{place}"} for word in words for place in PLACES
    ]
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {"sources": [{"path": str(file), "licence": "CC0-1.0"}], "split": {"eval_fraction": held_out}}
    return Path(sartor.curate(recipe, folder / name).dataset.path)


@pytest.fixture
def recipe(tmp_path: Path, tiny_base: Path) -> Path:
    file = tmp_path / "tune.json"
    said = {
        "base": str(tiny_base),
        "data": {"path": "nowhere"},
        "method": {"rank": 4, "alpha": 8},
        "budget": {"updates": 2},
        "optimizer": {"learning_rate": 1e-3, "batch_tokens": 256},
    }
    file.write_text(json.dumps(said), encoding="utf-8")  # JSON is YAML
    return file


def test_the_gain_is_of_the_same_held_out_rows(tmp_path: Path, recipe: Path) -> None:
    real = write(tmp_path, "real", ("on", "off", "up"), 0.4)
    made = write(tmp_path, "made", ("down", "on"), 0.0)
    found = sartor.prove(made, real, recipe, tmp_path / "proof").as_json()
    held_out = list(read_examples(sartor.open(real), "eval"))
    both = list(read_examples(sartor.open(tmp_path / "proof" / "with")))
    assert found["rows"] == len(held_out)
    assert [row.id for row in both if row.split == "eval"] == [row.id for row in held_out]
    # what is held out or a training row already is not added again
    assert found["synthetic"] == 10 and found["left_out"] == 10
    assert found["gain"]["low"] <= found["gain"]["estimate"] <= found["gain"]["high"]
    assert found["gain"]["estimate"] == pytest.approx(found["with"] - found["without"])
    assert {name: run["updates"] for name, run in found["runs"].items()} == {"without": 2, "with": 2}
    assert sartor.open(tmp_path / "proof" / "with").manifest["parents"][1]["path"] == str(made)


def test_without_held_out_rows_there_is_no_proof(tmp_path: Path, recipe: Path) -> None:
    real = write(tmp_path, "real", ("on", "off"), 0.0)
    with pytest.raises(SourceError, match="holds out no row"):
        sartor.prove(real, real, recipe, tmp_path / "proof")


def test_the_commands_say_json_and_refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real, made = write(tmp_path, "real", ("on", "off", "up"), 0.7), write(tmp_path, "made", ("on", "off", "down"), 0.0)

    def said(*arguments: str) -> tuple[int, dict[str, object]]:
        with pytest.raises(SystemExit) as stopped:
            cli.main([*arguments, "--json"])
        return int(str(stopped.value.code)), json.loads(capsys.readouterr().out.splitlines()[-1])

    asked = ("validate", str(made), "--reality", str(real), "--encoder", "tfidf", "--permutations", "499")
    code, found = said(*asked)
    assert code == 0 and not found["passed"] and "copies_of_held_out" in found["failed"]  # type: ignore[operator]
    assert (made / "review.jsonl").is_file()
    code, found = said(*asked, "--out", str(tmp_path / "accepted"))
    assert code == 5 and found["error"]["kind"] == "GateError"  # type: ignore[index]
    code, found = said(*asked, "--prove", "tune.yaml")
    assert code == 2
    code, found = said("validate", str(made), "--reality", str(real), "--limits.colour", "1")
    assert code == 2 and "colour" in found["error"]["problem"]  # type: ignore[index]
    code, found = said("bias", str(real))
    assert code == 3 and "groups of people" in found["error"]["problem"]  # type: ignore[index]
