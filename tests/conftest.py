"""Every test has its own SARTOR_HOME, no network, and fixed seeds; the `circle` tier uses the machine's own cache."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Two cores, and tests run beside each other: several OpenMP pools that spin for the same cores slow each other by far.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests have homes of their own; the compiled kernels are the machine's, made once for all of them.
os.environ.setdefault("SARTOR_KERNELS", str(Path(__file__).parent.parent / ".pytest_cache" / "kernels"))
Path(os.environ["SARTOR_KERNELS"]).mkdir(parents=True, exist_ok=True)

ROWS = [
    {"messages": [{"role": "user", "content": f"switch {place} {word}"}, {"role": "assistant", "content": f"{word}:{place}"}]}
    for word in ("on", "off", "up", "down")
    for place in ("kitchen", "hall", "attic", "garage", "patio", "office", "cellar", "porch", "den", "loft")
]


@pytest.fixture(autouse=True)
def sartor_home(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if "circle" not in request.keywords:
        monkeypatch.setenv("SARTOR_HOME", str(tmp_path / "sartor-home"))
    yield


@pytest.fixture
def fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` is fp32 whatever this machine multiplies natively: sums compare closely, and a weight has 4 bytes."""
    import torch

    from sartor.models import base
    from sartor.tune import refusals

    for module in (base, refusals):
        monkeypatch.setattr(module, "best_dtype", lambda device: torch.float32)


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """Forty chat rows, JSONL."""
    file = tmp_path / "rows.jsonl"
    write_jsonl(file, ROWS)
    return file


def write_jsonl(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def dataset(tmp_path: Path, rows_file: Path) -> Path:
    """A curated Dataset of the forty rows, a quarter held out."""
    import sartor

    recipe = {"sources": [{"path": str(rows_file), "licence": "CC-BY-4.0"}], "split": {"eval_fraction": 0.25}}
    sartor.curate(recipe, tmp_path / "dataset")
    return tmp_path / "dataset"


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base's directory."""
    import tiny

    return tiny.write_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def tune_recipe(dataset: Path, tiny_base: Path) -> dict[str, Any]:
    """A recipe that tunes the tiny base on the forty rows in a second."""
    return {
        "base": str(tiny_base),
        "data": {"path": str(dataset)},
        "method": {"kind": "lora", "rank": 8, "alpha": 16},
        "budget": {"epochs": 2},
        "optimizer": {"learning_rate": 1e-2, "batch_tokens": 128},
    }


@pytest.fixture
def adapter(tmp_path: Path, tune_recipe: dict[str, Any]) -> Path:
    """An Adapter of the tiny base."""
    import sartor

    sartor.tune(tune_recipe, tmp_path / "adapter", show=False)
    return tmp_path / "adapter"
