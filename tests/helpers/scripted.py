"""An engine whose replies follow from the calls, for servers and workers in tests: real processes without torch.

    Supervisor(scripted.team(), scripted.COMMAND)      workers that hold it
    scripted.reply_of(call)                            the text that any of them must give

A prompt that holds DIE, HANG, GROW, NAN or WAIT does that once the reply has two tokens (DIE0 at once; GROW9 nine times). An adapter is a directory with
a file `behaviour`: `ok`, or what attaching it does (`error`, `die`, `hang`), or what its calls do (`nan`, `poison`, `moody`:
another reply in each process).
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sartor.core.errors import InputError, ModelError
from sartor.inference.engine import EngineInfo, Event, GenerateCall, ReplyDone, ReplyFailed, TextDelta, TextEmbedding
from sartor.serving import team_config as teams
from sartor.serving.workers import worker_main

COMMAND = (sys.executable, str(Path(__file__).absolute()))
BAD_AT = 2  # tokens
_GROWTH_BYTES = 8 << 20


def team(step_s: float = 0.002, rows: int = 4, open_s: float = 0.0, **changes: Any) -> teams.Team:
    """A team of it. The base's name says how long a step takes, its digest, and how long the engine takes to open."""
    quick = {"backoff_s": 0.01, "backoff_most_s": 0.05, "start_s": 120.0, "hang_s": 2.0, "restarts": 100}
    workers = teams.WorkerOptions(**{**quick, **changes.pop("workers", {})})
    return teams.Team(
        base=f"{step_s} digest {open_s}", engine=teams.LocalEngineOptions(rows=rows), workers=workers, **changes
    )


def prompt_of(call: GenerateCall) -> str:
    """What it asks."""
    return call.text or str(call.messages[-1]["content"])


def asked_by(call: GenerateCall) -> str:
    """What its reply is about."""
    said = f"{call.adapter} {prompt_of(call)} {call.sampling.seed}"
    return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()[:8]


def reply_of(call: GenerateCall) -> str:
    """Its whole reply: as many tokens as it may have."""
    return "".join(f"{asked_by(call)}-{place} " for place in range(call.sampling.max_tokens))


def adapter(folder: Path, behaviour: str = "ok") -> Path:
    """A directory that can be attached."""
    folder.mkdir(parents=True)
    (folder / "behaviour").write_text(behaviour)
    return folder


@dataclass
class _Row:
    call: GenerateCall
    behaviour: str
    asked: str
    said: int = 0
    grown: list[bytearray] = field(default_factory=list)


class Scripted:
    """An `Engine` (inference/engine.py)."""

    def __init__(self, step_s: float = 0.0, digest: str = "digest", rows: int = 4) -> None:
        self._step_s = step_s
        self._waiting: list[_Row] = []
        self._rows: list[_Row] = []
        self._cancelled: set[str] = set()
        self._adapters: dict[str, str] = {}
        self.about = EngineInfo(
            "scripted", "scripted", digest, "template", context_tokens=4096, rows=rows, device="cpu"
        )

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._rows)

    def attach(self, adapter: str, path: Path) -> int:
        behaviour = (path / "behaviour").read_text()
        if behaviour == "error":
            raise ModelError(f"{path} does not fit", "another adapter")
        if behaviour in ("die", "hang"):
            _misbehave(behaviour.upper())
        self._adapters[adapter] = behaviour
        return 1000

    def detach(self, adapter: str) -> None:
        self._adapters.pop(adapter, None)

    def submit(self, call: GenerateCall) -> None:
        if "REFUSED" in prompt_of(call):
            raise InputError("the prompt is refused", "another prompt")
        if "BUG" in prompt_of(call):
            raise ZeroDivisionError
        if call.adapter and call.adapter not in self._adapters:
            raise ModelError(f"no adapter {call.adapter}", "attach it")
        behaviour = self._adapters.get(call.adapter, "ok")
        asked = f"{os.getpid()}" if behaviour == "moody" else asked_by(call)
        self._waiting.append(_Row(call, behaviour, asked))

    def cancel(self, call: str) -> None:
        self._cancelled.add(call)

    def step(self) -> Sequence[Event]:
        time.sleep(self._step_s)
        free = self.about.rows - len(self._rows)
        self._rows += self._waiting[:free]
        del self._waiting[:free]
        events = [event for row in [*self._rows, *self._waiting] for event in self._next(row)]
        ended = {event.call for event in events if not isinstance(event, TextDelta)}
        self._rows = [row for row in self._rows if row.call.id not in ended]
        self._waiting = [row for row in self._waiting if row.call.id not in ended]
        self._cancelled -= ended
        return events

    def embed(self, texts: Sequence[str]) -> Iterator[TextEmbedding | None]:
        for text in texts:
            if "DIE" in text:
                _misbehave("DIE")
            for _ in range(text.count("SLOW")):
                time.sleep(0.01)
                yield None
            yield TextEmbedding([1.0, float(len(text))], len(text))

    def close(self) -> None:
        self._rows.clear()

    def _next(self, row: _Row) -> list[Event]:
        call, prompt = row.call, prompt_of(row.call)
        if call.id in self._cancelled:
            return [ReplyDone(call.id, "cancelled", 1, row.said)]
        if row not in self._rows:
            return []
        if row.behaviour == "poison" or "DIE0" in prompt:
            _misbehave("DIE")
        if "GROW" in prompt and not ("GROW9" in prompt and len(row.grown) == 9):
            row.grown.append(bytearray(os.urandom(1024) * (_GROWTH_BYTES // 1024)))
        if row.said == BAD_AT:
            if row.behaviour == "nan" or "NAN" in prompt:
                return [ReplyFailed(call.id, "ModelError", "a logit is not finite", "another adapter")]
            for word in ("DIE", "HANG", "WAIT"):
                if word in prompt:
                    _misbehave(word)
        row.said += 1
        piece = TextDelta(call.id, f"{row.asked}-{row.said - 1} ", 1)
        if row.said < call.sampling.max_tokens:
            return [piece]
        return [piece, ReplyDone(call.id, "length", len(prompt.split()), row.said)]


def _misbehave(how: str) -> None:
    if how == "DIE":
        os._exit(9)
    time.sleep({"HANG": 3600, "WAIT": 0.5}[how])


def open_scripted(said: Mapping[str, Any]) -> Scripted:
    """By an `open` frame; see `team`. A base whose name begins with `no` cannot be opened."""
    if said["base"].startswith("no"):
        raise ModelError(f"there is no base {said['base']!r}", "another base")
    step_s, digest, open_s = said["base"].split(" ")
    time.sleep(float(open_s))
    return Scripted(float(step_s), digest, said["engine"]["rows"])


if __name__ == "__main__":
    worker_main.main(open_scripted, check=lambda path, adapter: None)  # its adapters are a file of words
