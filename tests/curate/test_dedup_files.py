"""`sartor dedup` on files: nothing is lost, rows stay byte for byte, and what is wrong is said."""

from __future__ import annotations

import json
import os
import random
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import sartor
from dedup_rows import edited, text, texts
from sample_data import write_jsonl
from sartor.core import processes
from sartor.core.artifacts import open_artifact
from sartor.core.errors import ArtifactError, BudgetError, ConfigError, GuardError, SourceError
from sartor.curate.dedup.record_files import choose, text_of


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def some_rows(count: int = 40, copies: int = 6) -> list[str]:
    rng = random.Random(0)
    rows = texts(count, 60)
    return rows + [edited(row, 0.03, rng) for row in rows[:copies]]


def dropped(out: Path) -> list[dict[str, Any]]:
    return pq.read_table(out / "dropped.parquet").to_pylist()


def test_jsonl_rows_stay_byte_for_byte_and_drops_are_kept(tmp_path: Path) -> None:
    """Kept and dropped lines together are the input; each drop has its line number and reason."""
    good = [json.dumps({"text": row, "n": n}, separators=(", ", " :  ")) for n, row in enumerate(some_rows())]
    bad = ['{"text": ', "[1, 2]", '{"other": "x"}', '"text"', "[" * 3000]
    file = tmp_path / "rows.jsonl"
    lines = [*good[:20], "", *bad, *good[20:]]
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b'\r\n{"text": "\xff"}\r\n{"text": "last one"}')
    done = sartor.dedup(file, tmp_path / "out", pairs=tmp_path / "pairs.csv").as_json()
    assert done["read"] == len(good) + len(bad) + 2
    assert done["dropped"] == {"duplicate": 6, "missing_field": 1, "not_an_object": 2, "not_json": 2, "not_utf8": 1}
    assert done["kept"] == done["read"] - sum(done["dropped"].values())
    kept = (tmp_path / "out/kept/rows.jsonl").read_bytes()
    aside = [row["content"] for row in dropped(tmp_path / "out")]
    assert sorted(kept.splitlines(keepends=True) + aside) == sorted(file.read_bytes().splitlines(keepends=True))
    assert kept.endswith(b'{"text": "last one"}')
    for row in dropped(tmp_path / "out"):
        assert file.read_bytes().splitlines(keepends=True)[row["line"] - 1] == row["content"]
        assert (row["kept_row"] is None) == (row["reason"] not in ("near_duplicate", "exact_duplicate", "contained"))
    head, *pairs = (tmp_path / "pairs.csv").read_text().splitlines()
    assert head == "a,b,score,method"
    assert len(pairs) == done["pairs"] == 6
    assert pairs[0].split(",")[0] == "0"
    assert pairs[0].endswith(",near")


def test_csv_keeps_header_quoting_and_multiline_rows(tmp_path: Path) -> None:
    """Kept and dropped rows together are the input file."""
    rows = some_rows(20, 3)
    lines = (
        ["id,text,note"] + [f'{n},"{row}\nand a ""second"" line", x' for n, row in enumerate(rows)] + ["1,2", "9,,z"]
    )
    file = tmp_path / "rows.csv"
    file.write_text("\n".join(lines) + "\n", newline="")
    done = sartor.dedup([file], tmp_path / "out").as_json()
    assert (done["read"], done["removed"], done["empty"]) == (25, {"near": 3}, 1)
    assert done["dropped"] == {"duplicate": 3, "field_count": 1}
    kept = (tmp_path / "out/kept/rows.csv").read_bytes()
    assert kept.startswith(b"id,text,note\n0,")
    aside = b"".join(row["content"] for row in dropped(tmp_path / "out"))
    assert sorted(kept + aside) == sorted(file.read_bytes())


@pytest.mark.parametrize("stated", ["", "sep=;\n"])
def test_csv_with_another_delimiter_loses_no_row(tmp_path: Path, stated: str) -> None:
    rows = some_rows(20, 3)
    file = tmp_path / "rows.csv"
    file.write_text(f"{stated}Meldung;Nummer\n" + "".join(f"{row}, sofort;{n}\n" for n, row in enumerate(rows)))
    done = sartor.dedup([file], tmp_path / "out", text_field="Meldung").as_json()
    assert (done["read"], done["kept"], done["dropped"]) == (23, 20, {"duplicate": 3})
    assert (tmp_path / "out/kept/rows.csv").read_text().startswith(f"{stated}Meldung;Nummer\n")


def test_csv_in_a_code_page_names_the_command_that_recodes_it(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes("Störung;Abteilung\nPumpe;Mechanik\n".encode("cp1252"))
    with pytest.raises(SourceError, match="the first line of .* is not UTF-8") as refused:
        sartor.dedup([file], tmp_path / "out")
    command = refused.value.remedy.partition(", and give")[0]
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert sartor.dedup([tmp_path / "utf8.csv"], tmp_path / "out").as_json()["kept"] == 1


def test_amounts_that_differ_by_cents_are_not_exact_duplicates(tmp_path: Path) -> None:
    amounts = [1234567.89, 1234567.12, 12.0, 12]
    write_jsonl(tmp_path / "a.jsonl", [{"betrag": amount} for amount in amounts])
    done = sartor.dedup([tmp_path / "a.jsonl"], tmp_path / "out").as_json()
    assert done["removed"] == {"exact": 1, "near": 1}


def test_parquet_keeps_its_types_and_json_its_shape(tmp_path: Path) -> None:
    rows = some_rows(20, 3)
    table = pa.table({"text": rows, "at": pa.array(range(23), pa.timestamp("ms")), "raw": [b"\x00\xff"] * 23})
    pq.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "b.json").write_text(
        json.dumps({"version": 1, "data": [{"text": row} for row in texts(5, 60, seed=3)]})
    )
    done = sartor.dedup([tmp_path / "a.parquet", tmp_path / "b.json"], tmp_path / "out").as_json()
    assert (done["read"], done["kept"]) == (28, 25)
    kept, gone = (pq.read_table(tmp_path / "out" / folder / "a.parquet") for folder in ("kept", "dropped"))
    assert kept.schema == gone.schema == table.schema
    assert pa.concat_tables([kept, gone]).sort_by("at").equals(table)
    assert json.loads((tmp_path / "out/kept/b.json").read_text()) == json.loads((tmp_path / "b.json").read_text())


def test_duplicates_across_files_name_both_places(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    one = jsonl(tmp_path / "rows.jsonl", [{"text": row} for row in texts(12, 60)])
    other = jsonl(
        tmp_path / "x/rows.jsonl", [{"text": row} for row in [*texts(30, 60, seed=9), texts(12, 60)[4].upper()]]
    )
    out = tmp_path / "out"
    sartor.dedup([one, other], out)
    (row,) = dropped(out)
    assert (row["row"], row["line"], row["kept_row"], row["kept_line"], row["method"]) == (42, 31, 4, 5, "exact")
    assert (row["file"], row["kept_file"]) == (str(other), str(one))
    assert sorted(path.name for path in (out / "kept").iterdir()) == ["rows-2.jsonl", "rows.jsonl"]


def test_records_without_text_are_compared_by_all_fields(tmp_path: Path) -> None:
    """The identifier is left out; at least 18 of 20 edited copies are found and no other pair."""
    rng = random.Random(1)
    names, streets = texts(1, 200)[0].split(), texts(1, 200, seed=2)[0].split()
    rows = [
        [
            f"rec-{n}",
            rng.choice(names),
            rng.choice(names),
            f"{rng.randint(1, 200)}",
            rng.choice(streets),
            f"{rng.randint(1000, 9999)}",
            f"{rng.randint(19400101, 20051231)}",
        ]
        for n in range(200)
    ]
    copies = [["copy", row[1], row[2][::-1][:1] + row[2], *row[3:6], row[6][:-1] + "0"] for row in rows[:20]]
    copies = [[f"rec-{200 + n}", *row[1:]] for n, row in enumerate(copies)]
    file = tmp_path / "people.csv"
    file.write_text(
        "\n".join(",".join(row) for row in [["rec_id", "a", "b", "no", "street", "code", "born"], *rows, *copies])
    )
    done = sartor.dedup(file, tmp_path / "out", pairs=tmp_path / "p.jsonl").as_json()
    assert done["files"][0]["fields"] == ["a", "b", "no", "street", "code", "born"]
    assert done["files"][0]["left_out"] == ["rec_id"]
    assert done["unit"] == "characters"
    pairs = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert all(pair["b"] - pair["a"] == 200 for pair in pairs)
    assert len(pairs) >= 18


@pytest.mark.parametrize(
    ("row", "field", "said"),
    [
        ({"text": "x", "id": 1}, "", "x"),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
                ]
            },
            "",
            "a\nb",
        ),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "", "a\nb"),
        ({"instruction": "a", "input": "b", "output": "c"}, "", "a\nc\nb"),
        ({"prompt": "a", "completion": "b"}, "completion", "b"),
        ({"prompt": "a", "completion": "b"}, "completion, prompt", "b\na"),
        ({"text": "x", "question": "a", "answer": "b"}, "", "a\nb\nx"),
        ({"text": "x", "prompt": "a", "completion": "b"}, "", "a\nb"),
        ({"meta": {"title": "a"}, "text": "x"}, "meta.title", "a"),
        ({"messages": [{"content": "a"}, {"content": "b"}]}, "messages.-1.content", "b"),
        ({"messages": [{"content": "a"}, {"content": "b"}]}, "messages.content", "a\nb"),
        ({"a.b": "x"}, "a.b", "x"),
        ({"name": "Li", "age": 7, "id": 3, "ok": True}, "", "Li\n7"),
    ],
)
def test_which_text_is_compared(row: dict[str, Any], field: str, said: str) -> None:
    assert text_of(row, choose([row], field)) == said


def test_unknown_field_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "rows.jsonl", [{"body": "x", "n": 1}])
    with pytest.raises(ConfigError, match="no field 'text'.*body, n"):
        sartor.dedup(file, tmp_path / "out", text_field="text")
    assert not (tmp_path / "out").exists()


def test_a_row_too_long_to_hold_is_copied_aside_in_pieces(tmp_path: Path) -> None:
    long = json.dumps({"text": "x" * 3_000_000})
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "\n".join([json.dumps({"text": row}) for row in texts(3, 20)] + [long, '{"text": "after"}']) + "\n"
    )
    done = sartor.dedup(file, tmp_path / "out", max_row_bytes=10_000).as_json()
    assert (done["read"], done["kept"], done["dropped"]) == (5, 4, {"too_long": 1})
    assert (tmp_path / "out/too_long/rows.jsonl").read_text() == long + "\n"


def test_a_guard_stops_before_anything_is_written(tmp_path: Path) -> None:
    rng = random.Random(2)
    row = text(80, rng)
    copied = jsonl(tmp_path / "copied.jsonl", [{"text": edited(row, 0.02, rng)} for _ in range(30)])
    other = jsonl(tmp_path / "other.jsonl", [{"text": one} for one in texts(60, 60)])
    with pytest.raises(GuardError, match=r"of the 30 rows of .*copied.jsonl.*copied.jsonl:\d+"):
        sartor.dedup([copied, other], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copied.jsonl", "other.jsonl"]
    done = sartor.dedup([copied, other], tmp_path / "out", allow=(str(copied),)).as_json()
    assert done["removed"]["near"] >= 25


def test_a_guard_of_rethreshold_names_no_flag_that_it_lacks(tmp_path: Path) -> None:
    """Only `sartor dedup` takes --allow."""
    rng = random.Random(2)
    row = text(80, rng)
    copied = jsonl(tmp_path / "copied.jsonl", [{"text": f"{row} word{end}"} for end in string.ascii_letters[:30]])
    other = jsonl(tmp_path / "other.jsonl", [{"text": one} for one in texts(60, 60)])
    sartor.dedup([copied, other], tmp_path / "out", threshold=1.0, contained=0.0)
    with pytest.raises(GuardError, match=r"of the 30 rows of .*copied.jsonl") as refused:
        sartor.rethreshold(tmp_path / "out", tmp_path / "again", threshold=0.6)
    own, of_dedup = refused.value.remedy.split("; if they are, ")
    assert own.endswith("a higher --threshold")
    assert of_dedup.startswith(f"sartor dedup FILE... --out DIR --threshold 0.6 with --allow {copied} ")


def test_rethreshold_equals_a_new_run(tmp_path: Path) -> None:
    """A threshold below the stored pairs is refused, and so is an input file that was changed."""
    rng = random.Random(3)
    rows = texts(80, 100)
    rows += [edited(row, rng.uniform(0.01, 0.1), rng) for row in rows]
    file = jsonl(tmp_path / "rows.jsonl", [{"text": row} for row in rows] + [7])
    first = sartor.dedup(file, tmp_path / "first")
    anew = sartor.dedup(file, tmp_path / "anew", threshold=0.85).as_json()
    again = sartor.rethreshold(tmp_path / "first", tmp_path / "again", threshold=0.85).as_json()
    assert first.as_json()["kept"] < anew["kept"] == again["kept"]
    for name in ("kept/rows.jsonl", "dropped.parquet"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "anew" / name).read_bytes()
    with pytest.raises(ConfigError, match="from 0.5 up"):
        sartor.rethreshold(tmp_path / "first", tmp_path / "low", threshold=0.3)
    file.write_text(file.read_text() + "{}\n")
    with pytest.raises(ArtifactError, match="was changed since"):
        sartor.rethreshold(tmp_path / "first", tmp_path / "late", threshold=0.85)


def test_processes_change_nothing_but_the_time(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "rows.jsonl", [{"text": row} for row in some_rows(200, 50)])
    for count in (1, 2):
        sartor.dedup(file, tmp_path / str(count), processes=count)
    for name in ("kept/rows.jsonl", "dropped.parquet", "pairs.parquet"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_workers_answer_in_order_and_hand_errors_on() -> None:
    with processes.WorkerPool(2) as two:
        assert list(two.spread(divmod, ((n, 3) for n in range(50)))) == [divmod(n, 3) for n in range(50)]
        with pytest.raises(ZeroDivisionError):
            list(two.spread(divmod, [(1, 1), (1, 0), (2, 1)]))


def test_worker_that_is_killed_names_the_flags_of_each_command() -> None:
    with processes.WorkerPool(1) as pool, pytest.raises(BudgetError, match="worker process ended") as caught:
        list(pool.spread(os._exit, [(1,)]))
    assert "--workers 1" in caught.value.remedy and "--processes 1" in caught.value.remedy


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("a.txt", b"x", ConfigError),
        ("a.jsonl", b"", SourceError),
        ("a.jsonl", b"\x00\x01\x02\n", SourceError),
        ("a.csv", b"text\n", SourceError),
        ("a.json", b"[1, ", SourceError),
        ("a.parquet", b"PAR1 no", SourceError),
    ],
)
def test_a_file_that_cannot_be_used_is_an_error_with_a_remedy(
    tmp_path: Path, name: str, content: bytes, error: type
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error):
        sartor.dedup(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": 2.0},
        {"threshold": 0.1},
        {"unit": "bytes"},
        {"treshold": 0.5},
        {"pairs": "p.txt"},
        {"max_fraction": 0.0},
        {"max_row_bytes": 0},
        {"processes": -1},
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    file = jsonl(tmp_path / "rows.jsonl", [{"text": "a b c"}])
    with pytest.raises(ConfigError) as caught:
        sartor.dedup(file, tmp_path / "out", **options)
    if {"unit", "max_fraction", "max_row_bytes", "processes"} & options.keys():
        assert f"--{next(iter(options)).replace('_', '-')} " in caught.value.remedy


def test_the_result_is_a_checked_artefact(tmp_path: Path) -> None:
    sartor.dedup(jsonl(tmp_path / "rows.jsonl", [{"text": row} for row in some_rows()]), tmp_path / "out")
    assert open_artifact(tmp_path / "out").kind == "duplicates"
    (tmp_path / "out/kept/rows.jsonl").write_text("{}\n")
    with pytest.raises(ArtifactError):
        open_artifact(tmp_path / "out", "duplicates")


def test_the_command_line_says_it_in_json(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "rows.jsonl", [{"text": row} for row in some_rows()])
    command = [sys.executable, "-m", "sartor", "dedup", str(file), "--out", str(tmp_path / "out"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said = json.loads(done.stdout.splitlines()[-1])
    assert {"read", "kept", "clusters", "largest_cluster", "pairs", "rows_per_s"} <= set(said)
    assert (said["read"], said["kept"], said["clusters"], said["largest_cluster"], said["pairs"]) == (46, 40, 6, 2, 6)
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert (
        "--replace"
        in json.loads(again.stdout.splitlines()[-1])["error"]["remedy"] + json.loads(again.stdout)["error"]["problem"]
    )
