"""Textile images and workers' notes -> rows.jsonl: what a line's camera saw, what the worker said of it, what to do.

The note says where and when, on which machine and roll, and how often this shift; it never names what is wrong: that is for the
picture to say. What to do is looked up in protocols.csv by both. Notes are written from templates, those of held-out rows from
templates of their own.

    python rows.py OUT [--images DIR] [--limit N] [--speech VOICE]
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shutil
from pathlib import Path

from sartor.core import assets

HERE = Path(__file__).parent
DEFECTS = {"nominal": "none", "local": "local", "global": "global"}
SYSTEM = "You inspect cloth. Answer with JSON: defect, severity, action."
ZONES = {
    "selvedge": ["right at the selvedge", "along the selvedge", "in the outer two centimetres", "at the very edge of the cloth"],
    "body": ["in the middle of the width", "well inside the cloth", "about half way across", "in the body of the cloth"],
}
SEEN = {
    "once": ["first time this shift", "nothing like it before today", "only this once so far", "not seen earlier on this roll"],
    "often": ["third time this shift", "again, the same as the last two rolls", "for the fourth time since noon", "it keeps coming back"],
}
TRAIN = [
    "Loom {loom}, roll {roll}, {time}: {zone}, {seen}.",
    "{time}, machine {loom}. Roll {roll}. I saw this {zone}; {seen}.",
    "Please look at roll {roll} from loom {loom}: {zone}, at {time}, {seen}.",
    "From {name} at loom {loom}: {seen}. It is {zone}, roll {roll}, {time}.",
    "Roll {roll}: {zone}. {time}, loom {loom}, {seen}.",
    "{seen}: loom {loom}, {time}, roll {roll}, {zone}.",
]
HELD_OUT = [
    "{name} here. At {time} on loom {loom} I stopped to photograph roll {roll}, {zone}. {seen}.",
    "Photo of roll {roll} (loom {loom}). Place: {zone}. Time: {time}. How often: {seen}.",
]
NAMES = ["Ines", "Marek", "Aylin", "Tom", "Ngozi", "Li"]


def protocols() -> dict[tuple[str, str, str], tuple[str, str]]:
    """(defect, zone, seen) -> (severity, action)."""
    found = {}
    with (HERE / "protocols.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for zone in ZONES if row["zone"] == "any" else [row["zone"]]:
                for seen in SEEN if row["seen"] == "any" else [row["seen"]]:
                    found[row["defect"], zone, seen] = row["severity"], row["action"]
    return found


def row(image: Path, defect: str, split: str, table: dict[tuple[str, str, str], tuple[str, str]]) -> dict[str, object]:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=Path, help="a folder with nominal/, local/, global/; by default the asset `textile`")
    parser.add_argument("--limit", type=int, default=500, help="images of each kind")
    options = parser.parse_args()
    images = options.images or assets.install("textile") / "conformal_clip_data" / "data" / "textile_images" / "simulated"
    table = protocols()
    (options.out / "images").mkdir(parents=True, exist_ok=True)
    files = {split: (options.out / f"{split}.jsonl").open("w", encoding="utf-8") for split in ("train", "eval")}
    for folder, defect in DEFECTS.items():
        found = sorted((images / folder).glob("*.jpg"))
        random.Random(0).shuffle(found)
        for place, image in enumerate(found[: options.limit]):
            split = "eval" if place % 5 == 0 else "train"
            shutil.copyfile(image, options.out / "images" / f"{folder}-{image.name}")
            files[split].write(json.dumps(row(image, defect, split, table)) + "\n")
    for file in files.values():
        file.close()


if __name__ == "__main__":
    main()
