"""Augmentation: copies of training rows with changed media; the split, lineage, resume and counts hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import soundfile
from PIL import Image

import sartor
from sample_data import write_jsonl
from sartor.core.errors import ConfigError, StoppedError
from sartor.core.records import Example, Message, Origin, Part
from sartor.curate import pipeline, shards
from sartor.curate.sources import media_files
from sartor.curate.step import AugmentedRow
from sartor.curate.steps.media_augmentation import AugmentAudio, AugmentImages, Light
from sartor.media.audio import read_sound
from sartor.media.images import open_image

RATE = 16_000
FLIP_ONLY: dict[str, Any] = {
    "flip": ["horizontal"],
    "rotation_degrees": 0,
    "crop": 1,
    "light": {"brightness": 0, "contrast": 0, "colour": 0},
}
STILL: dict[str, Any] = {"rotation_degrees": 0.0, "crop": 1.0, "light": Light(0, 0, 0)}
SILENT: dict[str, Any] = {"speed": 0.0, "gain_db": 0.0, "shift_s": 0.0}


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
    return {
        "sources": [{"path": path, "licence": "MIT"}],
        "steps": ["exact_duplicates", *(steps or listed)],
        "split": {"eval_fraction": 0.25},
        **more,
    }


def table(dataset: Any) -> pl.DataFrame:
    return pl.read_parquet(dataset.path / "examples" / "*.parquet")


def test_only_training_rows_are_augmented_with_lineage(tmp_path: Path) -> None:
    """Copies keep group and reply and name parent and step; manifest, evidence and card count them."""
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
    with_media = [
        row
        for row in rows.values()
        if row.split == "train" and not row.origins[0].parents and row.reply != "only text"
    ]
    per_kind = {
        kind: sum(row.messages[0].content[0].kind == kind for row in with_media) for kind in ("image", "audio")
    }
    assert len(copies) == 3 * per_kind["image"] + 2 * per_kind["audio"]
    counts = made.dataset.manifest["counts"]
    assert counts["splits"]["train"] == 17 - len(held_out) + len(copies)
    assert made.dataset.manifest["sources"][0]["kept"] == 17
    assert made.dataset.manifest["steps"]["augment_images"] == {
        "rows": per_kind["image"],
        "copies": 3 * per_kind["image"],
        "dropped": 0,
    }
    assert made.as_json()["made"] == len(copies)
    said = pl.read_parquet(made.dataset.path / "evidence" / "copies.parquet")
    assert set(said["id"]) == {row.id for row in copies} and "rotated by" in said["changes"][0]
    card = (made.dataset.path / "card.md").read_text()
    assert f"made of 17 rows read and {len(copies)} changed copies" in card and "do not add up" not in card


def test_revoke_and_inspect_reach_the_copies(tmp_path: Path) -> None:
    made = sartor.curate(recipe(write_rows(tmp_path / "in")), tmp_path / "d")
    copy = next(row for row in sartor.read_examples(made.dataset) if row.origins[0].parents)
    (parent,) = copy.origins[0].parents
    gone = sartor.revoke(made.dataset.path, example=parent).examples
    assert copy.id in gone and len(gone) in (3, 4)
    said = sartor.inspect(made.dataset.path, example=copy.id)
    assert said["ancestors"][0]["id"] == parent and said["changes"][0].startswith(f"{copy.steps[-1]}, copy 1: ")
    above = sartor.inspect(made.dataset.path, example=parent)
    assert sorted(above["made_from_it"]) == sorted(set(gone) - {parent}) and above["changes"] == []
    source = made.dataset.manifest["sources"][0]["source"]
    assert len(sartor.revoke(made.dataset.path, source=source).examples) == made.kept


def test_workers_and_interruption_give_equal_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One worker, two workers and a run resumed in the middle of the copies give one digest."""
    monkeypatch.setattr(pipeline, "WORTH_A_WORKER", 0)
    paths = [
        write_rows(tmp_path / f"in{n}", 3, [asked(f"other {n}", {"type": "image", "image": "0.png"})])
        for n in range(2)
    ]
    said = recipe(paths[0], {"augment_images": {"copies": 2}})
    said["sources"] = [{"path": path} for path in paths]
    one, two = (sartor.curate({**said, "workers": n}, tmp_path / f"d{n}").dataset for n in (1, 2))
    real, made = shards.execute, []

    def execute(task: Any) -> Any:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(task)
        return real(task)

    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr(pipeline, "execute", execute)
        sartor.curate({**said, "workers": 1}, tmp_path / "again")
    assert made[-1].copying, "it was to stop among the copies"
    again = sartor.curate({**said, "workers": 1}, tmp_path / "again")
    assert again.found == 3
    assert one.manifest["digest"] == two.manifest["digest"] == again.dataset.manifest["digest"]


def test_another_seed_or_row_is_changed_otherwise(tmp_path: Path) -> None:
    row = image_row(tmp_path)
    first, again, other = (changes(tmp_path, AugmentImages(copies=2, seed=seed), row) for seed in (0, 0, 1))
    assert first == again and len(set(first)) == 2 and not set(first) & set(other)


def test_rehearsal_is_copied_only_when_it_is_asked_for(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "in")
    for rehearsal, expected in ((False, 0), (True, 8)):
        step = {"augment_images": {"copies": 1, "rehearsal": rehearsal}}
        said = {"sources": [{"path": path, "rehearsal": True}], "steps": [step]}
        assert sartor.curate(said, tmp_path / "d", replace=True).made == expected


def test_a_copy_that_cannot_be_made_is_a_drop_and_the_row_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media_files, "MOST_DECODED", 0)  # else the row itself would be a Drop
    path = write_rows(tmp_path / "in")
    cut = (tmp_path / "in" / "3.png").read_bytes()
    (tmp_path / "in" / "3.png").write_bytes(cut[: len(cut) // 2])
    said = recipe(path, {"augment_images": {"copies": 3}}, split={"eval_fraction": 0})
    made = sartor.curate(said, tmp_path / "d")
    assert made.dropped == {"augment_images:unreadable_image": 3} and made.read == 17 and made.made == 24
    assert made.kept == 17 + 21 and made.dataset.manifest["steps"]["augment_images"]["dropped"] == 3
    drops = list(sartor.read_drops(made.dataset))
    assert {drop.detail[:7] for drop in drops} == {"copy 1 ", "copy 2 ", "copy 3 "} and not any(
        drop.id for drop in drops
    )
    assert "do not add up" not in (made.dataset.path / "card.md").read_text()


def test_equal_copies_are_drops(tmp_path: Path) -> None:
    said = recipe(
        write_rows(tmp_path / "in", 2), {"augment_images": FLIP_ONLY | {"copies": 6}}, split={"eval_fraction": 0}
    )
    made = sartor.curate(said, tmp_path / "d")
    rows = list(sartor.read_examples(made.dataset))
    assert made.made == 12 and made.dropped["exact_duplicate"] == 12 - (len(rows) - 5)
    assert len({row.id for row in rows}) == len(rows)
    named = {drop.kept for drop in sartor.read_drops(made.dataset)}
    assert named <= {row.id for row in rows}


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ([{"augment_images": {}}, "exact_duplicates"], "put augment_images last"),
        (
            ["augment_images", {"length": {"min_words": 1}}, "augment_audio"],
            "put augment_images and augment_audio last",
        ),
        (["augment_images", "augment_images"], "more copies"),
        ([{"augment_images": {"copies": 0}}], "copies: 2"),
        ([{"augment_images": {"rotation_degrees": 200}}], "rotation_degrees: 5"),
        ([{"augment_images": {"crop": 0}}], "crop: 0.9"),
        ([{"augment_images": {"jpeg_quality": 99}}], "jpeg_quality: 40"),
        ([{"augment_images": {"light": {"brightness": 1.5}}}], "brightness: 0.2"),
        ([{"augment_images": FLIP_ONLY | {"flip": []}}], "defaults"),
        ([{"augment_audio": {"speed": 0.6}}], "speed: 0.1"),
        ([{"augment_audio": {"noise_db": 1}}], "noise_db: 15"),
        ([{"augment_audio": {"speed": 0, "gain_db": 0, "shift_s": 0}}], "defaults"),
    ],
)
def test_what_cannot_be_is_refused_with_a_remedy(tmp_path: Path, steps: list[Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sartor.curate({"sources": ["rows.jsonl"], "steps": steps}, tmp_path / "d")
    assert says in caught.value.remedy


def test_another_threshold_is_refused_where_rows_were_copied(tmp_path: Path) -> None:
    made = sartor.curate(recipe(write_rows(tmp_path / "in"), "near_duplicates", "augment_images"), tmp_path / "d")
    with pytest.raises(ConfigError, match="augment_images copied"):
        sartor.rethreshold(made.dataset.path, tmp_path / "e", threshold=0.9)


# --- what the changes do to a picture and a recording


def image_row(folder: Path, *names: str) -> Example:
    (folder / "media").mkdir(exist_ok=True)
    parts = []
    for number, name in enumerate(names or ("a.png",)):
        picture(number).save(folder / "media" / name)
        parts.append(Part("image", media=f"media/{name}"))
    return Example((Message("user", tuple(parts)), Message.of("assistant", "yes")), (Origin("s", "s:1"),))


def sound_row(folder: Path, samples: Any, rate: int = RATE) -> Example:
    (folder / "media").mkdir(exist_ok=True)
    soundfile.write(folder / "media" / "a.wav", samples, rate)
    parts = (Part("audio", media="media/a.wav"),)
    return Example((Message("user", parts), Message.of("assistant", "yes")), (Origin("s", "s:1"),))


def copies(folder: Path, step: Any, row: Example) -> list[AugmentedRow]:
    made = list(step.open(folder)(row))
    assert all(isinstance(one, AugmentedRow) for one in made), made
    return made


def changes(folder: Path, step: Any, row: Example) -> list[str]:
    return [one.changes.partition(": ")[2] for one in copies(folder, step, row)]


def pictures(folder: Path, step: Any, row: Example) -> list[Any]:
    return [
        np.asarray(open_image(folder / one.row.messages[0].content[0].media)).astype(int)
        for one in copies(folder, step, row)
    ]


def clips(folder: Path, step: Any, row: Example, rate: int = RATE) -> list[Any]:
    return [read_sound(folder / one.row.messages[0].content[0].media, rate) for one in copies(folder, step, row)]


def test_a_picture_is_flipped_turned_cropped_and_lit(tmp_path: Path) -> None:
    row = image_row(tmp_path)
    before = np.asarray(picture(0)).astype(int)
    flipped = pictures(tmp_path, AugmentImages(copies=12, flip=("horizontal",), **STILL), row)
    same = [bool((one == before).all()) for one in flipped]
    assert True in same and False in same
    assert all(
        ((one == before) if kept else (one == before[:, ::-1])).all() for one, kept in zip(flipped, same, strict=True)
    )
    (turned,) = pictures(tmp_path, AugmentImages(copies=1, **(STILL | {"rotation_degrees": 180.0})), row)
    assert turned.shape == before.shape and (turned != before).any()
    for one in pictures(tmp_path, AugmentImages(copies=8, **(STILL | {"crop": 0.25})), row):
        assert 0.2 <= one.size / before.size <= 1 and abs(one.shape[1] / one.shape[0] - 1.5) < 0.1
    light = AugmentImages(copies=8, **(STILL | {"light": Light(0.5, 0, 0)}))
    factors = [float(said.split("times ")[1]) for said in changes(tmp_path, light, row)]
    for one, factor in zip(pictures(tmp_path, light, row), factors, strict=True):
        assert 0.5 <= factor <= 1.5 and abs(one - (before * factor).clip(0, 255)).max() <= 1.2  # cut off, not rounded


def test_rotation_adds_no_new_colour_in_the_corners(tmp_path: Path) -> None:
    """An image of one colour stays within 1 of it when it is rotated by up to 90 degrees."""
    row = image_row(tmp_path)
    Image.new("RGB", (60, 40), (200, 100, 50)).save(tmp_path / "media" / "a.png")
    for one in pictures(tmp_path, AugmentImages(copies=6, **(STILL | {"rotation_degrees": 90.0})), row):
        assert (abs(one - [200, 100, 50]) <= 1).all()


def test_blur_noise_and_compression_are_as_much_as_they_say(tmp_path: Path) -> None:
    row = image_row(tmp_path)
    before = np.asarray(picture(0)).astype(int)
    for one in pictures(tmp_path, AugmentImages(copies=3, blur=20.0, **STILL), row):
        assert one.std() < before.std()
    Image.new("RGB", (200, 200), (128, 128, 128)).save(tmp_path / "media" / "a.png")
    noisy = AugmentImages(copies=5, noise=30.0, **STILL)
    spreads = [float(said.split("noise of ")[1].split()[0]) for said in changes(tmp_path, noisy, row)]
    for one, spread in zip(pictures(tmp_path, noisy, row), spreads, strict=True):
        assert abs(one.std() - spread) < 0.5
    packed = copies(tmp_path, AugmentImages(copies=2, jpeg_quality=10, **STILL), row)
    assert all(one.row.messages[0].content[0].media.endswith(".jpg") for one in packed)


def test_images_of_a_row_change_alike_and_keep_their_format(tmp_path: Path) -> None:
    """They get one crop, a repeated image gives one copy, and the rejected reply stays."""
    row = image_row(tmp_path, "a.png", "b.jpg")
    picture(0, 64, 48).save(tmp_path / "media" / "b.jpg", quality=95)
    doubled = row.messages[0].content
    row = Example(
        (Message("user", (*doubled, doubled[0])), row.messages[1]),
        row.origins,
        rejected=(Message.of("assistant", "no"),),
    )
    (one,) = copies(tmp_path, AugmentImages(copies=1, crop=0.5), row)
    names = [part.media for part in one.row.messages[0].content]
    assert names[0] == names[2] != names[1] and names[0].endswith(".png") and names[1].endswith(".jpg")
    sizes = [open_image(tmp_path / name).size for name in names[:2]]
    assert abs(sizes[0][0] / 60 - sizes[1][0] / 64) < 0.03 and one.row.rejected == row.rejected


def test_a_recording_is_faster_later_louder_and_masked(tmp_path: Path) -> None:
    before = tone(1.0)
    row = sound_row(tmp_path, before)
    fast = AugmentAudio(copies=4, **(SILENT | {"speed": 0.2}))
    factors = [float(said.split("times ")[1]) for said in changes(tmp_path, fast, row)]
    for one, factor in zip(clips(tmp_path, fast, row), factors, strict=True):
        assert 0.8 <= factor <= 1.2 and abs(len(one) - RATE / factor) <= 20
        heard = np.abs(np.fft.rfft(one * np.hanning(len(one)))).argmax() * RATE / len(one)
        assert abs(heard - 440 * factor) < 3
    for one in clips(tmp_path, AugmentAudio(copies=3, **(SILENT | {"shift_s": 0.5})), row):
        late = len(one) - RATE
        assert 0 <= late <= RATE // 2 and not one[:late].any() and np.allclose(one[late:], before, atol=1e-4)
    for one in clips(tmp_path, AugmentAudio(copies=3, **(SILENT | {"gain_db": 12.0})), row):
        assert 0.3 / 4 <= np.abs(one).max() <= 0.9991
    for one in clips(tmp_path, AugmentAudio(copies=3, time_mask_s=0.5, **SILENT), row):
        assert len(one) == RATE and 0 < (np.abs(one) < 1e-6).sum() <= RATE // 10 + RATE // 40


def test_noise_and_the_telephone_are_heard(tmp_path: Path) -> None:
    row = sound_row(tmp_path, tone(1.0))
    noisy = AugmentAudio(copies=4, noise_db=5.0, **SILENT)
    ratios = [float(said.split("noise at ")[1].split()[0]) for said in changes(tmp_path, noisy, row)]
    for one, ratio in zip(clips(tmp_path, noisy, row), ratios, strict=True):
        found = 10 * np.log10(np.mean(tone(1.0) ** 2) / np.mean((one - tone(1.0)) ** 2))
        assert 5 <= ratio <= 40 and abs(found - ratio) < 0.5
    high = sound_row(tmp_path, tone(1.0, 6000) + tone(1.0, 1000))
    (one,) = clips(tmp_path, AugmentAudio(copies=1, telephone=1.0, **SILENT), high)
    seen = np.abs(np.fft.rfft(one))
    assert len(one) == RATE and seen[1000] > 1000 * seen[5990:6010].max()


@pytest.mark.parametrize(
    ("rate", "channels", "seconds"), [(8000, 1, 0.5), (44_100, 2, 0.3), (192_000, 1, 0.1), (16_000, 1, 0.002)]
)
def test_any_rate_and_any_channels(tmp_path: Path, rate: int, channels: int, seconds: float) -> None:
    samples = np.repeat(tone(seconds, rate=rate)[:, None], channels, 1)
    row = sound_row(tmp_path, samples, rate)
    for one in copies(tmp_path, AugmentAudio(copies=2, noise_db=20.0, telephone=1.0, time_mask_s=1.0), row):
        info = soundfile.info(tmp_path / one.row.messages[0].content[0].media)
        assert (info.channels, info.format, info.samplerate) == (1, "FLAC", min(rate, 96_000))


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (3, 2)])
def test_the_smallest_pictures_are_changed_too(tmp_path: Path, size: tuple[int, int]) -> None:
    row = image_row(tmp_path)
    picture(1, *size).save(tmp_path / "media" / "a.png")
    step = AugmentImages(
        copies=4, flip=("horizontal", "vertical"), rotation_degrees=180, crop=0.1, blur=20, noise=64, jpeg_quality=5
    )
    assert len(copies(tmp_path, step, row)) == 4


@pytest.mark.services
def test_ray_makes_the_same_copies(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="no ray here: pip install 'sartor[ray]'")
    said = recipe(write_rows(tmp_path / "in"))
    here, far = (sartor.curate(said, tmp_path / on, on=on).dataset for on in ("local", "ray"))  # type: ignore[arg-type]
    assert here.manifest["digest"] == far.manifest["digest"]
