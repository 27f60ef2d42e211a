"""What Sartor stores beside artefacts is for its owner alone: modes of every file of SARTOR_HOME and of a team's state after a real run."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import sartor
from lineage_rows import example, write
from sartor.core import home
from sartor.core.artifacts import MANIFESTS
from sartor.models.tensor_files import TensorCache
from served_person import say, state_of, team

__all__ = ["team"]

# of most systems: files are readable for everybody
PERMISSIVE = 0o022


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    before = os.umask(PERMISSIVE)
    yield
    os.umask(before)


def is_open(path: Path) -> bool:
    return bool(path.lstat().st_mode & 0o077)


def open_to_others(folder: Path) -> list[str]:
    """Files and folders that somebody else may read, of a folder and below.

    Left out are links, empty locks, public keys, and what lies in an artefact: its files are made as the umask says, also
    where a user asked for them elsewhere.
    """
    found = []
    for path in [folder, *folder.rglob("*")]:
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode) or path.suffix == ".pub" or (path.is_file() and not status.st_size):
            continue
        if not is_open(path) or any(
            (parent / name).exists() for parent in (path, *path.parents) for name in MANIFESTS.values()
        ):
            continue
        found.append(f"{path.relative_to(folder)} {status.st_mode & 0o777:o}")
    return found


def test_kept_activations_are_owner_only() -> None:
    """They are computed from rows. `revoke` names their folder, since nobody can tell of which rows they are."""
    TensorCache(home.folder("activations"), 1 << 20).write("abcd", torch.ones(2, 3))
    (file,) = home.folder("activations").rglob("*.safetensors")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [is_open(folder) for folder in (file.parent, file.parent.parent, home.home())] == [False] * 3


def test_doctor_tells_of_a_home_that_others_can_read() -> None:
    """An older version made it so, or a person; it is not changed unasked, since it may be shared on purpose."""
    assert not any("chmod" in line for line in sartor.doctor().advice)
    home.home().chmod(0o755)
    assert f"chmod -R go= {home.home()}" in "".join(sartor.doctor().advice)


def test_revoke_names_the_caches_that_hold_something(tmp_path: Path) -> None:
    dataset = write(tmp_path / "d", [example("only")])
    assert sartor.revoke(dataset.path, source="a.jsonl").as_json()["caches"] == []
    TensorCache(home.folder("features"), 1 << 20).write("abcd", torch.ones(2, 3))
    assert sartor.revoke(dataset.path, source="a.jsonl").as_json()["caches"] == [str(home.home() / "features")]
    sartor.prune(cache=True)
    assert sartor.revoke(dataset.path, source="a.jsonl").caches == []


def test_stores_of_a_served_team_are_owner_only(team: Path) -> None:
    """A team that was tuned, evaluated, released, talked to, and learnt from for one person."""
    say(team)
    made = sartor.tune_personal(team, sartor.PersonalOptions(agent="switch", user="ada", epochs=2.0))
    sartor.make_key(team, ["switch"])
    assert {"registry.sqlite", "inbox", "people"} <= {path.name for path in state_of(team).iterdir()}
    assert {"catalogue.sqlite", "evaluations.jsonl"} <= {path.name for path in home.home().iterdir()}
    assert open_to_others(state_of(team)) == [], made
    assert open_to_others(home.home()) == []
