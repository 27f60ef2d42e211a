"""Which rule guards against which attack: ten clients tune one adapter, two of them lie, every rule against every
attack.

    python benchmarks/federate_robust.py --json
    python benchmarks/federate_robust.py --table

The model is a softmax regression whose weight is W0 + B A, tuned under `freeze_a`: 16 features, 5 classes, a tenth of
labels wrong; the clients' classes are unequal (Dirichlet 1). 30 rounds of 5 steps. A figure is the loss on 4,000 other
rows over the loss that the plain mean reaches with ten honest clients, as the median over seeds.

sign flip: sends its update times -1, -4 in `sign flip x4`. scale: times 20. label flip: learns class c as 4 - c.
little: both send the honest mean less 1.5 standard deviations of each value ("a little is enough", Baruch et al. 2019,
arXiv:1902.06156).
"""

from __future__ import annotations

import argparse
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import smallest
from numpy.typing import NDArray
from results import print_result

from sartor.core.errors import GuardError
from sartor.federate.aggregation import FreezeA
from sartor.federate.robust_aggregation import AnyRule, Mean, RobustRule
from sartor.federate.updates import Update
from sartor.models.lora_tensors import A, B, Tensors

FEATURES, CLASSES, RANK, CLIENTS, LIARS, ROUNDS, STEPS, RATE = 16, 5, 12, 10, 2, 30, 5, 0.5
ATTACKS = ("none", "sign flip", "sign flip x4", "scale", "label flip", "little")
MODULE, MODE = "head", FreezeA()
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Rows:
    """Features (N, D) and classes (N,)."""

    x: Numbers
    y: NDArray[np.int64]


@dataclass(frozen=True)
class Problem:
    """What every client starts with, what each has, and what the result is measured on."""

    frozen: Numbers
    adapter: dict[str, Numbers]
    clients: list[Rows]
    held_out: Rows


def problem(seed: int) -> Problem:
    """ten clients with 200 rows each."""
    source = np.random.default_rng(seed)
    true = 2 * source.standard_normal((CLASSES, FEATURES)) / FEATURES**0.5
    x = source.standard_normal((40_000, FEATURES))
    y = (x @ true.T + 0.5 * source.gumbel(size=(len(x), CLASSES))).argmax(1)
    noisy = source.random(len(y)) < 0.1
    y[noisy] = source.integers(0, CLASSES, int(noisy.sum()))
    pool = {label: list(np.flatnonzero(y[4000:] == label) + 4000) for label in range(CLASSES)}
    clients = []
    for _ in range(CLIENTS):
        labels = source.choice(CLASSES, 200, p=source.dirichlet(np.ones(CLASSES)))
        rows = [pool[label].pop() for label in labels]
        clients.append(Rows(x[rows], y[rows]))
    adapter = {MODULE + A: source.standard_normal((RANK, FEATURES)) / RANK**0.5, MODULE + B: np.zeros((CLASSES, RANK))}
    return Problem(0.1 * source.standard_normal((CLASSES, FEATURES)), adapter, clients, Rows(x[:4000], y[:4000]))


def loss(frozen: Numbers, adapter: Tensors, rows: Rows) -> float:
    """Cross-entropy in nats a row."""
    scores = rows.x @ (frozen + adapter[MODULE + B] @ adapter[MODULE + A]).T
    scores -= scores.max(1, keepdims=True)
    return float((np.log(np.exp(scores).sum(1)) - scores[np.arange(len(rows.y)), rows.y]).mean())


def trained(frozen: Numbers, adapter: Tensors, rows: Rows) -> Tensors:
    """Some steps of gradient descent on B."""
    a, b = np.asarray(adapter[MODULE + A]), np.array(adapter[MODULE + B])
    hidden, wanted = rows.x @ a.T, np.eye(CLASSES)[rows.y]
    for _ in range(STEPS):
        scores = rows.x @ frozen.T + hidden @ b.T
        chances = np.exp(scores - scores.max(1, keepdims=True))
        chances /= chances.sum(1, keepdims=True)
        b -= RATE * (chances - wanted).T @ hidden / len(rows.y)
    return {MODULE + A: a, MODULE + B: b}


def sent(place: int, one: Problem, shared: Tensors, attack: str, number: int) -> Update:
    """What client `place` sends in a round; the first of them lie."""
    rows = one.clients[place]
    lies = place < LIARS and attack != "none"
    if lies and attack == "label flip":
        rows = Rows(rows.x, CLASSES - 1 - rows.y)
    upload = MODE.upload(shared, trained(one.frozen, shared, rows), number)
    times = {"sign flip": -1.0, "sign flip x4": -4.0, "scale": 20.0}.get(attack, 1.0) if lies else 1.0
    return Update(f"client-{place}", {name: value * times for name, value in upload.items()}, len(rows.y))


def a_little(updates: Sequence[Update]) -> list[Update]:
    """The updates, where those who lie send what the honest ones' spread hides."""
    honest = np.stack([one.tensors[MODULE + B] for one in updates[LIARS:]])
    hidden = honest.mean(0) - 1.5 * honest.std(0)
    return [Update(one.client, {MODULE + B: hidden}, one.examples) for one in updates[:LIARS]] + list(updates[LIARS:])


def final_loss(one: Problem, rule: RobustRule, attack: str) -> tuple[float, set[str]]:
    """(loss on the held-out rows after all rounds, clients that were refused or bounded in any of them).

    A round that the rule stops changes nothing.
    """
    shared: Tensors = one.adapter
    named: set[str] = set()
    for number in range(1, ROUNDS + 1):
        updates = [sent(place, one, shared, attack, number) for place in range(CLIENTS)]
        try:
            pooled = rule.pool(a_little(updates) if attack == "little" else updates)
        except GuardError:
            continue
        named |= {verdict.client for verdict in pooled.verdicts}
        shared = MODE.applied(shared, pooled.tensors, number)
    return loss(one.frozen, shared, one.held_out), named


def measured(seeds: Sequence[int]) -> dict[str, dict[str, float]]:
    """rule -> attack -> loss over the loss without attack under the plain mean, median over seeds."""
    problems = [problem(seed) for seed in seeds]
    clean = [final_loss(one, Mean(), "none")[0] for one in problems]
    return {
        member().kind: {
            attack: statistics.median(
                final_loss(one, member(), attack)[0] / best for one, best in zip(problems, clean, strict=True)
            )
            for attack in ATTACKS
        }
        for member in get_args(AnyRule)
    }


def main() -> None:
    """Print one JSON line, or a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    smallest.add_argument(parser)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--seeds", type=int, default=5)
    asked = parser.parse_args()
    found = measured(range(1 if asked.small else asked.seeds))
    if asked.table:
        print("| rule | " + " | ".join(ATTACKS) + " |\n|---|" + "---|" * len(ATTACKS))
        for rule, by_attack in found.items():
            print(f"| `{rule}` | " + " | ".join(f"{by_attack[attack]:.2f}" for attack in ATTACKS) + " |")
    else:
        machine = platform.processor() or platform.machine()
        print_result({"benchmark": "federate_robust", "machine": machine, "over_clean": found})


if __name__ == "__main__":
    main()
