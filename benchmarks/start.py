"""How long the command line takes to begin: `sartor --help`, `sartor --version`, `import sartor`, beside Python
itself.

    python benchmarks/start.py --json [--rounds 15]
    python benchmarks/start.py --small --json    # one round

Each command runs in a process of its own, in turn with the others, after a round that is not counted (it fills the
page cache). What was run before on the machine can only make it slower, so the least is given beside the median.

start {help, version, import, python}   each {median_s, least_s}: wall-clock seconds from the process's start to its
                                        end
modules         how many modules `import sartor` loads beside Python's own
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from typing import Any

import smallest
from results import print_result

COMMANDS = {
    "help": [sys.executable, "-m", "sartor", "--help"],
    "version": [sys.executable, "-m", "sartor", "--version"],
    "import": [sys.executable, "-c", "import sartor"],
    "python": [sys.executable, "-c", "pass"],
}
MODULES = "import sys; before = set(sys.modules); import sartor; print(len(set(sys.modules) - before))"


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line (always so)")
    smallest.add_argument(parser)
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(1 + (1 if arguments.small else arguments.rounds)):
        for name, command in COMMANDS.items():
            began = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            if number:
                seconds[name].append(time.perf_counter() - began)
    modules = int(subprocess.run([sys.executable, "-c", MODULES], check=True, capture_output=True, text=True).stdout)
    print_result({"start": {name: figures(values) for name, values in seconds.items()}, "modules": modules})


def figures(values: list[float]) -> dict[str, Any]:
    """Median and least of some seconds."""
    return {"median_s": round(statistics.median(values), 4), "least_s": round(min(values), 4)}


if __name__ == "__main__":
    main()
