"""Augmentation: copies of training rows with changed media; the split, lineage, resume and counts hold."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import soundfile
from PIL import Image

import sartor
from conftest import write_jsonl
from sartor.core.errors import ConfigError, StoppedError
from sartor.core.records import Example, Message, Origin, Part
from sartor.core.sounds import read_sound
from sartor.curate import local
from sartor.curate.steps.augment_audio import AugmentAudio
from sartor.curate.steps.augment_images import AugmentImages, Light
from sartor.curate.steps.contract import Copy
from sartor.evaluate.held_out import HeldOut

RATE = 16_000


def picture(seed: int, width: int = 60, height: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8))


def tone(seconds: float = 0.5, hertz: float = 440, rate: int = RATE) -> Any:
    return 0.3 * np.sin(np.arange(int(seconds * rate)) / rate * hertz * 2 * np.pi)


def asked(reply: str, *parts: dict[str, str], **more: Any) -> dict[str, Any]:
    content = [*parts, {"type": "text", "text": "What is it?"}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": reply}], **more}


def write_rows(folder: Path, count: int = 8, more: Sequence[dict[str, Any]] = ()) -> str:
    """Rows with a picture or a clip each, and one of text."""
    folder.mkdir(exist_ok=True)
    rows = []
    for n in range(count):
        picture(n).save(folder / f"{n}.png")
        soundfile.write(folder / f"{n}.wav", tone(hertz=200 + 50 * n), RATE)
        rows.append(asked(f"picture {n}", {"type": "image", "image": f"{n}.png"}))
        rows.append(asked(f"clip {n}", {"type": "audio", "audio": f"{n}.wav"}))
    write_jsonl(folder / "rows.jsonl", [*rows, asked("only text"), *more])
    return str(folder / "rows.jsonl")


def recipe(path: str, *steps: Any, **more: Any) -> dict[str, Any]:
    listed = [{"augment_images": {"copies": 3}}, {"augment_audio": {"copies": 2}}]
    return {"sources": [{"path": path, "licence": "MIT"}], "steps": ["exact_duplicates", *(steps or listed)], "split": {"eval_fraction": 0.25}, **more}


def table(dataset: Any) -> pl.DataFrame:
    return pl.read_parquet(dataset.path / "examples" / "*.parquet")


def test_training_rows_are_copied_with_their_lineage_and_held_out_rows_never(tmp_path: Path) -> None:
    made = sartor.curate(recipe(write_rows(tmp_path / "in")), tmp_path / "d")
    rows = {row.id: row for row in sartor.read_examples(made.dataset)}
    copies = [row for row in rows.values() if row.origins[0].parents]
    parents = [rows[row.origins[0].parents[0]] for row in copies]
    assert made.read == 17 and made.made == len(copies) and made.kept == 17 + len(copies)
    held_out = [row for row in rows.values() if row.split == "eval"]
    assert held_out and not {row.id for row in parents} & {row.id for row in held_out}
    for row, parent in zip(copies, parents, strict=True):
        assert (row.split, row.group, row.reply) == ("train", parent.group, parent.reply) and parent.split == "train"
        kind = parent.messages[0].content[0].kind
        assert row.origins[0].step == row.steps[-1] == f"augment_{'images' if kind == 'image' else 'audio'}"
        assert row.messages[0].content[0].media != parent.messages[0].content[0].media
        assert (made.dataset.path / row.messages[0].content[0].media).is_file()
    with_media = [row for row in rows.values() if row.split == "train" and not row.origins[0].parents and row.reply != "only text"]
    per_kind = {kind: sum(row.messages[0].content[0].kind == kind for row in with_media) for kind in ("image", "audio")}
    assert len(copies) == 3 * per_kind["image"] + 2 * per_kind["audio"]
    counts = made.dataset.manifest["counts"]
    assert counts["splits"]["train"] == 17 - len(held_out) + len(copies)
    assert made.dataset.manifest["sources"][0]["kept"] == 17
    assert made.dataset.manifest["steps"]["augment_images"] == {
        "rows": per_kind["image"], "copies": 3 * per_kind["image"], "dropped": 0
    }  # fmt: skip
    assert made.as_json()["made"] == len(copies)
    said = pl.read_parquet(made.dataset.path / "evidence" / "copies.parquet")
    assert set(said["id"]) == {row.id for row in copies} and "rotated by" in said["changes"][0]
    card = (made.dataset.path / "card.md").read_text()
    assert f"made of 17 rows read and {len(copies)} changed copies" in card and "do not add up" not in card
    assert len(HeldOut.of(made.dataset).examples) == len(held_out) if hasattr(HeldOut, "of") else True


def test_revoke_and_inspect_reach_the_copies(tmp_path: Path) -> None:
    made = sartor.curate(recipe(write_rows(tmp_path / "in")), tmp_path / "d")
    copy = next(row for row in sartor.read_examples(made.dataset) if row.origins[0].parents)
    (parent,) = copy.origins[0].parents
    gone = sartor.revoke(made.dataset.path, example=parent).examples
    assert copy.id in gone and len(gone) in (3, 4)
    above = sartor.inspect_example(made.dataset.path, copy.id)["ancestors"] if hasattr(sartor, "inspect_example") else None
    assert above is None or above[0]["id"] == parent
