"""Largest tuning setting that fits the memory limit.

    lora        factors of every layer, activations kept
    recompute   the same to rounding: a tensor a layer is kept, the rest computed again from weights that are widened again
    layers      as that, but only the layers next to the head go on learning; the others' factors are held still
    zeroth      no gradients: two losses an update

The order, and where 4 bits stand: docs/decisions/014-rungs.md.

`smallest.py` tunes a base of a few numbers and says what it then holds. No torch here.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open

from sartor.core import config
from sartor.core.errors import ArtifactError, BudgetError, MissingError
from sartor.core.filesystem import write_file_atomic
from sartor.core.home import folder
from sartor.edge.tuning.peak_memory import DeviceLoad, DeviceModelShape, MemoryMode, peak, shape_of, state_bytes, total
from sartor.edge.tuning.tuning_job import TuningJob
from sartor.tune.recipe import Recipe

SCHEMA = 1
# as `models/kernels/cpu.py` looks for them
COMPILERS = (os.environ.get("CXX") or "g++", "g++", "c++", "clang++")


@dataclass(frozen=True)
class MemoryBaseline:
    """held_bytes: always held; is_native: there are C++ kernels, which hold less than torch's own operations."""

    held_bytes: int
    is_native: bool


def floor() -> MemoryBaseline:
    """From the file below SARTOR_HOME, or measured now. Raises MissingError where the tuner does not run here."""
    return _floor(str(folder("edge")))


@functools.cache
def _floor(kept: str) -> MemoryBaseline:
    versions = [importlib.metadata.version(name) for name in ("torch", "sartor")]
    threads = os.environ.get("OMP_NUM_THREADS", "")
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), "no compiler")
    key = " ".join([str(SCHEMA), *versions, _sources(), platform.python_version(), platform.machine(), threads, compiler])
    file = Path(kept) / "floor.json"
    try:
        known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    if key not in known:
        known[key] = _measured()
        write_file_atomic(file, json.dumps(known).encode())
    return MemoryBaseline(**known[key])


def _sources() -> str:
    """Our own modules, by their sizes: a checkout changes without its version."""
    root = Path(__file__).parents[2]
    sizes = [f"{file.relative_to(root)} {file.stat().st_size}" for file in sorted(root.rglob("*.py"))]
    return hashlib.sha256("\n".join(sizes).encode()).hexdigest()[:12]


def _measured() -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="sartor-floor-") as place:
        command = [sys.executable, "-m", "sartor.edge.tuning.baseline_measurement", place]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        problem = f"the tuner does not run on this machine: {done.stderr.strip().splitlines()[-1:]}"
        raise MissingError(problem, "pip install 'sartor[edge]'")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def held_bytes() -> int:
    """Anonymous and shared memory of this process now."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) << 10 for name in ("RssAnon", "RssShmem"))


Name = Literal["lora", "recompute", "layers", "zeroth"]
NAMES: tuple[Name, ...] = ("lora", "recompute", "layers", "zeroth")
# Of a limit so much is left free. Predictions were off by 2.8 % over 12 configurations and by 4.3 % once (docs/edge.md)
SPARE = 0.04
MICRO_BATCH_TOKENS = 512


@dataclass(frozen=True)
class MemorySetting:
    """A way to tune. learning: layers that go on learning, next to the head."""

    name: Name
    learning: int
    micro_batch_tokens: int

    @property
    def id(self) -> str:
        """Its name, and of fewer layers how many."""
        return f"layers-{self.learning}" if self.name == "layers" else self.name

    @property
    def way(self) -> MemoryMode:
        """As `peak_memory.py` reads it."""
        return MemoryMode(self.learning, self.name != "lora", self.name == "zeroth")


@dataclass(frozen=True)
class MemoryPlan:
    """The rung, what it is predicted to hold at its peak, by what it is, and the checkpoint's size.

    is_narrow: the base is read in 4 bits. reason: why this rung.
    """

    rung: MemorySetting
    held: dict[str, int]
    limit_bytes: int
    checkpoint_bytes: int
    is_narrow: bool
    reason: str

    @property
    def peak_bytes(self) -> int:
        """Anonymous and shared memory at the peak."""
        return total(self.held)


@dataclass(frozen=True)
class TokenFileStats:
    """Of a file of tokens what a plan needs."""

    longest: int
    tokens: int
    densest: float


def rows_of(file: Path) -> TokenFileStats:
    """Read without torch. Raises ArtifactError where the file is not whole."""
    try:
        with safe_open(str(file), framework="np") as opened:
            lengths, learnt = opened.get_tensor("lengths").tolist(), opened.get_tensor("learnt")
            count = int(opened.get_tensor("train")[0])
    except Exception as error:  # safetensors' own errors have no common base but Exception
        raise ArtifactError(f"{file} is not whole: {error}", "make it again from the rows") from None
    densest, low = 0.0, 0
    for length in lengths[:count]:
        densest, low = max(densest, float(learnt[low : low + length].sum()) / length), low + length
    if not densest:
        raise ArtifactError(f"{file} holds no row to learn from", "make it again from other rows")
    return TokenFileStats(max(lengths), sum(lengths), densest)


class Planner:
    """What a job would hold on every rung. known: the floor, if not that of this machine."""

    def __init__(self, job: TuningJob, known: MemoryBaseline | None = None) -> None:
        self.job = job
        self.recipe = config.load(Recipe, job.recipe)
        self.shape: DeviceModelShape = shape_of(Path(job.base), self.recipe)
        self.rows = rows_of(Path(job.tokens))
        self.floor = known or floor()

    def rungs(self, barred: Collection[str] = ()) -> Iterator[MemorySetting]:
        """Every rung whose id is not barred, in order; within one, the largest micro-batch first."""
        every = self.shape.adapted
        fewer = sorted({count for count in (every * 2 // 3, every // 3, every // 6, 1) if 0 < count < every}, reverse=True)
        for name in NAMES:
            if name == "lora" and self.recipe.compute.recompute:
                continue
            for learning in fewer if name == "layers" else [every]:
                sizes = (MemorySetting(name, learning, size) for size in self._sizes())
                yield from (rung for rung in sizes if rung.id not in barred)

    def held(self, rung: MemorySetting) -> dict[str, int]:
        """What it is predicted to hold at its peak."""
        tokens = max(self.rows.longest, rung.micro_batch_tokens)
        supervised = min(tokens, round(tokens * self.rows.densest))
        is_part = tokens < max(self.recipe.optimizer.batch_tokens, self.rows.longest)
        load = DeviceLoad(tokens, supervised, self.rows.longest, is_part, self.rows.tokens)
        way = replace(rung.way, native=self.floor.is_native)
        return peak(self.shape, load, way, self.floor.held_bytes)

    def choose(
        self, limit_bytes: int, barred: Collection[str] = (), *, most_tokens: int = 0, narrow_bytes: int = 0
    ) -> MemoryPlan:
        """The first rung that fits. limit_bytes: 0 for none. most_tokens: no larger micro-batch than that; 0 for any.
        narrow_bytes: of the same base in 4 bits; 0 if there is none.

        Raises BudgetError where none fits, with the least limit that would do.
        """
        least: tuple[int, MemorySetting] | None = None
        for rung in self.rungs(barred):
            if 0 < most_tokens < rung.micro_batch_tokens:
                continue
            held = self.held(rung)
            needed = round(total(held) / (1 - SPARE))
            if not limit_bytes or needed <= limit_bytes:
                return self._plan(rung, held, limit_bytes, narrow_bytes)
            if least is None or needed < least[0]:
                least = needed, rung
        if least is None:
            raise BudgetError(f"every rung is used up: {', '.join(sorted(barred))}", "a larger limit, or a smaller base")
        problem = f"no way to tune {self.job.name} fits in {limit_bytes / 1e6:,.0f} MB of memory"
        raise BudgetError(
            problem, f"at least {_above(least[0]):,} bytes ({least[1].id}); shorter rows or a lower rank need less"
        )

    def _sizes(self) -> list[int]:
        """Micro-batches, the largest first: whole multiples of the longest row."""
        longest, asked = self.rows.longest, self.recipe.compute.micro_batch_tokens
        most = self.recipe.optimizer.batch_tokens
        most = min(most, MICRO_BATCH_TOKENS) if asked == "auto" else min(asked, most)
        sizes, count = [], max(1, most // longest)
        while count:
            sizes.append(count * longest)
            count //= 2
        return sizes

    def _plan(self, rung: MemorySetting, held: dict[str, int], limit_bytes: int, narrow_bytes: int) -> MemoryPlan:
        # mapped pages are not held, but where they find no room they are read again with each pass
        room = limit_bytes - total(held) if limit_bytes else self.shape.base_bytes
        is_narrow = 0 < narrow_bytes < self.shape.base_bytes and room < self.shape.base_bytes
        reason = f"the first that fits in {limit_bytes / 1e6:,.0f} MB" if limit_bytes else "no limit"
        if is_narrow:
            reason += f"; {room / 1e6:,.0f} MB are left for pages of the base, so it is read in 4 bits"
        return MemoryPlan(rung, held, limit_bytes, state_bytes(self.shape, rung.way), is_narrow, reason)


def _above(number: int) -> int:
    """Rounded up to a million."""
    return -(-number // 1_000_000) * 1_000_000
