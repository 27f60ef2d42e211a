"""sartor inspect --summary: the EU AI Office's public summary of training content, as far as the lineage knows it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import sartor
from sartor.cli import main
from sartor.core.errors import ArtifactError
from sartor.core.lineage.training_summary import TO_STATE

SECTIONS = (
    "## 1. General information",
    "### 1.1 Provider",
    "### 1.2 Model",
    "### 1.3 Modalities",
    "## 2. Data sources",
    "### 2.1 Publicly available",
    "### 2.2 Private",
    "### 2.3 Data crawled",
    "### 2.4 User data",
    "### 2.5 Synthetic",
    "### 2.6 Other sources",
    "## 3. Data processing",
    "### 3.1 Reservations",
    "### 3.2 Removal",
    "### 3.3 Other",
)


def test_adapter_summary_names_base_sources_and_open_points(adapter: Path) -> None:
    """Its sections follow the template; open_points counts what a person has to state."""
    filled = sartor.training_summary(adapter)
    places = [filled.text.find(section) for section in SECTIONS]
    assert places == sorted(places) and places[0] > 0, "the template's sections, in its order"
    manifest = sartor.open(adapter).manifest
    assert manifest["base"]["digest"][:16] in filled.text and "no legal advice" in filled.text
    assert f"{manifest['run']['tokens']:,} were read" in filled.text
    for source in manifest["sources"]:
        assert source["path"] in filled.text and source["sha256"][:16] in filled.text
    assert filled.open_points == filled.text.count(TO_STATE) > 8


def test_dataset_lists_drops_and_steps(tmp_path: Path) -> None:
    rows = [{"question": f"Question {number % 4}?", "answer": "Yes."} for number in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = ["exact_duplicates", {"language": {"allow": ["en", "de"]}}]
    sartor.curate({"sources": [{"path": str(tmp_path / "rows.jsonl")}], "steps": steps}, tmp_path / "data")
    text = sartor.training_summary(tmp_path / "data").text
    assert "Languages: en, de" in text and "exact_duplicates, language" in text
    assert "exact_duplicate 4" in text and f"licence {TO_STATE}" in text and "rows of 8" in text


def test_a_report_has_none(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(ArtifactError):
        sartor.training_summary(tmp_path)


def test_command_prints_it(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(dataset), "--summary"])
    captured = capsys.readouterr()
    assert ended.value.code == 0 and captured.out.startswith("# Public summary") and TO_STATE in captured.err
    with pytest.raises(SystemExit):
        main(["inspect", str(dataset), "--summary", "--json"])
    assert json.loads(capsys.readouterr().out)["open"] > 8
