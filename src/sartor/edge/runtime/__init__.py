"""A version on the device, answering: ours for a Release, llama.cpp alone for a GGUF export of one. No torch at import.

gguf.py      an export, or its adapter on a base's own GGUF file, by xllamacpp: no torch, no transformers in the process
ours.py      a Release on its base, as `sartor ask` computes it
process.py   either of them in a process of its own, under limits: what a health check asks
ask.py       one reply of the version that is current
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from sartor.core.artifacts import Artifact, open_artifact
from sartor.core.errors import ModelError
from sartor.core.lazy_import import load
from sartor.inference.engine import Call, Event


class Runtime(Protocol):
    """What answers. `name`: as a report says it."""

    name: str

    def answer(self, calls: Sequence[Call]) -> list[list[Event]]:
        """The events of each call, the last a Done or a Failed. A call's adapter is not read: the version is the adapter."""
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


@contextmanager
def opened(release: Path, base: str = "", delta: Path | None = None) -> Iterator[tuple[Runtime, Mapping[str, Any]]]:
    """What runs a Release or a GGUF export, and its manifest. `base`: in another place than it names; for an export with its
    adapter alone, a GGUF file. `delta`: PEFT's directory of a person's own, in the place of the Release's adapter.

    Raises ArtifactError for bytes that are not as they were sealed, ModelError for a base that is another, ExtraError where
    the library is absent.
    """
    found = open_artifact(release, ("release", "export"))
    module, kind = _MODULES.get((found.kind, found.manifest.get("form", "")), ("", ""))
    if not module:
        raise ModelError(f"no runtime of a device takes the form {found.manifest.get('form')!r}", "sartor export --to gguf")
    if delta:
        if found.kind != "release":
            raise ModelError(f"{label_of(found)} is an export, which takes no person's delta", "publish the Release itself")
        found = replace(found, path=delta)
    runtime: Runtime = getattr(load(module), kind)(found, base)
    try:
        yield runtime, found.manifest
    finally:
        runtime.close()


_MODULES = {
    ("release", ""): ("sartor.edge.runtime.ours", "Ours"),
    ("export", "gguf"): ("sartor.edge.runtime.gguf", "Gguf"),
}


def system_of(manifest: Mapping[str, Any]) -> tuple[dict[str, str], ...]:
    """The system prompt of a version as the messages that go first."""
    said = manifest.get("system_prompt", "")
    return ({"role": "system", "content": said},) if said else ()


def label_of(release: Artifact) -> str:
    """name@version."""
    return f"{release.manifest['name']}@{release.manifest['version']}"
