"""The rows that examples/media writes: what a note may say, what the table answers, which dictation contradicts its picture."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

EXAMPLE = Path(__file__).parent.parent / "examples/media"
KINDS = ("nominal", "local", "global")


def opened(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{name}_rows", EXAMPLE / name / "rows.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for kind in KINDS:
        (tmp_path / "in" / kind).mkdir(parents=True)
        for number in range(20):
            Image.new("L", (8, 8), number).save(tmp_path / "in" / kind / f"{number:02}.jpg")
    return tmp_path / "in"


def written(folder: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def test_textile_notes_name_no_defect_and_critical_stops_line(images: Path, tmp_path: Path) -> None:
    """Severity critical and the action STOP THE LINE go together; the splits share no group."""
    module = opened("textile")
    module.write(tmp_path / "out", images, 20, is_spoken=False)
    train, held_out = (written(tmp_path / "out", split) for split in ("train", "eval"))
    assert (len(train), len(held_out)) == (48, 12)
    replies = []
    for row in train + held_out:
        picture, note = row["messages"][1]["content"]
        assert (tmp_path / "out" / picture["image"]).is_file()
        assert not {"defect", "local", "global", "nominal", "fault", "spot"} & set(note["text"].lower().split())
        replies.append(json.loads(row["messages"][2]["content"]))
    assert {reply["action"] for reply in replies if reply["severity"] == "critical"} == {"STOP THE LINE"}
    assert {reply["severity"] for reply in replies if reply["action"] == "STOP THE LINE"} == {"critical"}
    assert not {row["group"] for row in train} & {row["group"] for row in held_out}
    assert not set(module.TRAIN) & set(module.HELD_OUT)
    rule = (EXAMPLE / "textile/rules.yaml").read_text()
    repairs = {action for _, action in module.protocols().values()} - {"OK", "STOP THE LINE"}
    assert all(repair in rule for repair in repairs)


def test_drafts_flag_dictations_that_contradict_the_image(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`disagree` is true in 10 to 50 % of the rows; next_check is by dictation and image."""
    module = opened("dictation")

    def unspoken(clips: list[Any], folder: Path, **options: Any) -> list[Any]:
        return [
            type(clip)(clip.text, clip.voice, clip.speed, folder / f"{place}.flac") for place, clip in enumerate(clips)
        ]

    monkeypatch.setattr(module, "say_many", unspoken)
    module.write(tmp_path / "out", images, 20, 0.3)
    drafts = [
        json.loads(row["messages"][2]["content"])
        for split in ("train", "eval")
        for row in written(tmp_path / "out", split)
    ]
    assert all(draft["disagree"] == (draft["dictation"] != draft["image"]) for draft in drafts)
    assert 0.1 < sum(draft["disagree"] for draft in drafts) / len(drafts) < 0.5
    assert {
        (draft["dictation"], draft["image"]): draft["next_check"] for draft in drafts
    }.items() <= module.checks().items()
    for known, unheard in module.FINDINGS.values():
        assert not set(known) & set(unheard)
