"""Verb serve for one Adapter or one Release, without a team file.

An Adapter has passed no gate. It is served as `NAME@unreleased`, so that every reply says so. For that it is sealed in
the form of a Release, with a key that is made for this server, lies in its temporary directory and is trusted by
nothing else.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp

from sartor.core import config, signing
from sartor.core.artifacts import Adapter, open_artifact
from sartor.core.config import is_valid_name
from sartor.core.errors import ConfigError
from sartor.release.release import seal_unreleased, verify_release
from sartor.serving.http.auth_middleware import is_loopback
from sartor.serving.http.startup import Ready, serve
from sartor.serving.team_config import RESERVED, AgentOptions, Routing, Team


def serve_adapter(
    path: Path | str,
    flags: Sequence[str] = (),
    *,
    mounts: Mapping[str, ASGIApp] | None = None,
    ready: Ready = lambda facts: None,
    notice: Callable[[str], object] = lambda line: None,
) -> None:
    """Serve an Adapter or a Release as a team of one agent until SIGTERM or Ctrl-C.

    Its records are deleted at the end.
    flags: options of a team, such as `--http.port 0`. mounts: as `serve` has them.
    Raises what `serve` raises, and for a Release what `verify_release` raises.
    """
    with team_of(path, flags, notice=notice) as team:
        serve(team, mounts=mounts, ready=ready)


def team_of(
    path: Path | str, flags: Sequence[str] = (), *, notice: Callable[[str], object] = lambda line: None
) -> AbstractContextManager[Team]:
    """Return the context manager of a team of one Adapter or Release.

    Its directory of records exists until the context ends.
    """
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
            assert isinstance(artifact, Adapter)
            name, release = artifact.name.lower(), Path(folder) / "release"
            if not is_valid_name(name) or name in RESERVED:
                name = "adapter"
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
            # an Adapter may have no Report, so its lift is unknown
            router=Routing(lift="ignored" if trust else "measured"),
        )
        served = config.load_any(Team, team, flags)
        if served.state == team.state and not is_loopback(served.http.host):
            raise ConfigError(
                f"http.host is {served.http.host!r}, which others can reach, and an Adapter or Release that is served "
                "alone has no keys",
                f"--host 127.0.0.1; or a team.yaml with {{base: {team.base}, agents: [{{name: {name}, release: "
                f"RELEASE}}]}}, then sartor agents key {name} --team team.yaml and sartor serve team.yaml --host HOST",
            )
        yield served
