"""What agents learn from use: what 60 corrections are worth, what poison comes to, and how soon drift is sent back.

    python benchmarks/learn.py --json [--work DIR] [--parts NAME ...]
    python benchmarks/learn.py --json --small    # a tiny base and little feedback: shows that it runs

corrections     a specialist that was never shown three of ten intents is corrected 60 times by five people; `sartor
                retrain`. The gain is of rows by template that its Dataset holds out: nobody chose, corrected or
                trained on them.
poisoned        one of five keys turns the ratings that it gives around, a fifth of all; `sartor retrain`. And the same
                drawn many times without a tuning: how often the key is named, and how often anybody is where nobody
                does so.
broken_slice    the corrections of one intent that it never saw are right, those of one that it knows are wrong: on
                average it is about as good as before, and an intent is broken.
rollback        `learn_rollback.py`: requests until a version that drifts after its promotion is sent back.
personal, deleted   `measure()` of learn_personal.py.

A part that was not asked for is named under `absent`, and so is a figure of a retrain that came to no gate.
One core: everything takes about a quarter of an hour.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import learn_personal
import learn_rollback
import learn_rows
import parts
import smallest
from learn_rows import KEYS, KNOWN, UNKNOWN
from results import print_result

import sartor
from sartor.core.records import Feedback
from sartor.core.statistics import interval
from sartor.learn import promotion_checks
from sartor.learn.run_record import RunRecord

PARTS = ("corrections", "poisoned", "broken_slice", "rollback", "personal", "deleted")
SMALL_ASSETS = ("home-intents", "chitchat")


@dataclass
class Size:
    """How much people say, and how often it is drawn without a tuning. runs: of `learn_rollback.py`."""

    corrections: int = 60
    broken: int = 40
    ratings: int = 160
    draws: int = 500
    runs: int = 100


size = Size()
# corrections enough for a retrain, the others too few
SMALL = Size(8, 4, 40, 5, 2)
# of the replies that people rate, as many are right as the specialist has right
GOOD = 0.65
# the drift that `rollback_requests` is of
STATED = "format 0.5 after 0"


def notice(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def retrained(folder: Path, name: str, said: Sequence[Feedback]) -> tuple[dict[str, Any], RunRecord | None]:
    """What a retrain on this feedback comes to: the command's JSON, and its record. The team's state is made anew."""
    team, state = learn_rows.team(folder, notice), folder / f"state-{name}"
    shutil.rmtree(state, ignore_errors=True)
    learn_rows.write_inbox(state, said)
    found = sartor.retrain(
        team, "home", wishes=sartor.Wishes(promote=True), flags=["--state", str(state)], notice=notice
    )
    return found.as_json(), RunRecord.open(Path(found.folder)) if found.folder else None


def corrections(folder: Path) -> dict[str, Any]:
    """60 corrections of what the specialist was never shown."""
    found, work = retrained(folder, "corrections", learn_rows.corrections(UNKNOWN, size.corrections))
    return {**_told(found, work), "corrections": size.corrections}


def broken_slice(folder: Path) -> dict[str, Any]:
    """As many right corrections of an intent that it never saw as wrong ones of an intent that it knows."""
    new, known = UNKNOWN[0], KNOWN[0]

    def told(row: learn_rows.Row) -> str:
        return learn_rows.right(row).replace(f'"{known}"', '"HassNevermind"')

    found, work = retrained(folder, "broken", learn_rows.corrections((new, known), size.broken, told))
    return _told(found, work)


def _told(found: dict[str, Any], work: RunRecord | None) -> dict[str, Any]:
    """The decision, and what was found on the rows that nobody chose."""
    said = {"decision": found["decision"], "reason": found["reason"], "wall_s": found["wall_s"]}
    stages = work.record.stages if work else {}
    if "gate" not in stages:
        return {**said, "absent": dict.fromkeys(("gain", "forgetting"), f"no gate was reached: {found['reason']}")}
    gate, report = stages["gate"], sartor.open(stages["evaluate"]["report"]).manifest
    failed = [name for name, check in gate["checks"].items() if check["outcome"] == "fail"]
    return {
        **said,
        "gain": gate["compared"]["held_out"],
        "failed": failed,
        "forgetting": report["forgetting"],
        **({"of_feedback": gate["compared"]["feedback"]} if "feedback" in gate["compared"] else {}),
    }


def poisoned(folder: Path) -> dict[str, Any]:
    """One key of five turns what it says around."""
    draw = random.Random(0)
    said = []
    for number, row in learn_rows.ratings(size.ratings):
        is_right = draw.random() < GOOD
        reply = learn_rows.right(row) if is_right else '{"intent":"HassNevermind"}'
        is_bad = is_right == (learn_rows.key_of(number) == 0)  # the first key turns around
        said.append(learn_rows.feedback(number, row, reply=reply, rating=-1.0 if is_bad else 1.0))
    found, work = retrained(folder, "poisoned", said)
    return {**_told(found, work), "ratings": size.ratings, "of_the_key": size.ratings // KEYS, **named(size.draws)}


def named(draws: int) -> dict[str, Any]:
    """How often a key that turns around is named, at several rates of good replies; and anybody where nobody does."""
    said: dict[str, Any] = {"named": {}, "false_alarm": {}}
    for good in (0.5, 0.65, 0.8, 0.9):
        for what, liar in (("named", 0), ("false_alarm", -1)):
            count = 0
            for seed in range(draws):
                draw = random.Random(f"{good}{what}{seed}")
                told = [(number % KEYS, draw.random() < good) for number in range(size.ratings)]
                rates = promotion_checks.by_key(
                    (f"key-{key}", 1.0 if is_right != (key == liar) else -1.0) for key, is_right in told
                )
                some = [suspect.key for suspect in promotion_checks.suspects(rates)]
                count += ("key-0" in some) if liar == 0 else bool(some)
            low, high = interval(count, draws)
            said[what][str(good)] = {"estimate": count / draws, "low": low, "high": high}
    return said


def measure(folder: Path, names: Sequence[str], is_small: bool) -> dict[str, Any]:
    """Every part that is asked for, by the keys of INTERFACES."""
    own: dict[str, Callable[[], Any]] = {
        "corrections": lambda: parts.run("corrections", lambda: corrections(folder)),
        "poisoned": lambda: parts.run("poisoned", lambda: poisoned(folder)),
        "broken_slice": lambda: parts.run("broken_slice", lambda: broken_slice(folder)),
        "rollback": lambda: learn_rollback.measure(size.runs),
    }
    found = {name: own[name]() for name in PARTS if name in own and name in names}
    if "poisoned" in found:
        found["poisoned_promoted"] = found["poisoned"]["decision"] in ("promoted", "canary", "candidate")
    if "rollback" in found:
        found["rollback_requests"] = found["rollback"]["drifts"][STATED]["p95"]["high"]
    if {"personal", "deleted"} & set(names):
        more = parts.run("personal", lambda: learn_personal.measure(is_small))
        found |= {"personal": more["personal"], "deleted_found": more["deleted_found"]}
    found["absent"] = {part: f"not asked for: --parts {part}" for part in PARTS if part not in names}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--json", action="store_true", help="one JSON object on the last line; progress goes to stderr anyway"
    )
    smallest.add_argument(parser, has_work=True)
    parser.add_argument("--work", type=Path, help="folder of the live specialist and of finished parts")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    asked = parser.parse_args()
    began = time.monotonic()
    with smallest.home(asked.small, *SMALL_ASSETS), tempfile.TemporaryDirectory() as folder:
        if asked.small:
            vars(size).update(vars(SMALL))
            learn_rows.shrink()
        found = measure(asked.work or Path(folder), asked.parts, asked.small)
    print_result({**found, "wall_s": round(time.monotonic() - began, 1)})


if __name__ == "__main__":
    main()
