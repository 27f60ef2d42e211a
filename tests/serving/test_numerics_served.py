"""Receipts, logs of plans, admitted copies and router features say which arithmetic made them; another one's is no error."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sartor
from admission_fakes import Fake, maker  # noqa: F401
from plan_fakes import DIGEST, planned
from plan_logs import PLAN, WORDS, again, logged, script
from receipt_fakes import command, given, replied
from sartor.core.errors import ArtifactError
from sartor.core.numerics import NUMERICS
from sartor.inference.engine import EngineInfo
from sartor.models import base as bases_in_memory
from sartor.serving.admission import admission
from sartor.serving.admission.admission import AdmissionContext
from sartor.serving.commands.plan_replay import Remaking
from sartor.serving.plans.plan_log import FinishedRun, PlanLog, read_runs
from sartor.serving.plans.plan_steps import StepLogEntry
from sartor.serving.receipts import TeamSigner, build_receipt
from sartor.serving.routing import agent_classifier
from sartor.serving.routing.exemplars import ExemplarPrompt, Exemplars
from sartor.serving.team_config import load

OLD = f"not checked: made by numerics 1, and this version computes bfloat16 by numerics {NUMERICS['bfloat16']}"
DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def about(kind: str = "local", dtype: str = "bfloat16") -> EngineInfo:
    return EngineInfo(kind, "tiny", "b" * 64, "c" * 64, 512, 4, dtype, "cpu")


@pytest.fixture
def seal(tmp_path: Path) -> TeamSigner:
    state = tmp_path / ".team"
    state.mkdir(mode=0o700)
    (tmp_path / "team.yaml").write_text("base: starter\n")
    return TeamSigner.of(state)


@pytest.mark.parametrize(
    ("kind", "dtype", "wanted"), [("local", "bfloat16", NUMERICS["bfloat16"]), ("local", "float32", 1)]
)
def test_a_receipt_of_the_own_engine_states_its_arithmetic(
    kind: str, dtype: str, wanted: int, seal: TeamSigner
) -> None:
    assert build_receipt(given(), about(kind, dtype), seal)["numerics"] == wanted


@pytest.mark.parametrize(("kind", "dtype"), [("llamacpp", "F16"), ("openai", "")])
def test_a_receipt_of_another_engine_states_none(kind: str, dtype: str, seal: TeamSigner) -> None:
    assert "numerics" not in build_receipt(given(), about(kind, dtype), seal)


def signed(seal: TeamSigner, receipt: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The receipt with changes, signed anew; None takes a key away."""
    said = {key: value for key, value in {**receipt, **changes}.items() if key != "signature" and value is not None}
    return seal.sign(said)


def check(tmp_path: Path, receipt: dict[str, Any], reply: str, team: Path) -> str:
    """What `sartor receipt verify` says of the text."""
    words = [{"role": "user", "content": "turn on the light"}]
    (tmp_path / "r.json").write_text(json.dumps({"receipt": receipt, "messages": words, "reply": reply}))
    return sartor.verify_receipt(tmp_path / "r.json", team=team).checked["text"]


@DTYPES
def test_a_greedy_reply_is_made_anew_only_by_its_own_arithmetic(
    dtype: str, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bases_in_memory, "best_dtype", lambda device: getattr(torch, dtype))
    team, reply, book = replied(tmp_path, tiny_base)
    seal = TeamSigner.of(Path(load(team).state))
    book.write(reply)
    receipt = dict(book.read("r1") or {})
    book.close()
    assert receipt["numerics"] == NUMERICS.get(dtype, 1)
    assert check(tmp_path, receipt, reply.text, team) == "made anew, the same"
    old = signed(seal, receipt, numerics=None)
    if dtype == "float32":
        assert check(tmp_path, old, reply.text, team) == "made anew, the same"
        forged = seal.digest("reply", "Other words.")
        lie = signed(seal, old, reply={"text": forged, "tool_calls": ""})
        with pytest.raises(ArtifactError, match="does not say this again"):
            check(tmp_path, lie, "Other words.", team)
    else:
        assert check(tmp_path, old, reply.text, team).startswith(OLD)
    newer = check(tmp_path, signed(seal, receipt, numerics=7), reply.text, team)
    assert newer.startswith("not checked: made by numerics 7, of a newer Sartor")
    monkeypatch.setitem(NUMERICS, dtype, 9)
    changed = check(tmp_path, receipt, reply.text, team)
    assert changed.startswith(
        f"not checked: made by numerics {receipt['numerics']}, and this version computes {dtype} by"
    )


def test_old_bfloat16_receipt_is_valid_with_text_unchecked(
    tmp_path: Path, seal: TeamSigner, capsys: pytest.CaptureFixture[str]
) -> None:
    """Verify names the skipped check; a reply with another digest is still refused with exit code 3."""
    call = replace(given().call, tools=(), schema="")
    receipt = build_receipt(given(release="", call=call), about(), seal)
    (tmp_path / "r.json").write_text(json.dumps(signed(seal, receipt, numerics=None)))
    code, said = command(capsys, "receipt", "verify", tmp_path / "r.json", "--team", tmp_path / "team.yaml")
    assert (code, said["valid"]) == (0, True) and said["checked"]["text"].startswith(OLD)
    # what was said is still held against its digest
    at = ("receipt", "verify", tmp_path / "r.json", "--team", tmp_path / "team.yaml", "--reply", "another")
    assert command(capsys, *at)[0] == 3


def test_other_engines_receipts_are_checked_as_ever(tmp_path: Path, seal: TeamSigner) -> None:
    call = replace(given().call, tools=(), schema="")
    receipt = build_receipt(given(release="", call=call), about("llamacpp", "BF16"), seal)
    (tmp_path / "r.json").write_text(json.dumps(receipt))
    found = sartor.verify_receipt(tmp_path / "r.json", team=tmp_path / "team.yaml")
    assert found.checked["text"] == "not checked: give the messages and the reply"


def test_the_first_line_of_a_run_states_the_engine(tmp_path: Path) -> None:
    line, old, new = (
        StepLogEntry("", "answer", "p@1", "answered"),
        PlanLog(tmp_path, DIGEST),
        PlanLog(tmp_path, DIGEST, about=about),
    )
    for log in (old, new):
        log.write(FinishedRun("r", "p@1", line, (line,), line, content=False, began=0.0))
    before, after = (
        next(read_runs(file)) for file in sorted(tmp_path.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    )
    assert not {"engine", "numerics"} & set(before[0])
    assert (
        after[0]["engine"] == {"kind": "local", "dtype": "bfloat16", "device": "cpu"}
        and after[0]["numerics"] == NUMERICS["bfloat16"]
    )
    assert not any("numerics" in row for row in after[1:])


async def test_a_run_of_another_arithmetic_is_not_made_again(tmp_path: Path) -> None:
    team = planned(tmp_path, PLAN)
    rows = await logged(tmp_path, team, script())
    stated = [{**rows[0], **about().made_by}, *rows[1:]]
    assert (await again(team, stated, script(), WORDS)).is_same
    stated[0]["numerics"] = 1
    replies = script()
    done = await again(team, stated, replies, WORDS)
    assert done.note.startswith(OLD) and not done.is_same and done.differs is None and replies.asked == []


async def test_a_run_that_states_no_engine_is_of_this_one(tmp_path: Path) -> None:
    team = planned(tmp_path, PLAN)
    rows = await logged(tmp_path, team, script())

    same = await Remaking(team, script(), DIGEST, WORDS, about(dtype="float32")).remake(rows)
    other = await Remaking(team, script(), DIGEST, WORDS, about(dtype="bfloat16")).remake(rows)
    assert same.is_same and other.note.startswith(OLD)


@pytest.fixture
def ground(maker: Any, tmp_path: Path) -> Callable[[str], AdmissionContext]:  # noqa: F811
    def of(dtype: str) -> AdmissionContext:
        made = EngineInfo("local", "tiny", maker.facts["digest"], maker.facts["template_digest"], 512, 4, dtype, "cpu")
        return AdmissionContext(made, maker.base, tmp_path / "state", maker.public)

    return of


@DTYPES
def test_copy_of_other_numerics_is_admitted_again_once(
    dtype: str,
    maker: Any,
    ground: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,  # noqa: F811
) -> None:
    """A bfloat16 copy without numerics calls the engine once more; a float32 copy does not."""
    first = admission.admit_sync(maker.good(tmp_path / "good"), ground(dtype), Fake())
    note = first.path / ".admitted.json"
    said = json.loads(note.read_text())
    assert said["numerics"] == NUMERICS.get(dtype, 1)
    del said["numerics"]  # as every version before wrote it
    note.write_text(json.dumps(said))
    asked = []
    for _ in range(2):
        fake = Fake()
        assert admission.admit_sync(first.path, ground(dtype), fake).adapter == first.adapter
        asked.append(bool(fake.calls))
    assert asked == [dtype == "bfloat16", False]


def fitted(count: int = 8) -> tuple[Exemplars, agent_classifier.GeneralPrompts, Any]:
    found = Exemplars(tuple(ExemplarPrompt(f"a:{n}", f"switch on lamp {n}") for n in range(count)))
    source = np.random.default_rng(0)
    general = source.normal(size=(len(agent_classifier.general_texts()), 6)).astype(np.float32)
    texts = agent_classifier.rows_of(found).texts
    return found, agent_classifier.make("base", general), source.normal(size=(len(texts), 6)).astype(np.float32)


@DTYPES
def test_router_features_of_other_numerics_are_not_opened(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts and vectors of the base depend on numerics; those of a library encoder do not."""
    found, ground, vectors = fitted()
    made = agent_classifier.fit(found, ground, vectors)
    agent_classifier.save_part(tmp_path, "base", made)  # as every version before wrote it
    agent_classifier.save_vectors(tmp_path, "base", "d", vectors)
    is_old = dtype == "bfloat16"
    assert (agent_classifier.open_part(tmp_path, "base", made.digest, dtype) is None) == is_old
    assert (agent_classifier.open_vectors(tmp_path, "base", "d", dtype) is None) == is_old
    agent_classifier.save_part(tmp_path, "base", made, dtype)
    agent_classifier.save_vectors(tmp_path, "base", "d", vectors, dtype)
    assert agent_classifier.open_part(tmp_path, "base", made.digest, dtype) is not None
    assert agent_classifier.open_vectors(tmp_path, "base", "d", dtype) is not None
    monkeypatch.setitem(NUMERICS, dtype, 9)
    assert agent_classifier.open_part(tmp_path, "base", made.digest, dtype) is None
    assert agent_classifier.open_vectors(tmp_path, "base", "d", dtype) is None
    assert agent_classifier.open_part(tmp_path, "base", made.digest) is not None, (
        "an encoder of another library has no numerics"
    )
