"""Scores by gradients: preparation that can be killed, refusals, aggregation, and the ensemble's weights."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sartor
from sample_data import write_jsonl
from sartor.core import trace_store
from sartor.core.errors import ArtifactError, ConfigError, RequestError, StoppedError
from sartor.core.sketch_matrix import SketchMatrix
from sartor.trace import ensemble, gradient
from sartor.trace import prepare as preparation
from sartor.trace.gradient import gradient_scores, standardised
from sartor.trace.traced_adapter import TracedAdapter, TraceQuery, dataset_rows, open_traced
from sartor.trace.traced_model import TracedModel

pytestmark = pytest.mark.usefixtures("fp32")


@pytest.fixture
def traced(adapter: Path) -> TracedAdapter:
    return open_traced(adapter)


def own_query(traced: TracedAdapter, index: int) -> TraceQuery:
    """A training row's own prompt and reply."""
    *prompt, reply = traced.rows[index].example.messages
    return TraceQuery(tuple(prompt), reply.text)


def folder_of(traced: TracedAdapter) -> Path:
    return trace_store.trace_folder(trace_store.adapter_id(traced.artifact))


def test_a_row_explains_its_own_reply_best(traced: TracedAdapter) -> None:
    queries = [own_query(traced, index) for index in (0, 7, 11)]
    result = gradient_scores(traced, queries)
    assert result.scores.shape == (3, len(traced.rows)) and np.isfinite(result.scores).all()
    assert result.scores.argmax(1).tolist() == [0, 7, 11]
    assert result.facts["sketches"] == ["final"] and result.facts["row_bytes"]["final"] <= 30_000


def test_cosines_do_not_depend_on_a_rows_size() -> None:
    """Cosines: a row that is learnt with twice the weight has the same score."""
    matrix_rows = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    query = np.random.default_rng(1).normal(size=(1, 8)).astype(np.float32)
    scaled = matrix_rows * np.array([[1], [2], [1], [9], [1]], np.float32)
    products = [gradient.normalized(query) @ gradient.normalized(rows).T for rows in (matrix_rows, scaled)]
    np.testing.assert_allclose(*products, rtol=1e-5)


def test_prepare_goes_on_where_it_was_killed(traced: TracedAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "CHUNK_ROWS", 8)
    real, computed = TracedModel.sketches, []

    def sketches(model: TracedModel, items: Any, sketcher: Any) -> Any:
        if len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(len(items))
        return real(model, items, sketcher)

    monkeypatch.setattr(TracedModel, "sketches", sketches)
    with pytest.raises(StoppedError, match="final has 16 of"):
        preparation.prepare(traced)
    monkeypatch.setattr(TracedModel, "sketches", real)
    lines: list[str] = []
    made = preparation.prepare(traced, notice=lines.append)
    assert any(f"going on with the last {len(traced.rows) - 16} of" in line for line in lines)
    (estimate,) = [line for line in lines if "passes over them" in line]
    assert estimate.endswith(" s on the machine of the tuning"), "the time is said beforehand, for any kind of budget"
    killed = SketchMatrix.open(folder_of(traced) / "final")
    assert killed is not None and killed.written().all()
    preparation.prepare(traced, notice=lines.append)
    assert "passes" not in lines[-1], "nothing is computed"
    values = killed.read(slice(None))
    (folder_of(traced) / "final" / "header.json").unlink()
    preparation.prepare(traced, labels=["final"])
    whole = SketchMatrix.open(folder_of(traced) / "final")
    assert whole is not None
    np.testing.assert_allclose(values, whole.read(slice(None)), rtol=1e-2, atol=1e-4 * np.abs(values).max())
    assert made.labels == ("final", "hidden") and all(size <= 30_000 for size in made.row_bytes.values())


def test_prepared_files_are_for_their_owner_alone(traced: TracedAdapter) -> None:
    preparation.prepare(traced)
    paths = [folder_of(traced), *folder_of(traced).rglob("*")]
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {0o700, 0o600}
    origin = json.loads((folder_of(traced) / "origin.json").read_text())
    assert traced.dataset.id in origin["datasets"]


def test_states_of_the_run_are_sketched(tune_recipe: dict[str, Any], tmp_path: Path) -> None:
    """A run that kept its factors at a third and two thirds is sketched at those weights too."""
    sartor.tune({**tune_recipe, "trace": {"features": True}}, tmp_path / "a", show=False)
    traced = open_traced(tmp_path / "a")
    recorded = gradient_scores(traced, [own_query(traced, 3)])
    assert recorded.facts["sketches"] == ["recorded"], "what the run recorded is enough"
    assert (recorded.scores[0] > recorded.scores[0, 3]).sum() < 5, "at the last weights, a sum over all weights"
    assert preparation.prepare(traced, labels=["final", *preparation.STATES]).labels == ("final", "state-1", "state-2")
    prepared = gradient_scores(traced, [own_query(traced, 3)])
    assert (
        prepared.facts["sketches"] == ["final", "state-1", "state-2", "recorded"] and prepared.scores[0].argmax() == 3
    )


def test_many_rows_are_refused_until_prepared(traced: TracedAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient, "MAX_UNPREPARED_ROWS", 10)
    with pytest.raises(ConfigError) as refusal:
        gradient_scores(traced, [own_query(traced, 0)])
    assert refusal.value.remedy == f"sartor trace {traced.artifact.path} --prepare"
    named = dataset_rows(traced.artifact, traced.dataset)
    with pytest.raises(ConfigError) as refusal:
        gradient_scores(named, [own_query(named, 0)])
    assert refusal.value.remedy == f"sartor trace {traced.artifact.path} --data {traced.dataset.path} --prepare"
    preparation.prepare(traced, labels=["final"])
    assert gradient_scores(traced, [own_query(traced, 0)]).scores[0].argmax() == 0


def test_reply_longer_than_the_context_is_refused(traced: TracedAdapter) -> None:
    with pytest.raises(RequestError, match="the base has 512"):
        gradient_scores(traced, [traced.query("switch hall on", "on:hall " * 400)])


def test_a_pairs_gradient_is_that_of_both_replies(tiny_base: Path, tmp_path: Path) -> None:
    """The gradient of the preferred reply, minus that of the rejected one."""
    pairs = [
        {"prompt": f"switch {place} {word}", "chosen": f"{word}:{place}", "rejected": f"{place}, {word}"}
        for word in ("on", "off")
        for place in ("kitchen", "hall", "attic", "garage", "patio")
    ]
    source = {"path": str(write_jsonl(tmp_path / "pairs.jsonl", pairs)), "licence": "CC-BY-4.0"}
    sartor.curate({"sources": [source], "split": {"eval_fraction": 0.0}, "workers": 1}, tmp_path / "pairs")
    recipe = {
        "base": str(tiny_base),
        "data": {"path": str(tmp_path / "pairs"), "eval_fraction": 0.0},
        "method": {"rank": 4},
        "objective": "dpo",
        "budget": {"updates": 3},
        "optimizer": {"learning_rate": 1e-2, "batch_tokens": 128},
        "trace": {"features": True},
    }
    sartor.tune(recipe, tmp_path / "a", show=False)
    model = TracedModel.open(open_traced(tmp_path / "a"))
    chosen, rejected = model.row(0)
    assert (chosen.sign, rejected.sign) == (1.0, -1.0)
    both, preferred, other = model.sketches([[chosen, rejected], [chosen], [rejected]], model.sketcher({}))
    np.testing.assert_allclose(both, preferred + other, rtol=1e-3, atol=1e-4 * np.abs(both).max())
    assert np.abs(other).max() > 0
    preparation.prepare(model.traced, labels=["final"])
    assert np.isfinite(gradient_scores(model.traced, [own_query(model.traced, 0)]).scores).all()


def test_adapter_without_a_recipe_is_scored_at_its_weights(traced: TracedAdapter) -> None:
    """Tuned elsewhere: order and states are unknown, and its final weights have gradients all the same."""
    manifest = {key: value for key, value in traced.manifest.items() if key not in ("recipe", "run")}
    traced.manifest.clear()
    traced.manifest.update(manifest)
    result = gradient_scores(traced, [own_query(traced, 2)])
    assert result.scores[0].argmax() == 2


def test_standardised_parts_weigh_the_same() -> None:
    """A part of large numbers decides no more than one of small numbers."""
    parts = np.array([[[1.0, 2.0, 3.0, 4.0]], [[4e6, 3e6, 2e6, 1e6]], [[0.1, 0.2, 0.3, 0.4]]])
    scores = standardised(parts).mean(0)
    assert scores.shape == (1, 4) and np.argsort(scores[0]).tolist() == [0, 1, 2, 3]
    assert not standardised(np.zeros((2, 1, 4))).any(), "equal values tell nothing"


def test_mean_normal_scores_rank_within_each_part() -> None:
    parts = np.array([[[1.0, 2.0, 3.0, 4.0]], [[4e6, 3e6, 2e6, 1e6]], [[0.1, 0.2, 0.3, 0.4]]])
    scores = ensemble.mean_normal_scores(parts)
    assert scores.shape == (1, 4) and np.argsort(scores[0]).tolist() == [0, 1, 2, 3]
    assert not ensemble.mean_normal_scores(np.zeros((2, 1, 4))).any(), "equal values have equal ranks"


def test_a_row_that_stands_out_in_one_part_is_found() -> None:
    """Ranks would put a row that is well placed in both parts before it; its score is finite among many rows too."""
    rng = np.random.default_rng(0)
    parts = {name: rng.normal(size=(1, 4_000_000)) for name in ensemble.PARTS}
    parts["hidden_states"][0, 7] = 4e4
    for name in ensemble.PARTS:
        parts[name][0, 9] = 4.0
    scores = ensemble.combine(parts, ensemble.PACKAGED)
    assert scores[0].argmax() == 7 and np.isfinite(scores).all()


def test_ensemble_weights_are_fitted_on_plants() -> None:
    """Of two parts one finds the planted rows; it gets most of the weight. Where both do, they are equal."""
    rng = np.random.default_rng(0)
    true_rows = list(range(12))
    parts = {name: rng.normal(size=(12, 200)) for name in ensemble.PARTS}
    parts["hidden_states"][true_rows, true_rows] += 6
    weights = ensemble.fit_weights(parts, true_rows, origin="planted here")
    assert weights.hidden_states >= 0.5 and weights.planted == 12 and sum(weights.values) == pytest.approx(1)
    assert ensemble.ranks_of(ensemble.combine(parts, weights), true_rows).max() <= 3
    parts["gradient"][true_rows, true_rows] += 6
    assert ensemble.fit_weights(parts, true_rows, origin="planted here").values == (0.5, 0.5)
    with pytest.raises(ConfigError, match="no planted row"):
        ensemble.fit_weights(parts, [], origin="none")


def test_ensemble_finds_a_rows_own_reply(traced: TracedAdapter) -> None:
    result = ensemble.ensemble_scores(traced, [own_query(traced, 5)])
    assert result.scores[0].argmax() == 5 and result.facts["ensemble"]["origin"]


def test_damaged_sketches_are_named(traced: TracedAdapter) -> None:
    preparation.prepare(traced, labels=["final"])
    (folder_of(traced) / "final" / "ids.txt").write_text("other\n")
    with pytest.raises(ArtifactError, match="are damaged"):
        gradient_scores(traced, [own_query(traced, 0)])


def test_verb_ranks_by_the_ensemble_where_states_are(tune_recipe: dict[str, Any], tmp_path: Path) -> None:
    """What a run recorded ranks alone, and the result says so; prepared hidden states join it."""
    sartor.tune({**tune_recipe, "trace": {"features": True}}, tmp_path / "a", show=False)
    asked = own_query(open_traced(tmp_path / "a"), 3)
    words = {"prompt": asked.prompt[-1].text, "reply": asked.reply, "method": "gradient", "likelihood": False}
    alone = sartor.trace(tmp_path / "a", **words)
    assert alone.facts["ensemble"] is None and f"{tmp_path / 'a'} --prepare" in alone.notes[0]
    plain = gradient_scores(alone.traced, [asked])
    assert alone.examples[0].score == ensemble.combine({"gradient": plain.scores}, ensemble.GRADIENT_ALONE).max()
    sartor.prepare_trace(tmp_path / "a")
    joined = sartor.trace(tmp_path / "a", **words)
    said = joined.as_json()["facts"]
    assert said["ensemble"]["origin"] == ensemble.PACKAGED.origin and joined.notes == []
    assert sum(said["ensemble"][name] for name in ensemble.PARTS) == pytest.approx(1)
    assert joined.examples[0].row.example.id == joined.traced.ids[3]


def test_what_is_missing_beside_sketches_is_named(traced: TracedAdapter) -> None:
    """Moments precondition rows and replies alike; a mapped file that is too short would be filled up with zeros."""
    preparation.prepare(traced, labels=["final"])
    folder = folder_of(traced) / "final"
    content = (folder / "moments.safetensors").read_bytes()
    (folder / "moments.safetensors").unlink()
    with pytest.raises(ArtifactError, match="moments.safetensors is gone"):
        gradient_scores(traced, [traced.query("switch hall on", "on:hall")])
    (folder / "moments.safetensors").write_bytes(content[:-8])
    with pytest.raises(ArtifactError, match="moments.safetensors is damaged"):
        gradient_scores(traced, [traced.query("switch hall on", "on:hall")])
    (folder / "moments.safetensors").write_bytes(content)
    (folder / "sketches.f16").write_bytes((folder / "sketches.f16").read_bytes()[:100])
    with pytest.raises(ArtifactError, match=r"sketches.f16 has 100 bytes of"):
        gradient_scores(traced, [traced.query("switch hall on", "on:hall")])
