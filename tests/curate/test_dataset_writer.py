"""Every verb that writes a Dataset writes the same bytes as when `golden/` was recorded (tests/helpers/dataset_cases.py records it anew)."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataset_cases import CASES, GOLDEN, PYARROW, as_text, fixed_versions, record_of, without_parquet_bytes
from sartor.core import parquet_io
from sartor.core.records import Drop
from sartor.curate import dataset_writer
from sartor.curate.dataset_writer import DatasetWriter


def test_every_golden_file_has_a_case() -> None:
    assert {file.stem for file in GOLDEN.glob("*.json")} == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_dataset_is_as_recorded(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Manifest, rows, card and `digest`; under another pyarrow all but the bytes of Parquet files and what follows from them."""
    golden = json.loads((GOLDEN / f"{case}.json").read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda file: None)  # no power is cut here
    with fixed_versions():
        written = record_of(CASES[case]())
    assert as_text(without_parquet_bytes(written)) == as_text(without_parquet_bytes(golden))
    if pa.__version__ == PYARROW.read_text().strip():
        assert as_text(written) == as_text(golden)


def test_tables_are_cut_into_files_by_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_io, "ROWS_PER_GROUP", 2)
    monkeypatch.setattr(dataset_writer, "ROWS_PER_FILE", 4)
    schema = pa.schema([("number", pa.int64())])
    table = pa.table({"number": range(7)}, schema)
    for name, tables in (("whole", [table]), ("pieces", [table.slice(0, 1), table.slice(1, 5), table.slice(6)])):
        assert dataset_writer.write_tables(tmp_path / name, schema, tables) == 7
    whole, pieces = (sorted((tmp_path / name).iterdir()) for name in ("whole", "pieces"))
    assert [len(pq.read_table(file)) for file in whole] == [4, 3]
    assert [file.read_bytes() for file in whole] == [file.read_bytes() for file in pieces]


def test_drop_file_stands_behind_those_before(tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path)
    writer.drop_file([Drop("late", "a", "a:1", ""), Drop("long", "a", "a:2", "")])
    writer.drop_file([Drop("long", "a", "a:3", "")])
    assert [file.name for file in sorted((tmp_path / "drops").iterdir())] == [
        "part-00000.parquet",
        "part-00001.parquet",
    ]
    assert list(writer.dropped.items()) == [("late", 1), ("long", 2)]


@pytest.mark.parametrize(("is_writable", "is_linked"), [(True, True), (False, False)])
def test_media_are_linked_unless_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_writable: bool, is_linked: bool
) -> None:
    """The writer opens each file of a new artefact to sync it, which a read-only file of a parent would refuse."""
    (tmp_path / "parent").mkdir()
    (tmp_path / "child").mkdir()
    (tmp_path / "parent" / "a.png").write_bytes(b"image")
    monkeypatch.setattr(os, "access", lambda path, mode: is_writable)
    DatasetWriter(tmp_path / "child").media(tmp_path / "parent")
    copy = tmp_path / "child" / "media" / "a.png"
    assert copy.read_bytes() == b"image"
    assert copy.samefile(tmp_path / "parent" / "a.png") == is_linked


def test_media_are_copied_where_links_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError("another file system")

    (tmp_path / "parent").mkdir()
    (tmp_path / "parent" / "a.png").write_bytes(b"image")
    monkeypatch.setattr(os, "link", refuse)
    DatasetWriter(tmp_path).media(tmp_path / "parent")
    assert (tmp_path / "media" / "a.png").read_bytes() == b"image"
