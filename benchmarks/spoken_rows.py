"""The demo's commands, spoken: rows of audio -> JSON, audio -> words, words -> JSON; held out by template, as in the
demo.

    python benchmarks/spoken_rows.py OUT [--commands N] [--voices N] --json
    python benchmarks/spoken_rows.py --small --json    # four made-up commands by one voice: shows that it runs

Needs espeak-ng; piper speaks half of the held-out commands, but for the smallest size.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import smallest
from results import print_result

from sartor.core import assets
from sartor.core.splits import held_out_groups
from sartor.demo.home_intents import rows
from sartor.media.speech.batch_synthesis import Clip, say_many

VOICES = ("espeak:en-us", "espeak:en-gb", "espeak:en-us+f3", "espeak:en-gb+m3", "espeak:en-us+f5")
PIPER = "piper:joe"
HEARD = "Write down what is said."
HELD_OUT = 0.15
# with `--small`
SMALL_COMMANDS, SMALL_VOICES = 8, 1


def spoken(
    commands: Sequence[dict[str, Any]], voices: int, seed: int, other: str
) -> list[tuple[dict[str, Any], Clip]]:
    """Each command by `voices` voices, the last of them the `other` one for one command in four."""
    drawn, made = random.Random(seed), []
    for place, row in enumerate(commands):
        names = [*drawn.sample(VOICES, voices - 1), other if place % 4 == 0 else drawn.choice(VOICES)]
        text = row["messages"][1]["content"]
        made += [(row, Clip(text, name, drawn.choice((0.9, 1.0, 1.1)))) for name in dict.fromkeys(names)]
    return made


def heard(row: dict[str, Any], clip: Clip, *, words: bool) -> dict[str, Any]:
    """The row with a recording in place of its words; `words`: its reply is what is said."""
    system, asked, reply = row["messages"]
    part = [{"type": "audio", "audio": f"clips/{clip.path.name}"}]
    turns = [
        {"role": "system", "content": HEARD if words else system["content"]},
        {"role": "user", "content": part},
        {"role": "assistant", "content": asked["content"] if words else reply["content"]},
    ]
    return {"messages": turns, "group": row["group"]}


def write(out: Path, commands: int, voices: int, other: str = PIPER) -> dict[str, int]:
    """train.jsonl, eval.jsonl, words.jsonl (the held-out commands as text) and clips/ below `out`.

    other: the voice of half of the held-out commands, which few training rows have.
    """
    drawn = rows(assets.install("home-intents"))[:commands]
    away = held_out_groups((row["group"] for row in drawn), HELD_OUT, 0)
    train, test = ([row for row in drawn if (row["group"] in away) == is_held] for is_held in (False, True))
    # held-out commands once each: half by espeak's voices, half by the other
    voice = random.Random(1)
    test_clips = [
        (row, Clip(row["messages"][1]["content"], other if i % 2 else voice.choice(VOICES)))
        for i, row in enumerate(test)
    ]
    pairs = [*spoken(train, voices, 0, other), *test_clips]
    clips = say_many([clip for _, clip in pairs], out / "clips", rate=16_000, form="flac")
    said = [(row, clip) for (row, _), clip in zip(pairs, clips, strict=True)]
    train_said, test_said = said[: -len(test)], said[-len(test) :]
    lines = {
        "train": [
            *(heard(row, clip, words=False) for row, clip in train_said),
            *(heard(row, clip, words=True) for row, clip in train_said),
            *train,
        ],
        "eval": [heard(row, clip, words=False) for row, clip in test_said],
        "words": test,
    }
    for name, written in lines.items():
        text = "".join(json.dumps({**row, "split": "train" if name == "train" else "eval"}) + "\n" for row in written)
        (out / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return {name: len(written) for name, written in lines.items()} | {
        "clips": len(clips),
        "voices": len({c.voice for c in clips}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line (always so)")
    smallest.add_argument(parser)
    parser.add_argument("--commands", type=int, default=1300)
    parser.add_argument("--voices", type=int, default=3)
    options = parser.parse_args()
    if not (options.out or options.small):
        parser.error("OUT: the directory that is written")
    if shutil.which("espeak-ng") is None:
        sys.exit("the voices are espeak-ng's: apt-get install espeak-ng")
    with smallest.home(options.small, "home-intents"), tempfile.TemporaryDirectory() as folder:
        if options.small:
            written = write(options.out or Path(folder) / "spoken", SMALL_COMMANDS, SMALL_VOICES, VOICES[0])
        else:
            written = write(options.out, options.commands, options.voices)
    print_result({**written, "absent": {"piper": smallest.LEFT_OUT} if options.small else {}})


if __name__ == "__main__":
    main()
