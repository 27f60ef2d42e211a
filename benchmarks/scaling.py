"""Cost grows linearly: seconds of tuning against rows (50 to 5,000) and against rank (4 to 64), with a plot.

    python benchmarks/scaling.py --json
    python benchmarks/scaling.py --json --plot docs/development/scaling.svg

Whole runs of `sartor tune` on a small random Llama (4 layers, width 128), one epoch each; `per_row` is seconds over
rows at each size, `r_squared` how well a straight line fits. By rank: products with the factors grow with R and the
rest does not, so the cost is a constant plus a slope.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import parts
import smallest
from results import print_result


@dataclass(frozen=True)
class Sizes:
    """How many rows, which ranks and on how many rows, how often."""

    rows: tuple[int, ...]
    ranks: tuple[int, ...]
    rank_rows: int
    repeats: int


FULL = Sizes((50, 158, 500, 1581, 5000), (4, 8, 16, 32, 64), 1000, 3)
SMALL = Sizes((20, 40, 60), (4, 8, 16), 20, 1)


def prepare(folder: Path, most_rows: int) -> Path:
    """A small base and its largest Dataset; returns the base."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import sartor

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "helpers"))
    import tiny

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(str(folder / "base"))
    tiny.tokenizer().save_pretrained(str(folder / "base"))
    rng = random.Random(0)
    words = [f"w{number}" for number in range(500)]
    rows = [
        {"prompt": " ".join(rng.choices(words, k=rng.randint(3, 9))), "completion": " ".join(rng.choices(words, k=6))}
        for _ in range(2 * most_rows)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(folder / "rows.jsonl"), "licence": "CC0-1.0"}
    sartor.curate({"sources": [source], "split": {"eval_fraction": 0.0}}, folder / "dataset")
    return folder / "base"


def seconds(folder: Path, base: Path, rows: int, rank: int) -> tuple[float, int]:
    """(seconds of the tuning loop, tokens) of one epoch over so many rows."""
    import sartor

    recipe = {
        "base": str(base),
        "data": {"path": str(folder / "dataset"), "rows": rows, "eval_fraction": 0.0},
        "method": {"kind": "lora", "rank": rank, "alpha": 2 * rank},
        "budget": {"epochs": 1},
        "optimizer": {"learning_rate": 2e-4, "batch_tokens": 1024},
        "compute": {"micro_batch_tokens": 1024},
        "evaluations": 0,
    }
    said = sartor.tune(recipe, folder / "out", replace=True, show=False).as_json()
    log = [json.loads(line) for line in (folder / "out" / "log.jsonl").read_text().splitlines()]
    # every update is timed alone: opening the base and the first measurements are no part of what grows
    return sum(line["tokens"] / line["tokens_per_s"] for line in log if "tokens_per_s" in line), said["tokens"]


def line(x: list[float], y: list[float]) -> dict[str, float]:
    """Least squares: intercept, slope, and how much of the variance the line explains."""
    slope, intercept = np.polyfit(x, y, 1)
    residual = np.asarray(y) - (slope * np.asarray(x) + intercept)
    return {
        "slope": float(slope),
        "intercept": float(intercept),
        "r_squared": round(float(1 - residual.var() / np.var(y)), 5),
    }


def plot(file: Path, by_rows: list[dict[str, Any]], by_rank: list[dict[str, Any]]) -> None:
    """Both curves, with their lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, points, name in zip(figure.subplots(1, 2), (by_rows, by_rank), ("rows", "rank"), strict=True):
        x, y = [point[name] for point in points], [point["seconds"] for point in points]
        fit = line(x, y)
        axes.plot(x, y, "o", color="#1f5f8b")
        ends = np.array([0, max(x)])
        axes.plot(ends, fit["intercept"] + fit["slope"] * ends, color="#d1495b", linewidth=1)
        axes.set_xlabel(name)
        axes.set_ylabel("seconds of tuning")
        axes.set_ylim(bottom=0)
        axes.set_title(f"straight line: R² = {fit['r_squared']:.4f}", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line (always so)")
    smallest.add_argument(parser)
    parser.add_argument("--plot", type=Path, help="draw both curves into this file")
    arguments = parser.parse_args()
    sizes = SMALL if arguments.small else FULL
    with tempfile.TemporaryDirectory() as scratch, smallest.home(arguments.small):
        folder = Path(scratch)
        base = prepare(folder, max(sizes.rows))
        seconds(folder, base, sizes.rows[0], 8)  # warms up
        by_rows, by_rank = [], []
        for rows in sizes.rows:
            took, tokens = parts.run(f"{rows} rows", lambda rows=rows: seconds(folder, base, rows, 16))
            by_rows.append({"rows": rows, "seconds": took, "tokens": tokens, "per_row": took / rows})
        for rank in sizes.ranks:
            runs = parts.run(
                f"rank {rank}",
                lambda rank=rank: [seconds(folder, base, sizes.rank_rows, rank)[0] for _ in range(sizes.repeats)],
            )
            by_rank.append({"rank": rank, "seconds": min(runs)})
    if arguments.plot:
        plot(arguments.plot, by_rows, by_rank)
    fits = {
        "rows": line([point["rows"] for point in by_rows], [point["seconds"] for point in by_rows]),
        "rank": line([point["rank"] for point in by_rank], [point["seconds"] for point in by_rank]),
    }
    from ablation import machine

    print_result({"by_rows": by_rows, "by_rank": by_rank, "lines": fits, "machine": machine()})


if __name__ == "__main__":
    main()
