"""Synthetic data: validation finds what is wrong, and lets pass what is right. Lift, audit, mitigation are parts beside it.

`false_alarm`: the fraction of runs in which synthetic rows like reality (real rows of other groups) fail any test.
`power`: for each planted fault the fraction of runs in which a test that is meant for it fails. Both also by set of rows.

    python benchmarks/synth.py --json [--parts false_alarm power] [--seeds 40] [--rows 160]

A part that was not asked for is null. `lift`, `audit` and `mitigation` are functions of `synth_lift.py` and `synth_audit.py`
beside this file (FURTHER), given the number of seeds.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import synth_rows
from synth_rows import PLANTS, SETS, Row

import sartor  # noqa: F401  (offers the encoders)
from sartor.core.records import digest
from sartor.curate.validate.options import ValidateOptions
from sartor.curate.validate.verb import validated

FURTHER = {"lift": ("synth_lift", "measure"), "audit": ("synth_audit", "audit"), "mitigation": ("synth_audit", "mitigation")}
PARTS = ("false_alarm", "power", *FURTHER)


def options(seed: int, permutations: int, encoder: str) -> ValidateOptions:
    return ValidateOptions(encoder=encoder, permutations=permutations, seed=seed)


def notice(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def failed(synthetic: list[Row], real: list[Row], seeds: list[Row], how: ValidateOptions) -> list[str]:
    """The tests that failed."""
    return [test.name for test in validated(synth_rows.sides(synthetic, real, seeds), how).failed]


def false_alarm(rows: dict[str, list[Row]], asked: argparse.Namespace) -> dict[str, Any]:
    """Sets in which nothing is planted: fraction of runs with any failure, and which tests those were."""
    found: dict[str, list[list[str]]] = {name: [] for name in SETS}
    for seed in range(asked.seeds):
        for name in SETS:
            real, seeds, pool = synth_rows.split(rows[name], asked.rows, seed)
            found[name].append(failed(pool[: len(real)], real, seeds, options(seed, asked.permutations, asked.encoder)))
        notice(f"false alarm, seed {seed}: {sum(bool(run) for some in found.values() for run in some)}")
    runs = [run for some in found.values() for run in some]
    return {
        "false_alarm": sum(bool(run) for run in runs) / len(runs),
        "runs": len(runs),
        "by_set": {name: sum(bool(run) for run in some) / len(some) for name, some in found.items()},
        "failed": sorted({test for run in runs for test in run}),
    }


def power(rows: dict[str, list[Row]], asked: argparse.Namespace) -> dict[str, Any]:
    """Planted faults: fraction of runs in which a test that is meant for the fault fails, and any test at all."""
    said: dict[str, Any] = {"power": {}, "by_set": {}, "any_test": {}, "runs": {}}
    for plant, (changes, meant) in PLANTS.items():
        hits: dict[str, list[bool]] = {name: [] for name in changes}
        any_hits = []
        for seed in range(asked.seeds):
            for name, change in changes.items():
                real, seeds, pool = synth_rows.split(rows[name], asked.rows, seed)
                planted = change(pool, len(real), seeds, random.Random(digest([plant, name, seed])))
                tests = failed(planted, real, seeds, options(seed, asked.permutations, asked.encoder))
                hits[name].append(bool(meant & set(tests)))
                any_hits.append(bool(tests))
        runs = [hit for some in hits.values() for hit in some]
        notice(f"{plant}: {sum(runs)} of {len(runs)}")
        said["power"][plant] = sum(runs) / len(runs)
        said["any_test"][plant] = sum(any_hits) / len(any_hits)
        said["by_set"][plant] = {name: sum(some) / len(some) for name, some in hits.items()}
        said["runs"][plant] = len(runs)
    return said


def further(part: str, seeds: int) -> Any:
    """A part of another file. Raises SystemExit where nobody has written it."""
    module, name = FURTHER[part]
    if not (Path(__file__).parent / f"{module}.py").is_file():
        raise SystemExit(f"the part {part!r} has no {module}.py beside {Path(__file__).name}")
    measure: Callable[[int], Any] = getattr(importlib.import_module(module), name)
    return measure(seeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="(always: the last line is one JSON object)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["false_alarm", "power"])
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--rows", type=int, default=160, help="most rows of a side")
    parser.add_argument("--permutations", type=int, default=699)
    parser.add_argument("--encoder", default="tfidf")
    asked = parser.parse_args()
    began = time.monotonic()
    said: dict[str, Any] = {part: None for part in PARTS}
    if {"false_alarm", "power"} & set(asked.parts):
        rows = {name: synth_rows.read(name) for name in SETS}
        if "false_alarm" in asked.parts:
            found = false_alarm(rows, asked)
            said |= {"false_alarm": found.pop("false_alarm"), "false_alarm_detail": found}
        if "power" in asked.parts:
            found = power(rows, asked)
            said |= {"power": found.pop("power"), "power_detail": found}
    for part in FURTHER:
        if part in asked.parts:
            said[part] = further(part, asked.seeds)
    how = {"seeds": asked.seeds, "rows": asked.rows, "permutations": asked.permutations, "encoder": asked.encoder}
    print(json.dumps({**said, "how": how, "wall_s": round(time.monotonic() - began, 1)}))


if __name__ == "__main__":
    main()
