"""Probes of the tuning methods: what a tiny base computes after two steps, and what runs from a start end with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sartor
import tiny
from method_rows import ROWS, logits, placed, trained
from option_probes import Observer, Probe, Workspace, probes_of
from sartor.core import config
from sartor.tune.recipe import Recipe
from tune_option_probes import _recipe, _shared, _tuned

IN_FP32 = {"name": "BASE", "bits": 32}
TARGETS = ("all-linear", ["q_proj"])
LOW_RANK = {"rank": (4, 2), "alpha": (8.0, 4.0), "dropout": (0.0, 0.5), "targets": TARGETS}
VALUES: dict[str, tuple[str, dict[str, Any]]] = {
    "RsLora": ("rslora", LOW_RANK),
    "Dora": ("dora", LOW_RANK),
    "Pissa": ("pissa", {"rank": (4, 2), "alpha": (4.0, 8.0), "iterations": (0, 1), "targets": TARGETS}),
    "Oft": ("oft", {"block_size": (8, 16), "targets": TARGETS}),
    "Miss": ("miss", {"rank": (4, 8), "targets": TARGETS}),
    "Ia3": ("ia3", {"targets": TARGETS}),
    "Full": ("full", {"targets": ("all", ["q_proj"])}),
}


def _trained(kind: str) -> Observer:
    """Observe the logits of a tiny base after two steps by a method."""

    def observed(values: Any, workspace: Workspace) -> Any:
        options = {**ROWS[kind].options, **values}
        method = config.load(Recipe, {"base": "x", "data": "y", "method": options}).method
        return logits(trained(placed(method, tiny.model().requires_grad_(False)), steps=2)).tolist()

    return observed


def _started(kind: str) -> Observer:
    """Observe the weights of a run that goes on from an Adapter of the method, or begins afresh."""

    def observed(values: Any, workspace: Workspace) -> Any:
        start = _adapter(kind, workspace) if values["start"] else ""
        return _tuned({"method": {**ROWS[kind].options, "start": str(start)}, "base": IN_FP32}, workspace)

    return observed


def _adapter(kind: str, workspace: Workspace) -> Path:
    """An Adapter of the method after one update, made once a session."""
    folder = _shared(workspace) / f"start-{kind}"
    if not folder.is_dir():
        changes = {"method": ROWS[kind].options, "base": IN_FP32, "budget": {"updates": 1}}
        workspace.patch.setattr("sartor.tune.trainer.plot_losses", lambda lines, file: file.touch())
        sartor.tune(_recipe(changes, workspace), folder, show=False)
    return folder


PROBES: tuple[Probe, ...] = tuple(
    probe._replace(repeats=False)
    for cls, (kind, values) in VALUES.items()
    for probe in (
        *probes_of(cls, _trained(kind), values),
        *probes_of(cls, _started(kind), {"start": ("", "an Adapter")}),
    )
)
