"""From rows to a tuned delta: tokens that never touch the disk in plain, a job for the device's tuner, and its process.

Tokens are as good as the text. They are written into a folder of this user's alone (0700) on a file system in memory, which the
tuner's process reads and which is removed at the end; what a killed process left there goes with the next tuning, or when the
device restarts. Where there is no such file system the tuning is refused. Memory can be swapped out: switch swap off, or
encrypt it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open

from sartor.core import config, reply_markup
from sartor.core.errors import (
    BudgetError,
    BusyError,
    ConfigError,
    MissingError,
    ModelError,
    SourceError,
    TemplateMarkupError,
)
from sartor.core.records import Example
from sartor.edge.personal.local import CONFIG, WEIGHTS
from sartor.edge.personal.rows import Row
from sartor.edge.tuning.job import Job
from sartor.edge.tuning.limits import Limits, run
from sartor.edge.tuning.tokens import write_tokens
from sartor.models.batches import Encoded
from sartor.models.chat import Chat
from sartor.tune.recipe import Recipe
from sartor.tune.tokenised import Rows

_FACTOR = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.\w+\.(\w+)\.lora_[AB]\.weight")
IN_MEMORY = ("tmpfs", "ramfs")
# Small steps from an adapter that stands: a person's rows are few
DEFAULTS: dict[str, Any] = {
    "budget": {"epochs": 3.0},
    "optimizer": {"learning_rate": 1e-4, "batch_tokens": 1024},
    "compute": {"recompute": True, "reuse_frozen": False},  # activations of rows would lie on the disk
    "evaluations": 0,
}
Tune = Callable[[Job], Mapping[str, Any]]


@dataclass
class Material:
    """Rows as tokens. Encoded.example_id is the row's random id: digests of short texts can be guessed.

    left_out: reason -> ids. groups: of the held-out rows, in order.
    """

    train: list[Encoded] = field(default_factory=list)
    held_out: list[Encoded] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)


def material(rows: Sequence[Row], chat: Chat, held_out_fraction: float, most_tokens: int) -> Material:
    """What of a person's rows is trained on and what is held out, by each prompt's digest; what is left out, and why."""
    found = Material()
    for row in rows:
        coded = encoded(row.learnt, row.id, chat, most_tokens) if row.learnt else "rated bad, and not corrected"
        if isinstance(coded, str):
            found.left_out.setdefault(coded, []).append(row.id)
        elif row.is_held_out(held_out_fraction):
            found.held_out.append(coded)
            found.groups.append(row.group)
        else:
            found.train.append(coded)
    return found


def encoded(example: Example, name: str, chat: Chat, most_tokens: int) -> Encoded | str:
    """An Example as tokens, or why it is none."""
    try:
        example = reply_markup.read_example(example, chat.markup.spelt)
        coded = replace(chat.encode(example), example_id=name)
    except TemplateMarkupError as error:
        return f"{error.reason}: {error.problem[:120]}"
    except SourceError as error:
        return f"the chat template: {error.problem[:120]}"
    if len(coded.ids) > most_tokens:
        return f"over {most_tokens} tokens"
    return coded if coded.supervised_tokens else "nothing to learn"


def recipe_of(adapter: Path, base: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe that goes on from a release's adapter: its method, DEFAULTS, and a person's changes to these."""
    made = {"base": str(base), "data": {"path": "personal"}, **DEFAULTS, **changes, "method": _method(adapter, base)}
    made["compute"] = {**DEFAULTS["compute"], **changes.get("compute", {}), "reuse_frozen": False}
    config.load(Recipe, made)
    return made


def _method(adapter: Path, base: Path) -> dict[str, Any]:
    """Rank and scale by the adapter's config; which modules by its weights, since a config may name them in many ways."""
    try:
        said = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
        layers = int(json.loads((base / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"])
        rank, alpha = said["r"], said["lora_alpha"]
        with safe_open(str(adapter / WEIGHTS), framework="pt") as opened:
            found = [_FACTOR.fullmatch(name) for name in opened.keys()]  # noqa: SIM118  # no mapping
    except Exception as error:  # safetensors' own errors have no common base but Exception
        raise ModelError(f"the adapter {adapter} or the base {base} is not whole: {error!r}", "sync them again") from None
    adapted = {(int(match[1]), match[2]) for match in found if match}
    lowest, modules = min((layer for layer, _ in adapted), default=layers), sorted({module for _, module in adapted})
    whole = {(layer, module) for layer in range(lowest, layers) for module in modules}
    odd = [name for name in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern") if said.get(name)]
    if odd or not adapted or adapted != whole or not all(found):
        why = f": {', '.join(odd)}" if odd else ""
        raise ConfigError(f"{adapter} is no plain LoRA of the layers next to the head{why}", "a release tuned by sartor tune")
    targets = {"modules": modules, **({"layers": f"top-{layers - lowest}"} if lowest else {})}
    return {"kind": "lora", "rank": rank, "alpha": alpha, "targets": targets}


@contextmanager
def room_in_memory(owner: Path, roots: Sequence[Path] | None = None) -> Iterator[Path]:
    """A folder in memory for this user alone, one per `owner`; what was left in it is removed first. See the module."""
    chosen = next((root for root in (_roots() if roots is None else roots) if _is_in_memory(root)), None)
    if chosen is None:
        raise MissingError("there is no folder in memory for what may not lie on the disk", "mount a tmpfs at /dev/shm")
    room = chosen / f"sartor-{os.getuid()}-{hashlib.sha256(str(owner).encode()).hexdigest()[:16]}"
    try:
        if room.is_symlink() or room.exists():
            found = os.lstat(room)
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                raise ConfigError(f"{room} belongs to somebody else", "have it removed: its name was taken on purpose")
            shutil.rmtree(room)
        room.mkdir(mode=0o700)
    except OSError as error:
        raise MissingError(f"{room} could not be made: {error.strerror}", f"see to {chosen}") from error
    try:
        yield room
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _roots() -> list[Path]:
    return [Path("/dev/shm"), *([Path(found)] if (found := os.environ.get("XDG_RUNTIME_DIR")) else [])]


def _is_in_memory(root: Path) -> bool:
    """By the mount that holds it (proc(5), mounts)."""
    try:
        lines = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return False
    real = root.resolve()
    above = [(Path(line[1]), line[2]) for line in lines if real.is_relative_to(line[1])]
    kind = max(above, key=lambda one: len(one[0].parts), default=(root, ""))[1]
    return kind in IN_MEMORY and root.is_dir() and os.access(root, os.W_OK)


def write_job(job: Job, rows: Sequence[Encoded]) -> None:
    """Put the tokens where the job says. No held-out row goes to the tuner."""
    write_tokens(Rows(list(rows), [], lengths=[len(row.ids) for row in rows]), Path(job.tokens))


def tune_in_process(limits: Limits, stop: Callable[[], bool] = lambda: False) -> Tune:
    """The tuner as a process under limits; `stop` ends it, and the same job later goes on where it was."""

    def tune(job: Job) -> Mapping[str, Any]:
        file = Path(job.tokens).with_name("job.json")
        job.write(file)
        used = run([sys.executable, "-m", "sartor.edge.tuning.tuner", str(file)], limits, stop=stop)
        if used.killed == "stopped":
            raise BusyError("the tuning was stopped; what it has is saved", "adapt again, it goes on", retry_after_s=600)
        if used.killed:
            raise BudgetError(f"the tuning met its limit of {used.killed}: {used}", "a larger limit, or a smaller recipe")
        if used.exit_code:
            raise ModelError(f"the tuning ended with exit code {used.exit_code}", "the line above says why")
        return {"used": asdict(used), **json.loads((Path(job.out) / "run.json").read_text(encoding="utf-8"))}

    return tune
