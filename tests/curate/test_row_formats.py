"""Media that a row names beside its turns: each mark is one of them, and none is left over."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image

import sartor
from sample_data import write_jsonl
from sartor.core import parquet_io
from sartor.curate.sources import row_formats


def curated(tmp_path: Path, *said: dict[str, Any]) -> tuple[list[list[tuple[str, str]]], dict[str, int]]:
    """(content of the user's turns as (kind, text or file), reasons of drops)."""
    folder = tmp_path / "in"
    folder.mkdir()
    for place, name in enumerate(("a.png", "b.png")):
        Image.new("RGB", (40, 40), (place * 99, 9, 9)).save(folder / name)
    write_jsonl(folder / "rows.jsonl", list(said))
    made = sartor.curate({"sources": [str(folder / "rows.jsonl")], "split": {"eval_fraction": 0}}, tmp_path / "d")
    found = list(parquet_io.read_examples(made.dataset))
    pictures = {file.name: place for place, file in enumerate(sorted((tmp_path / "d" / "media").glob("*")))}
    shown = [
        [
            (part.kind, part.text or str(pictures[Path(part.media).name]))
            for message in row.messages[:-1]
            for part in message.content
        ]
        for row in found
    ]
    return shown, made.dataset.manifest["counts"]["dropped"]


def chat(text: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}], **more}


def test_marks_become_the_media_in_their_order(tmp_path: Path) -> None:
    shown, dropped = curated(
        tmp_path,
        chat("<image>\nWhat is wrong?", images=["a.png"]),
        chat("<image> or <image>?", images=["a.png", "b.png"]),
        chat([{"type": "text", "text": "look"}, {"type": "image"}], images=["b.png"]),
        chat("no picture, but <image> in a text"),
    )
    kinds = [[kind for kind, _ in turn] for turn in shown]
    assert kinds == [["image", "text"], ["image", "text", "image", "text"], ["text", "image"], ["text"]]
    assert shown[0][1] == ("text", "What is wrong?") and shown[1][0] != shown[1][2] and not dropped


@pytest.mark.parametrize(
    "row",
    [
        chat("<image> <image>", images=["a.png"]),
        chat("<image>", images=["a.png", "b.png"]),
        chat("what is it", image="a.png"),
        chat("<audio>", image="a.png"),
        chat([{"type": "image"}, {"type": "image"}], images=["a.png"]),
    ],
)
def test_a_wrong_count_is_a_drop(tmp_path: Path, row: dict[str, Any]) -> None:
    shown, dropped = curated(tmp_path, chat("<image>", image="a.png"), row)
    assert len(shown) == 1 and dropped == {"placeholder_count": 1}


@pytest.mark.parametrize(
    "row",
    [
        {"question": "what is it", "answer": "red", "image": "a.png"},
        {"prompt": "what is it", "completion": "red", "image": "a.png"},
        {"instruction": "what is it", "output": "red", "images": ["a.png"]},
        {
            "conversations": [{"from": "human", "value": "<image>what is it"}, {"from": "gpt", "value": "red"}],
            "image": "a.png",
        },
    ],
)
def test_no_form_loses_the_picture_that_its_row_names(tmp_path: Path, row: dict[str, Any]) -> None:
    shown, dropped = curated(tmp_path, row)
    assert [kind for kind, _ in shown[0]] == ["image", "text"] and not dropped


def test_a_missing_file_is_a_drop_and_said(tmp_path: Path) -> None:
    _, dropped = curated(tmp_path, chat("<image>", image="a.png"), chat("<image>", image="none.png"))
    assert dropped == {"missing_media": 1}
    assert "none.png" in json.dumps([drop.detail for drop in parquet_io.read_drops(sartor.open(tmp_path / "d"))])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "what is it", "chosen": "red", "rejected": "blue", "image": "a.png"},
        {
            "prompt": "<image> or <image>?",
            "chosen": "the first",
            "rejected": "the other",
            "images": ["a.png", "b.png"],
        },
        {"text": "a red square", "image": "a.png"},
        {"question": "which is red", "answer": "the first", "images": '["a.png", "b.png"]'},
    ],
)
def test_preference_caption_and_list_rows_keep_their_images(tmp_path: Path, row: dict[str, Any]) -> None:
    """A list of files may be JSON in a text cell."""
    shown, dropped = curated(tmp_path, row)
    wanted = 2 if "images" in row else 1
    assert [kind for kind, _ in shown[0]].count("image") == wanted and not dropped


def test_image_part_without_a_named_image_is_dropped(tmp_path: Path) -> None:
    """The reason is placeholder_count."""
    _, dropped = curated(
        tmp_path, chat("<image>", image="a.png"), chat([{"type": "image"}, {"type": "text", "text": "?"}])
    )
    assert dropped == {"placeholder_count": 1}


def test_recordings_and_pictures_in_openais_spelling_are_taken(tmp_path: Path) -> None:
    out = io.BytesIO()
    soundfile.write(out, [0.0, 0.1] * 400, 8000, format="WAV")
    heard = {
        "type": "input_audio",
        "input_audio": {"data": base64.b64encode(out.getvalue()).decode(), "format": "wav"},
    }
    shown, dropped = curated(tmp_path, chat([heard, {"type": "image_url", "image_url": {"url": "a.png"}}]))
    assert [kind for kind, _ in shown[0]] == ["audio", "image"] and not dropped


def test_parquet_as_the_hub_writes_it_holds_its_pictures_itself(tmp_path: Path) -> None:
    out = io.BytesIO()
    Image.new("RGB", (40, 40), (9, 9, 9)).save(out, "BMP")
    row = {"question": "what is it", "answer": "black", "image": {"bytes": out.getvalue(), "path": "x.bmp"}}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    made = sartor.curate({"sources": [str(tmp_path / "a.parquet")], "split": {"eval_fraction": 0}}, tmp_path / "d")
    (found,) = parquet_io.read_examples(made.dataset)
    (file,) = (tmp_path / "d" / "media").iterdir()
    assert file.suffix == ".bmp" and file.read_bytes() == out.getvalue()
    assert [part.kind for part in found.messages[0].content] == ["image", "text"]


@pytest.mark.parametrize(
    ("columns", "first", "second", "suggested"),
    [
        # a number or code of the row is neither, nor is a date
        (("ref no", "Complaint", "Department"), ("R-1", "My knee hurts a lot", "ortho"), ("R-2", "No one called me", "ortho"), ("Complaint", "Department")),
        (("id", "created on", "Frage", "Antwort"), (1, "2026-01-01 10:00", "Wie öffne ich das?", "So."), (2, "2026-01-02 11:00", "Wie schließe ich es?", "Anders."), ("Frage", "Antwort")),
        # a label may come first, and a name is shorter than what is asked
        (("label", "review"), ("good", "I liked it very much"), ("good", "It came on the same day"), ("review", "label")),
        (("name", "asked", "said"), ("Ann Li", "When do you open today?", "At nine."), ("Bo Ek", "Is there a lift in it?", "Yes."), ("asked", "said")),
        # a number is the answer where nothing else is
        (("item", "price"), ("a large blue umbrella", 12), ("a small table of oak", 80), ("item", "price")),
        (("問題", "回答"), ("これは何ですか", "机です"), ("どこですか", "駅です"), ("問題", "回答")),
        (("a", "b"), ("x", "1"), ("y", "2"), ("a", "b")),
        (("text of a row",), ("one row of words",), ("one more of them",), ("text of a row", "COLUMN")),
    ],
)  # fmt: skip
def test_columns_of_an_unknown_format_are_suggested(
    columns: tuple[str, ...], first: tuple[Any, ...], second: tuple[Any, ...], suggested: tuple[str, str]
) -> None:
    rows = [dict(zip(columns, row, strict=True)) for row in (first, second)]
    assert row_formats.suggest_columns(rows) == suggested
