"""Client-level privacy that is of use: many clients with few rows each, few trained numbers, noise in the secure sum.

    python benchmarks/federate_private.py --work DIR --json
    python benchmarks/federate_private.py --work DIR --train 60 --json    # 60 clients are trained and stand for all
    python benchmarks/federate_private.py --work DIR --clients 100 300 1000 --train 60 --epsilons 2 8 --json
    python benchmarks/federate_private.py --small --json                  # a tiny random base, made-up rows

Each client has `--rows` rows of `--intents` intents of banking77; the reply is a letter for the intent. A is frozen,
and only factors B of `--targets` in the top `--layers` layers are trained. A reads the principal directions of public
rows, of other intents (`principal_start`); nothing else is learnt from them. The activations below the top layers are
kept (`data.reuse_frozen`), so a client's round costs the top layers. Clip, noise, colluders, ring and rounding are
those of a run: `resolve_rules`, `LoraTask`, `noised`, `fixed_point`. Only the masks are left out, which do not change
a sum: `secure` are two runs of few clients through the whole protocol, without and with noise, from a random A.

`curve` has a point for each number of clients, rows and epsilon: exact match of greedy replies on held-out rows.
`--train N` trains N of a point's clients: their mean stands for that of all, and the noise is that of all. With fewer
clients the mean is less exact, so such a point is no better than the real one. `half` says at which points with noise
exact match is at least half of that without, and `over_without_noise` what it is at the first of them.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import platform
import random
import string
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import parts
import smallest
import torch
from results import print_result
from safetensors.numpy import load_file

import sartor
from sartor.core import config
from sartor.core.artifacts import open_artifact
from sartor.federate import updates as arrays
from sartor.federate.privacy.accountant import epsilon_of
from sartor.federate.privacy.client_noise import discrete_gaussian, noise_of, values_of, without_collusion
from sartor.federate.recipe import MODES, FederateRecipe, RoundSettings, load, tuning
from sartor.federate.rounds.round_manifest import ClientWork, Manifest, UpdateRules, terms_for
from sartor.federate.secure import fixed_point
from sartor.federate.tuning.client_shards import Shards
from sartor.federate.tuning.lora_task import LoraTask
from sartor.federate.tuning.simulated_clients import Clients, open_clients
from sartor.federate.tuning.simulation import resolve_rules, simulate
from sartor.models.lora_tensors import A, Tensors, add_changes, norm
from sartor.models.losses.loss_backend import LossOptions
from sartor.models.packing import TokenizedExample, micro_batches, pack
from sartor.tune.dataset_encoding import encode_rows
from sartor.tune.shared_base import SharedBase
from sartor.tune.tokenized_dataset import TokenizedDataset

ROOT = Path(__file__).resolve().parent.parent
# replies to private intents, and to public ones: no reply is both
PRIVATE_REPLIES = string.ascii_uppercase[:20]
PUBLIC_REPLIES = string.ascii_lowercase + string.digits + string.ascii_uppercase[20:]
SYSTEM = "You sort questions of bank customers by intent."


@dataclass(frozen=True)
class Point:
    """A point of the curve. epsilon: infinite without noise. repeat: number of the run, whose noise is drawn anew."""

    clients: int
    rows: int
    rank: int
    epsilon: float
    repeat: int = 0

    @property
    def name(self) -> str:
        text = f"{self.clients} clients, {self.rows} rows, rank {self.rank}, epsilon {self.epsilon:g}"
        return f"{text}, run {self.repeat + 1}" if self.repeat else text


class Study:
    """The rows, the base and the runs of the points."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder, self.options = folder, options
        self._opened: tuple[int, Clients, dict[str, Any]] | None = None

    def recipe(self, rank: int, epsilon: float = math.inf) -> FederateRecipe:
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
                "rank": rank,
                "alpha": options.scale * rank,
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
        return load(fields)

    def write_datasets(self) -> None:
        """Write the private Dataset, of the most frequent intents, and the public one, of others."""
        if (self.folder / "dataset").is_dir():
            return
        options = self.options
        with (options.data / "banking77" / "train.csv").open(encoding="utf-8", newline="") as stream:
            lines = [(line["text"], line["category"]) for line in csv.DictReader(stream)]
        counts = Counter(category for _, category in lines)
        private = sorted(counts, key=lambda category: (-counts[category], category))[: options.intents]
        random.Random(0).shuffle(lines)
        needed = max(self.trained(point) * point.rows for point in self.points) + options.held_out
        rows = rows_of(lines, dict(zip(sorted(private), PRIVATE_REPLIES, strict=False)))
        rows = rows[: math.ceil(needed * 1.1) + 20]
        if options.public:
            public = sorted(set(counts) - set(private))
            replies = dict(zip(public, PUBLIC_REPLIES, strict=False))
            self.curate("public-dataset", rows_of(lines, replies, options.public), 0.05)
        self.curate("dataset", rows, min(0.5, 1.1 * options.held_out / len(rows)))

    def curate(self, name: str, rows: list[dict[str, Any]], eval_fraction: float) -> None:
        file = self.folder / f"{name}.jsonl"
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        source = {"path": str(file), "licence": "CC-BY-4.0"}
        recipe = {"sources": [source], "steps": [], "split": {"eval_fraction": eval_fraction}}
        sartor.curate(recipe, self.folder / name, replace=True)

    @torch.no_grad()
    def principal_start(self, clients: Clients, rank: int) -> dict[str, np.ndarray]:
        """Return factors of this rank whose A reads that in which public rows differ; B is 0.

        X (N, in): inputs of a module at the last token before the reply, of mean m. X - m without its part along m is
        U S V^T. The first R - 1 rows of A are sqrt(N) V_k / S_k, features of mean 0 and variance 1; the last one is
        m / |m|^2, a feature of about 1. Labels are not read.
        """
        resident, start = clients.resident, clients.resident.current_factors()
        dataset = open_artifact(self.folder / "public-dataset", "dataset")
        public = encode_rows(dataset, tuning(self.recipe(rank), str(dataset.path)), resident.base.chat).train
        modules, inputs = dict(resident.model.named_modules()), dict[str, list[torch.Tensor]]()
        names = [name.removesuffix(A) for name in start if name.endswith(A)]
        hooks = [
            modules[name].register_forward_pre_hook(
                lambda module, values, name=name: inputs.setdefault(name, []).append(values[0][0, -1].float())
            )
            for name in names
        ]
        for row in public:
            # causal: what stands after the last token before the reply changes nothing there
            ids = torch.tensor([row.ids[: row.learnt.index(True)]], device=resident.device)
            resident.model(input_ids=ids, use_cache=False, logits_to_keep=torch.tensor([ids.shape[1] - 1]))
        for hook in hooks:
            hook.remove()
        for name in names:
            x = torch.stack(inputs[name])
            mean = x.mean(0)
            unit = mean / mean.norm()
            centred = x - mean
            centred -= torch.outer(centred @ unit, unit)
            _, sizes, directions = torch.linalg.svd(centred, full_matrices=False)
            rows = directions[: rank - 1] * (math.sqrt(len(x)) / sizes[: rank - 1, None])
            start[name + A] = torch.cat([rows, (unit / mean.norm())[None]]).cpu().numpy()
        return start

    @cached_property
    def points(self) -> list[Point]:
        """Points of the curve, first the one without noise of each number of clients and rows."""
        options = self.options
        return [
            Point(clients, rows, rank, epsilon, repeat)
            for clients, rows, rank, epsilon in itertools.product(
                options.clients, options.rows, options.ranks, (math.inf, *options.epsilons)
            )
            for repeat in range(1 if math.isinf(epsilon) else options.repeats)
        ]

    def trained(self, point: Point) -> int:
        return min(point.clients, self.options.train or point.clients)

    def opened(self, rank: int) -> tuple[Clients, dict[str, Any]]:
        """Return all rows as those of one client, and the adapter that the first round starts from."""
        if self._opened is None or self._opened[0] != rank:
            self.write_datasets()
            self._opened = None  # the base of another rank makes room
            clients = open_clients(self.recipe(rank), [], Shards(1))
            start = clients.resident.current_factors()
            self._opened = rank, clients, self.principal_start(clients, rank) if self.options.public else start
        return self._opened[1:]

    def exact_match(self, clients: Clients, shared: Tensors) -> float:
        """Fraction of held-out rows whose greedy reply is the row's.

        It is exactly where each token of the reply is the likeliest after the ones before it, so one pass tells.
        """
        resident = clients.resident
        rows: list[TokenizedExample] = list(clients.held_out)
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
        (clients, start), recipe = self.opened(point.rank), self.recipe(point.rank, point.epsilon)
        resident, rows, count = clients.resident, clients.rows["client-0"].train, self.trained(point)
        tasks = [
            LoraTask(resident, TokenizedDataset(train=rows[index * point.rows : (index + 1) * point.rows]))
            for index in range(count)
        ]
        if len(rows) < count * point.rows:
            sys.exit(f"{len(rows)} rows are too few for {count} clients with {point.rows}: --train or --rows")
        shared, rules = dict(start), resolve_rules(recipe, start, point.clients, point.rows)
        course, norms, spent, manifests = [], [], [], {}
        for number in range(1, recipe.rounds + 1):
            manifest = self.manifest(resident, recipe, rules, shared=shared, number=number, clients=point.clients)
            changes = [task.update(manifest, shared).tensors for task in tasks]
            norms += [norm(change) for change in changes]
            mean = self.mean(changes, manifest, point.clients)
            shared = add_changes(shared, mean)
            if rules.noise:
                spent.append(noise_of(manifest).spending(f"round-{number}", values_of(manifest)))
                manifests[f"round-{number}"] = manifest
            if number in (recipe.rounds // 2, recipe.rounds):
                course.append(self.exact_match(clients, shared))
        values = sum(value.size for value in MODES[recipe.mode].sent(start, 1).values())
        result: dict[str, Any] = {
            "clients": point.clients,
            "trained_clients": count,
            "rows": point.rows,
            "rank": point.rank,
            "d": values,
            "rounds": recipe.rounds,
            "median_update_norm": float(np.median(norms)),
            "exact_match_of_start": self.exact_match(clients, start),
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
        self,
        resident: SharedBase,
        recipe: FederateRecipe,
        rules: UpdateRules,
        *,
        shared: Tensors,
        number: int,
        clients: int,
    ) -> Manifest:
        sent = MODES[recipe.mode].sent(shared, number)
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

    def secure(self, epsilon: float) -> dict[str, Any]:
        """Run `federate simulate`: keys, shares, masks, journals and, below an infinite epsilon, noise."""
        options, out = self.options, self.folder / f"secure-{epsilon:g}"
        clients, _ = self.opened(options.ranks[0])
        recipe = replace(self.recipe(options.ranks[0], epsilon), rounds=options.secure_rounds or options.rounds)
        is_begun = out.with_name(f"{out.name}.rounds").is_dir()
        shards = Shards(options.secure, 100.0)
        done = simulate(recipe, out, shards=shards, resume=is_begun, replace=not is_begun)
        fields = done.as_json()
        names = ("rounds", "clients", "uploaded_bytes", "wall_s")
        if not math.isinf(epsilon):
            names += ("epsilon", "epsilon_without_collusion")
        matched = self.exact_match(clients, load_file(out / "adapter_model.safetensors"))
        return {"exact_match": matched, **{name: fields[name] for name in names}}


def rows_of(lines: list[tuple[str, str]], replies: Mapping[str, str], most: int = 0) -> list[dict[str, Any]]:
    """Return the rows of the intents that have a reply, at most `most` of each; 0: all."""
    counts: Counter[str] = Counter()
    rows = []
    for text, category in lines:
        counts[category] += 1
        if category in replies and not (most and counts[category] > most):
            messages = [("system", SYSTEM), ("user", text), ("assistant", replies[category])]
            rows.append({"messages": [{"role": role, "content": content} for role, content in messages]})
    return rows


def half(curve: list[dict[str, Any]], intents: int) -> list[dict[str, Any]]:
    """Each point with noise, and its exact match over that of the point without.

    0 where the point without noise is no better than three times a guess among the intents: nothing was learnt there
    that noise could spoil.
    """
    keys = ("clients", "rows", "rank")
    plain = {tuple(point[key] for key in keys): point["exact_match"] for point in curve if "epsilon" not in point}
    compared = []
    for point in curve:
        if "epsilon" in point:
            without = plain[tuple(point[key] for key in keys)]
            ratio = point["exact_match"] / without if without > 3 / intents else 0.0
            fields = {name: point[name] for name in ("clients", "rows", "d", "epsilon")}
            compared.append({**fields, "over_without_noise": ratio, "is_half": ratio >= 0.5})
    return compared


def write_small_set(folder: Path) -> Path:
    """Made-up rows in the layout of the set."""
    (folder / "banking77").mkdir(parents=True)
    words = {"open": 40, "close": 40, "lend": 40, "pay": 20, "ask": 20}
    lines = [f"please {word} number {number},{word}" for word, count in words.items() for number in range(count)]
    (folder / "banking77" / "train.csv").write_text("\n".join(["text,category", *lines]), encoding="utf-8")
    return folder


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of banking77")
    parser.add_argument("--clients", type=int, nargs="+", default=[300])
    parser.add_argument("--rows", type=int, nargs="+", default=[10], help="rows of each client")
    parser.add_argument("--epsilons", type=float, nargs="+", default=[8.0])
    parser.add_argument("--train", type=int, default=0, help="clients that are trained and stand for all; 0: all")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each point with noise, which is drawn anew")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16])
    parser.add_argument("--targets", nargs="+", default=["down_proj"])
    parser.add_argument("--public", type=int, default=8, help="public rows of each other intent; 0: a random A")
    parser.add_argument("--delta", type=float, default=1e-3)
    for name, value in (
        ("intents", 20),
        ("held-out", 300),
        ("rounds", 10),
        ("layers", 1),
        ("updates", 1),
        ("secure", 4),
        ("secure-rounds", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, number in (("learning-rate", 0.05), ("clip", 5.0), ("scale", 20.0)):
        parser.add_argument(f"--{name}", type=float, default=number)
    smallest.add_argument(parser)
    options = parser.parse_args()
    with smallest.home(options.small), tempfile.TemporaryDirectory(prefix="sartor-private-") as temporary:
        if options.small:
            options.data = write_small_set(Path(temporary) / "data")
            options.clients, options.rows, options.train, options.held_out = [6, 3_000], [4], 6, 10
            options.intents, options.rounds, options.ranks, options.secure = 3, 2, [2], 4
            options.public = 10
        study = Study(parts.work_folder(Path(temporary)), options)
        curve = [parts.run(point.name, lambda point=point: study.run(point)) for point in study.points]
        compared = half(curve, options.intents)
        result = {
            "benchmark": "federate_private",
            "machine": platform.processor() or platform.machine(),
            "delta": options.delta,
            "over_without_noise": compared[0]["over_without_noise"],
            "curve": curve,
            "half": compared,
            "secure": {
                name: parts.run(f"secure sum, {name}", lambda epsilon=epsilon: study.secure(epsilon))
                for name, epsilon in (("plain", math.inf), ("private", options.epsilons[0]))
            },
        }
        print_result(result)


if __name__ == "__main__":
    main()
