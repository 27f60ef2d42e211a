"""A user's own version of a served agent: tuned, gated, and forgotten so that nothing of it is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import sartor
from dispatch_fakes import FakeCrew, FakeReceipts, asked, dispatching, said, until
from sample_data import ROWS
from sartor.core import home
from sartor.core.artifacts import open_artifact
from sartor.core.errors import (
    ConfigError,
    GateError,
    RefusedError,
    SourceError,
    UnknownAgentError,
)
from sartor.core.filesystem import writer_lock
from sartor.inference.engine import EngineInfo
from sartor.learn.user_data import SearchTerms
from sartor.models.lora_tensors import rank_of, split_ranks
from sartor.serving.admission.admission import AdmissionContext, admit_personal
from sartor.serving.commands.agent_commands import _looked_at
from sartor.serving.receipts import ReceiptLog
from sartor.serving.registry.registry import Registry
from sartor.serving.registry.registry_schema import AgentVersion
from sartor.serving.registry.user_versions import is_personal
from sartor.serving.team_config import load
from served_person import CANARY, others_rows, person, say, state_of, team

__all__ = ["team"]

OPTIONS = {"epochs": 20.0, "learning_rate": 2e-2}


def options(**changes: Any) -> Any:
    return sartor.PersonalOptions(**{"agent": "switch", "user": "ada", **OPTIONS, **changes})


def holding(text: str, *folders: Path) -> list[str]:
    """Every file below these folders that has a text in its bytes, or in the columns of its rows; the inbox of a test apart."""
    found = []
    for file in (file for folder in folders for file in folder.rglob("*") if file.is_file()):
        if text.encode() in file.read_bytes() or file.suffix == ".parquet" and text in json.dumps(sartor_rows(file)):
            found.append(file.name)
    return found


def sartor_rows(file: Path) -> Any:
    import pyarrow.parquet as pq

    return [{name: repr(value) for name, value in row.items()} for row in pq.read_table(file).to_pylist()]


async def reply_for(file: Path, user: str) -> tuple[str, str, list[Any]]:
    """(agent, the adapter that made the reply, receipts) of a served team with a crew that computes nothing."""
    made, crew, receipts = load(file), FakeCrew(), FakeReceipts()
    base = open_artifact(file.parent / "switch-1.0", "release").manifest["base"]
    about = EngineInfo("local", base["name"], base["digest"], base["template_digest"], 512, 4)

    async def admit(path: Path, name: str) -> AgentVersion:
        if is_personal(path, Path(made.state)):
            return admit_personal(path, name, AdmissionContext.of(made, about))
        return _looked_at(made, path, name)

    async with dispatching(made, crew, Registry.open(made.registry_url), admit=admit, receipts=receipts) as dispatch:
        await until(lambda: dispatch.served.agents and not dispatch.served.troubles)
        agent, text, _ = await said(dispatch, asked("switch", person=person(file, user)))
    return agent, text, receipts.kept


async def test_a_user_is_tuned_for_served_and_forgotten(team: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    say(team)
    say(team, "ben", ROWS[:3], "benjamin-quux-4242 speaks")
    state, release = state_of(team), open_artifact(team.parent / "switch-1.0", "release")
    before = (await reply_for(team, "ada"))[:2]
    made = sartor.tune_personal(team, options())
    assert made["gate"]["own"]["high"] < 0 and made["gate"]["verdict"] == "better", "capitals can be learnt"
    adapter = open_artifact(made["adapter"], "adapter")
    shared, whole = (load_file(one.path / "adapter_model.safetensors") for one in (release, adapter))
    head, tail = split_ranks(whole, rank_of(shared))
    assert all(np.array_equal(head[name], value) for name, value in shared.items()), "the live version is held still"
    assert rank_of(tail) == made["rank"] == 2
    assert [(one["kind"], one["id"] == release.id) for one in adapter.manifest["parents"]] == [
        ("dataset", False),
        ("release", True),
    ]
    assert Path(made["adapter"]).is_relative_to(state / "people" / person(team) / "switch")
    dataset = sartor.open(adapter.manifest["parents"][0]["path"])
    splits = {example.group: example.split for example in sartor.read_examples(dataset)}
    assert set(splits.values()) == {"train", "eval"} and made["held_out"] + made["examples"] == 40

    agent, text, receipts = await reply_for(team, "ada")
    assert agent == "switch@1.0+personal" and text != before[1]
    assert (await reply_for(team, "ben"))[:2] == before == ("switch@1.0", before[1])
    assert receipts[0].person == person(team) and receipts[0].release_id == release.id
    book = ReceiptLog.of(load(team), lambda: EngineInfo("local", "tiny", "b" * 64, "t" * 64, 512, 4))
    book.write(receipts[0])
    book.close()
    shown = sartor.show_personal(team, "ada")
    assert (shown["feedback"], shown["receipts"], len(shown["versions"])) == (40, 1, 1)
    assert shown["versions"][0]["state"] == "answers" and shown["versions"][0]["gate"] == made["gate"]
    assert holding(CANARY, state, home.home()), "the canary is planted"
    folders = (state, home.home())
    assert (
        not holding("ada@", *folders)
        and '"ada"' not in (state / "inbox").joinpath("feedback-2026-11-20.jsonl").read_text()
    )

    gone = sartor.forget_personal(team, "ada", by="A. Officer")
    assert gone["complete"] and gone["searched"]["found"] == [] and gone["searched"]["texts"] > 1
    assert gone["removed"]["rows"] == {"people": 1, "speakers": 0} and len(gone["removed"]["lines"]) == 40
    assert gone["removed"]["receipts"] == 1 and len(gone["removed"]["artifacts"]) == 2
    weights = next(one for name, one in gone["removed"]["files"].items() if name.endswith("adapter_model.safetensors"))
    assert weights["sha256"] == adapter.manifest["files"]["adapter_model.safetensors"]["sha256"]
    assert holding(CANARY, *folders) == [], "nothing of it on the disk, free pages of databases included"
    assert holding(CANARY.upper(), *folders) == holding("porlock", *folders) == []
    assert not (state / "people" / person(team)).exists()
    shown = sartor.show_personal(team, "ada")
    assert (shown["feedback"], shown["receipts"], shown["versions"]) == (0, 0, [])
    assert (await reply_for(team, "ada"))[:2] == before, "the specialist answers again"
    assert sartor.show_personal(team, "ben")["feedback"] == 3 and holding("benjamin-quux", state)

    proof = Path(gone["proof"])
    assert sartor.check_personal_proof(proof, state / "keys")["by"] == "A. Officer"
    assert CANARY not in proof.read_text()
    proof.write_text(proof.read_text().replace('"complete": true', '"complete": false'))
    with pytest.raises(sartor.SartorError, match="changed"):
        sartor.check_personal_proof(proof, state / "keys")


async def test_what_is_worse_is_refused_and_what_stood_goes_on(team: Path, tmp_path: Path) -> None:
    say(team)
    with pytest.raises(SourceError, match="no row of that user for switch.*nothing was said"):
        sartor.tune_personal(team, options(user="nobody"))
    with pytest.raises(SourceError, match="too few"):
        sartor.tune_personal(team, options(data=str(write_few(tmp_path))))
    with pytest.raises(UnknownAgentError, match="faq.*switch"):
        sartor.tune_personal(team, options(agent="faq"))
    with pytest.raises(ConfigError, match="rank is 5"):
        options(rank=5)
    made = sartor.tune_personal(team, options(epochs=2.0, rank=4))
    assert made["rank"] == 4
    with pytest.raises(GateError, match="stays as it is.*worse"):
        sartor.tune_personal(strict(team), options(data=str(others_rows(tmp_path)), epochs=4.0, learning_rate=0.1))
    (row,) = sartor.list_personal(team, "ada").rows
    assert row["state"] == "answers" and row["path"] == made["adapter"] and "worse" in row["note"]
    parent = Path(made["adapter"]).parent.parent
    assert [one for one in parent.iterdir() if one.is_dir()] == [Path(made["adapter"]).parent], (
        "nothing of what was refused stays"
    )

    weights = Path(made["adapter"]) / "adapter_model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert (await reply_for(team, "ada"))[0] == "switch@1.0", "one changed byte, and it is not loaded"


def strict(team: Path) -> Path:
    """The same team, which lets nothing be worse."""
    team.write_text(team.read_text().replace("most_elsewhere: 3.0", "most_elsewhere: 0.01"))
    return team


def write_few(tmp_path: Path) -> Path:
    file = tmp_path / "few.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:4]))
    return file


def test_leftover_copy_is_found_and_stated_in_the_proof(team: Path) -> None:
    """Erasure is refused during tuning; it removes the rows of the user and names files that hold more."""
    say(team)
    say(team, "ben", ROWS[:8], "benjamin-quux-4242 speaks")
    state, data = state_of(team), team.parent / "feedback"
    source = {"path": f"inbox:{state / 'inbox'}", "inbox": {"most_fraction": 1.0, "most_rows": 1000}}
    sartor.curate({"sources": [source], "steps": [], "workers": 1}, data)
    places = [
        [one.locator.rpartition(":")[2] for one in row.origins] for row in sartor.read_examples(sartor.open(data))
    ]
    # of the inbox's lines the first forty; what both said stays, by the other's line
    hers = sum(all(int(line) <= len(ROWS) for line in row) for row in places)
    assert hers and hers < len(places) and holding(CANARY, data)
    folder = state / "people" / person(team) / "switch"
    folder.mkdir(parents=True)
    with writer_lock(folder / "tuning"), pytest.raises(ConfigError, match="another process"):
        sartor.forget_personal(team, "ada")
    assert sartor.show_personal(team, "ada")["feedback"] == 40, "nothing is removed while somebody is tuned for"
    (state / "notes.txt").write_text(f"somebody wrote down: {CANARY}")
    with pytest.raises(RefusedError, match=r"notes\.txt"):
        sartor.forget_personal(team, "ada")
    (proof,) = (state / "deletions").glob("forgotten-*")
    said = sartor.check_personal_proof(proof, state / "keys")
    (taken,) = said["removed"]["datasets"]
    assert (taken["path"], taken["rows"]) == (str(data), hers) and holding(CANARY, data) == []
    kept = sartor.open(data)
    assert kept.id == taken["became"] and len(list(sartor.read_examples(kept))) == len(places) - hers
    assert not said["complete"] and said["searched"]["found"] == [str(state / "notes.txt")]
    assert said["not_reached"] and said["searched"]["bytes"] > 0


def test_every_way_in_which_a_file_spells_a_text_is_found(tmp_path: Path) -> None:
    text = 'Frau Müller said "yes & no" on\nTuesday'
    needles = SearchTerms([text, "short"], others=["it is short"])
    assert (needles.texts, needles.too_short) == (1, 1)
    assert SearchTerms([f"{text} {CANARY}"]).are_in(CANARY.encode()), "a part, from any word on"
    spelled = [
        text,
        json.dumps(text),
        json.dumps(text, ensure_ascii=False),
        "Frau Müller said &quot;yes &amp; no&quot; on\nTuesday",
    ]
    for said_ in spelled:
        for shift in range(9):
            assert needles.are_in(b"." * shift + said_.encode() + b"."), said_
    assert not needles.are_in(b"") and not needles.are_in(b"Frau Mueller") and not needles.are_in(b"." * 100_000)
    assert SearchTerms([text], others=[f"hello: {text}!"]).said_by_others == 1
    assert not SearchTerms([]).are_in(b"anything that is here")
    long = "".join(chr(97 + place * 7 % 26) for place in range(5000))
    assert SearchTerms([long]).are_in(long[-60:].encode()), (
        "a part of a long text, as a page of a database may have it"
    )
