"""Homes: home-intents over 8 clients by Dirichlet(0.3) of the intent; local, federated and centralised tuning on
held-out rows.

    python benchmarks/federate.py --work DIR --json
    python benchmarks/federate.py --work DIR --parts data,untuned,federated --json     # the rest another time
    python benchmarks/federate.py --small --json                                       # a tiny random base, made-up
                                                                                       rows

Every part leaves what it found in DIR, and is not done again; the last line is made of what is there. No attack report
is made, which would train as well. `local` and `centralised` train both factors by the loop of the clients, of one
client's rows, or of all, for `--alone-rounds` epochs. `factors` is the mean of factors beside it, `epsilon` the
federated run under privacy of a client (of each client's rows, with `--privacy-level example`). `personal` goes on
from `federated`: ranks of each client's own, on held-out rows like the client's. Exact match of greedy replies on rows
of templates that nobody trained on. `malicious` counts tests in tests/federate/test_malicious_server.py, `byzantine`
is benchmarks/federate_robust.py: loss over the clean loss, the worst of its attacks by a sign flip, a scale or false
labels. What no part has found in DIR is named under `absent`.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import federate_robust
import smallest
import torch
from results import print_result, run_tests
from safetensors.numpy import load_file

import sartor
from sartor.core import assets, config
from sartor.core import parquet_io as stored
from sartor.demo import home_intents
from sartor.evaluate.bootstrap import paired_bootstrap
from sartor.evaluate.predictions import HeldOut, TrainingForm, fitting, replies, reply_limit
from sartor.evaluate.scorers import exact_match
from sartor.federate import updates as arrays
from sartor.federate.recipe import FederateRecipe, PersonalRanks, RoundSettings, load
from sartor.federate.rounds.round_manifest import ClientWork, Manifest, UpdateRules, terms_for
from sartor.federate.tuning.client_shards import Shards
from sartor.federate.tuning.lora_task import LoraTask
from sartor.federate.tuning.personal_adapters import personalise
from sartor.federate.tuning.simulated_clients import Clients, open_clients
from sartor.federate.tuning.simulation import simulate
from sartor.models.lora_tensors import Tensors, add_changes
from sartor.tune.shared_base import SharedBase
from sartor.tune.tokenized_dataset import TokenizedDataset

TESTS = Path(__file__).parent.parent / "tests"
PARTS = (
    "data",
    "untuned",
    "local",
    "federated",
    "centralised",
    "factors",
    "personal",
    "epsilon",
    "malicious",
    "byzantine",
)
# tests of the malicious coordinator, by pytest's -k
SMALL_LIES = "consents or unmask"
ATTACKS = ("sign flip", "sign flip x4", "scale", "label flip")


@dataclass
class Homes:
    """The work folder with what was found so far."""

    work: Path
    asked: argparse.Namespace

    def kept(self, name: str, find: Callable[[], Any]) -> Any:
        """What an earlier call found under a name; else `find` is called, and what it finds is kept."""
        file = self.work / f"{name}.json"
        if not file.exists():
            file.write_text(json.dumps(find()))
        return json.loads(file.read_text())

    def found(self, name: str) -> Any:
        """What was found under a name; None if nothing was."""
        file = self.work / f"{name}.json"
        return json.loads(file.read_text()) if file.exists() else None

    @cached_property
    def base(self) -> str:
        return "starter"

    def recipe(self, **changes: Any) -> FederateRecipe:
        said = {
            "base": self.base,
            "data": {"path": str(self.work / "dataset"), "attack_rows": 0},
            "method": {"rank": self.asked.rank, "alpha": 2.0 * self.asked.rank},
            "rounds": self.asked.rounds,
            "local": {"epochs": 1},
            "optimizer": {"learning_rate": self.asked.learning_rate, "batch_tokens": 512 if self.asked.small else 256},
            "rules": {"clip": self.asked.clip},
            "mode": self.asked.mode,
        }
        return load({**said, **changes})

    @property
    def both_factors(self) -> dict[str, Any]:
        """Changes of the recipe for what trains A as well: B alone takes larger steps."""
        batch_tokens = self.recipe().optimizer.batch_tokens
        return {
            "mode": "factors",
            "optimizer": {"learning_rate": self.asked.both_learning_rate, "batch_tokens": batch_tokens},
        }

    @cached_property
    def shards(self) -> Shards:
        return Shards(self.asked.clients, 0.3, "intent", 0)

    @cached_property
    def clients(self) -> Clients:
        return open_clients(self.recipe(), [], self.shards)

    @cached_property
    def held_out(self) -> HeldOut:
        dataset = sartor.open(self.work / "dataset")
        examples = list(stored.read_examples(dataset, "eval"))[: self.asked.most_held_out]
        base = self.clients.resident.base
        return fitting(base, HeldOut(examples, dataset.path), TrainingForm())

    def data(self) -> dict[str, Any]:
        """Rows of the grammar as a Dataset, held out by template."""
        made = (
            made_up()
            if self.asked.small
            else home_intents.rows(assets.install("home-intents"), per_intent=self.asked.per_intent)
        )
        file = self.work / "rows.jsonl"
        file.write_text("".join(f"{json.dumps(row)}\n" for row in made))
        source = {"path": str(file), "licence": "Apache-2.0"}
        split = {"eval_fraction": self.asked.eval_fraction}
        return sartor.curate({"sources": [source], "split": split}, self.work / "dataset", replace=True).as_json()

    def scores(self, adapter: Tensors, resident: SharedBase | None = None) -> list[float]:
        """Exact match of each held-out row. resident: of a method that is not the others'."""
        resident, asked = resident or self.clients.resident, self.held_out
        resident.put(adapter)
        resident.model.eval()
        with torch.no_grad():
            said = replies(resident.base, resident.model, asked, reply_limit(resident.base, asked.examples))
        texts = [resident.base.chat.decode(one.ids) for one in said]
        return [exact_match(text, row.reply) for text, row in zip(texts, asked.examples, strict=True)]

    def alone(self, rows: TokenizedDataset) -> list[float]:
        """One client, or all rows as one: both factors."""
        recipe, resident = self.recipe(**self.both_factors, rounds=self.asked.alone_rounds), self.clients.resident
        task, shared = LoraTask(resident, rows), dict(self.start)
        for number in range(1, recipe.rounds + 1):
            work = ClientWork(
                "lora", arrays.digest(b""), resident.ref.digest, resident.digest, config.dump(RoundSettings.of(recipe))
            )
            terms = terms_for(["one"], shared, UpdateRules(), seed="0" * 64)
            learnt = task.update(Manifest("alone", number, "nobody", work, terms, 0), shared)
            shared = add_changes(shared, learnt.tensors)
        return self.scores(shared)

    @cached_property
    def start(self) -> Tensors:
        return self.clients.resident.current_factors()

    def together(self, name: str, **changes: Any) -> dict[str, Any]:
        """A federated run, with what it said of itself."""
        out, began = self.work / f"adapter-{name}", time.monotonic()
        made = simulate(self.recipe(**changes), out, shards=self.shards, resume=True, notice=print_line).as_json()
        wall_s = round(time.monotonic() - began, 1)
        resident = open_clients(self.recipe(**changes), [], self.shards).resident if "method" in changes else None
        return {
            **made,
            "wall_s": wall_s,
            "scores": self.scores(load_file(out / "adapter_model.safetensors"), resident),
        }

    def run(self, part: str) -> None:
        """One part; nothing where it was done."""
        start = self.start if part in ("untuned", "local", "centralised") else {}
        if part == "untuned":
            self.kept(part, lambda: self.scores(start))
        elif part == "local":
            for name, rows in self.clients.rows.items():
                self.kept(f"local-{name}", lambda rows=rows: self.alone(rows))
        elif part == "centralised":
            everyone = TokenizedDataset(train=[row for rows in self.clients.rows.values() for row in rows.train])
            self.kept(part, lambda: self.alone(everyone))
        elif part in ("federated", "factors"):
            self.kept(part, lambda: self.together(part, **(self.both_factors if part == "factors" else {})))
        elif part == "epsilon":
            for epsilon, name in self.curve.items():
                privacy = self.privacy(epsilon)
                self.kept(name, lambda name=name, privacy=privacy: self.together(name, **privacy))
        elif part == "personal":
            self.kept(part, self.personal)
        else:
            self.kept(part, {"data": self.data, "malicious": self.malicious, "byzantine": self.byzantine}[part])

    @property
    def curve(self) -> dict[float, str]:
        """Epsilon -> the name of what was found under it."""
        level = "" if self.asked.privacy_level == "client" else f"{self.asked.privacy_level}-"
        return {epsilon: f"epsilon-{level}{epsilon:g}" for epsilon in self.asked.epsilons}

    def privacy(self, epsilon: float) -> dict[str, Any]:
        """What a recipe says of it: 8 clients, or hundreds of rows of each, bound delta.

        Every trained number gets noise, so few are trained; `inf` is the same recipe without noise.
        """
        rank = self.asked.private_rank
        small = {"rounds": self.asked.private_rounds, "method": {"rank": rank, "alpha": 2.0 * rank}}
        if math.isinf(epsilon):
            return small
        if self.asked.privacy_level == "client":
            return {
                **small,
                "privacy": {"epsilon": epsilon, "delta": 1e-2},
                "rules": {"clip": self.asked.private_clip},
            }
        return {**small, "privacy": {"epsilon": epsilon, "delta": 1e-3, "level": "example"}}

    def personal(self) -> dict[str, Any]:
        """The report on each client's own ranks beside those of the part `federated`."""
        data = {"path": str(self.work / "dataset"), "eval_rows": self.asked.personal_held_out, "attack_rows": 0}
        recipe, shared = self.recipe(data=data), sartor.open(self.work / "adapter-federated")
        people = open_clients(recipe, [], self.shards)
        own = PersonalRanks(epochs=1, rank=self.asked.rank, compare=self.asked.compare)
        return personalise(people, shared, recipe, own, again=False, notice=print_line)

    def malicious(self) -> dict[str, int]:
        """Lies of a coordinator; at the smallest size a few."""
        return malicious(SMALL_LIES if self.asked.small else "")

    def byzantine(self) -> dict[str, float]:
        """Rule -> loss over the clean loss under the worst of the attacks."""
        measured = federate_robust.measured(range(1 if self.asked.small else 5))
        return {rule: max(by[attack] for attack in ATTACKS) for rule, by in measured.items()}

    def summary(self) -> dict[str, Any]:
        """What INTERFACES says of it, from what was found; None for what was not."""
        untuned, central, malicious_ = (self.found(name) for name in ("untuned", "centralised", "malicious"))
        federated, factors = self.found("federated") or {}, self.found("factors") or {}
        locals_ = [json.loads(file.read_text()) for file in sorted(self.work.glob("local-*.json"))]
        best = max(locals_, key=_mean) if locals_ else None
        scores = federated.get("scores")
        curve = {
            name: {"epsilon": said["epsilon"], "exact_match": _mean(said["scores"]), **said["metrics"]}
            for name in self.curve.values()
            if (said := self.found(name))
        }
        personal = self.found("personal") or {}
        return {
            "untuned": _mean(untuned),
            "local_only": _mean(best),
            "local_mean": _mean([_mean(one) for one in locals_]),
            "federated": _mean(scores),
            "centralised": _mean(central),
            "factors": _mean(factors.get("scores")),
            "over_local": self.over(best, scores),
            "over_centralised": self.over(central, scores),
            "exactness_error": federated.get("exactness_error"),
            "exactness_error_of_factors": factors.get("exactness_error"),
            "quantisation_error": federated.get("quantisation_error"),
            "upload_bytes_per_parameter": federated.get("upload_bytes_per_parameter"),
            "uploaded_megabytes_per_client": federated["uploaded_bytes"] / federated["clients"] / 1e6
            if federated
            else None,
            "federated_s": federated.get("wall_s"),
            "held_out": scores and len(scores),
            "personal": {name: lifts(said) for name, said in {**personal["clients"], "all": personal["all"]}.items()}
            if personal
            else None,
            "epsilon": curve,
            "privacy_level": self.asked.privacy_level,
            "malicious": malicious_ and malicious_["malicious"],
            "malicious_refused": malicious_ and malicious_["refused"],
            "byzantine": self.found("byzantine"),
        }

    def over(self, before: list[float] | None, after: list[float] | None) -> dict[str, float] | None:
        """The difference with its 95 % interval; templates are drawn, not rows."""
        if not before or not after:
            return None
        groups = [row.group or row.id for row in self.held_out.examples]
        compared = paired_bootstrap(before, after, groups)
        return {"estimate": compared.difference, "low": compared.low, "high": compared.high}


def lifts(said: dict[str, Any]) -> dict[str, Any]:
    """Of a client: how many rows, and how much more often its own adapter is right than another."""
    over = {
        what: one["exact_match"] for what, one in said.items() if what.startswith("over_") and "exact_match" in one
    }
    return {"rows": said["rows"], "held_out": said["held_out"], "exact_match": said["exact_match"], **over}


def _mean(scores: list[Any] | None) -> float | None:
    return sum(scores) / len(scores) if scores else None


def malicious(keyword: str = "") -> dict[str, int]:
    """Tests of a coordinator that lies, and how many of them pass."""
    tests = run_tests(smallest.python(), TESTS / "federate/test_malicious_server.py", keyword)
    return {"malicious": len(tests), "refused": sum(tests.values())}


def made_up() -> list[dict[str, Any]]:
    """Rows for --small: four intents in so many rooms."""
    rooms = ("kitchen", "hall", "attic", "garage", "patio", "office", "cellar", "porch", "den", "loft")
    return [
        {
            "messages": [
                {"role": "user", "content": f"switch {room} {word}"},
                {"role": "assistant", "content": json.dumps({"intent": word, "area": room})},
            ],
            "group": f"{room} {word}",
        }
        for room in rooms
        for word in ("on", "off", "up", "down")
    ]


def print_line(line: str) -> None:
    """Progress, to stderr."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    smallest.add_argument(parser, "--quick", has_work=True)
    parser.add_argument(
        "--work", type=Path, help="what each part finds stays there; with --small a temporary directory by default"
    )
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--mode", default="freeze_a")
    parser.add_argument("--privacy-level", choices=("client", "example"), default="client")
    parser.add_argument(
        "--compare", action="store_true", help="personal: beside local-only and centralised, tuned for that"
    )
    parser.add_argument("--personal-held-out", type=int, default=800)
    for name, value in (
        ("clients", 8),
        ("rounds", 10),
        ("alone-rounds", 5),
        ("rank", 16),
        ("per-intent", 100),
        ("most-held-out", 2_000),
        ("private-rank", 2),
        ("private-rounds", 10),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, number in (
        ("learning-rate", 4e-3),
        ("both-learning-rate", 1e-3),
        ("eval-fraction", 0.5),
        ("clip", 100.0),
        ("private-clip", 1.0),
    ):
        parser.add_argument(f"--{name}", type=float, default=number)
    parser.add_argument("--epsilons", type=float, nargs="*", default=[64.0, 1000.0, math.inf])
    asked = parser.parse_args()
    if asked.small:
        asked.compare, asked.personal_held_out = True, 4
        asked.clients, asked.rounds, asked.alone_rounds, asked.rank, asked.most_held_out, asked.epsilons = (
            3,
            1,
            1,
            4,
            4,
            [8.0],
        )
    if unknown := sorted(set(parts := asked.parts.split(",")) - set(PARTS)):
        parser.error(f"there is no part {unknown[0]}; the parts are {', '.join(PARTS)}")
    if not (asked.work or asked.small):
        parser.error("--work DIR: where each part leaves what it finds")
    with smallest.home(asked.small), tempfile.TemporaryDirectory(prefix="sartor-federate-") as folder:
        work = asked.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        homes = Homes(work.absolute(), asked)
        for part in parts:
            print_line(f"part {part}")
            homes.run(part)
        said = {"benchmark": "federate", "machine": platform.processor() or platform.machine(), "mode": asked.mode}
        print_result({**said, **present(homes.summary())})


def present(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures that some part has found; `absent` names the others, whose part was not run."""
    found = {name: value for name, value in figures.items() if value is not None and value != {}}
    return {**found, "absent": {name: "its part was not run in DIR: --parts" for name in figures if name not in found}}


if __name__ == "__main__":
    main()
