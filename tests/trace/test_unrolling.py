"""Unrolled scores are the derivatives by the rows' weights: of autograd on a toy, and of retrains on the tiny base."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from media_files import png
from sartor.core.artifacts import Artifact
from sartor.core.errors import ArtifactError
from sartor.trace import unrolling
from sartor.trace.attribution import Method
from sartor.trace.replay import Replay, _recorded_rates
from sartor.trace.replay_run import UpdateRecord
from sartor.trace.traced_adapter import TracedAdapter, TraceQuery
from sartor.trace.unrolling import Adjoint, reverse_update, unroll, unrolled_scores
from sartor.tune.optimizers import BETAS
from sartor.tune.recipe import ResolvedOptimizer
from tiny_towers import tiny_clip
from traced import curated, queries_of, tuned, without
from tune_option_probes import PAIRS, PLAIN, RATED

# The smoothest recipe of the tiny base that still learns: small steps, and updates of about 8 rows
SMOOTH = {"learning_rate": 3e-3, "batch_tokens": 256}
TARGETS = torch.tensor([[0.3, -1.2], [2.0, 0.7], [-0.4, 0.9]], dtype=torch.float64)
RATES = (0.05, 0.2, 0.1)


def shares(theta: torch.Tensor) -> torch.Tensor:
    """Losses (3,) of three rows at parameters (2,), not quadratic."""
    return ((theta - TARGETS).square().sum(1) + torch.sin(theta * TARGETS).sum(1)) / 3


def toy_updates(
    weights: torch.Tensor, settings: ResolvedOptimizer
) -> tuple[torch.Tensor, list[UpdateRecord], list[float]]:
    """Three updates under autograd: the last parameters, a record and the gradient's norm of each update."""
    theta = torch.tensor([0.5, -0.8], dtype=torch.float64, requires_grad=True)
    m = v = torch.zeros(2, dtype=torch.float64)
    records, norms = [], []
    for count, rate in enumerate(RATES, start=1):
        raw = torch.autograd.grad((weights * shares(theta)).sum(), theta, create_graph=True)[0]
        record = UpdateRecord(
            rows=(),
            parameters=[theta.detach()],
            gradients=[raw.detach()],
            moments=[m.detach()],
            second_moments=[v.detach()],
            steps=[count - 1],
            rates=[rate],
            random_state=None,  # type: ignore[arg-type]  # a toy draws nothing
        )
        records.append(record)
        norms.append(float(raw.detach().norm()))
        g = raw * torch.clamp(settings.clip_norm / (raw.norm() + 1e-6), max=1.0)
        m = BETAS[0] * m + (1 - BETAS[0]) * g
        v = BETAS[1] * v + (1 - BETAS[1]) * g**2
        step = m / (1 - BETAS[0] ** count) / ((v / (1 - BETAS[1] ** count)).sqrt() + settings.epsilon)
        theta = theta * (1 - rate * settings.weight_decay) - rate * step
    return theta, records, norms


def evaluate(parameters: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    theta = parameters[0].clone().requires_grad_(True)
    losses = shares(theta)
    return losses.detach(), [torch.autograd.grad(losses.sum(), theta)[0]]


def query_loss(theta: torch.Tensor) -> torch.Tensor:
    return (theta[0] - 1.5 * theta[1]).square() + torch.cos(theta[0])


@pytest.mark.parametrize("clip_norm", [1e9, 0.5, 1.4])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_slopes_are_those_of_autograd(clip_norm: float, weight_decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unrolling, "SMOOTHING", 0.0)
    settings = ResolvedOptimizer(clip_norm=clip_norm, weight_decay=weight_decay, epsilon=1e-3)
    weights = torch.ones(3, dtype=torch.float64, requires_grad=True)
    theta, records, norms = toy_updates(weights, settings)
    if clip_norm < 1e9:
        assert max(norms) > clip_norm
    if clip_norm == 1.4:
        assert min(norms) < clip_norm
    expected = torch.autograd.grad(query_loss(theta), weights)[0]
    end = theta.detach().requires_grad_(True)
    adjoint = Adjoint.of([torch.autograd.grad(query_loss(end), end)[0]])
    slopes = sum(reverse_update(record, adjoint, settings, evaluate) for record in reversed(records))
    torch.testing.assert_close(slopes, expected, rtol=1e-4, atol=1e-7)


def test_entry_without_gradient_stays_finite() -> None:
    """Its second moment is 0, and the derivative of a step 1 / eps: it gets none."""
    zero = torch.zeros(2)
    record = UpdateRecord((), [torch.ones(2)], [torch.tensor([0.0, 1.0])], [zero], [zero], [0], [0.1], None)  # type: ignore[arg-type]
    adjoint = Adjoint.of([torch.ones(2)])

    def rows(parameters: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return parameters[0].clone(), [torch.zeros(2)]

    slopes = reverse_update(record, adjoint, ResolvedOptimizer(), rows)
    assert bool(slopes.isfinite().all()) and float(slopes[0]) == 0.0
    assert all(bool(part[0].isfinite().all()) for part in (adjoint.moments, adjoint.second_moments))


def test_skipped_parameter_passes_its_derivative_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The factors of an alignment phase: no step, no decay, no moments; the projector's step depends on them."""
    monkeypatch.setattr(unrolling, "SMOOTHING", 0.0)
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    record = UpdateRecord((), [one, 2 * one], [None, one], [zero] * 2, [zero] * 2, [0, 0], [0.5, 0.5], None)  # type: ignore[arg-type]
    adjoint = Adjoint.of([3 * one, 0.25 * one])

    def rows(parameters: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return (parameters[0] * parameters[1]).clone(), [parameters[1].clone(), parameters[0].clone()]

    settings = ResolvedOptimizer(weight_decay=0.1, clip_norm=1e9)
    reverse_update(record, adjoint, settings, rows)
    assert float(adjoint.moments[0]) == float(adjoint.second_moments[0]) == 0.0
    assert float(adjoint.parameters[0]) == pytest.approx(3.0, abs=1e-5)
    assert float(adjoint.parameters[1]) == pytest.approx(0.25 * 0.95)


@pytest.fixture
def traced(tmp_path: Path, tune_recipe: dict[str, Any], fp32: None) -> TracedAdapter:
    return tuned(tune_recipe, tmp_path / "traced", optimizer=SMOOTH, budget={"epochs": 3})


def correlation(first: Any, second: Any) -> float:
    return float(np.corrcoef(np.ravel(first), np.ravel(second))[0, 1])


def measured_slopes(replay: Replay, queries: list[Any], rows: list[int], step: float = 0.05) -> np.ndarray[Any, Any]:
    """Rise of the losses by the fall of each row's weight, (queries, rows), from retrains at 1 +- step."""
    slopes = []
    for row in rows:
        losses = []
        for weight in (1 - step, 1 + step):
            weights = without(replay)
            weights[row] = weight
            losses.append(replay.losses(replay.retrain(weights), queries))
        slopes.append((losses[0] - losses[1]) / (2 * step))
    return np.stack(slopes, 1)


def test_scores_are_slopes_of_retrains(traced: TracedAdapter) -> None:
    replay, queries = Replay.open(traced), queries_of(traced, 2)
    rows = list(range(8))
    scores = unroll(replay, queries).scores[:, rows]
    assert correlation(scores, measured_slopes(replay, queries, rows)) > 0.9


def test_scores_predict_rows_left_out(traced: TracedAdapter) -> None:
    replay, queries = Replay.open(traced), queries_of(traced, 3)
    attribution = unroll(replay, queries)
    assert attribution.method is Method.UNROLLED and attribution.approximate == ""
    whole = replay.losses(replay.retrain(), queries)
    subsets = [[index, index + 10, index + 20] for index in range(10)]
    changes = [replay.losses(replay.retrain(without(replay, *subset)), queries) - whole for subset in subsets]
    predicted = [attribution.scores[:, subset].sum(1) for subset in subsets]
    assert correlation(predicted, changes) > 0.7


def test_states_between_stored_ones_are_recomputed(traced: TracedAdapter) -> None:
    replay, queries = Replay.open(traced), queries_of(traced, 2)
    whole, bounded = (unroll(replay, queries, max_state_bytes=limit) for limit in (1 << 30, 1))
    np.testing.assert_allclose(bounded.scores, whole.scores, rtol=1e-5, atol=1e-8)
    assert bounded.facts["stored_bytes"] < whole.facts["stored_bytes"]


def test_replies_of_one_kind_share_a_run_backwards(traced: TracedAdapter) -> None:
    queries = queries_of(traced, 3)
    alone, together = unrolled_scores(traced, queries), unrolled_scores(traced, queries, summed=True)
    assert together.scores.shape == (1, len(traced.rows))
    assert correlation(together.scores[0], alone.scores.sum(0)) > 0.99


def test_facts_state_cost_and_difference(traced: TracedAdapter) -> None:
    notices: list[str] = []
    facts = unrolled_scores(traced, queries_of(traced, 1), notice=notices.append).facts
    assert facts["updates"] == traced.manifest["run"]["updates"]
    assert facts["replay"]["nats"] == pytest.approx(0.0, abs=1e-5)
    assert facts["tunings"] > 1
    assert any("bytes beside the memory of tuning" in line for line in notices)


@pytest.mark.usefixtures("fp32")
@pytest.mark.parametrize(
    "changes",
    [
        {"method": {"rank": 4, "dropout": 0.1}},
        {"optimizer": {**SMOOTH, "clip_norm": 0.05, "weight_decay": 0.1}},
    ],
)
def test_dropout_clipping_and_decay_are_unrolled(
    tmp_path: Path, tune_recipe: dict[str, Any], changes: dict[str, Any]
) -> None:
    traced = tuned({**tune_recipe, "optimizer": SMOOTH}, tmp_path / "a", **changes)
    replay, queries, rows = Replay.open(traced), queries_of(traced, 2), list(range(6))
    scores = unroll(replay, queries).scores[:, rows]
    assert correlation(scores, measured_slopes(replay, queries, rows)) > 0.9


@pytest.mark.usefixtures("fp32")
@pytest.mark.parametrize(
    ("method", "least"), [({"kind": "miss", "rank": 4}, 0.9), ({"kind": "oft", "block_size": 8}, 0.6)]
)
def test_parameters_that_begin_at_zero_are_unrolled(
    tmp_path: Path, tune_recipe: dict[str, Any], method: dict[str, Any], least: float
) -> None:
    traced = tuned({**tune_recipe, "optimizer": SMOOTH}, tmp_path / "a", method=method)
    replay, queries, rows = Replay.open(traced), queries_of(traced, 2), list(range(12))
    scores = unroll(replay, queries).scores[:, rows]
    # entries that begin at 0 jump at a small change of a weight, so slopes are measured over a large one
    assert correlation(scores, measured_slopes(replay, queries, rows, step=0.2)) > least


@pytest.mark.usefixtures("fp32")
def test_scores_beyond_the_whole_reply_are_called_approximate(tmp_path: Path, tune_recipe: dict[str, Any]) -> None:
    assert unrolling._divergence(np.array([[3.0, -1.0], [0.1, 0.2]]), np.array([2.0, 5.0])) == ""
    reason = unrolling._divergence(np.array([[3.0, -1.0], [0.1, -400.0]]), np.array([2.0, 5.0]))
    assert "a row's score is 400.0 nats" in reason and "--calibrate" in reason


@pytest.mark.usefixtures("fp32")
def test_release_of_a_tuning_by_minutes_needs_the_adapters_log(tmp_path: Path, tune_recipe: dict[str, Any]) -> None:
    """Its learning rates followed the clock of the run, and a Release has no log."""
    budget = {"minutes": 0.05, "updates": None, "epochs": None}
    traced = tuned({**tune_recipe, "budget": budget}, tmp_path / "a")
    parent = {"kind": "adapter", "id": traced.artifact.id, "path": str(tmp_path / "a")}
    manifest = {**traced.artifact.manifest, "id": "r" * 64, "parents": [parent]}
    release = dataclasses.replace(traced, artifact=Artifact(tmp_path / "r", {**manifest, "kind": "release"}))
    object.__setattr__(release, "manifest", traced.manifest)
    object.__setattr__(release, "recipe", traced.recipe)
    assert _recorded_rates(release) == _recorded_rates(traced) != {}
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(ArtifactError, match="budget in minutes"):
        _recorded_rates(release)


@pytest.mark.usefixtures("fp32")
@pytest.mark.parametrize(("kind", "rows"), [("dpo", PAIRS), ("kto", RATED)])
def test_preferences_are_unrolled(tmp_path: Path, tune_recipe: dict[str, Any], kind: str, rows: list[Any]) -> None:
    """A pair, or a rated reply, is a row; the plain rows beside them are rows too."""
    changes = {"data": curated(tmp_path / "rows", [*rows, *PLAIN[:4]]), "objective": {"kind": kind}}
    traced = tuned({**tune_recipe, "optimizer": SMOOTH}, tmp_path / "a", **changes)
    replay = Replay.open(traced)
    queries = [traced.query("switch kitchen on", "on:kitchen")]
    indices = list(range(0, len(traced.rows), 2))
    scores = unroll(replay, queries).scores[:, indices]
    assert correlation(scores, measured_slopes(replay, queries, indices)) > 0.9


@pytest.mark.usefixtures("fp32")
def test_rows_with_images_are_unrolled(tmp_path: Path, tune_recipe: dict[str, Any], tiny_base: Path) -> None:
    """Of a composed base: the first updates align the projector alone, and their rows count through it."""
    tiny_clip(tmp_path / "clip")
    images = {f"{index}.png": png(20 + 30 * index) for index in range(6)}
    rows = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": name}]},
                {"role": "assistant", "content": f"picture {index}"},
            ]
        }
        for index, name in enumerate(images)
    ]
    traced = tuned(
        tune_recipe,
        tmp_path / "a",
        base={"text": str(tiny_base), "image": str(tmp_path / "clip")},
        data=curated(tmp_path / "rows", rows, 0.0, images),
        optimizer={"learning_rate": 1e-3, "batch_tokens": 256},
        budget={"updates": 6},
        align={"fraction": 0.5, "learning_rate": 1e-3},
    )
    replay = Replay.open(traced)
    assert 0 < len(replay.run.projectors) < len(replay.run.parameters)
    whole = replay.retrain()
    assert all(torch.equal(whole[name], value) for name, value in replay.adapter_parameters().items())
    example = traced.rows[0].example
    queries = [TraceQuery(example.prompt, example.reply)]
    scores = unroll(replay, queries).scores
    assert correlation(scores, measured_slopes(replay, queries, list(range(len(traced.rows))))) > 0.9
