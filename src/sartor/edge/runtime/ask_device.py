"""Verb edge ask."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sartor.core.errors import BusyError, ConfigError, HealthError, StoreError
from sartor.core.ipc import error_of
from sartor.core.resource_limits import anonymous_bytes
from sartor.edge.owner.local_adapters import active_adapter
from sartor.edge.runtime.device_runtime import open_runtime, system_of
from sartor.edge.store.release_store import ReleaseStore
from sartor.edge.store.version_pointers import Installed, installed
from sartor.inference.engine import BASE, GenerateCall, ReplyFailed, Sampling, TextDelta


def ask(
    store: Path | str,
    name: str,
    prompt: str,
    *,
    base: str = "",
    sampling: Mapping[str, Any] | None = None,
    person: Path | str = "",
) -> dict[str, Any]:
    """Answer a prompt by the current version.

    It uses the version's own system prompt and sampling except for the options given.

    person: folder of a person, whose own delta answers if one fits the version.

    Raises StoreError if no version is current, ConfigError for an empty prompt, what `device_runtime.open_runtime`
    raises, and the error that the reply ended with.
    """
    if not prompt.strip():
        raise ConfigError("the prompt is empty", 'sartor edge ask NAME "..." --store DIR')
    delta = active_adapter(Path(person), Path(store), name)[0] if person else None
    with (
        _count_start(Path(store), name) as release,
        open_runtime(release.path, base, delta.path if delta else None) as (runtime, manifest),
    ):
        settings = Sampling(**{**manifest.get("sampling", {}), **(sampling or {})})
        messages = (*system_of(manifest), {"role": "user", "content": prompt})
        events = runtime.answer([GenerateCall("ask", BASE, messages, sampling=settings)])[0]
        memory_bytes = anonymous_bytes(os.getpid())
        end = events[-1]
        if isinstance(end, ReplyFailed):
            raise error_of(end.kind, end.problem, end.remedy, HealthError)
    return {
        "reply": "".join(event.text for event in events if isinstance(event, TextDelta)),
        "agent": f"{release.name}@{release.version}",
        "release": str(release.path),
        "version": release.version,
        "delta": delta.digest if delta else "",
        "runtime": runtime.name,
        "memory_bytes": memory_bytes,
    }


@contextmanager
def _count_start(store: Path, name: str) -> Iterator[Installed]:
    """Hold the current version for an answer.

    A version on trial has its start counted before, and is confirmed if nothing is raised inside. While a sync writes
    to the store nothing is counted, so that a prompt never waits for an update. Raises StoreError if no version is
    current.
    """
    release = installed(store, name)
    if release and release.trial:
        release = _try_in_store(store, lambda opened: opened.start(name)) or release
    if release is None:
        raise StoreError(
            f"{store} holds no {name}",
            f"sartor edge sync URL {name} --device ID --root 1.root.json --store {shlex.quote(str(store))}",
        )
    yield release
    if not release.trial:
        return

    def confirm(opened: ReleaseStore) -> None:
        """Confirm the version that answered, if it is still the current one."""
        current = opened.current(release.name)
        if current is not None and current.version == release.version:
            opened.confirm(name)

    _try_in_store(store, confirm)


def _try_in_store(folder: Path, action: Any) -> Installed | None:
    """Return the result of `action` on the store, or None while another process writes to it."""
    try:
        with ReleaseStore(folder) as store:
            release: Installed | None = action(store)
            return release
    except BusyError:
        return None
