"""Sketches of rows' gradients: what they approximate, what they cost on disk, and that a run does not change by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sartor
from sartor.core import home
from sartor.core.artifacts import open_artifact
from sartor.core.errors import StoppedError
from sartor.core.filesystem import file_digest
from sartor.core.sketch_matrix import SketchMatrix
from sartor.models import packing
from sartor.models.losses.loss_backend import LossBackend, LossOptions
from sartor.models.losses.row_gradients import RowGradientObserver
from sartor.models.packing import TokenizedExample
from sartor.trace.traced_adapter import open_traced
from sartor.trace.traced_model import TracedModel
from sartor.tune import training_loop
from sartor.tune.gradient_features import RECORDED, GradientSketcher, SketchLayout, factor_moments

BACKENDS = ("fast", "general")


@pytest.fixture
def model(adapter: Path, fp32: None) -> TracedModel:
    return TracedModel.open(open_traced(adapter))


def rows_of(model: TracedModel, count: int = 6) -> list[TokenizedExample]:
    return [model.row(index)[0].tokens for index in range(count)]


def backend_of(model: TracedModel, name: str, *, share: bool = False) -> LossBackend:
    options = LossOptions(fast=name == "fast", share=share)
    backend = model.base.path(model.model, rows_of(model), options)
    assert backend.name == name
    return backend


def layout_of(model: TracedModel, row_bytes: int) -> SketchLayout:
    """A layout of the factors of every layer."""
    shapes = {name: tuple(factor.shape) for name, factor in model.factors.items()}
    return SketchLayout.of(shapes, seed=3, layers=0, row_bytes=row_bytes)


def observed(
    model: TracedModel, backend: LossBackend, rows: list[TokenizedExample], sketcher: GradientSketcher, **how: Any
) -> torch.Tensor:
    """The sketches (n, K) of rows from one backward pass of all of them."""
    for factor in model.factors.values():
        factor.requires_grad_(True)
    observer = RowGradientObserver(sketcher, **how)
    with observer.attached(backend):
        losses, _ = backend.losses(rows)
        losses.sum().backward()
    ids, sketches = observer.take()
    assert ids == [row.example_id for row in rows]
    return sketches


def gradients_by_autograd(model: TracedModel, rows: list[TokenizedExample]) -> list[dict[str, torch.Tensor]]:
    """The gradient of each factor for each row alone, by transformers' module without packing."""
    backend = model.base.path(model.model, rows, LossOptions(fast=False, share=False))
    result = []
    for row in rows:
        losses, _ = backend.losses([row])
        values = torch.autograd.grad(losses.sum(), list(model.factors.values()))
        result.append(dict(zip(model.factors, values, strict=True)))
    return result


@pytest.mark.parametrize("name", BACKENDS)
def test_unreduced_sketches_are_the_rows_gradients(model: TracedModel, name: str) -> None:
    """With room for every number, P and Q are identities and every token counts: the sketch is the gradient."""
    layout = layout_of(model, 10**7)
    rows, backend = rows_of(model), backend_of(model, name)
    sketches = observed(model, backend, rows, GradientSketcher(layout, model.factors), is_masked=False)
    for sketch, gradients in zip(sketches, gradients_by_autograd(model, rows), strict=True):
        for factor in layout.factors:
            torch.testing.assert_close(
                sketch[factor.place].view(factor.shape), gradients[factor.name], rtol=1e-3, atol=1e-5
            )


def test_sketch_products_approximate_gradient_products(model: TracedModel) -> None:
    layout = layout_of(model, 3_000)
    rows = rows_of(model)
    sketches = observed(
        model, backend_of(model, "fast"), rows, GradientSketcher(layout, model.factors), is_masked=False
    )
    true = torch.stack(
        [torch.cat([g[f.name].flatten() for f in layout.factors]) for g in gradients_by_autograd(model, rows)]
    )
    assert layout.size * 4 < true.shape[1], "the sketch is no reduction"
    cosines = [torch.nn.functional.normalize(part) for part in (sketches, true)]
    error = cosines[0] @ cosines[0].T - cosines[1] @ cosines[1].T
    assert float(error.abs().max()) < 0.3 and float(error.square().mean().sqrt()) < 0.15


def test_preconditioned_products_weigh_by_the_second_moment(model: TracedModel) -> None:
    """With v of rank one, the factored v is v itself, and products are those of gradients over sqrt(v)."""
    layout = layout_of(model, 10**7)
    rows = rows_of(model, 3)
    generator = torch.Generator().manual_seed(0)
    moments = {}
    for factor in layout.factors:
        row, column = (torch.rand(size, generator=generator) + 0.1 for size in factor.shape)
        moments[factor.name] = row[:, None] * column
    sketcher = GradientSketcher(layout, model.factors)
    sketcher.precondition(factor_moments(moments))
    sketches = observed(model, backend_of(model, "fast"), rows, sketcher, is_masked=False)
    true = torch.stack(
        [
            torch.cat([(g[f.name] * moments[f.name].pow(-0.25)).flatten() for f in layout.factors])
            for g in gradients_by_autograd(model, rows)
        ]
    )
    torch.testing.assert_close(sketches @ sketches.T, true @ true.T, rtol=1e-3, atol=1e-4)


def test_backends_agree_on_masked_sketches(model: TracedModel) -> None:
    layout, rows = layout_of(model, 3_000), rows_of(model)
    sketcher = GradientSketcher(layout, model.factors)
    fast, general = (observed(model, backend_of(model, name), rows, sketcher) for name in BACKENDS)
    torch.testing.assert_close(fast, general, rtol=1e-3, atol=1e-5)


def test_shared_prefixes_leave_rows_apart(model: TracedModel) -> None:
    """Rows begin alike, and their replies differ: computed together, each has its own sketch."""
    layout, rows = layout_of(model, 3_000), sorted(rows_of(model), key=lambda row: row.ids)
    sketcher = GradientSketcher(layout, model.factors)
    backend = backend_of(model, "fast", share=True)
    assert packing.pack(rows, share=True).tokens < sum(len(row.ids) for row in rows)
    shared = observed(model, backend, rows, sketcher)
    alone = observed(model, backend_of(model, "fast"), rows, sketcher)
    torch.testing.assert_close(shared, alone, rtol=1e-3, atol=1e-5)


def test_masked_tokens_have_no_influence(model: TracedModel) -> None:
    """A row without a supervised token has no gradient, and what another row's tokens do is not counted as its own."""
    layout, rows = layout_of(model, 3_000), rows_of(model, 3)
    sketcher = GradientSketcher(layout, model.factors)
    silent = TokenizedExample(rows[1].ids, [False] * len(rows[1].ids), "silent")
    sketches = observed(model, backend_of(model, "fast"), [rows[0], silent, rows[2]], sketcher)
    alone = observed(model, backend_of(model, "fast"), [rows[0], rows[2]], sketcher)
    assert not sketches[1].any()
    torch.testing.assert_close(sketches[[0, 2]], alone)


def test_layout_of_the_starter_is_small() -> None:
    """30 layers of seven modules at rank 16, as the starter has: the upper two thirds in at most 30 KB a row."""
    widths = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576)}
    widths |= {"gate": (1536, 576), "up": (1536, 576), "down": (576, 1536)}
    shapes = {}
    for layer in range(30):
        for name, (out, width) in widths.items():
            shapes[f"model.layers.{layer}.{name}.lora_A.default.weight"] = (16, width)
            shapes[f"model.layers.{layer}.{name}.lora_B.default.weight"] = (out, 16)
    layout = SketchLayout.of(shapes, seed=0, layers=30)
    assert list(layout.layers) == list(range(10, 30))
    assert 20_000 < 2 * layout.size <= 27_000
    assert SketchLayout.from_json(layout.as_json()) == layout


def test_signs_repeat_from_the_seed(model: TracedModel) -> None:
    layout = layout_of(model, 3_000)
    factor = layout.factors[0]
    assert torch.equal(factor.signs(1, 0), factor.signs(1, 0)) and not torch.equal(
        factor.signs(1, 0), factor.signs(2, 0)
    )


def test_matrix_keeps_small_numbers_and_knows_its_rows(tmp_path: Path) -> None:
    matrix = SketchMatrix.create(tmp_path / "m", ["a", "b", "c"], 4, {"label": "x"})
    values = np.array([[1e-12, -2e-12, 0, 5e-13], [3e4, 1, 0, -2]], np.float32)
    matrix.write([0, 2], values)
    matrix.flush()
    opened = SketchMatrix.open(tmp_path / "m")
    assert opened is not None and opened.written().tolist() == [True, False, True]
    np.testing.assert_allclose(opened.read([0, 2]), values, rtol=1e-3, atol=1e-15)
    opened.add([1], values[:1])
    opened.add([1], values[:1])
    np.testing.assert_allclose(opened.read([1])[0], 2 * values[0], rtol=2e-3)
    other = SketchMatrix.create(tmp_path / "m", ["a", "b", "d"], 4, {"label": "x"})
    assert not other.written().any(), "rows changed, so nothing is kept"


def test_recording_changes_no_bit_of_the_adapter(tune_recipe: dict[str, Any], tmp_path: Path) -> None:
    out = [tmp_path / "plain", tmp_path / "recorded"]
    sartor.tune(tune_recipe, out[0], show=False)
    sartor.tune({**tune_recipe, "trace": {"features": True}}, out[1], show=False)
    digests = [file_digest(path / "adapter_model.safetensors") for path in out]
    assert digests[0] == digests[1]
    folder = home.home() / "trace" / open_artifact(out[1]).id
    matrix = SketchMatrix.open(folder / RECORDED)
    assert matrix is not None and matrix.written().all()
    traced = open_traced(out[1])
    assert {row.example.id for row in traced.rows} <= set(matrix.ids)
    assert sorted(path.name for path in folder.iterdir()) == ["origin.json", "recorded", "state-1", "state-2"]
    assert not list((home.home() / "trace").glob(".recording-*"))
    modes = {path.stat().st_mode & 0o077 for path in [folder, *folder.rglob("*")]}
    assert modes == {0}


def test_recording_goes_on_after_a_stop(
    tune_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped and resumed run records what an uninterrupted one does; a visit that is repeated counts once."""
    recipe = {**tune_recipe, "trace": {"features": True}, "checkpoints": {"every_minutes": 0.0}}
    sartor.tune(recipe, tmp_path / "whole", show=False)
    real_save, saved = training_loop.TrainingRun.save, []

    def save(run: training_loop.TrainingRun) -> None:
        if len(saved) == 2:  # killed one update after the last save
            raise StoppedError("killed", "resume", 15)
        saved.append(run.counters.updates)
        real_save(run)

    monkeypatch.setattr(training_loop.TrainingRun, "save", save)
    with pytest.raises(StoppedError):
        sartor.tune(recipe, tmp_path / "stopped", show=False)
    monkeypatch.setattr(training_loop.TrainingRun, "save", real_save)
    sartor.tune(recipe, tmp_path / "stopped", resume=True, show=False)
    found = []
    for name in ("whole", "stopped"):
        matrix = SketchMatrix.open(home.home() / "trace" / open_artifact(tmp_path / name).id / RECORDED)
        assert matrix is not None
        found.append(matrix.read(slice(None)))
    likeness = (found[0] * found[1]).sum(1) / np.linalg.norm(found[0], axis=1) / np.linalg.norm(found[1], axis=1)
    assert float(likeness.min()) > 0.99
