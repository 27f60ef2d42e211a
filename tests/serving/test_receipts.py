"""Receipts hold no word of what was said, survive what ends a process or fills a disk, and cannot be made to say anything else."""

from __future__ import annotations

import errno
import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import media_files
import sartor
from receipt_fakes import ABOUT, WORDS, command, given, replied
from sartor.core import catalogue, parquet_io, signing
from sartor.core.artifacts import Artifact, seal, write_artifact
from sartor.core.errors import ArtifactError, ConfigError, MissingError, SignatureError
from sartor.core.lineage import origin_index
from sartor.core.lineage.receipt_index import ReceiptIndex
from sartor.core.lineage.revocation import Folder, _replies
from sartor.core.records import canonical
from sartor.inference.engine import GenerateCall, Sampling
from sartor.serving import receipts
from sartor.serving.receipts import ReceiptLog, RequestDigestInput, TeamSigner, digest_by
from sartor.serving.team_config import RequestLimits, Team, load
from sartor.serving.types import FinishedReply


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow disk is waited for; the two tests of it have a patience of their own."""
    monkeypatch.setattr(receipts, "PATIENCE_S", 120.0)


@pytest.fixture
def team(tmp_path: Path) -> Team:
    (tmp_path / "team.yaml").write_text("base: starter\n")
    return Team(base="starter", state=str(tmp_path / ".team"))


@pytest.fixture
def book(team: Team) -> Iterator[ReceiptLog]:
    opened = ReceiptLog.of(team, lambda: ABOUT)
    yield opened
    opened.close()


def segments(team: Team) -> list[Path]:
    return sorted((Path(team.state) / "receipts").glob("*.jsonl"))


async def test_receipt_has_provenance_and_valid_team_signature(book: ReceiptLog, team: Team) -> None:
    """Receipts name version, Release, base, engine, sampling and tokens; a failed reply has no tokens."""
    book.write(given(place=1))
    found = await book.find("r1")
    assert found is not None and (await book.find("r2")) is None
    assert (found["agent"], found["release"], found["adapter"], found["finish"]) == (
        "faq@1.0",
        "d" * 64,
        "e" * 64,
        "stop",
    )
    assert found["base"] == {"name": "tiny", "digest": "b" * 64, "template_digest": "c" * 64}
    assert found["engine"] == {"kind": "local", "dtype": "float32", "device": "cpu"} and found["numerics"] == 1
    assert found["sampling"] == {**asdict(Sampling(max_tokens=9)), "stop": ["END"]}
    assert found["choice"] == {"reason": "asked by name", "scores": {"faq": 0.75}, "place": 1}
    assert found["tokens"] == {"prompt": 12, "reply": 5, "cached": 3} and found["created"] == "2027-01-15T08:00:00Z"
    said = dict(found)
    signature = said.pop("signature")
    public = [signing.open_public(Path(team.state) / "keys")]
    assert signing.check_signature(canonical(said), signature, Path("f"), "it", public, "receipt") == signing.key_id(
        public[0]
    )
    book.write(given("r3", done=None))
    assert book.read("r3")["finish"] == "failed" and book.read("r3")["tokens"] == {}


def test_receipts_store_no_text_and_only_keyed_digests(book: ReceiptLog, team: Team) -> None:
    """Words and plain SHA-256 digests are nowhere on disk; equal texts have equal keyed digests."""
    book.write(given())
    book.write(given("r2"))
    book.close()
    stored = b"".join(file.read_bytes() for file in Path(team.state).rglob("*") if file.is_file())
    import hashlib

    for word in WORDS:
        assert word.encode() not in stored and word.split()[0].encode() not in stored
    text = given().text
    assert hashlib.sha256(text.encode()).hexdigest().encode() not in stored
    assert hashlib.sha256(canonical(["reply", text])).hexdigest().encode() not in stored
    one, two = book.read("r1"), book.read("r2")
    assert one["prompt"] == two["prompt"], "the same words have the same digest in one team"
    assert len({*one["prompt"].values(), one["reply"]["text"]}) == 6, "and each part its own"


def test_the_keys_are_made_once_and_nobody_else_may_read_them(team: Team) -> None:
    state = Path(team.state)
    books = [ReceiptLog.of(team, lambda: ABOUT) for _ in range(2)]
    for number, book in enumerate(books):
        book.write(given(f"r{number}"))
        book.close()
    assert len({book.read("r0")["signature"]["key_id"] for book in books}) == 1
    assert books[1].read("r0")["reply"] == books[1].read("r1")["reply"]
    for file in (state / "keys" / "sartor.key", state / "receipts.key", *segments(team)):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    assert stat.S_IMODE(state.stat().st_mode) == stat.S_IMODE((state / "receipts").stat().st_mode) == 0o700
    (state / "receipts.key").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600|read by others"):
        TeamSigner.of(state)
    (state / "receipts.key").chmod(0o600)
    (state / "receipts.key").write_bytes(b"short")
    with pytest.raises(ConfigError, match="has 5 bytes"):
        TeamSigner.of(state)


def test_signer_start_finishes_after_kill_between_keys(tmp_path: Path) -> None:
    """A public key file without its private key is replaced at the next start."""
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "sartor.pub").write_text("of a key that never was")
    TeamSigner.of(tmp_path)
    assert signing.open_public(tmp_path / "keys")


def test_many_replies_that_end_together_share_one_fsync(book: ReceiptLog, monkeypatch: pytest.MonkeyPatch) -> None:
    book.write(given())
    entered, gate, synced = threading.Event(), threading.Event(), []
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        entered.set()
        assert gate.wait(60)
        synced.append(descriptor)
        fsync(descriptor)

    monkeypatch.setattr(receipts.os, "fsync", slow)
    monkeypatch.setattr(receipts, "PATIENCE_S", 60)
    with ThreadPoolExecutor(21) as threads:
        written = [threads.submit(book.write, given("many0"))]
        assert entered.wait(60)
        written += [threads.submit(book.write, given(f"many{number}")) for number in range(1, 21)]
        ends = time.monotonic() + 60
        while book._queue.qsize() < 20 and time.monotonic() < ends:
            time.sleep(0.001)
        gate.set()
        for one in written:
            one.result()
    assert len(synced) == 2
    assert all(book.read(f"many{number}") for number in range(21))


def test_a_slow_disk_keeps_no_reply_waiting_for_long(book: ReceiptLog, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr(receipts, "PATIENCE_S", 0.01)
    monkeypatch.setattr(receipts.os, "fsync", lambda descriptor: gate.wait(60))
    book.write(given())
    assert book.read("r1") is None
    gate.set()
    book.close()
    assert book.read("r1")


def test_line_cut_by_kill_is_counted_and_others_are_read(team: Team) -> None:
    """The index counts the torn line and finds the others; the next receipt begins a new file."""
    book = ReceiptLog.of(team, lambda: ABOUT)
    for number in range(3):
        book.write(given(f"r{number}"))
    book.close()
    (segment,) = segments(team)
    segment.write_bytes(segment.read_bytes()[:-40])
    (Path(team.state) / "receipts" / "index.sqlite").unlink()
    again = ReceiptLog.of(team, lambda: ABOUT)
    assert again.torn == 1 and again.read("r1") and again.read("r2") is None
    again.write(given("r3"))
    again.close()
    assert len(segments(team)) == 2 and again.read("r3")
    assert ReceiptIndex(Path(team.state) / "receipts").catch_up() == 1


def test_a_lost_or_broken_index_is_made_anew_from_the_lines(team: Team, book: ReceiptLog) -> None:
    for number in range(5):
        book.write(given(f"r{number}"))
    index = Path(team.state) / "receipts" / "index.sqlite"
    index.write_bytes(b"no database at all" * 100)
    assert book.read("r3") and index.with_suffix(".broken").exists()
    index.unlink()
    book.write(given("r5"))
    book.close()
    again = ReceiptLog.of(team, lambda: ABOUT)
    again.close()
    assert all(again.read(f"r{number}") for number in range(6)) and again.torn == 0


def test_full_disk_counts_lost_receipt_and_leaves_whole_lines(
    team: Team, book: ReceiptLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A partly written line is undone; the receipts before and after it are readable."""
    book.write(given("before"))
    write = os.write

    def fuller(descriptor: int, data: bytes) -> int:
        monkeypatch.setattr(receipts.os, "write", nothing)
        return write(descriptor, data[:20])

    def nothing(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(receipts.os, "write", fuller)
    with pytest.raises(MissingError, match="No space left") as caught:
        book.write(given("during"))
    assert caught.value.remedy.startswith("df -h ") and book.lost == 1 and "No space" in book.problem
    monkeypatch.setattr(receipts.os, "write", write)
    book.write(given("after"))
    assert (book.lost, book.problem) == (1, "")
    assert book.read("before") and book.read("after") and book.read("during") is None
    (segment,) = segments(team)
    assert [json.loads(line)["id"] for line in segment.read_text().splitlines()] == ["before", "after"]


def test_failed_undo_of_a_line_starts_a_new_segment(
    team: Team, book: ReceiptLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both fsync and ftruncate fail; the receipts before and after are readable."""
    book.write(given("before"))

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(receipts.os, "fsync", broken)
    monkeypatch.setattr(receipts.os, "ftruncate", broken)
    with pytest.raises(MissingError, match="Input/output"):
        book.write(given("during"))
    monkeypatch.undo()
    book.write(given("after"))
    assert len(segments(team)) == 2 and book.read("before") and book.read("after")


def test_what_the_index_missed_is_found_with_the_next(book: ReceiptLog, monkeypatch: pytest.MonkeyPatch) -> None:
    def locked(*_: object) -> None:
        raise sqlite3.OperationalError("database is locked")

    monkeypatch.setattr(ReceiptIndex, "add", locked)
    book.write(given("r1"))
    assert "database is locked" in book.problem and book.lost == 0
    monkeypatch.undo()
    book.write(given("r2"))
    assert book.read("r1") and book.read("r2") and book.problem == ""


def test_unencodable_receipt_is_counted_as_lost(book: ReceiptLog) -> None:
    """Half a surrogate pair in a reply is accepted; in the reason it raises ArtifactError and is counted."""
    book.write(given("r1", text="half of a pair: \ud83d"))
    assert book.read("r1")
    with pytest.raises(ArtifactError, match="no receipt can hold"):
        book.write(given("r2", reason="\ud83d"))
    assert book.lost == 1


def test_old_files_go_when_the_team_says_so(team: Team) -> None:
    keeping = replace(team, limits=RequestLimits(receipts_days=7))
    for number in range(2):
        book = ReceiptLog.of(keeping, lambda: ABOUT)
        book.write(given(f"r{number}"))
        book.close()
    first, second = segments(team)
    os.utime(first, (time.time() - 8 * 86_400,) * 2)
    again = ReceiptLog.of(keeping, lambda: ABOUT)
    again.close()
    assert segments(team) == [second] and again.read("r0") is None and again.read("r1")
    forever = ReceiptLog.of(team, lambda: ABOUT)
    os.utime(second, (0, 0))
    forever.close()
    assert segments(team) == [second]


@pytest.fixture
def file(tmp_path: Path, book: ReceiptLog) -> Path:
    """A receipt as HTTP gives it."""
    book.write(given())
    path = tmp_path / "receipt.json"
    path.write_text(json.dumps(book.read("r1"), indent=2))
    return path


def request_file(tmp_path: Path, **changes: Any) -> Path:
    """The body of the request of `given`, as a client wrote it."""
    call = given().call
    said = {
        "model": "faq",
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": call.messages[0]["content"]}]},
            {**call.messages[1], "name": None},
        ],
        "tools": [{"type": "function", "function": {"name": "find", "description": None}}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
    }
    (tmp_path / "request.json").write_text(json.dumps({**said, **changes}))
    return tmp_path / "request.json"


def test_a_receipt_is_checked_as_far_as_it_can_be(tmp_path: Path, file: Path, team: Team) -> None:
    public = Path(team.state) / "keys"
    said = sartor.verify_receipt(file, key=public).as_json()
    assert (said["valid"], said["agent"], said["version"]) == (True, "faq", "1.0")
    assert said["checked"]["digests"].startswith("not checked: give the messages")
    full = sartor.verify_receipt(
        file, team=tmp_path / "team.yaml", messages=request_file(tmp_path), reply=given().text
    )
    assert full.checked["digests"] == "the same: system, messages, tools, schema, reply"
    assert full.checked["text"].startswith("not checked: the Release dddd")
    without_key = sartor.verify_receipt(file, key=public, messages=request_file(tmp_path), reply="whatever").checked
    assert without_key["digests"].startswith("not checked: they are keyed")


def test_a_file_may_hold_the_words_too(tmp_path: Path, file: Path) -> None:
    body = json.loads(request_file(tmp_path).read_text())
    both = tmp_path / "both.json"
    both.write_text(json.dumps({"receipt": json.loads(file.read_text()), **body, "reply": given().text}))
    assert "reply" in sartor.verify_receipt(both, team=tmp_path / "team.yaml").checked["digests"]
    both.write_text(json.dumps({"receipt": json.loads(file.read_text()), **body, "reply": "I never said that."}))
    with pytest.raises(ArtifactError, match="the reply is not what the receipt r1"):
        sartor.verify_receipt(both, team=tmp_path / "team.yaml")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"messages": [{"role": "user", "content": "another question"}]}, "the system prompt"),
        (
            {"messages": [{"role": "system", "content": "Talk of okapi grazing."}, {"role": "user", "content": "?"}]},
            "the messages",
        ),
        ({"tools": []}, "the tools"),
        ({"response_format": None}, "the schema"),
        ({"prompt": "more"}, "the text"),
    ],
)
def test_another_question_is_found_by_its_part(
    changes: dict, what: str, tmp_path: Path, file: Path, team: Team
) -> None:
    (Path(team.state) / "adapters" / ("d" * 64)).mkdir(parents=True)
    if what == "the system prompt":  # without the Release its own prompt is not known; with a client's, it is compared
        changes = {"messages": [{"role": "system", "content": "Be rude."}, *changes["messages"]]}
    with pytest.raises(ArtifactError, match=f"{what} .*is not what the receipt|{what} is not what"):
        sartor.verify_receipt(file, team=tmp_path / "team.yaml", messages=request_file(tmp_path, **changes))


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    else:
        yield path


def test_a_receipt_with_any_field_changed_is_refused(tmp_path: Path, file: Path) -> None:
    before = json.loads(file.read_text())
    paths = list(leaves(before))
    assert len(paths) > 30
    for path in paths:
        changed = json.loads(json.dumps(before))
        inner = changed
        for key in path[:-1]:
            inner = inner[key]
        was = inner[path[-1]]
        inner[path[-1]] = f"{was}x" if isinstance(was, str) else [*was, "x"] if isinstance(was, list) else was + 1
        file.write_text(json.dumps(changed))
        with pytest.raises((SignatureError, ArtifactError)):
            sartor.verify_receipt(file, team=tmp_path / "team.yaml")
    file.write_text(json.dumps({**before, "surplus": 1}))
    with pytest.raises(SignatureError, match="does not sign"):
        sartor.verify_receipt(file, team=tmp_path / "team.yaml")


def test_another_teams_key_or_nobodys_is_not_believed(tmp_path: Path, file: Path) -> None:
    sartor.keygen(tmp_path / "other", purposes=("receipt",))
    with pytest.raises(SignatureError, match="does not trust"):
        sartor.verify_receipt(file, key=tmp_path / "other")
    with pytest.raises(SignatureError, match="trusts nobody"):
        sartor.verify_receipt(file)
    forged = json.loads(file.read_text())
    del forged["signature"]
    forged["signature"] = signing.signature_of(canonical(forged), signing.open_private(tmp_path / "other"), "receipt")
    file.write_text(json.dumps(forged))
    with pytest.raises(SignatureError):
        sartor.verify_receipt(file, team=tmp_path / "team.yaml")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "null",
        "{}",
        '{"receipt": {}}',
        '{"kind": "receipt"}',
        "[" * 100_000,
        '{"kind": "receipt", "schema": 2}',
        '{"receipt": {"kind": "receipt", "schema": 1, "id": "", "created": "", "agent": "", "release": "", "adapter": "", "finish": ""}}',
    ],
)
def test_a_file_that_is_no_receipt_says_so(content: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ArtifactError):
        sartor.verify_receipt(tmp_path / "x.json")


def test_the_commands_exit_codes(tmp_path: Path, file: Path, team: Team, capsys: pytest.CaptureFixture[str]) -> None:
    at = ("receipt", "verify", file, "--team", tmp_path / "team.yaml")
    code, said = command(capsys, *at, "--reply", given().text)
    assert (code, said["valid"], said["agent"], said["version"]) == (0, True, "faq", "1.0")
    code, said = command(capsys, *at, "--reply", "something else")
    assert (code, said["error"]["kind"]) == (3, "ArtifactError")
    file.write_text(file.read_text().replace("faq@1.0", "faq@2.0"))
    code, said = command(capsys, *at)
    assert (code, said["error"]["kind"]) == (5, "SignatureError")
    code, said = command(capsys, "agents", "key", "faq", "--team", tmp_path / "team.yaml")
    assert code == 0 and said["key"].startswith(f"sartor-{said['id']}-")
    code, listed = command(capsys, "agents", "key", "--list", "--team", tmp_path / "team.yaml")
    assert [key["id"] for key in listed["keys"]] == [said["id"]] and said["key"] not in json.dumps(listed)
    assert (
        command(capsys, "agents", "key", "--revoke", said["id"], "--team", tmp_path / "team.yaml")[1]["state"]
        == "revoked"
    )
    assert command(capsys, "agents", "key", "--team", tmp_path / "team.yaml")[0] == 2


@pytest.fixture
def served(tmp_path: Path, tiny_base: Path, fp32: None) -> tuple[Path, FinishedReply, ReceiptLog]:
    """See `replied`."""
    return replied(tmp_path, tiny_base)


def test_a_greedy_reply_is_made_anew_and_compared(
    tmp_path: Path, served: tuple[Path, FinishedReply, ReceiptLog]
) -> None:
    team, reply, book = served
    words = [{"role": "user", "content": "turn on the light"}]

    def check(one: FinishedReply) -> str:
        book.write(one)
        both = {"receipt": book.read(one.receipt), "messages": words, "reply": one.text}
        (tmp_path / "r.json").write_text(json.dumps(both))
        return sartor.verify_receipt(tmp_path / "r.json", team=team).checked["text"]

    assert check(reply) == "made anew, the same"
    cut = replace(reply, receipt="r2", text=reply.text[:3], done=replace(reply.done, finish="cancelled"))
    assert check(cut) == "made anew, the same"
    # what the team itself signed, and its Release does not say
    with pytest.raises(ArtifactError, match="does not say this again"):
        check(replace(reply, receipt="r3", text="I was never told to say this."))
    assert (
        check(replace(reply, receipt="r4", call=replace(reply.call, sampling=Sampling(temperature=1.0))))
        == "not checked: the reply was sampled"
    )
    assert check(replace(reply, receipt="r5", done=None)) == "not checked: the reply failed"
    elsewhere = ReceiptLog(
        tmp_path / "elsewhere",
        TeamSigner.of(Path(load(team).state)),
        lambda: replace(book._about(), dtype="bfloat16"),
    )
    elsewhere.write(replace(reply, receipt="r6", text="Other words."))
    (tmp_path / "r.json").write_text(
        json.dumps({"receipt": elsewhere.read("r6"), "messages": words, "reply": "Other words."})
    )
    elsewhere.close()
    assert "dtype was bfloat16 and is" in sartor.verify_receipt(tmp_path / "r.json", team=team).checked["text"]
    book.close()


def test_revoke_lists_replies_of_affected_releases(tmp_path: Path, team: Team) -> None:
    """Replies of other Releases are left out; a missing receipts folder is reported as not there."""
    turns = (sartor.Message.of("user", "a"), sartor.Message.of("assistant", "b"))
    row = sartor.Example(turns, (sartor.Origin("a.jsonl", "a.jsonl:1", "MIT"),), split="train")
    dataset = tmp_path / "dataset"
    parquet_io.write_examples(dataset / "examples/part-00000.parquet", [row])
    parquet_io.write_drops(dataset / "drops/part-00000.parquet", [])
    origin_index.write(dataset)
    opened = Artifact(
        dataset,
        seal(dataset, "dataset", {"parents": [], "sources": [{"source": "a.jsonl", "path": "a.jsonl", "kept": 1}]}),
    )
    facts = {"parents": [opened.as_parent()], "sources": []}
    released = write_artifact(tmp_path / "faq-1", "release", lambda part: facts)
    catalogue.register(released)
    book = ReceiptLog.of(team, lambda: ABOUT)
    for number in range(3):
        book.write(given(f"r{number}", release=released.id if number else "f" * 64))
    said = sartor.revoke(dataset, source="a.jsonl")
    replies = said.as_json()["replies"]
    assert [(reply["receipt"], reply["agent"]) for reply in replies] == [("r1", "faq@1.0"), ("r2", "faq@1.0")]
    assert said.as_json()["receipts"] == [{"path": str(Path(team.state) / "receipts"), "state": "read"}]
    table = dict(said.table())
    assert table["replies"][:2] == ["2", "r1 of faq@1.0, 2027-01-15T08:00:00Z"]
    book.close()
    (Path(team.state) / "receipts").rename(tmp_path / "moved")
    assert _replies([released.id]) == ([], [Folder(str(Path(team.state) / "receipts"), "not there")])


WRITER = """
import sys, dataclasses
sys.path[:] = {path!r}
from receipt_fakes import ABOUT, given
from sartor.serving import receipts
from sartor.serving.receipts import ReceiptLog
from sartor.serving.team_config import Team
receipts.PATIENCE_S = 120.0  # what is acknowledged is on disk, however slow it is
book = ReceiptLog.of(Team(base="starter", state={state!r}), lambda: ABOUT)
number = 0
while True:
    book.write(given(f"r{{number}}"))
    print(number, flush=True)
    number += 1
"""


@pytest.mark.services
def test_no_receipt_that_was_acknowledged_is_lost_to_a_kill(team: Team) -> None:
    acknowledged: list[str] = []
    for _ in range(3):
        code = WRITER.format(path=sys.path, state=team.state)
        writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        lines = [writer.stdout.readline() for _ in range(40)]
        writer.send_signal(signal.SIGKILL)
        lines += writer.stdout.read().splitlines()
        writer.stdout.close()
        writer.wait()
        acknowledged.append(lines[-1] if lines[-1].strip() else lines[-2])
    book = ReceiptLog.of(team, lambda: ABOUT)
    for segment, newest in zip(segments(team), acknowledged, strict=True):
        ids = [json.loads(line)["id"] for line in segment.read_bytes().split(b"\n")[:-1]]
        assert ids[: int(newest) + 1] == [f"r{number}" for number in range(int(newest) + 1)]
    assert book.read(f"r{int(acknowledged[-1])}")
    book.close()


def test_media_count_by_their_bytes_in_whichever_form_and_place() -> None:
    picture, clip = media_files.png(), media_files.sound(0.1)
    url = media_files.data_url(picture)
    digest = digest_by(b"k" * 32)

    def digests(*parts: Any) -> str:
        return RequestDigestInput.of_request({"messages": [{"role": "user", "content": list(parts)}]}).digests(digest)[
            "messages"
        ]

    text = {"type": "text", "text": "What is it?"}
    short = (
        {"type": "image", "image": url},
        text,
        {"type": "audio", "audio": media_files.data_url(clip, "audio/x-wav")},
    )
    long = (media_files.image_part(picture), text, media_files.audio_part(clip))
    call = GenerateCall("r", messages=({"role": "user", "content": list(short)},))
    assert digests(*short) == digests(*long) == RequestDigestInput.of_call(call).digests(digest)["messages"]
    others = [
        digests(long[1], long[0], long[2]),
        digests(*long[:2]),
        digests(media_files.image_part(clip), *long[1:]),
        digests(text),
        digests({"type": "image_url", "image_url": {"url": "https://example.org"}}, *long[1:]),
        digests({"type": "image_url"}, *long[1:]),
    ]
    assert len({digests(*long), *others}) == 6, "what is no data URL is nothing, and no other picture"
    content = RequestDigestInput.of_call(call)
    assert content.messages[0]["content"] == list(short), "an engine can be asked the same again"
    assert (
        digests(text)
        == RequestDigestInput.of_request({"messages": [{"role": "user", "content": "What is it?"}]}).digests(digest)[
            "messages"
        ]
    )


def test_losses_of_many_threads_are_all_counted(book: ReceiptLog) -> None:
    """Requests count lost receipts at the same time; a switch between read and write must lose none."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=lambda: [book._lose(1, "disk") for _ in range(2000)]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert book.lost == 16_000
