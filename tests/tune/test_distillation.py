"""distil as a run: from an adapter, a base of another family and tokenizer, and an endpoint; sampled replies; kills; mending."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import sartor
import tiny
from endpoint_server import EndpointServer, serving
from sample_data import ROWS, recipe_on, write_jsonl
from sartor.core import config
from sartor.core.artifacts import open_artifact
from sartor.core.errors import ArtifactError, ConfigError, ModelError, SartorError, StoppedError, UnavailableError
from sartor.core.filesystem import file_digest
from sartor.core.records import Example, Message
from sartor.inference.endpoint_client import QuestionRefused
from sartor.models import adapters, packing
from sartor.models.base import open_base
from sartor.models.chat import ChatTokenizer
from sartor.models.losses import transformers_backend
from sartor.tune.checkpoint import folder_of
from sartor.tune.distil_teachers import LocalTeacher, RemoteTeacher, open_teacher
from sartor.tune.recipe import ResolvedRecipe
from sartor.tune.training_loop import TrainingRun

pytestmark = pytest.mark.usefixtures("fp32")

WEIGHTS = "adapter_model.safetensors"
TALK = [
    {"prompt": f"good {time} {index}", "completion": f"a good {time} to you"}
    for index in range(6)
    for time in ("day", "night")
]
TURNS = (("user", "prompt"), ("assistant", "completion"))
OTHER = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def curated(folder: Path, name: str, rows: list[Any]) -> Path:
    source = {"path": str(write_jsonl(folder / f"{name}.jsonl", rows)), "licence": "CC-BY-4.0"}
    sartor.curate({"sources": [source], "split": {"eval_fraction": 0.25}, "workers": 1}, folder / name)
    return folder / name


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """Datasets; an adapter that knows the task; a base of another family and tokenizer that does; one that can talk."""
    folder = tmp_path_factory.mktemp("distil")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SARTOR_HOME", str(folder / "home"))
        patch.setattr("sartor.tune.trainer.plot_losses", lambda lines, file: file.touch())
        patch.setattr("sartor.models.base.best_dtype", lambda device: torch.float32)
        curated(folder, "task", ROWS)
        curated(folder, "talk", TALK)
        recipe = recipe_on(folder / "task", tiny_base)
        sartor.tune({**recipe, "budget": {"updates": 25}, "evaluations": 0}, folder / "teacher", show=False)
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=2,
    )
    texts = ["blue skies, bright lights: on and off"] * 8
    write_trained(folder / "qwen", Qwen2ForCausalLM(config), tiny.tokenizer(OTHER, texts=texts, size=300), ROWS)
    talk = [{"messages": [{"role": role, "content": row[key]} for role, key in TURNS]} for row in TALK]
    write_trained(folder / "talker", tiny.model(), tiny.tokenizer(), talk)
    return folder


def write_trained(folder: Path, model: Any, tokenizer: Any, rows: list[Any]) -> None:
    """Write a base whose weights are all trained on the rows until it knows them."""
    chat = ChatTokenizer(tokenizer)
    turns = [tuple(Message.of(turn["role"], turn["content"]) for turn in row["messages"]) for row in rows]
    batch = packing.pack([chat.encode(Example(messages, ())) for messages in turns])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(400):
        with transformers_backend.packing(model):
            loss = transformers_backend.pack_losses(model, batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.4:
            break
    assert loss.item() < 0.4
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")


@pytest.fixture
def recipe(made: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr("sartor.tune.trainer.plot_losses", lambda lines, file: file.touch())
    objective = {"kind": "distil", "teacher": str(made / "teacher")}
    return {**recipe_on(made / "task", tiny_base), "objective": objective, "budget": {"updates": 3}, "evaluations": 1}


def changed(recipe: dict[str, Any], objective: dict[str, Any], **parts: Any) -> dict[str, Any]:
    return {**recipe, "objective": {**recipe["objective"], **objective}, **parts}


def tune(recipe: dict[str, Any], out: Path, **options: Any) -> dict[str, Any]:
    return dict(sartor.tune(recipe, out, show=False, **options).as_json())


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "objective",
    [{}, {"divergence": "reverse"}, {"divergence": "jensen"}, {"on_policy": 1.0, "max_reply_tokens": 12}],
    ids=["forward", "reverse", "jensen", "on policy"],
)
def test_the_student_comes_to_speak_as_its_teacher(
    tmp_path: Path, made: Path, recipe: dict[str, Any], objective: dict[str, Any]
) -> None:
    asked = changed(recipe, objective, budget={"updates": 30}, evaluations=2)
    notices: list[str] = []
    told = tune(asked, tmp_path / "a", notice=notices.append)
    evaluated = [line for line in lines_of(tmp_path / "a") if "eval_loss" in line]
    assert evaluated[-1]["eval_loss"] < evaluated[0]["eval_loss"]
    assert told["loss"]["last"] < 0.5 * told["loss"]["first"]
    assert evaluated[-1]["forgetting"] <= evaluated[-1]["forgetting_high"]
    assert any(line.startswith("teacher teacher on") and "token by token" in line for line in notices)
    manifest = open_artifact(tmp_path / "a").manifest
    assert manifest["run"]["teacher"]["identity"].startswith("adapter:")
    assert open_artifact(made / "teacher").id in [parent["id"] for parent in manifest["parents"]]


def test_a_teacher_on_the_students_base_has_its_weights_and_changes_none(
    tmp_path: Path, recipe: dict[str, Any], made: Path, tiny_base: Path
) -> None:

    base = open_base(str(tiny_base))
    dumped = {**config.dump(sartor.load_recipe(recipe)), "budget": {"updates": 1}, "evaluations": 0, "weights": "last"}
    dumped["data"]["rehearsal"] = {}
    teacher = open_teacher(config.load(ResolvedRecipe, dumped), base, lambda line: None)
    assert isinstance(teacher, LocalTeacher)
    own = {parameter.data_ptr() for parameter in base.model.parameters()}
    assert own <= {parameter.data_ptr() for parameter in teacher.model.parameters()}
    prompt = torch.tensor([[1, 40, 50, 60]])
    with torch.no_grad():
        bare = base.model(prompt).logits
        taught = teacher.model(prompt).logits
        reference = adapters.open_adapter(open_base(str(tiny_base)).model, made / "teacher")(prompt).logits
    assert torch.equal(taught, reference) and not torch.equal(taught, bare)


def test_the_untouched_base_is_no_teacher_of_itself(tmp_path: Path, recipe: dict[str, Any]) -> None:
    """The divergence of a fresh adapter from its own base is 0, and so is its gradient."""
    told = tune(changed(recipe, {"teacher": "base"}, budget={"updates": 1}), tmp_path / "a")
    assert told["loss"]["first"] == pytest.approx(0.0, abs=1e-6)
    assert lines_of(tmp_path / "a")[-1]["forgetting"] == pytest.approx(0.0, abs=1e-5)


def test_how_it_is_computed_changes_nothing(tmp_path: Path, recipe: dict[str, Any]) -> None:
    found = []
    for name, compute in (("a", {}), ("b", {"micro_batch_tokens": 1, "path": "general", "share_prefixes": False})):
        tune(changed(recipe, {}, compute=compute), tmp_path / name)
        found.append([line["loss"] for line in lines_of(tmp_path / name) if "loss" in line])
    assert len(set(found[0])) == 3
    assert found[0] == pytest.approx(found[1], abs=1e-4)


@pytest.mark.parametrize("on_policy", [0.0, 0.5])
def test_killed_and_resumed_the_bits_are_those_of_a_whole_run(
    tmp_path: Path, made: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, on_policy: float
) -> None:
    """With dropout, rehearsal, sampled replies and evaluations, twice killed."""
    asked = changed(
        recipe,
        {"on_policy": on_policy, "max_reply_tokens": 8},
        data={"path": str(made / "task"), "rehearsal": {"path": str(made / "talk"), "fraction": 0.3}},
        method={**recipe["method"], "dropout": 0.1},
        checkpoints={"every_minutes": 0},
        evaluations=2,
        budget={"updates": 5},
    )
    whole = tune(asked, tmp_path / "whole")
    check = TrainingRun._check

    class Killed(BaseException):
        pass

    for update in (2, 4):

        def dies(self: TrainingRun, *arguments: Any, update: int = update) -> None:
            if self.counters.updates + 1 == update:
                raise Killed
            check(self, *arguments)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(TrainingRun, "_check", dies)
            tune(asked, tmp_path / "a", resume=update > 2)
    again = tune(asked, tmp_path / "a", resume=True)
    assert again["resumed_at"] == [1, 3]
    assert file_digest(tmp_path / "a" / WEIGHTS) == file_digest(tmp_path / "whole" / WEIGHTS)
    assert again["tokens"] == whole["tokens"]
    lines = [line for line in lines_of(tmp_path / "a") if "loss" in line]
    assert any(line["sampled"] for line in lines) == bool(on_policy)
    with pytest.raises(ConfigError, match="teacher: digest adapter:"):
        tune(changed(asked, {"teacher": "base"}), tmp_path / "a", resume=True)


def test_a_teacher_of_another_family_and_tokenizer_teaches_by_text(
    tmp_path: Path, made: Path, recipe: dict[str, Any]
) -> None:
    notices: list[str] = []
    student = {**recipe, "base": str(made / "talker")}
    asked = changed(student, {"teacher": str(made / "qwen")}, budget={"updates": 20}, evaluations=2)
    told = tune(asked, tmp_path / "a", notice=notices.append)
    assert any("has another vocabulary" in line for line in notices)
    assert told["loss"]["last"] < 0.7 * told["loss"]["first"]
    evaluated = [line["eval_loss"] for line in lines_of(tmp_path / "a") if "eval_loss" in line]
    assert evaluated[-1] < evaluated[0]
    assert open_artifact(tmp_path / "a").manifest["licence"] == "CC-BY-4.0 AND MIT"
    sampled = changed(asked, {"on_policy": 1.0, "max_reply_tokens": 6}, budget={"updates": 2})
    assert tune(sampled, tmp_path / "b")["updates"] == 2


def completions(base: Path, **changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """An endpoint's answers to /completions with echo and logprobs, by a base."""
    opened = open_base(str(base))

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        assert body["echo"] and body["max_tokens"] == 1
        ids = torch.tensor([body["prompt"]])
        with torch.no_grad():
            scores = opened.model(ids).logits[0].log_softmax(-1)
        decode = opened.chat.tokenizer.decode
        values: list[Any] = [None]
        tops: list[Any] = [None]
        for place in range(1, ids.shape[1]):
            values.append(float(scores[place - 1, ids[0, place]]))
            best = scores[place - 1].topk(body["logprobs"])
            tops.append(
                {decode([token]): value for value, token in zip(*(part.tolist() for part in best), strict=True)}
            )
        values, tops = [*values, -1.0], [*tops, {"x": -1.0}]
        return {"choices": [{"text": "", "logprobs": {"token_logprobs": values, "top_logprobs": tops, **changes}}]}

    return answer


def endpoint(server: EndpointServer, **options: Any) -> dict[str, Any]:
    return {"teacher": {"url": server.url, "model": "m", "tries": 2, **options}}


def test_an_endpoint_teaches_what_its_model_would_teach_here(
    tmp_path: Path, made: Path, recipe: dict[str, Any]
) -> None:
    """The same base behind an endpoint: losses differ by the tokens that no text names. It is asked once for a row."""
    own = changed(recipe, {"teacher": str(made / "talker"), "top_k": 8}, data={"path": str(made / "talk")})
    tune(own, tmp_path / "local")
    with serving(EndpointServer()) as server:
        server.completion = completions(made / "talker")
        asked = changed(own, endpoint(server, licence="LicenseRef-teacher"))
        tune(asked, tmp_path / "remote")
        assert set(server.asked.values()) == {1}
        (warning,) = [item for item in sartor.plan(asked).advice.warnings if item.reason == "teacher_endpoint"]
        assert "m@127.0.0.1" in warning.problem
    losses = [[line["loss"] for line in lines_of(tmp_path / name) if "loss" in line] for name in ("local", "remote")]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    manifest = open_artifact(tmp_path / "remote").manifest
    assert "LicenseRef-teacher" in manifest["licence"]
    assert manifest["run"]["teacher"]["is_remote"]


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ({"choices": [{"text": "hi"}]}, "has no `logprobs`"),
        ({"choices": [{"text": "hi", "logprobs": {"token_logprobs": [-1.0]}}]}, "of 1 tokens, and the prompt has"),
        ({"choices": [{"logprobs": {"token_logprobs": [None] * 500}}]}, "no log-probability of some tokens"),
    ],
)
def test_an_endpoint_without_logprobs_of_a_prompt_is_named(
    tmp_path: Path, recipe: dict[str, Any], answer: dict[str, Any], problem: str
) -> None:
    with serving(EndpointServer()) as server:
        server.completion = lambda body: answer
        with pytest.raises(ModelError, match=problem) as caught:
            tune(changed(recipe, endpoint(server)), tmp_path / "a")
        assert server.url in caught.value.problem and "objective.teacher" in caught.value.remedy


def echoes(
    top: str, value: float = -3.0, token: Callable[[int], str] = lambda token: f"token_id:{token}"
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """An endpoint's answers that give each token of the prompt the log-probability `value`, and `top` beside it."""

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        ids, beside = body["prompt"], len(body["prompt"]) - 1
        tokens, tops = [token(each) for each in ids], [None, *[{top: -4.0}] * beside]
        fields = {"tokens": tokens, "token_logprobs": [None, *[value] * beside], "top_logprobs": tops}
        return {"choices": [{"text": "", "logprobs": fields}]}

    return answer


def test_a_refused_row_is_shortened_in_the_student_s_tokens() -> None:
    """The option counts the student's tokens, of which the teacher's may be twice as many."""
    teacher_row = SimpleNamespace(ids=[1] * 40, supervised_tokens=4)
    teacher: Any = SimpleNamespace(
        name="m@host",
        top_k=2,
        options=SimpleNamespace(model="m"),
        client=SimpleNamespace(ask=lambda *given, **options: QuestionRefused("says 400: too long", True)),
        translation=SimpleNamespace(row=lambda row: teacher_row),
    )
    row: Any = SimpleNamespace(ids=[1] * 20, example_id="r1")
    with pytest.raises(ModelError, match="of 40 of its tokens") as refused:
        RemoteTeacher._score(teacher, row)
    assert refused.value.remedy.startswith("--data.max_length_tokens 19,")


@pytest.mark.parametrize(
    ("status", "words", "kind", "remedy"),
    [
        (422, "prompt must be a string", ModelError, "a server whose /completions takes token ids"),
        (400, "logprobs and echo at once are not supported", ConfigError, "change what the endpoint's words name"),
        (400, "no model m here", ConfigError, "change what the endpoint's words name"),
    ],
)
def test_an_endpoint_that_refuses_is_quoted(
    tmp_path: Path, recipe: dict[str, Any], status: int, words: str, kind: type[SartorError], remedy: str
) -> None:
    with serving(EndpointServer(lambda body, times: str(status))) as server:
        server.word = words
        with pytest.raises(kind, match=words) as caught:
            tune(changed(recipe, endpoint(server)), tmp_path / "a")
    assert remedy in caught.value.remedy and caught.value.option == "objective.teacher"


def test_an_address_alone_is_no_teacher(recipe: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="of an endpoint the model is needed too") as caught:
        sartor.load_recipe(changed(recipe, {"teacher": "http://127.0.0.1:9/v1"}))
    assert "{url: http://127.0.0.1:9/v1, model: NAME}" in caught.value.remedy


@pytest.mark.parametrize(
    ("tops", "problem"),
    [
        (None, "no `top_logprobs`, and objective.top_k is 2"),
        ([], "no `top_logprobs`"),
        ({"token_id:7": -0.1, "token_id:8": -0.1}, "sum to 1.81"),
    ],
)
def test_alternatives_that_are_absent_or_impossible_are_refused(
    tmp_path: Path, recipe: dict[str, Any], tops: Any, problem: str
) -> None:
    def answer(body: dict[str, Any]) -> dict[str, Any]:
        beside = len(body["prompt"]) - 1
        fields = {"token_logprobs": [None, *[-3.0] * beside], "top_logprobs": tops and [None, *[tops] * beside]}
        return {"choices": [{"text": "", "logprobs": fields}]}

    with serving(EndpointServer()) as server:
        server.completion = answer
        with pytest.raises(ModelError, match=problem) as caught:
            tune(changed(recipe, {**endpoint(server), "top_k": 2}), tmp_path / "a")
        assert server.url in caught.value.problem and "objective.teacher" in caught.value.remedy


@pytest.mark.parametrize("top", ["token_id:zz", "token_id:", "token_id:999999999", "token_id:-4", "token_id:7"])
def test_tokens_that_an_endpoint_misspells_are_no_bins(tmp_path: Path, recipe: dict[str, Any], top: str) -> None:
    with serving(EndpointServer()) as server:
        server.completion = echoes(top)
        assert tune(changed(recipe, endpoint(server), budget={"updates": 1}), tmp_path / "a")["updates"] == 1


@pytest.mark.parametrize(
    ("value", "problem"), [(2.0, "is 2.0; they must be at most 0"), (float("inf"), "is inf"), (-float("inf"), "-inf")]
)
def test_log_probabilities_above_0_are_refused(
    tmp_path: Path, recipe: dict[str, Any], value: float, problem: str
) -> None:
    with serving(EndpointServer()) as server:
        server.completion = echoes("token_id:7", value)
        with pytest.raises(ModelError, match=problem):
            tune(changed(recipe, endpoint(server)), tmp_path / "a")


def test_an_endpoint_with_another_tokenizer_is_refused(
    tmp_path: Path, recipe: dict[str, Any], tiny_base: Path
) -> None:
    """Its echo has the texts of the ids that were sent. Spaces and marks of word beginnings are not compared."""
    tokenizer = open_base(str(tiny_base)).chat.tokenizer
    with serving(EndpointServer()) as server:
        server.completion = echoes("token_id:7", token=lambda token: "w")
        with pytest.raises(ModelError, match="another tokenizer than the student") as caught:
            tune(changed(recipe, endpoint(server)), tmp_path / "a")
        assert "objective.teacher.tokenizer: BASE" in caught.value.remedy
        for spelling in (tokenizer.convert_ids_to_tokens, lambda token: " " + tokenizer.decode([token])):
            server.completion = echoes("token_id:7", token=spelling)
            tune(changed(recipe, endpoint(server), budget={"updates": 1}), tmp_path / "a", replace=True)


def test_an_endpoint_that_answers_nothing_is_asked_again_and_then_named(
    tmp_path: Path, recipe: dict[str, Any]
) -> None:
    with serving(EndpointServer()) as server:
        server.completion = lambda body: {"choices": []}
        with pytest.raises(UnavailableError, match="the teacher is lost after update 0: .* failed 2 times"):
            tune(changed(recipe, endpoint(server)), tmp_path / "a")


def test_an_endpoint_that_dies_in_the_middle_loses_nothing(
    tmp_path: Path, recipe: dict[str, Any], tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampled replies need it at each update. The run ends with a checkpoint, and goes on at another address to the bits of a whole one."""
    monkeypatch.setattr("sartor.inference.endpoint_client.LONGEST_PAUSE_S", 0.01)
    asked = changed(
        recipe, {"on_policy": 1.0, "max_reply_tokens": 6, "top_k": 4}, budget={"updates": 4}, evaluations=0
    )
    answers = completions(tiny_base)
    with serving(EndpointServer(lambda body, times: "503" if times == 1 else "")) as server:
        server.completion = answers
        tune(changed(asked, endpoint(server)), tmp_path / "whole")
        total = len(server.asked)
    with serving(EndpointServer()) as server:
        server.completion = answers
        server.fault = lambda body, times: "503" if len(server.asked) > total // 2 else ""
        with pytest.raises(UnavailableError, match=r"lost after update [1-3]: .*503") as caught:
            tune(changed(asked, endpoint(server)), tmp_path / "a")
        assert "--resume" in caught.value.remedy
    assert list(folder_of(tmp_path / "a").glob("update-*"))
    with serving(EndpointServer()) as server:
        server.completion = answers
        tune(changed(asked, endpoint(server)), tmp_path / "a", resume=True)
        assert len(server.asked) < total
    assert file_digest(tmp_path / "a" / WEIGHTS) == file_digest(tmp_path / "whole" / WEIGHTS)


def test_mending_ends_when_little_is_forgotten(tmp_path: Path, made: Path, recipe: dict[str, Any]) -> None:
    """An adapter that forgot is distilled from its untouched base on general rows until they cost what they cost there."""
    base = str(made / "talker")
    tune({**recipe, "base": base, "objective": "sft", "budget": {"updates": 12}}, tmp_path / "forgot")
    mending = changed(
        {**recipe, "base": base},
        {"teacher": "base", "stop_at_forgetting": 0.05},
        data={"path": str(made / "talk")},
        method={**recipe["method"], "start": str(tmp_path / "forgot")},
        optimizer={"learning_rate": 3e-3, "batch_tokens": 128},
        budget={"updates": 200},
        evaluations=40,
    )
    notices: list[str] = []
    told = tune(mending, tmp_path / "a", notice=notices.append)
    evaluated = [line for line in lines_of(tmp_path / "a") if "eval_loss" in line]
    assert evaluated[0]["forgetting_high"] > 0.05 >= evaluated[-1]["forgetting_high"]
    assert told["updates"] < 200
    assert open_artifact(tmp_path / "a").manifest["run"]["teacher"]["ended_by_forgetting"]
    assert any(line.startswith("ended after update") for line in notices)


def test_a_plan_counts_the_teacher(recipe: dict[str, Any]) -> None:
    plans = [sartor.plan(changed(recipe, objective)) for objective in ({}, {"on_policy": 1.0})]
    for plan in plans:
        assert plan.time_s is not None and not plan.refusals
        assert (plan.counters.updates, plan.counters.tokens > 0) == (3, True)


def test_a_plan_times_the_replies_of_an_update(recipe: dict[str, Any], timed_batches: list[int]) -> None:
    """A timed batch has the rows that an update samples; the interval is that of replies of any length."""
    times = []
    for tokens, longest in ((64, 8), (1024, 8), (1024, 128)):
        sampled = {"on_policy": 1.0, "max_reply_tokens": longest}
        plan = sartor.plan(changed(recipe, sampled, optimizer={"learning_rate": 3e-3, "batch_tokens": tokens}))
        assert plan.time_s is not None and plan.time_s.low < plan.time_s.estimate < plan.time_s.high
        times.append(plan.time_s)
    assert timed_batches[0] < timed_batches[-1]
    assert times[2].high > 2 * times[1].high


def test_trace_names_what_it_does_not_support(tmp_path: Path, recipe: dict[str, Any]) -> None:
    tune(changed(recipe, {}, budget={"updates": 1}), tmp_path / "a")
    query = {"prompt": "switch hall on", "reply": "on:hall"}
    with pytest.raises(ConfigError, match="distil"):
        sartor.trace(tmp_path / "a", **query, method="gradient")
    with pytest.raises(ConfigError, match="objective is distil"):
        sartor.trace(tmp_path / "a", **query, method="unrolled")


@pytest.mark.parametrize(
    ("objective", "error"),
    [
        ({"teacher": ""}, ConfigError),
        ({"teacher": "nowhere/at-all/here"}, SartorError),
        ({"on_policy": 1.5}, ConfigError),
        ({"mixture": 0.0}, ConfigError),
        ({"loss_temperature": 0.0}, ConfigError),
        ({"loss_temperature": float("nan")}, ConfigError),
        ({"top_k": 0}, ConfigError),
        ({"teacher": {"url": "ftp://x", "model": "m"}}, ConfigError),
        ({"teacher": {"url": "http://127.0.0.1:9/v1", "model": "m", "key_env": "NO_SUCH_KEY"}}, SartorError),
        ({"stop_at_forgetting": "never"}, ConfigError),
    ],
)
def test_options_that_cannot_be_are_refused(
    tmp_path: Path, recipe: dict[str, Any], objective: dict[str, Any], error: type[SartorError]
) -> None:
    with pytest.raises(error):
        tune(changed(recipe, objective), tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("teacher", "option"),
    [
        ("/nowhere", "objective.teacher"),
        ({"url": "http://127.0.0.1:9/v1", "model": "m", "tokenizer": "/nowhere"}, "objective.teacher.tokenizer"),
    ],
)
def test_a_missing_teacher_is_named_by_its_option(
    tmp_path: Path, recipe: dict[str, Any], teacher: Any, option: str
) -> None:
    with pytest.raises(ModelError, match="there is no base '/nowhere'") as caught:
        tune(changed(recipe, {"teacher": teacher}), tmp_path / "a")
    assert caught.value.remedy == f"{option}: starter"


def test_recorded_gradients_are_refused(recipe: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="trace.features"):
        sartor.load_recipe({**recipe, "trace": {"features": True}})


def test_a_damaged_teacher_is_an_error(tmp_path: Path, recipe: dict[str, Any]) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter.json").write_text("{}")
    with pytest.raises((ArtifactError, ModelError)):
        tune(changed(recipe, {"teacher": str(tmp_path / "broken")}), tmp_path / "a")


def test_a_signal_while_the_teacher_scores_keeps_what_is_scored(
    tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sartor.tune.distillation._SCORED_ROWS", 8)
    score, scored = LocalTeacher.score, [0]

    def counted(self: LocalTeacher, rows: Any) -> Any:
        scored[0] += len(rows)
        if scored[0] == 16:
            os.kill(os.getpid(), signal.SIGTERM)
        return score(self, rows)

    monkeypatch.setattr(LocalTeacher, "score", counted)
    with pytest.raises(StoppedError, match="SIGTERM after the teacher scored 16 of"):
        tune(recipe, tmp_path / "a")
    before = scored[0]
    told = tune(recipe, tmp_path / "a")
    assert before == 16 and told["updates"] == 3
    rows = next(line for line in lines_of(tmp_path / "a") if "teacher_rows" in line)["teacher_rows"]
    assert scored[0] == rows


@pytest.mark.parametrize(
    ("words", "top_k", "remedy"),
    [
        ("logprobs: at most 5", 16, "--objective.top_k 5, or as many as it gives"),
        ("logprobs: at most 5", 5, ""),
        ("echo with logprobs is not supported", 16, ""),
        ("no such model", 16, ""),
    ],
)
def test_fewer_likeliest_tokens_are_advised_where_they_help(words: str, top_k: int, remedy: str) -> None:
    teacher: Any = SimpleNamespace(top_k=top_k)
    assert RemoteTeacher._fewer_tokens(teacher, words).startswith(remedy)
    assert bool(remedy) == bool(RemoteTeacher._fewer_tokens(teacher, words))
