"""Rows with pictures and recordings beside rows of text, through the whole of a recipe: what is a reason to go, and what is not."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import sartor
from media_files import bomb, scene, tone
from sample_data import write_jsonl
from sartor.cli import main
from sartor.core.records import Example
from sourcing import chat

ASKED = "Which part of the pump is shown here, and is it worn?"


def part(name: str) -> dict[str, str]:
    kind = "audio" if name.endswith(".wav") else "image"
    return {"type": kind, kind: name}


def about(name: str, reply: str, asked: str = ASKED) -> dict[str, Any]:
    return chat([part(name), *([{"type": "text", "text": asked}] if asked else [])], reply)


def write_media(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for seed in range(7):
        scene(seed).save(folder / f"p{seed}.png")
    scene(0).save(folder / "p0-again.jpg", quality=85)
    for number in range(3):
        soundfile.write(folder / f"c{number}.wav", tone(3.0) * (number + 1) / 3, 16_000)
    soundfile.write(folder / "silent.wav", np.zeros(16_000), 16_000)


ROWS = [
    about("p0.png", "It is the inlet valve, and it is not worn."),
    about("p0.png", "It is the inlet valve, and it is not worn."),  # 2: the same in all
    about("p1.png", "It is the inlet valve, and it is not worn."),  # the same text, another picture
    about("p0-again.jpg", "It is the inlet valve, and it is not worn."),  # 4: the same picture, compressed
    about("p2.png", "It is the seal; ask jane.roe@example.org about it."),
    about("p3.png", "It is the seal, and it is worn."),  # 6: the picture of an item of the evaluation set
    about("p4.png", "no"),  # 7: too short
    about("p5.png", "It is the outlet valve, and it is new."),
    about("p5.png", "There are four screws in the picture.", "How many screws are there to be seen?"),
    about("c0.wav", "The pump in the hall runs again.", ""),
    about("c1.wav", "The pump in the hall runs again.", ""),  # the same words, another recording
    about("silent.wav", "The pump in the hall runs again.", ""),  # 12
    about(
        "c2.wav", "Die Pumpe in der Halle läuft heute wieder ohne jede Störung, sagt der Monteur.", ""
    ),  # 13: German
    chat(
        "How often is the oil of the pump in the hall changed by us?",
        "The oil of the pump is changed every two years.",
    ),
    chat(
        "How often is the oil of the pump in the hall changed by us?",
        "The oil of the pump is changed every  two years!",
    ),  # 15
]
STEPS = [
    "repair_text",
    {"exact_duplicates": {"match": "words"}},
    {"length": {"min_words": 2}},
    {"language": {"allow": ["en"]}},
    "personal_data",
    "images",
    "audio",
    "near_duplicates",
    "image_duplicates",
    {"suspicious_labels": {"encoder": "tfidf"}},
]


def test_media_rows_are_dropped_by_media_not_shared_prompt(tmp_path: Path) -> None:
    """Groups, copies, evidence, licences and revocation also hold over a whole recipe."""
    write_media(tmp_path / "in")
    write_media(tmp_path / "eval")
    write_jsonl(tmp_path / "in" / "rows.jsonl", ROWS)
    held = write_jsonl(tmp_path / "eval" / "held.jsonl", [about("p3.png", "It is the seal, and it is worn.")])
    shared = write_jsonl(tmp_path / "in" / "shared.jsonl", [about("p6.png", "It is the shaft, and it is worn.")])
    said = {
        "sources": [
            {"path": str(tmp_path / "in" / "rows.jsonl"), "licence": "CC-BY-4.0", "share_alike": True},
            {"path": str(shared), "licence": "CC-BY-SA-4.0"},
        ],
        "steps": [
            *STEPS,
            {"contamination": {"against": [str(held)]}},
            {"augment_images": {"copies": 2}},
            "augment_audio",
        ],
        "split": {"eval_fraction": 0.3},
    }
    made = sartor.curate(said, tmp_path / "d")
    places = {drop.locator: drop.reason for drop in sartor.read_drops(made.dataset)}
    assert places == {
        "rows.jsonl:2": "exact_duplicate",
        "rows.jsonl:4": "image_duplicate",
        "rows.jsonl:6": "contamination",
        "rows.jsonl:7": "too_short",
        "rows.jsonl:12": "silent_audio",
        "rows.jsonl:13": "language",
        "rows.jsonl:15": "exact_duplicate",
    }
    rows = list(sartor.read_examples(made.dataset))
    own = {row.origins[0].locator: row for row in rows if not row.is_derived}
    assert made.read == 16 and len(own) == 16 - len(places)
    assert [origin.locator for origin in own["rows.jsonl:1"].origins] == ["rows.jsonl:1", "rows.jsonl:2"]
    assert "<EMAIL_1>" in own["rows.jsonl:5"].reply and own["rows.jsonl:5"].messages[0].content[0].kind == "image"
    assert own["rows.jsonl:8"].group == own["rows.jsonl:9"].group, "two questions about one picture"
    assert len({own[f"rows.jsonl:{n}"].group for n in (1, 3, 5, 8, 10, 11, 14)}) == 7
    copies = Counter(row.origins[0].parents[0] for row in rows if row.is_derived)
    assert copies == {row.id: 2 for row in own.values() if row.split == "train" and has_media(row)}
    unjudged = made.dataset.manifest["steps"]["suspicious_labels"]["rows_with_media"]
    assert unjudged == len([*filter(has_media, own.values())]) + 1, "the one that contamination took later among them"
    stored = {f"media/{file.name}" for file in (made.dataset.path / "media").iterdir()}
    assert used(rows) < stored and len(stored - used(rows)) == 1, "that of the row set aside by image_duplicates"
    assert made.dataset.manifest["licence"] == "CC-BY-4.0 AND CC-BY-SA-4.0"
    gone = sartor.revoke(made.dataset.path, source=str(shared)).examples
    assert {row.id for row in rows if row.origins[0].locator == "shared.jsonl:1"} == set(gone)


def has_media(row: Example) -> bool:
    return any(part.media for message in row.messages for part in message.content)


def used(rows: list[Example]) -> set[str]:
    return {part.media for row in rows for message in row.messages for part in message.content if part.media}


# --- a picture that is of no use, in every form of a row


def in_parts(name: str, marks: int) -> dict[str, Any]:
    content = [*({"type": "image"} for _ in range(marks)), {"type": "text", "text": "What is it?"}]
    return (
        chat(content, f"It is {name} {marks}.") | {"images": [name]} if marks != 1 else about(name, f"It is {name}.")
    )


def in_marks(name: str, marks: int) -> dict[str, Any]:
    return chat("<image>" * marks + "What is it?", f"It is {name} {marks}.") | {"images": [name]}


def in_cells(name: str, marks: int) -> dict[str, Any]:
    return {
        "image": name,
        "question": ("<image>" * marks if marks > 1 else "") + "What is it?",
        "answer": f"It is {name} {marks}.",
    }


USELESS = {
    "absent.png": "missing_media",
    "cut.png": "unreadable_image",
    "empty.png": "bad_media",
    "bomb.png": "image_bomb",
    "marks": "placeholder_count",
}


@pytest.mark.parametrize(("form", "suffix"), [(in_parts, "jsonl"), (in_marks, "jsonl"), (in_cells, "csv")])
def test_every_useless_picture_is_a_counted_drop_of_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: Callable[[str, int], dict[str, Any]], suffix: str
) -> None:
    scene(1).save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:-700])
    (tmp_path / "empty.png").write_bytes(bomb(0))
    (tmp_path / "bomb.png").write_bytes(bomb(100_000))
    rows = [form("good.png", 1), *(form(name, 1) for name in USELESS if name != "marks"), form("good.png", 2)]
    file = tmp_path / f"rows.{suffix}"
    if suffix == "csv":
        file.write_text("\n".join([",".join(rows[0]), *(",".join(row.values()) for row in rows)]))
    else:
        write_jsonl(file, rows)
    (tmp_path / "curate.json").write_text(
        json.dumps({"sources": [{"path": str(file), "licence": "MIT"}], "steps": ["images"]})
    )
    with pytest.raises(SystemExit) as ended:
        main(["curate", str(tmp_path / "curate.json"), "--out", str(tmp_path / "d"), "--json"])
    assert ended.value.code == 0
    said = json.loads(capsys.readouterr().out)
    assert said["dropped"] == dict.fromkeys(USELESS.values(), 1)
    assert (said["read"], said["kept"]) == (6, 1)
    assert len(list((tmp_path / "d" / "media").iterdir())) == 1
