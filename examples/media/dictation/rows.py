"""Textile images and spoken findings -> rows: a draft report that says where the dictation and the picture disagree.

What a person would dictate is written from templates and spoken by voices of espeak-ng; for some rows it contradicts
the
picture. The reply is a draft: what was dictated, what the picture shows, whether they disagree, and the check that
checks.csv suggests next. Held-out rows have templates, and one voice, that no training row has.

    python rows.py OUT [--images DIR] [--limit N] [--contradict FRACTION]
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shutil
from pathlib import Path

from sartor.core import assets
from sartor.demo.home_intents import rehearsal_rows
from sartor.media.speech.batch_synthesis import Clip, say_many

HERE = Path(__file__).parent
SHOWN = {"nominal": "none", "local": "local", "global": "global"}
SYSTEM = (
    "Draft a report from the picture and the dictation. JSON: dictation, image, disagree, next_check. A person signs."
)
VOICES = ("espeak:en-us", "espeak:en-gb", "espeak:en-us+f3", "espeak:en-gb+m3")
UNHEARD = "espeak:en-us+f5"
FINDINGS = {
    "none": (
        ["no defect", "nothing unusual", "clean cloth", "the surface is even", "I see no fault"],
        ["free of defects", "all even, nothing to report"],
    ),
    "local": (
        ["a single spot", "one small knot", "a local defect", "a spot in one place", "one slub, small"],
        ["a knot at one place", "one local spot"],
    ),
    "global": (
        [
            "the whole weave is off",
            "the angle has drifted everywhere",
            "a global defect",
            "the texture is wrong all over",
        ],
        ["the weave has drifted all over", "everywhere the angle is off"],
    ),
}
FRAMES = (
    ["Roll {roll}. {finding}.", "Loom {loom}, {finding}.", "Preliminary: {finding}.", "{finding}, roll {roll}."],
    ["On roll {roll}, {finding}.", "Finding: {finding}."],
)


def checks() -> dict[tuple[str, str], str]:
    """(dictation, image) -> what to check next."""
    with (HERE / "checks.csv").open(encoding="utf-8") as file:
        return {(row["dictation"], row["image"]): row["next_check"] for row in csv.DictReader(file)}


def dictated(shown: str, is_held: bool, contradict: float, draw: random.Random) -> tuple[str, Clip]:
    """(what is dictated of a picture that shows `shown`, the clip that says it)."""
    said = shown if draw.random() >= contradict else draw.choice([kind for kind in FINDINGS if kind != shown])
    finding, frame = (draw.choice(pair[is_held]) for pair in (FINDINGS[said], FRAMES))
    text = frame.format(finding=finding, roll=draw.randint(10, 99), loom=draw.randint(1, 12))
    return said, Clip(text[0].upper() + text[1:], UNHEARD if is_held else draw.choice(VOICES))


def write(out: Path, images: Path, limit: int, contradict: float) -> None:
    """train.jsonl, eval.jsonl, general.jsonl (rehearsal), images/ and clips/ below `out`."""
    table = checks()
    (out / "images").mkdir(parents=True, exist_ok=True)
    drawn: list[tuple[str, str, str, Clip, bool]] = []
    for folder, shown in SHOWN.items():
        found = sorted((images / folder).glob("*.jpg"))
        random.Random(0).shuffle(found)
        for place, image in enumerate(found[:limit]):
            name, is_held = f"{folder}-{image.name}", place % 5 == 0
            said, clip = dictated(shown, is_held, contradict, random.Random(name))
            shutil.copyfile(image, out / "images" / name)
            drawn.append((name, shown, said, clip, is_held))
    clips = say_many([clip for *_, clip, _ in drawn], out / "clips", rate=16_000, form="flac")
    lines: dict[str, list[str]] = {"train": [], "eval": []}
    for (name, shown, said, _, is_held), clip in zip(drawn, clips, strict=True):
        assert clip.path is not None
        draft = {"dictation": said, "image": shown, "disagree": said != shown, "next_check": table[said, shown]}
        content = [{"type": "image", "image": f"images/{name}"}, {"type": "audio", "audio": f"clips/{clip.path.name}"}]
        turns = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": content},
            {"role": "assistant", "content": json.dumps(draft)},
        ]
        split = "eval" if is_held else "train"
        lines[split].append(json.dumps({"messages": turns, "group": name, "split": split}) + "\n")
    lines["general"] = [json.dumps(row) + "\n" for row in rehearsal_rows()]
    for split, written in lines.items():
        (out / f"{split}.jsonl").write_text("".join(written), encoding="utf-8")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--images", type=Path, help="a folder with nominal/, local/, global/; by default the asset `textile`"
    )
    parser.add_argument("--limit", type=int, default=300, help="images of each kind")
    parser.add_argument(
        "--contradict", type=float, default=0.3, help="fraction of dictations that contradict their picture"
    )
    options = parser.parse_args()
    images = (
        options.images or assets.install("textile") / "conformal_clip_data" / "data" / "textile_images" / "simulated"
    )
    write(options.out, images, options.limit, options.contradict)


if __name__ == "__main__":
    main()
