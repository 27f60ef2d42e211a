"""Hostile input: each is refused by name as a counted Drop, in bounded memory and time, and nothing is written elsewhere."""

from __future__ import annotations

import gzip
import io
import json
import os
import socket
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import sartor
from media_files import bomb
from sample_data import write_jsonl
from sartor.core import records
from sartor.core.errors import ConfigError
from sartor.curate.sources import document_worker, documents, media_files, row_readers, safe_paths
from sartor.curate.sources.planner import plan_reading
from sartor.curate.sources.types import SourceOptions
from sourcing import Rows, assembled, chat, pdf, tree


def zipped(**files: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


@pytest.mark.parametrize(
    "name", ["a.zip", "a.gz", "a.jsonl.gz", "a.pptx", "a.ods", "a.epub", "a.tar", "a.7z", "A.ZIP", "a.txt.zst"]
)
def test_an_archive_is_not_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(bytes(1 << 20)) if "gz" in name else zipped(a=bytes(1 << 20)))
    rows = Rows(tmp_path / "media", tmp_path)
    assert rows.reasons == {"archive": 1}
    assert "save " in rows.drops[0].detail or "unpack" in rows.drops[0].detail


PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", 4, 4) + b"\x08\x02\0\0\0"
LIES: list[tuple[str, bytes, str]] = [
    ("a.jsonl", zipped(a=b"x"), "zip archive"),
    ("a.jsonl", gzip.compress(b'{"text": "a"}', mtime=0), "gzip archive"),
    ("a.csv", b"PAR1 and so on", "Parquet"),
    ("a.txt", b"<!DOCTYPE html>\n<html><script>x()</script>", "HTML"),
    ("a.csv", b"  <html><body>404", "HTML"),
    ("a.md", b"%PDF-1.4 ...", "PDF"),
    ("a.txt", b"\x7fELF\x02\x01", "ELF program"),
    ("a.json", b"SQLite format 3\0", "SQLite database"),
    ("a.parquet", PNG, "PNG"),
    ("a.pdf", b"<html>no</html>", "HTML"),
    ("a.pdf", b"MZ\0\0", "Windows program"),
    ("a.html", zipped(a=b"x"), "zip archive"),
    ("a.png", b"\xff\xd8\xff\xe0 a jpeg", "JPEG"),
    ("a.jpg", PNG, "PNG"),
    ("a.png", b"\x7fELF\x02\x01", "ELF program"),
    ("a.gif", b"RIFF\0\0\0\0WEBPVP8 ", "WebP"),
    ("a.png", b"<svg onload='x()'>", "does not begin"),
    ("a.wav", b"fLaC\0", "FLAC"),
    ("a.mp3", b"RIFF\0\0\0\0WAVEfmt ", "WAV"),
    ("a.flac", b"hello", "does not begin"),
    ("a.pdf", b"just words", "does not begin"),
]


@pytest.mark.parametrize(("name", "content", "truth"), LIES)
def test_format_mismatch_names_the_real_format(tmp_path: Path, name: str, content: bytes, truth: str) -> None:
    """If the content has no known signature, the drop says that it does not begin as the suffix demands."""
    (tmp_path / name).write_bytes(content)
    rows = Rows(tmp_path / "media", tmp_path)
    assert rows.reasons == {"format_mismatch": 1}
    assert truth in rows.drops[0].detail


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"BMW builds cars"),
        ("a.txt", b"MZ is the mark of Mark Zbikowski"),
        ("a.txt", b"II. The second part"),
        ("a.txt", b"The tag <html> opens a page"),
        ("a.md", b"<p align=center>A readme may begin so</p>"),
        ("a.txt", "ÿþ is how a mark looks".encode()),
        ("a.csv", b"question,answer\nGIF or PNG?,PNG\n"),
    ],
)
def test_a_text_that_begins_like_another_format_is_still_text(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert len(Rows(tmp_path / "media", tmp_path).kept) == 1


def test_outside_looping_and_dead_links_are_not_followed(tmp_path: Path) -> None:
    """Each is a drop with its own reason; a link to a file inside the folder is read."""
    outside = tmp_path / "outside"
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    (folder / "sub" / "a.txt").write_text("a")
    (folder / "file.txt").symlink_to(outside / "secret.txt")
    (folder / "dir").symlink_to(outside)
    (folder / "etc.txt").symlink_to("/etc/passwd")
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "self.txt").symlink_to(folder / "self.txt")
    (folder / "dead.txt").symlink_to("nowhere")
    (folder / "twin.txt").symlink_to(folder / "sub" / "a.txt")
    rows = Rows(tmp_path / "media", folder)
    assert rows.reasons == {"link_outside": 3, "folder_link": 1, "broken_link": 2}
    assert rows.replies == ["a", "a"]


def test_own_output_below_the_source_is_not_learnt(tmp_path: Path) -> None:
    """A second run over the folder reads the same row; the Dataset of the first one is one Drop."""
    folder = tmp_path / "in"
    (folder / "theirs").mkdir(parents=True)
    write_jsonl(folder / "a.jsonl", [{"question": "q", "answer": "a"}])
    (folder / "theirs" / "manifest.json").write_text('{"question": "r", "answer": "b"}')
    recipe = {"sources": [str(folder)], "split": {"eval_fraction": 0.0}}
    first, second = (sartor.curate(recipe, folder / "data", replace=replace) for replace in (False, True))
    assert (first.kept, first.dropped) == (2, {})
    assert (second.kept, second.dropped) == (2, {"own_output": 1})


@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes in folders")
def test_pipes_devices_and_sockets_are_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder or a pattern they are drops; as the source itself they raise ConfigError."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.jsonl", "b.png", "c.pdf", "d.txt", "metadata.csv"):
        os.mkfifo(folder / name)
    with socket.socket(socket.AF_UNIX) as sock:
        monkeypatch.chdir(folder)
        sock.bind("s.txt")
        began = time.monotonic()
        rows = Rows(tmp_path / "media", folder)
    assert rows.reasons == {"not_a_file": 6}
    assert time.monotonic() - began < 60
    for source in (folder / "a.jsonl", "/dev/zero"):
        with pytest.raises(ConfigError, match="named pipe|character device"):
            plan_reading([SourceOptions(str(source))], 1 << 20)
    assert Rows(tmp_path / "media", str(folder / "*.jsonl")).reasons == {"not_a_file": 1}


@pytest.mark.skipif(os.name != "posix", reason="POSIX pipes")
def test_a_caption_or_picture_that_became_a_pipe_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    source = SourceOptions(str(tmp_path / "a.txt"))
    (unit,) = plan_reading([source], 1 << 20).chunks
    (tmp_path / "a.txt").unlink()
    os.mkfifo(tmp_path / "a.txt")
    from sartor.curate.sources.chunk_reader import read_chunk

    assert [row.reason for row in read_chunk(unit, source, tmp_path / "media")] == ["not_a_file"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.txt").chmod(0)
    (tmp_path / "sub").mkdir(mode=0)
    assert Rows(tmp_path / "media", tmp_path).reasons == {"unreadable_file": 2}


def test_what_the_system_refuses_to_open_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a")

    def refuse(*given: Any) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(safe_paths.os, "open", refuse)
    rows = Rows(tmp_path / "media", tmp_path)
    assert rows.reasons == {"unreadable_file": 1}
    assert "Permission denied" in rows.drops[0].detail


@pytest.mark.skipif(sys.platform != "linux", reason="file systems that take any byte in a name")
def test_a_name_of_any_bytes_has_a_locator_that_can_be_written(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in (b"new\nline.txt", b"caf\xe9.txt", b"tab\t\x1b[31m.txt", "é 😀.txt".encode(), b"colon:7.txt"):
        (Path(os.fsdecode(os.path.join(os.fsencode(folder), name)))).write_text(f"text {name!r}")
    rows = Rows(tmp_path / "media", folder)
    assert len(rows.kept) == 5
    for place in rows.places:
        assert place.encode() and place.isprintable()
    assert "new\\nline.txt:1" in rows.places and "é 😀.txt:1" in rows.places


@pytest.mark.parametrize(
    "value",
    [
        "../secret.png",
        "a/../../secret.png",
        "/etc/passwd",
        "C:\\windows\\x.png",
        "c:/x.png",
        "..\\secret.png",
        "\\\\server\\share\\x.png",
        "%2e%2e/secret.png",
        "%252e%252e%252fsecret.png",
        "..%2fsecret.png",
        "%2fetc%2fpasswd",
        "~/secret.png",
        "file:///etc/passwd",
        "a\x00.png",
        "a%00.png",
        "x" * 5000 + ".png",
        "x" * 300 + ".png",
        "link.png",
        "loop.png",
        "",
        ".",
        "sub",
    ],
)
def test_media_path_outside_the_folder_is_refused(tmp_path: Path, value: str) -> None:
    """Encoded, absolute, overlong, empty and linked paths are refused as well, and nothing is copied."""
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(PNG)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "loop.png").symlink_to("loop.png")
    with pytest.raises(records.MalformedRow) as fault:
        media_files.store_media("image", value, folder, tmp_path / "media")
    assert fault.value.reason in ("bad_media", "missing_media", "not_a_file")
    assert not (tmp_path / "media").exists()


def test_traversal_in_rows_and_tables_writes_nothing_anywhere(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(PNG)
    part = [{"type": "image", "image": "../secret.png"}]
    write_jsonl(folder / "a.jsonl", [chat(part, "a"), chat([{"type": "image", "image": "x.png\ud800"}], "a")])
    (folder / "metadata.csv").write_text("file_name,text\n../secret.png,mine\n/etc/passwd,theirs\nnone.png,absent\n")
    before = tree(tmp_path)
    rows = Rows(tmp_path / "media", folder)
    assert rows.reasons == {"bad_media": 4, "missing_media": 1}
    assert tree(tmp_path) == before


def gif(frames: int) -> bytes:
    """A GIF of 1 x 1 frames, by hand."""
    frame = b",\0\0\0\0\1\0\1\0\0\x02\x02D\x01\0"
    return b"GIF89a\1\0\1\0\x80\0\0\0\0\0\xff\xff\xff" + frame * frames + b";"


BOMBS = {
    "a.png": bomb(100_000),
    "b.gif": gif(100_000),
    "c.bmp": b"BM" + struct.pack("<IHHIIii", 60, 0, 0, 54, 40, 60_000, -60_000) + bytes(28),
    "d.jpg": b"\xff\xd8\xff\xe0\0\x04xx\xff\xc2\0\x11\x08" + struct.pack(">HH", 65_000, 65_000) + bytes(20),
    "e.webp": b"RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\xff\xff\xff\xff\xff\xff" + bytes(20),
    "f.tif": b"II*\0\x08\0\0\0\x02\0"
    + struct.pack("<HHII", 256, 4, 1, 90_000)
    + struct.pack("<HHII", 257, 4, 1, 90_000)
    + bytes(8),
    "g.png": b"\x89PNG\r\n\x1a\n"
    + struct.pack(">I4sIIBBBBBI", 13, b"IHDR", 4, 4, 8, 2, 0, 0, 0, 0)
    + struct.pack(">I4sIII", 8, b"acTL", 100_000, 0, 0),
}


@pytest.mark.parametrize("name", BOMBS)
def test_image_bomb_is_refused_by_its_header(tmp_path: Path, name: str) -> None:
    """It is a drop as a captioned file and in a row, and no media are copied."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / name).write_bytes(BOMBS[name])
    (folder / f"{name[0]}.txt").write_text("a caption")
    write_jsonl(folder / "z.jsonl", [chat([{"type": "image", "image": name}], "a")])
    rows = Rows(tmp_path / "media", folder)
    assert rows.reasons == {"image_bomb": 2}
    assert not (tmp_path / "media").exists()


def test_a_picture_cut_short_in_its_header_is_named(tmp_path: Path) -> None:
    for name, content in {"a.png": PNG[:18], "b.jpg": b"\xff\xd8\xff\xe0\0\x04", "c.gif": b"GIF89a\1"}.items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / f"{name[0]}.txt").write_text("a caption")
    assert Rows(tmp_path / "media", tmp_path).reasons == {"bad_media": 3}


def test_parquet_with_too_many_rows_for_its_size_is_refused(tmp_path: Path) -> None:
    """The drop names the 5,000,000 rows that the file claims."""
    schema = pa.schema([("text", pa.null())])
    with pq.ParquetWriter(tmp_path / "a.parquet", schema) as writer:
        writer.write_table(pa.table({"text": pa.nulls(5_000_000)}, schema=schema))
    rows = Rows(tmp_path / "media", tmp_path)
    assert rows.reasons == {"parquet_bomb": 1}
    assert "5,000,000" in rows.drops[0].detail


def test_repeated_dictionary_values_in_parquet_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long value repeated in 400 rows gives five oversize_row drops, then a parquet_bomb."""
    monkeypatch.setattr(row_readers, "MOST_OVERSIZE_RUN", 5)
    values = pa.DictionaryArray.from_arrays(
        pa.array([0] * 400 + [1] * 3, pa.int32()), pa.array(["y" * 2_000_000, "short"])
    )
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet", compression="zstd", store_schema=False)
    assert (tmp_path / "a.parquet").stat().st_size < 20_000
    rows = Rows(tmp_path / "media", tmp_path, most=1 << 20)
    assert rows.reasons == {"oversize_row": 5, "parquet_bomb": 1}
    with (tmp_path / "a.parquet").open("rb") as stream:
        assert row_readers._batch_rows(stream, 0) == row_readers.MOST_BATCH_BYTES // 2_000_000


def test_overlong_parquet_row_is_dropped_alone(tmp_path: Path) -> None:
    """Its neighbours are read with their own row numbers."""
    rows_in = [chat("q", "a"), chat("q", "x" * 3000), chat("q", "c")]
    pq.write_table(pa.Table.from_pylist(rows_in), tmp_path / "a.parquet")
    rows = Rows(tmp_path / "media", tmp_path, most=1000)
    assert (rows.replies, rows.reasons, rows.places) == (
        ["a", "c"],
        {"oversize_row": 1},
        ["a.parquet:1", "a.parquet:3"],
    )


RUNS = [
    "=1+1",
    " =1+1",
    "\t=cmd|' /C calc'!A0",
    '=HYPERLINK("http://x","y")',
    "@SUM(1+1)*cmd|' /C calc'!A0",
    "@SUM(A1)",
    "+cmd|' /C calc'!A0",
    "-2+3+cmd|' /C calc'!A0",
    "+SUM(1,2)",
    "-sum(a1)",
    "=A1",
    "=-A1",
    "='x'!A1",
    "＝1+1",
    "=(1)",
    '+HyperLink("x")',
    '@webservice("http://x")',
    "=  IMPORTXML(1)",
    '="a"&"b"',
    "DDE"[:0] + '=DDE("cmd";"/C calc";"x")',
    "= A1",
    "= $B$2",
    "= cmd|' /C calc'!A0",
    '- HYPERLINK("http://x")',
]
SHOWS = [
    "-5 degrees",
    "+49 30 123456",
    "- a list item",
    "-- Anna",
    "@anna thanks!",
    "@anna (from Berlin) wrote",
    "+1",
    "-1.5",
    "=> see below",
    "== Heading ==",
    "=)",
    "=",
    "-",
    "@",
    "+",
    "- [x] done (yes)",
    "-f is the flag",
    "a=1+1",
    "1+1=2",
    "'=1+1",
    "+ fresh bread",
    "-> next!",
    ":-)",
    "- CT(Thorax) ohne Befund",
    "= unauffaellig",
    "+ EKG(12-Kanal) normal",
]


def test_cells_that_a_spreadsheet_would_run_are_told_from_text() -> None:
    assert [cell for cell in RUNS if not row_readers.is_formula(cell)] == []
    assert [cell for cell in SHOWS if row_readers.is_formula(cell)] == []


def test_formula_is_dropped_in_csv_and_kept_in_jsonl(tmp_path: Path) -> None:
    """Values such as -5? and +1 in a CSV file are no formulas."""
    (tmp_path / "a.csv").write_text("question,answer\nq,a\nq,\"=cmd|'/C calc'!A0\"\n-5?,+1\n")
    write_jsonl(tmp_path / "b.jsonl", [{"question": "q", "answer": "=1+1"}])
    rows = Rows(tmp_path / "media", tmp_path)
    assert (rows.replies, rows.reasons) == (["a", "+1", "=1+1"], {"csv_formula": 1})


def test_long_csv_lines_and_rows_are_drops_in_bounded_memory(tmp_path: Path) -> None:
    long = "x" * 3000
    (tmp_path / "a.csv").write_text(f'question,answer\n{long},a\nq,b\nq,"{"y" * 600}\n{"z" * 600}"\nq,c\n')
    rows = Rows(tmp_path / "media", tmp_path, most=1000)
    assert (rows.replies, rows.reasons) == (["b", "c"], {"oversize_row": 2})
    assert rows.places == ["a.csv:3", "a.csv:6"]


def test_json_of_any_depth_or_number_is_a_drop(tmp_path: Path) -> None:
    digits, deep = "9" * 1_000_000, 100_000
    lines = [
        f'{{"text": "a", "weight": {digits}}}',
        '{"text": ' + "[" * deep + "]" * deep + "}",
        '{"messages": ' + json.dumps("[{" * deep) + "}",
        '{"a":' * deep + "1" + "}" * deep,
        '{"text": "a", "weight": 1e999}',
        '{"text": "a", "tools": "[1e999]"}',
        '{"text": "a", "tools": [1e999]}',
        *['{"text": "good"}'] * 9,
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.json").write_text("[" + "[" * deep)
    (tmp_path / "c.json").write_text(f'[{{"text": "one"}}, {digits}, {{"text": "two"}}]')
    began = time.monotonic()
    rows = Rows(tmp_path / "media", tmp_path)
    assert {"good", "one"} <= set(rows.replies)
    assert [row.reason for row in rows.all if getattr(row, "locator", "").startswith("a.jsonl")] == [
        "bad_json",
        "bad_json",
        "mixed_form",
        "bad_json",
        "bad_field",
        "bad_field",
        "bad_field",
    ]
    assert {drop.reason for drop in rows.drops} <= {"bad_json", "bad_field", "mixed_form"}
    assert time.monotonic() - began < 90


def test_nan_in_a_json_list_drops_its_row_alone(tmp_path: Path) -> None:
    rows = [
        {"question": f"Q{index}?", "answer": "a", "score": float("nan" if index == 1 else 1)} for index in range(9)
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    found = Rows(tmp_path / "media", tmp_path)
    assert (len(found.kept), found.reasons) == (8, {"bad_json": 1}) and "NaN is not JSON" in found.drops[0].detail


def test_fault_in_one_line_of_json_says_how_much_is_unread(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"text": "one"}, {"text" "two"}, {"text": "three"}]')
    (drop,) = Rows(tmp_path / "media", tmp_path).drops
    assert "(34 characters are not read)" in drop.detail


def test_a_json_file_over_its_limit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_readers, "MOST_JSON_BYTES", 100)
    (tmp_path / "a.json").write_text(json.dumps([{"text": "x" * 200}]))
    rows = Rows(tmp_path / "media", tmp_path)
    assert rows.reasons == {"oversize_file": 1}


def test_a_json_list_of_many_rows_is_read_in_linear_time(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": f"row {n} " + "x" * 200} for n in range(20_000)]))
    began = time.monotonic()
    assert len(Rows(tmp_path / "media", tmp_path).kept) == 20_000
    assert time.monotonic() - began < 90


BAD_PDFS: dict[str, tuple[bytes, str]] = {
    "cut": (pdf("one", "two")[:200], "bad_pdf"),
    "noise": (b"%PDF-1.7\n" + bytes(range(256)) * 50, "bad_pdf"),
    "empty": (b"", "empty_file"),
    "loop": (
        assembled([b"<< /Type /Catalog /Pages 2 0 R >>", b"<< /Type /Pages /Kids [2 0 R] /Count 1 >>"]),
        "bad_pdf",
    ),
    "no pages": (
        assembled([b"<< /Type /Catalog /Pages 2 0 R >>", b"<< /Type /Pages /Kids [] /Count 0 >>"]),
        "no_text",
    ),
}


@pytest.mark.parametrize("name", BAD_PDFS)
def test_a_pdf_that_does_not_parse_is_named(tmp_path: Path, name: str) -> None:
    content, reason = BAD_PDFS[name]
    (tmp_path / "a.pdf").write_bytes(content)
    (tmp_path / "b.pdf").write_bytes(pdf("good"))
    rows = Rows(tmp_path / "media", tmp_path)
    assert (rows.reasons, rows.replies) == ({reason: 1}, ["good"])


def test_an_encrypted_pdf_is_named(tmp_path: Path) -> None:
    import pypdf

    for name, password in (("a.pdf", "secret"), ("b.pdf", "")):
        writer = pypdf.PdfWriter(clone_from=io.BytesIO(pdf("inside")))
        writer.encrypt(user_password=password, owner_password="owner", algorithm="RC4-128")
        writer.write(str(tmp_path / name))
    rows = Rows(tmp_path / "media", tmp_path)
    assert (rows.reasons, rows.replies) == ({"encrypted": 1}, ["inside"])


def bomb_pdf(megabytes: int) -> bytes:
    """A page whose stream unfolds to many megabytes."""
    packer = zlib.compressobj(9)
    body = b"".join(packer.compress(b"0 0 m " * 174_763) for _ in range(megabytes)) + packer.flush()
    stream = b"<< /Length %d /Filter /FlateDecode >>\nstream\n" % len(body) + body + b"\nendstream"
    return assembled(
        [
            b"<< /Type /Catalog /Pages 2 0 R >>",
            b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 9 9] /Contents 4 0 R >>",
            stream,
        ]
    )


def test_a_pdf_bomb_is_named_and_the_next_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(bomb_pdf(200))
    assert (tmp_path / "a.pdf").stat().st_size < 1 << 20
    (tmp_path / "b.pdf").write_bytes(pdf("good"))
    rows = Rows(tmp_path / "media", tmp_path)
    assert (rows.reasons, rows.replies) == ({"pdf_bomb": 1}, ["good"])


@pytest.mark.services
def test_slow_html_file_is_ended_and_the_next_one_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of 400,000 nested tags is an html_bomb and takes a bounded time."""
    monkeypatch.setattr(documents, "PAGE_S", 12)
    (tmp_path / "a.html").write_bytes(b"<div>" * 400_000 + b"deep")
    (tmp_path / "b.html").write_bytes(b"<p>good")
    began = time.monotonic()
    rows = Rows(tmp_path / "media", tmp_path)
    assert (rows.reasons, rows.replies) == ({"html_bomb": 1}, ["good"])
    assert time.monotonic() - began < 90


def test_a_parser_that_dies_takes_no_other_file_with_it(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.html").write_text(f"<p>{name}")
    digests = {name: media_files.digest_of((tmp_path / f"{name}.html").read_bytes()) for name in ("a", "b")}
    with documents.DocumentReader() as reader:
        assert [row for _, row in reader.read(str(tmp_path / "a.html"), digests["a"], "html", 1000)] == [{"text": "a"}]
        assert reader._process is not None
        reader._process.kill()
        reader._process.wait()
        assert [row for _, row in reader.read(str(tmp_path / "b.html"), digests["b"], "html", 1000)] == [{"text": "b"}]


@pytest.mark.skipif(sys.platform != "linux", reason="the system's own limits")
def test_document_worker_has_memory_limit_and_cannot_write(tmp_path: Path) -> None:
    """An allocation of MOST_MEMORY fails, and an opened file stays empty."""
    code = (
        "from sartor.curate.sources import document_worker; document_worker._limit()\n"
        "try: bytearray(document_worker.MOST_MEMORY); print('memory')\n"
        "except MemoryError: pass\n"
        f"open({str(tmp_path / 'out')!r}, 'w').write('x' * 10)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "memory" not in done.stdout
    assert (tmp_path / "out").stat().st_size == 0


@pytest.mark.services
@pytest.mark.parametrize(
    "piece",
    [b"<", b"<!--", b"<![CDATA[", b"<a ", b'<a b="', b"<script>", b"</", b"&", b"<title>", b"<svg>", b"<pre>\n"],
)
def test_broken_html_ends_quickly_and_in_a_row_or_a_drop(tmp_path: Path, piece: bytes) -> None:
    (tmp_path / "a.html").write_bytes(piece * (60_000 if piece[:2] != b"<s" else 3000))
    began = time.monotonic()
    rows = Rows(tmp_path / "media", tmp_path)
    assert len(rows.all) == 1
    assert time.monotonic() - began < 90


def test_a_deep_tree_is_walked_without_recursion() -> None:
    assert document_worker.html_text(
        b"<title>t</title>" + b"<div>" * 5000 + b"x" + b"</div>" * 5000 + b"<p>after"
    ).split() == [
        "t",
        "x",
        "after",
    ]


def test_a_folder_of_very_many_files_is_planned_in_seconds(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (tmp_path / "one").write_bytes(b"a")
    for part in range(10):
        (folder / str(part)).mkdir(parents=True)
        for n in range(1000):
            os.link(tmp_path / "one", folder / str(part) / f"{n:04}.txt")  # many times faster than a new file
    began = time.monotonic()
    found = plan_reading([SourceOptions(str(folder))], 1 << 20)
    assert (len(found.files), len(found.chunks)) == (10_000, 50)
    assert time.monotonic() - began < 120


def test_an_unreadable_source_itself_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "loop", tmp_path / "empty", "a\0b", tmp_path / ("x" * 300)):
        with pytest.raises(ConfigError):
            plan_reading([SourceOptions(str(path))], 1 << 20)
