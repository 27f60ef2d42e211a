"""Rows from Python: every kind of table becomes the same Dataset, every value is kept, named or refused."""

from __future__ import annotations

import datetime
import decimal
import io
import json
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import polars
import pyarrow as pa
import pytest
from PIL import Image

import sartor
from sample_data import ROWS
from sartor.core.errors import ConfigError, SartorError, SourceError
from sartor.curate.sources import python_rows

FAQ = [{"question": f"What does part {number} cost?", "answer": f"{number % 7} euros."} for number in range(30)]
KINDS: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "list": list,
    "generator": iter,
    "pandas": pandas.DataFrame,
    "polars": polars.DataFrame,
    "datasets": datasets.Dataset.from_list,
    "datasets, streamed": lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset(),
    "pyarrow": pa.Table.from_pylist,
    "pyarrow, streamed": lambda rows: pa.Table.from_pylist(rows).to_reader(),
}


def written(rows: Any, folder: Path) -> list[dict[str, Any]]:
    """Return the rows as they stand on disk."""
    lines = python_rows.write_rows(rows, folder).file.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def png(colour: tuple[int, int, int]) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("rows", [FAQ, ROWS], ids=["questions", "messages"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_written_to_the_same_bytes(kind: str, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    """So the digest of the rows does not tell from which library they came."""
    python_rows.write_rows(rows, tmp_path / "a")
    python_rows.write_rows(KINDS[kind](rows), tmp_path / "b")
    assert (tmp_path / "a/rows.jsonl").read_bytes() == (tmp_path / "b/rows.jsonl").read_bytes()


def test_curate_equals_that_of_a_file_and_states_its_rows(tmp_path: Path) -> None:
    file = tmp_path / "faq.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in FAQ))
    of_file = sartor.curate({"sources": [{"path": str(file), "licence": "own"}]}, tmp_path / "a").dataset
    made = sartor.curate(rows=pandas.DataFrame(FAQ), out=tmp_path / "b", licence="own")
    examples = list(sartor.read_examples(made.dataset))
    assert [example.id for example in examples] == [example.id for example in sartor.read_examples(of_file)]
    assert (made.kept, made.dropped, made.dataset.licence) == (30, {}, of_file.licence)
    assert {example.origins[0].source for example in examples} == {"rows:"}
    assert sorted(int(example.origins[0].locator.removeprefix("rows:")) for example in examples) == list(range(1, 31))
    (source,) = made.dataset.manifest["sources"]
    assert source["sha256"] and (source["path"], source["read"], source["form"]) == ("rows", 30, "question_answer")
    assert not list(tmp_path.glob("*.curating"))


def test_recipe_without_sources_takes_the_rows(tmp_path: Path) -> None:
    recipe = tmp_path / "curate.yaml"
    recipe.write_text("steps: [{length: {min_words: 2}}]\nsplit: {eval_fraction: 0.5}\n")
    made = sartor.curate(recipe, tmp_path / "data", rows=[*FAQ, {"question": "Why?", "answer": "So."}], licence="MIT")
    assert made.dropped == {"too_short": 1}
    assert made.counts["splits"]["eval"] > 5


def test_recipe_describes_named_rows_beside_a_file(tmp_path: Path, rows_file: Path) -> None:
    recipe = {
        "sources": [
            {"path": str(rows_file), "licence": "MIT"},
            {"path": "rows:prices", "licence": "own", "fields": {"prompt": "q", "completion": "a"}},
        ]
    }
    prices = polars.DataFrame({"q": [f"Price of {number}?" for number in range(5)], "a": range(5)})
    made = sartor.curate(recipe, tmp_path / "data", rows={"prices": prices})
    assert made.read == 45
    assert {origin.source for row in sartor.read_examples(made.dataset) for origin in row.origins} >= {"rows:prices"}


def test_parts_called_test_are_held_out(tmp_path: Path) -> None:
    parts = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(FAQ[:20]), "test": datasets.Dataset.from_list(FAQ[20:])}
    )
    made = sartor.curate(rows=parts, out=tmp_path / "data", licence="own")
    assert made.counts["splits"] == {"train": 20, "eval": 10}
    assert {row.origins[0].source for row in sartor.read_examples(made.dataset, "eval")} == {"rows:test"}


def test_resume_finds_the_finished_dataset_and_refuses_other_rows(tmp_path: Path) -> None:
    first = sartor.curate(rows=FAQ, out=tmp_path / "data")
    again = sartor.curate(rows=pandas.DataFrame(FAQ), out=tmp_path / "data", resume=True)
    assert again.dataset.id == first.dataset.id
    with pytest.raises(ConfigError, match="sources that have changed"):
        sartor.curate(rows=FAQ[1:], out=tmp_path / "data", resume=True)
    with pytest.raises(ConfigError, match="means rows that were given from Python"):
        sartor.curate(first.dataset.manifest["recipe"], tmp_path / "other")
    assert not list(tmp_path.glob("*.curating"))


def test_malformed_rows_are_drops_with_their_number(tmp_path: Path) -> None:
    rows = [*FAQ, {"question": "And?"}, {"question": "\ud800", "answer": "half"}, {"text": "other form"}]
    made = sartor.curate(rows=rows, out=tmp_path / "data")
    drops = {drop.locator: drop.reason for drop in sartor.read_drops(made.dataset)}
    assert made.kept == 30 and set(drops) == {"rows:31", "rows:32", "rows:33"}
    assert drops["rows:32"] == "not_utf8"
    with pytest.raises(SourceError, match="rows:31"):
        sartor.curate(rows=rows, out=tmp_path / "strict", strict=True)


def test_unstated_licence_is_noticed_and_not_assumed(tmp_path: Path) -> None:
    lines: list[str] = []
    made = sartor.curate(rows=FAQ, out=tmp_path / "data", notice=lines.append)
    assert made.dataset.licence == "NOASSERTION" and any("no licence is stated" in line for line in lines)


def test_values_are_kept_or_absent(tmp_path: Path) -> None:
    kept = {
        "time": (np.datetime64("2026-01-01T10:00", "s"), "2026-01-01T10:00:00"),
        "day": (datetime.date(2026, 1, 2), "2026-01-02"),
        "price": (decimal.Decimal("1.50"), "1.50"),
        "count": (np.int64(3), 3),
        "flag": (np.bool_(True), True),
        "list": ((1, np.float32(0.5)), [1, 0.5]),
        "nested": ({"a": None, "b": {"c": np.arange(2)}}, {"b": {"c": [0, 1]}}),
        "id": (uuid.UUID(int=1), str(uuid.UUID(int=1))),
        "infinite": (float("inf"), "inf"),
        "path": (Path("a/b.txt"), "a/b.txt"),
        7: ("seven", "seven"),
    }
    absent = {"nan": float("nan"), "none": None, "nat": pandas.NaT, "na": pandas.NA, "numpy": np.datetime64("NaT")}
    (row,) = written([{**{name: value for name, (value, _) in kept.items()}, **absent}], tmp_path)
    assert row == {str(name): value for name, (_, value) in kept.items()}


def test_pandas_columns_keep_their_types(tmp_path: Path) -> None:
    frame = pandas.DataFrame(
        {
            "category": pandas.Categorical(["x", "y"]),
            "whole": pandas.array([1, None], dtype="Int64"),
            "moment": pandas.to_datetime(["2026-01-01", None]),
            "number": [2, 3],
            "fraction": [0.5, None],
        },
        index=pandas.Index(["k1", "k2"], name="key"),
    )
    first, second = written(frame, tmp_path)
    assert first == {
        "key": "k1",
        "category": "x",
        "whole": 1,
        "moment": "2026-01-01T00:00:00",
        "number": 2,
        "fraction": 0.5,
    }
    assert second == {"key": "k2", "category": "y", "number": 3}


def test_index_that_is_not_read_is_noted(tmp_path: Path) -> None:
    frame = pandas.DataFrame(FAQ[:2], index=["a", "b"])
    assert any("reset_index" in note for note in python_rows.write_rows(frame, tmp_path).notes)
    filtered = pandas.DataFrame(FAQ)[lambda table: table.index > 3]
    assert not python_rows.write_rows(filtered, tmp_path).notes


def test_class_numbers_become_names(tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    found = python_rows.write_rows(rows, tmp_path)
    assert [row.get("label") for _, row in found.head] == ["good", "bad", None]
    assert list(found.notes) == ["label: class numbers are written as their names"]


def test_images_of_every_kind_are_the_same_examples(tmp_path: Path) -> None:
    """Bytes, a file's path, a picture of Pillow, and the `datasets` library's column."""
    contents = [png((index * 20, 0, 0)) for index in range(6)]
    files = []
    for index, content in enumerate(contents):
        files.append(tmp_path / f"{index}.png")
        files[-1].write_bytes(content)
    answers = [f"red {index}" for index in range(6)]
    features = datasets.Features(
        {"question": datasets.Value("string"), "image": datasets.Image(), "answer": datasets.Value("string")}
    )
    questions = ["How red?"] * 6
    columns = {"question": questions, "image": [str(file) for file in files], "answer": answers}
    kinds: dict[str, Any] = {
        "bytes": contents,
        "paths": files,
        "pillow": [Image.open(io.BytesIO(content)) for content in contents],
    }
    made = {}
    for kind, pictures in kinds.items():
        rows = [
            {"question": question, "image": picture, "answer": answer}
            for question, picture, answer in zip(questions, pictures, answers, strict=True)
        ]
        made[kind] = sartor.curate(rows=rows, out=tmp_path / kind)
    made["datasets"] = sartor.curate(
        rows=datasets.Dataset.from_dict(columns, features=features), out=tmp_path / "datasets"
    )
    ids = {kind: [row.id for row in sartor.read_examples(result.dataset)] for kind, result in made.items()}
    assert len(ids["bytes"]) == 6 and ids["bytes"] == ids["paths"] == ids["datasets"]
    assert made["pillow"].kept == 6
    assert len(list((tmp_path / "bytes/media").iterdir())) == 6


def test_bytes_in_a_parquet_column_of_two_pictures(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": "Which is red?",
            "images": [{"bytes": png((200, 0, 0)), "path": None}, png((0, 200, 0))],
            "completion": "1",
        }
    ]
    made = sartor.curate(rows=rows, out=tmp_path / "data", recipe={"split": {"eval_fraction": 0.0}})
    (example,) = sartor.read_examples(made.dataset)
    assert [part.kind for part in example.messages[0].content] == ["image", "image", "text"]


REFUSED: dict[str, tuple[Any, type[SartorError], str, str]] = {
    "no row": ([], SourceError, "holds no row", "question"),
    "empty frame": (pandas.DataFrame(), SourceError, "holds no row", "question"),
    "texts": (["a", "b"], ConfigError, "row 1 is a str", '{"text": text}'),
    "a path": ("rows.csv", ConfigError, "rows is 'rows.csv'", '"path"'),
    "a number": (3, ConfigError, "holds no rows", "DataFrame"),
    "columns": ({"question": ["a"], "answer": ["b"]}, ConfigError, "'question' holds a list", "pandas.DataFrame"),
    "one row": (FAQ[0], ConfigError, "'question' holds a str", "[row]"),
    "two columns of a name": (
        pandas.DataFrame([[1, 2]], columns=["a", "a"]),
        ConfigError,
        "two columns are called 'a'",
        "frame.columns",
    ),
    "levels": (
        pandas.DataFrame([[1]], columns=pandas.MultiIndex.from_tuples([("a", "b")])),
        ConfigError,
        "2 levels",
        "join",
    ),
    "two spellings": ([{1: "a", "1": "b"}], SourceError, "two columns called '1'", "name"),
    "lazy": (polars.LazyFrame({"a": [1]}), ConfigError, "LazyFrame", "collect"),
    "an object": ([{"text": object()}], SourceError, "row 1: the column 'text' holds a object", "str("),
    "a nested object": ([{"text": [{"a": 1j}]}], SourceError, "'text.a' holds a complex", "str("),
    "bytes": ([{"text": b"abc"}], SourceError, "no image or recording", "decode"),
    "unknown columns": (
        [{"Frage": "a", "Antwort": "b"}],
        ConfigError,
        "'Frage', 'Antwort'",
        "fields={\"prompt\": 'Frage'",
    ),
    "an absent picture": ([{"text": "a", "image": Path("none.png")}], SourceError, "none.png", "ls"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_names_the_place_and_the_remedy(name: str, tmp_path: Path) -> None:
    rows, kind, problem, remedy = REFUSED[name]
    with pytest.raises(kind) as raised:
        sartor.curate(rows=rows, out=tmp_path / "data")
    assert problem in raised.value.problem and remedy in raised.value.remedy
    assert not list(tmp_path.iterdir())


def test_unknown_columns_are_refused_before_all_rows_are_read(tmp_path: Path) -> None:
    taken: list[int] = []

    def produce() -> Iterator[dict[str, str]]:
        for number in range(100_000):
            taken.append(number)
            yield {"Frage": "a", "Antwort": "b"}

    with pytest.raises(ConfigError, match="'Frage', 'Antwort'"):
        sartor.curate(rows=produce(), out=tmp_path / "data")
    assert len(taken) == 50


def test_row_that_holds_itself_is_refused(tmp_path: Path) -> None:
    row: dict[str, Any] = {"text": "a"}
    row["self"] = row
    with pytest.raises(SourceError, match="row 1 is nested too deeply"):
        sartor.curate(rows=[row], out=tmp_path / "data")


def test_fields_name_the_columns(tmp_path: Path) -> None:
    rows = [{"Frage": f"Was kostet {number}?", "Antwort": number} for number in range(10)]
    fields = {"prompt": "Frage", "completion": "Antwort"}
    made = sartor.curate(rows=rows, out=tmp_path / "data", fields=fields, system="Antworte kurz.")
    example = next(sartor.read_examples(made.dataset))
    assert (example.messages[0].text, example.reply.isdigit()) == ("Antworte kurz.", True)


def test_options_of_rows_without_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="licence describe rows"):
        sartor.curate({"sources": ["a.jsonl"]}, tmp_path / "data", licence="own")
    with pytest.raises(ConfigError, match="neither a recipe nor rows"):
        sartor.curate(out=tmp_path / "data")
    with pytest.raises(ConfigError, match="no place"):
        sartor.curate(rows=FAQ)
    with pytest.raises(ConfigError, match="the recipe is a DataFrame"):
        sartor.curate(pandas.DataFrame(FAQ), tmp_path / "data")  # type: ignore[arg-type]


def test_rows_are_taken_over_one_batch_at_a_time(tmp_path: Path) -> None:
    """Of a generator no row is read before it is written, but for the file's buffer."""
    ahead = 0

    def produce() -> Iterator[dict[str, str]]:
        nonlocal ahead
        for number in range(5000):
            if number % 1000 == 999:
                ahead = max(ahead, number - sum(counts[-1:]))
            yield {"text": f"row {number} " + "x" * 100}

    counts: list[int] = [0]
    assert python_rows.write_rows(produce(), tmp_path, on_rows=counts.append).count == 5000
    assert ahead <= python_rows.BATCH_ROWS and counts[-1] == 4096
