"""The verb trace: what it returns, what it refuses, and what it says where something is missing."""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sartor
from receipt_fakes import replied
from sample_data import ROWS, write_jsonl
from sartor.cli import main
from sartor.core.artifacts import open_artifact, write_artifact
from sartor.core.errors import ArtifactError, ConfigError, RequestError, SartorError
from sartor.core.records import Part
from sartor.inference.engine import adapter_digest
from sartor.serving.commands.receipt_verification import _adapter_of
from sartor.serving.receipts import ReceiptLog
from sartor.serving.registry.user_versions import folder_of
from sartor.trace import unrolling
from sartor.trace.attribution import Attribution, Method
from sartor.trace.base_likelihood import ReplyLikelihood
from sartor.trace.trace import TraceResult
from sartor.trace.traced_adapter import TracedAdapter, TraceQuery, open_traced

KEYS = {"method", "lds", "refused", "examples", "base_says_it", "approximate", "wall_s"}
ROW_KEYS = {"id", "score", "source", "locator", "licence"}


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    with pytest.raises(SystemExit) as ended:
        main(["trace", *map(str, arguments), "--json"])
    return int(ended.value.code or 0), json.loads(capsys.readouterr().out.splitlines()[-1])


def words(adapter: Path, **options: Any) -> TraceResult:
    return sartor.trace(adapter, "switch office on", "on:office", likelihood=False, **options)


def trained(adapter: Path) -> TraceQuery:
    """A query that is a training row."""
    example = open_traced(adapter).rows[0].example
    return TraceQuery(example.prompt, example.reply)


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[Method]:
    """Unrolling gives row 3 the highest score; the list has a method for each call."""
    calls: list[Method] = []

    def scores(traced: TracedAdapter, queries: Sequence[TraceQuery], **options: Any) -> Attribution:
        calls.append(Method.UNROLLED)
        values = np.tile(np.arange(len(traced.rows), dtype=float)[::-1] / 10, (len(queries), 1))
        values[:, 3] = 99.0
        return Attribution(Method.UNROLLED, values, approximate="made in bf16", facts={"replay_nats": 0.1})

    monkeypatch.setattr(unrolling, "unrolled_scores", scores)
    return calls


def test_json_has_the_declared_keys(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = command(capsys, adapter, "--prompt", "switch office on", "--reply", "on:office", "--top", "3")
    assert code == 0 and set(said) >= KEYS and len(said["examples"]) == 3
    assert set(said["examples"][0]) >= ROW_KEYS and said["examples"][0]["licence"] == "CC-BY-4.0"
    assert said["examples"][0]["locator"].startswith("rows.jsonl:")
    assert (said["method"], said["lds"], said["refused"], said["approximate"]) == ("retrieval", None, None, None)
    assert said["base_says_it"] in (True, False) and said["likelihood"]["tokens"] > 1


def test_training_row_is_first_and_the_base_does_not_say_it(adapter: Path) -> None:
    asked = trained(adapter)
    result = sartor.trace(adapter, asked.prompt[-1].text, asked.reply)
    assert result.examples[0].row.example.reply == asked.reply and result.examples[0].score == pytest.approx(1.0)
    assert result.base_says_it is False and "nats" in result.base_verdict
    assert ReplyLikelihood(tuned=5.0, base=5.01, tokens=3).base_says_it
    assert not ReplyLikelihood(tuned=5.0, base=5.1, tokens=3).base_says_it


def test_result_is_a_table_in_python(adapter: Path) -> None:
    result = words(adapter, top=4)
    assert repr(result).startswith("<TraceResult retrieval, lds not measured, 4 of ") and len(repr(result)) < 120
    rows = result.to_rows()
    assert [row["rank"] for row in rows] == [1, 2, 3, 4] and {"id", "score", "shared_reply"} <= set(rows[0])
    frame = result.to_pandas()
    assert frame.shape[0] == 4 and list(frame["id"]) == [row["id"] for row in rows]


def test_release_is_traced_by_the_adapters_rows(tmp_path: Path, adapter: Path) -> None:
    """Its own manifest has neither recipe nor Dataset; that of the Adapter, which it holds, has both."""
    traced = open_traced(adapter)
    part = tmp_path / "release"

    def fill(folder: Path) -> dict[str, Any]:
        for name in ("sartor.json", "adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(adapter / name, folder / name)
        return {"name": "switch", "version": "1.0", "parents": [traced.artifact.as_parent()]}

    write_artifact(part, "release", fill)
    assert [row.example.id for row in open_traced(part).rows] == [row.example.id for row in traced.rows]
    assert open_traced(part).recipe == traced.recipe


def test_other_method_ranks_beside_retrieval(adapter: Path, scored: list[Method]) -> None:
    result = words(adapter, method="unrolled", top=2, by="source")
    traced = open_traced(adapter)
    assert scored == [Method.UNROLLED] and result.method is Method.UNROLLED
    assert result.examples[0].row.example.id == traced.rows[3].example.id and result.examples[0].score == 99.0
    assert len(result.retrieval) == 2 and result.retrieval[0].row.example.reply == "on:office"
    said = result.as_json()
    assert said["approximate"] == "made in bf16" and said["facts"] == {"replay_nats": 0.1}
    total = sum(range(len(traced.rows))) / 10 - (len(traced.rows) - 4) / 10 + 99.0
    assert [credit["score"] for credit in said["by_source"]] == [pytest.approx(total)]


@pytest.mark.parametrize(("lds", "method"), [(0.19, "retrieval"), (0.2, "unrolled")])
def test_method_that_predicts_too_little_is_refused(
    adapter: Path, scored: list[Method], monkeypatch: pytest.MonkeyPatch, lds: float, method: str
) -> None:
    measured = {Method.UNROLLED: lds, Method.RETRIEVAL: 0.4}
    monkeypatch.setattr("sartor.trace.methods.measured_lds", lambda traced: measured)
    said = words(adapter, method="unrolled").as_json()
    assert said["method"] == method and said["lds"] == measured[Method(method)]
    assert said["refused"] == ({"method": "unrolled", "lds": lds} if method == "retrieval" else None)
    assert len(scored) == (method == "unrolled"), "a refused method is not computed"


def test_matrix_has_a_row_for_each_query(tmp_path: Path, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        {"prompt": "switch hall off", "reply": "off:hall"},
        {"messages": [{"role": "user", "content": "switch den up"}, {"role": "assistant", "content": "up:den"}]},
    ]
    queries = tmp_path / "queries.jsonl"
    queries.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, said = command(capsys, adapter, "--queries", queries, "--scores", tmp_path / "scores.npy")
    traced = open_traced(adapter)
    scores, ids = np.load(tmp_path / "scores.npy"), json.loads((tmp_path / "scores.ids.json").read_text())
    assert code == 0 and said["shape"] == list(scores.shape) == [2, len(traced.rows)]
    assert ids == [row.example.id for row in traced.rows]
    assert stat.S_IMODE((tmp_path / "scores.npy").stat().st_mode) == 0o600
    assert command(capsys, adapter, "--queries", queries, "--scores", tmp_path / "scores.npy")[0] == 2
    (tmp_path / "mine.ids.json").write_text("precious")
    assert command(capsys, adapter, "--queries", queries, "--scores", tmp_path / "mine.npy")[0] == 2
    assert (tmp_path / "mine.ids.json").read_text() == "precious"
    queries.write_text('{"prompt": "a", "reply": "b"}\n{"prompt": "a"}\n')
    code, said = command(capsys, adapter, "--queries", queries, "--scores", tmp_path / "other.npy")
    assert code == 2 and "line 2" in said["error"]["problem"] and "reply is missing" in said["error"]["problem"]
    queries.write_text('{"prompt": null, "reply": "b"}\n')
    assert command(capsys, adapter, "--queries", queries, "--scores", tmp_path / "other.npy")[0] == 2


def error_of(call: Any) -> SartorError:
    with pytest.raises(SartorError) as caught:
        call()
    return caught.value


def test_dataset_that_is_gone_or_changed_is_named(tmp_path: Path, adapter: Path, dataset: Path) -> None:
    copied = tmp_path / "elsewhere"
    shutil.copytree(dataset, copied)
    drops = next(dataset.glob("examples/*.parquet"))
    drops.write_bytes(drops.read_bytes()[:-1] + b"x")
    error = error_of(lambda: words(adapter))
    assert isinstance(error, ArtifactError) and "was changed" in error.problem and "--data" in error.remedy
    # a copy with the same id has the rows of the tuning, in their order
    assert words(adapter, data=copied).notes == [] and words(adapter, data=copied).traced.is_own
    sartor.index(copied)
    assert words(adapter).traced.dataset.path == copied, "the copy that is whole, beside the one that was changed"
    shutil.move(copied, tmp_path / "moved")
    shutil.rmtree(dataset)
    error = error_of(lambda: words(adapter))
    assert "not on this machine" in error.problem and "sartor index" in error.remedy and "retrieval" in error.remedy
    sartor.index(tmp_path / "moved")
    assert words(adapter).notes == []


def test_rows_of_another_dataset_are_ranked_by_two_methods(tmp_path: Path, adapter: Path) -> None:
    source = {"path": str(write_jsonl(tmp_path / "rows.jsonl", ROWS[:12])), "licence": "CC-BY-4.0"}
    sartor.curate({"sources": [source], "split": {"eval_fraction": 0}}, tmp_path / "other")
    result = words(adapter, data=tmp_path / "other")
    assert result.examples and "need not be those" in result.notes[0]
    error = error_of(lambda: words(adapter, data=tmp_path / "other", method="unrolled"))
    assert isinstance(error, ConfigError) and "--method retrieval" in error.remedy and "--data out" in error.remedy
    error = error_of(lambda: sartor.calibrate_trace(adapter, data=tmp_path / "other"))
    assert isinstance(error, ConfigError) and "--data out" in error.remedy


def test_adapter_tuned_elsewhere_has_retrieval_alone(tmp_path: Path, adapter: Path, dataset: Path) -> None:
    def fill(folder: Path) -> dict[str, Any]:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(adapter / name, folder / name)
        return {"base": open_artifact(adapter).manifest["base"], "parents": []}

    other = write_artifact(tmp_path / "other", "adapter", fill).path
    error = error_of(lambda: words(other))
    assert isinstance(error, ArtifactError) and "no recipe" in error.problem and "--data DATASET" in error.remedy
    assert words(other, data=dataset).examples[0].reply == "on:office"


def test_adapter_of_peft_alone_has_retrieval(tmp_path: Path, adapter: Path, dataset: Path) -> None:
    folder = tmp_path / "by peft"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        folder.mkdir(exist_ok=True)
        shutil.copyfile(adapter / name, folder / name)
    error = error_of(lambda: words(folder))
    assert "tuned elsewhere" in error.problem and f"sartor trace '{folder}' --data DATASET" in error.remedy
    result = sartor.trace(folder, "switch office on", "on:office", data=dataset)
    assert result.examples[0].reply == "on:office" and result.base_says_it is None
    for call in (
        lambda: words(folder, data=dataset, method="gradient"),
        lambda: sartor.prepare_trace(folder, data=dataset),
        lambda: sartor.calibrate_trace(folder, data=dataset),
    ):
        error = error_of(call)
        assert isinstance(error, ConfigError) and "--method retrieval" in error.remedy


def test_federated_adapter_names_the_clients(tmp_path: Path) -> None:
    facts = {"recipe": {"base": "tiny"}, "run": {"federated": {}}, "parents": []}
    made = write_artifact(tmp_path / "shared", "adapter", lambda part: facts).path
    error = error_of(lambda: words(made))
    assert "federated" in error.problem and "each client" in error.remedy


@pytest.mark.parametrize(
    ("options", "kind", "word"),
    [
        ({"reply": ""}, ConfigError, "empty"),
        ({"method": "guess"}, ConfigError, "guess"),
        ({"by": "colour"}, ConfigError, "colour"),
        ({"top": 0}, ConfigError, "top"),
        ({"prompt": [], "media": [Part("image", media="data:,")]}, ConfigError, "turns"),
        ({"target": None}, ConfigError, "no Release or Adapter"),
        ({"prompt": [{"role": "user"}]}, ConfigError, "no message"),
        ({"prompt": {"tools": []}}, ConfigError, "no `messages`"),
        ({"prompt": [{"role": "robot", "content": "x"}]}, ConfigError, "the role 'robot'"),
        ({"prompt": {"messages": [{"role": "user", "content": "x"}], "tools": 7}}, ConfigError, "tools"),
        ({"html": "."}, ConfigError, "the output . is a directory"),
    ],
)
def test_wrong_options_are_errors(adapter: Path, options: dict[str, Any], kind: type, word: str) -> None:
    given = {"target": adapter, "prompt": "switch office on", "reply": "on:office", "likelihood": False, **options}
    error = error_of(lambda: sartor.trace(**given))
    assert isinstance(error, kind) and word in error.problem and error.remedy


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ("--scores x.npy", "a matrix of scores needs queries"),
        ("--queries x.jsonl --prompt a --reply b", "queries are for a matrix"),
        ("--queries x.jsonl --prepare", "queries are for a matrix"),
        ("--prepare --calibrate", "one of --prepare and --calibrate"),
        ("--calibrate --queries q.jsonl --scores x.npy", "one of --calibrate and --scores"),
        ("--prepare --html x.html", "--html is of the trace of one reply"),
        ("--prepare --prompt a", "--prompt is of the trace of one reply"),
        ("--calibrate --by source", "--by is of the trace"),
        ("--queries q.jsonl --scores x.npy --reply b", "--reply is of the trace of one reply"),
    ],
)
def test_flags_of_all_rows_and_of_one_reply_exclude_each_other(
    adapter: Path, capsys: pytest.CaptureFixture[str], flags: str, word: str
) -> None:
    code, said = command(capsys, adapter, *flags.split())
    assert code == 2 and word in said["error"]["problem"] and said["error"]["remedy"]


@pytest.mark.parametrize("flag", ["--prepare", "--calibrate"])
def test_all_rows_need_a_target(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    code, said = command(capsys, flag)
    assert code == 2 and "no Release or Adapter" in said["error"]["problem"]


def test_request_with_tool_calls_is_the_prompt_that_was_served(adapter: Path) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "lamp", "arguments": '{"room": "office"}'}}
    turns = [
        {"role": "user", "content": "switch office on"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "done", "tool_call_id": "c1"},
    ]
    tools = [{"type": "function", "function": {"name": "lamp", "parameters": {"type": "object", "properties": {}}}}]
    result = sartor.trace(adapter, {"messages": turns, "tools": tools}, "on:office", likelihood=False)
    _, asked, answered = result.query.prompt[-3:]
    assert json.loads(asked.tool_calls)[0]["function"] == {"name": "lamp", "arguments": {"room": "office"}}
    assert answered.tool_call_id == "c1" and json.loads(result.query.tools) == tools
    assert result.examples[0].reply == "on:office"


def test_tuning_that_began_from_another_says_so(tmp_path: Path, adapter: Path, tune_recipe: dict[str, Any]) -> None:
    method = {**tune_recipe["method"], "start": str(adapter)}
    sartor.tune({**tune_recipe, "method": method}, tmp_path / "second", show=False)
    assert any(f"began from {adapter}" in note for note in words(tmp_path / "second").notes)
    assert not any("began from" in note for note in words(adapter).notes)


def test_ids_that_no_row_has_are_named(adapter: Path) -> None:
    traced = open_traced(adapter)
    first = traced.rows[0].example.id
    assert traced.find_rows([first, traced.rows[2].example.id[:20]]) == [0, 2]
    error = error_of(lambda: traced.find_rows([first, "feed"]))
    assert "no training row is 'feed'" in error.problem and f"-n {len(traced.rows)} lists" in error.remedy
    start = next(start for start in "0123456789abcdef" if sum(id.startswith(start) for id in traced.ids) > 1)
    error = error_of(lambda: traced.find_rows([start]))
    several = [id for id in traced.ids if id.startswith(start)]
    assert f"is the beginning of {len(several)} ids: {several[0][:16]}, {several[1][:16]}" in error.problem
    assert traced.find_rows([error.remedy.split()[-1]]) == [traced.ids.index(several[0])]


def test_reply_beyond_the_context_leaves_retrieval(adapter: Path, scored: list[Method]) -> None:
    reply = "on:office " * 400
    result = sartor.trace(adapter, "switch office on", reply)
    assert result.base_says_it is None and "positions" in result.notes[0] and result.examples
    error = error_of(lambda: sartor.trace(adapter, "switch office on", reply, method="unrolled"))
    assert isinstance(error, RequestError) and "--method retrieval" in error.remedy and not scored


def test_retrieval_works_without_torch(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sartor.core import lazy_import
    from sartor.core.errors import missing_package
    from sartor.trace import trace as verb

    def absent(module: str) -> Any:
        raise missing_package("torch", "tune")

    assert lazy_import.import_module is verb.import_module
    monkeypatch.setattr(verb, "import_module", absent)
    result = sartor.trace(adapter, "switch office on", "on:office")
    assert result.examples and result.base_says_it is None and "'torch'" in result.notes[0]


@pytest.fixture
def receipt(tmp_path: Path, tiny_base: Path) -> tuple[Path, str, ReceiptLog]:
    """Receipt of a served reply in a file, and the reply; the catalogue knows the team's folder."""
    _, finished, book = replied(tmp_path, tiny_base)
    book.write(finished)
    book.close()
    written = book.read("r1")
    (tmp_path / "receipt.json").write_text(json.dumps(written))
    return tmp_path / "receipt.json", finished.text, book


def test_reply_that_lost_its_line_end_is_the_one_that_was_served(
    tmp_path: Path, tiny_base: Path, dataset: Path
) -> None:
    """An editor's file has a line end more than the reply, and the command takes one away."""
    _, finished, book = replied(tmp_path, tiny_base)
    book.write(replace(finished, text="yes\n"))
    book.close()
    (tmp_path / "receipt.json").write_text(json.dumps(book.read("r1")))
    asked = {"system": "You are brief.", "receipt": tmp_path / "receipt.json", "data": dataset, "likelihood": False}
    for reply in ("yes", "yes\n"):
        assert sartor.trace(None, "turn on the light", reply, **asked).query.reply == "yes\n"
    assert "receipt r1" in error_of(lambda: sartor.trace(None, "turn on the light", "yes\n\n", **asked)).problem


def test_words_are_compared_with_the_receipt(receipt: tuple[Path, str, ReceiptLog], dataset: Path) -> None:
    file, reply, _ = receipt
    asked = {"system": "You are brief.", "receipt": file, "data": dataset, "likelihood": False}
    result = sartor.trace(None, "turn on the light", reply, **asked)
    assert result.served.receipt == "r1" and "reply" in result.served.compared
    assert result.traced.artifact.path.name == "faq"
    for changed in (
        ("turn off the light", reply, {}),
        ("turn on the light", f"{reply}!", {}),
        ("turn on the light", f"{reply}\n", {}),
    ):
        error = error_of(lambda: sartor.trace(None, changed[0], changed[1], **asked))
        assert isinstance(error, ArtifactError) and "receipt r1" in error.problem
    error = error_of(lambda: sartor.trace(None, "turn on the light", reply, **{**asked, "system": "Be long."}))
    assert "system" in error.problem
    error = error_of(lambda: sartor.trace(None, "", reply, **asked))
    assert isinstance(error, ConfigError) and "no words" in error.problem


def test_receipt_needs_its_teams_key_and_version(
    receipt: tuple[Path, str, ReceiptLog], adapter: Path, tmp_path: Path
) -> None:
    file, reply, _ = receipt
    asked = {"system": "You are brief.", "receipt": file, "likelihood": False}
    error = error_of(lambda: sartor.trace(adapter, "turn on the light", reply, **asked))
    assert isinstance(error, ConfigError) and "the receipt r1 is of" in error.problem
    key = next(tmp_path.rglob("receipts.key"))
    key.rename(tmp_path / "kept.key")
    error = error_of(lambda: sartor.trace(None, "turn on the light", reply, **asked))
    assert isinstance(error, ConfigError) and "--team" in error.remedy


def test_receipt_of_a_user_names_their_own_adapter(tmp_path: Path, adapter: Path) -> None:
    own = folder_of(tmp_path / "state", "p1", "faq") / "ab12" / "adapter"
    shutil.copytree(adapter, own)
    digest = adapter_digest(open_artifact(adapter).manifest["files"])
    receipt = {"id": "r1", "person": "p1", "agent": "faq@1.0+own", "adapter": digest, "release": "d" * 64}
    assert _adapter_of(receipt, None, tmp_path / "state") == own
    error = error_of(lambda: _adapter_of({**receipt, "adapter": "0" * 64}, None, tmp_path / "state"))
    assert "tuned again or forgotten" in error.remedy
    error = error_of(lambda: _adapter_of({**receipt, "person": "", "release": ""}, None, tmp_path / "state"))
    assert "the base gave" in error.problem


def test_terminal_shows_a_line_a_row(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["trace", str(adapter), "--prompt", "switch office on", "--reply", "on:office", "--no-likelihood"])
    out = capsys.readouterr().out
    assert not ended.value.code and "not measured" in out and "--calibrate" in out
    assert sum("rows.jsonl:" in line for line in out.splitlines()) == 10
