"""Textile images and workers' notes -> rows.jsonl: what a line's camera saw, what the worker said of it, what to do.

The note says where and when, on which machine and roll, and how often this shift; it never names what is wrong: that
is for the picture to say. What to do is looked up in protocols.csv by both. Notes are written from templates, those of
held-out rows from templates of their own.

    python rows.py OUT [--images DIR] [--limit N] [--speech]

With `--speech` the notes are recordings, by voices of espeak-ng: the recipe's base then needs `audio:
whisper-tiny-en`.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shutil
from pathlib import Path
from typing import Any

from sartor.core import assets
from sartor.demo.home_intents import rehearsal_rows
from sartor.media.speech.batch_synthesis import Clip, say_many

HERE = Path(__file__).parent
DEFECTS = {"nominal": "none", "local": "local", "global": "global"}
SYSTEM = "You inspect cloth. Answer with JSON: defect, severity, action."
ZONES = {
    "selvedge": [
        "right at the selvedge",
        "along the selvedge",
        "in the outer two centimetres",
        "at the very edge of the cloth",
    ],
    "body": [
        "in the middle of the width",
        "well inside the cloth",
        "about half way across",
        "in the body of the cloth",
    ],
}
SEEN = {
    "once": [
        "first time this shift",
        "nothing like it before today",
        "only this once so far",
        "not seen earlier on this roll",
    ],
    "often": [
        "third time this shift",
        "again, the same as the last two rolls",
        "for the fourth time since noon",
        "it keeps coming back",
    ],
}
TRAIN = [
    "Loom {loom}, roll {roll}, {time}: {zone}, {seen}.",
    "{time}, machine {loom}. Roll {roll}. I saw this {zone}; {seen}.",
    "Please look at roll {roll} from loom {loom}: {zone}, at {time}, {seen}.",
    "From {name} at loom {loom}: {seen}. It is {zone}, roll {roll}, {time}.",
    "Roll {roll}: {zone}. {time}, loom {loom}, {seen}.",
    "{seen}: loom {loom}, {time}, roll {roll}, {zone}.",
    "{name}, {time}: {zone} on roll {roll}, loom {loom}. {seen}.",
    "Could you look at this? Loom {loom}, roll {roll}, {zone}, around {time}. {seen}.",
    "This is roll {roll}, {zone}, taken at {time} at machine {loom}. {seen}.",
    "Where? {zone}. When? {time}. Loom {loom}, roll {roll}; {seen}.",
    "At {time} the cloth on loom {loom} looked like this {zone}. {seen}. Roll {roll}.",
    "{seen}. {name} sends this from machine {loom}, {zone}, roll {roll}, {time}.",
    "I am at loom {loom}. I took roll {roll} {zone} at {time}, {seen}.",
    "Machine {loom}, {zone}: roll {roll}, {seen} ({time}).",
    "Shift of {name}. {time}. {zone}. {seen}. Loom {loom} with roll {roll}.",
    "Hello, it is {name}. Here you see roll {roll} {zone}; loom {loom}, {time}, {seen}.",
]
HELD_OUT = [
    "{name} here. At {time} on loom {loom} I stopped to photograph roll {roll}, {zone}. {seen}.",
    "Photo of roll {roll} (loom {loom}). Place: {zone}. Time: {time}. How often: {seen}.",
]
NAMES = ["Ines", "Marek", "Aylin", "Tom", "Ngozi", "Li"]
VOICES = ["espeak:en-us", "espeak:en-gb", "espeak:en-us+f3", "espeak:en-gb+m3"]
Protocols = dict[tuple[str, str, str], tuple[str, str]]


def protocols() -> Protocols:
    """(defect, zone, seen) -> (severity, action)."""
    found = {}
    with (HERE / "protocols.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for zone in ZONES if row["zone"] == "any" else [row["zone"]]:
                for seen in SEEN if row["seen"] == "any" else [row["seen"]]:
                    found[row["defect"], zone, seen] = row["severity"], row["action"]
    return found


def row(image: Path, defect: str, split: str, table: Protocols) -> dict[str, Any]:
    """One row, the same for an image in every run."""
    draw = random.Random(image.name + defect)
    zone, seen = draw.choice(list(ZONES)), draw.choice(list(SEEN))
    severity, action = table[defect, zone, seen]
    words = {
        "loom": draw.randint(1, 12),
        "roll": draw.randint(1000, 9999),
        "time": f"{draw.randint(6, 21):02d}:{draw.randint(0, 59):02d}",
        "zone": draw.choice(ZONES[zone]),
        "seen": draw.choice(SEEN[seen]),
        "name": draw.choice(NAMES),
    }
    note = draw.choice(TRAIN if split == "train" else HELD_OUT).format(**words)
    asked = [{"type": "image", "image": f"images/{image.parent.name}-{image.name}"}, {"type": "text", "text": note}]
    reply = json.dumps({"defect": defect, "severity": severity, "action": action})
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": asked},
        {"role": "assistant", "content": reply},
    ]
    return {"messages": messages, "group": image.name + image.parent.name, "split": split}


def speak(rows: list[dict[str, Any]], folder: Path) -> None:
    """Put a recording in the place of each note."""
    notes = [row["messages"][1]["content"][1] for row in rows]
    voices = [random.Random(note["text"]).choice(VOICES) for note in notes]
    clips = say_many(
        [Clip(note["text"], voice) for note, voice in zip(notes, voices, strict=True)],
        folder,
        rate=16_000,
        form="flac",
    )
    for row, clip in zip(rows, clips, strict=True):
        assert clip.path is not None
        row["messages"][1]["content"][1] = {"type": "audio", "audio": f"{folder.name}/{clip.path.name}"}


def write(out: Path, images: Path, limit: int, *, is_spoken: bool) -> None:
    """train.jsonl, eval.jsonl, general.jsonl (rehearsal), images/ and, where the notes are spoken, clips/ below
    `out`.
    """
    (out / "images").mkdir(parents=True, exist_ok=True)
    table, rows = protocols(), []
    for folder, defect in DEFECTS.items():
        found = sorted((images / folder).glob("*.jpg"))
        random.Random(0).shuffle(found)
        for place, image in enumerate(found[:limit]):
            shutil.copyfile(image, out / "images" / f"{folder}-{image.name}")
            rows.append(row(image, defect, "train" if place % 5 else "eval", table))
    if is_spoken:
        speak(rows, out / "clips")
    for split in ("train", "eval"):
        lines = [json.dumps(row) + "\n" for row in rows if row["split"] == split]
        (out / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    general = "".join(json.dumps(row) + "\n" for row in rehearsal_rows())
    (out / "general.jsonl").write_text(general, encoding="utf-8")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--images", type=Path, help="a folder with nominal/, local/, global/; by default the asset `textile`"
    )
    parser.add_argument("--limit", type=int, default=500, help="images of each kind")
    parser.add_argument("--speech", action="store_true", help="the notes are spoken")
    options = parser.parse_args()
    images = (
        options.images or assets.install("textile") / "conformal_clip_data" / "data" / "textile_images" / "simulated"
    )
    write(options.out, images, options.limit, is_spoken=options.speech)


if __name__ == "__main__":
    main()
