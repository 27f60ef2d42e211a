"""How much real adapters change their base, by the measure that admission limits: what its limit was chosen from.

    python benchmarks/norms.py ADAPTER... --json      # directories with sartor.json: Adapters or Releases

Per module the Frobenius norm of scale * B A, over that of the base's weight and as a share of what is allowed; of each adapter
the largest and the middle one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from sartor.agents.admission import CONFIG, WEIGHTS, lora
from sartor.agents.admission.config import read_config
from sartor.agents.admission.tensors import read_header
from sartor.agents.admission.weights import BaseWeights
from sartor.core import bases
from sartor.core.errors import AdmissionError


def measure(adapter: Path, norms_file: Path) -> dict[str, Any]:
    """One adapter's row. Raises what the checks raise."""
    said = json.loads((adapter / "sartor.json").read_text())
    ref = bases.locate(said["base"]["name"])
    base = BaseWeights(ref.path, ref.digest, norms_file)
    pairs = lora.pair_up(read_header(adapter / WEIGHTS), read_config(adapter / CONFIG), base)
    weights = base.norms([pair.module for pair in pairs])
    over = [lora.added_norm(pair) / weights[pair.module] for pair in pairs]
    try:
        found = lora.check_values(pairs, base)
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


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", type=Path, nargs="+")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(adapter, Path(folder) / "norms.json") for adapter in asked.adapters]
    said = {"adapters": rows}
    if not asked.json:
        for row in rows:
            print("  ".join(f"{name} {value}" for name, value in row.items()))
    print(json.dumps(said))


if __name__ == "__main__":
    main()
