"""Log of plan steps, one file a day.

    STATE/plans/plans-DAY-PROCESS.jsonl

A run is a line for the request, a line for each step, and a line for the answer. They are written together and fsynced
when the answer ends. By default the log holds no texts, but digests by the team's key, as receipts do (`receipts.py`).
A plan with `log: content` keeps the texts, with the keyed digest of the user for whom they were, so that `personal
forget` finds and blanks them (`erase_runs`). If the disk fails, lines are lost and counted, but no answer is.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sartor.core.errors import ArtifactError, MissingError
from sartor.core.filesystem import fsync_descriptor, fsync_directory
from sartor.core.installation import upgrade_command
from sartor.inference.engine import EngineInfo
from sartor.serving.erased_users import ErasedUsers
from sartor.serving.plans.plan_steps import StepLogEntry
from sartor.serving.receipts import Digest, RequestDigestInput, blank, lines_with, team_digest
from sartor.serving.team_config import Team


class DayFiles:
    """Files FOLDER/NAME-DAY-PROCESS.jsonl. Safe to use from several threads.

    days: age at which a file is removed; 0 keeps all.
    """

    def __init__(self, folder: Path, name: str, days: int = 0) -> None:
        self._folder, self._name, self._days = folder, name, days
        self._process = f"{os.getpid():x}{secrets.token_hex(4)}"
        self._lock = threading.Lock()

    def append(self, data: bytes) -> None:
        """Append whole lines. Raises OSError on failure; then nothing is written."""
        with self._lock:
            self._append(
                self._folder / f"{self._name}-{time.strftime('%Y%m%d', time.gmtime())}-{self._process}.jsonl", data
            )

    def _append(self, file: Path, data: bytes) -> None:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        is_new = not file.exists()
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        end = os.fstat(descriptor).st_size
        try:
            remaining = data
            while remaining:
                remaining = remaining[os.write(descriptor, remaining) :]
            fsync_descriptor(descriptor)
        except OSError:
            os.ftruncate(descriptor, end)
            raise
        finally:
            os.close(descriptor)
        if is_new:
            fsync_directory(self._folder)
            self._prune()

    def _prune(self) -> None:
        if not self._days:
            return
        before = time.time() - self._days * 86_400
        for file in self._folder.glob(f"{self._name}-*.jsonl"):
            if file.stat().st_mtime < before:
                file.unlink(missing_ok=True)


SCHEMA = 1
DIGITS = 3


@dataclass(frozen=True)
class FinishedRun:
    """Finished run for the log.

    plan: `name@digest`.
    content: whether the log keeps the texts.
    began: seconds since the epoch.
    person: keyed digest of the user for whom it ran; it is kept only beside texts.
    """

    id: str
    plan: str
    request_entry: StepLogEntry
    steps: Sequence[StepLogEntry]
    answer_entry: StepLogEntry
    content: bool
    began: float
    person: str = ""

    def rows(self, digest: Digest) -> list[dict[str, Any]]:
        """Return the lines as JSON: the request, the steps, the answer."""
        head = {"schema": SCHEMA, "run": self.id, "plan": self.plan}
        if self.content and self.person:
            head["person"] = self.person
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.began))
        rows = [_log_row(line, digest, self.content) for line in (self.request_entry, *self.steps, self.answer_entry)]
        return [
            {**head, "number": number, "of": len(rows), "created": created, **row} for number, row in enumerate(rows)
        ]


def _log_row(entry: StepLogEntry, digest: Digest, content: bool) -> dict[str, Any]:
    request_fields = {name: value for name, value in entry.request_fields.items() if name != "sampling"}
    sampling = {}
    for name, value in entry.request_fields.get("sampling", {}).items():
        sampling[name] = list(value) if isinstance(value, tuple) else value
    fields = {
        "step": entry.step_path,
        "role": entry.role,
        "agent": entry.agent,
        "outcome": entry.outcome,
        "sampling": sampling,
        "receipt": entry.receipt,
        "tokens": dict(entry.tokens),
        "took_s": round(entry.took_s, DIGITS),
        **digests(entry, digest),
    }
    error = entry.error
    if not content:
        return {**fields, "findings": len(entry.findings), "why": error.kind if error else ""}
    reason = f"{error.kind}: {error.problem}" if error else ""
    return {
        **fields,
        "findings": list(entry.findings),
        "why": reason,
        "content": {"asked": request_fields, "said": entry.reply},
    }


def digests(entry: StepLogEntry, digest: Digest) -> dict[str, Any]:
    """Return the digests of a step's request and reply; empty for an empty one."""
    request_fields, schema = entry.request_fields, entry.request_fields.get("schema", "")
    content = RequestDigestInput.of_request(
        {"messages": list(request_fields.get("messages", ())), "response_format": response_format(schema)}
    )
    parts = content.digests(digest) if request_fields else {}
    return {"asked": digest("asked", parts), "said": digest("said", entry.reply)}


def response_format(schema: str) -> Mapping[str, Any]:
    """Return a schema as the `response_format` of a request; an empty schema means text."""
    return {"type": "json_schema", "json_schema": {"schema": json.loads(schema)}} if schema else {"type": "text"}


class PlanLog:
    """Log of the plan runs of one team. Each process writes its own file a day. Safe to use from several threads.

    days: age at which a file is removed, as for receipts; 0 keeps all.
    about: returns the facts of the engine, which the request's line states as receipts do.
    lost: number of runs that could not be written.
    erased: users who were forgotten; their runs that began before are logged without texts.
    """

    def __init__(
        self, folder: Path, digest: Digest, days: int = 0, about: Callable[[], EngineInfo] | None = None
    ) -> None:
        self._files, self._digest, self._about = DayFiles(folder, "plans", days), digest, about
        self._folder = folder
        self.erased = ErasedUsers()
        self.lost = 0

    @classmethod
    def of(cls, team: Team, about: Callable[[], EngineInfo]) -> PlanLog:
        """Return the log of a team, with digests by its key."""
        state = Path(team.state)
        return cls(state / "plans", team_digest(state), team.limits.receipts_days, about)

    def write(self, finished_run: FinishedRun) -> None:
        """Append a run, whole, and fsync it; count it as lost on failure."""
        is_erased = partial(self.erased.covers_unix, finished_run.began, finished_run.person)
        if is_erased():
            finished_run = replace(finished_run, content=False)
        try:
            rows = finished_run.rows(self._digest)
            if self._about is not None:
                rows[0] |= self._about().made_by
            data = b"".join(json.dumps(row, ensure_ascii=True).encode() + b"\n" for row in rows)
            self._files.append(data)
            if finished_run.content and is_erased():  # the deletion may have looked before the lines were there
                erase_runs(self._folder, finished_run.person)
        except OSError:
            self.lost += 1


def erase_runs(folder: Path, person: str) -> int:
    """Blank every line of a person's runs, and return their number. A server may be appending to the files."""
    count = 0
    for file in sorted(folder.glob("plans-*.jsonl")):
        if lines := lines_with(file, f'"person": "{person}"'.encode()):
            blank(file, lines)
            count += len(lines)
    return count


def read_runs(file: Path) -> Iterator[list[dict[str, Any]]]:
    """Yield the runs of a log, each as its lines in order.

    Raises MissingError for a file that cannot be read, ArtifactError for one that is no log or has an incomplete run.
    """
    rows: list[dict[str, Any]] = []
    for number, text in enumerate(_lines(file), 1):
        if not text:
            continue
        try:
            row = json.loads(text)
            fits = row["number"] == len(rows) and (not rows or row["run"] == rows[0]["run"])
            schema = row["schema"]
        except (ValueError, TypeError, KeyError):
            raise ArtifactError(
                f"{file}, line {number} is no line of a log of plans", "give a file of STATE/plans"
            ) from None
        if schema != SCHEMA:
            problem = f"{file} has schema {schema!r:.20}; this version reads {SCHEMA}"
            raise ArtifactError(problem, upgrade_command())
        if not fits:
            problem = f"{file}, line {number} does not follow the one before it"
            raise ArtifactError(problem, "give the file as it was written")
        rows.append(row)
        if len(rows) == row["of"]:
            yield rows
            rows = []
    if rows:
        raise ArtifactError(f"{file} ends within the run {rows[0]['run']}", "give the file as it was written")


def _lines(file: Path) -> list[str]:
    try:
        # a blank line is one of a forgotten user's
        return [line if line.strip() else "" for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise MissingError(
            f"the log {file} cannot be read: {error}", "sartor agents replay STATE/plans/FILE.jsonl"
        ) from None
