"""What agents learn from use: what 60 corrections are worth, what poison comes to, and how soon drift is sent back.

    python benchmarks/learn.py --json [--work DIR] [--parts corrections poisoned broken_slice rollback personal deleted]

corrections     a specialist that was never shown three of ten intents is corrected 60 times by five people; `sartor retrain`.
                The gain is of rows by template that its Dataset holds out: nobody chose, corrected or trained on them.
poisoned        one of five keys turns the ratings that it gives around, a fifth of all; `sartor retrain`. And the same drawn
                many times without a tuning: how often the key is named, and how often anybody is where nobody does so.
broken_slice    the corrections of one intent that it never saw are right, those of one that it knows are wrong: on average
                it is about as good as before, and an intent is broken.
rollback        `learn_rollback.py`: requests until a version that drifts after its promotion is sent back.
personal, deleted   `measure()` of learn_personal.py, where it stands beside this file.

A part that was not asked for is null. One core: everything takes about a quarter of an hour.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import learn_rollback
import learn_rows
from learn_rows import KEYS, KNOWN, UNKNOWN

import sartor
from sartor.core.proportions import interval
from sartor.core.records import Feedback
from sartor.retrain import suspects
from sartor.retrain.work import Work

PARTS = ("corrections", "poisoned", "broken_slice", "rollback", "personal", "deleted")
CORRECTIONS, RATINGS, DRAWS = 60, 160, 500
# of the replies that people rate, as many are right as the specialist has right
GOOD = 0.65
# the drift that `rollback_requests` is of
STATED = "format 0.5 after 0"


def notice(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def retrained(folder: Path, name: str, said: Sequence[Feedback]) -> tuple[dict[str, Any], Work | None]:
    """What a retrain on this feedback comes to: the command's JSON, and its record. The team's state is made anew."""
    team, state = learn_rows.team(folder, notice), folder / f"state-{name}"
    shutil.rmtree(state, ignore_errors=True)
    learn_rows.write_inbox(state, said)
    found = sartor.retrain(team, "home", wishes=sartor.Wishes(promote=True), flags=["--state", str(state)], notice=notice)
    return found.as_json(), Work.opened(Path(found.folder)) if found.folder else None


def corrections(folder: Path) -> dict[str, Any]:
    """60 corrections of what the specialist was never shown."""
    found, work = retrained(folder, "corrections", learn_rows.corrections(UNKNOWN, CORRECTIONS))
    return {**_told(found, work), "corrections": CORRECTIONS}


def broken_slice(folder: Path) -> dict[str, Any]:
    """As many right corrections of an intent that it never saw as wrong ones of an intent that it knows."""
    new, known = UNKNOWN[0], KNOWN[0]

    def told(row: learn_rows.Row) -> str:
        return learn_rows.right(row).replace(f'"{known}"', '"HassNevermind"')

    found, work = retrained(folder, "broken", learn_rows.corrections((new, known), 40, told))
    return _told(found, work)


def _told(found: dict[str, Any], work: Work | None) -> dict[str, Any]:
    """The decision, and what was found on the rows that nobody chose."""
    said = {"decision": found["decision"], "reason": found["reason"], "wall_s": found["wall_s"]}
    stages = work.record.stages if work else {}
    if "gate" not in stages:
        return {**said, "gain": None, "forgetting": None}
    gate, report = stages["gate"], sartor.open(stages["evaluate"]["report"]).manifest
    failed = [name for name, check in gate["checks"].items() if check["outcome"] == "fail"]
    return {**said, "gain": gate["compared"]["held_out"], "of_feedback": gate["compared"].get("feedback"), "failed": failed,
            "forgetting": report["forgetting"]}  # fmt: skip


def poisoned(folder: Path) -> dict[str, Any]:
    """One key of five turns what it says around."""
    draw = random.Random(0)
    said = []
    for number, row in learn_rows.ratings(RATINGS):
        is_right = draw.random() < GOOD
        reply = learn_rows.right(row) if is_right else '{"intent":"HassNevermind"}'
        is_bad = is_right == (learn_rows.key_of(number) == 0)  # the first key turns around
        said.append(learn_rows.feedback(number, row, reply=reply, rating=-1.0 if is_bad else 1.0))
    found, work = retrained(folder, "poisoned", said)
    return {**_told(found, work), "ratings": RATINGS, "of_the_key": RATINGS // KEYS, **named(DRAWS)}


def named(draws: int) -> dict[str, Any]:
    """How often a key that turns around is named, at several rates of good replies; and anybody where nobody does."""
    said: dict[str, Any] = {"named": {}, "false_alarm": {}}
    for good in (0.5, 0.65, 0.8, 0.9):
        for what, liar in (("named", 0), ("false_alarm", -1)):
            count = 0
            for seed in range(draws):
                draw = random.Random(f"{good}{what}{seed}")
                told = [(number % KEYS, draw.random() < good) for number in range(RATINGS)]
                rates = suspects.by_key((f"key-{key}", 1.0 if is_right != (key == liar) else -1.0) for key, is_right in told)
                some = [suspect.key for suspect in suspects.suspects(rates)]
                count += ("key-0" in some) if liar == 0 else bool(some)
            low, high = interval(count, draws)
            said[what][str(good)] = {"estimate": count / draws, "low": low, "high": high}
    return said


def further(module: str) -> Any:
    """What a file of somebody else's beside this one measures, if it is there."""
    try:
        return importlib.import_module(module).measure()
    except ModuleNotFoundError:
        return None


def measure(folder: Path, parts: Sequence[str]) -> dict[str, Any]:
    """Every part that is asked for, by the keys of INTERFACES."""
    own: dict[str, Callable[[], Any]] = {
        "corrections": lambda: corrections(folder),
        "poisoned": lambda: poisoned(folder),
        "broken_slice": lambda: broken_slice(folder),
        "rollback": lambda: learn_rollback.measure(),
    }
    found = {name: own[name]() if name in own and name in parts else None for name in PARTS}
    if {"personal", "deleted"} & set(parts):
        more = further("learn_personal") or {}
        found |= {"personal": more.get("personal"), "deleted": more.get("deleted_found")}
    poison, rollback = found["poisoned"], found["rollback"]
    return {
        "corrections": found["corrections"],
        "poisoned_promoted": None if poison is None else poison["decision"] in ("promoted", "canary", "candidate"),
        "poisoned": poison,
        "broken_slice": found["broken_slice"],
        "rollback_requests": None if rollback is None else rollback["drifts"][STATED]["p95"]["high"],
        "rollback": rollback,
        "personal": found["personal"],
        "deleted_found": found["deleted"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line; progress goes to stderr anyway")
    parser.add_argument("--work", type=Path, help="folder that keeps the live specialist for another run")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    asked = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(asked.work or Path(folder), asked.parts)
    print(json.dumps({**found, "wall_s": round(time.monotonic() - began, 1)}))


if __name__ == "__main__":
    main()
