"""Proof by retraining: the verdict, its controls, resumption, signature, and a planted fact on the tiny base."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import sartor
import tiny
from sample_data import write_jsonl
from sartor.cli import main
from sartor.core import records, signing
from sartor.core.errors import ArtifactError, ConfigError, ModelError, RequestError, SignatureError
from sartor.core.filesystem import FileSystem
from sartor.core.parquet_io import read_examples
from sartor.core.records import Part
from sartor.core.signed_document import sign_document
from sartor.personalization.erasure_receipt import TEAM_FIELDS, check_receipt, write_receipt
from sartor.trace import ablation
from sartor.trace.ablation import match_controls
from sartor.trace.ablation_proof import Verdict, check_ablation, judge

PLACES = ("kitchen", "hall", "attic", "garage", "patio", "office", "cellar", "porch", "den", "loft", "yard", "shed")
FACT = ("where is the spare key", "under the blue pot")
WORDS = ("on", "off", "up")


def row(prompt: str, reply: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]}


# -- the verdict


@pytest.mark.parametrize(
    ("suspects", "controls", "verdict"),
    [
        (3.0, [0.1, -0.1, 0.0, 0.2, 0.0], Verdict.PROVEN),
        (0.1, [0.1, -0.1, 0.0, 0.2, 0.0], Verdict.NOT_PROVEN),
        (-3.0, [0.1, -0.1, 0.0, 0.2, 0.0], Verdict.NOT_PROVEN),
        (0.09, [0.0] * 5, Verdict.NOT_PROVEN),  # surely above the controls, and too small to matter
        (3.0, [2.9, -3.0, 0.0, 1.5, -2.0], Verdict.CANNOT_TELL),
    ],
)
def test_verdict_by_effect_and_spread(suspects: float, controls: list[float], verdict: Verdict) -> None:
    judgement = judge(suspects, controls, gain=5.0)
    assert judgement.verdict is verdict
    assert judgement.low <= judgement.estimate <= judgement.high


def test_verdict_needs_less_where_the_tuning_added_more() -> None:
    """A fifth of what the tuning added must be seen; the same spread hides it of a small gain."""
    controls = [0.3, -0.3, 0.0, 0.2, -0.2]
    assert judge(0.5, controls, gain=1.0).verdict is Verdict.CANNOT_TELL
    assert judge(0.5, controls, gain=20.0).verdict is Verdict.NOT_PROVEN


def test_level_of_the_verdict_is_held() -> None:
    """Of suspects that are like their controls, 2.5 % lie above the interval, and fewer are proven."""
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(4000, 6))
    judgements = [judge(float(draw[0]), draw[1:].tolist(), gain=5.0) for draw in draws]
    above = np.mean([judgement.low > 0 for judgement in judgements])
    proven = np.mean([judgement.verdict is Verdict.PROVEN for judgement in judgements])
    assert 0.019 < above < 0.031
    assert proven <= above


def test_power_of_the_verdict_is_as_stated() -> None:
    """An effect of the size `detectable` is seen with the chance 0.8."""
    rng = np.random.default_rng(0)
    spread = judge(0.0, [1.0, -1.0, 0.0, 0.5, -0.5], gain=5.0)
    unit = (spread.detectable - 0.1) / np.std([1.0, -1.0, 0.0, 0.5, -0.5], ddof=1)
    draws = rng.normal(size=(4000, 6))
    seen = np.mean([judge(draw[0] + 0.1 + unit, draw[1:].tolist(), 5.0).verdict is Verdict.PROVEN for draw in draws])
    assert 0.77 < seen < 0.83


# -- controls


def test_controls_are_disjoint_and_nearest_by_score() -> None:
    scores = np.array([0.9, 0.5, 0.88, 0.87, 0.52, 0.49, 0.0, 0.1])
    lengths = np.full(8, 5)
    sets = match_controls(scores, lengths, suspects=[0, 1], candidates=[2, 3, 4, 5, 6, 7], sets=2)
    assert sorted(index for indices in sets for index in indices) == [2, 3, 4, 5]
    # each set has one row near either suspect, and takes the nearest in turn
    assert [sorted(indices) for indices in sets] == [[2, 4], [3, 5]]


def test_controls_of_equal_score_are_nearest_by_length() -> None:
    scores, lengths = np.zeros(5), np.array([10, 90, 11, 50, 12])
    assert match_controls(scores, lengths, suspects=[0], candidates=[1, 2, 3, 4], sets=2) == [(2,), (4,)]


# -- retrains that are made up


@pytest.fixture
def key(tmp_path: Path) -> Path:
    sartor.keygen(tmp_path / "proof-key", trust=True, purposes=("proof",))
    return tmp_path / "proof-key"


def fake_replay(
    effects: Mapping[int, float], count: Path, *, killed_after: int = 10**6, loss: float = 1.0
) -> Callable[..., Any]:
    """A tuning whose reply loses `effects` of each row that is left out; it counts retrains in a file."""

    def retrain(weights: Any = None, *, seed: int, notice: Any = None) -> dict[str, float]:
        done = len(count.read_text()) if count.exists() else 0
        if done >= killed_after:
            os.kill(os.getpid(), signal.SIGKILL)
        count.write_text("x" * (done + 1))
        left_out = [] if weights is None else np.flatnonzero(np.asarray(weights) == 0).tolist()
        # each seed has its own level, and each row a small effect of its own
        return {"loss": loss + seed + sum(effects.get(index, 0.01 * (index % 3)) for index in left_out)}

    def losses(parameters: Mapping[str, float], queries: Sequence[Any]) -> Any:
        return np.array([parameters["loss"] + 0.1 * index for index in range(len(queries))])

    return lambda traced, notice: SimpleNamespace(
        restart=lambda: None,
        parameters=lambda: {"loss": 9.0},
        encode=lambda query: None,
        retrain=retrain,
        losses=losses,
        difference=lambda parameters, queries: SimpleNamespace(adapter_losses=(1.0,), approximate=""),
    )


def ids_of(dataset: Path, split: str = "train") -> list[str]:
    return [example.id for example in read_examples(sartor.open(dataset), split)]


@pytest.fixture
def asked(adapter: Path, dataset: Path, key: Path, tmp_path: Path) -> dict[str, Any]:
    """Arguments of an ablation of the first training row."""
    return {
        "path": adapter,
        "examples": ids_of(dataset)[:1],
        "prompt": "switch kitchen on",
        "reply": "on:kitchen",
        "out": tmp_path / "proof",
        "key": key,
    }


def test_proof_states_effects_and_names_no_text_of_rows(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation.Replay, "open", fake_replay({0: 3.0}, tmp_path / "count"))
    done = sartor.ablate(**asked, seeds=2)
    assert done.verdict == "proven"
    fields = check_ablation(asked["out"])
    assert fields["suspects"] == {
        "examples": asked["examples"],
        "likeness": fields["suspects"]["likeness"],
        "by_seed": [3.0, 3.0],
        "effect": 3.0,
    }
    assert fields["seeds"] == [0, 1] and fields["retrains"] == 14 == len((tmp_path / "count").read_text())
    assert len(fields["controls"]) == 5 and not any(
        set(control["examples"]) & set(asked["examples"]) for control in fields["controls"]
    )
    assert fields["effect"]["low"] > 2.5
    assert fields["loss"] == {"before_tuning": 9.0, "tuned": 1.5, "adapter": 1.0}
    assert fields["metric"]["rows"] == len(ids_of(asked["path"].parent / "dataset", "eval"))
    # the held-out loss rises by as much in this fake, where it is one number
    assert fields["metric"]["difference"] == pytest.approx(3.0)
    text = done.proof.read_text()
    assert "switch kitchen on" in text and "switch hall" not in text
    assert done.proof.stat().st_mode & 0o077 == 0
    assert not asked["out"].with_name("proof.retrains").exists()
    assert {"effect", "controls", "verdict"} <= set(done.as_json())


def ablate_killed(asked: dict[str, Any]) -> None:
    """Run an ablation whose replay kills its process."""
    pid = os.fork()
    if not pid:
        try:
            sartor.ablate(**asked)
        finally:
            os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def test_ablation_killed_between_retrains_goes_on(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No retrain is made twice, and more controls reuse those that are there."""
    count = tmp_path / "count"
    monkeypatch.setattr(ablation.Replay, "open", fake_replay({0: 3.0}, count, killed_after=4))
    ablate_killed(asked)
    assert len(count.read_text()) == 4
    lines: list[str] = []
    monkeypatch.setattr(ablation.Replay, "open", fake_replay({0: 3.0}, count))
    done = sartor.ablate(**asked, notice=lines.append)
    assert any("4 of 7 retrains are there" in line for line in lines)
    assert len(count.read_text()) == 7 and done.fields["retrains"] == 7
    whole = sartor.ablate(**{**asked, "out": tmp_path / "again"})
    names = ("suspects", "controls", "loss", "metric", "effect", "verdict")
    assert all(whole.fields[name] == done.fields[name] for name in names)


def test_damaged_result_of_a_retrain_is_made_again(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = tmp_path / "count"
    monkeypatch.setattr(ablation.Replay, "open", fake_replay({0: 3.0}, count, killed_after=4))
    ablate_killed(asked)
    files = [file for file in (tmp_path / "proof.retrains").iterdir() if not file.name.startswith("around")]
    files[0].write_bytes(files[0].read_bytes()[:-4])
    monkeypatch.setattr(ablation.Replay, "open", fake_replay({0: 3.0}, count))
    assert sartor.ablate(**asked).verdict == "proven"
    assert len(count.read_text()) == 8


@pytest.mark.parametrize("content", [b"{}", b"[]", b'{"reply": [], "held_out": 3, "adapter": "x"}'])
def test_results_of_another_form_are_made_again(
    content: bytes, asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = tmp_path / "count"
    monkeypatch.setattr(ablation.Replay, "open", fake_replay({0: 3.0}, count, killed_after=4))
    ablate_killed(asked)
    for file in (tmp_path / "proof.retrains").glob("*.json"):
        file.write_bytes(content)
    monkeypatch.setattr(ablation.Replay, "open", fake_replay({0: 3.0}, count))
    assert sartor.ablate(**asked).verdict == "proven"
    assert len(count.read_text()) == 11


def test_proof_of_turns_has_the_digests_of_media(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation.Replay, "open", fake_replay({0: 3.0}, tmp_path / "count"))
    call = {"id": "c1", "type": "function", "function": {"name": "lamp", "arguments": "{}"}}
    turns = [
        {"role": "user", "content": "switch kitchen on"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "done", "tool_call_id": "c1"},
    ]
    said = sartor.ablate(**{**asked, "prompt": {"messages": turns, "tools": []}}).fields["prompt"]
    assert [turn["role"] for turn in said][-3:] == ["user", "assistant", "tool"]
    assert said[-2]["tool_calls"][0]["function"]["name"] == "lamp" and said[-1]["tool_call_id"] == "c1"
    image = Part("image", media=f"data:image/png;base64,{base64.b64encode(b'png').decode()}")
    said = sartor.ablate(**{**asked, "out": tmp_path / "image"}, media=[image]).fields["prompt"]
    assert said[-1]["media"] == [{"type": "image", "sha256": hashlib.sha256(b"png").hexdigest()}]
    assert "base64" not in json.dumps(said)


def test_retrain_without_finite_loss_proves_nothing(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation.Replay, "open", fake_replay({0: float("inf")}, tmp_path / "count"))
    with pytest.raises(ModelError, match="no finite loss"):
        sartor.ablate(**asked)
    assert not asked["out"].exists()


def test_duplicates_of_a_suspect_are_no_controls(
    tmp_path: Path, tiny_base: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same words in another case would hide the effect, as they teach the same."""
    rows = [row(f"switch {place} on", f"on:{place}") for place in PLACES]
    write_jsonl(tmp_path / "rows.jsonl", [*rows, row("Switch Kitchen on", "on:kitchen")])
    source = {"path": str(tmp_path / "rows.jsonl"), "licence": "CC0-1.0"}
    sartor.curate({"sources": [source], "split": {"eval_fraction": 0.0}, "workers": 1}, tmp_path / "data")
    data = {"path": str(tmp_path / "data"), "eval_fraction": 0.0}
    recipe = {"base": str(tiny_base), "data": data, "budget": {"updates": 1}}
    monkeypatch.setattr("sartor.tune.trainer.plot_losses", lambda lines, file: file.touch())
    sartor.tune(recipe, tmp_path / "tuned", show=False)
    first = next(example.id for example in read_examples(sartor.open(tmp_path / "data")) if "kitchen" in example.reply)
    lines: list[str] = []
    monkeypatch.setattr(ablation.Replay, "open", fake_replay({}, tmp_path / "count"))
    said = {"prompt": "switch kitchen on", "reply": "on:kitchen", "out": tmp_path / "proof", "key": key}
    fields = sartor.ablate(tmp_path / "tuned", [first], **said, notice=lines.append).fields
    (duplicate,) = fields["duplicates"]
    assert duplicate != first and all(duplicate not in control["examples"] for control in fields["controls"])
    assert any(duplicate[:16] in line for line in lines)
    assert fields["metric"] is None


# -- signature


def test_changed_proof_is_refused(asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation.Replay, "open", fake_replay({}, tmp_path / "count"))
    proof = sartor.ablate(**asked).proof
    proof.write_text(proof.read_text().replace('"verdict": "not_proven"', '"verdict": "proven"'))
    with pytest.raises(SignatureError, match="was changed"):
        check_ablation(proof)


def test_signed_verdict_that_does_not_follow_is_refused(
    asked: dict[str, Any], key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation.Replay, "open", fake_replay({}, tmp_path / "count"))
    fields = sartor.ablate(**asked).fields
    file = tmp_path / "other.json"
    private = signing.open_private(key)
    for change in ({"verdict": "proven"}, {"controls": fields["controls"][:3]}, {"loss": {}}):
        file.write_bytes(sign_document({**fields, **change}, private, "proof"))
        with pytest.raises(SignatureError, match="does not follow"):
            check_ablation(file)


def test_other_signed_documents_are_no_proof_by_retraining(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key for proofs signs erasures too, and neither passes as the other."""
    sartor.keygen(tmp_path / "both", trust=True, purposes=("proof", "receipt"))
    private = signing.open_private(tmp_path / "both")
    erasure = write_receipt(FileSystem(), tmp_path, dict.fromkeys(TEAM_FIELDS, True), private)
    with pytest.raises(SignatureError, match="kind 'forgotten'"):
        check_ablation(erasure)
    monkeypatch.setattr(ablation.Replay, "open", fake_replay({}, tmp_path / "count"))
    done = sartor.ablate(**{**asked, "key": tmp_path / "both"})
    with pytest.raises(SignatureError, match="kind 'ablation'"):
        check_receipt(done.proof)
    # the same content, signed as a receipt of a reply
    done.proof.write_bytes(sign_document(done.fields, private, "receipt"))
    with pytest.raises(SignatureError, match="purpose 'receipt', not proof"):
        check_ablation(done.proof)


def test_key_of_another_purpose_is_refused_before_any_retrain(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation.Replay, "open", fake_replay({}, tmp_path / "count"))
    sartor.keygen(tmp_path / "release-key", trust=True)
    with pytest.raises(ConfigError, match="not for proof"):
        sartor.ablate(**{**asked, "key": tmp_path / "release-key"})
    with pytest.raises(ConfigError, match="no key is given"):
        sartor.ablate(**{**asked, "key": None})
    with pytest.raises(ConfigError, match="there is no private key"):
        sartor.ablate(**{**asked, "key": tmp_path / "nowhere"})
    assert not (tmp_path / "count").exists()


def test_schema_of_a_newer_proof_is_refused(
    asked: dict[str, Any], key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation.Replay, "open", fake_replay({}, tmp_path / "count"))
    done = sartor.ablate(**asked)
    done.proof.write_bytes(sign_document({**done.fields, "schema": 2}, signing.open_private(key), "proof"))
    with pytest.raises(SignatureError, match="the schema 2"):
        check_ablation(done.proof)


# -- input that cannot be used


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"examples": ["nothing"]}, "no training row is 'nothing'"),
        ({"examples": []}, "no suspect is named"),
        ({"examples": "all"}, "all 30 training rows are suspected"),
        ({"examples": "six"}, "5 control sets of 6 rows need 30 other rows; there are 24, for 4 sets"),
        ({"controls": 4}, "--controls is 4"),
        ({"seeds": 0}, "--seeds is 0"),
        ({"reply": ""}, "the reply is empty"),
        ({"controls": 40}, "40 control sets of 1 rows need 40 other rows; there are 29, for 29 sets"),
    ],
)
def test_ablation_that_cannot_be_made_is_refused(
    asked: dict[str, Any], dataset: Path, change: dict[str, Any], problem: str
) -> None:
    groups = {"all": ids_of(dataset), "six": ids_of(dataset)[:6]}
    if isinstance(change.get("examples"), str):
        change = {"examples": groups[change["examples"]]}
    with pytest.raises(ConfigError) as raised:
        sartor.ablate(**{**asked, **change})
    assert problem in raised.value.problem
    assert not list(asked["out"].parent.glob("proof.*"))


def test_one_suspect_among_too_few_rows_needs_more_rows(
    asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one suspect none can be left out."""
    monkeypatch.setattr(ablation, "LEAST_CONTROLS", 30)
    with pytest.raises(ConfigError, match="there are 29, for 29 sets") as raised:
        sartor.ablate(**asked, controls=30)
    assert raised.value.remedy.startswith("tune on more rows: one suspect needs 30")


def test_dataset_that_is_gone_or_changed_is_named(asked: dict[str, Any], dataset: Path) -> None:
    part = next(dataset.glob("examples/*.parquet"))
    content = part.read_bytes()
    part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="Dataset"):
        sartor.ablate(**asked)
    dataset.rename(dataset.with_name("elsewhere"))
    with pytest.raises(ArtifactError, match="not on this machine"):
        sartor.ablate(**asked)


def test_reply_longer_than_the_context_is_refused(asked: dict[str, Any], fp32: None) -> None:
    with pytest.raises(RequestError, match="the base has 512"):
        sartor.ablate(**{**asked, "reply": "on " * 600})


def test_proof_is_not_written_over_another(asked: dict[str, Any], tmp_path: Path) -> None:
    asked["out"].mkdir()
    (asked["out"] / "notes").touch()
    with pytest.raises(ConfigError, match="exists"):
        sartor.ablate(**asked)


# -- a real tuning


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter that learnt one fact among commands, and whose words other rows share."""
    folder = tmp_path_factory.mktemp("made")
    base = tiny.write_base(folder / "base", initializer_range=0.3, pad_token_id=0)
    commands = [row(f"switch {place} {word}", f"{word}:{place}") for place in PLACES for word in WORDS]
    near = [row(f"where is the {place} key", f"in the {place}") for place in PLACES[:8]]
    write_jsonl(folder / "rows.jsonl", [*commands, *near, row(*FACT)])
    held = [row(f"switch {place} down", f"down:{place}") for place in PLACES]
    write_jsonl(folder / "held.jsonl", held)
    sources = [
        {"path": str(folder / f"{name}.jsonl"), "licence": "CC0-1.0", "split": split}
        for name, split in (("rows", "train"), ("held", "eval"))
    ]
    recipe = {
        "base": {"name": str(base), "bits": 32},
        "data": {"path": str(folder / "data")},
        "method": {"rank": 8, "alpha": 16},
        "budget": {"updates": 40},
        "optimizer": {"learning_rate": 1e-2, "batch_tokens": 256},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sartor.tune.trainer.plot_losses", lambda lines, file: file.touch())
        patch.setenv("SARTOR_HOME", str(folder / "home"))
        sartor.curate({"sources": sources, "workers": 1}, folder / "data")
        sartor.tune(recipe, folder / "adapter", show=False)
    return folder


def row_id(folder: Path, prompt: str) -> str:
    rows = read_examples(sartor.open(folder / "data"), "train")
    return next(example.id for example in rows if example.prompt[-1].text == prompt)


def test_planted_fact_is_proven_and_near_rows_are_not(made: Path, key: Path, tmp_path: Path) -> None:
    """The rows that share most words with the question did not cause the reply."""
    said = {"prompt": FACT[0], "reply": FACT[1], "key": key}
    proven = sartor.ablate(made / "adapter", [row_id(made, FACT[0])], **said, out=tmp_path / "true")
    assert proven.verdict == "proven", proven.fields
    assert proven.fields["effect"]["low"] > 1 and proven.fields["approximate"] == ""
    assert abs(proven.fields["loss"]["tuned"] - proven.fields["loss"]["adapter"]) < 0.02
    near = row_id(made, "where is the kitchen key")
    innocent = sartor.ablate(made / "adapter", [near], **said, out=tmp_path / "false")
    assert innocent.verdict != "proven", innocent.fields
    # the controls resemble the question as the suspect does: most of them ask where a key is
    likeness = [control["likeness"] for control in innocent.fields["controls"]]
    assert min(likeness) > 0 and innocent.fields["suspects"]["likeness"] > 0


def test_ablate_and_check_print_json(
    made: Path, key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = ["--prompt", FACT[0], "--reply", FACT[1], "--out", str(tmp_path / "proof"), "--key", str(key)]
    with pytest.raises(SystemExit) as ended:
        main(["ablate", str(made / "adapter"), "--examples", row_id(made, FACT[0])[:12], *said, "--json"])
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert ended.value.code == 0 and printed["verdict"] == "proven"
    assert set(printed["effect"]) == {"estimate", "low", "high"} and len(printed["controls"]) == 5
    with pytest.raises(SystemExit) as ended:
        main(["ablate", "check", printed["proof"], "--json"])
    checked = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert ended.value.code == 0 and checked["effect"] == printed["effect"]
    assert records.canonical(checked["controls"]) == records.canonical(printed["controls"])
