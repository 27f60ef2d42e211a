"""Largest tuning setting that fits the memory limit.

    lora        factors of every layer, activations kept
    recompute   the same up to rounding: one tensor a layer is kept, the rest is recomputed from weights that are
                widened again
    layers      the same, but only the layers next to the head go on learning; the others' factors are frozen
    zeroth      no gradients: two losses an update

docs/decisions/014-rungs.md explains the order, and the place of 4 bits in it.

`baseline_measurement.py` tunes a tiny base and measures the memory that it then holds. No torch here.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import shlex
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open

from sartor.core import config
from sartor.core.errors import ArtifactError, BudgetError, MissingError
from sartor.core.filesystem import write_file_atomic
from sartor.core.home import folder
from sartor.core.installation import install_command
from sartor.core.resource_limits import ResourceLimits, run_job
from sartor.edge.tuning.peak_memory import DeviceLoad, DeviceModelShape, MemoryMode, peak, shape_of, state_bytes, total
from sartor.edge.tuning.tuning_job import TuningJob
from sartor.tune.recipe import ResolvedRecipe

SCHEMA = 1
# in the order of `models/kernels/cpu.py`
COMPILERS = (os.environ.get("CXX") or "g++", "g++", "c++", "clang++")


@dataclass(frozen=True)
class MemoryBaseline:
    """Memory that the tuner always holds.

    held_bytes: anonymous and shared memory.
    is_native: whether there are C++ kernels, which hold less than torch's own operations.
    """

    held_bytes: int
    is_native: bool


def floor() -> MemoryBaseline:
    """Return the baseline from the file below SARTOR_HOME, or measure it now.

    Raises MissingError if the tuner does not run here.
    """
    return _floor(str(folder("edge")))


@functools.cache
def _floor(cache_folder: str) -> MemoryBaseline:
    """Return the baseline from `cache_folder`, measured again if versions, sources or the machine changed.

    A child process measures it. Raises MissingError if the tuner does not run here.
    """
    versions = [importlib.metadata.version(name) for name in ("torch", "sartor")]
    threads = os.environ.get("OMP_NUM_THREADS", "")
    pip_compiler = "ziglang" if importlib.util.find_spec("ziglang") else "no compiler"
    compiler = next(filter(None, map(shutil.which, COMPILERS)), pip_compiler)
    # sizes of Sartor's own modules: a checkout changes without its version
    root = Path(__file__).parents[2]
    sizes = [f"{file.relative_to(root)} {file.stat().st_size}" for file in sorted(root.rglob("*.py"))]
    sources = hashlib.sha256("\n".join(sizes).encode()).hexdigest()[:12]
    key = " ".join([str(SCHEMA), *versions, sources, platform.python_version(), platform.machine(), threads, compiler])
    file = Path(cache_folder) / "floor.json"
    try:
        cache: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        cache = {}
    if key not in cache:
        finished = run_job("sartor.edge.tuning.baseline_measurement", {}, ResourceLimits())
        if finished.payload is None:
            problem = f"the tuner does not run on this machine: {finished.log_tail[-1:]}"
            raise MissingError(problem, install_command("edge"))
        cache[key] = finished.payload
        write_file_atomic(file, json.dumps(cache).encode())
    return MemoryBaseline(**cache[key])


Name = Literal["lora", "recompute", "layers", "zeroth"]
NAMES: tuple[Name, ...] = ("lora", "recompute", "layers", "zeroth")
# Fraction of a limit that is left free. Predictions were off by 2.8 % over 12 configurations and by 4.3 % once
# (docs/edge.md)
SPARE = 0.04
MICRO_BATCH_TOKENS = 512


@dataclass(frozen=True)
class MemorySetting:
    """One rung: a way to tune with its micro-batch.

    learning: layers that go on learning, next to the head.
    """

    name: Name
    learning: int
    micro_batch_tokens: int

    @property
    def id(self) -> str:
        """Name of the setting; for fewer layers with their number."""
        return f"layers-{self.learning}" if self.name == "layers" else self.name

    @property
    def mode(self) -> MemoryMode:
        """Mode for `peak_memory.py`."""
        return MemoryMode(self.learning, self.name != "lora", self.name == "zeroth")


@dataclass(frozen=True)
class MemoryPlan:
    """Chosen rung with its predicted memory.

    breakdown: predicted bytes at the peak, by category.
    is_narrow: whether the base is read in 4 bits.
    reason: why this rung.
    """

    rung: MemorySetting
    breakdown: dict[str, int]
    limit_bytes: int
    checkpoint_bytes: int
    is_narrow: bool
    reason: str

    @property
    def peak_bytes(self) -> int:
        """Anonymous and shared memory at the peak."""
        return total(self.breakdown)


@dataclass(frozen=True)
class TokenFileStats:
    """Facts of a token file that a plan needs.

    longest: tokens of the longest row.
    tokens: of all rows.
    densest: largest fraction of supervised tokens in a training row.
    """

    longest: int
    tokens: int
    densest: float


def rows_of(file: Path) -> TokenFileStats:
    """Read the facts of a token file without torch.

    Raises ArtifactError if the file is not whole, or no training row has a supervised token.
    """
    try:
        with safe_open(str(file), framework="np") as tokens_file:
            lengths, learnt = tokens_file.get_tensor("lengths").tolist(), tokens_file.get_tensor("learnt")
            count = int(tokens_file.get_tensor("train")[0])
    except Exception as error:  # safetensors' own errors have no common base but Exception
        raise ArtifactError(
            f"{file} is not whole: {error}",
            f"rm {shlex.quote(str(file))}, then sartor edge tune NAME: it writes it anew from the rows",
        ) from None
    densest, low = 0.0, 0
    for length in lengths[:count]:
        densest, low = max(densest, float(learnt[low : low + length].sum()) / length), low + length
    if not densest:
        raise ArtifactError(f"{file} holds no row to learn from", "make it again from other rows")
    return TokenFileStats(max(lengths), sum(lengths), densest)


class Planner:
    """Predicted memory of a job on every rung.

    baseline: the floor, if not that of this machine.
    """

    def __init__(self, job: TuningJob, baseline: MemoryBaseline | None = None) -> None:
        self.job = job
        self.recipe = config.load(ResolvedRecipe, job.recipe)
        self.shape: DeviceModelShape = shape_of(Path(job.base), self.recipe)
        self.rows = rows_of(Path(job.tokens))
        self.floor = baseline or floor()

    def rungs(self, barred: Collection[str] = ()) -> Iterator[MemorySetting]:
        """Yield every rung whose id is not barred, in order; within one, the largest micro-batch first."""
        all_layers = self.shape.adapted
        fewer = sorted(
            {count for count in (all_layers * 2 // 3, all_layers // 3, all_layers // 6, 1) if 0 < count < all_layers},
            reverse=True,
        )
        for name in NAMES:
            if name == "lora" and self.recipe.compute.recompute:
                continue
            for learning in fewer if name == "layers" else [all_layers]:
                sizes = (MemorySetting(name, learning, size) for size in self._sizes())
                yield from (rung for rung in sizes if rung.id not in barred)

    def predict_peak(self, rung: MemorySetting) -> dict[str, int]:
        """Return the predicted bytes at the peak, by category."""
        tokens = max(self.rows.longest, rung.micro_batch_tokens)
        supervised = min(tokens, round(tokens * self.rows.densest))
        is_part = tokens < max(self.recipe.optimizer.batch_tokens, self.rows.longest)
        load = DeviceLoad(tokens, supervised, longest=self.rows.longest, is_part=is_part, rows_tokens=self.rows.tokens)
        mode = replace(rung.mode, native=self.floor.is_native)
        return peak(self.shape, load, mode, self.floor.held_bytes)

    def choose(
        self, limit_bytes: int, barred: Collection[str] = (), *, max_tokens: int = 0, narrow_bytes: int = 0
    ) -> MemoryPlan:
        """Return the plan of the first rung that fits.

        limit_bytes: 0 for no limit.
        max_tokens: only micro-batches smaller than or equal to this; 0 for any.
        narrow_bytes: size of the same base in 4 bits; 0 if there is none.

        Raises BudgetError if none fits, naming the smallest limit that would.
        """
        smallest: tuple[int, MemorySetting] | None = None
        for rung in self.rungs(barred):
            if 0 < max_tokens < rung.micro_batch_tokens:
                continue
            breakdown = self.predict_peak(rung)
            needed_bytes = round(total(breakdown) / (1 - SPARE))
            if not limit_bytes or needed_bytes <= limit_bytes:
                return self._plan(rung, breakdown, limit_bytes, narrow_bytes)
            if smallest is None or needed_bytes < smallest[0]:
                smallest = needed_bytes, rung
        if smallest is None:
            raise BudgetError(
                f"every rung is used up: {', '.join(sorted(barred))}", "a larger limit, or a smaller base"
            )
        needed_bytes, rung = smallest
        least_bytes = math.ceil(needed_bytes / 1_000_000) * 1_000_000
        raise BudgetError(
            f"no way to tune {self.job.name} fits in {limit_bytes / 1e6:,.0f} MB of memory",
            f"at least {least_bytes:,} bytes ({rung.id}); shorter rows or a lower rank need less",
        )

    def _sizes(self) -> list[int]:
        """Return the micro-batches, the largest first: whole multiples of the longest row."""
        longest, micro_batch_tokens = self.rows.longest, self.recipe.compute.micro_batch_tokens
        if micro_batch_tokens == "auto":
            micro_batch_tokens = MICRO_BATCH_TOKENS
        max_tokens = min(micro_batch_tokens, self.recipe.optimizer.batch_tokens)
        sizes, count = [], max(1, max_tokens // longest)
        while count:
            sizes.append(count * longest)
            count //= 2
        return sizes

    def _plan(self, rung: MemorySetting, breakdown: dict[str, int], limit_bytes: int, narrow_bytes: int) -> MemoryPlan:
        """Return the plan of a rung, and decide whether the base is read in 4 bits."""
        # mapped pages are not counted as held, but without room for them they are read again in each pass
        free_bytes = limit_bytes - total(breakdown) if limit_bytes else self.shape.base_bytes
        is_narrow = 0 < narrow_bytes < self.shape.base_bytes and free_bytes < self.shape.base_bytes
        reason = f"the first that fits in {limit_bytes / 1e6:,.0f} MB" if limit_bytes else "no limit"
        if is_narrow:
            reason += f"; {free_bytes / 1e6:,.0f} MB are left for pages of the base, so it is read in 4 bits"
        return MemoryPlan(
            rung,
            breakdown,
            limit_bytes=limit_bytes,
            checkpoint_bytes=state_bytes(self.shape, rung.mode),
            is_narrow=is_narrow,
            reason=reason,
        )
