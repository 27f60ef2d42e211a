"""grpo as a run: rewards that rise, kills, equal rewards, and refusals before the first update."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import sartor
from sample_data import ROWS, recipe_on, write_jsonl
from sartor.core import config
from sartor.core.artifacts import open_artifact
from sartor.core.errors import BudgetError, ConfigError, ModelError, SartorError, SourceError
from sartor.core.filesystem import file_digest
from sartor.core.records import Message
from sartor.inference.generate import Generation, generate
from sartor.inference.verifiers.regular_expression import RegexVerifier
from sartor.inference.verifiers.submission import Submission
from sartor.models.base import open_base
from sartor.tune import grpo_training, reply_sampling
from sartor.tune.checkpoint import folder_of
from sartor.tune.dataset_encoding import encode_rows
from sartor.tune.grpo_training import SILENT_UPDATES, GrpoRun, open_grpo
from sartor.tune.recipe import ResolvedRecipe
from sartor.tune.resume import differences
from sartor.tune.tokenized_dataset import DistilExample
from sartor.tune.training_loop import TrainingRun

pytestmark = pytest.mark.usefixtures("fp32")

WEIGHTS = "adapter_model.safetensors"
REWARDS = RegexVerifier.rewards


def exact(self: RegexVerifier, items: Sequence[Submission]) -> list[float]:
    """1 for the reference alone."""
    return [float(item.reply == item.reference) for item in items]


def letters(self: RegexVerifier, items: Sequence[Submission]) -> list[float]:
    """1 for the reference, else up to a half for letters `o`: any model can learn to write them."""
    return [
        1.0 if item.reply == item.reference else item.reply.count("o") / (2 * len(item.reply) + 2) for item in items
    ]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grpo")
    source = {"path": str(write_jsonl(folder / "rows.jsonl", ROWS)), "licence": "CC-BY-4.0"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SARTOR_HOME", str(folder / "home"))
        sartor.curate({"sources": [source], "split": {"eval_fraction": 0.25}, "workers": 1}, folder / "task")
    return folder / "task"


@pytest.fixture
def recipe(task: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A recipe whose verifier `regex` is replaced by `letters`."""
    monkeypatch.setattr("sartor.tune.trainer.plot_losses", lambda lines, file: file.touch())
    monkeypatch.setattr(RegexVerifier, "rewards", letters)
    objective = {
        "kind": "grpo",
        "verifier": {"kind": "regex", "pattern": "."},
        "group_size": 4,
        "max_reply_tokens": 6,
        "beta": 0.01,
    }
    return {**recipe_on(task, tiny_base), "objective": objective, "budget": {"updates": 3}, "evaluations": 1}


def changed(recipe: dict[str, Any], objective: dict[str, Any], **parts: Any) -> dict[str, Any]:
    return {**recipe, "objective": {**recipe["objective"], **objective}, **parts}


def tune(recipe: dict[str, Any], out: Path, **options: Any) -> dict[str, Any]:
    return dict(sartor.tune(recipe, out, show=False, **options).as_json())


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_rewards_rise_and_the_run_says_by_what(tmp_path: Path, recipe: dict[str, Any]) -> None:
    notices: list[str] = []
    told = tune(changed(recipe, {}, budget={"updates": 15}, evaluations=2), tmp_path / "a", notice=notices.append)
    lines = [line for line in lines_of(tmp_path / "a") if "reward" in line]
    assert sum(line["reward"] for line in lines[-3:]) > 2 * sum(line["reward"] for line in lines[:3])
    assert all(line["groups"] >= line["equal_groups"] >= 0 and line["divergence"] >= 0 for line in lines)
    evaluated = [line for line in lines_of(tmp_path / "a") if "eval_reward" in line]
    assert len(evaluated) == 2 and evaluated[-1]["eval_loss"] == pytest.approx(1 - evaluated[-1]["eval_reward"])
    assert any(line.startswith("verifier regex: AUC 1.00 in [1.00, 1.00]") for line in notices)
    facts = open_artifact(tmp_path / "a").manifest["run"]["verifier"]
    assert facts["auc"] == 1.0 and facts["replies"] >= 40
    assert facts["groups"] == sum(line["groups"] for line in lines)
    assert facts["equal_groups"] == sum(line["equal_groups"] for line in lines)
    assert facts["reward"] == {
        "first": lines[0]["reward"],
        "last": lines[-1]["reward"],
        "held_out": evaluated[-1]["eval_reward"],
    }
    assert told["updates"] == 15


def test_killed_and_resumed_the_bits_are_those_of_a_whole_run(
    tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout and evaluations, killed in the midst of an update."""
    asked = changed(
        recipe,
        {},
        method={**recipe["method"], "dropout": 0.1},
        checkpoints={"every_minutes": 0},
        evaluations=2,
        budget={"updates": 4},
    )
    tune(asked, tmp_path / "whole")
    check = TrainingRun._check

    class Killed(BaseException):
        pass

    def dies(self: TrainingRun, *arguments: Any) -> None:
        if self.counters.updates + 1 == 3:
            raise Killed
        check(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(TrainingRun, "_check", dies)
        tune(asked, tmp_path / "a")
    again = tune(asked, tmp_path / "a", resume=True)
    assert again["resumed_at"] == [2]
    assert file_digest(tmp_path / "a" / WEIGHTS) == file_digest(tmp_path / "whole" / WEIGHTS)
    facts = [open_artifact(tmp_path / name).manifest["run"]["verifier"] for name in ("a", "whole")]
    assert facts[0] == facts[1]


def test_how_it_is_computed_changes_nothing(tmp_path: Path, recipe: dict[str, Any]) -> None:
    """Also where several replies to a prompt are the same: their tokens are computed once."""
    found = []
    plain = {"micro_batch_tokens": 1, "path": "general", "share_prefixes": False}
    for name, compute in (("a", {}), ("b", plain)):
        tune(changed(recipe, {"temperature": 0.3}, compute=compute), tmp_path / name)
        found.append([(line["loss"], line["reward"]) for line in lines_of(tmp_path / name) if "reward" in line])
    assert found[0][0][1] == found[1][0][1] and found[0][0][0] == pytest.approx(found[1][0][0], abs=1e-4)


def test_rewards_that_are_all_equal_end_the_run(
    tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state is saved; a resumed run ends there again, since the same replies follow from it."""
    monkeypatch.setattr(RegexVerifier, "rewards", exact)
    asked = changed(recipe, {}, budget={"updates": 20}, evaluations=0)
    for resume in (False, True):
        with pytest.raises(
            ModelError, match=f"in {SILENT_UPDATES} updates, up to update {SILENT_UPDATES}, all"
        ) as caught:
            tune(asked, tmp_path / "a", resume=resume)
        assert "no reply is rewarded: tune by sft" in caught.value.remedy
        assert "(0)" in caught.value.problem and str(folder_of(tmp_path / "a")) in caught.value.problem
    assert [folder.name for folder in folder_of(tmp_path / "a").glob("update-*")]


def test_a_short_run_that_learnt_nothing_says_so(
    tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RegexVerifier, "rewards", exact)
    tune(changed(recipe, {}, budget={"updates": SILENT_UPDATES - 1}, evaluations=0), tmp_path / "a")
    warnings = open_artifact(tmp_path / "a").manifest["run"]["warnings"]
    (said,) = [warning for warning in warnings if warning["reason"] == "equal_rewards"]
    assert "in all 4 updates" in said["problem"] and "tune by sft" in said["remedy"]
    assert said["remedy"].endswith("--replace")


def test_full_rewards_are_no_reason_to_end(
    tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is learnt from them, and the weights stay at the adapter's beginning: B is 0."""
    calls: list[int] = []

    def full(self: RegexVerifier, items: Sequence[Submission]) -> list[float]:
        calls.append(len(items))
        return exact(self, items) if len(calls) == 1 else [1.0] * len(items)

    monkeypatch.setattr(RegexVerifier, "rewards", full)
    told = tune(changed(recipe, {}, budget={"updates": SILENT_UPDATES + 2}, evaluations=0), tmp_path / "a")
    facts = open_artifact(tmp_path / "a").manifest["run"]["verifier"]
    assert told["updates"] == SILENT_UPDATES + 2 and facts["equal_groups"] == facts["groups"] > 0
    assert told["loss"] == {"first": 0.0, "last": 0.0, "eval": None}


def test_only_the_adapter_learns_and_the_reference_shares_the_base(recipe: dict[str, Any], tiny_base: Path) -> None:
    dumped = {**config.dump(sartor.load_recipe(recipe)), "evaluations": 0, "weights": "last"}
    dumped["data"]["rehearsal"] = {}
    resolved, base = config.load(ResolvedRecipe, dumped), open_base(str(tiny_base))
    data = encode_rows(open_artifact(resolved.data.path), resolved, base.chat)
    setup = open_grpo(resolved, base, data, lambda line: None)
    assert setup is not None and setup.reference is not None
    own = {parameter.data_ptr() for parameter in base.model.parameters()}
    assert {parameter.data_ptr() for parameter in setup.reference.model.parameters()} == own
    row = data.train[0]
    expected = base.model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
    places = [place for place in range(1, len(row.ids)) if row.learnt[place]]
    by_hand = torch.stack([expected[place - 1, row.ids[place]] for place in places])
    assert torch.allclose(setup.reference.log_probabilities([row]), by_hand, atol=1e-4)


def test_useless_verifier_is_refused_before_the_run(
    tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RegexVerifier, "rewards", REWARDS)
    with pytest.raises(ConfigError, match="gives every reply the reward 1, right or wrong"):
        tune(recipe, tmp_path / "a")
    assert not (tmp_path / "a").exists() and not folder_of(tmp_path / "a").exists()
    (refusal,) = sartor.plan(recipe).refusals
    assert refusal.reason == "verifier_refused" and "regex" in refusal.problem


def test_rows_without_what_the_verifier_needs_are_named(tmp_path: Path, recipe: dict[str, Any]) -> None:
    with pytest.raises(SourceError, match="40 of 40 rows lack what the verifier numeric needs, a number"):
        tune(changed(recipe, {"verifier": {"kind": "numeric"}}), tmp_path / "a")


@pytest.mark.parametrize("objective", [{}, {"kind": "distil", "teacher": "base", "on_policy": 0.5}])
def test_prompts_that_fill_the_context_are_named_before_the_run(
    objective: dict[str, Any], tmp_path: Path, recipe: dict[str, Any], tiny_base: Path
) -> None:
    turns = [{"role": "user", "content": "word " * 60}, {"role": "assistant", "content": "long"}]
    rows = [*ROWS, {"messages": turns}]
    source = {"path": str(write_jsonl(tmp_path / "rows.jsonl", rows)), "licence": "CC-BY-4.0"}
    sartor.curate({"sources": [source], "split": {"eval_fraction": 0}, "workers": 1}, tmp_path / "d")
    base = shutil.copytree(tiny_base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 110}))
    asked = {**recipe, "base": str(base), "data": {"path": str(tmp_path / "d")}}
    asked["objective"] = objective or recipe["objective"]
    with pytest.raises(SourceError, match="prompts of 1 of 41 rows fill the 110 positions") as caught:
        tune(asked, tmp_path / "a")
    (refusal,) = sartor.plan(asked).refusals
    assert (refusal.reason, refusal.problem) == ("no_room_for_replies", caught.value.problem)
    option, limit = caught.value.remedy.split()[:2]
    assert option == "--data.max_length_tokens"
    asked["data"]["max_length_tokens"] = int(limit)
    assert tune(asked, tmp_path / "a")["updates"] == 3
    (base / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4}))
    (refusal,) = sartor.plan(asked).refusals
    assert "of 40 of 40 rows" in refusal.problem and "longer context" in refusal.remedy


def test_function_of_a_user_rewards_in_a_child(
    tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rewards by a function make the same weights; one that hangs ends the run."""
    source = "def letters(reply, reference, prompt):\n    return 1 if reply == reference else reply.count('o') / (2 * len(reply) + 2)\n"
    source += "def hangs(reply, reference, prompt):\n    while reply[:1] not in 'oud': pass\n    return letters(reply, reference, prompt)\n"
    (tmp_path / "rewarding.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    tune(changed(recipe, {}, budget={"updates": 2}), tmp_path / "a")
    by_function = {"verifier": {"kind": "python", "function": "rewarding:letters"}}
    tune(changed(recipe, by_function, budget={"updates": 2}), tmp_path / "b")
    assert file_digest(tmp_path / "a" / WEIGHTS) == file_digest(tmp_path / "b" / WEIGHTS)
    hanging = {"verifier": {"kind": "python", "function": "rewarding:hangs", "time_s": 0.2}}
    with pytest.raises(
        BudgetError, match="rewarding:hangs.*took more than 0.2 s for the reply to row .* and was killed"
    ):
        tune(changed(recipe, hanging), tmp_path / "c")


def test_longer_time_resumes_a_run_that_a_timeout_ended(
    tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A function that is ended ends the run, so its time limit decides no reward; code of a reply gets 0 then."""
    begin = "def hangs(reply, reference, prompt):\n"
    end = "    return 1 if reply == reference else reply.count('o') / (2 * len(reply) + 2)\n"
    module = tmp_path / "slowly.py"
    module.write_text(begin + "    while reply[:1] not in 'oud': pass\n" + end)
    monkeypatch.chdir(tmp_path)
    verifier = {"kind": "python", "function": "slowly:hangs", "time_s": 0.5}
    asked = changed(recipe, {"verifier": verifier}, budget={"updates": 1})
    with pytest.raises(BudgetError, match="took more than 0.5 s") as caught:
        tune(asked, tmp_path / "a")
    assert caught.value.remedy.startswith("--objective.verifier.time_s 1, and --resume")
    module.write_text(begin + end)
    longer = changed(asked, {"verifier": {**verifier, "time_s": 1.0}})
    assert tune(longer, tmp_path / "a", resume=True)["updates"] == 1
    old, new = ({"recipe": {"objective": {"verifier": {"kind": "unit_tests", "time_s": s}}}} for s in (1, 2))
    assert differences(old, new) == ["recipe objective.verifier.time_s: 1 -> 2"]


@pytest.mark.parametrize("updates", [1, 3])
def test_an_evaluation_that_fails_loses_no_update(
    updates: int, tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the last update or before it: the state is saved, and a resumed run evaluates first and has the same bits."""
    asked = changed(recipe, {}, budget={"updates": 3}, evaluations=3 // updates)
    tune(asked, tmp_path / "a")
    greedy = GrpoRun._loss_of

    def fails(run: GrpoRun, rows: Any) -> Any:
        if run.counters.updates == updates:
            raise BudgetError("the verifier hangs", "a longer time")
        return greedy(run, rows)

    monkeypatch.setattr(GrpoRun, "_loss_of", fails)
    with pytest.raises(BudgetError, match="the verifier hangs"):
        tune(asked, tmp_path / "b")
    assert list(folder_of(tmp_path / "b").glob(f"update-*{updates}"))
    monkeypatch.setattr(GrpoRun, "_loss_of", greedy)
    assert tune(asked, tmp_path / "b", resume=True)["updates"] == 3
    assert file_digest(tmp_path / "a" / WEIGHTS) == file_digest(tmp_path / "b" / WEIGHTS)
    evaluated = [[line["update"] for line in lines_of(tmp_path / out) if "eval_reward" in line] for out in "ab"]
    assert evaluated[0] == evaluated[1]


def test_a_long_prompt_shortens_its_own_replies_alone(
    tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit of its reply is what its context leaves; the other prompts are asked as if it were not there."""
    asked: list[tuple[int, int]] = []

    def noted(model: Any, prompts: Sequence[list[int]], **options: Any) -> list[Generation]:
        asked.extend((len(prompt), options["sampling"].max_tokens) for prompt in prompts)
        return generate(model, prompts, **options)

    monkeypatch.setattr(reply_sampling, "generate", noted)
    monkeypatch.setattr(reply_sampling, "context_tokens", lambda model: 50)
    tune(changed(recipe, {"max_reply_tokens": 30}, budget={"updates": 1}), tmp_path / "a")
    assert len({limit for _, limit in asked}) > 1
    assert all(limit == min(30, 50 - length) for length, limit in asked)


def test_a_verifier_sees_no_reasoning(tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RegexVerifier, "rewards", exact)

    def reasoned(model: Any, chat: Any, rows: Sequence[DistilExample], sampling: Any) -> list[DistilExample]:
        """Each row's own reply, after some reasoning."""
        replies = []
        for row in rows:
            assert row.example is not None
            reply = Message.of("assistant", f"<think>\nIt is so.\n</think>\n\n{row.example.reply}")
            replies.append(replace(row, example=replace(row.example, messages=(*row.example.prompt, reply))))
        return replies

    monkeypatch.setattr(grpo_training, "sample_replies", reasoned)
    tune(changed(recipe, {}, budget={"updates": 1}), tmp_path / "a")
    rewards = open_artifact(tmp_path / "a").manifest["run"]["verifier"]["reward"]
    assert rewards == {"first": 1.0, "last": 1.0, "held_out": 1.0}


def test_plan_counts_replies_and_passes(recipe: dict[str, Any]) -> None:
    plans = [sartor.plan(changed(recipe, {"group_size": size})) for size in (2, 400)]
    assert [plan.counters.updates for plan in plans] == [3, 3] and not plans[0].refusals
    few, many = (plan.time_s.estimate for plan in plans if plan.time_s)
    assert many > few


def test_plan_times_the_batches_of_a_run(recipe: dict[str, Any], timed_batches: list[int]) -> None:
    """A batch has the replies of an update, up to 64; the interval is that of replies of any length."""
    times = []
    for size, longest in ((2, 8), (400, 8), (400, 64)):
        plan = sartor.plan(changed(recipe, {"group_size": size, "max_reply_tokens": longest}))
        assert plan.time_s is not None and 0 <= plan.time_s.low < plan.time_s.estimate < plan.time_s.high
        times.append(plan.time_s)
    assert timed_batches[0] < 32 and all(32 < rows <= 64 for rows in timed_batches[3:])
    assert times[2].high > 2 * times[1].high and times[2].high > 8 * times[2].low


def test_trace_names_what_it_does_not_support(tmp_path: Path, recipe: dict[str, Any]) -> None:
    tune(changed(recipe, {}, budget={"updates": 1}), tmp_path / "a")
    query = {"prompt": "switch hall on", "reply": "on:hall"}
    for method in ("gradient", "unrolled"):
        with pytest.raises(ConfigError, match="grpo"):
            sartor.trace(tmp_path / "a", **query, method=method)


@pytest.mark.parametrize(
    "objective",
    [
        {"group_size": 1},
        {"temperature": 0.0},
        {"beta": -0.1},
        {"max_reply_tokens": 0},
        {"verifier": {"kind": "judge"}},
        {"verifier": {"kind": "python", "function": "no function"}},
    ],
)
def test_options_that_cannot_be_are_refused(recipe: dict[str, Any], objective: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        sartor.load_recipe(changed(recipe, objective))


def test_recorded_gradients_and_media_are_refused(recipe: dict[str, Any]) -> None:
    for part in ({"trace": {"features": True}}, {"base": {"text": "x", "image": "y"}}):
        with pytest.raises(SartorError, match="grpo"):
            sartor.load_recipe({**recipe, **part})


def test_divergence_is_from_the_start_that_is_named(tmp_path: Path, task: Path, recipe: dict[str, Any]) -> None:
    """An Adapter that sft moved far from the base diverges by nothing before its first update."""
    sft = {"objective": {"kind": "sft"}, "optimizer": {"learning_rate": 0.05}, "budget": {"updates": 5}}
    tune({**recipe, **sft}, tmp_path / "sft")
    settings = {**recipe, "method": {**recipe["method"], "start": str(tmp_path / "sft")}, "budget": {"updates": 1}}
    tune(settings, tmp_path / "after")
    learnt = [line for line in lines_of(tmp_path / "after") if line.get("groups", 0) > line.get("equal_groups", 0)]
    assert learnt and learnt[0]["divergence"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("beta", [0.01, 0.0])
def test_a_reward_that_costs_the_right_replies_is_doubted(
    tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, beta: float
) -> None:
    """The verifier takes letters `o`, whatever is asked: rewards rise, and the rows' own replies become unlikely."""
    recipe["objective"]["beta"] = beta
    monkeypatch.setattr("sartor.tune.grpo_training.DOUBTFUL_RISE", -1e9)
    notices: list[str] = []
    tune(recipe, tmp_path / "a", notice=notices.append)
    assert any("became unlikely (from" in line and "objective.beta" in line for line in notices)
    loss = open_artifact(tmp_path / "a").manifest["run"]["verifier"]["reference_loss"]
    evaluated = [line for line in lines_of(tmp_path / "a") if "eval_reward" in line]
    assert loss["last"] == evaluated[-1]["reference_loss"] and loss["start"] > 0
    monkeypatch.setattr("sartor.tune.grpo_training.DOUBTFUL_RISE", 1e9)
    notices.clear()
    tune(recipe, tmp_path / "b", notice=notices.append)
    assert notices and not any("became unlikely" in line for line in notices)
