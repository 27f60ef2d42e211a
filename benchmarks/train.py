"""Fine-tuning on the same work, Sartor against its peers: tokens per second, memory, losses, and how near the
machine's limit.

    python benchmarks/train.py --json
    python benchmarks/train.py --json --peers trl,unsloth --pairs 1 --updates 4
    python benchmarks/train.py --json --device cuda
    python benchmarks/train.py --json --small    # a tiny base without peers: shows that it runs

Every side is a fresh process of its own interpreter (benchmarks/peers/NAME/run.py) that is handed the same base and
the same tokenised rows per update, and trains rank 16 on all seven projections by AdamW at a constant rate. Sartor and
a peer alternate; a ratio is the median over pairs, ours over theirs. The first update warms up and is not timed.
Padding is not counted as tokens: peers pad, Sartor packs. Sartor's side is the verb `tune` itself
(peers/sartor/run.py).

A peer has a ratio only if in every pair tokens, the loss of every update, and the gradient norm of every factor B at
update 1 agree with Sartor's in the same dtype (peer_agreement.py derives the tolerances). Else `refused` has the
reasons, and no ratio is printed. Where a peer computes in another dtype than Sartor does, one more run of Sartor's in
that dtype is what it must agree with. In bf16 a peer may round as peft does, the frozen product before the low-rank
term is added: then it must agree with a run of Sartor's that rounds so, and stands under `rounded_first`.

`trl` is fp32 as its users on a CPU run it, `trl_bf16` the same in bf16, `unsloth` chooses its own dtype, and
`unsloth_compile` is Unsloth with its opt-in torch.compile. `ratios_best` has the peers with their best documented
settings (peers/settings.toml). A peer that cannot be installed or run is named under `failed` with the reason, one
that was not asked for under `absent`; one that is slow ends early (`--limit-s`) and is rated by the updates that it
made.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import parts
import peer_agreement
import smallest
import tables
from peer_agreement import Tolerance, dtype_of, find_disagreement
from peers import settings, venvs
from results import last_line, print_result

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent / "src"
BEST = "_best"
START_S = 240  # to import, load, convert and compile, on top of twice the time for updates
RANK, ALPHA, LEARNING_RATE, CLIP_NORM = 16, 32, 2e-4, 1.0
# with `--small`; the first update is not timed
SMALL_UPDATES, SMALL_ROWS, SMALL_LAYERS = 3, 4, 12


@dataclass(frozen=True)
class Side:
    """A way to train: which folder of `peers` runs it, and with what. settings: by kind, as a job has them."""

    folder: str
    dtype: str = "auto"
    compile: bool = False
    settings: dict[str, dict[str, Any]] = field(default_factory=dict, hash=False)


PEERS = {
    "unsloth": Side("unsloth"),
    "unsloth_compile": Side("unsloth", compile=True),
    "trl": Side("trl", "float32"),
    "trl_bf16": Side("trl", "bfloat16"),
    "llamafactory": Side("llamafactory"),
    "litgpt": Side("litgpt"),
    "mlx": Side("mlx"),
}
SARTOR = Side("sartor")
Result = dict[str, Any]


@dataclass
class Runs:
    """What was measured: Sartor's results over all pairs, the pairs per peer, and why a peer has none.

    references: by dtype, Sartor's result that others in this dtype must agree with. rounded_first: the same, of a run
    that rounds as peft does (adapters in 16 bits). differences: per peer, the largest. peft_rounding: peers that agree
    with such a run alone.
    """

    ours: list[Result] = field(default_factory=list)
    pairs: dict[str, list[tuple[Result, Result]]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    refused: dict[str, list[str]] = field(default_factory=dict)
    references: dict[str, Result] = field(default_factory=dict)
    rounded_first: dict[str, Result] = field(default_factory=dict)
    peft_rounding: set[str] = field(default_factory=set)
    tolerances: dict[str, Tolerance] = field(default_factory=dict)
    differences: dict[str, dict[str, float]] = field(default_factory=dict)


def best_sides() -> dict[str, Side]:
    """Return the peers with those of their documented settings that this processor can use."""
    flags = {flag for flag, has in machine()["flags"].items() if has}
    sides: dict[str, Side] = {}
    for folder in dict.fromkeys(setting.peer for setting in settings.read_settings()):
        chosen = [setting for setting in settings.read_settings() if setting.peer == folder and setting.applies(flags)]
        if chosen:
            by_kind = settings.by_kind(chosen)
            dtype = by_kind.get("precision", {}).get("dtype", PEERS[folder].dtype)
            sides[folder + BEST] = Side(folder, dtype, settings=by_kind)
    return sides


def main() -> None:
    """Print one JSON line."""
    arguments = _arguments()
    sides = {**PEERS, **best_sides()}
    asked = list(sides) if arguments.peers == "all" else [name for name in arguments.peers.split(",") if name]
    if unknown := set(asked) - set(sides):
        sys.exit(f"no such peer: {', '.join(sorted(unknown))}; there are {', '.join(sides)}")
    with (
        smallest.home(arguments.small, "home-intents", layers=SMALL_LAYERS),
        tempfile.TemporaryDirectory(prefix="sartor-bench-") as folder,
    ):
        work = prepare(Path(folder), arguments)
        runs = measure(Path(folder), work, {name: sides[name] for name in asked}, arguments)
        said = report(runs, work, arguments)
    why = smallest.LEFT_OUT if arguments.small else f"not asked for: --peers {','.join(sides)}"
    said["absent"] = {name: why for name in sides if name not in asked}
    said["absent"] |= {
        name + BEST: "peers/settings.toml has no documented setting that applies here"
        for name in {side.folder for side in PEERS.values()}
        if name + BEST not in sides
    }
    if arguments.write:
        tables.write(arguments.write, "peers", table(said))
    print_result(said)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line (always so)")
    smallest.add_argument(parser)
    parser.add_argument("--peers", default="all", help=f"of {','.join(PEERS)}, NAME{BEST}; empty for Sartor alone")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--rows-per-update", type=int, default=14)
    parser.add_argument("--base", default="starter", help="a directory in transformers' layout, or starter")
    parser.add_argument("--layers", type=int, default=0, help="keep only that many layers: for a quick trial")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--limit-s", type=float, default=240.0, help="seconds of updates after which a side ends early"
    )
    parser.add_argument(
        "--write", type=Path, help="put the table between the markers of this file (docs/development/tuning-speed.md)"
    )
    arguments = parser.parse_args()
    if arguments.updates < 2:
        parser.error("--updates 2 or more: the first one is not timed")
    if arguments.small:
        arguments.peers, arguments.pairs = "", 1
        arguments.updates, arguments.rows_per_update = SMALL_UPDATES, SMALL_ROWS
    return arguments


def prepare(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what work.py writes. It is a process of its own: a child's peak RSS begins at its parent's."""
    out = folder / "work.json"
    command = [smallest.python(), str(HERE / "peers" / "work.py"), str(out), "--base", arguments.base]
    command += ["--updates", str(arguments.updates), "--rows-per-update", str(arguments.rows_per_update)]
    command += ["--layers", str(arguments.layers), "--rank", str(RANK)]
    subprocess.run(command, check=True, env=environment(SARTOR, arguments.device, arguments.small))
    return json.loads(out.read_text())


def measure(folder: Path, work: dict[str, Any], peers: dict[str, Side], arguments: argparse.Namespace) -> Runs:
    """Sartor and each peer in turn, `pairs` times; round by round, so that a slow hour of the machine falls on every
    peer.
    """
    runs = Runs()
    for number in range(arguments.pairs):
        if not peers:
            alone = parts.run(f"pair {number + 1}, sartor alone", lambda: _sound(run(folder, SARTOR, work, arguments)))
            runs.ours.append(alone)
        for name, peer in peers.items():
            if name in runs.failed or name in runs.refused:
                continue
            ours, theirs = run_pair(name, number, folder, peer, work, arguments)
            runs.ours.append(ours)
            if "failed" in theirs:
                runs.failed[name] = theirs["failed"]
            else:
                reference = reference_of(runs, folder, ours, dtype_of(theirs), work, arguments)
                if find_disagreement(reference, theirs, runs.tolerances[dtype_of(reference)]):
                    reference = rounded_first_of(runs, folder, name, reference, theirs, work, arguments)
                note_pair(runs, name, ours, theirs, reference)
            _say(name, number, ours, theirs, runs.refused.get(name, []))
    return runs


def run_pair(
    name: str, number: int, folder: Path, peer: Side, work: dict[str, Any], arguments: argparse.Namespace
) -> tuple[Result, Result]:
    """Return Sartor's result and a peer's, one run after the other. They are one part: a later call takes over both or
    none.
    """
    ours, theirs = parts.run(
        f"pair {number + 1}, sartor and {name}",
        lambda: [_sound(run(folder, SARTOR, work, arguments)), run(folder, peer, work, arguments)],
        is_final=lambda pair: is_success(pair[1]),
    )
    return ours, theirs


def is_success(result: Result) -> bool:
    """Whether a side gave a result; a peer that failed is tried again by a later call."""
    return "failed" not in result


def reference_of(
    runs: Runs, folder: Path, ours: Result, dtype: str, work: dict[str, Any], arguments: argparse.Namespace
) -> Result:
    """Return the result of Sartor's that one in `dtype` must agree with: of this pair, or a run in that dtype.

    Exits with 1 if Sartor's own side in that dtype fails.
    """
    if dtype_of(ours) == dtype:
        runs.references[dtype] = ours
    elif dtype in peer_agreement.UNIT_ROUNDOFF and dtype not in runs.references:
        runs.references[dtype] = _sound(run(folder, Side("sartor", dtype), work, arguments, is_reference=True))
    reference = runs.references.get(dtype, ours)
    if (known := dtype_of(reference)) not in runs.tolerances:
        config = json.loads((Path(work["base"]) / "config.json").read_text())
        runs.tolerances[known] = peer_agreement.tolerance_of(
            known,
            layers=config["num_hidden_layers"],
            width=max(config["hidden_size"], config["intermediate_size"]),
            rank=RANK,
            loss=reference["losses"][0],
        )
    return reference


def rounded_first_of(
    runs: Runs,
    folder: Path,
    name: str,
    reference: Result,
    theirs: Result,
    work: dict[str, Any],
    arguments: argparse.Namespace,
) -> Result:
    """Return Sartor's run that rounds as peft does, if a 16-bit peer agrees with it; else `reference`."""
    dtype = dtype_of(reference)
    if dtype != "bfloat16" or dtype_of(theirs) != dtype:
        return reference
    if dtype not in runs.rounded_first:
        runs.rounded_first[dtype] = parts.run(
            "reference that rounds as peft does",
            lambda: _sound(run(folder, Side("sartor", dtype), work, arguments, is_reference=True, rounds_first=True)),
        )
    rounded = runs.rounded_first[dtype]
    if find_disagreement(rounded, theirs, runs.tolerances[dtype]):
        return reference
    runs.peft_rounding.add(name)
    return rounded


def note_pair(runs: Runs, name: str, ours: Result, theirs: Result, reference: Result) -> None:
    """Take a pair in, or refuse its peer: then no pair of it counts."""
    reason = find_disagreement(reference, theirs, runs.tolerances[dtype_of(reference)])
    if reason:
        runs.refused.setdefault(name, []).append(reason)
        runs.pairs.pop(name, None)
        return
    runs.pairs.setdefault(name, []).append((ours, theirs))
    differences = peer_agreement.largest_differences(reference, theirs)
    known = runs.differences.setdefault(name, dict.fromkeys(differences, 0.0))
    known.update({key: max(known[key], value) for key, value in differences.items()})


def run(
    folder: Path,
    side: Side,
    work: dict[str, Any],
    arguments: argparse.Namespace,
    *,
    is_reference: bool = False,
    rounds_first: bool = False,
) -> Result:
    """One side's result in a fresh process; `{"failed": reason}` if it gives none."""
    device = arguments.device
    job = {
        "base": work["base"],
        "updates": work["updates"],
        "dtype": side.dtype,
        "compile": side.compile,
        "device": device,
    }
    job |= {
        "limit_s": arguments.limit_s,
        "start": work["start"],
        "settings": side.settings,
        "is_reference": is_reference,
        "rounds_first": rounds_first,
    }
    job |= {"rank": RANK, "alpha": ALPHA, "learning_rate": LEARNING_RATE, "clip_norm": CLIP_NORM}
    job_path, result_path = folder / "job.json", folder / "result.json"
    job_path.write_text(json.dumps(job))
    result_path.unlink(missing_ok=True)
    try:
        python = smallest.python() if side.folder == SARTOR.folder else str(venvs.interpreter(side.folder))
    except venvs.NotInstalled as error:
        return {"failed": f"does not install: {error}"}
    command = [python, str(HERE / "peers" / side.folder / "run.py"), str(job_path), str(result_path)]
    most_s = START_S + 2 * arguments.limit_s
    try:
        done = subprocess.run(
            command,
            env=environment(side, device, arguments.small) | {"TMPDIR": str(folder)},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=most_s,
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"did not make two updates in {most_s:.0f} s"}
    if result_path.is_file():
        return json.loads(result_path.read_text())
    return {"failed": f"exit code {done.returncode}: {' '.join(done.stderr.split())[-400:]}"}


def environment(side: Side, device: str, is_small: bool = False) -> dict[str, str]:
    """The machine's environment less what would slow a BLAS or leak our packages into a peer, and without a network.

    Of the smallest size, whose times say nothing, it is this process's own.
    """
    if is_small:
        return dict(os.environ)
    gone = {"OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    kept = {name: value for name, value in os.environ.items() if name not in gone}
    kept |= {"OMP_NUM_THREADS": str(os.cpu_count()), "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    kept |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    kept |= {"HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
    if side.folder == SARTOR.folder:
        kept["PYTHONPATH"] = str(SOURCES)
    if device == "cpu":
        kept["CUDA_VISIBLE_DEVICES"] = ""
    return kept


def report(runs: Runs, work: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """The JSON line."""
    fractions = [ours["roofline_fraction"] for ours in runs.ours]
    last = runs.ours[-1]
    sides = {"sartor": runs.ours} | {name: [theirs for _, theirs in pairs] for name, pairs in runs.pairs.items()}
    return {
        "ratios": {name: ratios(pairs) for name, pairs in runs.pairs.items() if not name.endswith(BEST)},
        "ratios_best": {
            name.removesuffix(BEST): ratios(pairs) for name, pairs in runs.pairs.items() if name.endswith(BEST)
        },
        "agreement": runs.differences,
        "rounded_first": sorted(runs.peft_rounding),
        "tolerances": {
            dtype: {"b_gradient": tolerance.gradient, "first_loss": tolerance.first_loss}
            for dtype, tolerance in runs.tolerances.items()
        },
        "tokens_per_s": round(statistics.median(rate(ours) for ours in runs.ours), 1),
        "supervised_tokens_per_s": round(statistics.median(rate(ours, "supervised_tokens") for ours in runs.ours), 1),
        "peak_rss_bytes": round(statistics.median(ours["peak_rss_bytes"] for ours in runs.ours)),
        "roofline_fraction": round(statistics.median(fractions), 3),
        **parts.run("savings", lambda: savings(arguments)),
        "path": last["path"],
        "losses": {name: losses(results) for name, results in sides.items()},
        "sides": {name: side(results) for name, results in sides.items()},
        "failed": runs.failed,
        "refused": runs.refused,
        "work": {
            "rows": work["rows"],
            "rows_per_update": arguments.rows_per_update,
            "updates": arguments.updates,
            "layers": arguments.layers or "all",
            "device": arguments.device,
            "tokens": last["tokens"],
            "supervised_tokens": last["supervised_tokens"],
            "longest": [max(len(row["ids"]) for row in rows) for rows in work["updates"]],
        },
        "machine": machine(),
    }


def ratios(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the pairs, ours over theirs."""
    speeds = [rate(ours) / rate(theirs) for ours, theirs in pairs]
    supervised = [rate(ours, "supervised_tokens") / rate(theirs, "supervised_tokens") for ours, theirs in pairs]
    memory = [ours["peak_rss_bytes"] / theirs["peak_rss_bytes"] for ours, theirs in pairs]
    differences = [abs(ours["losses"][0] - theirs["losses"][0]) for ours, theirs in pairs]

    def beside(name: str) -> float:
        """Another way of ours over theirs."""
        return round(statistics.median(ours[name] / rate(theirs) for ours, theirs in pairs), 3)

    return {
        "tokens_per_s": round(statistics.median(speeds), 3),
        "supervised_tokens_per_s": round(statistics.median(supervised), 3),
        "tokens_per_s_with_shared_prefixes": beside("shared_tokens_per_s"),
        "tokens_per_s_without_compiler": beside("no_compiler_tokens_per_s"),
        "peak_rss": round(statistics.median(memory), 3),
        "loss_step_1_difference": max(differences),
        "pairs": len(pairs),
        "of_each_pair": [round(speed, 3) for speed in speeds],
    }


def rate(result: dict[str, Any], unit: str = "tokens") -> float:
    """Median over the updates after the first of tokens (or supervised tokens) per second."""
    return statistics.median(
        count / seconds for count, seconds in zip(result[unit][1:], result["seconds"][1:], strict=True)
    )


def losses(results: list[dict[str, Any]]) -> dict[str, float]:
    """Of the last run: the loss at the first and at the eighth (or last) update."""
    found = results[-1]["losses"]
    last = min(8, len(found))
    return {"update_1": found[0], f"update_{last}": found[last - 1]}


def side(results: list[dict[str, Any]]) -> dict[str, Any]:
    """A side's own numbers, with the lowest and highest run."""
    rates = [rate(result) for result in results]
    return {
        "tokens_per_s": round(statistics.median(rates), 1),
        "lowest_and_highest": [round(min(rates), 1), round(max(rates), 1)],
        "supervised_tokens_per_s": round(
            statistics.median(rate(result, "supervised_tokens") for result in results), 1
        ),
        "peak_rss_bytes": round(statistics.median(result["peak_rss_bytes"] for result in results)),
        "updates": len(results[-1]["seconds"]),
        "dtype": results[-1].get("dtype", "").removeprefix("torch."),
        "trained": results[-1].get("trained"),
        "versions": results[-1]["versions"],
    }


def table(said: dict[str, Any]) -> str:
    """Markdown: medians of each side, and ours over theirs."""
    sides, threads = said["sides"], said["machine"]["threads"]
    flags = ", ".join(name for name, has in said["machine"]["flags"].items() if has)
    lines = [
        f"`python benchmarks/train.py --json --write FILE`: {said['machine']['cpu']}, {threads} threads, {flags}; "
        f"{said['work']['updates']} updates of {said['work']['rows_per_update']} rows ({said['work']['rows']}). "
        "Sartor uses "
        f"{said['roofline_fraction']:.0%} of the rate at which this processor does the products that an update needs.",
        "",
        "| side | tokens/s | peak memory | loss at update 1, last "
        "| Sartor over it: speed | memory | speed, shared prefixes | speed, no compiler |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, side in sides.items():
        ratio = said["ratios"].get(name) or said["ratios_best"].get(
            name.removesuffix(BEST) if name.endswith(BEST) else ""
        )
        wide = ("tokens_per_s", "peak_rss", "tokens_per_s_with_shared_prefixes", "tokens_per_s_without_compiler")
        over = " | ".join(f"{ratio[key]:.2f}x" if key in ratio else "-" for key in wide) if ratio else " | | | "
        losses = ", ".join(f"{loss:.3f}" for loss in said["losses"][name].values())
        memory = f"{side['peak_rss_bytes'] / 1e9:.2f} GB, {side['dtype']}"
        lines.append(f"| {name} | {side['tokens_per_s']:.0f} | {memory} | {losses} | {over} |")
    for name, reason in said["failed"].items():
        lines.append(f"| {name} | - | {' '.join(reason.split())[:120]} | | | | | |")
    for name, reasons in said["refused"].items():
        lines.append(f"| {name} | refused | {reasons[0][:120]} | | | | | |")
    return "\n".join(lines)


def savings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What shared prefixes and stored activations bring beyond the ratios above, from a process of its own:
    savings.py.
    """
    command = [smallest.python(), str(HERE / "savings.py"), "--json", "--prove", "--pairs", str(arguments.pairs)]
    command += ["--layers", str(arguments.layers)]
    said = last_line(command, env=environment(SARTOR, arguments.device, arguments.small))
    said["savings_absent"] = said.pop("absent")
    said.pop("machine")
    return said


def machine() -> dict[str, Any]:
    """What the numbers hold for."""
    said: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            said.setdefault(name.strip(), value.strip())
    flags = (said.get("flags") or said.get("Features") or "").split()
    return {
        "cpu": said.get("model name", "unknown"),
        "flags": {flag: flag in flags for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16")},
        "threads": os.cpu_count(),
        "torch": importlib.metadata.version("torch"),
    }


def _sound(ours: dict[str, Any]) -> dict[str, Any]:
    if "failed" in ours:
        sys.exit(f"Sartor's own side failed: {ours['failed']}\n{ours.get('traceback', '')}")
    return ours


def _say(name: str, number: int, ours: Result, theirs: Result, refused: list[str]) -> None:
    """A line of progress on stderr."""
    said = theirs.get("failed") or "; ".join(refused) or f"{rate(ours):.0f} against {rate(theirs):.0f} tokens/s"
    print(f"pair {number + 1}, {name}: {said}", file=sys.stderr)


if __name__ == "__main__":
    main()
