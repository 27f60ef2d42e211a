"""Verb serve for one Adapter or one Release, without a file of a team.

An Adapter has passed no gate. It is served as `NAME@unreleased`, so that every reply says so, in the form of a Release
that a key signs which is made for this server, stands in its own directory alone, and is trusted by nothing else.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from sartor.core import config, signing
from sartor.core.artifacts import open_artifact
from sartor.core.config import is_valid_name
from sartor.release.release import seal_unreleased, verify_release
from sartor.serving.http.startup import Ready, serve
from sartor.serving.team_config import RESERVED, AgentOptions, Routing, Team


def serve_adapter(
    path: Path | str,
    flags: Sequence[str] = (),
    *,
    ready: Ready = lambda facts: None,
    notice: Callable[[str], object] = lambda line: None,
) -> None:
    """Serve an Adapter or a Release as a team of one until SIGTERM or Ctrl-C. What it kept goes when it ends.

    flags: options of a team, `--http.port 0`. Raises what `serve` raises, and what `verify` does for a Release.
    """
    with team_of(path, flags, notice=notice) as team:
        serve(team, ready=ready)


def team_of(
    path: Path | str, flags: Sequence[str] = (), *, notice: Callable[[str], object] = lambda line: None
) -> AbstractContextManager[Team]:
    """A team of one Adapter or Release. Its directory of records is there until the context ends."""
    return _team_of(Path(path).absolute(), flags, notice)


@contextmanager
def _team_of(path: Path, flags: Sequence[str], notice: Callable[[str], object]) -> Any:
    artifact = open_artifact(path, ("adapter", "release"))
    with tempfile.TemporaryDirectory(prefix="sartor-serve-") as folder:
        trust = ""
        if artifact.kind == "release":
            verify_release(path)
            name, release = artifact.manifest["name"], path
        else:
            name, release = _name_of(path), Path(folder) / "release"
            key = signing.keygen(Path(folder) / "key")
            seal_unreleased(artifact, release, name, signing.open_private(Path(key["private"])))
            Path(key["private"]).unlink()
            trust = key["public"]
            notice(f"{path} is an Adapter, and no Release: no gate has passed it; it answers as {name}@unreleased")
        team = Team(
            base=artifact.manifest["base"]["name"],
            agents=(AgentOptions(name=name, release=str(release)),),
            state=str(Path(folder) / "state"),
            trust=trust,
            # nothing was measured of an Adapter that nobody evaluated
            router=Routing(lift="ignored" if trust else "measured"),
        )
        yield config.load_any(Team, team, flags)


def _name_of(path: Path) -> str:
    """The directory's name, where an agent may be called so."""
    name = path.name.lower()
    return name if is_valid_name(name) and name not in RESERVED else "adapter"
