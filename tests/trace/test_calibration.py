"""The measured trust of methods: the score itself, what is kept of retrains, and that they go on where they stopped."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from sartor.core.errors import ConfigError, StoppedError
from sartor.core.trace_store import trace_folder
from sartor.trace.attribution import Attribution, Method
from sartor.trace.calibration import (
    RUNS,
    calibrate,
    held_out_queries,
    leave_out_subsets,
    linear_datamodelling_scores,
)
from sartor.trace.measured_trust import CALIBRATION, measured_lds
from sartor.trace.replay import Replay
from sartor.trace.traced_adapter import TracedAdapter, open_traced
from traced import tuned


@pytest.fixture
def traced(tmp_path: Path, tune_recipe: dict[str, Any], fp32: None) -> TracedAdapter:
    return tuned(tune_recipe, tmp_path / "traced", budget={"updates": 4})


@pytest.fixture
def retrains(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of rows left out by each retrain so far."""
    counts: list[int] = []
    retrain = Replay.retrain

    def counted(replay: Replay, weights: Any = None, **options: Any) -> Any:
        counts.append(int((np.asarray(weights) == 0).sum()))
        return retrain(replay, weights, **options)

    monkeypatch.setattr(Replay, "retrain", counted)
    return counts


def by_position(queries: Any) -> Attribution:
    return Attribution(Method.RETRIEVAL, np.tile(np.arange(30.0), (len(queries), 1)))


SCORERS = {Method.RETRIEVAL: by_position}


def test_score_is_spearmans_correlation_of_sums() -> None:
    generator = np.random.default_rng(0)
    scores, changes = generator.normal(size=(3, 20)), generator.normal(size=(8, 3))
    subsets = leave_out_subsets(20, 8)
    expected = [
        spearmanr([scores[query, subset].sum() for subset in subsets], changes[:, query]).statistic
        for query in range(3)
    ]
    np.testing.assert_allclose(linear_datamodelling_scores(scores, subsets, changes), expected)


def test_exact_predictions_score_1_and_constant_ones_0() -> None:
    scores, subsets = np.random.default_rng(0).normal(size=(2, 20)), leave_out_subsets(20, 8)
    changes = np.stack([scores[:, subset].sum(1) for subset in subsets])
    np.testing.assert_allclose(linear_datamodelling_scores(scores, subsets, changes), 1.0)
    np.testing.assert_allclose(linear_datamodelling_scores(np.ones((2, 20)), subsets, changes), 0.0)


def test_more_runs_go_on_where_fewer_ended() -> None:
    assert leave_out_subsets(40, 9)[:5] == leave_out_subsets(40, 5)
    assert all(len(set(subset)) == 4 for subset in leave_out_subsets(40, 9))


def test_calibration_is_kept_for_its_owner(traced: TracedAdapter, retrains: list[int]) -> None:
    assert measured_lds(traced) == {}
    result = calibrate(traced, runs=5, scorers=SCORERS)
    assert retrains == [0, 3, 3, 3, 3, 3]
    assert result.changes.shape == (5, 10)
    trust = result.methods[Method.RETRIEVAL]
    assert measured_lds(traced) == {Method.RETRIEVAL: trust.lds}
    assert -1 <= trust.low <= trust.lds <= trust.high <= 1
    folder = trace_folder(traced.artifact.id)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.rglob("*")]}
    assert modes == {0o700, 0o600}
    assert traced.dataset.id in (folder / "origin.json").read_text()


def test_finished_retrains_are_not_repeated(traced: TracedAdapter, retrains: list[int]) -> None:
    queries = held_out_queries(traced, 2)
    first = calibrate(traced, queries, runs=5, scorers=SCORERS)
    again = calibrate(traced, queries, runs=6, scorers=SCORERS)
    assert len(retrains) == 7
    np.testing.assert_array_equal(again.changes[:5], first.changes)
    calibrate(traced, queries[:1], runs=5, scorers=SCORERS)
    assert len(retrains) == 13


def test_ctrl_c_keeps_the_finished_retrains(
    traced: TracedAdapter, retrains: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, counted = held_out_queries(traced, 2), Replay.retrain

    def stopped(replay: Replay, weights: Any = None, **options: Any) -> Any:
        if len(retrains) == 3:
            raise KeyboardInterrupt
        return counted(replay, weights, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Replay, "retrain", stopped)
        with pytest.raises(StoppedError, match="stopped after 3 of 6 retrains"):
            calibrate(traced, queries, runs=5, scorers=SCORERS)
    calibrate(traced, queries, runs=5, scorers=SCORERS)
    assert len(retrains) == 6


def test_damaged_retrain_is_made_again(traced: TracedAdapter) -> None:
    queries = held_out_queries(traced, 1)
    first = calibrate(traced, queries, runs=5, scorers=SCORERS)
    file = trace_folder(traced.artifact.id) / RUNS / "0002.json"
    file.write_text("{")
    again = calibrate(traced, queries, runs=5, scorers=SCORERS)
    assert (again.changes == first.changes).all() and json.loads(file.read_text())["losses"]
    lines = dict(again.table())
    assert lines["retrieval"].startswith("LDS ") and lines["retrains"].startswith("5 ")


def test_method_that_cannot_score_has_no_figure(traced: TracedAdapter) -> None:
    def refuses(queries: Any) -> Attribution:
        raise ConfigError("no sketches were made", "sartor trace --prepare")

    result = calibrate(traced, held_out_queries(traced, 1), runs=5, scorers={**SCORERS, Method.GRADIENT: refuses})
    assert result.methods[Method.GRADIENT].problem == "no sketches were made"
    assert set(measured_lds(traced)) == {Method.RETRIEVAL}
    fields = json.loads((trace_folder(traced.artifact.id) / CALIBRATION).read_text())
    assert fields["methods"]["gradient"] == {"problem": "no sketches were made"}


def test_all_methods_are_measured_by_default(traced: TracedAdapter) -> None:
    result = calibrate(traced, held_out_queries(traced, 2), runs=8)
    assert set(measured_lds(traced)) == set(Method)
    assert result.methods[Method.UNROLLED].lds > 0.3


def test_too_few_runs_are_refused(adapter: Path) -> None:
    with pytest.raises(ConfigError, match="at least 5"):
        calibrate(open_traced(adapter), runs=4)


def test_queries_are_held_out_rows(adapter: Path) -> None:
    traced = open_traced(adapter)
    trained = {row.example.reply for row in traced.rows}
    queries = held_out_queries(traced)
    assert len(queries) == 10
    assert not trained & {query.reply for query in queries}
