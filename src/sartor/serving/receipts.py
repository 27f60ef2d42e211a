"""Signed receipts of replies with keyed digests.

Digests are HMACs under a key of the team, because a short prompt could be guessed from a plain digest. Whoever has the
key and the text can show that they belong together. Receipts are signed with the team's own Ed25519 key. Both keys are
created at the first start.

    STATE/keys/sartor.key  sartor.pub     sign and verify receipts
    STATE/receipts.key                    key of the HMAC, 32 bytes, mode 0600
    STATE/receipts/                       core/lineage/receipt_index.py

A receipt is on disk when its reply ends. One fsync serves all replies that wait for it; each waits at most
`PATIENCE_S`. If the disk fails, receipts are lost and counted, but no reply is.

Erasure overwrites lines in place. The file keeps its length and its inode, so open files and known offsets of other
lines stay valid.

A client's request and the engine's GenerateCall get the same digests. Both are brought to one form: text parts are
joined, nulls and OpenAI fields that are always empty are removed, `developer` becomes `system`, and a schema is
compared as JSON. An image or a recording is replaced by the digest of its bytes, in its position among the parts.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import os
import queue
import secrets
import shlex
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sartor.core import catalogue, records, signing
from sartor.core.errors import ArtifactError, ConfigError, MissingError, SourceError
from sartor.core.filesystem import DISK_FULL, fsync_descriptor, fsync_directory
from sartor.core.lineage.receipt_index import PATTERN, ReceiptIndex, ReceiptLocation
from sartor.core.remedies import REPORT
from sartor.inference.engine import EngineInfo, GenerateCall
from sartor.inference.tool_calls import read_choice, read_tools
from sartor.media import content_parts
from sartor.media.content_parts import MEDIA, is_media, url_in
from sartor.serving.erased_users import ErasedUsers
from sartor.serving.team_config import Team
from sartor.serving.types import FinishedReply
from sartor.text.json_schema import JSON_OBJECT


def lines_with(file: Path, needle: bytes) -> list[tuple[int, bytes]]:
    """Return (byte offset, line without its newline) of each line that contains `needle`.

    A last line that a kill truncated counts too.
    """
    result, start = [], 0
    for line in file.read_bytes().split(b"\n"):
        if needle in line:
            result.append((start, line))
        start += len(line) + 1
    return result


def blank(file: Path, lines: Sequence[tuple[int, bytes]]) -> None:
    """Overwrite lines of a file with blanks."""
    descriptor = os.open(file, os.O_WRONLY)
    try:
        for start, line in lines:
            os.pwrite(descriptor, b" " * len(line), start)
        fsync_descriptor(descriptor)
    finally:
        os.close(descriptor)


def erase_receipts(folder: Path, person: str) -> tuple[int, list[str]]:
    """Blank every receipt of a person's own version and remove it from the index.

    Returns the number of receipts and the names of the changed segments.
    """
    index, count, segments = ReceiptIndex(folder), 0, []
    for file in sorted(folder.glob(PATTERN)):
        if lines := lines_with(file, f'"person":"{person}"'.encode()):
            blank(file, lines)
            index.leave_out(file.name, [start for start, _ in lines])
            segments.append(file.name)
            count += len(lines)
    return count, segments


_MESSAGE_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id")
Digest = Callable[[str, Any], str]


@dataclass(frozen=True)
class RequestDigestInput:
    """Request in the normal form from which digests are computed.

    system: the leading system message, if there is one.
    schema: JSON text, empty for none.
    """

    system: tuple[Mapping[str, Any], ...] = ()
    messages: tuple[Mapping[str, Any], ...] = ()
    text: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()
    must_call: str = ""
    schema: str = ""

    @classmethod
    def of_call(cls, call: GenerateCall) -> RequestDigestInput:
        """Return the normal form of an engine's call."""
        return cls._of(
            messages=call.messages, text=call.text, tools=call.tools, must_call=call.must_call, schema=call.schema
        )

    @classmethod
    def of_request(cls, body: Mapping[str, Any]) -> RequestDigestInput:
        """Return the normal form of the body of /v1/chat/completions or /v1/completions.

        Raises ArtifactError and RequestError for an invalid form.
        """
        messages, text = body.get("messages") or [], body.get("text") or body.get("prompt") or ""
        if (
            not isinstance(messages, list)
            or not all(isinstance(message, Mapping) for message in messages)
            or not isinstance(text, str)
        ):
            raise ArtifactError("the messages are no list of messages", '[{"role": "user", "content": "..."}]')
        tools, must_call = read_choice(body.get("tool_choice"), read_tools(_without_none(body.get("tools") or [])))
        return cls._of(
            messages=messages,
            text=text,
            tools=tools,
            must_call=must_call,
            schema=_schema_of(body.get("response_format")),
        )

    @classmethod
    def _of(
        cls,
        messages: Sequence[Mapping[str, Any]],
        text: str,
        tools: Sequence[Mapping[str, Any]],
        must_call: str,
        schema: str,
    ) -> RequestDigestInput:
        plain = tuple(_plain(message) for message in messages)
        leading = 1 if plain and plain[0].get("role") == "system" else 0
        return cls(
            system=plain[:leading],
            messages=plain[leading:],
            text=text,
            tools=tuple(tools),
            must_call=must_call,
            schema=schema,
        )

    def digests(self, digest: Digest) -> dict[str, str]:
        """Return the digest of each part; empty for a part that is absent."""
        messages: list[Mapping[str, Any]] = []
        for message in self.messages:
            if isinstance(message.get("content"), list):  # its media are replaced by digests of their bytes
                messages.append({**message, "content": [_digested(part) for part in message["content"]]})
            else:
                messages.append(message)
        return {
            "system": digest("system", list(self.system)),
            "messages": digest("messages", messages),
            "text": digest("text", self.text),
            "tools": digest("tools", [list(self.tools), self.must_call] if self.tools else None),
            "schema": digest("schema", json.loads(self.schema) if self.schema else None),
        }


def digest_by(secret: bytes) -> Digest:
    """Return a function that computes the HMAC-SHA256 of a value and its name; empty for an empty value.

    With the name, an equal prompt and reply have different digests.
    """

    def digest(name: str, value: Any) -> str:
        if not value:
            return ""
        # ASCII escapes: a model can write half of a surrogate pair, which UTF-8 cannot encode
        text = json.dumps([name, value], sort_keys=True, separators=(",", ":"))
        return hmac.digest(secret, text.encode(), "sha256").hex()

    return digest


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    fields = {key: message[key] for key in _MESSAGE_FIELDS if message.get(key) is not None}
    if fields.get("role") == "developer":
        fields["role"] = "system"
    if isinstance(fields.get("content"), (list, tuple)):
        parts = [part for part in fields["content"] if isinstance(part, Mapping)]
        has_media = any(map(is_media, parts))
        fields["content"] = parts if has_media else "".join(str(part.get("text", "")) for part in parts)
    if isinstance(fields.get("tool_calls"), (list, tuple)):
        calls = [_without_none(call) for call in fields["tool_calls"] if isinstance(call, Mapping)]
        for call in calls:
            call.pop("index", None)
        fields["tool_calls"] = calls
    return fields


def _digested(part: Mapping[str, Any]) -> list[str]:
    if not is_media(part):
        return ["text", str(part.get("text", ""))]
    url = url_in(part)
    try:
        content = content_parts.bytes_of(url)
    except SourceError:  # no data URL, as in a file given for verification: it cannot match the request
        content = url.encode()
    return [MEDIA[part["type"]], hashlib.sha256(content).hexdigest()]


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _schema_of(response_format: Any) -> str:
    """Return the schema of a request's `response_format` as JSON text; empty if it asks for text."""
    if not isinstance(response_format, Mapping) or response_format.get("type") == "text":
        return ""
    if response_format.get("type") == "json_object":
        return JSON_OBJECT
    json_schema = response_format.get("json_schema")
    if not isinstance(json_schema, Mapping) or not isinstance(json_schema.get("schema"), Mapping):
        raise ArtifactError(
            "response_format holds no schema", '{"type": "json_schema", "json_schema": {"schema": {...}}}'
        )
    return json.dumps(json_schema["schema"])


SCHEMA = 1
KIND = "receipt"
FAILED = "failed"
PATIENCE_S = 1.0
SEGMENT_BYTES = 32 << 20
MOST_WAITING = 10_000
_BATCH = 512
_SECRET_BYTES = 32
# Threads that look receipts up. While the index is locked they wait, and the loop's default threads do not.
_threads = ThreadPoolExecutor(2, "sartor-receipts")


class TeamSigner:
    """Signing key and digest key of a team.

    public: file with the public key, for verification.
    """

    def __init__(self, key: Ed25519PrivateKey, secret: bytes, public: Path) -> None:
        self._key = key
        self.digest = digest_by(secret)
        self.public = public

    @classmethod
    def of(cls, state: Path) -> TeamSigner:
        """Open the keys in a team's state directory, and create absent ones.

        Raises ConfigError for a key that is invalid or readable by others.
        """
        folder = state / "keys"
        if not (folder / "sartor.key").exists():
            (folder / "sartor.pub").unlink(missing_ok=True)  # left by a first start that was killed between both files
            signing.keygen(folder, purposes=("receipt", "proof"))
        return cls(signing.open_private(folder, "receipt"), _secret(state / "receipts.key"), folder / "sartor.pub")

    def sign(self, receipt: Mapping[str, Any]) -> dict[str, Any]:
        """Return the receipt with its signature."""
        return {**receipt, "signature": signing.signature_of(records.canonical(receipt), self._key, "receipt")}


def team_digest(state: Path) -> Digest:
    """Return the keyed digest of the team with this state directory; an absent key is created.

    Raises as `read_secret`.
    """
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    return digest_by(_secret(state / "receipts.key"))


def _secret(file: Path) -> bytes:
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return read_secret(file)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(secrets.token_bytes(_SECRET_BYTES))
        stream.flush()
        fsync_descriptor(descriptor)
    return read_secret(file)


def read_secret(file: Path) -> bytes:
    """Return the HMAC key of a team. Raises ConfigError if it is truncated or readable by others."""
    if os.name == "posix" and file.stat().st_mode & 0o077:
        raise ConfigError(
            f"{file} can be read by others (mode {file.stat().st_mode & 0o777:o})",
            f"chmod 600 {shlex.quote(str(file))}",
        )
    result = file.read_bytes()
    if len(result) != _SECRET_BYTES:
        raise ConfigError(
            f"{file} has {len(result)} bytes, not {_SECRET_BYTES}",
            f"cp BACKUP/{file.name} {file}; or mv {file} ELSEWHERE, for a new one",
        )
    return result


def build_receipt(finished: FinishedReply, about: EngineInfo, signer: TeamSigner) -> dict[str, Any]:
    """Return the signed receipt of a finished reply.

    choice.place: number of agents that were tried before and could not answer.
    """
    call, done = finished.call, finished.done
    _, _, rank = call.id.removeprefix(finished.receipt).partition("-")
    tool_calls = [dict(tool_call) for tool_call in done.tool_calls] if done else []
    tokens = {}
    if done:
        tokens = {"prompt": done.prompt_tokens, "reply": done.reply_tokens, "cached": done.cached_tokens}
    return signer.sign(
        {
            "schema": SCHEMA,
            "kind": KIND,
            "id": finished.receipt,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(finished.began)),
            "agent": finished.agent,
            "release": finished.release_id,
            "adapter": call.adapter,
            "base": {"name": about.base, "digest": about.base_digest, "template_digest": about.template_digest},
            **about.made_by,
            "sampling": {**asdict(call.sampling), "stop": list(call.sampling.stop)},
            "choice": {
                "reason": finished.reason,
                "scores": dict(finished.scores),
                "place": int(rank) if rank.isdigit() else 0,
            },
            "prompt": RequestDigestInput.of_call(call).digests(signer.digest),
            "reply": {
                "text": signer.digest("reply", finished.text),
                "tool_calls": signer.digest("tool_calls", tool_calls),
            },
            **({"person": finished.person} if finished.person else {}),
            "finish": done.finish if done else FAILED,
            "tokens": tokens,
            **({"steps": list(finished.steps)} if finished.steps else {}),
        }
    )


class ReceiptLog:
    """Store of a team's receipts. `write` may be called from any thread; call `close` at the end.

    lost: receipts that could not be written.
    problem: reason of the newest loss; empty once writing works again.
    erased: users who were forgotten; receipts of their own versions that began before are not written.
    """

    def __init__(self, folder: Path, signer: TeamSigner, about: Callable[[], EngineInfo], days: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder, self._signer, self._about, self._days = folder, signer, about, days
        self._index = ReceiptIndex(folder)
        self._queue: queue.Queue[tuple[dict[str, Any], float, Future[None]] | None] = queue.Queue(MOST_WAITING)
        self.erased = ErasedUsers()
        self._segment: _Segment | None = None
        self._prune()
        self.torn = self._index.catch_up()
        self.lost = 0
        self._lost_lock = threading.Lock()
        self.problem = ""
        self._thread = threading.Thread(target=self._run, name="receipts", daemon=True)
        self._thread.start()

    @classmethod
    def of(cls, team: Team, about: Callable[[], EngineInfo]) -> ReceiptLog:
        """Open the receipts of a team and register them in the catalogue, for `revoke`.

        about: returns the facts of the engine.
        """
        state = Path(team.state)
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        log = cls(state / "receipts", TeamSigner.of(state), about, team.limits.receipts_days)
        catalogue.register_receipts(state / "receipts")
        return log

    def write(self, finished: FinishedReply) -> None:
        """Sign a receipt and wait up to PATIENCE_S until it is on disk.

        Raises MissingError if the disk fails, ArtifactError if the reply cannot be serialized; a lost receipt is
        counted.
        """
        written: Future[None] = Future()
        try:
            receipt = build_receipt(finished, self._about(), self._signer)
            self._queue.put_nowait((receipt, finished.began, written))
        except queue.Full:
            self._lose(1, f"{MOST_WAITING} receipts wait for the disk")
            raise MissingError(
                f"a receipt could not be written: {self.problem}",
                f"df -h {self._folder} and ls -ld {self._folder} say what is wrong with the disk",
            ) from None
        except (ValueError, TypeError) as error:
            self._lose(1, f"{finished.agent} said what no receipt can hold: {error}")
            raise ArtifactError(f"a receipt could not be written: {self.problem}", REPORT) from None
        try:
            written.result(PATIENCE_S)
        except TimeoutError:
            return  # slow disk: the reply does not wait longer; the receipt is written later, or counted as lost

    async def find(self, receipt: str) -> Mapping[str, Any] | None:
        """Return the signed receipt of that id, or None. Raises as `read`.

        It is read in a thread: an erasure may lock the index for seconds.
        """
        return await asyncio.get_running_loop().run_in_executor(_threads, self.read, receipt)

    def read(self, receipt: str) -> Mapping[str, Any] | None:
        """Return the signed receipt of that id, or None, outside an event loop.

        Raises MissingError if the index cannot be read.
        """
        try:
            return self._index.find(receipt)
        except sqlite3.Error as error:
            raise MissingError(
                f"the receipts in {self._folder} cannot be read: {error}",
                f"ls -l {self._folder}; send the request again, or restart sartor serve TEAM",
            ) from None

    def close(self) -> None:
        """Write the waiting receipts, then stop the thread."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _run(self) -> None:
        ended = False
        while not ended:
            batch = [self._queue.get()]
            while len(batch) < _BATCH and not self._queue.empty():
                batch.append(self._queue.get())
            ended = None in batch
            if entries := [item for item in batch if item is not None]:
                self._append_living(entries)
        if self._segment is not None:
            self._segment.close()

    def _append_living(self, entries: Sequence[tuple[Mapping[str, Any], float, Future[None]]]) -> None:
        """Write the receipts but those of users who were forgotten meanwhile, and blank what came in between."""
        living = []
        for receipt, began, written in entries:
            if self.erased.covers_unix(began, str(receipt.get("person", ""))):
                written.set_result(None)
            else:
                living.append((receipt, began, written))
        if not living:
            return
        self._append([receipt for receipt, _, _ in living], [written for _, _, written in living])
        people = [(str(receipt.get("person", "")), began) for receipt, began, _ in living]
        for person in {person for person, began in people if self.erased.covers_unix(began, person)}:
            try:  # forgotten during the write: the deletion may have looked before the lines were there
                erase_receipts(self._folder, person)
            except (OSError, sqlite3.Error) as error:
                self.problem = f"receipts of a forgotten user are left: {error}"

    def _append(self, receipts: Sequence[Mapping[str, Any]], waiting: Sequence[Future[None]]) -> None:
        try:
            placed = self._open_segment().append(receipts)
        except OSError as error:
            self._lose(len(receipts), f"{error.strerror or error} ({self._folder})")
            shown = "whether the disk is there and whose it is"
            if error.errno in DISK_FULL:
                shown = "the full disk: remove files from it"
            remedy = f"df -h {self._folder} and ls -ld {self._folder} show {shown}"
            for written in waiting:
                written.set_exception(MissingError(f"a receipt could not be written: {self.problem}", remedy))
            return
        self.problem = ""
        try:
            self._index.add(placed)
        except (OSError, sqlite3.Error) as error:  # the lines are written, and the next batch indexes them too
            self.problem = f"the index of receipts cannot be written: {error}"
        for written in waiting:
            written.set_result(None)

    def _open_segment(self) -> _Segment:
        segment = self._segment
        if segment is None or not segment.takes_more:
            if segment is not None:
                segment.close()
            self._segment = segment = _Segment(self._folder)
            self._prune()
        return segment

    def _lose(self, count: int, problem: str) -> None:
        with self._lost_lock:  # requests lose receipts in their threads, the writer in its own
            self.lost += count
            self.problem = problem

    def _prune(self) -> None:
        """Remove segments whose newest receipt is older than the team's retention time."""
        if not self._days:
            return
        cutoff = time.time() - self._days * 86_400
        for file in self._folder.glob(PATTERN):
            is_current = self._segment is not None and file == self._segment.file
            if not is_current and file.stat().st_mtime < cutoff:
                file.unlink(missing_ok=True)
                self._index.forget(file.name)


class _Segment:
    """File of receipts to which only this process appends.

    A segment of an earlier process is never continued, because its last line may be truncated.
    """

    def __init__(self, folder: Path) -> None:
        self._day = time.strftime("%Y%m%d", time.gmtime())
        number = max((int(file.stem.rpartition("-")[2]) for file in folder.glob(PATTERN)), default=0) + 1
        while True:
            self.file = folder / PATTERN.replace("*", f"{number:08}")
            try:
                self._descriptor = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
                break
            except FileExistsError:  # another process took that number
                number += 1
        fsync_directory(folder)
        self._end = 0
        self._broken = False

    @property
    def takes_more(self) -> bool:
        """Whether the next receipt belongs into this segment.

        False after a change of day, beyond SEGMENT_BYTES, or after a partial write that could not be undone.
        """
        return not self._broken and self._end < SEGMENT_BYTES and self._day == time.strftime("%Y%m%d", time.gmtime())

    def append(self, receipts: Sequence[Mapping[str, Any]]) -> list[ReceiptLocation]:
        """Write the receipts as lines and fsync them, all or none; return their locations."""
        lines = [records.canonical(receipt) + b"\n" for receipt in receipts]
        try:
            remaining = b"".join(lines)
            while remaining:
                remaining = remaining[os.write(self._descriptor, remaining) :]
            fsync_descriptor(self._descriptor)
        except OSError:
            try:
                os.ftruncate(self._descriptor, self._end)
            except OSError:
                self._broken = True
            raise
        placed = []
        for receipt, line in zip(receipts, lines, strict=True):
            texts = (receipt["id"], receipt["release"], receipt["agent"], receipt["created"])
            placed.append(ReceiptLocation(*texts, self.file.name, self._end, len(line) - 1))
            self._end += len(line)
        return placed

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)
