"""Client-level privacy that is of use: many clients with few rows each, few trained numbers, noise in the secure sum.

    python benchmarks/federate_private.py --work DIR --json
    python benchmarks/federate_private.py --work DIR --train 60 --json    # 60 clients are trained and stand for all
    python benchmarks/federate_private.py --work DIR --clients 100 300 1000 --train 60 --epsilons 2 8 --json
    python benchmarks/federate_private.py --small --json                  # a tiny random base, made-up rows

Each client has `--rows` rows of `--intents` intents of banking77; the reply is a letter for the intent. A is frozen,
and only factors B of `--targets` in the top `--layers` layers are trained. The activations below them are kept
(`data.reuse_frozen`), so a client's round costs the top layers. Clip, noise, colluders, ring and rounding are those of
a run: `resolve_rules`, `LoraTask`, `noised`, `fixed_point`. Only the masks are left out, which do not change a sum:
`secure` is one run of few clients through the whole protocol.

`curve` has a point for each number of clients, rows and epsilon: exact match of greedy replies on held-out rows.
`--train N` trains N of a point's clients: their mean stands for that of all, and the noise is that of all. With fewer
clients the mean is less exact, so such a point is no better than the real one. `half` says at which points with noise
exact match is at least half of that without, and `over_without_noise` what it is at the first of them.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import platform
import random
import string
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import parts
import smallest
import torch
from results import print_result

import sartor
from sartor.core import config
from sartor.federate import updates as arrays
from sartor.federate.privacy.accountant import epsilon_of
from sartor.federate.privacy.client_noise import discrete_gaussian, noise_of, values_of, without_collusion
from sartor.federate.recipe import MODES, FederateRecipe, RoundSettings, load
from sartor.federate.rounds.round_manifest import ClientWork, Manifest, UpdateRules, terms_for
from sartor.federate.secure import fixed_point
from sartor.federate.tuning.client_shards import Shards
from sartor.federate.tuning.lora_task import LoraTask
from sartor.federate.tuning.simulated_clients import Clients, open_clients
from sartor.federate.tuning.simulation import resolve_rules, simulate
from sartor.models.lora_tensors import Tensors, add_changes, norm
from sartor.models.losses.loss_backend import LossOptions
from sartor.models.packing import TokenizedExample, micro_batches, pack
from sartor.tune.tokenized_dataset import TokenizedDataset

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Point:
    """A point of the curve. epsilon: infinite without noise."""

    clients: int
    rows: int
    epsilon: float

    @property
    def name(self) -> str:
        return f"{self.clients} clients, {self.rows} rows, epsilon {self.epsilon:g}"


class Study:
    """The rows, the base and the runs of the points."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder, self.options = folder, options

    def recipe(self, epsilon: float = math.inf, **changes: Any) -> FederateRecipe:
        options = self.options
        privacy = {} if math.isinf(epsilon) else {"privacy": {"epsilon": epsilon, "delta": options.delta}}
        fields = {
            "base": {"name": "starter", "bits": 32},
            "data": {
                "path": str(self.folder / "dataset"),
                "attack_rows": 0,
                "eval_rows": options.held_out,
                "reuse_frozen": True,
            },
            "method": {
                "rank": options.rank,
                "alpha": float(options.alpha),
                "targets": {"modules": options.targets, "layers": f"top-{options.layers}"},
            },
            "rounds": options.rounds,
            "local": {"updates": options.updates},
            "optimizer": {
                "learning_rate": options.learning_rate,
                "batch_tokens": 4096,
                "schedule": "constant",
                "warmup_fraction": 0.0,
            },
            "rules": {"clip": options.clip, "most_examples": 1},
            **privacy,
        }
        return load({**fields, **changes})

    def write_dataset(self) -> None:
        """Rows of the most frequent intents as a Dataset."""
        if (self.folder / "dataset").is_dir():
            return
        options = self.options
        with (options.data / "banking77" / "train.csv").open(encoding="utf-8", newline="") as stream:
            lines = [(line["text"], line["category"]) for line in csv.DictReader(stream)]
        counts: dict[str, int] = {}
        for _, category in lines:
            counts[category] = counts.get(category, 0) + 1
        chosen = sorted(counts, key=lambda category: (-counts[category], category))[: options.intents]
        replies = dict(zip(sorted(chosen), string.ascii_uppercase, strict=False))
        rows = [
            {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": replies[category]}]}
            for text, category in lines
            if category in replies
        ]
        random.Random(0).shuffle(rows)
        needed = max(self.trained(point) * point.rows for point in self.points) + options.held_out
        rows = rows[: math.ceil(needed * 1.1) + 20]
        file = self.folder / "rows.jsonl"
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        fraction = min(0.5, 1.1 * options.held_out / len(rows))
        source = {"path": str(file), "licence": "CC-BY-4.0"}
        recipe = {"sources": [source], "steps": [], "split": {"eval_fraction": fraction}}
        sartor.curate(recipe, self.folder / "dataset", replace=True)

    @cached_property
    def points(self) -> list[Point]:
        """Points of the curve, first the one without noise of each number of clients and rows."""
        options = self.options
        return [
            Point(clients, rows, epsilon)
            for clients in options.clients
            for rows in options.rows
            for epsilon in (math.inf, *options.epsilons)
        ]

    def trained(self, point: Point) -> int:
        return min(point.clients, self.options.train or point.clients)

    @cached_property
    def clients(self) -> Clients:
        self.write_dataset()
        return open_clients(self.recipe(), [], Shards(1))

    @cached_property
    def start(self) -> dict[str, Any]:
        return self.clients.resident.current_factors()

    def exact_match(self, shared: Tensors) -> float:
        """Fraction of held-out rows whose greedy reply is the row's.

        It is exactly where each token of the reply is the likeliest after the ones before it, so one pass tells.
        """
        resident = self.clients.resident
        rows: list[TokenizedExample] = list(self.clients.held_out)
        resident.put(shared)
        resident.model.eval()
        backend, right = resident.path(resident.model, rows, LossOptions()), 0
        likeliest: list[torch.Tensor] = []
        logits = backend.fast.logits  # type: ignore[attr-defined]

        def watched(x: torch.Tensor) -> torch.Tensor:
            result = logits(x)
            likeliest.append(result.argmax(1))
            return result

        backend.fast.logits = watched  # type: ignore[attr-defined]
        try:
            with torch.no_grad():
                for micro in micro_batches(rows, 2048, share=True):
                    likeliest.clear()
                    backend.losses(micro)
                    hits = torch.cat(likeliest) == pack(micro, resident.device, share=True).targets
                    right += sum(bool(part.all()) for part in hits.split([row.supervised_tokens for row in micro]))
        finally:
            del backend.fast.logits  # type: ignore[attr-defined]
        return right / len(rows)

    def run(self, point: Point) -> dict[str, Any]:
        """The rounds of a point, without masks."""
        recipe, resident = self.recipe(point.epsilon), self.clients.resident
        rows, count = self.clients.rows["client-0"].train, self.trained(point)
        tasks = [
            LoraTask(resident, TokenizedDataset(train=rows[index * point.rows : (index + 1) * point.rows]))
            for index in range(count)
        ]
        if len(rows) < count * point.rows:
            sys.exit(f"{len(rows)} rows are too few for {count} clients with {point.rows}: --train or --rows")
        shared, rules = dict(self.start), resolve_rules(recipe, self.start, point.clients, point.rows)
        course, norms, spent, manifests = [], [], [], {}
        for number in range(1, recipe.rounds + 1):
            manifest = self.manifest(recipe, rules, shared, number, point.clients)
            changes = [task.update(manifest, shared).tensors for task in tasks]
            norms += [norm(change) for change in changes]
            mean = self.mean(changes, manifest, point.clients)
            shared = add_changes(shared, mean)
            if rules.noise:
                spent.append(noise_of(manifest).spending(f"round-{number}", values_of(manifest)))
                manifests[f"round-{number}"] = manifest
            if number in (recipe.rounds // 2, recipe.rounds):
                course.append(self.exact_match(shared))
        values = sum(value.size for value in MODES[recipe.mode].sent(self.start, 1).values())
        result: dict[str, Any] = {
            "clients": point.clients,
            "trained_clients": count,
            "rows": point.rows,
            "d": values,
            "rounds": recipe.rounds,
            "median_update_norm": float(np.median(norms)),
            "exact_match_half_way": course[0],
            "exact_match": course[-1],
        }
        if rules.noise:
            noise = noise_of(manifest)
            # norm of the mean's noise in a round over the clip: z sqrt(n / t) sqrt(P) / n
            ratio = noise.noise_multiplier * math.sqrt(point.clients / noise.sharers * values) / point.clients
            result |= {
                "noise_multiplier": rules.noise,
                "assumed_colluders": rules.assumed_colluders,
                "noise_over_clip": ratio,
                "epsilon": epsilon_of(spent, self.options.delta),
                "epsilon_without_collusion": epsilon_of(without_collusion(spent, manifests), self.options.delta),
            }
        return result

    def manifest(
        self, recipe: FederateRecipe, rules: UpdateRules, shared: Tensors, number: int, clients: int
    ) -> Manifest:
        resident, sent = self.clients.resident, MODES[recipe.mode].sent(shared, number)
        names = [f"client-{index:06}" for index in range(clients)]
        terms = terms_for(names, sent, rules, seed="0" * 64)
        settings = config.dump(RoundSettings.of(recipe))
        work = ClientWork("lora", arrays.digest(b""), resident.ref.digest, resident.digest, settings)
        return Manifest("study", number, "coordinator", work, terms, 0, rules)

    def mean(self, changes: list[Tensors], manifest: Manifest, clients: int) -> dict[str, Any]:
        """The mean of clipped changes as the ring has it, with the noise of all clients.

        The sum of n shares of variance s^2 is drawn as one discrete Gaussian of variance n s^2: with s of millions of
        units nothing tells them apart.
        """
        rules = manifest.rules
        total: np.ndarray | None = None
        for change in changes:
            weighted = arrays.weighted(arrays.clipped(change, rules.clip), 1.0)
            units = fixed_point.quantise(weighted, manifest.terms.layout)
            total = units if total is None else total + units
        assert total is not None
        decoded = {}
        start = 0
        for slot in manifest.terms.layout:
            value = total[start : start + slot.size].astype(np.float64) / len(changes)
            start += slot.size
            if slot.name == arrays.WEIGHT:
                continue
            if rules.noise:
                noise = noise_of(manifest)
                value = value + discrete_gaussian(noise.sigma * math.sqrt(clients), slot.size) / clients
            decoded[slot.name] = (value * slot.scale).reshape(slot.shape).astype(np.float32)
        return decoded

    def secure(self) -> dict[str, Any]:
        """A run of few clients through keys, shares, masks and journals, with noise."""
        options = self.options
        self.write_dataset()
        epsilon = options.epsilons[0] if options.epsilons else 8.0
        recipe = replace(self.recipe(epsilon), rounds=options.secure_rounds)
        done = simulate(recipe, self.folder / "secure", shards=Shards(options.secure, 100.0), replace=True)
        fields = done.as_json()
        names = ("rounds", "clients", "epsilon", "epsilon_without_collusion", "uploaded_bytes", "wall_s")
        return {name: fields[name] for name in names}


def half(curve: list[dict[str, Any]], intents: int) -> list[dict[str, Any]]:
    """Each point with noise, and its exact match over that of the point without.

    0 where the point without noise is no better than three times a guess among the intents: nothing was learnt there
    that noise could spoil.
    """
    plain = {(point["clients"], point["rows"]): point["exact_match"] for point in curve if "epsilon" not in point}
    compared = []
    for point in curve:
        if "epsilon" in point:
            without = plain[point["clients"], point["rows"]]
            ratio = point["exact_match"] / without if without > 3 / intents else 0.0
            fields = {name: point[name] for name in ("clients", "rows", "d", "epsilon")}
            compared.append({**fields, "over_without_noise": ratio, "is_half": ratio >= 0.5})
    return compared


def write_small_set(folder: Path) -> Path:
    """Made-up rows in the layout of the set."""
    (folder / "banking77").mkdir(parents=True)
    lines = [f"please {word} number {number},{word}" for number in range(40) for word in ("open", "close", "lend")]
    (folder / "banking77" / "train.csv").write_text("\n".join(["text,category", *lines]), encoding="utf-8")
    return folder


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of banking77")
    parser.add_argument("--clients", type=int, nargs="+", default=[300])
    parser.add_argument("--rows", type=int, nargs="+", default=[10], help="rows of each client")
    parser.add_argument("--epsilons", type=float, nargs="*", default=[8.0])
    parser.add_argument("--train", type=int, default=0, help="clients that are trained and stand for all; 0: all")
    parser.add_argument("--targets", nargs="+", default=["v_proj"])
    parser.add_argument("--delta", type=float, default=1e-3)
    for name, value in (
        ("intents", 20),
        ("held-out", 200),
        ("rounds", 10),
        ("layers", 12),
        ("rank", 4),
        ("alpha", 8),
        ("updates", 4),
        ("secure", 4),
        ("secure-rounds", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, number in (("learning-rate", 3e-2), ("clip", 5.0)):
        parser.add_argument(f"--{name}", type=float, default=number)
    smallest.add_argument(parser)
    options = parser.parse_args()
    with smallest.home(options.small), tempfile.TemporaryDirectory(prefix="sartor-private-") as temporary:
        if options.small:
            options.data = write_small_set(Path(temporary) / "data")
            options.clients, options.rows, options.train, options.held_out = [6, 3_000], [4], 6, 10
            options.intents, options.rounds, options.layers, options.updates = 3, 2, 1, 1
        study = Study(parts.work_folder(Path(temporary)), options)
        curve = [parts.run(point.name, lambda point=point: study.run(point)) for point in study.points]
        compared = half(curve, options.intents)
        result = {
            "benchmark": "federate_private",
            "machine": platform.processor() or platform.machine(),
            "delta": options.delta,
            **({"over_without_noise": compared[0]["over_without_noise"]} if compared else {}),
            "curve": curve,
            "half": compared,
            "secure": parts.run("secure sum", study.secure),
        }
        print_result(result)


if __name__ == "__main__":
    main()
