"""Runs of tuning that die in one process, as SIGKILL would end them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import sartor
from sartor.tune.training_loop import TrainingRun

WEIGHTS = "adapter_model.safetensors"


class Killed(BaseException):
    """Stands for SIGKILL in the tests that stay in one process: nothing in Sartor catches it."""


# dropout on, evaluations in between, saved after every update
SETTINGS = {
    "method": {"kind": "lora", "rank": 8, "alpha": 16, "dropout": 0.1},
    "checkpoints": {"every_minutes": 0, "keep": 2},
    "evaluations": 3,
}


def tune(recipe: dict[str, Any], out: Path, **options: Any) -> Any:
    return sartor.tune(recipe, out, show=False, **options)


def kill_at(monkeypatch: pytest.MonkeyPatch, update: int, how: type[BaseException] = Killed) -> None:
    """The process dies in that update, after its gradients and before its step."""
    whole = TrainingRun._check

    def dies(self: TrainingRun, *arguments: Any) -> None:
        if self.counters.updates + 1 == update:
            raise how
        whole(self, *arguments)

    monkeypatch.setattr(TrainingRun, "_check", dies)


def killed(monkeypatch: pytest.MonkeyPatch, recipe: dict[str, Any], out: Path, update: int, **options: Any) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, update)
        tune(recipe, out, **options)
