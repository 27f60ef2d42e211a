"""Synthetic data: validation finds what is wrong, and lets pass what is right. Lift, audit, mitigation are parts
beside it.

`false_alarm`: the fraction of runs in which synthetic rows like reality (real rows of other groups) fail any test.
`power`: for each planted fault the fraction of runs in which a test that is meant for it fails. Both also by set of
rows.

    python benchmarks/synth.py --json [--parts false_alarm power] [--seeds 40] [--first 0] [--rows 400]
    python benchmarks/synth.py --json --small    # every part on made-up rows and a tiny base: shows that it runs

The tests and limits are those of `sartor validate` with its defaults, but for fewer permutations, and that an encoder
reads all texts of a set once and not those of each run.

A part that was not asked for is named under `absent`.

`lift`, `audit` and `mitigation` are functions of `synth_lift.py` and `synth_audit.py`
beside this file (FURTHER), given the number of seeds and whether they run at their smallest size.
"""

from __future__ import annotations

import argparse
import importlib
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import parts
import smallest
import synth_rows
from results import print_result
from synth_rows import PLANTS, SETS

import sartor  # noqa: F401  (offers the encoders)
from sartor.core.encoder_registry import open_encoder, register_encoder
from sartor.core.records import digest
from sartor.synthesize.validate.samples import ValidationSamples
from sartor.synthesize.validate.types import ValidateOptions
from sartor.synthesize.validate.validation import verdicts
from sartor.text.encoders import prompt_text

FURTHER = {
    "lift": ("synth_lift", "measure"),
    "audit": ("synth_audit", "audit"),
    "mitigation": ("synth_audit", "mitigation"),
}
PARTS = ("false_alarm", "power", *FURTHER)
NOTHING = ""  # in place of a plant
SMALL_ROWS, SMALL_PERMUTATIONS = 24, 199


def notice(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Case:
    """Rows as `validate` takes them: of a set and a seed, with a plant or with nothing."""

    name: str
    plant: str
    seed: int
    sides: ValidationSamples


@dataclass(frozen=True)
class Run:
    """A case of a set with its plant, and the tests that failed in it."""

    name: str
    plant: str
    failed: list[str]


class Remembered:
    """An encoder that has read all texts of a set at once: to fit it anew for every run is most of the work."""

    name, cut, tokens = "remembered", 0, 0

    def __init__(self, encoder: str, cases: list[Case]) -> None:
        rows = [row for case in cases for side in (case.sides.synthetic, case.sides.real) for row in side]
        known = sorted({text for row in rows for text in (prompt_text(row), row.reply)})
        self._of = dict(zip(known, np.asarray(open_encoder(encoder).encode(known), np.float32), strict=True))

    def encode(self, texts: Sequence[str]) -> Any:
        """See Encoder."""
        return np.stack([self._of[text] for text in texts])


def cases_of(name: str, asked: argparse.Namespace) -> list[Case]:
    """All runs of a set: by seed, without a plant and with each that it is for."""
    rows, found = synth_rows.read(name), []
    for seed in range(asked.first, asked.first + asked.seeds):
        real, seeds, pool = synth_rows.split(rows, asked.rows, seed)
        if "false_alarm" in asked.parts:
            found.append(Case(name, NOTHING, seed, synth_rows.sides(pool[: len(real)], real, seeds)))
        for plant, (changes, _) in PLANTS.items() if "power" in asked.parts else ():
            if name in changes:
                planted = changes[name](pool, len(real), seeds, random.Random(digest([plant, name, seed])))
                found.append(Case(name, plant, seed, synth_rows.sides(planted, real, seeds)))
    return found


def failures(asked: argparse.Namespace) -> list[Run]:
    """Every run of every set."""
    found = []
    for name in SETS:
        pairs = parts.run(f"runs of {name}", lambda name=name: failures_of(name, asked))
        found += [Run(name, plant, failed) for plant, failed in pairs]
        notice(f"{name}: {heard(found, name)}")
    return found


def failures_of(name: str, asked: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """(plant, the tests that failed) of every run of a set."""
    cases = cases_of(name, asked)
    remembered = Remembered(asked.encoder, cases)
    register_encoder(remembered.name, lambda: remembered)
    pairs = []
    for case in cases:
        how = ValidateOptions(encoder=remembered.name, permutations=asked.permutations, seed=case.seed)
        pairs.append((case.plant, [test.name for test in verdicts(case.sides, how) if test.verdict == "fail"]))
    return pairs


def heard(runs: list[Run], name: str) -> str:
    """Of a set, by plant: in how many runs a test failed that is meant for it, or any where nothing is planted."""
    counts: dict[str, list[bool]] = {}
    for run in runs:
        if run.name == name:
            meant = set(run.failed) if run.plant == NOTHING else PLANTS[run.plant][1] & set(run.failed)
            counts.setdefault(run.plant or "nothing planted", []).append(bool(meant))
    return ", ".join(f"{plant} {sum(hits)}/{len(hits)}" for plant, hits in counts.items())


def false_alarm(runs: list[Run]) -> dict[str, Any]:
    """Sets in which nothing is planted: fraction of runs with any failure, and which tests those were."""
    quiet = [(run.name, run.failed) for run in runs if run.plant == NOTHING]
    return {
        "false_alarm": _part([bool(failed) for _, failed in quiet]),
        "runs": len(quiet),
        "by_set": {name: _part([bool(failed) for of, failed in quiet if of == name]) for name in SETS},
        "failed": dict(Counter(test for _, failed in quiet for test in failed)),
    }


def power(runs: list[Run]) -> dict[str, Any]:
    """Planted faults: fraction of runs in which a test that is meant for the fault fails, and any test at all."""
    said: dict[str, Any] = {"power": {}, "by_set": {}, "any_test": {}, "runs": {}}
    for plant, (changes, meant) in PLANTS.items():
        hits = {
            name: [bool(meant & set(run.failed)) for run in runs if (run.plant, run.name) == (plant, name)]
            for name in changes
        }
        said["power"][plant] = _part([hit for some in hits.values() for hit in some])
        said["by_set"][plant] = {name: _part(some) for name, some in hits.items()}
        said["any_test"][plant] = _part([bool(run.failed) for run in runs if run.plant == plant])
        said["runs"][plant] = sum(len(some) for some in hits.values())
    return said


def _part(hits: list[bool]) -> float:
    return round(sum(hits) / len(hits), 4)


def further(part: str, seeds: int, is_small: bool) -> Any:
    """A part of another file. Raises SystemExit where nobody has written it."""
    module, name = FURTHER[part]
    if not (Path(__file__).parent / f"{module}.py").is_file():
        raise SystemExit(f"the part {part!r} has no {module}.py beside {Path(__file__).name}")
    measure: Callable[[int, bool], Any] = getattr(importlib.import_module(module), name)
    return measure(seeds, is_small)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="(always: the last line is one JSON object)")
    smallest.add_argument(parser)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["false_alarm", "power"])
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument(
        "--first",
        type=int,
        default=0,
        help="the first seed: what was chosen by seeds of 100 on is told by those below",
    )
    parser.add_argument("--rows", type=int, default=400, help="most rows of a side")
    parser.add_argument("--permutations", type=int, default=499)
    parser.add_argument("--encoder", default="tfidf")
    asked = parser.parse_args()
    if asked.small:
        asked.parts, asked.seeds, asked.rows, asked.permutations = list(PARTS), 1, SMALL_ROWS, SMALL_PERMUTATIONS
    began = time.monotonic()
    with smallest.home(asked.small, "home-intents", "chitchat", "construction-faq"):
        said = measured(asked)
    said["absent"] = {part: f"not asked for: --parts {part}" for part in PARTS if part not in asked.parts}
    names = ("seeds", "first", "rows", "permutations", "encoder")
    how = {name: getattr(asked, name) for name in names}
    print_result({**said, "how": how, "wall_s": round(time.monotonic() - began, 1)})


def measured(asked: argparse.Namespace) -> dict[str, Any]:
    """Every part that was asked for."""
    said: dict[str, Any] = {}
    if {"false_alarm", "power"} & set(asked.parts):
        runs = failures(asked)
        for part, measured in (("false_alarm", false_alarm), ("power", power)):
            if part in asked.parts:
                found = measured(runs)
                said |= {part: found.pop(part), f"{part}_detail": found}
    for part in FURTHER:
        if part in asked.parts:
            said[part] = further(part, asked.seeds, asked.small)
    return said


if __name__ == "__main__":
    main()
