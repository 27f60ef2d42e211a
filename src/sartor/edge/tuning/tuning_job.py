"""Job file of the tuning process."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sartor.core.errors import ConfigError
from sartor.tune.sampler import SchedulePart

# Arithmetic of a device, whatever dtype its base is stored in
DTYPE = "float32"
STORES = ("fp32", "bf16")
FACTORS = ("A", "B", "AB")


@dataclass(frozen=True)
class Share(SchedulePart):
    """Part of a longer tuning.

    factors: "A", "B" or "AB": which factors of each pair learn; the others are frozen.
    """

    factors: str = "AB"

    def __post_init__(self) -> None:
        if self.factors not in FACTORS:
            raise ConfigError(f"the factors {self.factors!r} are to learn", f"factors: {', '.join(FACTORS)}")


@dataclass(frozen=True)
class TuningJob:
    """Job of the tuning process.

    base: directory in transformers' layout, or one that `models/mmap_llama.py` wrote.
    name, digest, licence: of the base, as an adapter states them.
    tokens: token file (`tuner_process.py`).
    out: directory for the adapter, its log and its checkpoints.
    start: adapter directory to go on from; empty for a fresh adapter.
    store: dtype in which the adapter is written (in bf16 one more epoch changes fewer bytes).
    top: number of layers next to the head that go on learning, 0 for all; the factors of the others stay.
    zeroth: learn by differences of two losses, without gradients.
    share: part that a federated round asks for.
    """

    base: str
    name: str
    digest: str
    licence: str
    tokens: str
    out: str
    recipe: dict[str, Any]
    start: str = ""
    store: str = "fp32"
    top: int = 0
    zeroth: bool = False
    share: Share = Share()

    def __post_init__(self) -> None:
        if self.store not in STORES:
            raise ConfigError(f"an adapter is stored in {' or '.join(STORES)}, not in {self.store!r}", "store: bf16")

    def write(self, file: Path) -> None:
        """Write the job as JSON."""
        file.write_text(json.dumps(asdict(self)), encoding="utf-8")


def tuner_command(job_file: Path) -> list[str]:
    """Return the command that runs the tuner on a job file."""
    return [sys.executable, "-m", "sartor.edge.tuning.tuner_process", str(job_file)]


def tuner_environment() -> dict[str, str]:
    """Return the environment of the tuner: one malloc arena, since those of threads hold memory that others need."""
    return {"MALLOC_ARENA_MAX": "1", **os.environ}


def read_job(file: Path) -> TuningJob:
    """Return the job that `TuningJob.write` wrote. Raises ConfigError."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        return TuningJob(**{**fields, "share": Share(**fields.get("share", {}))})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file} is no job: {error}", f"TuningJob(...).write({str(file)!r})") from None
