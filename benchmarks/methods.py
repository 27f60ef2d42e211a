"""Tuning methods beside each other: seven adapters and `full`, on two sets of real rows, with three seeds each.

    python benchmarks/methods.py --data ../shared/data --work methods-work --json [--sets snips] [--methods lora full]
    python benchmarks/methods.py --small --json      # made-up rows, a tiny base, one seed: shows that everything runs

Every run is a process of its own in fp32 (at the smallest size, the first of each set), with the passes over the rows
and the batch that `auto` chooses for LoRA.
LoRA has the rate of `auto` and `full` a tenth of it: "LoRA without regret" (Schulman et al. 2025) found LoRA's best
rate at ten times that of full tuning. The other methods have LoRA's rate times RATES, which were not measured.
With `--factors 0.3 1 3` each method is first tuned at so many times its rate with seed 0, and the best goes on. All
held-out rows are answered greedily. A finished run stands in --work; a call that runs out of --minutes ends with exit
code 75, and the same command goes on.

sets {name: {method: {metric, forgetting, trainable_fraction, tokens_per_s, peak_memory_bytes, adapter_bytes, rate}}}
    metric            exact match: {mean, low, high, over_lora}; mean over the seeds, and its 95 % interval over rows;
                      over_lora: {difference, low, high} to LoRA on the same rows
    forgetting        nats a token of the worst probe: {mean, low, high}; ends: the widest of the seeds' intervals
    tokens_per_s, peak_memory_bytes   {mean, low, high} over the seeds, of the whole process
    foreseen_memory_bytes    of `tune` before the first update, means over the seeds: {estimate, low, high}, and
                             peaks_inside: of how many seeds the peak was between the ends
regret {set: {difference, low, high, within}}   LoRA minus full; within: whether the low end is above -0.02
base_parameters, rows, seeds, machine, wall_s; absent names what --sets and --methods left out
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import parts
import smallest
from defaults import SETS, Options, write_small_data
from results import last_line, print_result

ROOT = Path(__file__).resolve().parent.parent
CHOSEN_SETS = ("banking77", "snips")
SEEDS = (1, 2, 3)
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora"},
    "rslora": {"kind": "rslora"},
    "dora": {"kind": "dora"},
    "pissa": {"kind": "pissa"},
    "oft": {"kind": "oft"},
    "miss": {"kind": "miss"},
    "ia3": {"kind": "ia3"},
    "full": {"kind": "full"},
}
# times the rate of LoRA
RATES = {"lora": 1.0, "rslora": 1.0, "dora": 1.0, "pissa": 0.2, "oft": 1.0, "miss": 0.4, "ia3": 10.0, "full": 0.1}
REGRET = 0.02
Figures = dict[str, Any]


def tune_and_measure(job: dict[str, Any]) -> Figures:
    """Tune once and answer the held-out rows, in this process. job: dataset, recipe, reply_tokens, out."""
    import sartor
    from sartor.core import parquet_io
    from sartor.core.artifacts import open_artifact
    from sartor.evaluate.audit import forgetting_probes
    from sartor.inference.engine import Sampling
    from sartor.inference.generate import generate
    from sartor.models.tuned_model import open_tuned

    tuned = sartor.tune(job["recipe"], Path(job["out"]), show=False, replace=True)
    manifest = tuned.adapter.manifest
    dataset = open_artifact(job["dataset"], "dataset")
    examples = list(parquet_io.read_examples(dataset, "eval"))
    base, model = open_tuned(open_artifact(job["out"], "adapter"), bits=32)
    prompts = [base.chat.prompt_ids(example.prompt, example.tools, dataset.path) for example in examples]
    sampling = Sampling(job["reply_tokens"])
    replies = generate(model, prompts, stop=base.chat.stops, pad=base.chat.pad, sampling=sampling)
    texts = [base.chat.decode(reply.ids).strip() for reply in replies]
    run = manifest["run"]
    return {
        "scores": [float(text == example.reply.strip()) for text, example in zip(texts, examples, strict=True)],
        "ids": [example.id for example in examples],
        "forgetting": forgetting_probes.worst_probe(forgetting_probes.measure_probes(base, model)),
        "trainable": run["trainable"],
        "trainable_fraction": run["trainable_fraction"],
        "tokens_per_s": run["tokens_per_s"],
        "peak_memory_bytes": run["peak_memory_bytes"],
        "foreseen_memory_bytes": run["forecast"]["peak_memory_bytes"],
        "adapter_bytes": (Path(job["out"]) / "adapter_model.safetensors").stat().st_size,
        "path": run["path"],
        "rate": manifest["recipe"]["optimizer"]["learning_rate"],
        "batch_tokens": manifest["recipe"]["optimizer"]["batch_tokens"],
        "budget": {name: limit for name, limit in manifest["recipe"]["budget"].items() if limit is not None},
    }


class Runs:
    """Runs on one set. A finished one stands in `--work`."""

    def __init__(self, name: str, dataset: Path, folder: Path, small: bool) -> None:
        self.name, self.dataset, self.folder, self.small = name, dataset, folder, small

    def figures(self, method: str, seed: int, shared: dict[str, Any] | None = None, factor: float = 1.0) -> Figures:
        """Return the figures of one run. shared: the figures of LoRA by `auto`, whose batch and budget it has."""
        label = f"{self.name}: {method} x {factor:g}, seed {seed}{'' if shared else ' by auto'}"
        return dict(parts.run(label, lambda: self._run(method, seed, shared=shared, factor=factor)))

    def _run(self, method: str, seed: int, shared: dict[str, Any] | None, factor: float) -> Figures:
        recipe: dict[str, Any] = {
            "base": {"name": "starter", "bits": 32},
            "data": {"path": str(self.dataset), "eval_rows": 8},
            "method": METHODS[method],
            "evaluations": 1,
            "seed": seed,
            **({"budget": {"updates": 1}} if self.small else {}),
        }
        if shared:
            rate = shared["rate"] * RATES[method] * factor
            recipe["optimizer"] = {"learning_rate": rate, "batch_tokens": shared["batch_tokens"]}
            recipe["budget"] = shared["budget"]
            recipe["data"]["rehearsal"] = "none"
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            job = {
                "dataset": str(self.dataset),
                "recipe": recipe,
                "reply_tokens": SETS[self.name].reply_tokens,
                "out": str(Path(folder) / "adapter"),
            }
            if self.small and shared:  # the run by `auto` shows that a process of its own works
                return tune_and_measure(job)
            return last_line([smallest.python(), str(Path(__file__).resolve()), "--job", json.dumps(job)])


def curated(name: str, options: Options, folder: Path) -> Path:
    """The rows of a set as a Dataset with its own split, made once."""
    import sartor

    out = folder / name / "dataset"
    if not out.exists():
        sources = []
        for split, rows in zip(("train", "eval"), SETS[name].read(options), strict=True):
            file = folder / name / f"{split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
            sources.append({"path": str(file), "licence": SETS[name].licence, "split": split})
        sartor.curate({"sources": sources}, out)
    return out


def row_means(runs: Sequence[Figures]) -> list[float]:
    """The mean score of each row over the seeds."""
    return [fmean(values) for values in zip(*(run["scores"] for run in runs), strict=True)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, least and largest of the seeds' values."""
    return {"mean": fmean(values), "low": min(values), "high": max(values)}


def summary(runs: Sequence[Figures], lora: Sequence[Figures]) -> Figures:
    """The figures of a method over its seeds."""
    from sartor.evaluate.bootstrap import paired_bootstrap

    scores, groups = row_means(runs), runs[0]["ids"]
    metric = paired_bootstrap([0.0] * len(scores), scores, groups)
    over_lora = paired_bootstrap(row_means(lora), scores, groups)
    lost = [run["forgetting"] for run in runs if "skipped" not in run["forgetting"]]
    forgetting: Any = "skipped: a probe's rows are not installed"
    if lost:
        forgetting = {
            "mean": fmean(item["difference"] for item in lost),
            "low": min(item["low"] for item in lost),
            "high": max(item["high"] for item in lost),
        }
    peaks = [(run["peak_memory_bytes"], run["foreseen_memory_bytes"]) for run in runs]
    return {
        "metric": {
            "mean": fmean(scores),
            "low": metric.low,
            "high": metric.high,
            "over_lora": {"difference": over_lora.difference, "low": over_lora.low, "high": over_lora.high},
        },
        "forgetting": forgetting,
        "tokens_per_s": spread([run["tokens_per_s"] for run in runs]),
        "peak_memory_bytes": spread([float(peak) for peak, _ in peaks]),
        "foreseen_memory_bytes": {
            **{end: fmean(foreseen[end] for _, foreseen in peaks) for end in ("estimate", "low", "high")},
            "peaks_inside": sum(foreseen["low"] <= peak <= foreseen["high"] for peak, foreseen in peaks),
        },
        **{name: runs[0][name] for name in ("trainable", "trainable_fraction", "adapter_bytes", "path", "rate")},
    }


def measure(
    runs: Runs, methods: Sequence[str], seeds: Sequence[int], factors: Sequence[float]
) -> tuple[dict[str, Figures], Figures, int]:
    """Return the figures of each method on one set, LoRA's regret, and the parameters of the base."""
    from sartor.evaluate.bootstrap import paired_bootstrap

    shared = runs.figures("lora", 0)
    by_method = {}
    for method in methods:
        best = factors[0]
        if len(factors) > 1:
            tried = {factor: fmean(runs.figures(method, 0, shared, factor)["scores"]) for factor in factors}
            best = max(tried, key=tried.__getitem__)
        by_method[method] = [runs.figures(method, seed, shared, best) for seed in seeds]
    results = {method: summary(found, by_method["lora"]) for method, found in by_method.items()}
    compared = paired_bootstrap(
        row_means(by_method["full"]), row_means(by_method["lora"]), by_method["full"][0]["ids"]
    )
    regret = {"difference": compared.difference, "low": compared.low, "high": compared.high}
    base_parameters = round(shared["trainable"] / shared["trainable_fraction"]) - shared["trainable"]
    return results, {**regret, "within": compared.low > -REGRET}, base_parameters


def left_out(sets: Sequence[str], methods: Sequence[str]) -> dict[str, str]:
    """What was not asked for, which an earlier record may have (scoreboard/record.py, --keep)."""
    others = [name for name in CHOSEN_SETS if name not in sets]
    absent = {f"{part}.{name}": f"not asked for: --sets {name}" for name in others for part in ("sets", "regret")}
    for method in METHODS:
        if method not in methods:
            absent |= {f"sets.{name}.{method}": f"not asked for: --methods {method}" for name in sets}
    return absent


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of banking77, ...")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(CHOSEN_SETS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="lora and full too")
    parser.add_argument("--rows", type=int, default=400, help="most training rows of a set")
    parser.add_argument("--factors", type=float, nargs="+", default=[1.0], help="of the rate, of which one is chosen")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line (always so)")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    smallest.add_argument(parser, selections=("sets", "methods", "job"))
    arguments = parser.parse_args()
    if arguments.job:
        print(json.dumps(tune_and_measure(json.loads(arguments.job))))
        return
    from sartor.models.base import machine_facts

    began = time.monotonic()
    methods = [method for method in METHODS if method in {*arguments.methods, "lora", "full"}]
    seeds = SEEDS[:1] if arguments.small else SEEDS
    with tempfile.TemporaryDirectory() as temporary, smallest.home(arguments.small, "chitchat"):
        folder = parts.work_folder(Path(temporary))
        options = Options(arguments.data, folder, arguments.rows)
        if arguments.small:
            options = Options(write_small_data(Path(temporary) / "data"), folder, rows=12, held_out=4)
        found: dict[str, Any] = {"sets": {}, "regret": {}}
        for name in arguments.sets:
            runs = Runs(name, curated(name, options, folder), folder, arguments.small)
            found["sets"][name], found["regret"][name], found["base_parameters"] = measure(
                runs, methods, seeds, arguments.factors
            )
            print(f"methods: {name}: {json.dumps(found['regret'][name])}", file=sys.stderr)
    wall_s = round(time.monotonic() - began, 1)
    facts = {"rows": options.rows, "seeds": list(seeds), "machine": machine_facts(), "wall_s": wall_s}
    print_result({**found, "absent": left_out(arguments.sets, methods), **facts})


if __name__ == "__main__":
    main()
