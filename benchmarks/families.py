"""What tuning costs by model family: memory and time from `plan`, for 400 rows of banking77 with every setting
automatic.

    python benchmarks/families.py --json --work DIR      # goes on where a call with the same DIR ended
    python benchmarks/families.py --json --families qwen2.5-0.5b llama-3.2-1b
    python benchmarks/families.py --json --small         # two tiny shapes: shows that it runs

The starter is the real one. No other weights can be fetched where this was written, so the others are of random
weights in the shape that the family's config.json states, with the starter's tokenizer: what a weight says changes
neither memory nor time. A plan times micro-batches on this machine and runs no tuning; `benchmarks/forecast.py` says
how far plans are to be believed.

families {name: {parameters, weights_bytes, memory_bytes, time_s, evaluation_s, updates, path}}   estimates with both
                ends of their 90 % interval; path: `fast` where Sartor's own kernels know the family
table           the same as Markdown, for README.md
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import parts
import smallest
from results import ROOT, last_line, print_result

DATA = ROOT.parent / "shared" / "data"
ROWS, INTENTS = 400, 20
STARTER = "smollm2-135m"
# name -> (config class of transformers, its shape), as the family's config.json has it
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm2-360m": (
        "LlamaConfig",
        {
            "hidden_size": 960,
            "intermediate_size": 2560,
            "num_hidden_layers": 32,
            "num_attention_heads": 15,
            "num_key_value_heads": 5,
            "vocab_size": 49152,
        },
    ),
    "qwen2.5-0.5b": (
        "Qwen2Config",
        {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
        },
    ),
    "qwen3-0.6b": (
        "Qwen3Config",
        {
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "head_dim": 128,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "vocab_size": 151936,
        },
    ),
    "gemma-3-270m": (
        "Gemma3TextConfig",
        {
            "hidden_size": 640,
            "intermediate_size": 2048,
            "num_hidden_layers": 18,
            "head_dim": 256,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "vocab_size": 262144,
        },
    ),
    "llama-3.2-1b": (
        "LlamaConfig",
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        },
    ),
}
SMALL_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SMALL_FAMILIES = ("qwen2.5-0.5b", "llama-3.2-1b")


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of banking77")
    parser.add_argument("--families", nargs="+", choices=[STARTER, *SHAPES], help="by default all")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line (always so)")
    smallest.add_argument(parser, selections=("families",))
    arguments = parser.parse_args()
    names = arguments.families or list(SMALL_FAMILIES if arguments.small else [STARTER, *SHAPES])
    with smallest.home(arguments.small), tempfile.TemporaryDirectory(prefix="sartor-families-") as folder:
        dataset = curated(Path(folder), arguments)
        families = {
            name: parts.run(name, lambda name=name: planned(name, dataset, Path(folder), arguments)) for name in names
        }
        print_result({"families": families, "table": table(families), "rows": ROWS, "machine": machine()})


def curated(folder: Path, arguments: argparse.Namespace) -> Path:
    """The Dataset: up to ROWS queries of the first INTENTS intents."""
    if arguments.small:
        rows = [
            {"prompt": f"Question {number} of a caller?", "completion": f"answer_{number % 3}"} for number in range(40)
        ]
    else:
        with (arguments.data / "banking77" / "train.csv").open(encoding="utf-8", newline="") as stream:
            rows = [{"prompt": row["text"], "completion": row["category"]} for row in csv.DictReader(stream)]
        intents = sorted({row["completion"] for row in rows})[:INTENTS]
        rows = random.Random(0).sample([row for row in rows if row["completion"] in intents], ROWS)
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    import sartor

    sartor.curate({"sources": [str(folder / "rows.jsonl")], "split": {"eval_fraction": 0.2}}, folder / "data")
    return folder / "data"


def planned(name: str, dataset: Path, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The forecast of one family, by `sartor plan` in a process of its own."""
    base = "starter" if name == STARTER else str(write_random_model(name, folder / name, is_small=arguments.small))
    recipe = folder / "recipe.json"
    recipe.write_text(json.dumps({"base": base, "data": str(dataset)}), encoding="utf-8")
    plan = last_line([smallest.python(), "-m", "sartor", "plan", str(recipe), "--json"])
    if plan["refusals"]:
        sys.exit(f"{name}: {plan['refusals'][0]['problem']}")
    shutil.rmtree(folder / name, ignore_errors=True)
    return {
        "trainable": plan["trainable"],
        "memory_bytes": plan["peak_memory_bytes"],
        "time_s": plan["time_s"],
        "evaluation_s": plan["evaluation_s"] or "no forecast",
        "updates": plan["updates"],
        "tokens": plan["tokens"],
        "path": plan["path"],
    }


def write_random_model(name: str, folder: Path, *, is_small: bool) -> Path:
    """A model of random weights in a family's shape, with the starter's tokenizer and chat template."""
    import torch
    import transformers

    from sartor.core import model_refs
    from sartor.models.base import convert

    ref = model_refs.locate_base(model_refs.STARTER)
    convert(ref)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(ref.path), local_files_only=True)
    config_name, shape = SHAPES[name]
    if is_small:
        shape = {**SMALL_SHAPE, "vocab_size": len(tokenizer)}
    config = getattr(transformers, config_name)(
        **shape,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    with torch.device("cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


def table(families: dict[str, dict[str, Any]]) -> str:
    """Rows of a Markdown table: a range is the 90 % interval."""
    lines = ["| model | memory | time to tune |", "|---|---|---|"]
    for name, plan in families.items():
        memory, seconds = plan["memory_bytes"], plan["time_s"]
        lines.append(
            f"| {name} | {memory['low'] / 1e9:.1f} to {memory['high'] / 1e9:.1f} GB "
            f"| {seconds['low'] / 60:.1f} to {seconds['high'] / 60:.1f} min |"
        )
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What the plans were made on."""
    from sartor.models.base import machine_facts

    return machine_facts()


if __name__ == "__main__":
    main()
