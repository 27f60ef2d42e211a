"""Parts of a benchmark: progress on stderr, results that a later call takes over, and an end after `--minutes`.

    losses = parts.run("losses of trl", lambda: measure(...))

With `--work DIR` the result of a part stands in DIR under the program's options and the digest of the code, so that
the same command goes on where an earlier call ended, and a change of the code begins anew. A call ends after
`--minutes` (60): between two parts, or in the midst of one, whose processes are ended. It then exits with UNFINISHED,
and the same command goes on. A program that keeps results by itself does so in `work_folder`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

UNFINISHED = 75  # EX_TEMPFAIL of sysexits.h
MINUTES = 60.0
HEARTBEAT_S = 60.0
HERE = Path(__file__).resolve().parent
CODE = (HERE, HERE.parent / "src")
DIGESTED = ("*.py", "*.cpp", "*.h", "*.toml", "*.txt")


@dataclass
class Call:
    """One call of a benchmark. folder: where results of its parts stand, None where none are kept. part: the one that
    runs.
    """

    program: str = "benchmark"
    folder: Path | None = None
    limit_s: float = MINUTES * 60
    started_at: float = field(default_factory=time.monotonic)
    part: str = "begins"
    part_started_at: float = field(default_factory=time.monotonic)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the call began."""
        return time.monotonic() - self.started_at


# before a program has begun, as where a test calls one of its functions, there is no limit
_call = Call(limit_s=math.inf)


def begin(program: str, options: dict[str, Any], work: Path | None, minutes: float = MINUTES) -> None:
    """Start the clock of a call. options: what decides its results."""
    global _call
    folder = None
    if work:
        text = json.dumps([options, digest_of_code()], sort_keys=True, default=str)
        folder = work / f"{program}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    _call = Call(program, folder, minutes * 60)
    threading.Thread(target=_watch, args=(_call,), daemon=True).start()


def run(label: str, compute: Callable[[], Any], *, is_final: Callable[[Any], bool] = lambda result: True) -> Any:
    """Return a part's result, of an earlier call if it stands there. What `compute` returns must be JSON.

    is_final: whether a result is kept for a later call; one that says that something is not installed is not.
    Exits with UNFINISHED where no time is left to begin it.
    """
    call = _call
    file = call.folder / f"{hashlib.sha256(label.encode()).hexdigest()[:16]}.json" if call.folder else None
    if file and file.is_file():
        _say(call, f"{label}: of an earlier call")
        return json.loads(file.read_text(encoding="utf-8"))["result"]
    if call.elapsed_s >= call.limit_s:
        _say(call, _unfinished(call))
        sys.exit(UNFINISHED)
    call.part, call.part_started_at = label, time.monotonic()
    result = json.loads(json.dumps(compute()))  # the same whether it was just made or read
    _say(call, f"{label}: {time.monotonic() - call.part_started_at:.1f} s")
    if file and is_final(result):
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps({"part": label, "result": result}), encoding="utf-8")
        temporary.replace(file)
    return result


def work_folder(temporary: Path) -> Path:
    """Return where a program keeps files of its own for a later call: below `--work`, by its options and the code;
    made.

    temporary: the folder of a call without `--work`.
    """
    folder = _call.folder or temporary
    folder.mkdir(parents=True, exist_ok=True)
    return folder.absolute()


def digest_of_code() -> str:
    """Return the digest of Sartor's sources and of the benchmarks, with what their peers install
    (requirements.txt).
    """
    digest = hashlib.sha256()
    for folder in CODE:
        for file in sorted(file for suffix in DIGESTED for file in folder.rglob(suffix)):
            digest.update(file.relative_to(HERE.parent).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()


def _watch(call: Call) -> None:
    """Say once a minute what runs, and end the call and its processes when its time is over."""
    while call is _call:
        left_s = call.limit_s - call.elapsed_s
        if left_s <= 0:
            break
        time.sleep(min(HEARTBEAT_S, left_s))
        if call is _call and call.limit_s > call.elapsed_s:
            _say(
                call,
                f"{call.part}: for {time.monotonic() - call.part_started_at:.0f} s, {call.elapsed_s:.0f} s in all",
            )
    if call is not _call:
        return
    import psutil

    _say(call, _unfinished(call))
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()
    sys.stderr.flush()
    os._exit(UNFINISHED)


def _unfinished(call: Call) -> str:
    where = (
        f"the same command goes on from {call.folder}"
        if call.folder
        else "with --work DIR the same command would go on"
    )
    return f"{call.limit_s / 60:g} minutes are over, in the part {call.part!r}: {where}"


def _say(call: Call, text: str) -> None:
    print(f"{call.program}: {text}", file=sys.stderr, flush=True)
