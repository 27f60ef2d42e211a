"""Runtime of a version, in or out of process.

A crash of llama.cpp or an out-of-memory kill of the separate process is a finding about the version and affects
nothing else.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from sartor.core import revoked_releases
from sartor.core.artifacts import Artifact, open_artifact
from sartor.core.errors import BudgetError, HealthError, MissingError, ModelError, SartorError
from sartor.core.ipc import error_as_json, error_from_json
from sartor.core.lazy_import import import_module
from sartor.core.resource_limits import JobResult, ResourceLimits, ResourceUsage, run_job
from sartor.edge.health_reason import HealthReason
from sartor.inference.engine import Event, GenerateCall, event_as_json, event_from_json


class Runtime(Protocol):
    """Runtime that answers calls with one version.

    name: name of the runtime in reports.
    """

    name: str

    def answer(self, calls: Sequence[GenerateCall]) -> list[list[Event]]:
        """Return the events of each call, the last a ReplyDone or a ReplyFailed.

        A call's adapter is ignored: the version is the adapter.
        """
        ...

    def close(self) -> None:
        """Release the resources of the runtime."""
        ...


@contextmanager
def open_runtime(
    release: Path, base: str = "", delta: Path | None = None
) -> Iterator[tuple[Runtime, Mapping[str, Any]]]:
    """Open the runtime of a Release or a GGUF export, and yield it with its manifest.

    base: another location of the base than the version names; for an export with its adapter alone, a GGUF file.
    delta: PEFT directory of a person's own adapter, used in place of the Release's adapter.

    Raises ArtifactError for bytes that differ from the sealed ones, SignatureError for a revoked Release, ModelError
    for another base or a form without a runtime, ExtraError if the library is missing.
    """
    artifact = open_artifact(release, ("release", "export"))
    revoked_releases.check_not_revoked(artifact)  # its signature was checked before it was activated
    module, kind = _MODULES.get((artifact.kind, artifact.manifest.get("form", "")), ("", ""))
    if not module:
        raise ModelError(
            f"no runtime of a device takes the form {artifact.manifest.get('form')!r}", "sartor export --to gguf"
        )
    if delta:
        if artifact.kind != "release":
            raise ModelError(
                f"{label_of(artifact)} is an export, which takes no person's delta",
                "sartor edge publish RELEASE REPOSITORY, with the Release and no export of it",
            )
        artifact = replace(artifact, path=delta)
    runtime: Runtime = getattr(import_module(module), kind)(artifact, base)
    try:
        yield runtime, artifact.manifest
    finally:
        runtime.close()


_MODULES = {
    ("release", ""): ("sartor.edge.runtime.torch_runtime", "TorchRuntime"),
    ("export", "gguf"): ("sartor.edge.runtime.gguf_runtime", "Gguf"),
}


def system_of(manifest: Mapping[str, Any]) -> tuple[dict[str, str], ...]:
    """Return the system prompt of a version as the messages that go first."""
    system_prompt = manifest.get("system_prompt", "")
    return ({"role": "system", "content": system_prompt},) if system_prompt else ()


def label_of(release: Artifact) -> str:
    """Return name@version."""
    return f"{release.manifest['name']}@{release.manifest['version']}"


_REMEDY = "sartor edge publish RELEASE REPOSITORY, with a version that passes"


def ask_in_process(
    release: Path, calls: Sequence[GenerateCall], limits: ResourceLimits, base: str = ""
) -> tuple[list[list[Event]], ResourceUsage]:
    """Answer calls in a process of their own; return the events of each call and the resource usage.

    Raises HealthError with a HealthReason as text: OPENS, TIME, MEMORY or CRASH. Raises MissingError and BudgetError
    if something outside is missing, which is no fault of the version.
    """
    job = {"release": str(release), "base": base, "calls": [call.as_json() for call in calls]}
    finished = run_job("sartor.edge.runtime.device_runtime", job, limits)
    answers = _answers(finished, limits)
    if error := answers.get("error"):
        raise _error(error)
    replies = []
    for events in answers["events"]:
        replies.append([event_from_json(event) for event in events])
    return replies, finished.usage


def _answers(finished: JobResult, limits: ResourceLimits) -> dict[str, Any]:
    """Return what the process wrote. Raises HealthError if it exceeded a limit or crashed."""
    usage = finished.usage
    if usage.killed == "memory":
        raise HealthError(HealthReason.MEMORY.text(f"it took more than {limits.memory_bytes:,} bytes"), _REMEDY)
    if usage.killed:
        raise HealthError(HealthReason.TIME.text(f"it was not done in {limits.wall_s or limits.cpu_s:g} s"), _REMEDY)
    if usage.exit_code != 0 or finished.payload is None:
        detail = f"its process ended with {usage.exit_code}: {' '.join(finished.log_tail[-1:])[:200]}"
        raise HealthError(HealthReason.CRASH.text(detail), _REMEDY)
    return finished.payload


def _error(fields: dict[str, str]) -> SartorError:
    """Return the error that a process wrote.

    MissingError and BudgetError stay such, since something outside is missing. Any other becomes a HealthError.
    """
    error = error_from_json(fields)
    for outside_error in (MissingError, BudgetError):
        if isinstance(error, outside_error):
            return outside_error(error.problem, error.remedy)
    return HealthError(HealthReason.OPENS.text(error.problem), error.remedy)


def main(job_file: str, result_file: str) -> None:
    """Answer the calls of a job."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    answers: dict[str, Any]
    try:
        with open_runtime(Path(job["release"]), job["base"]) as (runtime, _):
            replies = runtime.answer([GenerateCall.from_json(call) for call in job["calls"]])
        answers = {"events": [list(map(event_as_json, events)) for events in replies]}
    except SartorError as error:
        answers = {"error": error_as_json(error)}
    Path(result_file).write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
