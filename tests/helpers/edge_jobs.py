"""Small jobs for the tests of tuning on a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sartor.core.signing import keygen
from sartor.edge.tuning.tuner_process import write_tokens
from sartor.edge.tuning.tuning_job import TuningJob
from sartor.models.packing import TokenizedExample
from sartor.tune.tokenized_dataset import TokenizedDataset


def rows(count: int = 20, length: int = 12) -> TokenizedDataset:
    def row(n: int) -> TokenizedExample:
        ids = [5 + (n * 7 + place * 3) % 40 for place in range(length + n % 5)]
        return TokenizedExample(ids, [False] * 6 + [True] * (len(ids) - 6), f"row-{n}")

    return TokenizedDataset([row(n) for n in range(count)], [row(n) for n in range(count, count + 4)])


def job(base: Path, folder: Path, updates: int, **changes: Any) -> TuningJob:
    """A job over `rows`, saved at every update. recipe: sections in the place of others."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokens").exists():
        write_tokens(changes.pop("rows", rows()), folder / "tokens")
    recipe = {
        "base": "tiny",
        "data": {"path": "rows"},
        "method": {"kind": "lora", "rank": 4, "alpha": 8},
        "budget": {"updates": updates},
        "optimizer": {"learning_rate": 3e-2, "batch_tokens": 64},
        "checkpoints": {"every_minutes": 0},
        **changes.pop("recipe", {}),
    }
    return TuningJob(str(base), "tiny", "d", "MIT", str(folder / "tokens"), str(folder / "out"), recipe, **changes)


def adapter(one: TuningJob) -> dict[str, torch.Tensor]:
    return load_file(str(Path(one.out) / "adapter_model.safetensors"))


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return Path(keygen(tmp_path / "key", purposes=("receipt",))["private"])
