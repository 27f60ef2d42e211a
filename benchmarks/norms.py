"""How much real adapters change their base, by the measure that admission limits: what its limit was chosen from.

    python benchmarks/norms.py ADAPTER... --json      # directories with sartor.json: Adapters or Releases
    python benchmarks/norms.py --small --json         # an adapter of a tiny base that is tuned for this

Per module the Frobenius norm of scale * B A, over that of the base's weight and as a share of what is allowed; of each
adapter the largest and the middle one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import smallest
from results import print_result

import sartor
from sartor.core import model_refs
from sartor.core.errors import AdmissionError
from sartor.core.safetensors_file import read_header
from sartor.serving.admission import adapter_checks
from sartor.serving.admission.adapter_checks import BaseWeights, read_config
from sartor.serving.admission.admission import CONFIG, WEIGHTS


def measure(adapter: Path, norms_file: Path) -> dict[str, Any]:
    """One adapter's row. Raises what the checks raise."""
    said = json.loads((adapter / "sartor.json").read_text())
    ref = model_refs.locate_base(said["base"]["name"])
    base = BaseWeights(ref.path, ref.digest, norms_file)
    pairs = adapter_checks.pair_up(read_header(adapter / WEIGHTS), read_config(adapter / CONFIG), base)
    weights = base.norms([pair.module for pair in pairs])
    over = [adapter_checks.added_norm(pair) / weights[pair.module] for pair in pairs]
    try:
        found = adapter_checks.check_lora_values(pairs, base)
    except AdmissionError as error:
        found, refused = None, error.problem
    else:
        refused = ""
    method, run = said["recipe"]["method"], said["run"]
    return {
        "adapter": str(adapter),
        "base": Path(ref.name).name,
        "rank": method.get("rank"),
        "learning_rate": said["recipe"]["optimizer"]["learning_rate"],
        "updates": run["updates"],
        "over_weight": {"largest": round(max(over), 4), "middle": round(statistics.median(over), 4)},
        "of_limit": {"largest": round(found.largest, 4), "middle": round(found.median, 4)} if found else refused,
    }


def tuned(folder: Path) -> Path:
    """An adapter of the starter, two updates old."""
    rows = [{"prompt": f"what is {n} and {n}", "completion": f"it is {2 * n}"} for n in range(24)]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    sartor.curate({"sources": [{"path": str(folder / "rows.jsonl"), "licence": "CC0-1.0"}]}, folder / "dataset")
    recipe = {
        "base": model_refs.STARTER,
        "data": str(folder / "dataset"),
        "budget": {"updates": 2},
        "method": {"rank": 4},
    }
    recipe["optimizer"] = {"learning_rate": 2e-4, "batch_tokens": 4096}
    sartor.tune(recipe, folder / "adapter", show=False)
    return folder / "adapter"


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", type=Path, nargs="*")
    parser.add_argument("--json", action="store_true")
    smallest.add_argument(parser)
    asked = parser.parse_args()
    if not (asked.adapters or asked.small):
        parser.error("ADAPTER...: the directories to measure")
    with smallest.home(asked.small), tempfile.TemporaryDirectory() as folder:
        if asked.small:
            asked.adapters = [tuned(Path(folder))]
        rows = [measure(adapter, Path(folder) / "norms.json") for adapter in asked.adapters]
    said = {"adapters": rows}
    if not asked.json:
        for row in rows:
            print("  ".join(f"{name} {value}" for name, value in row.items()))
    print_result(said)


if __name__ == "__main__":
    main()
