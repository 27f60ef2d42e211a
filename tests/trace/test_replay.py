"""A tuning is repeated to its bits, rows are left out by weight alone, and what cannot be repeated is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sample_data import ROWS
from sartor.core.errors import ArtifactError, ConfigError, RequestError
from sartor.models import adapters
from sartor.models.base import open_base
from sartor.trace import replay as replay_module
from sartor.trace.replay import MAX_DIFFERENCE_NATS, Replay, ReplayDifference
from sartor.trace.replay_run import ReplayRun
from sartor.trace.traced_adapter import TracedAdapter, open_traced
from sartor.trace.traced_model import TracedModel
from sartor.tune.checkpoint_selection import CheckpointSelection
from traced import curated, queries_of, tuned, without
from tune_option_probes import PAIRS, PLAIN, RATED

Parameters = dict[str, torch.Tensor]


def is_same(first: Parameters, second: Parameters) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def traced(tmp_path: Path, tune_recipe: dict[str, Any], fp32: None) -> TracedAdapter:
    return tuned(tune_recipe, tmp_path / "traced")


CHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one token a micro-batch": {"compute": {"micro_batch_tokens": 1}},
    "clipped, with decay": {
        "optimizer": {"learning_rate": 1e-2, "batch_tokens": 128, "clip_norm": 0.1, "weight_decay": 0.1}
    },
    "constant rate, by updates": {
        "budget": {"updates": 5},
        "optimizer": {"learning_rate": 1e-2, "schedule": "constant", "warmup_fraction": 0.5},
    },
    "dropout": {"method": {"rank": 4, "dropout": 0.2}},
    "by minutes": {"budget": {"minutes": 0.005}},
}


@pytest.mark.usefixtures("fp32")
@pytest.mark.parametrize("name", CHANGES)
def test_replay_ends_at_the_bits_of_the_adapter(tmp_path: Path, tune_recipe: dict[str, Any], name: str) -> None:
    replay = Replay.open(tuned(tune_recipe, tmp_path / "a", **CHANGES[name]))
    repeated = replay.retrain()
    assert is_same(repeated, replay.adapter_parameters())
    assert is_same(repeated, replay.retrain())


@pytest.mark.usefixtures("fp32")
@pytest.mark.parametrize("loss", ["cross_entropy", "kl"])
def test_rehearsal_and_start_are_repeated(tmp_path: Path, tune_recipe: dict[str, Any], loss: str) -> None:
    tuned(tune_recipe, tmp_path / "start")
    rehearsal = {"path": curated(tmp_path / "talk", PLAIN[:6], 0.0), "fraction": 0.4, "loss": loss, "weight": 3.0}
    data = {**tune_recipe["data"], "rehearsal": rehearsal}
    method = {**tune_recipe["method"], "start": str(tmp_path / "start")}
    traced = tuned(tune_recipe, tmp_path / "a", data=data, method=method)
    assert sum(row.is_rehearsal for row in traced.rows) == 6
    replay = Replay.open(traced)
    repeated = replay.retrain()
    assert is_same(repeated, replay.adapter_parameters())
    assert [row.example_id for row in replay.rows] == [row.example.id for row in traced.rows]
    rehearsed = [index for index, row in enumerate(traced.rows) if row.is_rehearsal]
    assert not is_same(repeated, replay.retrain(without(replay, *rehearsed)))
    model = TracedModel.open(traced)
    for index, row in enumerate(traced.rows):
        [sequence] = model.row(index)
        assert (sequence.tokens.soft is not None) == (row.is_rehearsal and loss == "kl")
        assert sequence.tokens.weight == (replay.data.rehearsal_factor if row.is_rehearsal else 1.0)


@pytest.mark.usefixtures("fp32")
def test_best_weights_are_those_of_their_update(
    tmp_path: Path, tune_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The replies are right at the first of two evaluations only, so the Adapter has the weights of that update."""
    monkeypatch.setattr(
        CheckpointSelection,
        "score_replies",
        lambda selection, model: [float(not selection.candidates)] * len(selection.rows),
    )
    traced = tuned(tune_recipe, tmp_path / "a", weights="best", evaluations=2)
    run = traced.manifest["run"]
    assert run["selection"]["update"] < run["updates"]
    replay = Replay.open(traced)
    assert is_same(replay.retrain(), replay.adapter_parameters())
    assert replay.run.counters.updates == run["selection"]["update"]


@pytest.mark.usefixtures("fp32")
@pytest.mark.parametrize(("kind", "rows"), [("dpo", PAIRS), ("kto", RATED), ("kto", PAIRS), ("simpo", PAIRS)])
def test_preference_run_is_repeated(tmp_path: Path, tune_recipe: dict[str, Any], kind: str, rows: list[Any]) -> None:
    changes = {"data": curated(tmp_path / "rows", [*rows, *PLAIN[:4]]), "objective": {"kind": kind}}
    replay = Replay.open(tuned(tune_recipe, tmp_path / "a", **changes))
    repeated = replay.retrain()
    assert is_same(repeated, replay.adapter_parameters())
    left_out = replay.retrain(without(replay, 0))
    assert not is_same(repeated, left_out)


def test_rows_add_up_to_the_gradient_of_an_update(traced: TracedAdapter) -> None:
    """With the divisor of the whole update: a row's weight changes its own part alone."""
    replay = Replay.open(traced)
    rows = list(replay.data.train[:4])
    indices = [replay.traced.indices[row.example_id] for row in rows]
    others = [index for index in range(len(replay.rows)) if index not in indices]

    def gradient(*left_out: int) -> torch.Tensor:
        run = replay.restart(without(replay, *left_out))
        run._backward(rows)
        result = torch.cat([parameter.grad.flatten() for parameter in run.parameters])
        run.optimizer.zero_grad(set_to_none=True)
        return result

    whole = gradient()
    alone = [gradient(*others, *(index for index in indices if index != kept)) for kept in indices]
    assert all(bool(part.any()) for part in alone)
    torch.testing.assert_close(torch.stack(alone).sum(0), whole, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient(indices[1]), whole - alone[1], rtol=1e-4, atol=1e-6)


def test_left_out_rows_leave_order_and_updates(traced: TracedAdapter) -> None:
    replay = Replay.open(traced)
    whole = replay.retrain()
    updates, tokens = replay.run.counters.updates, replay.run.counters.tokens
    left_out = replay.retrain(without(replay, 3, 4))
    assert (replay.run.counters.updates, replay.run.counters.tokens) == (updates, tokens)
    assert not is_same(whole, left_out)
    assert is_same(whole, replay.retrain())


def test_another_seed_and_back(traced: TracedAdapter) -> None:
    replay = Replay.open(traced)
    whole, other = replay.retrain(), replay.retrain(seed=7)
    assert not is_same(whole, other)
    assert is_same(other, replay.retrain(seed=7))
    for seed, expected in ((9, None), (7, other), (9, None)):
        fresh = Replay.open(traced).retrain(without(replay, 3), seed=seed)
        assert is_same(fresh, replay.retrain(without(replay, 3), seed=seed))
        assert expected is None or is_same(expected, replay.retrain(seed=seed))
    assert is_same(whole, replay.retrain())


@pytest.mark.usefixtures("fp32")
@pytest.mark.parametrize("name", ["plain", "dropout", "by minutes", "rehearsal", "pairs", "few states"])
def test_a_retrain_makes_the_shared_updates_once(
    tmp_path: Path, tune_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """It ends at the bits of one that makes all updates, whatever rows the earlier ones left out."""
    changes = CHANGES.get(name, {})
    if name == "rehearsal":
        rehearsal = {"path": curated(tmp_path / "talk", PLAIN[:6], 0.0), "fraction": 0.4, "loss": "kl"}
        changes = {"data": {**tune_recipe["data"], "rehearsal": rehearsal}}
    elif name == "pairs":
        changes = {"data": curated(tmp_path / "rows", [*PAIRS, *PLAIN[:4]]), "objective": {"kind": "dpo"}}
    elif name == "few states":
        monkeypatch.setattr(replay_module, "_MOST_STATES", 2)
    traced = tuned({**tune_recipe, "optimizer": {"batch_tokens": 96}}, tmp_path / "a", **changes)
    updates = []
    update = ReplayRun._update
    monkeypatch.setattr(ReplayRun, "_update", lambda run, rows: updates.append(rows) or update(run, rows))

    def updates_of(replay: Replay, *rows: int) -> tuple[int, Parameters]:
        updates.clear()
        parameters = replay.retrain(without(replay, *rows))
        return len(updates), parameters

    shared = Replay.open(traced)
    first = updates_of(shared, 1)  # without a row from the beginning on
    counts = []
    for rows in [(2,), (0, 3), (), ()]:
        whole, expected = updates_of(Replay.open(traced), *rows)
        count, parameters = updates_of(shared, *rows)
        assert is_same(parameters, expected) and count <= whole == first[0]
        counts.append(count)
    assert counts[-1] <= max(1, first[0] / 2)  # a budget in minutes may end after one update


def test_a_state_that_is_too_large_is_not_kept(traced: TracedAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay_module, "_STATES_BYTES", 1)
    replay = Replay.open(traced)
    assert is_same(replay.retrain(), replay.retrain()) and replay.run.beginning is None


def test_losses_are_those_of_transformers(traced: TracedAdapter, tiny_base: Path) -> None:
    replay, queries = Replay.open(traced), queries_of(traced)
    losses = replay.losses(replay.adapter_parameters(), queries)
    base = open_base(str(tiny_base), bits=32)
    model = adapters.open_adapter(base.model, traced.artifact.path)
    for query, loss in zip(queries, losses, strict=True):
        prompt = base.chat.tokenizer.apply_chat_template(
            [{"role": turn.role, "content": turn.text} for turn in query.prompt],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
        reply = base.chat.tokenizer(query.reply + "<|im_end|>")["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *reply]])).logits[0, len(prompt) - 1 : -1]
        assert loss == pytest.approx(float(F.cross_entropy(logits, torch.tensor(reply), reduction="sum")), abs=1e-3)


def test_bf16_run_is_repeated_in_fp32_and_compared(tmp_path: Path, tune_recipe: dict[str, Any]) -> None:
    notices: list[str] = []
    traced = tuned(tune_recipe, tmp_path / "a", base={"name": tune_recipe["base"], "bits": 16})
    replay = Replay.open(traced, notice=notices.append)
    assert any("bfloat16" in line and "fp32" in line for line in notices)
    assert replay.base.dtype == torch.float32
    difference = replay.difference(replay.retrain(), queries_of(traced))
    assert 0 < difference.nats < 1
    assert difference.as_json()["recorded_dtype"] == "bfloat16"


def test_difference_above_the_limit_is_approximate() -> None:
    near = ReplayDifference((1.0, 2.0), (1.0, 2.0 + MAX_DIFFERENCE_NATS / 2), "bfloat16")
    far = ReplayDifference((1.0, 2.0), (1.0, 2.0 + 2 * MAX_DIFFERENCE_NATS), "bfloat16")
    assert near.approximate == ""
    assert "bfloat16" in far.approximate and "0.0400 nats" in far.approximate
    unlike = ReplayDifference((1.0,), (4.0,), "float32")
    assert "not repeated exactly" in unlike.approximate and "--method gradient" in unlike.approximate


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        ({"personal": {}}, "personal"),
        ({"updates": 3}, "no run.micro_batch_tokens"),
    ],
)
def test_tuning_that_cannot_be_repeated_is_named(adapter: Path, run: dict[str, Any], reason: str) -> None:
    traced = open_traced(adapter)
    traced.artifact.manifest["run"] = run
    with pytest.raises(ConfigError, match=reason) as refusal:
        Replay.open(traced)
    assert "gradient" in refusal.value.remedy and "retrieval" in refusal.value.remedy


def test_other_rows_than_the_recorded_are_refused(adapter: Path) -> None:
    traced = open_traced(adapter)
    traced.artifact.manifest["fingerprint"]["rows"] = "0" * 64
    with pytest.raises(ArtifactError, match="rows: digest 0000"):
        Replay.open(traced)


def test_reply_beyond_the_context_is_refused(traced: TracedAdapter) -> None:
    replay = Replay.open(traced)
    with pytest.raises(RequestError, match="the base has 512"):
        replay.encode(traced.query("switch on", "on " * 600))


def test_weights_of_another_length_are_refused(traced: TracedAdapter) -> None:
    replay = Replay.open(traced)
    with pytest.raises(ConfigError, match="weights has the shape"):
        replay.retrain(np.ones(len(ROWS) + 1))
