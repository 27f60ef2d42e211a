"""What made rows are worth: the demo's task cut to 60 real rows, tuned with and without, on real rows that neither
saw.

    python benchmarks/synth_lift.py --json
    python benchmarks/synth_lift.py --json --small    # made-up rows, no limits, two updates: shows that it runs

The generator has no model: wordings that somebody who knows the home would write for each kind of command
(synth_wordings.yaml, filled from lists), and the real rows again with other values (`slot_substitution`). A near-copy
of a held-out row is not accepted by `sartor validate`. Both tunings have one recipe and as many updates. `lift`:
exact match with less exact match without, on held-out rows of templates that no training row has, with a paired
interval over templates.

`refused`: bad generators under the same limits, those of `sartor validate` by default, with the tests that each fails:
replies dealt out anew among the rows, replies with talk around them, a third of the commands, seeds handed in as new
rows. A validation with `--out` exits 5 for each and writes no Dataset. `benchmarks/synth.py` has `lift` from here.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import parts
import smallest
import yaml
from results import print_result

import sartor
from sartor.core import assets
from sartor.core.errors import GateError
from sartor.demo import home_intents

REAL = 60
# few enough for ten minutes, and enough for each of 350 rows to be seen some seven times
UPDATES = 200
# what the wordings of real commands and made-up ones are not alike in, with `--small`
LOOSE = ("distinguishable", "mmd", "coverage", "novelty", "length", "label", "topic", "diversity", "span")


@dataclass
class Size:
    """How much is generated and asked. options: of `sartor validate`, beside its defaults."""

    wordings: int = 1000
    held_out: int = 100_000
    asked: int = 200
    updates: int = 0
    options: dict[str, Any] = field(default_factory=dict)


size = Size()
SMALL = Size(16, 40, 8, 2, {"permutations": 199, "encoder": "tfidf", "limits": dict.fromkeys(LOOSE, 5.0)})
AREA, FLOOR = list(home_intents.AREAS), list(home_intents.FLOORS)
PLAYER, FAN, HEATER = (list(home_intents.NAMES[kind]) for kind in ("media_player", "fan", "climate"))
LISTS, LAMP, COVER = (list(home_intents.NAMES[kind]) for kind in ("todo", "light", "cover"))
MOWER, VACUUM, WEATHER = (list(home_intents.NAMES[kind]) for kind in ("lawn_mower", "vacuum", "weather"))
BUY, DO = home_intents.WILDCARDS["shopping_list_item"], home_intents.WILDCARDS["todo_list_item"]
SONG, TIMER = home_intents.WILDCARDS["search_query"], home_intents.WILDCARDS["timer_name"]
SLOTS: dict[str, list[str]] = {
    "area": AREA,
    "floor": FLOOR,
    "player": PLAYER,
    "fan": FAN,
    "heater": HEATER,
    "list": LISTS,
    "lamp": LAMP,
    "cover": COVER,
    "mower": MOWER,
    "vacuum": VACUUM,
    "city": WEATHER,
    "buy": list(BUY),
    "do": list(DO),
    "song": list(SONG),
    "timer": list(TIMER),
    "mode": ["low", "high", "middle", "focus", "auto"],
    "way": ["up", "down"],
    "n": [str(number) for number in range(2, 100)],
    "m": [str(number) for number in range(2, 100)],
    "kelvin": [str(number) for number in range(2000, 10000, 500)],
}
WORDINGS = Path(__file__).with_name("synth_wordings.yaml")


def notice(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def real(folder: Path, seed: int) -> Path:
    """The demo's rows as a Dataset: half held out, 60 of the others to learn from."""
    rows = home_intents.rows(assets.install("home-intents"))
    random.Random(seed).shuffle(rows)
    sources = []
    for name, part in (("eval", rows[: len(rows) // 2][: size.held_out]), ("train", rows[len(rows) // 2 :][:REAL])):
        file = folder / f"{name}.jsonl"
        file.write_text("".join(f"{json.dumps(row)}\n" for row in part), encoding="utf-8")
        sources.append({"path": str(file), "licence": assets.entry("home-intents").licence, "split": name})
    out = folder / "real"
    sartor.curate({"sources": sources, "steps": [], "split": {"eval_fraction": 0.0}}, out)
    return out


def generate(folder: Path, reality: Path, seed: int) -> Path:
    """Rows of the wordings, and the real ones with other values."""
    ways: list[Any] = [{"slot_substitution": {"slots": SLOTS, "numbers": True, "per_row": 1}}]
    wordings = yaml.safe_load(WORDINGS.read_text(encoding="utf-8"))
    for rest, prompts in list(wordings.items())[: size.wordings]:
        said = {
            "prompts": list(prompts),
            "reply": f'{{"intent":{rest}}}',
            "system": home_intents.SYSTEM_PROMPT,
            "count": 4,
        }
        used = {name: values for name, values in SLOTS.items() if f"{{{name}}}" in rest}
        ways.append({"templates": {**said, "slots": used or {"none": ["-"]}}})
    recipe = {"sources": [{"path": str(reality)}], "licence": "Apache-2.0", "ways": ways, "seed": seed}
    sartor.synthesize(recipe, folder / "made")
    return folder / "made"


def bad(
    rows: Sequence[dict[str, Any]], seeds: Sequence[dict[str, Any]], seed: int
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(what is wrong, rows) of generators that nobody should learn from."""
    draw = random.Random(seed)
    replies = [row["messages"][-1]["content"] for row in rows]

    def saying(others: Sequence[str]) -> list[dict[str, Any]]:
        pairs = zip(rows, others, strict=True)
        return [
            {**row, "messages": [*row["messages"][:-1], {"role": "assistant", "content": said}]} for row, said in pairs
        ]

    yield "replies of other rows", saying(draw.sample(replies, len(replies)))
    yield "talk around the reply", saying([f"Sure! Here is the JSON: {said}" for said in replies])
    kinds = sorted({json.loads(said)["intent"] for said in replies})
    few = set(draw.sample(kinds, len(kinds) // 3))
    yield (
        "a third of the commands",
        [row for row, said in zip(rows, replies, strict=True) if json.loads(said)["intent"] in few],
    )
    yield "seeds as new rows", list(seeds)


def refused(folder: Path, made: Path, reality: Path, seed: int) -> dict[str, list[str]]:
    """Of each bad generator the tests for which `validate --out` refused it; none where it was let through."""
    rows = [_plain(row) for row in sartor.read_examples(sartor.open(made))]
    seeds = [_plain(row) for row in sartor.read_examples(sartor.open(reality)) if row.split == "train"]
    found: dict[str, list[str]] = {}
    for number, (name, some) in enumerate(bad(rows, seeds, seed)):
        file, dataset, out = (
            folder / f"bad-{number}.jsonl",
            folder / f"bad-{number}",
            folder / f"bad-{number}-accepted",
        )
        file.write_text("".join(f"{json.dumps(row)}\n" for row in some), encoding="utf-8")
        sources = [{"path": str(file), "licence": "Apache-2.0"}]
        sartor.curate({"sources": sources, "steps": [], "split": {"eval_fraction": 0.0}}, dataset)
        try:
            sartor.validate(dataset, reality, options=_options(seed), out=out)
            found[name] = []
        except GateError:
            found[name] = [test.name for test in sartor.validate(dataset, reality, options=_options(seed)).failed]
            assert not out.exists()
    return found


def _plain(row: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": message.role, "content": message.text} for message in row.messages],
        "group": row.group,
    }


def _options(seed: int) -> dict[str, Any]:
    return {"seed": seed, **size.options}


def lifted(seed: int, base: str, updates: int) -> dict[str, Any]:
    """One draw of 60 rows, from generation to proof, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return lifted_in(Path(folder), seed, base, updates)


def lifted_in(folder: Path, seed: int, base: str, updates: int) -> dict[str, Any]:
    """One draw of 60 rows, from generation to proof."""
    reality = real(folder, seed)
    made = generate(folder, reality, seed)
    accepted = sartor.validate(made, reality, options=_options(seed), out=folder / "accepted")
    notice(f"seed {seed}: accepted {accepted.as_json()['accepted']}")
    no = refused(folder, made, reality, seed)
    notice(f"seed {seed}: refused {no}")
    recipe = {
        "base": base,
        "data": {"path": str(reality), "eval_rows": 16},
        "method": {"kind": "lora", "rank": 16, "alpha": 32},
        "budget": {"updates": updates},
        "optimizer": {"learning_rate": 2e-3, "batch_tokens": 256},
        "seed": seed,
    }
    proof = sartor.prove(
        folder / "accepted",
        reality,
        recipe,
        folder / "proof",
        scorer="exact_match",
        most_rows=size.asked,
        notice=notice,
    )
    return {**proof.as_json(), "seed": seed, "refused": no}


def measure(
    seeds: int, is_small: bool = False, base: str = "starter", updates: int = UPDATES, first: int = 0
) -> dict[str, Any]:
    """Estimate and interval of the first draw of 60 rows; `draws` has each. Ten seeds or more are meant for cheaper
    parts.
    """
    if is_small:
        vars(size).update(vars(SMALL))
    each = []
    for seed in range(first, first + (seeds if seeds < 10 else 1)):
        each.append(parts.run(f"lift, seed {seed}", functools.partial(lifted, seed, base, size.updates or updates)))
        notice(json.dumps(each[-1]))
    return {**each[0]["gain"], "without": each[0]["without"], "with": each[0]["with"], "draws": each}


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="(always: the last line is one JSON object)")
    smallest.add_argument(parser)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--base", default="starter")
    parser.add_argument("--updates", type=int, default=UPDATES)
    asked = parser.parse_args()
    machine = platform.processor() or platform.machine()
    with smallest.home(asked.small, "home-intents"):
        found = measure(asked.seeds, asked.small, asked.base, asked.updates, asked.first)
    print_result({"benchmark": "synth_lift", "machine": machine, "lift": found})


if __name__ == "__main__":
    main()
