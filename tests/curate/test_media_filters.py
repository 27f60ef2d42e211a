"""Media: pictures and recordings in folders become rows with their captions; the steps tell good ones from bad ones."""

from __future__ import annotations

import io
import json
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, PngImagePlugin

import sartor
from media_files import RATE, bomb, scene, tone
from sample_data import write_jsonl
from sartor.core.errors import ConfigError, GuardError
from sartor.core.records import Drop, Example, Message, Origin, Part
from sartor.curate.sources import media_files
from sartor.curate.sources.types import SourceOptions
from sartor.curate.step import StepInput
from sartor.curate.steps import image_duplicates
from sartor.curate.steps.image_duplicates import ImageDuplicates
from sartor.curate.steps.media_filters import Audio, Images
from sartor.media import images
from sourcing import Rows, chat, tree


def content(example: Example) -> list[tuple[str, str]]:
    return [(part.kind, part.text) for part in example.messages[0].content]


def test_captions_are_read_from_text_or_json_files(tmp_path: Path) -> None:
    """A caption beside an image or audio file becomes the reply and no row; an image without one is dropped."""
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.jpg", "b.png", "deep/c.webp", "alone.png"):
        scene(len(name)).save(folder / name)
    (folder / "a.txt").write_text("  a red box \n")
    (folder / "b.json").write_text(
        json.dumps({"caption": "two discs", "prompt": "How many?", "date": "2024-01-02", "group": "g"})
    )
    (folder / "deep" / "c.webp.txt").write_text("deep")
    soundfile.write(folder / "d.flac", tone(0.3), RATE)
    (folder / "d.txt").write_text("hello")
    rows = Rows(tmp_path / "media", SourceOptions(str(folder), prompt="What is it?"))
    assert rows.replies == ["a red box", "two discs", "hello", "deep"]
    assert rows.places == ["a.jpg:1", "b.png:1", "d.flac:1", "deep/c.webp:1"]
    asked = [content(row) for row in rows.kept]
    assert asked[0] == [("image", ""), ("text", "What is it?")] and asked[1][1] == ("text", "How many?")
    assert asked[2][0][0] == "audio"
    assert (rows.kept[1].origins[0].date, rows.kept[1].group) == ("2024-01-02", "g")
    assert [(drop.reason, drop.locator) for drop in rows.drops] == [("no_caption", "alone.png:1")]
    for row, name in zip(rows.kept, ("a.jpg", "b.png", "d.flac", "deep/c.webp"), strict=True):
        assert (tmp_path / row.messages[0].content[0].media).read_bytes() == (folder / name).read_bytes()
    facts = {file.path: file.form for file in rows.plan.files}
    assert facts["a.txt"] == "caption" and facts["a.jpg"] == "captioned"
    assert all(file.sha256 for file in rows.plan.files)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("field", ["text", "caption", "transcript", "transcription", "label"])
def test_a_table_of_captions_is_read_and_names_what_it_lacks(tmp_path: Path, suffix: str, field: str) -> None:
    folder = tmp_path / "in"
    (folder / "train").mkdir(parents=True)
    for n in range(3):
        scene(n).save(folder / "train" / f"{n}.png")
    scene(9).save(folder / "unnamed.png")
    table = [{"file_name": f"train/{n}.png", field: f"caption {n}"} for n in (0, 1, 7)]
    file = folder / f"metadata.{suffix}"
    if suffix == "csv":
        file.write_text("\n".join([f"file_name,{field}", *[f"{row['file_name']},{row[field]}" for row in table]]))
    elif suffix == "jsonl":
        write_jsonl(file, table)
    else:
        pq.write_table(pa.Table.from_pylist(table), file)
    rows = Rows(tmp_path / "media", folder)
    assert rows.replies == ["caption 0", "caption 1"]
    assert rows.reasons == {"missing_media": 1, "no_caption": 2}
    assert {drop.locator for drop in rows.drops if drop.reason == "no_caption"} == {"train/2.png:1", "unnamed.png:1"}
    assert [content(row) for row in rows.kept] == [[("image", "")]] * 2


def test_lone_metadata_table_is_a_source_with_numeric_labels(tmp_path: Path) -> None:
    """A file of another type is dropped as bad_media, a row without a label as missing_field."""
    scene(1).save(tmp_path / "a.png")
    write_jsonl(
        tmp_path / "metadata.jsonl",
        [{"file_name": "a.png", "label": 7}, {"file_name": "x.docx", "label": "y"}, {"file_name": "a.png"}],
    )
    rows = Rows(tmp_path / "media", tmp_path / "metadata.jsonl")
    assert rows.replies == ["7"]
    assert rows.reasons == {"bad_media": 1, "missing_field": 1}


def test_tables_without_media_metadata_are_read_as_text(tmp_path: Path) -> None:
    """These are a table with another name, and metadata.jsonl without file names."""
    write_jsonl(tmp_path / "rows.jsonl", [{"file_name": "a.png", "text": "where this text came from"}])
    write_jsonl(tmp_path / "metadata.jsonl", [{"text": "no file here"}])
    rows = Rows(tmp_path / "media", tmp_path)
    assert rows.replies == ["no file here", "where this text came from"]


def test_a_folder_may_be_the_label(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        (tmp_path / "in" / label).mkdir(parents=True)
        scene(len(label)).save(tmp_path / "in" / label / "1.png")
    scene(8).save(tmp_path / "in" / "dog" / "2.png")
    (tmp_path / "in" / "dog" / "2.txt").write_text("a text of its own")
    rows = Rows(tmp_path / "media", SourceOptions(str(tmp_path / "in"), captions="folder"))
    assert rows.replies == ["cat", "dog", "dog", "a text of its own"]


def test_one_picture_and_a_pattern_find_their_captions(tmp_path: Path) -> None:
    scene(1).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("one")
    for path in (tmp_path / "a.png", tmp_path / "*.png"):
        assert Rows(tmp_path / "media", path).replies == ["one"]


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("", "empty_file"),
        ("  \n ", "empty_answer"),
        ("[1]", "no_caption"),
        ('{"colour": "red"}', "no_caption"),
        ("{", "bad_json"),
        ('{"text": 3.5}', "bad_field"),
        ("x" * 3000, "oversize_row"),
    ],
)
def test_a_caption_that_says_nothing_is_a_drop(tmp_path: Path, caption: str, reason: str) -> None:
    scene(1).save(tmp_path / "a.png")
    (tmp_path / ("a.json" if caption[:1] in "[{" and caption else "a.txt")).write_text(caption)
    rows = Rows(tmp_path / "media", tmp_path, most=2000)
    assert rows.reasons == {reason: 1}


def test_a_caption_out_of_the_folder_is_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    scene(1).save(folder / "a.png")
    (folder / "a.txt").symlink_to(tmp_path / "secret.txt")
    rows = Rows(tmp_path / "media", folder)
    assert rows.reasons == {"link_outside": 1}
    assert "secret" not in str(rows.all).replace("secret.txt", "")


def test_image_changed_after_planning_is_dropped(tmp_path: Path) -> None:
    """The reason is changed_file, and nothing is copied."""
    from sartor.curate.sources.chunk_reader import read_chunk
    from sartor.curate.sources.planner import plan_reading

    scene(1).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("one")
    source = SourceOptions(str(tmp_path))
    (unit,) = plan_reading([source], 1 << 20).chunks
    scene(2).save(tmp_path / "a.png")
    (drop,) = read_chunk(unit, source, tmp_path / "media")
    assert drop.reason == "changed_file" and not (tmp_path / "media").exists()


def test_media_used_by_many_rows_are_stored_once(tmp_path: Path) -> None:
    """The media folder holds one file and no partial copies."""
    scene(1).save(tmp_path / "a.png")
    write_jsonl(tmp_path / "a.jsonl", [chat([{"type": "image", "image": "a.png"}], f"{n}") for n in range(20)])
    rows = Rows(tmp_path / "media", tmp_path / "a.jsonl")
    assert len(rows.kept) == 20 and len(tree(tmp_path / "media")) == 1


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_sizes_are_read_from_the_header_of_every_format(kind: str) -> None:
    for width, height in ((37, 21), (300, 200)):
        out = io.BytesIO()
        scene(3, width, height).save(out, kind)
        assert media_files.image_size(out, kind if kind != "WEBP" else "WebP") == (width, height, 1)
    if kind in ("GIF", "WEBP", "PNG"):
        out = io.BytesIO()
        frames = [scene(n, 20, 20) for n in range(7)]
        frames[0].save(out, kind, save_all=True, append_images=frames[1:])
        assert media_files.image_size(out, kind if kind != "WEBP" else "WebP") == (20, 20, 7)


def test_lossless_and_alpha_webp_have_their_sizes() -> None:
    for mode, options in (("RGB", {"lossless": True}), ("RGBA", {}), ("RGBA", {"lossless": True})):
        out = io.BytesIO()
        scene(3, 301, 199).convert(mode).save(out, "WEBP", **options)
        assert media_files.image_size(out, "WebP")[:2] == (301, 199)


def placed(folder: Path, image: Image.Image | bytes, reply: str = "a", name: str = "", **save: Any) -> Example:
    """An Example with a picture in `folder/media`."""
    (folder / "media").mkdir(parents=True, exist_ok=True)
    if isinstance(image, bytes):
        raw = image
    else:
        out = io.BytesIO()
        image.save(out, save.pop("format", "PNG"), **save)
        raw = out.getvalue()
    path = f"media/{media_files.digest_of(raw)}.png"
    (folder / path).write_bytes(raw)
    parts = (Part("image", media=path), *([Part("text", name)] if name else []))
    return Example((Message("user", parts), Message.of("assistant", reply)), (Origin("s", f"s:{reply}"),))


def verdict(step: Any, folder: Path, example: Example) -> str:
    outcome = step.open(folder)(example)
    return outcome.reason if isinstance(outcome, Drop) else "kept"


def test_bad_pictures_are_told_by_reason(tmp_path: Path) -> None:
    step = Images()
    good = scene(1)
    cases = {
        "kept": good,
        "tiny_image": good.resize((100, 20)),
        "extreme_aspect": good.resize((1000, 40)),
        "blurred_image": good.filter(ImageFilter.GaussianBlur(8)),
        "unreadable_image": b"\x89PNG\r\n\x1a\n and then nothing",
    }
    assert {reason: verdict(step, tmp_path, placed(tmp_path, image)) for reason, image in cases.items()} == {
        key: key for key in cases
    }
    out = io.BytesIO()
    good.save(out, "JPEG")
    assert verdict(step, tmp_path, placed(tmp_path, out.getvalue()[:2000])) == "unreadable_image"
    assert (
        verdict(step, tmp_path, placed(tmp_path, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"))
        == "unreadable_image"
    )
    assert verdict(Images(min_sharpness=0), tmp_path, placed(tmp_path, cases["blurred_image"])) == "kept"
    assert verdict(step, tmp_path, placed(tmp_path, Image.new("RGB", (100, 100), "white"))) == "blurred_image"


@pytest.mark.parametrize(
    ("name", "kind", "written", "reason"),
    [
        ("a.png", "image", b"hello", "format_mismatch"),
        ("a.wav", "audio", b"x" * 99, "format_mismatch"),
        ("a.jpg", "image", b"", "bad_media"),
        ("a", "audio", b"", "bad_media"),
    ],
)
def test_file_without_media_signature_is_dropped(
    tmp_path: Path, name: str, kind: str, written: bytes, reason: str
) -> None:
    """Rows that name a file are held to what a folder of captioned files is: no step is needed."""
    (tmp_path / name).write_bytes(written)
    asked = [{"type": kind, kind: name}, {"type": "text", "text": "What is this?"}]
    write_jsonl(tmp_path / "rows.jsonl", [chat(asked, "a")])
    assert Rows(tmp_path / "media", tmp_path / "rows.jsonl").reasons == {reason: 1}


@pytest.mark.parametrize("place", ["work", "it's a \\ place"])
def test_where_the_work_lies_is_in_no_drop(tmp_path: Path, place: str) -> None:
    picture = placed(tmp_path / place, b"\x89PNG\r\n\x1a\n and then nothing")
    (tmp_path / place / "media" / "a.wav").write_bytes(b"RIFF\x04\0\0\0WAVE")
    recording = replace(
        picture, messages=(Message("user", (Part("audio", media="media/a.wav"),)), picture.messages[-1])
    )
    for step, example in ((Images(), picture), (Audio(), recording)):
        drop = step.open(tmp_path / place)(example)
        assert isinstance(drop, Drop) and drop.reason.startswith("unreadable")
        assert tmp_path.name not in drop.detail and "place" not in drop.detail


def test_odd_pictures_that_are_good_stay_and_warn_nobody(tmp_path: Path) -> None:
    deep = Image.fromarray(np.asarray(scene(1).convert("L"), np.uint16) * 257)
    see_through = scene(2).convert("RGBA")
    see_through.putalpha(scene(3).convert("L"))
    palette = scene(4).convert("P")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for image in (deep, see_through, palette, scene(5).convert("1"), scene(6).convert("LA")):
            assert verdict(Images(), tmp_path, placed(tmp_path, image)) == "kept"
        assert verdict(Images(), tmp_path, placed(tmp_path, scene(7).convert("CMYK"), format="JPEG")) == "kept"


def test_contrast_and_size_do_not_make_a_picture_blurred() -> None:
    sharp = scene(1, 900, 700)
    for image in (
        sharp,
        ImageEnhance.Contrast(sharp).enhance(0.2),
        sharp.resize((3000, 2400)),
        sharp.resize((200, 160)),
    ):
        grey = image.convert("L")
        grey.thumbnail((512, 512), Image.Resampling.BOX)
        assert images.sharpness(np.asarray(grey, np.float32)) > 0.02


def test_decompression_bombs_in_images_do_not_crash(tmp_path: Path) -> None:
    """Compressed text of 80 MB is kept or unreadable_image; too many pixels are an image_bomb."""
    info = PngImagePlugin.PngInfo()
    info.add_text("x", "y" * 80_000_000, zip=True)
    out = io.BytesIO()
    scene(1).save(out, "PNG", pnginfo=info)
    assert verdict(Images(), tmp_path, placed(tmp_path, out.getvalue())) in ("kept", "unreadable_image")
    assert verdict(Images(), tmp_path, placed(tmp_path, bomb(20_000))) == "image_bomb"


def decided(step: ImageDuplicates, folder: Path, examples: list[Example], notices: list[str] | None = None) -> Any:
    half = len(examples) // 2
    table = pa.concat_tables([step.sketch(examples[:half], folder), step.sketch(examples[half:], folder)])
    for name, values in (
        ("id", [example.id for example in examples]),
        ("source", [0] * len(examples)),
        ("locator", [f"r:{n}" for n in range(len(examples))]),
    ):
        table = table.append_column(name, pa.array(values))
    say = notices.append if notices is not None else lambda line: None
    return step.decide(StepInput(table, ["s"], lambda rows: [examples[row] for row in rows], folder, notice=say))


def variants(image: Image.Image) -> dict[str, Image.Image]:
    width, height = image.size
    out = io.BytesIO()
    image.save(out, "JPEG", quality=20)
    marked = image.copy()
    ImageDraw.Draw(marked).text((5, 5), "(c) shop", fill="white")
    return {
        "compressed": Image.open(io.BytesIO(out.getvalue())).convert("RGB"),
        "smaller": image.resize((width // 2, height // 2)),
        "brighter": ImageEnhance.Brightness(image).enhance(1.2),
        "paler": ImageEnhance.Contrast(image).enhance(0.7),
        "grey": image.convert("L").convert("RGB"),
        "softer": image.filter(ImageFilter.GaussianBlur(1)),
        "marked": marked,
    }


def test_image_duplicates_finds_edited_copies_only(tmp_path: Path) -> None:
    """At least 95 % of resized, recompressed and retoned copies are found, and no other image."""
    examples, truth = [], []
    for seed in range(40):
        image = scene(seed)
        for version in [image, *(variants(image).values() if seed < 8 else ())]:
            examples.append(placed(tmp_path, version, reply=str(len(examples))))
            truth.append(seed)
    found = decided(ImageDuplicates(), tmp_path, examples)
    wrong = [removal for removal in found.removals if truth[removal.row] != truth[removal.kept_row]]
    assert wrong == []
    assert len(found.removals) >= 0.95 * 8 * 7
    assert {removal.method for removal in found.removals} == {"local correlation"}
    assert all(0.75 <= removal.score <= 1 for removal in found.removals)
    assert found.set_aside and found.evidence["image_duplicates"].num_rows == found.facts["pairs"]


def test_textures_and_text_pages_are_no_image_duplicates(tmp_path: Path) -> None:
    """Thirty samples of one weave and thirty pages of random text lose no row."""
    random = np.random.default_rng(0)
    examples = []
    for _ in range(30):
        weave = (np.indices((200, 200)).sum(0) % 8 < 4) * 60 + 90 + random.normal(0, 25, (200, 200))
        examples.append(
            placed(tmp_path, Image.fromarray(weave.clip(0, 255).astype(np.uint8)), reply=str(len(examples)))
        )
    for _ in range(30):
        page = Image.new("L", (300, 400), 255)
        draw = ImageDraw.Draw(page)
        for line in range(25):
            draw.text((20, 10 + 15 * line), "".join(random.choice(list("abcdefghij klmnop"), 40)), fill=0)
        examples.append(placed(tmp_path, page, reply=str(len(examples))))
    assert decided(ImageDuplicates(), tmp_path, examples).removals == []


def test_only_rows_that_ask_the_same_are_held_against_each_other(tmp_path: Path) -> None:
    image = scene(1)
    asked = [("What is it?", "a box"), ("What colour?", "red"), ("What is it?", "a red box")]
    examples = [placed(tmp_path, image, reply, question) for question, reply in asked]
    rows = {
        text: [(r.row, r.kept_row) for r in decided(ImageDuplicates(text=text), tmp_path, examples).removals]
        for text in ("question", "all", "any")
    }
    assert rows == {"question": [(2, 0)], "all": [], "any": [(1, 0), (2, 0)]}


def test_the_largest_picture_stays_or_the_first(tmp_path: Path) -> None:
    image = scene(1)
    examples = [
        placed(tmp_path, image.resize((120, 100)), "0"),
        placed(tmp_path, image, "1"),
        placed(tmp_path, image.resize((60, 50)), "2"),
    ]
    assert {r.kept_row for r in decided(ImageDuplicates(), tmp_path, examples).removals} == {1}
    assert {r.kept_row for r in decided(ImageDuplicates(keep="first"), tmp_path, examples).removals} == {0}


def test_equal_files_are_duplicates_and_similar_blanks_not(
    tmp_path: Path,
) -> None:
    """Equal files count even if unreadable or of one colour; a white image with a black dot stays."""
    white = Image.new("RGB", (100, 100), "white")
    dot = white.copy()
    dot.putpixel((50, 50), (0, 0, 0))
    examples = [
        placed(tmp_path, image, str(n)) for n, image in enumerate([white, dot, white, b"broken", b"broken", b"other"])
    ]
    found = decided(ImageDuplicates(), tmp_path, examples)
    assert [(r.row, r.kept_row, r.method) for r in found.removals] == [(2, 0, "equal file"), (4, 3, "equal file")]
    assert [r.row for r in decided(ImageDuplicates(threshold=1), tmp_path, examples).removals] == [2, 4]


def test_rows_without_pictures_and_an_empty_table_pass(tmp_path: Path) -> None:
    plain = Example((Message.of("user", "q"), Message.of("assistant", "a")), (Origin("s", "s:1"),))
    assert decided(ImageDuplicates(), tmp_path, [plain, plain, plain]).removals == []
    assert decided(ImageDuplicates(), tmp_path, []).removals == []


def test_images_of_one_hash_give_a_bounded_number_of_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All 119 copies are still removed and a notice is given; by default GuardError is raised."""
    monkeypatch.setattr(image_duplicates, "CROWD", 40)
    monkeypatch.setattr(image_duplicates, "NEIGHBOURS", 4)
    image = scene(1)
    examples = []
    for n in range(120):
        version = image.copy()
        version.putpixel((n % 240, n // 240), (n % 255, 0, 0))
        examples.append(placed(tmp_path, version, reply=str(n)))
    notices: list[str] = []
    found = decided(ImageDuplicates(max_source_fraction=1, max_fraction=1, keep="first"), tmp_path, examples, notices)
    assert len(found.removals) == 119
    assert found.facts["crowded"] == 120 and len(notices) == 1
    assert found.facts["candidates"] < 120 * 13
    with pytest.raises(GuardError):
        decided(ImageDuplicates(), tmp_path, examples)


def heard(folder: Path, samples: Any, reply: str = "hello", rate: int = RATE, **kind: Any) -> Example:
    (folder / "media").mkdir(exist_ok=True)
    question = kind.pop("question", "")
    name = f"media/{len(list((folder / 'media').iterdir()))}.{kind.pop('suffix', 'wav')}"
    if isinstance(samples, bytes):
        (folder / name).write_bytes(samples)
    else:
        soundfile.write(folder / name, samples, rate, **kind)
    parts = (Part("audio", media=name), *([Part("text", question)] if question else []))
    return Example((Message("user", parts), Message.of("assistant", reply)), (Origin("s", "s:1"),))


def test_bad_recordings_are_told_by_reason(tmp_path: Path) -> None:
    step = Audio(max_seconds=20)
    loud = np.clip(tone(1) * 8, -1, 1)
    cases = {
        "kept": heard(tmp_path, tone(1)),
        "unreadable_audio": heard(tmp_path, b"RIFF\0\0\0\0WAVEnothing"),
        "silent_audio": heard(tmp_path, tone(1, 1e-4)),
        "clipped_audio": heard(tmp_path, loud),
        "low_sample_rate": heard(tmp_path, tone(1, rate=4000), rate=4000),
        "audio_too_short": heard(tmp_path, tone(0.01)),
        "audio_too_long": heard(tmp_path, np.zeros(RATE * 21)),
        "transcript_too_long": heard(tmp_path, tone(1), reply="word " * 30),
    }
    assert {reason: verdict(step, tmp_path, example) for reason, example in cases.items()} == {
        key: key for key in cases
    }
    assert verdict(Audio(min_chars_per_s=2), tmp_path, heard(tmp_path, tone(10), reply="hm")) == "transcript_too_short"
    assert verdict(step, tmp_path, heard(tmp_path, np.zeros(RATE))) == "silent_audio"
    assert verdict(step, tmp_path, heard(tmp_path, np.full(RATE, np.nan), subtype="FLOAT")) == "unreadable_audio"
    assert verdict(step, tmp_path, heard(tmp_path, np.zeros((0, 1)))) == "unreadable_audio"


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_every_format_of_a_source_is_heard(tmp_path: Path, suffix: str) -> None:
    stereo = np.stack([tone(2), tone(2)], 1)
    assert verdict(Audio(), tmp_path, heard(tmp_path, stereo, suffix=suffix)) == "kept"


def test_full_scale_peaks_and_one_loud_moment_are_kept(tmp_path: Path) -> None:
    samples = tone(3, 1.0)
    assert verdict(Audio(), tmp_path, heard(tmp_path, samples)) == "kept"
    late = np.zeros(RATE * 5)
    late[-RATE // 2 :] = tone(0.5)
    assert verdict(Audio(), tmp_path, heard(tmp_path, late)) == "kept"


def test_an_answer_to_a_question_is_no_transcript_unless_said(tmp_path: Path) -> None:
    answer = heard(tmp_path, tone(1), reply="word " * 30, question="Describe the sound at length.")
    assert verdict(Audio(), tmp_path, answer) == "kept"
    assert verdict(Audio(transcripts="always"), tmp_path, answer) == "transcript_too_long"


def test_compressed_overlong_audio_is_audio_too_long(tmp_path: Path) -> None:
    """A FLAC file under 100 kB with ten minutes of silence need not be decoded to its end."""
    example = heard(tmp_path, np.zeros(RATE * 600), suffix="flac")
    assert (tmp_path / "media" / "0.flac").stat().st_size < 100_000
    assert verdict(Audio(max_seconds=60), tmp_path, example) == "audio_too_long"


@pytest.mark.parametrize(
    "make",
    [
        lambda: Images(min_side=0),
        lambda: Images(max_aspect=0.5),
        lambda: Images(min_sharpness=-1),
        lambda: ImageDuplicates(threshold=0.2),
        lambda: Audio(min_seconds=9, max_seconds=1),
        lambda: Audio(silence_db=3),
        lambda: Audio(max_clipped=2),
        lambda: Audio(max_chars_per_s=-1),
    ],
)
def test_options_out_of_range_are_config_errors(make: Any) -> None:
    with pytest.raises(ConfigError):
        make()


def test_rows_of_text_pass_the_media_steps_untouched(tmp_path: Path) -> None:
    plain = Example((Message.of("user", "q"), Message.of("assistant", "a")), (Origin("s", "s:1"),))
    assert Images().open(tmp_path)(plain) is plain and Audio().open(tmp_path)(plain) is plain
    assert Counter(step.kind for step in (Images(), Audio(), ImageDuplicates())) == Counter(
        ["images", "audio", "image_duplicates"]
    )


@pytest.mark.parametrize(
    "step",
    [
        "near_duplicates",
        "semantic_duplicates",
        {"exact_duplicates": "words"},
        {"suspicious_labels": {"action": "drop"}},
    ],
)
def test_steps_that_compare_texts_leave_rows_with_pictures_alone(tmp_path: Path, step: Any) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "in" / name).mkdir(parents=True)
        for seed in range(5):
            scene(seed + 10 * (name == "dog")).save(tmp_path / "in" / name / f"{seed}.png")
    source = {"path": str(tmp_path / "in"), "licence": "CC0-1.0", "captions": "folder", "prompt": "Which animal?"}
    made = sartor.curate({"sources": [source], "steps": [step], "workers": 1}, tmp_path / "out")
    assert made.kept == 10
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    facts = manifest["card"]["steps"] if "card" in manifest else manifest.get("steps", {})
    assert not any(found.get("suspicious") or found.get("pairs") for found in facts.values())
