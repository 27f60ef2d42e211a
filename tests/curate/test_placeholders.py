"""Media that a row names beside its turns: each mark is one of them, and none is left over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import sartor
from conftest import write_jsonl
from sartor.core import rows


def curated(tmp_path: Path, *said: dict[str, Any]) -> tuple[list[list[tuple[str, str]]], dict[str, int]]:
    """(content of the user's turns as (kind, text or file), reasons of drops)."""
    folder = tmp_path / "in"
    folder.mkdir()
    for place, name in enumerate(("a.png", "b.png")):
        Image.new("RGB", (40, 40), (place * 99, 9, 9)).save(folder / name)
    write_jsonl(folder / "rows.jsonl", list(said))
    made = sartor.curate({"sources": [str(folder / "rows.jsonl")], "split": {"eval_fraction": 0}}, tmp_path / "d")
    found = list(rows.read_examples(made.dataset))
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
        {"conversations": [{"from": "human", "value": "<image>what is it"}, {"from": "gpt", "value": "red"}], "image": "a.png"},
    ],
)
def test_no_form_loses_the_picture_that_its_row_names(tmp_path: Path, row: dict[str, Any]) -> None:
    shown, dropped = curated(tmp_path, row)
    assert [kind for kind, _ in shown[0]] == ["image", "text"] and not dropped


def test_a_missing_file_is_a_drop_and_said(tmp_path: Path) -> None:
    _, dropped = curated(tmp_path, chat("<image>", image="a.png"), chat("<image>", image="none.png"))
    assert dropped == {"missing_media": 1}
    assert "none.png" in json.dumps([drop.detail for drop in rows.read_drops(sartor.open(tmp_path / "d"))])
