"""Conversations with served models, kept for their user alone.

    .studio/talks/JOB-USER.jsonl      a turn a line
    .studio/talks/JOB-USER.media/     pictures and recordings that were attached

A conversation belongs to a server's job and a user. Each of its sides is a model of any running server, and sees its
own replies as its history.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from sartor.core.errors import ConfigError, RequestError
from sartor.core.filesystem import PRIVATE, write_file_atomic

MAX_TURNS = 200
MAX_PROMPT_CHARS = 100_000
BASE = "base"
# threads receive replies of one conversation side by side, and each rewrites its file
_LOCK = threading.Lock()


class ReplyEnd(StrEnum):
    """How a reply ended. LENGTH: at the limit of its tokens. CUT: it broke off after its beginning."""

    PENDING = "pending"
    WHOLE = "whole"
    LENGTH = "length"
    STOPPED = "stopped"
    CUT = "cut"
    FAILED = "failed"


@dataclass(frozen=True)
class Side:
    """Model of a running server, as a conversation names it."""

    job_id: str
    model: str

    @property
    def key(self) -> str:
        """Name in forms and files."""
        return f"{self.job_id}:{self.model}"

    @classmethod
    def of(cls, key: str) -> Side:
        """Return the side of a name. Raises ConfigError for another form."""
        job_id, colon, model = key.partition(":")
        if not (job_id and colon and model):
            raise ConfigError(f"{key[:80]!a} names no model of a server", "choose one of the list")
        return cls(job_id, model)


@dataclass(frozen=True)
class SideReply:
    """Reply of one side.

    side: key of the side. model: exact version that answered.
    text: also the beginning of a reply that was stopped or broke off.
    problem: why it failed or broke off; empty if it did not.
    reason: why this agent answered. receipt: id; empty without one.
    feedback: what the user said of it, and where that went; empty if nothing.
    """

    side: str
    model: str
    text: str = ""
    wall_s: float = 0.0
    end: ReplyEnd = ReplyEnd.WHOLE
    problem: str = ""
    reason: str = ""
    receipt: str = ""
    feedback: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_history(self) -> bool:
        """Whether later turns see it."""
        return bool(self.text) and self.end in (ReplyEnd.WHOLE, ReplyEnd.LENGTH, ReplyEnd.STOPPED)

    @property
    def is_base(self) -> bool:
        """Whether the base without an adapter was asked or answered."""
        return self.model.partition("@")[0] == BASE


@dataclass(frozen=True)
class TalkTurn:
    """A question and the replies of the sides that were asked. media: names of files in the conversation's folder."""

    prompt: str
    replies: Sequence[SideReply]
    at: float
    media: Sequence[str] = ()


class Talk:
    """A conversation of one user with the models of one server, and any other's beside them.

    name: of its files.
    """

    def __init__(self, folder: Path, job_id: str, user: str) -> None:
        self.name = f"{job_id}-{hashlib.sha256(user.encode()).hexdigest()[:16]}"
        self.media = folder / f"{self.name}.media"
        self._file = folder / f"{self.name}.jsonl"

    def turns(self) -> list[TalkTurn]:
        """Return the turns so far. Damaged lines are left out."""
        try:
            lines = self._file.read_text(encoding="utf-8").split("\n")
        except OSError:
            return []
        turns = []
        for line in lines:
            with suppress(ValueError, KeyError, TypeError):
                fields = json.loads(line)
                replies = [SideReply(**{**reply, "end": ReplyEnd(reply["end"])}) for reply in fields["replies"]]
                turns.append(TalkTurn(fields["prompt"], replies, fields["at"], fields["media"]))
        return turns

    def reply(self, turn: int, side: int) -> tuple[TalkTurn, SideReply]:
        """Return a turn and one of its replies. Raises ConfigError if there is none."""
        turns = self.turns()
        if not (0 <= turn < len(turns) and 0 <= side < len(turns[turn].replies)):
            raise ConfigError("this conversation has no such reply", "reload the page")
        return turns[turn], turns[turn].replies[side]

    def clear(self) -> None:
        """Delete the conversation with its media."""
        with _LOCK:
            self._file.unlink(missing_ok=True)
            shutil.rmtree(self.media, ignore_errors=True)

    def begin(self, sides: Sequence[Side], prompt: str, media: Sequence[str] = ()) -> int:
        """Store a question whose replies are pending, and return its index.

        Raises RequestError for an empty or too long prompt, and for a conversation that is full.
        """
        if not (prompt or media) or len(prompt) > MAX_PROMPT_CHARS:
            raise RequestError(f"the question has {len(prompt):,} characters", f"1 to {MAX_PROMPT_CHARS:,} are taken")
        pending = [SideReply(side.key, side.model, end=ReplyEnd.PENDING) for side in sides]
        with _LOCK:
            turns = self.turns()
            if len(turns) >= MAX_TURNS:
                raise RequestError(f"the conversation has {len(turns)} turns", "begin a new one")
            self._write([*turns, TalkTurn(prompt, pending, time.time(), media)])
        return len(turns)

    def put(self, turn: int, side: int, reply: SideReply) -> None:
        """Replace a reply. One of a conversation that was deleted meanwhile is dropped."""
        with _LOCK:
            turns = self.turns()
            if not (turn < len(turns) and side < len(turns[turn].replies)):
                return
            replies = [*turns[turn].replies]
            replies[side] = reply
            turns[turn] = replace(turns[turn], replies=replies)
            self._write(turns)

    def _write(self, turns: Sequence[TalkTurn]) -> None:
        content = [json.dumps(asdict(turn), ensure_ascii=False) for turn in turns]
        write_file_atomic(self._file, ("\n".join(content) + "\n").encode("utf-8", "replace"), mode=PRIVATE)

    def history(self, side: str, turn: int) -> list[tuple[TalkTurn, SideReply]]:
        """Return what a side was asked before a turn, with its replies."""
        pairs = []
        for earlier in self.turns()[:turn]:
            pairs += [(earlier, reply) for reply in earlier.replies if reply.side == side and reply.is_history]
        return pairs
