"""Planted label flips in home-intents: how many stand at the head of the queue that `suspicious_labels` writes.

Rows are drawn from all sentences of the asset's grammar of a language, by intent (`equal`) or by sentence (`natural`,
where some intents have hundreds of rows and some a few), or are the demo's own rows (`demo`). A part of the labels is
set to another, random intent. The reply is the intent's name or a JSON object with it and its slots.

    python benchmarks/labels.py --json
    python benchmarks/labels.py --json --small    # made-up rows: shows that it runs
    python benchmarks/labels.py --encoder tfidf --language de --seeds 5 --flipped 0.05
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import parts
import smallest
from results import print_result
from sklearn.metrics import roc_auc_score

from sartor.core import assets
from sartor.core.records import Example, Message, Origin
from sartor.curate.step import StepInput
from sartor.curate.steps.label_errors import EVIDENCE, SuspiciousLabels
from sartor.demo import home_intents

SHARES = (0.10, 0.12, 0.20)
SMALL_ROWS = 120


def grammar(language: str) -> tuple[Any, list[tuple[str, Any, Any]]]:
    """The parsed templates of a language, and each of its sentences as (intent, block, sentence)."""
    from hassil.intents import Intents

    file = assets.install("home-intents") / f"home_assistant_intents/data/{language}.json"
    parsed = Intents.from_dict(json.loads(file.read_text(encoding="utf-8")))
    return parsed, [(name, b, s) for name, intent in parsed.intents.items() for b in intent.data for s in b.sentences]


def spoken(parsed: Any, block: Any, sentence: Any, rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A random walk through a sentence: its words and slots."""
    from hassil.intents import TextSlotList

    domains = block.requires_context.get("domain", [])
    names = [name for domain in domains if isinstance(domain, str) for name in home_intents.NAMES.get(domain, ())]
    lists = {
        **parsed.slot_lists,
        "area": TextSlotList.from_strings(home_intents.AREAS),
        "floor": TextSlotList.from_strings(home_intents.FLOORS),
        **block.slot_lists,
        "name": TextSlotList.from_strings(names or ["chandelier", "radio", "front door"]),
    }
    walk = home_intents.Walk(rng, lists, {**parsed.expansion_rules, **block.expansion_rules})
    return " ".join(walk.words(sentence.expression)[0].split()), walk.slots


def sample(count: int, language: str, how: str, seed: int) -> list[tuple[str, dict[str, Any]]]:
    """(prompt, reply) rows with different prompts."""
    if how == "demo":
        rows = home_intents.rows(assets.install("home-intents"), per_intent=100, seed=seed)[:count]
        return [(row["messages"][1]["content"], json.loads(row["messages"][2]["content"])) for row in rows]
    parsed, sentences = grammar(language)
    by_intent: dict[str, list[Any]] = {}
    for one in sentences:
        by_intent.setdefault(one[0], []).append(one)
    rng = random.Random(seed)
    found: dict[str, dict[str, Any]] = {}
    for _ in range(50 * count):
        pool = by_intent[rng.choice(sorted(by_intent))] if how == "equal" else sentences
        intent, block, sentence = rng.choice(pool)
        try:
            text, slots = spoken(parsed, block, sentence, rng)
        except KeyError:  # a few sentences need a list that only an installation has
            continue
        found.setdefault(text, {"intent": intent, **{key: value for key, value in slots.items() if key != "intent"}})
        if len(found) == count:
            break
    return list(found.items())


def flip(replies: list[dict[str, Any]], fraction: float, seed: int) -> np.ndarray:
    """Set a part of the intents to a random other one, in place; the mask of those rows."""
    rng = random.Random(seed)
    names = sorted({reply["intent"] for reply in replies})
    flipped = np.zeros(len(replies), bool)
    flipped[rng.sample(range(len(replies)), round(fraction * len(replies)))] = True
    for row in np.flatnonzero(flipped).tolist():
        replies[row]["intent"] = rng.choice([name for name in names if name != replies[row]["intent"]])
    return flipped


def gather(step: SuspiciousLabels, rows: list[tuple[str, str]]) -> StepInput:
    """What the pipeline would hand to the step."""
    import pyarrow as pa

    examples = [
        Example(
            (Message.of("user", prompt), Message.of("assistant", reply)),
            (Origin("rows.jsonl", f"rows.jsonl:{number}"),),
        )
        for number, (prompt, reply) in enumerate(rows, 1)
    ]
    table = step.sketch(examples, Path())
    table = table.append_column("id", pa.array([f"{row:032x}" for row in range(len(rows))]))
    table = table.append_column("source", pa.array([0] * len(rows)))
    table = table.append_column("locator", pa.array([example.origins[0].locator for example in examples]))
    return StepInput(table, ["rows.jsonl"], lambda wanted: [examples[row] for row in wanted])


def measure(step: SuspiciousLabels, rows: list[tuple[str, str]], flipped: np.ndarray) -> dict[str, Any]:
    """Recall of the flips in the queue's head, and what the step says of itself."""
    gathered = gather(step, rows)
    began = time.perf_counter()
    verdicts = step.decide(gathered)
    wall_s = time.perf_counter() - began
    queue = [int(name, 16) for name in verdicts.evidence[EVIDENCE]["id"].to_pylist()]
    ranks = np.empty(len(rows))
    ranks[queue] = np.arange(len(queue))
    heads = {
        f"recall_at_{share:.0%}": float(flipped[queue[: round(share * len(rows))]].sum() / flipped.sum())
        for share in SHARES
    }
    told = {
        key: verdicts.facts[key]
        for key in ("label", "encoder", "labels", "judged_by", "estimated_errors", "suspicious")
    }
    return {
        **heads,
        "auc": float(roc_auc_score(flipped, -ranks)),
        **told,
        "flipped": int(flipped.sum()),
        "wall_s": round(wall_s, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    smallest.add_argument(parser)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--flipped", type=float, default=0.1)
    parser.add_argument("--encoder", action="append", help="default: tfidf and minilm")
    parser.add_argument("--language", default="en")
    parser.add_argument("--how", action="append", choices=["equal", "natural", "demo"], help="default: all three")
    arguments = parser.parse_args()
    if arguments.small:
        arguments.rows, arguments.seeds = SMALL_ROWS, 1
    with smallest.home(arguments.small, "home-intents", "minilm"):
        runs = measured(arguments)
    least = {
        encoder: min(run["recall_at_12%"] for run in runs if run["encoder"] == encoder)
        for encoder in sorted({run["encoder"] for run in runs})
    }
    print_result({"least_recall_at_12%": least, "runs": runs, "machine": {"processor": platform.machine()}})


def measured(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure each encoder, way of drawing and seed."""
    runs = []
    for encoder in arguments.encoder or ["tfidf", "minilm"]:
        for how in arguments.how or ["equal", "natural", "demo"]:
            for seed in range(arguments.seeds):
                label = f"{encoder}, {how}, seed {seed}"
                runs.append(parts.run(label, functools.partial(measure_seed, arguments, encoder, how, seed)))
                if not arguments.json:
                    print(runs[-1])
    return runs


def measure_seed(arguments: argparse.Namespace, encoder: str, how: str, seed: int) -> dict[str, Any]:
    """Measure one seed of an encoder and a way of drawing."""
    rows = sample(arguments.rows, arguments.language, how, 100 + seed)
    replies = [dict(reply) for _, reply in rows]
    flipped = flip(replies, arguments.flipped, seed)
    bare = seed % 2 == 1
    said = [reply["intent"] if bare else json.dumps(reply, ensure_ascii=False) for reply in replies]
    step = SuspiciousLabels(encoder=encoder, queue_fraction=1.0)
    prompts = [prompt for prompt, _ in rows]
    found = measure(step, list(zip(prompts, said, strict=True)), flipped)
    return {"how": how, "language": arguments.language, "seed": seed, "rows": len(rows), **found}


if __name__ == "__main__":
    main()
