"""A publisher's repository with one release, and a device."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytest.importorskip("tuf", reason="pip install 'sartor[edge]'")

from sartor.core import signing
from sartor.edge import publish, roles
from sartor.edge.store import Store
from updating import World, adapter, release


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once: keys, and a repository with version 1.0 for all devices."""
    folder = tmp_path_factory.mktemp("published")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SARTOR_HOME", str(folder / "home"))
        signing.keygen(folder / "signer")
        roles.keygen(folder / "keys")
        made = release(folder / "1.0", "1.0", adapter(0), folder / "signer")
        publish.publish(made, folder / "repository", folder / "keys", key=folder / "signer")
    return folder


@pytest.fixture
def world(published: Path, tmp_path: Path) -> World:
    """A copy of `published`, and a device that never synced."""
    for name in ("signer", "keys", "repository"):
        shutil.copytree(published / name, tmp_path / name)
    store = Store(tmp_path / "store")
    return World(tmp_path, tmp_path / "signer", tmp_path / "keys", tmp_path / "repository", store, tmp_path / "device")
