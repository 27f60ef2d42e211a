"""A device's runs: layers that are held still, learning without gradients, and going on smaller from any checkpoint."""

from __future__ import annotations

import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from edge_jobs import adapter, job
from sartor.core.errors import ArtifactError, StoppedError
from sartor.core.processes import DeferredSignals
from sartor.edge.tuning.device_training import DeviceRun, ZerothRun
from sartor.edge.tuning.tuner_process import tune
from sartor.edge.tuning.tuning_job import TuningJob
from sartor.tune import checkpoint


def until(one: TuningJob, update: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a job and stop it after an update, as SIGTERM does."""
    count, counted = DeviceRun._record_update, 0

    def counting(run: DeviceRun, *arguments: Any, **keywords: Any) -> None:
        nonlocal counted
        count(run, *arguments, **keywords)
        counted = run.counters.updates
        if counted == update:
            signals[0].received = signal.SIGTERM

    signals: list[DeferredSignals] = []
    enter = DeferredSignals.__enter__

    def entering(self: DeferredSignals) -> DeferredSignals:
        signals.append(self)
        return enter(self)

    with monkeypatch.context() as patch:
        patch.setattr(DeviceRun, "_record_update", counting)
        patch.setattr(DeferredSignals, "__enter__", entering)
        with pytest.raises(StoppedError):
            tune(one)
    assert counted == update


def test_frozen_layers_stay_in_the_adapter_and_do_not_learn(tiny_base: Path, tmp_path: Path) -> None:
    """With top=1 of two layers only the one next to the head learns; the other has no optimizer state."""
    whole, half = job(tiny_base, tmp_path / "whole", updates=3), job(tiny_base, tmp_path / "half", updates=3, top=1)
    tune(whole)
    tune(half)
    both = adapter(whole), adapter(half)
    assert set(both[0]) == set(both[1])
    moved = {name.split(".")[4] for name, part in both[1].items() if "lora_B" in name and part.any()}
    assert moved == {"1"}, "of two layers the one next to the head"
    state = load_file(str(checkpoint.newest(Path(half.out) / "checkpoints").checkpoint.path / "state.safetensors"))  # type: ignore[union-attr]
    sizes = {
        kind: sum(part.numel() for name, part in state.items() if name.startswith(kind))
        for kind in ("adapter.", "still.")
    }
    assert sizes["adapter."] == sizes["still."] and not any(
        name.startswith("optimizer.model.layers.0.") for name in state
    )


def test_run_resumes_with_fewer_layers_then_without_gradients(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The frozen layer keeps its factors bit for bit, and the last checkpoint has no optimizer state."""
    first = job(tiny_base, tmp_path / "a", updates=9)
    until(first, 3, monkeypatch)
    before = checkpoint.newest(Path(first.out) / "checkpoints").checkpoint
    assert before is not None and before.update == 3
    lower = {name: part for name, part in before.tensors().items() if name.startswith("adapter.model.layers.0.")}
    until(replace(first, top=1), 6, monkeypatch)
    between = checkpoint.newest(Path(first.out) / "checkpoints").checkpoint
    assert between is not None and between.update == 6
    held = between.tensors()
    assert all(torch.equal(held[name.replace("adapter.", "still.")], part) for name, part in lower.items()) and lower
    said = tune(replace(first, zeroth=True))
    assert said["updates"] == 9 and said["resumed_at"] == [3, 6]
    end = checkpoint.newest(Path(first.out) / "checkpoints").checkpoint
    assert end is not None and not [name for name in end.tensors() if name.startswith("optimizer.")]


def test_a_checkpoint_of_another_adapter_is_refused(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = job(tiny_base, tmp_path / "a", updates=9)
    until(first, 2, monkeypatch)
    with pytest.raises(ArtifactError, match="do not fit"):
        tune(replace(first, recipe={**first.recipe, "method": {"kind": "lora", "rank": 2}}))


def test_without_gradients_the_loss_falls(tiny_base: Path, tmp_path: Path) -> None:
    rate = {"optimizer": {"learning_rate": 3e-2, "batch_tokens": 400, "schedule": "constant"}}
    said = tune(job(tiny_base, tmp_path, updates=60, zeroth=True, recipe=rate))
    assert said["loss"]["last"] < said["loss"]["first"] - 0.03


def test_its_slope_is_that_of_the_gradient_along_the_direction(
    tiny_base: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    seen: list[tuple[float, float]] = []
    update = ZerothRun._update

    def watched(run: ZerothRun, chosen: Any) -> None:
        if run.counters.updates == 4:
            before = [part.detach().clone() for part in run.parameters]
            loss = sum((losses * weights).sum() / weights.sum() for losses, weights in [run.path.losses(chosen)])
            loss.backward()
            gradients = [part.grad for part in run.parameters]
            run.optimizer.zero_grad()
            with torch.no_grad():
                run._move(1.0)
                direction = [part.detach() - old for part, old in zip(run.parameters, before, strict=True)]
                for part, old in zip(run.parameters, before, strict=True):
                    part.copy_(old)
            wanted = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
            update(run, chosen)
            seen.append((run.journal.lines[-1]["grad_norm"], abs(wanted)))
            return
        update(run, chosen)

    monkeypatch.setattr(ZerothRun, "_update", watched)
    tune(job(tiny_base, tmp_path, updates=5, zeroth=True))
    assert seen and seen[0][0] == pytest.approx(seen[0][1], rel=0.05, abs=0.02)


@pytest.mark.parametrize("zeroth", [False, True])
def test_stopped_and_gone_on_it_ends_at_the_same_bits(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zeroth: bool
) -> None:
    whole = job(tiny_base, tmp_path / "whole", updates=8, top=1, zeroth=zeroth)
    cut = job(tiny_base, tmp_path / "cut", updates=8, top=1, zeroth=zeroth)
    tune(whole)
    until(cut, 2, monkeypatch)
    until(cut, 5, monkeypatch)
    tune(cut)
    ends = adapter(whole), adapter(cut)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    shutil.rmtree(tmp_path)


def test_bf16_adapter_is_the_fp32_adapter_rounded(tiny_base: Path, tmp_path: Path) -> None:
    """A later run can start from it."""
    wide, narrow = job(tiny_base, tmp_path / "a", updates=3), job(tiny_base, tmp_path / "b", updates=3, store="bf16")
    tune(wide)
    tune(narrow)
    both = adapter(wide), adapter(narrow)
    assert all(torch.equal(part.bfloat16(), both[1][name]) for name, part in both[0].items())
    assert tune(job(tiny_base, tmp_path / "c", updates=2, start=narrow.out))["updates"] == 2
