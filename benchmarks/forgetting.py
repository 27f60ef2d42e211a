"""What the default rows against forgetting cost in what is learnt, and what they hold.

    python benchmarks/forgetting.py --data ../shared/data --work DIR [--sets snips] [--arms auto] [--json]
    python benchmarks/forgetting.py --small --json    # made-up rows, a tiny base: shows that everything runs

Each set of `defaults.py` whose rows are text is tuned by the default settings with one seed, but for the rehearsal:

    none          no rows against forgetting
    small_talk    a fifth of the tokens are asset:small-talk, whose replies are learnt (the default until 2026-12-01)
    held_talk     the same rows, on which the model is held at its base (`loss: kl`)
    auto          the default: general rows, on which the model is held at its base

The score is that of `defaults.py`: exact match on 200 held-out rows, or their loss. Forgetting is that of the three
probes of `sartor evaluate`, in nats a token, with 95 % intervals; the gate's limit is 0.5 for the upper end of the
worst. A finished run stands in --work, by code and options, so that a later call goes on (`unfinished`).

sets {name: {arm: {score, worst, probes {name: [estimate, low, high]}, updates, tune_s}}}    worst: highest upper end
worst_of_auto    of all sets
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import defaults
import parts
import smallest
from defaults import SETS, Options, OutOfTimeError, Runs
from results import print_result

from sartor.models.base import machine_facts

ROOT = Path(__file__).resolve().parent.parent
TALK = "asset:small-talk"
ARMS: dict[str, dict[str, Any]] = {
    "none": {"rehearsal": "none"},
    "small_talk": {"rehearsal": {"path": TALK}},
    "held_talk": {"rehearsal": {"path": TALK, "loss": "kl", "weight": 1.0}},
    "auto": {},
}
NAMES = [name for name, training_set in SETS.items() if not training_set.is_picture and not training_set.is_large]


def measure(name: str, arms: Sequence[str], options: Options) -> dict[str, Any]:
    """The arms of one set. Raises OutOfTimeError where this call's minutes end before they are finished."""
    folder = options.work / name
    folder.mkdir(parents=True, exist_ok=True)
    runs = Runs(SETS[name], folder, options)
    return {arm: _figures(runs.result(arm, ARMS[arm], 0)) for arm in arms}


def _figures(run: dict[str, Any]) -> dict[str, Any]:
    ends = ("difference", "low", "high")
    probes = {probe: [result[end] for end in ends] for probe, result in run["forgetting"].items() if "high" in result}
    return {
        "score": run["value"],
        "worst": max((high for _, _, high in probes.values()), default=None),
        "probes": probes,
        "updates": run["updates"],
        "tune_s": run["tune_s"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the public sets")
    parser.add_argument("--sets", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--rows", type=int, default=400, help="most training rows of a set")
    parser.add_argument("--work", type=Path, default=Path("forgetting-work"), help="finished runs")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    smallest.add_argument(parser, has_work=True, selections=("sets", "arms"))
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    names, late = (["banking77"] if arguments.small else arguments.sets), []
    sets: dict[str, dict[str, Any]] = {}
    with smallest.home(arguments.small, *defaults.SMALL_ASSETS, "chitchat"), tempfile.TemporaryDirectory() as folder:
        if arguments.small:
            options = replace(defaults.small_options(Path(folder)), has_probes=True)
        else:
            work = parts.work_folder(arguments.work)
            options = Options(arguments.data, work, arguments.rows, deadline=deadline, has_probes=True)
        for name in names:
            try:
                sets[name] = measure(name, arguments.arms, options)
            except OutOfTimeError:
                late.append(name)
    worst = [arms["auto"]["worst"] for arms in sets.values() if "auto" in arms]
    result = {"sets": sets, "worst_of_auto": max(worst, default=None), "unfinished": late, "machine": machine_facts()}
    print_result(result, indent=None if arguments.json else 1)


if __name__ == "__main__":
    main()
