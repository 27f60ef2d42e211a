"""What each trick of the fast path brings: a table, made by leaving one out at a time.

    python benchmarks/ablation.py --json
    python benchmarks/ablation.py --json --write docs/development/tuning-speed.md

One process, the starter base, rank 16 on all linear layers, 14 rows (about 1,024 tokens, 43 % supervised) an update;
each way alternates with the whole path, and its ratio is the median of pairs: tokens per second, the whole path over
the way without. With the package ziglang (`sartor[compiler]`) there is a line for kernels that its compiler made.
`profile` says where the
time of a whole update goes: fractions, by torch.profiler. `--write` puts the table between the markers `<!-- ablation
-->` and `<!-- /ablation -->` of a file.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import parts
import savings
import smallest
import tables
import torch
from results import print_result

from sartor.models import packing as batches
from sartor.models.kernels import cpu
from sartor.models.kernels.cpu import CpuKernels
from sartor.models.kernels.reference import ReferenceKernels
from sartor.models.losses import loss_backend, transformers_backend
from sartor.models.losses.fused_decoder import FusedDecoder
from sartor.models.losses.transformers_backend import packing, without_peft

Way = Callable[[], torch.Tensor]
KERNEL, PRODUCTS, OTHERS = "kernel: ", "matrix products", "torch's operations that are each below 1 %"
MATRIX_PRODUCTS = {f"aten::{name}" for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "addbmm")} | {
    "mkldnn::_linear_pointwise"
}


class Ways:
    """The whole path, and ways that leave something out; each gives the loss of one update."""

    def __init__(self, layers: int) -> None:
        self.base, self.model = savings.tuned(layers, None)
        self.device = self.base.device
        vocabulary = len(self.base.chat.tokenizer)
        self.rows = savings.rows(savings.ROWS, 0.0, vocabulary)
        self.common = savings.rows(savings.ROWS, savings.COMMON_FRACTION, vocabulary)
        path = transformers_backend.choose_loss_backend(self.model, self.rows, self.device)
        assert isinstance(path, loss_backend.FusedBackend), path.reason
        self.fast = path.fast
        self.eager = FusedDecoder(without_peft(self.model), ReferenceKernels())
        self.recompute = FusedDecoder(without_peft(self.model), self.fast.kernels, recompute=True)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def of(self, fast: FusedDecoder, examples: list[batches.TokenizedExample], share: bool = False) -> Way:
        return lambda: fast.losses(batches.pack(examples, self.device, share=share)).mean()

    def mixed(self, operations: tuple[str, ...]) -> ReferenceKernels:
        """The path's kernels, with torch's for these operations, forward and backward."""
        torchs = {
            name: getattr(ReferenceKernels, name)
            for operation in operations
            for name in (operation, f"{operation}_backward")
            if hasattr(ReferenceKernels, name)
        }
        made: ReferenceKernels = copy.copy(self.fast.kernels)
        made.__class__ = type("Mixed", (type(self.fast.kernels),), torchs)
        return made

    def module(self) -> torch.Tensor:
        with packing(self.model):
            return transformers_backend.pack_losses(self.model, batches.pack(self.rows, self.device)).mean()

    def all_rows_to_the_head(self) -> torch.Tensor:
        """Every row's logits are made and masked afterwards, as most trainers do it."""
        examples = [replace(row, learnt=[True] * len(row.ids)) for row in self.rows]
        losses = self.fast.losses(batches.pack(examples, self.device))
        keep = torch.tensor([on for row in self.rows for on in row.learnt[1:]])
        return losses[keep].mean()

    def apart(self) -> Iterator[tuple[str, Way, Way]]:
        """(what is left out, the whole path, the way without it)."""
        whole = self.of(self.fast, self.rows)
        yield "C++ kernels (torch's own operations instead)", whole, self.of(self.eager, self.rows)
        if importlib.util.find_spec("ziglang"):
            zig = FusedDecoder(without_peft(self.model), kernels_by_zig())
            yield "the system's compiler (the package ziglang's instead)", whole, self.of(zig, self.rows)
        yield (
            "the C++ attention alone (torch's instead)",
            whole,
            self.of(FusedDecoder(without_peft(self.model), self.mixed(("attention",))), self.rows),
        )
        rest = ("rms_norm", "glu", "cross_entropy")
        yield (
            "the C++ elementwise parts alone (torch's instead)",
            whole,
            self.of(FusedDecoder(without_peft(self.model), self.mixed(rest)), self.rows),
        )
        yield "masked rows kept from the head and the last layer's tail", whole, self.all_rows_to_the_head
        yield "keeping activations (`compute.recompute`)", whole, self.of(self.recompute, self.rows)
        yield "the block by hand (transformers' module, packed, instead)", whole, self.module
        yield (
            "packing (transformers' module, a row at a time, instead)",
            whole,
            lambda: transformers_backend.row_losses(self.model, self.rows, self.device).mean(),
        )
        yield (
            "shared prefixes, on rows that have 40 % in common",
            self.of(self.fast, self.common, share=True),
            self.of(self.fast, self.common),
        )


def kernels_by_zig() -> CpuKernels:
    """The C++ kernels as a machine without a system's compiler gets them (`pip install 'sartor[compiler]'`)."""
    with mock.patch.object(cpu, "_compilers", lambda: ()):
        return cpu.load.__wrapped__()


def seconds(way: Way, trained: list[Any]) -> float:
    """One update's forward and backward."""
    began = time.perf_counter()
    way().backward()
    for parameter in trained:
        parameter.grad = None
    return time.perf_counter() - began


def measure(layers: int, pairs: int) -> list[dict[str, Any]]:
    """A line per trick."""
    ways = Ways(layers)
    lines = []
    for name, whole, without in ways.apart():
        found, each = parts.run(
            name,
            lambda a=whole, b=without: savings.ratio(
                lambda: seconds(a, ways.trained), lambda: seconds(b, ways.trained), pairs
            ),
        )
        lines.append({"without": name, "ratio": found, "of_each_pair": each})
    whole = ways.of(ways.fast, ways.rows)
    for top in savings.tops(layers):
        name = f"frozen activations from disk, later epochs, with the top {top} layers adapted"
        found = parts.run(name, lambda top=top: savings.frozen_prefix(top, layers, pairs, prove=False))
        lines.append({"without": name, "ratio": found["ratio"], "of_each_pair": found["of_each_pair"]})
    tokens = sum(len(row.ids) for row in ways.rows)
    took = parts.run("nothing", lambda: statistics.median(seconds(whole, ways.trained) for _ in range(pairs)))
    lines.insert(0, {"without": "nothing", "ratio": 1.0, "tokens_per_s": round(tokens / took, 1)})
    return lines


def profile(ways: Ways, updates: int) -> dict[str, float]:
    """Fractions of an update's wall time (forward and backward): matrix products, each C++ kernel, torch's other
    operations (each from 1 %), and what is between them (Python, autograd's bookkeeping).
    """
    whole = ways.of(ways.fast, ways.rows)
    seconds(whole, ways.trained)
    kernels, made = ways.fast.kernels, copy.copy(ways.fast.kernels)
    names = [name for name in dir(ReferenceKernels) if not name.startswith("_") and callable(getattr(kernels, name))]
    made.__class__ = type(
        "Named", (type(kernels),), {name: _named(getattr(type(kernels), name), name) for name in names}
    )
    way = ways.of(FusedDecoder(without_peft(ways.model), made), ways.rows)
    seconds(way, ways.trained)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        wall_s = sum(seconds(way, ways.trained) for _ in range(updates))
    fractions: dict[str, float] = {}
    for event in profiler.key_averages():
        fraction = event.self_cpu_time_total / 1e6 / wall_s
        is_named = event.key.startswith(KERNEL) or fraction >= 0.01
        group = PRODUCTS if event.key in MATRIX_PRODUCTS else event.key if is_named else OTHERS
        fractions[group] = fractions.get(group, 0.0) + fraction
    fractions["between them"] = 1.0 - sum(fractions.values())
    return {name: round(part, 4) for name, part in sorted(fractions.items(), key=lambda item: -item[1])}


def _named(method: Callable[..., Any], name: str) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        with torch.profiler.record_function(KERNEL + name):
            return method(*arguments, **options)

    return call


def table(lines: list[dict[str, Any]], said: dict[str, Any]) -> str:
    """Markdown."""
    rows = ["| left out | whole path over the way without it | pairs |", "|---|---|---|"]
    for line in lines:
        pairs = (
            ", ".join(f"{one:.2f}" for one in line.get("of_each_pair", [])) or f"{line['tokens_per_s']:.0f} tokens/s"
        )
        rows.append(f"| {line['without']} | {line['ratio']:.2f}x | {pairs} |")
    return "\n".join([f"`python benchmarks/ablation.py --json --write FILE`, {said['processor']}:", "", *rows])


def machine() -> dict[str, Any]:
    """What the numbers hold for."""
    name = platform.machine()
    with contextlib.suppress(OSError):
        found = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = found[0].partition(":")[2].strip() if found else name
    threads = torch.get_num_threads()
    return {
        "processor": f"{name}, {threads} threads, {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
    }


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line (always so)")
    smallest.add_argument(parser)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--layers", type=int, default=0, help="keep only that many layers: for a quick trial")
    parser.add_argument("--write", type=Path, help="put the table into this file")
    arguments = parser.parse_args()
    with smallest.home(arguments.small, layers=savings.SMALL_LAYERS):
        pairs = 1 if arguments.small else arguments.pairs
        lines, said = measure(arguments.layers, pairs), machine()
        fractions = parts.run("profile", lambda: profile(Ways(arguments.layers), pairs))
    if arguments.write:
        tables.write(arguments.write, "ablation", table(lines, said))
    print_result({"ablation": lines, "profile": fractions, "layers": arguments.layers or "all", "machine": said})


if __name__ == "__main__":
    main()
