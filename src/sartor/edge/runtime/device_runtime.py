"""A version asked in a process of its own, under limits that the system holds: `python -m sartor.edge.runtime.process JOB`.

What it does to that process, a crash of llama.cpp or a machine's last memory, says something of the version and hurts
nobody. JOB is a JSON file; the answers are written beside it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sartor.core import errors
from sartor.core.errors import BudgetError, HealthError, MissingError, SartorError
from sartor.core.resource_limits import Limits, Usage, run
from sartor.edge.health_reason import HealthReason
from sartor.edge.runtime import opened
from sartor.inference.engine import Call, Event, event_as_json, event_from_json

_ANSWERS, _LOG = "answers.json", "log"
_REMEDY = "publish a version that passes"


def asked(release: Path, calls: Sequence[Call], limits: Limits, base: str = "") -> tuple[list[list[Event]], Usage]:
    """The events of each call, and what the process used.

    Raises HealthError with a HealthReason as text: OPENS, TIME, MEMORY or CRASH; MissingError and BudgetError where
    something outside is not there, which says nothing of the version.
    """
    with tempfile.TemporaryDirectory(prefix="sartor-health-") as name:
        job = Path(name) / "job.json"
        said = {"release": str(release), "base": base, "calls": [call.as_json() for call in calls]}
        job.write_text(json.dumps(said), encoding="utf-8")
        used = run([sys.executable, "-m", "sartor.edge.runtime.process", str(job)], limits)
        _check(used, limits, job.with_name(_LOG))
        answered = json.loads(job.with_name(_ANSWERS).read_text(encoding="utf-8"))
    if error := answered.get("error"):
        raise _error(error)
    return [[event_from_json(event) for event in events] for events in answered["events"]], used


def _check(used: Usage, limits: Limits, log: Path) -> None:
    if used.killed == "memory":
        raise HealthError(HealthReason.MEMORY.text(f"it took more than {limits.memory_bytes:,} bytes"), _REMEDY)
    if used.killed:
        raise HealthError(HealthReason.TIME.text(f"it was not done in {limits.wall_s or limits.cpu_s:g} s"), _REMEDY)
    if used.exit_code != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
        detail = f"its process ended with {used.exit_code}: {' '.join(lines[-1:])[:200]}"
        raise HealthError(HealthReason.CRASH.text(detail), _REMEDY)


def _error(said: dict[str, str]) -> SartorError:
    """What is missing outside comes as it is; anything else is the version's fault."""
    kind = getattr(errors, said["kind"], HealthError)
    outside = next((known for known in (MissingError, BudgetError) if issubclass(kind, known)), None)
    if outside:
        return outside(said["problem"], said["remedy"])
    return HealthError(HealthReason.OPENS.text(said["problem"]), said["remedy"])


def main(arguments: Sequence[str]) -> int:
    """Answer the calls of a job."""
    job = Path(arguments[0])
    with job.with_name(_LOG).open("wb") as log:  # what libraries print is no part of the command's output
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    said = json.loads(job.read_text(encoding="utf-8"))
    answered: dict[str, Any]
    try:
        with opened(Path(said["release"]), said["base"]) as (runtime, _):
            events = runtime.answer([Call.from_json(call) for call in said["calls"]])
        answered = {"events": [[event_as_json(event) for event in one] for one in events]}
    except SartorError as error:
        answered = {"error": {"kind": error.kind, "problem": error.problem, "remedy": error.remedy}}
    job.with_name(_ANSWERS).write_text(json.dumps(answered), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
