"""What bf16 costs in what is learnt: losses of fp32 and bf16 update by update, beside TRL and Unsloth in bf16; and
when served.

    python benchmarks/fidelity.py --json
    python benchmarks/fidelity.py --json --peers '' --data ../shared/data/banking77/train.csv
    python benchmarks/fidelity.py --json --work DIR     # goes on where a run with the same DIR ended
    python benchmarks/fidelity.py --json --small        # a tiny base without peers: shows that it runs

Every side begins with the same factors and reads the same rows in the same order (AdamW at a constant 2e-4, rank 16 on
all seven projections), in a process of its own. `sets` has the loss of each update; `bf16_gap` is the largest over all
sets and seeds of the mean absolute difference of Sartor's bf16 and fp32 losses over the last 8 updates, and `gaps` has
it for every side, with the difference of the held-out losses for Sartor's. `rounded_first` is Sartor with the
arithmetic of numerics 1.

`speed_ratio` is the median over alternating pairs of Sartor's bf16 tokens per second over those of `rounded_first`.
`served_kl` is the mean KL divergence in nats, of the distribution in fp32 from the one in bf16, of the next token
after the trained adapter, through the serving engine: its compiled kernels, torch's operations, and those as numerics
1 had them.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import parts
import smallest
import tables
from peers import venvs
from results import last_line, print_result
from train import ALPHA, CLIP_NORM, LEARNING_RATE, RANK, Side, environment, machine, rate
from train import SARTOR as OURS

HERE = Path(__file__).resolve().parent
LAST = 8  # updates over which losses are compared
HELD_OUT = 40  # rows
LONGEST = 256  # tokens of a row
LIMIT_S, START_S = 3600.0, 600
SARTOR = {
    "fp32": Side("sartor", "float32"),
    "bf16": Side("sartor", "bfloat16"),
    "rounded_first": Side("sartor", "bfloat16"),
}
PEERS = {"trl_bf16": Side("trl", "bfloat16"), "unsloth": Side("unsloth")}
SETS = ("home-intents", "construction-faq")
# with `--small`
SMALL_UPDATES, SMALL_TOKENS, SMALL_LAYERS = 9, 256, 2


def main() -> None:
    """Print one JSON line."""
    arguments = parse_arguments()
    if arguments.serve:
        print_result(serve(Path(arguments.serve)))
        return
    peers = {name: PEERS[name] for name in arguments.peers.split(",") if name}
    with (
        smallest.home(arguments.small, "home-intents", "construction-faq", layers=SMALL_LAYERS),
        tempfile.TemporaryDirectory(prefix="sartor-fidelity-") as temporary,
    ):
        result = measure(parts.work_folder(Path(temporary)), peers, arguments)
    why = smallest.LEFT_OUT if arguments.small else "not asked for: --peers trl_bf16,unsloth"
    result["absent"] |= {name: why for name in PEERS if name not in peers}
    if arguments.write:
        tables.write(arguments.write, "fidelity", table(result))
    print_result(result)


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line (always so)")
    smallest.add_argument(parser, has_work=True, selections=("peers", "data", "seeds", "pairs", "serve"))
    parser.add_argument("--peers", default=",".join(PEERS), help="empty for Sartor alone")
    parser.add_argument(
        "--data", type=Path, action="append", default=[], help="a further set: a CSV with text and category"
    )
    parser.add_argument("--updates", type=int, default=24)
    parser.add_argument(
        "--update-tokens", type=int, default=1024, help="about: as many rows an update as come nearest to it"
    )
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=3, help="of bf16 and rounded_first, for speed_ratio")
    parser.add_argument("--work", help="a folder for results of single sides, kept by code and options")
    parser.add_argument(
        "--write", type=Path, help="put the table between the markers of this file (docs/development/tuning-speed.md)"
    )
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := {name for name in arguments.peers.split(",") if name} - set(PEERS):
        parser.error(f"no such peer: {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    if arguments.updates < LAST:
        parser.error(f"--updates {LAST} or more: the last {LAST} are compared")
    if arguments.small:
        arguments.peers, arguments.seeds, arguments.pairs, arguments.data = "", 1, 1, []
        arguments.updates, arguments.update_tokens = SMALL_UPDATES, SMALL_TOKENS
    return arguments


def measure(folder: Path, peers: dict[str, Side], arguments: argparse.Namespace) -> dict[str, Any]:
    """Run every side on every set and seed, and what is served; return the JSON object."""
    sets: dict[str, dict[str, list[float]]] = {}
    gaps: dict[str, dict[str, float]] = {}
    absent: dict[str, str] = {}
    adapter = folder / "adapter"
    jobs = {
        f"{name}, seed {seed}": job_of(folder, name, seed, arguments)
        for name in names(arguments)
        for seed in range(arguments.seeds)
    }
    for label, job in jobs.items():
        results: dict[str, dict[str, Any]] = {}
        for side_name, side in {**SARTOR, **peers}.items():
            if side_name in absent:
                continue
            job["adapter"] = str(adapter) if side_name == "fp32" and label == next(iter(jobs)) else ""
            found = run_once(folder, label, side_name, side, job, arguments.small)
            if "failed" in found and side_name in SARTOR:
                sys.exit(
                    f"Sartor's side {side_name} failed on {label}: {found['failed']}\n{found.get('traceback', '')}"
                )
            if "failed" in found:
                absent[side_name] = found["failed"]
                continue
            results[side_name] = found
            print(f"{label}, {side_name}: last loss {found['losses'][-1]:.4f}", file=sys.stderr)
        sets[label] = {name: result["losses"] for name, result in results.items()}
        gaps[label] = gaps_of(results)
    speeds = measure_speed(folder, next(iter(jobs.values())), arguments)
    served = serve_in_a_process(folder, adapter, jobs, arguments)
    return {
        "sets": sets,
        "bf16_gap": max(gap["bf16"] for gap in gaps.values()),
        "held_out_gap": max(abs(gap["bf16_held_out"]) for gap in gaps.values()),
        "gaps": gaps,
        **speeds,
        **served,
        "work": {
            "updates": arguments.updates,
            "update_tokens": arguments.update_tokens,
            "learning_rate": LEARNING_RATE,
        },
        "machine": machine(),
        "absent": absent | served.pop("absent", {}),
    }


def names(arguments: argparse.Namespace) -> list[str]:
    """Return the sets' names; of a file, its path. At the smallest size there is one set."""
    return [*list(SETS)[: 1 if arguments.small else None], *map(str, arguments.data)]


def gaps_of(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return each side's mean absolute difference to fp32 over the last updates, and of Sartor's the held-out
    difference.
    """
    right = results["fp32"]
    gaps = {}
    for name, result in results.items():
        if name == "fp32":
            continue
        pairs = list(zip(result["losses"], right["losses"], strict=True))[-LAST:]
        gaps[name] = statistics.mean(abs(loss - exact) for loss, exact in pairs)
        if "held_out" in result:
            gaps[f"{name}_held_out"] = result["held_out"] - right["held_out"]
    return gaps


def job_of(folder: Path, name: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return a job for `protocol.Job`: the base, rows of every update, held-out rows and the factors to begin with."""
    from peers import work
    from safetensors.torch import save_file

    from sartor.core import model_refs
    from sartor.models import adapters
    from sartor.models.base import convert, open_base

    ref = model_refs.locate_base(model_refs.STARTER)
    convert(ref)
    base = work.plain_base(ref.path, folder / "base", 0)
    rows = encoded(ref.path, name, seed)
    held_out, rows = rows[:HELD_OUT], rows[HELD_OUT:]
    step = max(1, round(arguments.update_tokens / statistics.mean(len(row["ids"]) for row in rows)))
    need = arguments.updates * step
    rows = (rows * -(-need // len(rows)))[:need]
    start = folder / f"start-{seed}.safetensors"
    if not start.is_file():
        from peers.protocol import TARGETS

        model = adapters.inject_lora(
            open_base(str(base), bits=32).model, rank=RANK, alpha=ALPHA, dropout=0.0, targets=list(TARGETS), seed=seed
        )
        factors = {
            part.partition(".lora_A.")[0].removeprefix("base_model.model."): parameter.detach().clone()
            for part, parameter in model.named_parameters()
            if ".lora_A." in part
        }
        save_file(factors, start)
    return {
        "base": str(base),
        "updates": [rows[index : index + step] for index in range(0, need, step)],
        "held_out": held_out,
        "start": str(start),
        "device": "cpu",
        "compile": False,
        "limit_s": LIMIT_S,
        "rank": RANK,
        "alpha": ALPHA,
        "learning_rate": LEARNING_RATE,
        "clip_norm": CLIP_NORM,
    }


def encoded(base: Path, name: str, seed: int) -> list[dict[str, Any]]:
    """Return a set's rows as tokens, {ids, learnt} each, in the order of `seed`."""
    from sartor.core.records import Example, Message
    from sartor.models.base import open_chat

    chat, rows = open_chat(base), read_rows(name)
    random.Random(seed).shuffle(rows)
    examples = (Example((Message.of("user", prompt), Message.of("assistant", reply)), ()) for prompt, reply in rows)
    return [{"ids": row.ids, "learnt": row.learnt} for row in map(chat.encode, examples) if len(row.ids) <= LONGEST]


def read_rows(name: str) -> list[tuple[str, str]]:
    """Return (prompt, reply) of every row of a set."""
    from sartor.core import assets
    from sartor.demo.home_intents import rows as intents

    if name == "home-intents":
        turns = [row["messages"] for row in intents(assets.install(name))]
        return [(row[1]["content"], row[2]["content"]) for row in turns]
    if name == "construction-faq":
        file = next(Path(assets.install(name)).rglob("faq-en.jsonl"))
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return [(line["q"], line["a"]) for line in lines]
    with open(name, encoding="utf-8", newline="") as stream:
        return [(row["text"], row["category"]) for row in csv.DictReader(stream)]


def run_once(folder: Path, label: str, name: str, side: Side, job: dict[str, Any], is_small: bool) -> dict[str, Any]:
    """Return a side's result, of an earlier call if it is in `folder`."""
    stem = "".join(letter if letter.isalnum() else "-" for letter in f"{label}-{name}")
    result = folder / f"{stem}.json"
    if not result.is_file():
        found = run_side(folder, side, job | {"dtype": side.dtype, "rounds_first": name == "rounded_first"}, is_small)
        if "failed" in found:
            return found
        result.write_text(json.dumps(found))
    return dict(json.loads(result.read_text()))


def run_side(folder: Path, side: Side, job: dict[str, Any], is_small: bool) -> dict[str, Any]:
    """Train one side in a fresh process; `{"failed": reason}` if it gives no result."""
    job_path, result_path = folder / "job.json", folder / "result.json"
    job_path.write_text(json.dumps(job))
    result_path.unlink(missing_ok=True)
    try:
        python = smallest.python() if side.folder == "sartor" else str(venvs.interpreter(side.folder))
    except venvs.NotInstalled as error:
        return {"failed": f"does not install: {error}"}
    # `environment` keeps Sartor's sources from its peers
    variables = environment(OURS if side.folder == "sartor" else side, "cpu", is_small) | {"TMPDIR": str(folder)}
    command = [python, str(HERE / "peers" / side.folder / "run.py"), str(job_path), str(result_path)]
    try:
        done = subprocess.run(
            command,
            env=variables,
            cwd=folder,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=LIMIT_S + START_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"was not done in {LIMIT_S + START_S:.0f} s"}
    if result_path.is_file():
        return dict(json.loads(result_path.read_text()))
    return {"failed": f"exit code {done.returncode}: {' '.join(done.stderr.split())[-400:]}"}


def measure_speed(folder: Path, job: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the median ratio of tokens per second over alternating pairs, and each pair's."""
    few = job | {"updates": job["updates"][:LAST], "adapter": "", "dtype": "bfloat16"}
    ratios, rates = [], []
    for number in range(arguments.pairs):
        pair = {}
        order = ("bf16", "rounded_first") if number % 2 == 0 else ("rounded_first", "bf16")
        for name in order:
            found = run_side(folder, SARTOR[name], few | {"rounds_first": name == "rounded_first"}, arguments.small)
            if "failed" in found:
                sys.exit(f"Sartor's side {name} failed: {found['failed']}\n{found.get('traceback', '')}")
            pair[name] = rate(found)
        ratios.append(pair["bf16"] / pair["rounded_first"])
        rates.append(pair["bf16"])
        print(f"pair {number + 1}: {ratios[-1]:.3f} times the speed of numerics 1", file=sys.stderr)
    return {
        "speed_ratio": round(statistics.median(ratios), 3),
        "speed_of_each_pair": [round(ratio, 3) for ratio in ratios],
        "tokens_per_s": round(statistics.median(rates), 1),
    }


def serve_in_a_process(
    folder: Path, adapter: Path, jobs: dict[str, Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Return `serve` of the first job's adapter, from a process of its own."""
    job = next(iter(jobs.values()))
    rows = [row["ids"] for row in job["held_out"]][: 4 if arguments.small else 20]
    work = folder / "served.json"
    work.write_text(json.dumps({"base": job["base"], "adapter": str(adapter), "rows": rows}))
    command = [smallest.python(), str(Path(__file__).resolve()), "--serve", str(work)]
    return last_line(command, env=environment(OURS, "cpu", arguments.small))


def serve(work: Path) -> dict[str, Any]:
    """Return the KL divergence of each way of serving in bf16 from fp32, of every next token of some rows."""
    import torch

    from sartor.inference.local.cpu_decoder import CpuDecoder
    from sartor.models.kernels import cpu

    said = json.loads(work.read_text())
    blocks = {"torch": torch_blocks(), "torch_rounded_first": rounded_first_blocks()}
    absent = {}
    try:
        cpu.load()
        blocks = {"native": CpuDecoder, **blocks}
    except cpu.NoKernels as why:
        absent["served_kl.native"] = str(why)
    right = [next_logits(engine(said, torch_blocks(), 32), ids) for ids in said["rows"]]
    kl = {}
    for name, kind in blocks.items():
        opened = engine(said, kind, 16)
        divergences = []
        for ids, exact in zip(said["rows"], right, strict=True):
            p, q = exact.log_softmax(-1), next_logits(opened, ids).log_softmax(-1)
            divergences.append((p.exp() * (p - q)).sum(-1))
        kl[name] = float(torch.cat(divergences).mean())
    return {"served_kl": kl, "absent": absent}


def engine(said: dict[str, Any], kind: type, bits: int) -> Any:
    """Return the base with the adapter as the serving engine holds them."""
    import torch

    from sartor.inference.local.torch_decoder import Angles
    from sartor.models import kernels
    from sartor.models.base import open_base
    from sartor.models.losses.fused_decoder import FusedDecoder

    base = open_base(said["base"], bits=bits, device=torch.device("cpu"))
    fast = FusedDecoder(base.model, kernels.choose_kernels(base.device)[0])
    module_names = {id(module): name for name, module in base.model.named_modules()}
    opened = kind(fast, 16, Angles(fast, base.model.config, 1024), module_names)
    opened.factors.put("tuned", Path(said["adapter"]))
    return opened


def next_logits(opened: Any, ids: list[int]) -> Any:
    """Return (T - T / 2 - 1, V) logits: the first half of a row is a prompt, each further token is given one by
    one.
    """
    import torch

    from sartor.inference.local.torch_decoder import TokenRun

    slot, half, chunk = opened.factors.slot("tuned"), len(ids) // 2, opened.chunk_tokens
    pages = tuple(range(16))
    for start in range(0, half, chunk):
        opened.advance([TokenRun(ids[start : min(start + chunk, half)], start, pages, slot)], [])
    steps = (TokenRun([ids[place]], place, pages, slot, newest=True) for place in range(half, len(ids) - 1))
    return torch.cat([opened.advance([step], [0]).logits.float() for step in steps])


def torch_blocks() -> type:
    """Return the serving engine's blocks in torch's operations."""
    from sartor.inference.local.torch_decoder import TorchDecoder

    return TorchDecoder


def rounded_first_blocks() -> type:
    """Return those blocks with the arithmetic of numerics 1: products, residual stream and logits are rounded to
    bf16.
    """
    import torch

    from sartor.inference.local.torch_decoder import TorchDecoder

    class RoundedFirst(TorchDecoder):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            self._residual_dtype = self.dtype

        def _product(self, site: int, x: torch.Tensor, adapt: Any) -> torch.Tensor:
            y = self._linears[site](x, None)
            adapt(site, y, x)
            return y

        def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
            return self._head(hidden, None)

    return RoundedFirst


def table(result: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    here, kl = result["machine"], result["served_kl"]
    flags = ", ".join(name for name, has in here["flags"].items() if has)
    sides = [name for name in (*SARTOR, *PEERS) if any(name in losses for losses in result["sets"].values())]
    lines = [
        f"`python benchmarks/fidelity.py --json --write FILE`: {here['cpu']}, {here['threads']} threads, {flags}; "
        f"{result['work']['updates']} updates of about {result['work']['update_tokens']} tokens. Last loss, and in "
        "brackets "
        f"the mean absolute difference to Sartor's fp32 over the last {LAST} updates.",
        "",
        f"| set | {' | '.join(sides)} | held out, bf16 less fp32 |",
        f"|---|{'---|' * len(sides)}---|",
    ]
    for name, losses in result["sets"].items():
        gap = result["gaps"][name]
        cells = [
            f"{losses[side][-1]:.4f}" + (f" ({gap[side]:.4f})" if side in gap else "")
            for side in sides
            if side in losses
        ]
        lines.append(f"| {Path(name).name} | {' | '.join(cells)} | {gap['bf16_held_out']:+.4f} |")
    served = ", ".join(f"{name} {value:.1e}" for name, value in kl.items())
    lines += [
        "",
        f"Speed in bf16 over numerics 1: {result['speed_ratio']:.2f} (pairs: {result['speed_of_each_pair']}). "
        f"KL from fp32 of a trained adapter's next tokens when served: {served}.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
