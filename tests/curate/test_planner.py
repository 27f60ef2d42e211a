"""Units: no line is lost, cut or counted twice, wherever a file is cut, and each reads alone."""

from __future__ import annotations

import hashlib
import json
import os
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sample_data import write_jsonl
from sartor.curate.sources import planner, source_files
from sartor.curate.sources.chunk_reader import read_chunk
from sartor.curate.sources.planner import plan_reading
from sartor.curate.sources.types import SourceOptions
from sourcing import Rows, chat


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_files, "PIECE_BYTES", 300)
    monkeypatch.setattr(source_files, "BLOCK_BYTES", 128)
    monkeypatch.setattr(planner, "PIECE_BYTES", 300)


def test_pieces_give_every_row_once_with_its_own_line(tmp_path: Path, small_pieces: None) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": f"row {n} " + "x" * (n % 90)} for n in range(500)])
    rows = Rows(tmp_path / "media", tmp_path / "a.jsonl")
    assert len(rows.plan.chunks) > 40
    assert [reply.split()[1] for reply in rows.replies] == [str(n) for n in range(500)]
    assert rows.places == [f"a.jsonl:{n}" for n in range(1, 501)]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 900), max_size=40),
    end=st.sampled_from(["\n", "\r\n"]),
    closed=st.booleans(),
    bom=st.booleans(),
)
def test_wherever_it_is_cut_no_line_is_lost(
    tmp_path_factory: pytest.TempPathFactory, small_pieces: None, lengths: list[int], end: str, closed: bool, bom: bool
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    lines = [
        json.dumps({"text": f"{n} " + "é" * length}, ensure_ascii=False) if length % 7 else ""
        for n, length in enumerate(lengths)
    ]
    raw = ("\ufeff" if bom else "").encode() + end.join(lines).encode() + (end.encode() if closed else b"")
    (folder / "a.jsonl").write_bytes(raw)
    rows = Rows(folder / "media", folder / "a.jsonl")
    assert rows.places == [f"a.jsonl:{n}" for n, line in enumerate(lines, 1) if line] or not raw.strip(
        b"\xef\xbb\xbf\r\n"
    )
    pieces = [unit.piece for unit in rows.plan.chunks if unit.piece]
    if pieces:
        assert sum(piece.length for piece in pieces) == len(raw)
        assert all(raw[piece.start - 1 : piece.start] in (b"", b"\n") for piece in pieces)
    assert rows.plan.files[0].sha256 in ("", hashlib.sha256(raw).hexdigest())


def test_line_longer_than_a_piece_is_one_drop(tmp_path: Path, small_pieces: None) -> None:
    """The next line keeps its line number."""
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "' + "x" * 5000 + '"}\n{"text": "b"}\n')
    rows = Rows(tmp_path / "media", tmp_path / "a.jsonl", most=1000)
    assert [(drop.reason, drop.locator) for drop in rows.drops] == [("oversize_row", "a.jsonl:2")]
    assert rows.places == ["a.jsonl:1", "a.jsonl:3"]


def test_rows_behind_a_line_longer_than_a_piece_have_their_form(tmp_path: Path, small_pieces: None) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "' + "x" * 5000 + '"}\n{"question": "a", "answer": "b"}\n')
    rows = Rows(tmp_path / "media", tmp_path / "a.jsonl", most=1000)
    assert (rows.reasons, rows.places) == ({"oversize_row": 1}, ["a.jsonl:2"])


def test_a_line_of_many_blocks_takes_the_memory_of_a_row(tmp_path: Path) -> None:
    with (tmp_path / "a.jsonl").open("wb") as out:
        out.write(b'{"text": "a"}\n{"text": "')
        for _ in range(60):
            out.write(b"x" * (1 << 20))
        out.write(b'"}\n{"text": "b"}\n')
    tracemalloc.start()
    rows = Rows(tmp_path / "media", tmp_path / "a.jsonl", most=1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (rows.reasons, rows.places) == ({"oversize_row": 1}, ["a.jsonl:1", "a.jsonl:3"])
    assert peak < 12 << 20


def test_parquet_row_groups_are_read_with_their_row_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_files, "PIECE_BYTES", 1000)
    monkeypatch.setattr(planner, "PIECE_BYTES", 1000)
    monkeypatch.setattr("sartor.curate.sources.row_readers.PIECE_BYTES", 3000)
    seeded = random.Random(0)
    table = pa.table({"text": [f"{n} {seeded.random()}" for n in range(1000)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=70)
    rows = Rows(tmp_path / "media", tmp_path / "a.parquet")
    assert len(rows.plan.chunks) > 3
    assert rows.replies == table["text"].to_pylist()
    assert rows.places == [f"a.parquet:{n}" for n in range(1, 1001)]


def test_a_unit_reads_alone_and_in_any_order(tmp_path: Path, small_pieces: None) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": f"row {n}"} for n in range(200)])
    source = SourceOptions(str(tmp_path / "a.jsonl"))
    units = plan_reading([source], 1 << 20).chunks
    backwards = [list(read_chunk(unit, source, tmp_path / "media")) for unit in reversed(units)]
    flat = [row.reply for rows in reversed(backwards) for row in rows]
    assert flat == [f"row {n}" for n in range(200)]


def test_small_files_share_a_unit_and_large_ones_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "BATCH_FILES", 10)
    for n in range(35):
        (tmp_path / f"{n:02}.txt").write_text(f"text {n}")
    rows = Rows(tmp_path / "media", tmp_path)
    assert [len(unit.files) for unit in rows.plan.chunks] == [10, 10, 10, 5]
    assert rows.replies == [f"text {n}" for n in range(35)]
    assert [unit.number for unit in rows.plan.chunks] == [0, 1, 2, 3]


def test_the_form_is_the_files_even_where_a_piece_holds_another(tmp_path: Path, small_pieces: None) -> None:
    made = [chat("q", "a" * 50)] * 60 + [{"text": "other " * 10}] * 60
    write_jsonl(tmp_path / "a.jsonl", made)
    rows = Rows(tmp_path / "media", tmp_path / "a.jsonl")
    assert rows.reasons == {"mixed_form": 60}
    assert rows.plan.files[0].form == "messages"


def test_chunk_digest_depends_on_content_and_source_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not depend on the folder."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "a.jsonl", [{"text": "a"}])
    monkeypatch.chdir(tmp_path / "one")
    before = plan_reading([SourceOptions("a.jsonl")], 1 << 20).chunks[0].digest
    other_licence = plan_reading([SourceOptions("a.jsonl", licence="MIT")], 1 << 20).chunks[0].digest
    monkeypatch.chdir(tmp_path / "two")
    assert plan_reading([SourceOptions("a.jsonl")], 1 << 20).chunks[0].digest == before != other_licence
    write_jsonl(tmp_path / "two" / "a.jsonl", [{"text": "b"}])
    assert plan_reading([SourceOptions("a.jsonl")], 1 << 20).chunks[0].digest != before


CHANGES: list[tuple[str, Any, Any]] = [
    ("a.jsonl", b'{"text": "a"}\n', b'{"text": "b"}\n'),
    ("a.txt", b"one", b"two"),
    ("a.csv", b"question,answer\nq,a\n", b"question,answer\nq,b\n"),
    ("a.json", b'[{"text": "a"}]', b'[{"text": "b"}]'),
    ("a.html", b"<p>one</p>", b"<p>two</p>"),
]


@pytest.mark.parametrize(("name", "before", "after"), CHANGES)
def test_file_changed_after_planning_is_dropped(tmp_path: Path, name: str, before: bytes, after: bytes) -> None:
    """The reason is changed_file, although the modification time is the old one."""
    (tmp_path / name).write_bytes(before)
    source = SourceOptions(str(tmp_path / name))
    (unit,) = plan_reading([source], 1 << 20).chunks
    stat = (tmp_path / name).stat()
    (tmp_path / name).write_bytes(after)
    os.utime(tmp_path / name, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (drop,) = read_chunk(unit, source, tmp_path / "media")
    assert (drop.reason, drop.locator) == ("changed_file", f"{name}:1")


def test_a_piece_that_changed_is_named_and_the_others_are_read(tmp_path: Path, small_pieces: None) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": f"row {n:03}"} for n in range(100)])
    source = SourceOptions(str(tmp_path / "a.jsonl"))
    units = plan_reading([source], 1 << 20).chunks
    raw = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "a.jsonl").write_bytes(raw.replace(b"row 000", b"row 999"))
    rows = [row for unit in units for row in read_chunk(unit, source, tmp_path / "media")]
    assert [row.reason for row in rows if hasattr(row, "reason")] == ["changed_file"]
    assert len(rows) > 80


def test_a_file_that_went_after_planning_is_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    source = SourceOptions(str(tmp_path / "a.jsonl"))
    (unit,) = plan_reading([source], 1 << 20).chunks
    (tmp_path / "a.jsonl").unlink()
    (drop,) = read_chunk(unit, source, tmp_path / "media")
    assert drop.reason == "unreadable_file"
