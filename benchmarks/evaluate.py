"""What an evaluation costs: base and tuned in one batch of compiled kernels, beside each side by itself as before.

    python benchmarks/evaluate.py --json --data ../shared/data [--rows 200] [--pairs 2] [--work DIR] [--bf16]
    python benchmarks/evaluate.py --json --small      # a tiny base and made-up rows: shows that everything runs

An adapter is tuned on `--train-rows` rows of each set, its answers are held-out rows of the set's own test file. Then
the old way and the new one take turns, `--pairs` times, on the same rows in one process. `ratios` are of the seconds
of the whole
`sartor evaluate` (opening the base, replies, losses, forgetting, intervals), `measuring_ratios` of replies and losses
alone. In the old way the probes of forgetting go through each side by itself too.
`exact_match_ratios`: the same for the new way with `--metrics exact_match loss`, where a reply ends as soon as it
cannot match. Both are of the first evaluation of a base on a machine. `later_ratios` and `exact_match_later_ratios`
are of any later one, which knows what the base scores in the probes (`evaluate/audit/forgetting_probes.py`).

`replies_differ`: rows whose replies are not the same text, of base and tuned; `largest_loss_difference` in nats a
token;
`scores_differ`: metrics, of every metric and both sides, that are not equal to 1e-4. The program exits with 1 if an
fp32 reply or score differs. The base computes in fp32, with `--bf16` in bf16, where other shapes of products round
otherwise; there the program only tells.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import parts
import smallest
import torch
from results import print_result

import sartor
from sartor.core import parquet_io
from sartor.evaluate import evaluation
from sartor.evaluate.audit import forgetting_probes
from sartor.evaluate.paired_measurement import measure_models
from sartor.inference.local import paired_replies
from sartor.models import base as base_module

SETS = ("banking77", "restaurant8k")
CLOSE = 1e-4


def notice(line: str) -> None:
    """Tell whoever waits."""
    print(line, file=sys.stderr, flush=True)


def read_set(folder: Path, name: str, part: str, count: int) -> list[dict[str, Any]]:
    """`count` rows of a part of a set, drawn by seed, as conversations."""
    if name == "banking77":
        with (folder / name / f"{part}.csv").open(encoding="utf-8", newline="") as file:
            pairs = [(row["text"], row["category"]) for row in csv.DictReader(file)]
    else:
        lines = (folder / name / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
        pairs = [(row["text"], json.dumps(row["slots"], sort_keys=True)) for row in map(json.loads, lines)]
    random.Random(0).shuffle(pairs)
    return [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]}
        for text, reply in pairs[:count]
    ]


def write_small_sets(folder: Path) -> Path:
    """Write made-up files in the layout of the sets."""
    for part, first in (("train", 0), ("test", 40)):
        numbers = range(first, first + 40)
        (folder / "banking77").mkdir(parents=True, exist_ok=True)
        (folder / "restaurant8k").mkdir(exist_ok=True)
        texts = [f"switch the light {number} on" for number in numbers]
        lines = ["text,category", *(f"{text},kind_{index % 3}" for index, text in enumerate(texts))]
        (folder / "banking77" / f"{part}.csv").write_text("\n".join(lines) + "\n")
        rows = [{"text": text, "slots": {"people": str(index)}} for index, text in enumerate(texts)]
        (folder / "restaurant8k" / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def tuned_adapter(work: Path, data: Path, name: str, train_rows: int) -> tuple[Path, float]:
    """The Adapter of a set and the seconds of its tuning; made where it is not there from an earlier run."""
    adapter, seconds_file = work / f"{name}-adapter", work / f"{name}-tune_s.json"
    if adapter.is_dir() and seconds_file.is_file():
        return adapter, float(json.loads(seconds_file.read_text()))
    rows_file = work / f"{name}-train.jsonl"
    rows_file.write_text("".join(json.dumps(row) + "\n" for row in read_set(data, name, "train", train_rows)))
    source = {"path": str(rows_file), "licence": "CC-BY-4.0"}
    recipe = {"sources": [source], "steps": [], "split": {"eval_fraction": 0.02, "by": "group"}}
    sartor.curate(recipe, work / f"{name}-data", replace=True, notice=notice)
    began = time.monotonic()
    tuning = {
        "base": {"name": "starter"},
        "data": {"path": str(work / f"{name}-data")},
        "optimizer": {"batch_tokens": 256, "learning_rate": 1e-3},
        "budget": {"epochs": 1},
    }
    sartor.tune(tuning, adapter, replace=True, show=False, notice=notice)
    seconds_file.write_text(json.dumps(round(time.monotonic() - began, 1)))
    return adapter, float(json.loads(seconds_file.read_text()))


def timed_evaluation(
    adapter: Path, rows_file: Path, rows: int, metrics: Sequence[str], *, is_paired: bool, probes: Path
) -> dict[str, Any]:
    """One `sartor evaluate`: seconds, its metrics and its rows. Without the paired engine each side is measured by
    itself.

    probes: folder of the losses of bases that are known.
    """
    measuring_s = 0.0

    def measure(*arguments: Any, **options: Any) -> Any:
        nonlocal measuring_s
        began = time.monotonic()
        outputs = measure_models(*arguments, **options)
        measuring_s = time.monotonic() - began
        return outputs

    way = nullcontext() if is_paired else mock.patch.object(paired_replies, "open_pair", lambda *arguments: None)
    kept = mock.patch.object(forgetting_probes, "folder", lambda name: probes)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(evaluation, "measure_models", measure), way, kept:
        began = time.monotonic()
        report = evaluation.evaluate(
            adapter, data=rows_file, out=Path(folder) / "report", metrics=metrics, most_rows=rows, notice=notice
        ).report
        whole_s = time.monotonic() - began
        table = sorted(parquet_io.read_file(report.path / "rows.parquet"), key=lambda row: str(row["id"]))
        probe_losses = {name: probe for name, probe in report.manifest["probes"].items() if "skipped" not in probe}
        scores = {**report.manifest["metrics"], **probe_losses}
        return {"s": whole_s, "measuring_s": measuring_s, "metrics": scores, "rows": table}


def scores_differ(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Metrics of `new` whose value for base or tuned is another than that of `old`."""
    return [
        f"{side} {name}"
        for name, metric in new["metrics"].items()
        for side in ("base", "tuned")
        if abs(metric[side] - old["metrics"][name][side]) > CLOSE
    ]


def measure_turn(adapter: Path, rows_file: Path, rows: int, *, is_reversed: bool) -> dict[str, dict[str, Any]]:
    """Every way once, one after the other; the new one twice, as the first evaluation of its base and as a later
    one.
    """
    ways: list[tuple[str, bool, tuple[str, ...]]] = [
        ("old", False, ()),
        ("new", True, ()),
        ("ended", True, ("exact_match", "loss")),
    ]
    results = {}
    for way, is_paired, metrics in reversed(ways) if is_reversed else ways:
        with tempfile.TemporaryDirectory() as folder:
            for name in [way, f"later_{way}"] if is_paired else [way]:
                results[name] = timed_evaluation(
                    adapter, rows_file, rows, metrics, is_paired=is_paired, probes=Path(folder)
                )
                notice(f"{name} way {metrics or ''}: {results[name]['s']:.1f} s")
    return results


def measure_set(name: str, adapter: Path, rows_file: Path, rows: int, pairs: int) -> dict[str, Any]:
    """The figures of one set."""
    turns = [
        parts.run(
            f"{name}, pair {index + 1}",
            functools.partial(measure_turn, adapter, rows_file, rows, is_reversed=index % 2 == 1),
        )
        for index in range(pairs)
    ]
    old, new, later, ended, later_ended = (
        [turn[way] for turn in turns] for way in ("old", "new", "later_new", "ended", "later_ended")
    )

    def ratios(others: Sequence[dict[str, Any]], key: str) -> list[float]:
        return [round(before[key] / after[key], 2) for before, after in zip(old, others, strict=True)]

    first, second = old[0]["rows"], new[0]["rows"]
    row_pairs = list(zip(first, second, strict=True))
    return {
        "rows": len(first),
        "old_s": [round(result["s"], 1) for result in old],
        "new_s": [round(result["s"], 1) for result in new],
        "ratios": ratios(new, "s"),
        "ratio": statistics.median(ratios(new, "s")),
        "later_s": [round(result["s"], 1) for result in later],
        "later_ratios": ratios(later, "s"),
        "later_ratio": statistics.median(ratios(later, "s")),
        "measuring_old_s": [round(result["measuring_s"], 1) for result in old],
        "measuring_new_s": [round(result["measuring_s"], 1) for result in new],
        "measuring_ratios": ratios(new, "measuring_s"),
        "measuring_ratio": statistics.median(ratios(new, "measuring_s")),
        "exact_match_ratios": ratios(ended, "s"),
        "exact_match_ratio": statistics.median(ratios(ended, "s")),
        "exact_match_later_ratios": ratios(later_ended, "s"),
        "exact_match_later_ratio": statistics.median(ratios(later_ended, "s")),
        "exact_match_measuring_ratio": statistics.median(ratios(ended, "measuring_s")),
        "cut_replies": sum(row.get("base_is_cut", False) + row.get("tuned_is_cut", False) for row in ended[0]["rows"]),
        "replies_differ": {
            side: sum(before[f"{side}_reply"] != after[f"{side}_reply"] for before, after in row_pairs)
            for side in ("base", "tuned")
        },
        "largest_loss_difference": max(
            abs(before[f"{side}_loss"] - after[f"{side}_loss"])
            for before, after in row_pairs
            for side in ("base", "tuned")
        ),
        "scores_differ": [
            f"{way} {name}"
            for way, result in (("new", new), ("later", later), ("ended", ended), ("later ended", later_ended))
            for name in scores_differ(old[0], result[0])
        ],
        "scores": {
            name: {side: round(metric[side], 6) for side in ("base", "tuned")}
            for name, metric in new[0]["metrics"].items()
        },
    }


def computing_in(dtype: torch.dtype) -> AbstractContextManager[Any]:
    """A block in which bases are opened in `dtype`, whatever the machine multiplies natively."""
    return mock.patch.object(base_module, "best_dtype", lambda device: dtype)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="(always: the last line is one JSON object)")
    smallest.add_argument(parser, has_work=True, selections=("sets", "pairs"))
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data"), help="folder of banking77 and restaurant8k"
    )
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--rows", type=int, default=200, help="held-out rows of each set")
    parser.add_argument("--train-rows", type=int, default=300)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--work", type=Path, help="folder of finished parts and Adapters, kept by code and options")
    parser.add_argument(
        "--bf16", action="store_true", help="compute the base in bf16 (one pair tells how many replies differ)"
    )
    arguments = parser.parse_args()
    rows, train_rows, pairs = (
        (6, 12, 1) if arguments.small else (arguments.rows, arguments.train_rows, arguments.pairs)
    )
    began = time.monotonic()
    result: dict[str, Any] = {"sets": {}}
    with tempfile.TemporaryDirectory() as folder, smallest.home(arguments.small, "chitchat"):
        work = parts.work_folder(Path(folder))
        data = write_small_sets(Path(folder) / "sets") if arguments.small else arguments.data
        for name in arguments.sets[:1] if arguments.small else arguments.sets:
            adapter, tune_s = tuned_adapter(work, data, name, train_rows)
            rows_file = work / f"{name}-test.jsonl"
            rows_file.write_text("".join(json.dumps(row) + "\n" for row in read_set(data, name, "test", rows)))
            with computing_in(torch.bfloat16 if arguments.bf16 else torch.float32):
                result["sets"][name] = {"tune_s": tune_s, **measure_set(name, adapter, rows_file, rows, pairs)}
    machine = {"processor": platform.machine(), "threads": torch.get_num_threads(), "bf16": arguments.bf16}
    print_result({**result, "machine": machine, "wall_s": round(time.monotonic() - began, 1)})
    if not arguments.bf16 and any(
        measured["scores_differ"] or any(measured["replies_differ"].values()) for measured in result["sets"].values()
    ):
        sys.exit("the new way says or scores something else than the old one")


if __name__ == "__main__":
    main()
