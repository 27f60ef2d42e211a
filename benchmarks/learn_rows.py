"""Rows, a live specialist and feedback for learn.py: home-intents, of which the specialist was never shown three
intents.

    python benchmarks/learn_rows.py DIR      # the live specialist below DIR, once; learn.py makes it where it is
                                             absent

Its training rows are of seven intents; the rows that its Dataset holds out are of all ten, each of a template that no
training row and no correction has. So it errs on three tenths of what it is asked, and what a retrain is worth is seen
on rows that nobody chose.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

import sartor
from sartor.core import assets
from sartor.core.artifacts import kind_of
from sartor.core.records import Feedback, FeedbackAuthor
from sartor.demo.home_intents import rehearsal_rows, rows

KNOWN = (
    "HassTurnOn",
    "HassTurnOff",
    "HassGetWeather",
    "HassSetVolume",
    "HassMediaPause",
    "HassStartTimer",
    "HassVacuumCleanArea",
)
UNKNOWN = ("HassListRemoveItem", "HassClimateSetTemperature", "HassCancelTimer")
HELD_OUT, TRAIN = 8, 40  # rows of an intent
SMALL_TRAIN, SMALL_GENERAL = 8, 4
KEYS = 5
GENERAL = 48  # rows of general talk that the specialist read once
waived: tuple[str, ...] = ()  # checks of the gate
rules: dict[str, Any] = {}  # of `retrain`, beside its defaults
Row = dict[str, Any]


def shrink() -> None:
    """Take few rows of an intent and of general talk from now on; the specialist is released though it learns
    nothing.
    """
    global HELD_OUT, TRAIN, GENERAL, waived, rules
    HELD_OUT, TRAIN, GENERAL, waived = 2, SMALL_TRAIN, SMALL_GENERAL, ("gain", "forgetting")
    rules = {"at_least": {"corrections": 8}, "tuning": {"budget": {"epochs": 1}, "evaluations": 0}}


def intent_of(row: Row) -> str:
    return str(json.loads(row["messages"][-1]["content"])["intent"])


def of_intents() -> dict[str, list[Row]]:
    """Rows of each intent, each of a template of its own: the first HELD_OUT are held out."""
    found: dict[str, list[Row]] = {}
    for row in rows(assets.install("home-intents"), per_intent=HELD_OUT + TRAIN):
        found.setdefault(intent_of(row), []).append(row)
    return {name: found[name] for name in (*KNOWN, *UNKNOWN)}


def team(folder: Path, notice: Callable[[str], object]) -> Path:
    """TEAM.yaml of a team with the live specialist `home` 1.0 in it; made where it is absent."""
    release, file = folder / "home-1.0", folder / "team.yaml"
    if kind_of(release) != "release":
        _make(folder, release, notice)
    said = {
        "base": "starter",
        "agents": [{"name": "home", "release": str(release)}],
        "trust": str(folder / "keys" / "sartor.pub"),
        "retrain": {"key": str(folder / "keys"), **rules},
    }
    file.write_text(yaml.safe_dump(said, sort_keys=False), encoding="utf-8")
    return file


def _make(folder: Path, release: Path, notice: Callable[[str], object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    every = of_intents()
    known = [row for name in KNOWN for row in every[name][HELD_OUT : HELD_OUT + TRAIN]]
    held_out = [row for some in every.values() for row in some[:HELD_OUT]]
    licence, sources = assets.entry("home-intents").licence, []
    for name, some, more in (
        ("known", known, {"split": "train"}),
        ("held-out", held_out, {"split": "eval"}),
        ("general", rehearsal_rows(GENERAL), {"rehearsal": True}),
    ):
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
        sources.append({"path": str(file), "licence": licence, "use": ["commercial"], **more})
    sartor.curate({"sources": sources}, folder / "dataset", replace=True)
    recipe = {
        "base": "starter",
        "data": {"path": str(folder / "dataset"), "eval_rows": 8},
        "method": {"kind": "lora", "rank": 16, "alpha": 32, "targets": "all-linear"},
        "budget": {"epochs": 1},
        "optimizer": {"learning_rate": 2.0e-3, "batch_tokens": 256},
    }
    sartor.tune(recipe, folder / "adapter", replace=True, show=False, notice=notice)
    sartor.evaluate(folder / "adapter", out=folder / "report", replace=True, notice=notice)
    if not (folder / "keys").is_dir():
        sartor.keygen(folder / "keys")
    waivers = [sartor.Waiver(check, "benchmark", "the smallest size teaches nothing") for check in waived]
    made = {"name": "home", "version": "1.0", "key": folder / "keys", "report": folder / "report", "waivers": waivers}
    sartor.release(folder / "adapter", **made, out=release)


def right(row: Row) -> str:
    return str(row["messages"][-1]["content"])


def corrections(intents: Sequence[str], count: int, told: Callable[[Row], str] = right) -> list[Feedback]:
    """`count` corrections of prompts of these intents in turn, by KEYS people: what the reply should be, as `told`
    says.
    """
    every = of_intents()
    drawn = [row for some in zip(*(every[name][HELD_OUT:] for name in intents), strict=True) for row in some][:count]
    return [
        feedback(number, row, correction=told(row), reply='{"intent":"HassTurnOn"}')
        for number, row in enumerate(drawn)
    ]


def key_of(number: int) -> int:
    """Who says it: everybody is asked about every intent."""
    return (number + number // 10) % KEYS


def feedback(number: int, row: Row, **fields: Any) -> Feedback:
    said = FeedbackAuthor(key=f"key-{key_of(number)}")
    return Feedback(
        f"r{number}", "home@1.0", "2026-01-01T00:00:00Z", messages=tuple(row["messages"][:-1]), by=said, **fields
    )


def ratings(count: int) -> Iterator[tuple[int, Row]]:
    """Prompts of all intents in turn, of templates that nobody holds out."""
    every = of_intents()
    turns = [row for some in zip(*(some[HELD_OUT:] for some in every.values()), strict=True) for row in some]
    return enumerate(turns[:count])


def write_inbox(state: Path, said: Sequence[Feedback]) -> None:
    (state / "inbox").mkdir(parents=True)
    lines = "".join(json.dumps(one.as_json()) + "\n" for one in said)
    (state / "inbox" / "feedback-2026-01-01.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    print(team(Path(sys.argv[1]), lambda line: print(line, file=sys.stderr, flush=True)))
