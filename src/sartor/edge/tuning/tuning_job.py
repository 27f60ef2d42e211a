"""Job file of the tuning process."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sartor.core.errors import ConfigError
from sartor.tune.sampler import SchedulePart

# What a device computes in, whatever its base is stored as
DTYPE = "float32"
STORES = ("fp32", "bf16")
FACTORS = ("A", "B", "AB")


@dataclass(frozen=True)
class Share(SchedulePart):
    """What of a longer tuning this one is. factors: which of each pair learn; the other ones are held still."""

    factors: str = "AB"

    def __post_init__(self) -> None:
        if self.factors not in FACTORS:
            raise ConfigError(f"the factors {self.factors!r} are to learn", f"factors: {', '.join(FACTORS)}")


@dataclass(frozen=True)
class TuningJob:
    """base: a directory in transformers' layout, or one that `models/mmap_llama.py` wrote; tokens: a token file
    (`tuner_process.py`); out: a directory for the adapter, its log and its checkpoints. name, digest, licence: of the
    base, as an adapter says them.

    start: an adapter directory to go on from; empty for a fresh one. store: the dtype in which the adapter is written
    (in bf16 one more epoch changes fewer bytes). top: so many layers next to the head go on learning, 0 for all; the
    factors of
    the others stay. zeroth: learn by differences of two losses, without gradients. share: of a round, what it asks
    for.
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
        """As JSON."""
        file.write_text(json.dumps(asdict(self)), encoding="utf-8")


def read_job(file: Path) -> TuningJob:
    """What `Job.write` wrote. Raises ConfigError."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        return TuningJob(**{**fields, "share": Share(**fields.get("share", {}))})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file} is no job: {error}", f"TuningJob(...).write({str(file)!r})") from None
