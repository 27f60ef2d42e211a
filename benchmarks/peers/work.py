"""The work that every side of benchmarks/train.py is given: the rows as tokens, and a base that every side can open.

Run as a process of its own (`work.py OUT.json ...`), so that the one which starts the sides stays small: a child's
peak RSS begins at its parent's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
from pathlib import Path
from typing import Any

from sartor.core import assets, model_refs
from sartor.core.errors import SartorError
from sartor.core.records import Example, Message
from sartor.demo.home_intents import rows as intents
from sartor.models.base import convert, open_chat

TURNS = (1, 2, 2, 2)  # drawn from: what is said to a home, a few commands at a time
SHORTEST, LONGEST, SUPERVISED = 40, 104, 0.43  # tokens of a synthetic row, and the fraction of them that is learnt


def main() -> None:
    """Write {base, rows, updates, start}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--base", default=model_refs.STARTER)
    parser.add_argument("--updates", type=int, required=True)
    parser.add_argument("--rows-per-update", type=int, required=True)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=0)
    arguments = parser.parse_args()
    ref = model_refs.locate_base(arguments.base)
    if ref.name == model_refs.STARTER:
        convert(ref)
    count = arguments.updates * arguments.rows_per_update
    try:
        rows, kind = real_rows(ref.path, count), "home-intents"
    except SartorError as error:
        rows, kind = synthetic_rows(ref.path, count), f"synthetic ({error.problem})"
    step = arguments.rows_per_update
    base = plain_base(ref.path, arguments.out.parent / "base", arguments.layers)
    updates = [rows[place : place + step] for place in range(0, count, step)]
    start = write_start(base, arguments.out.parent / "start.safetensors", arguments.rank)
    arguments.out.write_text(json.dumps({"base": str(base), "rows": kind, "updates": updates, "start": str(start)}))


def real_rows(base: Path, count: int) -> list[dict[str, Any]]:
    """The demo's spoken commands and their JSON, through the base's own chat template: conversations of one or two
    commands.
    """
    chat, rng = open_chat(base), random.Random(0)
    commands = itertools.cycle(intents(assets.install("home-intents")))
    drawn = []
    for _ in range(count):
        turns = next(commands)["messages"]
        for _ in range(rng.choice(TURNS) - 1):
            turns = turns + next(commands)["messages"][1:]  # without its system turn
        encoded = chat.encode(Example(tuple(Message.of(turn["role"], turn["content"]) for turn in turns), ()))
        drawn.append({"ids": encoded.ids, "learnt": encoded.learnt})
    return drawn


def synthetic_rows(base: Path, count: int) -> list[dict[str, Any]]:
    """Seeded tokens in the shape of the demo's rows: what a machine without the asset can still time."""
    vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]
    rng = random.Random(0)
    made = []
    for _ in range(count):
        length = rng.randint(SHORTEST, LONGEST)
        ids = [rng.randrange(3, vocabulary) for _ in range(length)]
        made.append({"ids": ids, "learnt": [place >= round(length * (1 - SUPERVISED)) for place in range(length)]})
    return made


def plain_base(base: Path, out: Path, layers: int) -> Path:
    """A copy of `base` (its files linked) without what a release of a peer might not know, of `layers` layers if not
    0.

    The starter's config still says that it came from a GGUF file; and RoPE's base is written both as transformers 5
    and as older ones read it.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    config = json.loads((base / "config.json").read_text())
    config.pop("quantization_config", None)
    if "rope_theta" in (rope := config.get("rope_parameters") or {}):
        config["rope_theta"] = rope["rope_theta"]
    for file in base.iterdir():
        if file.name != "config.json" and file.is_file() and not (layers and ".safetensors" in file.name):
            (out / file.name).symlink_to(file.resolve())
    if layers:
        config["num_hidden_layers"] = layers
        _cut(base, out, layers)
    (out / "config.json").write_text(json.dumps(config, indent=1))
    return out


def write_start(base: Path, file: Path, rank: int) -> Path:
    """Write the factors A with which every side begins: (rank, inputs) by module, uniform as peft draws them."""
    import torch
    from protocol import TARGETS
    from safetensors import safe_open
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    inputs = {}
    for weights in sorted(base.glob("*.safetensors")):
        with safe_open(weights, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # not a dictionary
                module = name.removesuffix(".weight")
                if name.endswith(".weight") and module.rpartition(".")[2] in TARGETS:
                    inputs[module] = opened.get_slice(name).get_shape()[1]
    factors = {
        module: (torch.rand(rank, inputs[module], generator=generator) * 2 - 1) / inputs[module] ** 0.5
        for module in sorted(inputs)
    }
    save_file(factors, file)
    return file


def _cut(base: Path, out: Path, layers: int) -> None:
    """Only the weights of the first `layers` layers: some peers refuse a file with more than they ask for."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    kept = {}
    for file in base.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118  # not a dictionary
                place = next((int(part) for part in name.split(".") if part.isdigit()), 0)
                if place < layers:
                    kept[name] = weights.get_tensor(name)
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
