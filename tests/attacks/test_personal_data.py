"""Attacks on deletions and their proofs: words left in any form, proofs that say more than is so, and revoked sources."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import sqlite3
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

import sartor
from receipt_fakes import ABOUT, given
from sample_data import ROWS
from sartor.core import catalogue, home, records, signing
from sartor.core.artifacts import Artifact, write_artifact
from sartor.core.errors import BusyError, RefusedError, SignatureError
from sartor.core.filesystem import FileSystem
from sartor.core.records import Feedback, FeedbackAuthor
from sartor.learn import user_erasure
from sartor.learn.deletion_proof import Verdict, check_proof, verdict_of
from sartor.learn.user_data import SearchTerms, search
from sartor.models.tensor_files import TensorCache
from sartor.personalization import erasure_receipt
from sartor.personalization.erasure_receipt import check_receipt, write_receipt
from sartor.serving.feedback_store import FeedbackStore
from sartor.serving.plans.plan_log import FinishedRun, PlanLog
from sartor.serving.plans.plan_steps import StepLogEntry
from sartor.serving.receipts import ReceiptLog, TeamSigner, team_digest
from sartor.serving.registry import server_presence
from sartor.serving.registry.user_versions import UserVersionStore
from served_person import CANARY, person, say, state_of
from served_person import team as served_team

__all__ = ["served_team"]

# folders of SARTOR_HOME that a deletion empties, searches, or leaves out because published digests check them
HOME = {"activations", "features", "probes", "rehearsal", "kernels", "edge", "keys", "trusted", "revoked"}
HOME |= {"assets", "bases", "towers"}
STATE = {
    "inbox",
    "people",
    "receipts",
    "plans",
    "tools",
    "router",
    "servers",
    "adapters",
    "retrain",
    "keys",
    "deletions",
}


@pytest.fixture
def team(tmp_path: Path) -> Path:
    """A team's file and state, with nothing served."""
    file = tmp_path / "team.yaml"
    file.write_text(f"base: starter\nstate: {tmp_path / '.team'}\n")
    sartor.show_personal(file, "nobody")
    return file


def forget(team: Path) -> dict[str, Any]:
    """Forget ada, and return the proof, also of a deletion that failed."""
    try:
        return sartor.forget_personal(team, "ada", within_s=0.1)
    except (RefusedError, BusyError):
        return newest_proof(team)


def newest_proof(team: Path) -> dict[str, Any]:
    files = sorted((state_of(team) / "deletions").glob("forgotten-*.json"), key=lambda file: file.stat().st_mtime_ns)
    return check_proof(files[-1], state_of(team) / "keys")


def feedback_dataset(team: Path) -> Artifact:
    source = {"path": f"inbox:{state_of(team) / 'inbox'}", "inbox": {"most_fraction": 1.0, "most_rows": 1000}}
    made: Artifact = sartor.curate({"sources": [source], "steps": [], "workers": 1}, team.parent / "feedback").dataset
    return made


def tuned_on(dataset: Artifact, path: Path) -> Artifact:
    """An Adapter with this Dataset as its parent; its weights are a few bytes."""

    def fill(part: Path) -> dict[str, Any]:
        (part / "adapter_model.safetensors").write_bytes(b"weights")
        sources = [dict(source) for source in dataset.manifest["sources"]]
        return {"parents": [dataset.as_parent()], "sources": sources, "created": "2027-01-01T00:00:00Z"}

    made = write_artifact(path, "adapter", fill)
    catalogue.register(made)
    return made


# -- the verdict


def test_verdict_has_three_values() -> None:
    stands = [{"state": "stands"}]
    assert verdict_of(is_left=False, tuned_on_it=[]) is Verdict.REMOVED
    assert verdict_of(is_left=False, tuned_on_it=stands) is Verdict.WEIGHTS_STAND
    assert verdict_of(is_left=True, tuned_on_it=stands) is Verdict.FAILED
    assert verdict_of(is_left=False, tuned_on_it=[{"state": "not there"}]) is Verdict.REMOVED


def test_proof_is_not_complete_while_weights_stand(team: Path) -> None:
    """M7: the weights tuned on the words stood, and the proof said complete."""
    say(team)
    adapter = tuned_on(feedback_dataset(team), team.parent / "adapter")
    proof = forget(team)
    assert (proof["verdict"], proof["complete"]) == (Verdict.WEIGHTS_STAND, False)
    assert [(item["id"], item["path"]) for item in proof["tuned_on_it"]] == [(adapter.id, str(adapter.path))]


def test_second_deletion_does_not_forget_standing_weights(team: Path) -> None:
    """The rows are gone after the first; the weights are not, until their owner removes them."""
    say(team)
    adapter = tuned_on(feedback_dataset(team), team.parent / "adapter")
    forget(team)
    assert forget(team)["verdict"] == Verdict.WEIGHTS_STAND
    adapter.path.rename(team.parent / "moved")
    catalogue.register(Artifact(team.parent / "moved", adapter.manifest))
    assert [item["path"] for item in forget(team)["tuned_on_it"]] == [str(team.parent / "moved")]
    sartor_rm(team.parent / "moved")
    last = forget(team)
    assert (last["verdict"], last["complete"]) == (Verdict.REMOVED, True)


def sartor_rm(folder: Path) -> None:
    for file in folder.rglob("*"):
        file.unlink()
    folder.rmdir()


def test_weights_of_removed_dataset_are_listed(team: Path) -> None:
    """Whoever removes the Dataset before the deletion hides what was tuned on it."""
    say(team)
    dataset = feedback_dataset(team)
    adapter = tuned_on(dataset, team.parent / "adapter")
    for file in sorted(dataset.path.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    dataset.path.rmdir()
    proof = forget(team)
    assert proof["verdict"] == Verdict.WEIGHTS_STAND and proof["tuned_on_it"][0]["id"] == adapter.id
    assert "nobody can tell" in proof["tuned_on_it"][0]["why"]


def test_served_copy_of_removed_release_is_listed(team: Path) -> None:
    """A Release that its owner removed is served on from the team's own copy."""
    say(team)
    adapter = tuned_on(feedback_dataset(team), team.parent / "adapter")
    release = write_artifact(team.parent / "shop-1", "release", lambda part: {"parents": [adapter.as_parent()]})
    catalogue.register(release)
    copy = state_of(team) / "adapters" / release.id
    copy.mkdir(parents=True)
    sartor_rm(adapter.path)
    sartor_rm(release.path)
    proof = forget(team)
    assert str(copy) in [item["path"] for item in proof["tuned_on_it"] if item["state"] == "stands"]
    assert proof["verdict"] == Verdict.WEIGHTS_STAND


def test_words_in_files_of_what_was_tuned_are_found(team: Path) -> None:
    """A Report beside the Adapter, outside of every folder that was searched, shows the words."""
    say(team)
    adapter = tuned_on(feedback_dataset(team), team.parent / "adapter")
    (adapter.path / "report.html").write_text(f"<p>{CANARY}</p>")
    proof = forget(team)
    assert proof["verdict"] == Verdict.FAILED
    assert proof["searched"]["found"] == [str(adapter.path / "report.html")]


def test_server_that_does_not_confirm_makes_it_fail(team: Path) -> None:
    say(team)
    server = server_presence.ServerPresence(state_of(team))
    with pytest.raises(BusyError, match="not confirmed"):
        sartor.forget_personal(team, "ada", within_s=0.1)
    server.close()
    assert newest_proof(team)["verdict"] == Verdict.FAILED
    assert forget(team)["verdict"] == Verdict.REMOVED


def test_registry_rows_that_come_back_are_an_error(team: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof said incomplete, and the command ended with 0."""
    say(team)
    monkeypatch.setattr(UserVersionStore, "mentions", lambda self, user: {"people": 1, "speakers": 0})
    with pytest.raises(RefusedError, match="names that user again in people"):
        sartor.forget_personal(team, "ada")
    assert newest_proof(team)["verdict"] == Verdict.FAILED


def test_second_deletion_still_knows_what_to_look_for(team: Path) -> None:
    """The first one removed the lines that the words are known from; the file that it found is still there."""
    say(team)
    notes = state_of(team) / "notes.txt"
    notes.write_text(f"somebody wrote down: {CANARY}")
    assert forget(team)["searched"]["found"] == [str(notes)]
    assert forget(team)["searched"]["found"] == [str(notes)], "nothing was done, and nothing is complete"
    notes.unlink()
    assert forget(team)["verdict"] == Verdict.REMOVED
    assert CANARY not in "".join(file.read_text() for file in (state_of(team) / "deletions").iterdir())


def test_killed_deletion_is_ended_by_the_next(team: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the lines of the inbox went: which rows of Datasets were made of them is then known to nobody."""
    say(team)
    dataset = feedback_dataset(team)
    tuned_on(dataset, team.parent / "adapter")
    clean = user_erasure._clean_datasets

    def killed(*arguments: Any) -> Iterator[dict[str, Any]]:
        raise KeyboardInterrupt

    monkeypatch.setattr(user_erasure, "_clean_datasets", killed)
    with pytest.raises(KeyboardInterrupt):
        sartor.forget_personal(team, "ada")
    monkeypatch.setattr(user_erasure, "_clean_datasets", clean)
    proof = forget(team)
    assert proof["searched"]["texts"] > 1 and proof["removed"]["datasets"][0]["path"] == str(dataset.path)
    assert proof["verdict"] == Verdict.WEIGHTS_STAND and not holding(CANARY, team.parent)


def test_words_of_killed_deletion_are_private(team: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    say(team)
    (state_of(team) / "notes.txt").write_text(CANARY)
    forget(team)
    (pending,) = (state_of(team) / "deletions").glob(".pending-*")
    assert pending.stat().st_mode & 0o077 == 0
    (state_of(team) / "notes.txt").unlink()
    forget(team)
    assert not pending.exists()


# -- the proof as a signed document


def test_reply_receipt_is_no_deletion_proof(team: Path) -> None:
    """M7: the team's key signs receipts of replies, too, and one of those passed as a proof."""
    signer = TeamSigner.of(state_of(team))
    file = team.parent / "proof.json"
    file.write_text(json.dumps(signer.sign({"schema": 1, "kind": "receipt", "complete": True})))
    with pytest.raises(SignatureError, match="the purpose 'receipt', not proof"):
        check_proof(file, state_of(team) / "keys")


def test_device_receipt_is_no_deletion_proof(team: Path) -> None:
    """A device's receipt of rows has the same kind and says nothing of a team's stores."""
    TeamSigner.of(state_of(team))
    fields = {"rows": ["1"], "deltas_gone": [], "release": {}}
    file = write_receipt(FileSystem(), team.parent, fields, signing.open_private(state_of(team) / "keys"))
    trusted = [signing.open_public(state_of(team) / "keys")]
    assert check_receipt(file, trusted)["rows"] == ["1"]
    with pytest.raises(SignatureError, match="without 'person'"):
        check_proof(file, state_of(team) / "keys")


def test_deletion_proof_is_no_device_receipt(team: Path) -> None:
    say(team)
    proof = Path(sartor.forget_personal(team, "ada")["proof"])
    with pytest.raises(SignatureError, match="without 'rows'"):
        check_receipt(proof, [signing.open_public(state_of(team) / "keys")])


@pytest.mark.parametrize("added", ['"complete": true', '"complete": NaN'])
def test_proof_with_duplicate_key_is_refused(team: Path, added: str) -> None:
    """Two readers of such a file may see two verdicts."""
    say(team)
    proof = Path(sartor.forget_personal(team, "ada")["proof"])
    proof.write_text(proof.read_text().replace('"kind":', f'{added},\n "kind":', 1))
    with pytest.raises(SignatureError, match="no receipt"):
        check_proof(proof, state_of(team) / "keys")


def test_proof_of_unknown_schema_is_refused(team: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TeamSigner.of(state_of(team))
    monkeypatch.setattr(erasure_receipt, "SCHEMA", 2)
    fields = dict.fromkeys(erasure_receipt.TEAM_FIELDS, True)
    file = write_receipt(FileSystem(), team.parent, fields, signing.open_private(state_of(team) / "keys"))
    monkeypatch.undo()
    with pytest.raises(SignatureError, match="schema 2"):
        check_proof(file, state_of(team) / "keys")


def test_proof_from_before_verdicts_claims_none(team: Path) -> None:
    """Its `complete` did not count tuned weights, so nothing is concluded from it."""
    TeamSigner.of(state_of(team))
    fields = dict.fromkeys(erasure_receipt.TEAM_FIELDS, True)
    file = write_receipt(FileSystem(), team.parent, fields, signing.open_private(state_of(team) / "keys"))
    assert check_proof(file, state_of(team) / "keys")["verdict"] == "not stated"


# -- compressed forms


def _tar(text: bytes, mode: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        info = tarfile.TarInfo("words.txt")
        info.size = len(text)
        archive.addfile(info, io.BytesIO(text))
    return buffer.getvalue()


def _zip(text: bytes, name: str = "xl/sharedStrings.xml") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, text)
    return buffer.getvalue()


def _parquet(text: bytes) -> bytes:
    buffer = io.BytesIO()
    column = pa.array([text.decode()] * 3).dictionary_encode()
    pq.write_table(pa.table({"text": column}), buffer, compression="zstd")
    return buffer.getvalue()


def _arrow(text: bytes) -> bytes:
    buffer = io.BytesIO()
    feather.write_feather(pa.table({"text": [text.decode()] * 3}), buffer, compression="zstd")
    return buffer.getvalue()


def _npz(text: bytes) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, text=np.frombuffer(text, np.uint8))
    return buffer.getvalue()


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": lambda text: bytes(pa.Codec("zstd").compress(text, asbytes=True)),
    "zip": _zip,
    "npz": _npz,
    "tar.gz": lambda text: _tar(text, "w:gz"),
    "gzip in tar": lambda text: _tar(gzip.compress(text), "w"),
    "zip in gzip": lambda text: gzip.compress(_zip(text)),
    "parquet": _parquet,
    "parquet in zip": lambda text: _zip(_parquet(text), "examples/part.parquet"),
    "arrow": _arrow,
    "utf-16": lambda text: b"\xff\xfe" + text.decode().encode("utf-16-le"),
}


@pytest.mark.parametrize("form", PACKED)
def test_words_in_packed_file_are_found(tmp_path: Path, form: str) -> None:
    """M7: the search looked at bytes, and at files named .parquet. A name says nothing here."""
    file = tmp_path / "state" / "leftover"
    file.parent.mkdir()
    file.write_bytes(PACKED[form](f"{'before it. ' * 50}{CANARY}{' after it.' * 50}".encode()))
    found = search(SearchTerms([CANARY]), [file.parent], [], file.parent)
    assert (found.found, found.unread) == ([str(file)], {})
    assert not search(SearchTerms(["other words altogether"]), [file.parent], [], file.parent).found


def test_words_across_blocks_of_packed_file_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sartor.learn.packed_contents._BLOCK", 512)
    for shift in range(480, 513, 4):
        (tmp_path / "leftover").write_bytes(gzip.compress(b"." * shift + CANARY.encode() + b"." * 600))
        assert search(SearchTerms([CANARY]), [tmp_path], [], tmp_path).found, shift


@pytest.mark.parametrize(
    "content",
    [b"7z\xbc\xaf\x27\x1c" + b"\0" * 99, gzip.compress(b"x" * 9999)[:40], b"%PDF-1.7 " + b"x" * 99],
    ids=["7z", "cut", "pdf"],
)
def test_file_that_cannot_be_unpacked_fails_the_deletion(team: Path, content: bytes) -> None:
    """What cannot be looked into may hold the words: the verdict is not "removed"."""
    say(team)
    (state_of(team) / "backup").write_bytes(content)
    proof = forget(team)
    assert proof["verdict"] == Verdict.FAILED and str(state_of(team) / "backup") in proof["searched"]["unread"]


def test_decompression_bomb_fails_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sartor.learn.packed_contents.MOST_BYTES", 1 << 16)
    (tmp_path / "bomb").write_bytes(gzip.compress(bytes(1 << 20)))
    assert "decompressed" in search(SearchTerms([CANARY]), [tmp_path], [], tmp_path).unread[str(tmp_path / "bomb")]


# -- caches


def cached(name: str) -> Path:
    """A cached tensor, of hidden states or of features, below SARTOR_HOME."""
    TensorCache(home.folder(name), 1 << 20).write("ab" * 32, torch.ones(4, 2))
    return home.home() / name


def test_activations_of_words_are_emptied(team: Path) -> None:
    """M7: hidden states of the rows stayed in SARTOR_HOME/activations."""
    say(team)
    activations, features = cached("activations"), cached("features")
    proof = forget(team)
    assert proof["removed"]["caches"] == [str(activations)] and not list(activations.rglob("*.safetensors"))
    assert list(features.rglob("*.safetensors")), "nobody sent a picture: nothing of theirs is in there"


def test_features_of_media_are_emptied(team: Path) -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    message = {"role": "user", "content": [{"type": "text", "text": CANARY}, picture]}
    by = FeedbackAuthor("", person(team), "given")
    feedback = Feedback("r1", "faq@1.0", "2026-11-20T10:00:00Z", messages=(message,), reply="yes", by=by)
    FeedbackStore(state_of(team) / "inbox").add(feedback)
    features = cached("features")
    assert str(features) in forget(team)["removed"]["caches"] and not features.exists()


def test_caches_stay_where_nothing_was_said(team: Path) -> None:
    activations = cached("activations")
    assert forget(team)["removed"]["caches"] == [] and list(activations.rglob("*.safetensors"))


# -- every store


def holding(text: str, *folders: Path) -> list[str]:
    """Every file that has a text in its bytes, in its columns, or compressed; by other means than the product's."""
    found = []
    for file in (file for folder in folders for file in folder.rglob("*") if file.is_file()):
        data = file.read_bytes()
        views = [data]
        if file.suffix == ".parquet":
            views.append(json.dumps(pq.read_table(file).to_pylist(), default=repr).encode())
        if data[:2] == b"\x1f\x8b":
            views.append(gzip.decompress(data))
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                views += [archive.read(name) for name in archive.namelist()]
        if any(text.encode() in view or text.encode("utf-16-le") in view for view in views):
            found.append(str(file))
    return found


def holding_numbers(values: list[int], *folders: Path) -> list[str]:
    """Every file that has these token ids in a row, as any integer or float that an array may hold."""
    forms = [np.array(values, dtype).tobytes() for dtype in ("<u2", "<i4", "<i8", "<f4")]
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    text = ", ".join(map(str, values)).encode()
    found = []
    for file in files:
        data = file.read_bytes()
        if any(form in data for form in (*forms, text, text.replace(b" ", b""))):
            found.append(str(file))
    return found


def write_plan(state: Path, user: str) -> None:
    asked = {"messages": [{"role": "user", "content": CANARY}]}
    request = StepLogEntry("", "request", "desk", "asked", request_fields=asked)
    answer = StepLogEntry("", "answer", "desk@1", "answered", reply=CANARY.upper())
    run = FinishedRun("p1", "desk@1", request, [], answer, content=True, began=time.time(), person=user)
    PlanLog(state / "plans", team_digest(state)).write(run)


def test_nothing_of_a_user_is_left_in_any_store(served_team: Path, tiny_base: Path) -> None:
    """Words, tokens and features of a user are planted in every store; afterwards no byte of any of them is left."""
    from transformers import AutoTokenizer

    team, state = served_team, state_of(served_team)
    say(team)
    say(team, "ben", ROWS[:3], "benjamin-quux-4242 speaks")
    dataset = feedback_dataset(team)
    made = sartor.tune_personal(team, sartor.PersonalOptions("switch", "ada", epochs=2.0, learning_rate=2e-2))
    write_plan(state, person(team))
    log = ReceiptLog.of(sartor_team(team), lambda: ABOUT)
    log.write(given("r1", person=person(team)))
    log.close()
    tokens = AutoTokenizer.from_pretrained(tiny_base)(CANARY, add_special_tokens=False)["input_ids"]
    TensorCache(home.folder("activations"), 1 << 20).write("cd" * 32, torch.tensor(tokens, dtype=torch.float32))
    for text in (CANARY, CANARY.lower()):
        with closing(sqlite3.connect(home.home() / "catalogue.sqlite")) as connection, connection:
            connection.execute("create table if not exists notes (text)")
            connection.execute("insert into notes values (?)", (text,))
            connection.execute("drop table notes")
    roots = (state, home.home(), dataset.path)
    assert len(holding(CANARY, *roots)) >= 3 and holding_numbers(tokens, *roots)
    weights = load_file(Path(made["adapter"]) / "adapter_model.safetensors")

    proof = sartor.forget_personal(team, "ada")
    assert proof["verdict"] == Verdict.REMOVED, proof["searched"]
    for text in (CANARY, CANARY.upper(), CANARY.lower(), "Porlock"):
        assert holding(text, *roots) == []
    assert holding_numbers(tokens, *roots) == []
    for tensor in weights.values():
        piece = tensor.numpy().tobytes()[-64:]
        assert not any(piece in file.read_bytes() for file in (state / "people").rglob("*") if file.is_file())
    assert holding("benjamin-quux", state), "others' words stay"
    assert records.digest(proof["removed"]["lines"]) and proof["removed"]["runs"] == 2


def sartor_team(team: Path) -> Any:
    from sartor.serving.team_config import load

    return load(team)


def test_every_store_is_known_to_deletions(served_team: Path) -> None:
    """A store that is new has to be emptied or searched by `personal forget`: add it here when it is."""
    say(served_team)
    sartor.tune_personal(served_team, sartor.PersonalOptions("switch", "ada", epochs=2.0, learning_rate=2e-2))
    forget(served_team)
    assert {path.name for path in home.home().iterdir() if path.is_dir()} <= HOME
    assert {path.name for path in state_of(served_team).iterdir() if path.is_dir()} <= STATE
