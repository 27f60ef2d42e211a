"""Atomic checkpoints of weights, optimizer and random state.

    OUT.checkpoints/
      update-00000042/
        checkpoint.json       schema, fingerprint, environment, numerics, position, counters, ...; sha256 of the
                              other files; digest of itself
        state.safetensors     adapter.*  optimizer.*  rng.*  best.* (of weights: best)  reference (of dpo and kto)
        log.jsonl             the training log up to this update
      .update-00000043.part-.../   a save that a kill interrupted: never read, removed by the next run

A save is written to a hidden sibling folder, fsynced and renamed. Opening checks schema, digests and shapes, so a run
never resumes from a truncated or changed checkpoint; it takes the one before. No pickle is used. A checkpoint of
another version of the arithmetic (core/numerics.py) is refused.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import json
import os
import random
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file

from sartor.core import numerics
from sartor.core.artifacts import manifest_id
from sartor.core.errors import ArtifactError, ConfigError, MissingError
from sartor.core.filesystem import create_directory_atomic, file_digest, fsync_directory
from sartor.models.tensor_files import write_tensors
from sartor.tune.recipe import Checkpoints

SCHEMA = 1
MANIFEST, STATE, LOG = "checkpoint.json", "state.safetensors", "log.jsonl"
_NAME = re.compile(r"update-(\d{8,})$")


@dataclass(frozen=True)
class Checkpoint:
    """Checkpoint that was opened and checked."""

    path: Path
    manifest: dict[str, Any]

    @property
    def update(self) -> int:
        """Number of updates done."""
        return int(self.manifest["counters"]["updates"])

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return every tensor of `state.safetensors` by name, as a copy on the CPU.

        The shapes, of any rank (...), are those in the manifest's `tensors`.
        """
        return {name: tensor.clone() for name, tensor in load_file(self.path / STATE).items()}

    def lines(self) -> list[dict[str, Any]]:
        """Return the lines of the training log up to this checkpoint."""
        return [json.loads(line) for line in (self.path / LOG).read_text(encoding="utf-8").splitlines()]


@dataclass
class CheckpointState:
    """Contents of a folder of checkpoints.

    checkpoint: the newest valid one.
    invalid: path and reason of each newer one that is not valid.
    """

    checkpoint: Checkpoint | None = None
    invalid: list[tuple[Path, str]] = field(default_factory=list)


def folder_of(out: Path) -> Path:
    """Return the checkpoint folder of the run that writes `out`."""
    return out.with_name(out.name + ".checkpoints")


def newest(folder: Path) -> CheckpointState:
    """Return the newest valid checkpoint in `folder`, which need not exist."""
    result = CheckpointState()
    for path in reversed(_all(folder)):
        try:
            result.checkpoint = open_checkpoint(path)
        except ArtifactError as error:
            result.invalid.append((path, error.problem))
        else:
            break
    return result


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint after checking all of its files.

    Raises ArtifactError with what differs: schema, digest, size or tensors.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
            schema = manifest.get("schema") if isinstance(manifest, dict) else None
            raise _invalid(path, f"its schema is {schema}; this version of Sartor reads {SCHEMA}")
        if manifest_id(manifest) != manifest.get("id"):
            raise _invalid(path, f"{MANIFEST} was changed")
        for name, entry in manifest["files"].items():
            size = (path / name).stat().st_size
            if size != entry["bytes"]:
                raise _invalid(path, f"{name} has {size:,} bytes, not {entry['bytes']:,}")
            if file_digest(path / name) != entry["sha256"]:
                raise _invalid(path, f"{name} was changed: its sha256 is not the one in {MANIFEST}")
        with safetensors.safe_open(path / STATE, "pt") as state_file:
            # safe_open's handle is no mapping, so it needs keys()
            shapes = {name: list(state_file.get_slice(name).get_shape()) for name in state_file.keys()}  # noqa: SIM118
        if shapes != manifest["tensors"]:
            raise _invalid(path, f"{STATE} holds other tensors than {MANIFEST} lists")
    except FileNotFoundError as error:
        raise _invalid(path, f"{Path(error.filename).name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError) as error:
        raise _invalid(path, f"it cannot be read: {str(error)[:200]}") from None
    return Checkpoint(path, manifest)


def check_numerics(checkpoint: Checkpoint, remedy: str) -> None:
    """Raise ConfigError for a checkpoint that another version of the arithmetic began.

    Resuming it would not give the bits of an uninterrupted run.
    remedy: how to start this run over.
    """
    environment = checkpoint.manifest.get("environment", {})
    difference = numerics.difference(checkpoint.manifest.get("numerics"), str(environment.get("dtype", "")))
    if not difference:
        return
    saved_version, current_version = environment.get("sartor", ""), importlib.metadata.version("sartor")
    version_note = f" ({saved_version})" if saved_version not in ("", current_version) else ""
    raise ConfigError(
        f"the checkpoint {checkpoint.path} was begun by {difference}",
        f"{remedy}; the Sartor that began it{version_note} can finish it",
    )


def save(
    folder: Path, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any], lines: Sequence[Any]
) -> Checkpoint:
    """Write the checkpoint of `facts["counters"]["updates"]` updates, whole or not at all.

    tensors: of any shape (...), by name.
    Raises MissingError if the disk is full; earlier checkpoints stay as they are.
    """
    path = folder / f"update-{facts['counters']['updates']:08d}"
    with full_disk(f"the checkpoint {path} could not be written; those before it are whole"):
        # a checkpoint that already has this name was found invalid
        with create_directory_atomic(path, replace=True) as temp_folder:
            _write(temp_folder, tensors, facts, lines)
        fsync_directory(folder.parent)
    return Checkpoint(path, json.loads((path / MANIFEST).read_text(encoding="utf-8")))


def _write(
    temp_folder: Path, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any], lines: Sequence[Any]
) -> None:
    write_tensors(tensors, temp_folder / STATE)
    (temp_folder / LOG).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": "checkpoint",
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **facts,
        "tensors": {name: list(tensor.shape) for name, tensor in tensors.items()},
        "files": {
            name: {"sha256": file_digest(temp_folder / name), "bytes": (temp_folder / name).stat().st_size}
            for name in (STATE, LOG)
        },
    }
    # round trip, so that the id is computed on what a reader will see: tuples become lists, keys become text
    manifest = json.loads(json.dumps(manifest))
    manifest["id"] = manifest_id(manifest)
    (temp_folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for path in _all(folder)[:-keep]:
        _remove(path)


def sweep(folder: Path, state: CheckpointState) -> None:
    """Remove what a killed save left in `folder`, and the invalid checkpoints of `state`.

    The caller must hold the writer's lock.
    """
    for leftover in folder.glob(".update-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for path, _ in state.invalid:
        if path.exists():
            _remove(path)


def clear(folder: Path) -> None:
    """Remove `folder` and every checkpoint in it."""
    shutil.rmtree(folder, ignore_errors=True)


def _remove(path: Path) -> None:
    """Rename a checkpoint to a hidden name, then remove it.

    A kill in between leaves no half checkpoint under a valid name.
    """
    hidden = path.with_name(f".{path.name}.old-{os.getpid()}")
    os.replace(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _all(folder: Path) -> list[Path]:
    """Return the paths of all checkpoints, valid or not, oldest first."""
    if not folder.is_dir():
        return []
    numbered = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.match(path.name))]
    return [path for _, path in sorted(numbered)]


@contextlib.contextmanager
def full_disk(problem: str) -> Iterator[None]:
    """Turn the errors of a full disk into a MissingError with a remedy."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        # safetensors gives the system's error number only in its text
        code = getattr(error, "errno", None) or next(iter(map(int, re.findall(r"os error (\d+)", str(error)))), None)
        if code not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise MissingError(f"the disk is full: {problem}", "free some space, then add --resume") from error


def _invalid(path: Path, problem: str) -> ArtifactError:
    return ArtifactError(
        f"the checkpoint {path} is not whole: {problem}", f"rm -r {path}, then --resume takes the one before it"
    )


class Saver:
    """Schedule of a run's checkpoints, with the facts that every checkpoint of the run repeats."""

    def __init__(
        self, folder: Path, settings: Checkpoints, facts: Mapping[str, Any], start: Checkpoint | None
    ) -> None:
        self.folder, self.settings, self.facts = folder, settings, facts
        self._saved_update = start.update if start else 0
        self._saved_at = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether `checkpoints.every_minutes` have passed since the last save."""
        return time.monotonic() - self._saved_at >= self.settings.every_minutes * 60

    def save(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any], lines: Sequence[Any]) -> None:
        """Write a checkpoint unless this update is saved already, then prune.

        tensors: of any shape (...), by name.
        """
        update = int(facts["counters"]["updates"])
        if update == self._saved_update and update:
            return
        save(self.folder, tensors, {**self.facts, **facts}, lines)
        self._saved_update, self._saved_at = update, time.monotonic()
        prune(self.folder, self.settings.keep)


def seed_all(seed: int) -> None:
    """Seed the generators of Python, numpy and torch, including those of the devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@dataclass(frozen=True)
class RandomState:
    """States of the random generators at one moment.

    device: one tensor per CUDA device, or one for Apple's GPU; empty on a CPU.
    """

    python: Any
    numpy: Any
    torch: torch.Tensor
    device: tuple[torch.Tensor, ...]

    @classmethod
    def capture(cls, device: torch.device) -> RandomState:
        """Return the current states.

        It takes tens of microseconds on a CPU, so it can run before every update.
        """
        states: tuple[torch.Tensor, ...] = ()
        if device.type == "cuda":
            states = tuple(torch.cuda.get_rng_state_all())
        elif device.type == "mps":
            states = (torch.mps.get_rng_state(),)
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), states)

    def put_back(self, device: torch.device) -> None:
        """Set the generators to these states. States for another kind or number of devices are ignored."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if device.type == "cuda" and len(self.device) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(list(self.device))
        elif device.type == "mps" and len(self.device) == 1:
            torch.mps.set_rng_state(self.device[0])

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the large parts of the states as tensors by name, each of shape (N,)."""
        return {
            "rng.python": torch.tensor(self.python[1], dtype=torch.int64),
            "rng.numpy": torch.from_numpy(self.numpy[1].astype(np.int64)),
            "rng.torch": self.torch,
            **{f"rng.device.{index}": state for index, state in enumerate(self.device)},
        }

    def facts(self) -> dict[str, Any]:
        """Return the remaining plain values of the states."""
        return {"python": [self.python[0], self.python[2]], "numpy": [self.numpy[0], *self.numpy[2:]]}

    @classmethod
    def read(cls, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> RandomState:
        """Build the states from the results of `tensors`, each of shape (N,), and `facts`."""
        version, gauss = facts["python"]
        algorithm, *rest = facts["numpy"]
        devices = sum(name.startswith("rng.device.") for name in tensors)
        return cls(
            (version, tuple(tensors["rng.python"].tolist()), gauss),
            (algorithm, tensors["rng.numpy"].numpy().astype(np.uint32), *rest),
            tensors["rng.torch"].clone(),
            tuple(tensors[f"rng.device.{index}"].clone() for index in range(devices)),
        )
