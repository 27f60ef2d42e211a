"""Planted preferences: dpo and kto turn a base from one form of reply to the other, and the task loses little.

A tiny base is trained here, by sft of all its weights, to say orders back: `set the lamp in the attic to 40`. It has
two forms,
`lamp attic 40`, nearly always, and `OK: lamp, attic, 40.`, seldom. People, planted, prefer the second, in pairs or by
thumbs on single replies; from each an adapter is tuned. Held-out orders are asked of the base and of the tuned model,
greedily.
`preferred`: fraction of replies in the second form. `metric`: of replies, in either form, that say the order back
right.
`lost`: what the metric lost, with its interval by paired bootstrap. `--starter` does the same on the starter base.

    python benchmarks/preferences.py --json
    python benchmarks/preferences.py --json --small    # a few updates: shows that it runs
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import smallest
import torch
from results import print_result

import sartor
from sartor.core.records import Example, Message, Origin
from sartor.evaluate import bootstrap
from sartor.inference.engine import Sampling
from sartor.inference.generate import generate
from sartor.models import adapters, packing
from sartor.models.base import machine_facts, open_base
from sartor.models.losses import transformers_backend

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))
import tiny  # the same tiny architecture as the tests have

DEVICES = ("lamp", "heater", "blind", "fan", "radio", "kettle", "speaker", "screen")
PLACES = (
    "attic",
    "hall",
    "kitchen",
    "cellar",
    "porch",
    "office",
    "garage",
    "den",
    "loft",
    "patio",
    "studio",
    "nursery",
)
LEVELS = tuple(str(10 * level) for level in range(1, 11))
Order = tuple[str, str, str]
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 384,
}
# of the base's own training rows those in the form that people will prefer
SELDOM = 0.1
# with `--small`
SMALL_UPDATES, SMALL_ORDERS = 30, 40


def asked(order: Order) -> str:
    return "set the {} in the {} to {}".format(*order)


def short(order: Order) -> str:
    return "{} {} {}".format(*order)


def polite(order: Order) -> str:
    return "OK: {}, {}, {}.".format(*order)


def said(reply: str) -> tuple[bool, list[str]]:
    """(whether it is in the preferred form, the order that it says back)."""
    return bool(re.fullmatch(r"OK: \w+, \w+, \w+\.", reply.strip())), re.findall(r"\w+", reply.removeprefix("OK:"))


def example(order: Order, reply: str) -> Example:
    return Example((Message.of("user", asked(order)), Message.of("assistant", reply)), (Origin("planted", ""),))


def make_base(folder: Path, orders: Sequence[Order], updates: int, seed: int) -> Path:
    """The tiny base, trained until it says orders back."""
    texts = [text for order in orders for text in (asked(order), short(order), polite(order))]
    tiny.write_base(folder, texts=texts, **SHAPE)
    model, chat, rng = tiny.model(**SHAPE).train(), open_base(str(folder)).chat, random.Random(seed)
    rows = [chat.encode(example(one, polite(one) if rng.random() < SELDOM else short(one))) for one in orders]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=updates, pct_start=0.1)
    for _ in range(updates):
        with transformers_backend.packing(model):
            loss = transformers_backend.pack_losses(model, packing.pack(rng.sample(rows, 32))).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
    model.eval().save_pretrained(str(folder))
    print(f"base: {updates} updates, loss {loss.item():.3f}", file=sys.stderr)
    return folder


def curated(folder: Path, name: str, rows: Sequence[dict[str, Any]]) -> str:
    (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    sources = [{"path": str(folder / f"{name}.jsonl"), "licence": "CC0-1.0"}]
    sartor.curate({"sources": sources, "steps": [], "split": {"eval_fraction": 0.1}}, folder / name)
    return str(folder / name)


def feedback(folder: Path, orders: Sequence[Order], rng: random.Random) -> dict[str, str]:
    """What people say, as a Dataset for each objective: which of both replies to an order is better, or a thumb on
    one.
    """
    pairs = [{"prompt": asked(one), "chosen": polite(one), "rejected": short(one)} for one in orders]
    thumbs = [(one, rng.random() < 0.5) for one in orders]
    rated = [
        {"prompt": asked(one), "completion": polite(one) if is_good else short(one), "rating": 1 if is_good else -1}
        for one, is_good in thumbs
    ]
    return {"dpo": curated(folder, "pairs", pairs), "kto": curated(folder, "rated", rated)}


def replies(base: str, adapter: str, orders: Sequence[Order]) -> list[str]:
    opened = open_base(base)
    model = adapters.open_adapter(opened.model, Path(adapter)) if adapter else opened.model
    prompts = [opened.chat.prompt_ids(example(one, "").prompt) for one in orders]
    sampling = Sampling(max_tokens=24, temperature=0)
    made = generate(model, prompts, stop=opened.chat.stops, pad=opened.chat.pad, sampling=sampling)
    return [opened.chat.decode(one.ids) for one in made]


def judged(found: Sequence[str], orders: Sequence[Order]) -> dict[str, list[float]]:
    read = [said(reply) for reply in found]
    return {
        "preferred": [float(is_polite) for is_polite, _ in read],
        "metric": [float(words == list(order)) for (_, words), order in zip(read, orders, strict=True)],
    }


def measured(
    kind: str, before: dict[str, list[float]], base: str, recipe: dict[str, Any], orders: Sequence[Order], folder: Path
) -> dict[str, Any]:
    """One objective: tune, ask, compare."""
    began = time.monotonic()
    made = sartor.tune(recipe, folder / f"adapter-{kind}", show=False).as_json()
    wall_s = time.monotonic() - began
    after = judged(replies(base, made["adapter"], orders), orders)
    lost = bootstrap.paired_bootstrap(after["metric"], before["metric"], [asked(one) for one in orders])
    means = {
        side: {name: sum(values) / len(values) for name, values in scores.items()}
        for side, scores in (("before", before), ("after", after))
    }
    return {
        **means,
        "lost": {"estimate": lost.difference, "low": lost.low, "high": lost.high},
        "updates": made["updates"],
        "tokens": made["tokens"],
        # nothing is evaluated in between, so there is no loss of that
        "loss": {name: loss for name, loss in made["loss"].items() if loss is not None},
        "wall_s": round(wall_s, 1),
        "objective": recipe["objective"],
    }


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    rng = random.Random(options.seed)
    every = [(device, place, level) for device in DEVICES for place in PLACES for level in LEVELS]
    rng.shuffle(every)
    held_out, told, rest = (
        every[: options.asked],
        every[options.asked : options.asked + options.told],
        every[options.asked :],
    )
    method: dict[str, Any] = {"rank": 8, "alpha": 16}
    if options.starter:
        base, start = "starter", folder / "started"
        rows = [
            {"prompt": asked(one), "completion": polite(one) if rng.random() < SELDOM else short(one)}
            for one in rest[: options.told * 2]
        ]
        optimizer = {"learning_rate": 1e-3, "batch_tokens": 512}
        asking = {
            "base": base,
            "data": curated(folder, "task", rows),
            "method": method,
            "optimizer": optimizer,
            "evaluations": 0,
        }
        sartor.tune(asking, start, show=False)
        method["start"] = str(start)
    else:
        base = str(make_base(folder / "base", rest, options.updates, options.seed))
    before = judged(replies(base, method.get("start", ""), held_out), held_out)
    data = feedback(folder, told, rng)
    found = {}
    objectives: dict[str, dict[str, Any]] = {
        "dpo": {"kind": "dpo", "beta": options.beta, "sft_weight": options.sft_weight},
        "kto": {"kind": "kto", "beta": options.beta},
    }
    for kind, objective in objectives.items():
        recipe = {
            "base": base,
            "data": data[kind],
            "method": method,
            "objective": objective,
            "evaluations": 0,
            "seed": options.seed,
            "budget": {"epochs": options.epochs},
            "optimizer": {"learning_rate": options.rate, "batch_tokens": 1024},
        }
        found[kind] = measured(kind, before, base, recipe, held_out, folder)
        print(f"{kind}: {json.dumps(found[kind])}", file=sys.stderr)
    return {"base": "starter" if options.starter else "tiny", "asked": len(held_out), "told": len(told), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    smallest.add_argument(parser)
    parser.add_argument("--starter", action="store_true", help="on the starter base; minutes")
    parser.add_argument("--updates", type=int, default=700, help="of the tiny base's own training")
    parser.add_argument("--told", type=int, default=160, help="orders on which people say what they prefer")
    parser.add_argument("--asked", type=int, default=200, help="held-out orders")
    parser.add_argument("--epochs", type=float, default=3.0)
    # replies of a few tokens: at 0.1 the loss would ask for 50 nats, where 5 settle which form is said
    parser.add_argument("--beta", type=float, default=1.0, help="of dpo and kto")
    parser.add_argument(
        "--sft-weight", type=float, default=0.2, help="of dpo: the preferred reply's own cross-entropy"
    )
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate of the adapters")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.small:
        options.updates, options.told, options.asked, options.epochs = SMALL_UPDATES, SMALL_ORDERS, SMALL_ORDERS, 1.0
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, smallest.home(options.small):
        found = run(options, Path(folder))
    print_result({**found, "machine": machine_facts(), "wall_s": round(time.monotonic() - began, 1)})


if __name__ == "__main__":
    main()
