"""The weights of the best evaluation: chosen beyond chance alone, kept through a kill, and said."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import loras
import sartor
from killed_tuning import SETTINGS, WEIGHTS, killed, tune
from sartor.core import evaluation_ledger
from sartor.core.artifacts import open_artifact, read_manifest
from sartor.core.errors import ArtifactError, ConfigError
from sartor.core.records import Message
from sartor.evaluate.evaluation import evaluate
from sartor.inference.engine import Sampling
from sartor.inference.generate import generate
from sartor.models import adapters
from sartor.models.base import open_base
from sartor.models.packing import TokenizedExample
from sartor.models.tuned_model import open_tuned
from sartor.tune.checkpoint_selection import (
    LEVEL,
    CheckpointScore,
    CheckpointSelection,
    last_reply,
    natural_metric,
    reply_batches,
    sign_test_p_value,
)


def selection(*scores: list[float]) -> CheckpointSelection:
    """Evaluations after updates 10, 20, ... with these scores."""
    rows = [TokenizedExample([5, 6, 7], [False, False, True])]
    chosen: Any = None
    result = CheckpointSelection(chosen, rows, [str(row) for row in range(len(scores[0]))])
    for index, row_scores in enumerate(scores, 1):
        result.add(CheckpointScore(10 * index, 1.0, row_scores), {})
    return result


def test_the_last_prompt_and_reply_of_a_row() -> None:
    row = TokenizedExample([1, 2, 3, 4, 5, 6], [False, True, False, False, True, True])
    assert last_reply(row) == ([1, 2, 3, 4], [5, 6])
    assert last_reply(TokenizedExample([1, 2], [True, True])) == ([], [1, 2])


@pytest.mark.parametrize(("prompt", "reply", "metric"), [(5, 64, "exact_match"), (5, 65, "loss"), (0, 3, "loss")])
def test_replies_are_generated_where_they_are_short(prompt: int, reply: int, metric: str) -> None:
    row = TokenizedExample([1] * (prompt + reply), [False] * prompt + [True] * reply)
    assert natural_metric([row]) == metric


@pytest.mark.parametrize(
    ("scores", "update"),
    [
        ([[1.0] * 8, [0.0] * 8], 10),  # p 0.004 of two evaluations
        ([[1.0] * 4, [0.0] * 4], 20),  # 0.06
        ([[0.0] * 6, [1.0] * 6, [0.0] * 6, [0.0] * 6], 20),  # 0.0156, of 0.0167 that three comparisons leave
        ([[0.0] * 6, [1.0] * 6, [0.0] * 6, [0.0] * 6, [0.0] * 6], 50),  # four leave 0.0125
        ([[1.0] * 8, [1.0] * 8], 20),
        ([[1.0] * 8], 10),
    ],
)
def test_an_earlier_evaluation_must_be_better_beyond_chance(scores: list[list[float]], update: int) -> None:
    chosen, facts = selection(*scores).choose()
    assert chosen.update == facts["update"] == update
    assert len(facts["evaluations"]) == len(scores) and facts["reason"]


def test_equal_evaluations_choose_earlier_in_at_most_5_percent() -> None:
    """Four evaluations of the same skill on 64 rows; the best of them would be an earlier one in three of four runs."""
    random = np.random.default_rng(0)
    is_earlier = []
    for _ in range(400):
        is_known = random.random(64) < 0.8  # rows that any of them answers
        scores = [(is_known ^ (random.random(64) < 0.1)).astype(float).tolist() for _ in range(4)]
        is_earlier.append(selection(*scores).choose()[0].update < 40)
    assert np.mean(is_earlier) <= LEVEL


def test_a_group_is_one_piece_of_evidence() -> None:
    """64 rows in two groups, of which one went from right to wrong: no evidence, however many rows it has."""
    rows = [TokenizedExample([5, 6, 7], [False, False, True])] * 64
    chat: Any = None
    chosen = CheckpointSelection(chat, rows, ["a"] * 32 + ["b"] * 32)
    chosen.add(CheckpointScore(10, 1.0, [1.0] * 64), {})
    chosen.add(CheckpointScore(20, 1.0, [1.0] * 32 + [0.0] * 32), {})
    best, facts = chosen.choose()
    assert best.update == 20 and facts["p_value"] == 0.5


def test_rows_are_asked_beside_others_of_like_length_that_fit() -> None:
    replies = [
        ([1] * prompt, [2] * reply) for prompt, reply in [(90, 3), (10, 60), (5, 2), (99, 3), (5, 400), (50, 1)]
    ]
    batches = reply_batches(replies, context=100)
    # the long prompt has room for three tokens, and none for sixty; 102 and 405 fit not even alone
    assert [sorted(batch) for batch in batches] == [[0, 2, 5], [1]]
    assert len(reply_batches([([1], [2])] * 40, math.inf)) == 3
    assert reply_batches([([1], [2] * 257)], math.inf) == []


def test_sign_test_has_its_exact_values() -> None:
    assert sign_test_p_value([1.0] * 5, [0.0] * 5) == pytest.approx(1 / 32)
    assert sign_test_p_value([1.0, 0.0], [1.0, 0.0]) == 1.0
    assert sign_test_p_value([-0.1, -0.2, -0.4], [-0.2, -0.3, -0.3]) == pytest.approx(0.5)


@pytest.fixture
def best_recipe(tune_recipe: dict[str, Any]) -> dict[str, Any]:
    """Three evaluations in six updates, a third of the rows held out."""
    data = {**tune_recipe["data"], "eval_fraction": 0.33}
    return {**tune_recipe, **SETTINGS, "data": data, "weights": "best", "budget": {"updates": 6}}


@pytest.fixture
def first_is_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replies are right at the first evaluation of a run, and wrong later."""

    def score_replies(self: CheckpointSelection, model: Any) -> list[float]:
        return [float(not self.candidates)] * len(self.rows)

    monkeypatch.setattr(CheckpointSelection, "score_replies", score_replies)


@pytest.mark.usefixtures("first_is_best")
def test_the_best_weights_are_kept_through_a_kill(
    tmp_path: Path, best_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    notices: list[str] = []
    tune(best_recipe, tmp_path / "whole", notice=notices.append)
    killed(monkeypatch, best_recipe, tmp_path / "a", update=5)
    tune(best_recipe, tmp_path / "a", resume=True)
    short = tune({**best_recipe, "weights": "last"}, tmp_path / "last")
    files = {name: (tmp_path / name / WEIGHTS).read_bytes() for name in ("whole", "a", "last")}
    assert files["whole"] == files["a"] != files["last"]
    run = read_manifest(tmp_path / "whole")["run"]
    assert run["selection"] == read_manifest(tmp_path / "a")["run"]["selection"]
    assert run["selection"]["update"] == 2 and run["updates"] == 6
    assert (
        run["loss"]["eval"]
        == run["selection"]["evaluations"][0]["loss"]
        != short.adapter.manifest["run"]["loss"]["eval"]
    )
    assert any(line.startswith("weights of update 2: better beyond chance") for line in notices)


@pytest.mark.usefixtures("first_is_best")
def test_the_report_counts_what_the_choice_was_among(tmp_path: Path, best_recipe: dict[str, Any]) -> None:
    adapter = tune(best_recipe, tmp_path / "a").adapter
    chosen = evaluate(adapter.path).report.manifest["chosen"]
    assert chosen["evaluations_known"] == 4 and chosen["adapters_known"] == 4
    assert evaluation_ledger.ledger_file().read_text(encoding="utf-8").count("after update") == 3


def test_replies_while_tuning_are_those_of_the_adapter(tmp_path: Path, best_recipe: dict[str, Any]) -> None:
    """The last evaluation's replies, by the model in training, are those of the Adapter that is opened afterwards."""
    asked: list[Any] = []

    def noted(self: CheckpointSelection, model: Any) -> list[float]:
        prompts = [last_reply(row)[0] for row in self.rows]
        asked.append(
            (prompts, generate(model, prompts, stop=self.chat.stops, pad=self.chat.pad, sampling=Sampling(8)))
        )
        return [0.0] * len(prompts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointSelection, "score_replies", noted)
        adapter = tune({**best_recipe, "method": {"rank": 8}}, tmp_path / "a").adapter
    base, model = open_tuned(open_artifact(adapter.path))
    prompts, replies = asked[-1]
    again = generate(model, prompts, stop=base.chat.stops, pad=base.chat.pad, sampling=Sampling(8))
    assert [reply.ids for reply in again] == [reply.ids for reply in replies]
    assert len(asked) == 3 and asked[0][1] != replies


def test_a_score_is_whether_the_reply_is_the_reference(tmp_path: Path, tiny_base: Path) -> None:
    base = open_base(str(tiny_base), bits=32, device=torch.device("cpu"))
    lora = loras.write_lora(tmp_path / "lora", base.model.config.to_dict(), rank=3, size=1.0)
    model = adapters.open_adapter(base.model, lora)
    prompt = base.chat.prompt_ids((Message.of("user", "turn on the light"),), "")
    first, *rest = generate(model, [prompt], stop=[], pad=base.chat.pad, sampling=Sampling(12))[0].ids
    stop = next(token for token in rest if token != first)  # where this reply is to end
    chat: Any = SimpleNamespace(stops=[stop], pad=base.chat.pad, decode=base.chat.decode)
    reply = [first, *rest[: rest.index(stop)], stop]
    rows = [
        TokenizedExample([*prompt, *reference], [False] * len(prompt) + [True] * len(reference))
        for reference in (reply, [*reply[:-1], first, stop], [stop])
    ]
    assert CheckpointSelection(chat, rows, list("abc")).score_replies(model) == [1.0, 0.0, 0.0]
    # a long prompt beside a long reply would not fit together; each row does
    context = model.config.max_position_embeddings
    long_row = TokenizedExample([first] * (context - 1) + [stop], [False] * (context - 1) + [True])
    assert CheckpointSelection(chat, [*rows, long_row], list("abcd")).score_replies(model)[:3] == [1.0, 0.0, 0.0]
    # one that fits not even alone is not asked
    too_long = TokenizedExample([first] * context + [stop], [False] * context + [True])
    assert CheckpointSelection(chat, [too_long, *rows], list("abcd")).score_replies(model) == [0.0, 1.0, 0.0, 0.0]


def test_preferences_have_no_best_weights(tune_recipe: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="objective is kto") as error:
        sartor.plan({**tune_recipe, "objective": {"kind": "kto"}, "weights": "best"})
    assert error.value.remedy == "weights: last"


def test_a_damaged_ledger_is_found_before_the_first_update(tmp_path: Path, best_recipe: dict[str, Any]) -> None:
    evaluation_ledger.ledger_file().write_text("{}\n", encoding="utf-8")
    with pytest.raises(ArtifactError, match="ledger of evaluations"):
        tune(best_recipe, tmp_path / "a")
    assert not (tmp_path / "a").exists() and not (tmp_path / "a.checkpoints").exists()
