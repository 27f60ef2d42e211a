"""A device: how little memory a tuning needs, how near it is predicted, and what updates and attacks cannot break.

    python benchmarks/edge.py --json
    python benchmarks/edge.py --json --quick            # a small base made here, no bisection on the starter
    python benchmarks/edge.py --json --small            # the same with fewer runs and points: shows that it runs
    python benchmarks/edge.py --json --peers trl,unsloth

`cap_bytes` is the least limit, found by bisection, at which a tuning of the base (rank 8, every linear module, rows of
256 tokens) ends; the system holds it (`core/resource_limits.py`), and the losses are compared with those of a run
without a limit.
`peak_bytes` is what that run then held. `predicted_error` is the largest of 12 relative errors of the planner. A peer
is given the same rows under no limit, and then at our cap. A peer that was not asked for is named under `absent`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import parts
import smallest
import torch
import train as peers_side
from peers import venvs
from peers.work import plain_base
from results import print_result, run_tests

from sartor.core import model_refs, resource_limits
from sartor.core.resource_limits import ResourceLimits, ResourceUsage
from sartor.edge.tuning.budgeted_tuning import planned_job
from sartor.edge.tuning.memory_plan import MemorySetting, Name, Planner
from sartor.edge.tuning.tuner_process import write_tokens
from sartor.edge.tuning.tuning_job import TuningJob, tuner_command
from sartor.edge.update import tensor_delta
from sartor.models.base import convert
from sartor.models.packing import TokenizedExample
from sartor.models.tensor_files import write_tensors
from sartor.tune.tokenized_dataset import TokenizedDataset

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent / "tests"
MUCH = 8 << 30
RANK, ROW_TOKENS, ALPHA = 8, 256, 16


@dataclass(frozen=True)
class Config:
    """One of the 12: what is tuned, and how."""

    base: str
    rung: Name
    rank: int = RANK
    row_tokens: int = ROW_TOKENS
    rows_at_once: int = 1
    learning: int = 0


# ranks, layers, lengths, rungs, micro-batches: each is varied
CONFIGS = (
    Config("small", "lora", row_tokens=64),
    Config("small", "lora", rank=64, rows_at_once=2),
    Config("small", "lora", row_tokens=512, rows_at_once=2),
    Config("small", "recompute", row_tokens=512, rows_at_once=4),
    Config("small", "recompute", rank=128),
    Config("small", "layers", rank=64, learning=4, row_tokens=512),
    Config("small", "layers", learning=2, row_tokens=1024, rows_at_once=2),
    Config("small", "zeroth", row_tokens=1024),
    Config("small", "zeroth", rank=64, rows_at_once=2),
    Config("starter", "lora"),
    Config("starter", "recompute"),
    Config("starter", "layers", learning=10, row_tokens=512),
)


@dataclass(frozen=True)
class Plan:
    """How much is measured: configs of predictions, the base of cap and delta, and every `each`-th point of an update.

    updates, bisections: in place of those that were asked for. attacks: some of their tests, by pytest's -k.
    store: the dtype of adapters; those of predictions that are in bf16 are what the delta begins with.
    """

    configs: tuple[Config, ...]
    base: str
    each: int
    updates: int = 0
    bisections: int | None = None
    attacks: str = ""
    store: str = "fp32"


FULL, QUICK = Plan(CONFIGS, "starter", 1), Plan(CONFIGS[:9], "small", 16)
# what is predicted is what runs without a limit beside the capped one
SMALL = Plan(
    (Config("small", "recompute"),), "small", 48, updates=1, bisections=0, attacks="rollback_is_refused", store="bf16"
)
PEERS = ("trl", "trl_bf16", "unsloth")


def main() -> None:
    """Print one JSON line."""
    arguments = _arguments()
    plan = SMALL if arguments.small else QUICK if arguments.quick else FULL
    asked = [name for name in arguments.peers.split(",") if name]
    with tempfile.TemporaryDirectory(prefix="sartor-edge-") as folder:
        work = Work(Path(folder), plan.updates or arguments.updates, plan.store)
        said: dict[str, Any] = {"predictions": predictions(work, plan.configs)}
        said["predicted_error"] = max(one["error"] for one in said["predictions"])
        bisections = arguments.bisections if plan.bisections is None else plan.bisections
        said |= parts.run("cap", lambda: cap(work, plan.base, bisections))
        said["delta_fraction"] = parts.run("delta", lambda: delta_fraction(work, plan.base))
        said["peers"] = {
            name: parts.run(
                f"peer {name}", lambda name=name: peer(work, name, said["cap_bytes"]), is_final=is_measured
            )
            for name in asked
        }
        if not arguments.tuning_only:
            said |= parts.run("updates and attacks", lambda: updates_and_attacks(Path(folder), plan))
    said["absent"] = {name: f"not asked for: --peers {name}" for name in PEERS if name not in asked}
    if arguments.tuning_only:
        said["absent"] |= dict.fromkeys(("updates", "attacks"), "not asked for: --tuning-only")
    print_result({**said, "machine": peers_side.machine()})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line (always so)")
    smallest.add_argument(parser)
    parser.add_argument(
        "--quick", action="store_true", help="the small base alone, every sixteenth point of an update"
    )
    parser.add_argument("--tuning-only", action="store_true", help="leave updates and attacks out")
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--bisections", type=int, default=5)
    parser.add_argument("--peers", default="", help="of trl,trl_bf16,unsloth")
    return parser.parse_args()


class Work:
    """Bases, rows and jobs in a folder."""

    def __init__(self, folder: Path, updates: int, store: str = "fp32") -> None:
        self.folder, self.updates, self.store, self._count = folder, updates, store, 0
        self.unlimited: dict[Config, TuningJob] = {}  # jobs that have run under a limit which they came nowhere near

    def base(self, name: str) -> Path:
        """The starter in bf16, or a small Llama of random weights."""
        if name == "starter":
            ref = model_refs.locate_base(model_refs.STARTER)
            convert(ref)
            return Path(ref.path)
        return small_base(self.folder / "small")

    def job(self, config: Config, updates: int = 0, **changes: Any) -> TuningJob:
        """Tokens and a job in a folder of its own."""
        self._count += 1
        out = self.folder / f"run-{self._count}"
        out.mkdir()
        base = self.base(config.base)
        vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]
        write_tokens(
            TokenizedDataset(rows_of(config.row_tokens, 2 * config.rows_at_once + 2, vocabulary), []), out / "tokens"
        )
        tokens = config.row_tokens * config.rows_at_once
        recipe = {
            "base": config.base,
            "data": {"path": "rows"},
            "method": {"kind": "lora", "rank": config.rank, "alpha": ALPHA},
            "budget": {"updates": updates or self.updates},
            "optimizer": {"batch_tokens": 2 * tokens, "learning_rate": 1e-3},
            "compute": {"micro_batch_tokens": tokens, "share_prefixes": False},
            "checkpoints": {"every_minutes": 0},
            "evaluations": 0,
        }
        changes = {"store": self.store, **changes}
        return TuningJob(
            str(base), config.base, "-", "Apache-2.0", str(out / "tokens"), str(out / "out"), recipe, **changes
        )


def small_base(folder: Path) -> Path:
    """8 layers of width 256 over 8,192 tokens, in bf16."""
    if folder.exists():
        return folder
    folder.mkdir()
    width, inner, layers, heads, groups, vocabulary = 256, 704, 8, 8, 4, 8192
    config = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    key = width // heads * groups
    shapes = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (key, width),
        "self_attn.v_proj": (key, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    tensors = {"model.embed_tokens.weight": torch.randn(vocabulary, width, generator=generator) / 16}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        tensors |= {
            f"{at}.{name}.weight": torch.randn(shape, generator=generator) / 16 for name, shape in shapes.items()
        }
        tensors |= {
            f"{at}.{name}.weight": torch.ones(width) for name in ("input_layernorm", "post_attention_layernorm")
        }
    tensors["model.norm.weight"] = torch.ones(width)
    write_tensors({name: part.bfloat16() for name, part in tensors.items()}, folder / "model.safetensors")
    return folder


def rows_of(length: int, count: int, vocabulary: int) -> list[TokenizedExample]:
    """Random tokens, of which the last three quarters are learnt."""
    rng = random.Random(0)
    made = []
    for number in range(count):
        ids = [rng.randrange(vocabulary) for _ in range(length)]
        made.append(TokenizedExample(ids, [place >= length // 4 for place in range(length)], str(number)))
    return made


def ran(job: TuningJob, rung: MemorySetting, memory_bytes: int) -> ResourceUsage:
    """One run of the tuner under a limit."""
    file = Path(job.out).with_name("job.json")
    planned_job(job, rung).write(file)
    return resource_limits.run(
        tuner_command(file), ResourceLimits(memory_bytes), log=Path(job.out).with_name("stderr.txt")
    )


def losses_of(job: TuningJob) -> list[float]:
    """The loss of each update."""
    lines = (Path(job.out) / "log.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def predictions(work: Work, configs: tuple[Config, ...]) -> list[dict[str, Any]]:
    """Predicted and measured peaks."""
    found = []
    for config in configs:
        found.append(parts.run(f"prediction of {config}", lambda config=config: prediction(work, config)))
        print(found[-1], file=sys.stderr)
    return found


def prediction(work: Work, config: Config) -> dict[str, Any]:
    """Predicted and measured peak of one config."""
    job = work.job(config)
    planner = Planner(job)
    rung = MemorySetting(config.rung, config.learning or planner.shape.layers, config.row_tokens * config.rows_at_once)
    predicted, used = sum(planner.predict_peak(rung).values()), ran(job, rung, MUCH)
    if used.exit_code:
        sys.exit(f"{config} ended with {used}: {Path(job.out).with_name('stderr.txt').read_text()[-400:]}")
    work.unlimited[config] = job
    error = round(abs(predicted - used.peak_bytes) / used.peak_bytes, 4)
    return {**vars(config), "predicted_bytes": predicted, "peak_bytes": used.peak_bytes, "error": error}


def cap(work: Work, base: str, bisections: int) -> dict[str, Any]:
    """The least limit at which a tuning ends, on the rung that changes no result."""
    config = Config(base, "recompute")
    has_run = config in work.unlimited
    free = work.unlimited[config] if has_run else work.job(config)
    planner = Planner(free)
    rung = MemorySetting("recompute", planner.shape.layers, ROW_TOKENS)
    if not has_run:
        ran(free, rung, 0)
    predicted = sum(planner.predict_peak(rung).values())
    low, high, best = int(0.85 * predicted), int(1.08 * predicted), (0, 0)
    curve: list[float] = []
    for step in range(bisections + 1):
        limit = high if not step else (low + high) // 2
        job = work.job(config)
        used = ran(job, rung, limit)
        print({"limit": limit, "killed": used.killed, "peak": used.peak_bytes}, file=sys.stderr)
        if used.exit_code == 0:
            high, best, curve = limit, (limit, used.peak_bytes), losses_of(job)
        else:
            low = limit
    return {
        "cap_bytes": best[0],
        "peak_bytes": best[1],
        "cap_predicted_bytes": predicted,
        "same_losses_under_the_cap": curve == losses_of(free),
        "cap_base": base,
    }


def delta_fraction(work: Work, base: str) -> float | None:
    """Bytes of the delta from an adapter to that of one more epoch, both in bf16, over the bytes of the adapter."""
    config = Config(base, "recompute")
    has_run = config in work.unlimited and work.store == "bf16"
    first = work.unlimited[config] if has_run else work.job(config, store="bf16")
    rung = MemorySetting("recompute", Planner(first).shape.layers, ROW_TOKENS)
    if not has_run:
        ran(first, rung, 0)
    more = work.job(config, updates=2, store="bf16", start=first.out)
    more = replace(more, recipe={**more.recipe, "optimizer": {**more.recipe["optimizer"], "learning_rate": 1e-4}})
    ran(more, rung, 0)
    files = [Path(one.out) / "adapter_model.safetensors" for one in (first, more)]
    made = tensor_delta.make(files[0], files[1], work.folder / "delta")
    return round((work.folder / "delta").stat().st_size / files[1].stat().st_size, 4) if made else 1.0


def peer(work: Work, name: str, cap_bytes: int) -> dict[str, Any]:
    """What another trainer holds on the same rows, and whether it runs at our cap."""
    side, folder = peers_side.PEERS[name], work.folder
    try:
        python = str(venvs.interpreter(side.folder))
    except venvs.NotInstalled as error:
        return {"failed": str(error)}
    base = plain_base(work.base("starter"), folder / "plain", 0)
    vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]
    rows = [{"ids": row.ids, "learnt": row.learnt} for row in rows_of(ROW_TOKENS, 3, vocabulary)]
    job = {
        "base": str(base),
        "updates": [[row] for row in rows],
        "dtype": side.dtype,
        "compile": side.compile,
        "device": "cpu",
    }
    job |= {"rank": RANK, "alpha": ALPHA, "learning_rate": 1e-3, "clip_norm": 1.0, "limit_s": 600.0}
    (folder / "peer.json").write_text(json.dumps(job))
    command = [
        python,
        str(HERE / "peers" / side.folder / "run.py"),
        str(folder / "peer.json"),
        str(folder / "result.json"),
    ]
    environment = peers_side.environment(side, "cpu")
    found = {}
    for what, limit in (("free", MUCH), ("at_cap", cap_bytes)):
        (folder / "result.json").unlink(missing_ok=True)
        used = resource_limits.run(command, ResourceLimits(limit, wall_s=1800), environment=environment)
        said = (
            json.loads((folder / "result.json").read_text())
            if (folder / "result.json").exists()
            else {"failed": used.killed}
        )
        found[what] = {"peak_bytes": used.peak_bytes, "ended": "failed" not in said, "why": said.get("failed", "")}
    return found


def is_measured(result: dict[str, Any]) -> bool:
    """Whether a peer is installed."""
    return "failed" not in result


def updates_and_attacks(folder: Path, plan: Plan) -> dict[str, int]:
    """Kills of a real process at each operation of an update, and the tests of attacks on the update's metadata."""
    sys.path.insert(0, str(TESTS / "helpers"))
    from update_kills import check_each, kill_each

    kills, survived = kill_each(folder / "kills", plan.each), 0
    for kill in kills:
        with contextlib.suppress(AssertionError):
            check_each(folder / "kills", [kill])
            survived += 1
    tests = run_tests(smallest.python(), TESTS / "edge" / "test_tuf_attacks.py", plan.attacks)
    attacks = [is_passed for name, is_passed in tests.items() if "refuse" in name]
    return {
        "update_points": len(kills),
        "update_points_survived": survived,
        "attacks": len(attacks),
        "attacks_refused": sum(attacks),
    }


if __name__ == "__main__":
    main()
