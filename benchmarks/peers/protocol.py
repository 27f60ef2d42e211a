"""What every side of benchmarks/train.py speaks: a job comes as one JSON file, the result goes into another.

Each side's `run.py` is run by its own interpreter as `run.py JOB.json RESULT.json`, so this module needs nothing but
Python. A side that cannot run writes `{"failed": "<reason>"}` and the traceback; it never just dies.

    job      {base, dtype, device, rank, alpha, learning_rate, clip_norm, compile, limit_s,
              updates: [[{ids, learnt}, ...], ...], start, settings?: {kind: {option: value}}, is_reference?,
              held_out?: [{ids, learnt}, ...], adapter?, rounds_first?}
    result   {seconds: [...], losses: [...], tokens: [...], supervised_tokens: [...], b_gradients: {module: norm},
              peak_rss_bytes, versions, ...}

`b_gradients` has, for each adapted linear module by its name in transformers, the norm of the gradient of its factor B
at update 1, before clipping. Every side begins with the factors A of `start` and with B = 0, so the sides' norms must
agree.

A list of the result has an entry per update. A side that is slow ends after the update in which `limit_s` is over, so
its lists may be shorter; two updates it always makes.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

IGNORED = -100
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Unable(Exception):
    """The side cannot do the job; the message says why."""


class Enough(Exception):
    """The job's time is over: what has been measured is the result."""


@dataclass(frozen=True)
class Row:
    """One pre-tokenised row. A row's first token has no predecessor, so it never gets a loss."""

    ids: list[int]
    learnt: list[bool]

    @property
    def supervised_tokens(self) -> int:
        """Tokens that get a loss."""
        return sum(self.learnt[1:])

    @property
    def labels(self) -> list[int]:
        """Labels as transformers wants them: unshifted, IGNORED where nothing is learnt."""
        return [IGNORED, *(token if on else IGNORED for token, on in zip(self.ids[1:], self.learnt[1:], strict=True))]


@dataclass(frozen=True)
class Job:
    """The work. `dtype`: `float32`, `bfloat16`, or `auto` for the side's own choice; `compile`: its compiler on.

    start: a safetensors file with the factors A that every side begins with, by module name. settings: documented
    options of the peer, by kind (`trainer`: of its trainer's arguments).

    Of Sartor's side alone: is_reference, whether only losses and gradients are wanted; held_out, rows whose loss is
    taken after the last update; adapter, where it is written then; rounds_first, whether the frozen product is rounded
    before the low-rank term is added, as numerics 1 did.
    """

    base: str
    dtype: str
    device: str
    rank: int
    alpha: int
    learning_rate: float
    clip_norm: float
    compile: bool
    limit_s: float
    updates: list[list[Row]]
    start: str = ""
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    is_reference: bool = False
    held_out: list[Row] = field(default_factory=list)
    adapter: str = ""
    rounds_first: bool = False

    @classmethod
    def read(cls, path: str) -> Job:
        """The job in a file."""
        said = json.loads(Path(path).read_text())
        said["updates"] = [[Row(**row) for row in rows] for rows in said["updates"]]
        said["held_out"] = [Row(**row) for row in said.get("held_out", [])]
        return cls(**{part.name: said[part.name] for part in fields(cls) if part.name in said})

    @property
    def rows(self) -> list[Row]:
        """All rows, in order."""
        return [row for rows in self.updates for row in rows]

    @property
    def rows_per_update(self) -> int:
        """Rows of each update; they are equally many. Raises Unable if they are not."""
        counts = {len(rows) for rows in self.updates}
        if len(counts) != 1:
            raise Unable(f"the updates have {sorted(counts)} rows; they must have equally many")
        return counts.pop()


class Watch:
    """Wall seconds and loss per update. An update lasts from the end of the one before; loading is not in it."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.b_gradients: dict[str, float] = {}
        self.hooks: list[Any] = []
        self._last: float | None = None

    @property
    def is_enough(self) -> bool:
        """Whether the side should end here."""
        return len(self.seconds) >= 2 and sum(self.seconds) > self.limit_s

    def start(self) -> None:
        """Everything is loaded; the first update begins."""
        self._last = time.perf_counter()

    def update(self) -> None:
        """An update has ended."""
        if self._last is None:
            raise RuntimeError("Watch.update before Watch.start")
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        while self.hooks:
            self.hooks.pop().remove()
        self._last = now


def watch_gradients(factors: Mapping[str, Any], watch: Watch) -> None:
    """Note the norm of the gradient of each torch parameter at the first update, before it is clipped.

    factors: the factors B by the name of their module. Where an update is computed in parts, the last part's norm
    stands: that of the sum.
    """

    def hook_of(name: str) -> Callable[[Any], None]:
        def note(parameter: Any) -> None:
            watch.b_gradients[name] = float(parameter.grad.float().norm())

        return note

    watch.hooks += [factor.register_post_accumulate_grad_hook(hook_of(name)) for name, factor in factors.items()]


def main(train: Callable[[Job, Watch], dict[str, Any]], packages: tuple[str, ...]) -> None:
    """Run `train` on the job that the command line names and write its result. `train` may return more keys."""

    def compute(path: Path) -> dict[str, Any]:
        job = Job.read(str(path))
        watch = Watch(job.limit_s)
        try:
            more = train(job, watch)
        except Enough:
            more = {}
        return _checked(job, watch) | more

    answer(compute, packages)


def answer(compute: Callable[[Path], dict[str, Any]], packages: tuple[str, ...]) -> None:
    """Write what `compute` returns of the job's file to the result's, both named by the command line.

    `packages` are those whose versions belong to the result. Exits with 0 also when the side fails: the result says
    so.
    """
    job_path, result_path = map(Path, sys.argv[1:3])
    here = Path(__file__).resolve().parent
    # its folders bear the names of the peers' own packages
    sys.path = [place for place in sys.path if Path(place).resolve() != here]
    result: dict[str, Any] = {"versions": versions(packages)}
    try:
        result |= compute(job_path)
    except Exception as error:  # a peer fails in its own ways, and every one is a result
        result["failed"] = str(error) if isinstance(error, Unable) else _one_line(error)
        result["traceback"] = traceback.format_exc()
    result_path.write_text(json.dumps(result))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # some peers leave threads behind that would keep the process


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Installed versions; Python's is among them."""
    found = {"python": sys.version.split()[0]}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def _checked(job: Job, watch: Watch) -> dict[str, Any]:
    count = len(watch.seconds) if watch.is_enough else len(job.updates)
    if len(watch.seconds) != count or len(watch.losses) != count:
        raise Unable(
            f"{count} updates were asked for; {len(watch.seconds)} were timed, {len(watch.losses)} gave a loss"
        )
    done = job.updates[:count]
    return {
        "seconds": watch.seconds,
        "losses": watch.losses,
        "b_gradients": watch.b_gradients,
        "tokens": [sum(len(row.ids) for row in rows) for rows in done],
        "supervised_tokens": [sum(row.supervised_tokens for row in rows) for rows in done],
        "peak_rss_bytes": peak_rss_bytes(),
    }


def peak_rss_bytes() -> int:
    """Return the most memory that this process has held, loading included.

    Not for Sartor's side, whose `tune` resets the counter: `sartor.models.hardware.peak_bytes` there.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
