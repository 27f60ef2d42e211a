"""The demo's commands, spoken: rows of audio -> JSON, audio -> words, words -> JSON; held out by template, as in the demo.

python benchmarks/spoken_rows.py OUT [--commands N] [--voices N]
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sartor.core import assets
from sartor.core.holdout import held_out_groups
from sartor.intents import rows
from sartor.speech.many import Clip, say_many

VOICES = ("espeak:en-us", "espeak:en-gb", "espeak:en-us+f3", "espeak:en-gb+m3", "espeak:en-us+f5")
PIPER = "piper:joe"
HEARD = "Write down what is said."
HELD_OUT = 0.15


def spoken(commands: Sequence[dict[str, Any]], voices: int, seed: int) -> list[tuple[dict[str, Any], Clip]]:
    """Each command by `voices` voices, the last of them piper's for one command in four."""
    drawn, made = random.Random(seed), []
    for place, row in enumerate(commands):
        names = [*drawn.sample(VOICES, voices - 1), PIPER if place % 4 == 0 else drawn.choice(VOICES)]
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


def write(out: Path, commands: int, voices: int) -> dict[str, int]:
    """train.jsonl, eval.jsonl, words.jsonl (the held-out commands as text) and clips/ below `out`."""
    drawn = rows(assets.install("home-intents"))[:commands]
    away = held_out_groups((row["group"] for row in drawn), HELD_OUT, 0)
    train, test = ([row for row in drawn if (row["group"] in away) == is_held] for is_held in (False, True))
    # held-out commands once each: half by espeak's voices, half by piper's
    voice = random.Random(1)
    test_clips = [
        (row, Clip(row["messages"][1]["content"], PIPER if i % 2 else voice.choice(VOICES))) for i, row in enumerate(test)
    ]
    pairs = [*spoken(train, voices, 0), *test_clips]
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--commands", type=int, default=1300)
    parser.add_argument("--voices", type=int, default=3)
    options = parser.parse_args()
    print(json.dumps(write(options.out, options.commands, options.voices)))


if __name__ == "__main__":
    main()
