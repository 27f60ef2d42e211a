"""How long the command line takes to begin: `sartor --help`, `sartor --version`, `import sartor`, beside Python
itself.

    python benchmarks/start.py --json [--rounds 15]
    python benchmarks/start.py --small --json    # one round

Each command runs in a process of its own, in turn with the others, after a round that is not counted (it fills the
page cache). What was run before on the machine can only make it slower, so the least is given beside the median.

start {help, version, import, python}   each {median_s, least_s}: wall-clock seconds from the process's start to its
                                        end
modules         how many modules `import sartor` loads beside Python's own
behind {tune, ask, edge ask, edge ask of a GGUF}   {modules, own, cpu_s}: what is loaded where the work of a command
                                        begins, before a model is read: all modules, Sartor's own, and seconds of
                                        processor time
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from typing import Any

import smallest
from results import last_line, print_result

COMMANDS = {
    "help": [sys.executable, "-m", "sartor", "--help"],
    "version": [sys.executable, "-m", "sartor", "--version"],
    "import": [sys.executable, "-c", "import sartor"],
    "python": [sys.executable, "-c", "pass"],
}
# where the work of a command begins: what a run loads beside the model
BEHIND = {
    "tune": ("sartor.tune.trainer", "sartor.models.base"),
    "ask": ("sartor.serving.commands.ask_release", "sartor.models.base"),
    "edge ask": ("sartor.edge.runtime.device_runtime", "sartor.edge.runtime.torch_runtime"),
    "edge ask of a GGUF": ("sartor.edge.runtime.device_runtime", "sartor.edge.runtime.gguf_runtime"),
}
LOAD = """
import importlib, json, sys, time
for name in sys.argv[1:]:
    importlib.import_module(name)
own = sum(name.partition(".")[0] == "sartor" for name in sys.modules)
print(json.dumps({"modules": len(sys.modules), "own": own, "cpu_s": round(time.process_time(), 2)}))
"""
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
    behind = {}
    for name, entries in BEHIND.items():
        # the second run counts: the first fills the page cache
        for _ in range(1 if arguments.small else 2):
            behind[name] = last_line([sys.executable, "-c", LOAD, *entries])
    print_result(
        {
            "start": {name: figures(values) for name, values in seconds.items()},
            "modules": modules,
            "behind": behind,
        }
    )


def figures(values: list[float]) -> dict[str, Any]:
    """Median and least of some seconds."""
    return {"median_s": round(statistics.median(values), 4), "least_s": round(min(values), 4)}


if __name__ == "__main__":
    main()
