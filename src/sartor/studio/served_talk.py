"""Conversations with a served Adapter or Release, beside its base, over the server's API.

A conversation is a JSON-lines file below `.studio/talks/`, one turn a line, for its user alone. Each side sees its own
replies as its history.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from sartor.core.errors import RequestError, UnavailableError
from sartor.core.filesystem import PRIVATE, write_file_atomic

TIMEOUT_S = 300.0
MAX_TURNS = 200
MAX_PROMPT_CHARS = 100_000
MAX_TOKENS = 400
BASE = "base"


@dataclass(frozen=True)
class SideReply:
    """Reply of one side. model: exact version that answered; problem: why it did not, empty if it did."""

    side: str
    model: str
    text: str
    wall_s: float
    problem: str = ""


@dataclass(frozen=True)
class TalkTurn:
    """A question and the replies of the sides that were asked."""

    prompt: str
    replies: Sequence[SideReply]
    at: float


class Talk:
    """A conversation of one user with one served artefact."""

    def __init__(self, folder: Path, job_id: str, user: str) -> None:
        owner = hashlib.sha256(user.encode()).hexdigest()[:16]
        self._file = folder / f"{job_id}-{owner}.jsonl"

    def turns(self) -> list[TalkTurn]:
        """Return the turns so far. Damaged lines are left out."""
        try:
            lines = self._file.read_text(encoding="utf-8").splitlines()
        except OSError:
            return []
        turns = []
        for line in lines:
            with suppress(ValueError, KeyError, TypeError):
                fields = json.loads(line)
                replies = [SideReply(**reply) for reply in fields["replies"]]
                turns.append(TalkTurn(fields["prompt"], replies, fields["at"]))
        return turns

    def clear(self) -> None:
        """Delete the conversation."""
        self._file.unlink(missing_ok=True)

    def ask(self, address: str, sides: Sequence[str], prompt: str, *, temperature: float | None) -> TalkTurn:
        """Ask each side at once and store the turn. Raises RequestError for an empty or too long prompt.

        sides: names of models, such as BASE.
        """
        if not prompt or len(prompt) > MAX_PROMPT_CHARS:
            raise RequestError(f"the question has {len(prompt):,} characters", f"1 to {MAX_PROMPT_CHARS:,} are taken")
        turns = self.turns()
        if len(turns) >= MAX_TURNS:
            raise RequestError(f"the conversation has {len(turns)} turns", "begin a new one")
        options: dict[str, Any] = {"max_tokens": MAX_TOKENS}
        if temperature is not None:
            options["temperature"] = temperature

        def reply_of(side: str) -> SideReply:
            return _reply(address, side, [*_history(turns, side), {"role": "user", "content": prompt}], options)

        with ThreadPoolExecutor(max(1, len(sides))) as threads:
            turn = TalkTurn(prompt, list(threads.map(reply_of, sides)), time.time())
        content = [json.dumps(asdict(item), ensure_ascii=False) for item in (*turns, turn)]
        write_file_atomic(self._file, ("\n".join(content) + "\n").encode("utf-8", "replace"), mode=PRIVATE)
        return turn


def _history(turns: Sequence[TalkTurn], side: str) -> list[dict[str, str]]:
    """Return the messages of a side: the questions that it answered, and its replies."""
    messages = []
    for turn in turns:
        for reply in turn.replies:
            if reply.side == side and not reply.problem:
                messages += [{"role": "user", "content": turn.prompt}, {"role": "assistant", "content": reply.text}]
    return messages


def _reply(address: str, side: str, messages: list[dict[str, str]], options: Mapping[str, Any]) -> SideReply:
    begun = time.monotonic()
    try:
        answer = httpx.post(
            f"{address}/v1/chat/completions",
            json={"model": side, "messages": messages, **options},
            timeout=TIMEOUT_S,
            trust_env=False,
        )
        content = answer.json()
        wall_s = time.monotonic() - begun
        if answer.status_code != 200:
            return SideReply(side, side, "", wall_s, str(content["error"]["message"]))
        text = content["choices"][0]["message"]["content"] or ""
        return SideReply(side, str(content["model"]), str(text), wall_s)
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        return SideReply(side, side, "", time.monotonic() - begun, f"the server does not answer: {error}")


def address_of(result: Mapping[str, Any]) -> str:
    """Return the address that `sartor serve` printed. Raises UnavailableError until there is one."""
    address = result.get("address")
    if not isinstance(address, str) or not address.startswith("http://127.0.0.1:"):
        raise UnavailableError("the server is not ready yet", "wait some seconds, then reload the page")
    return address
