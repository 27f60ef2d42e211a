"""What brings a damaged file of a base back depends on where it lies."""

from __future__ import annotations

from pathlib import Path

import pytest

from sartor.core.home import home
from sartor.core.remedies import restore_command


def test_file_of_the_users_own_comes_from_a_copy(tmp_path: Path) -> None:
    assert restore_command(tmp_path / "config.json") == f"cp BACKUP/config.json {tmp_path / 'config.json'}"
    assert restore_command(tmp_path) == f"cp -r BACKUP/. {tmp_path}"


@pytest.mark.parametrize("folder", ["bases", "towers"])
def test_converted_base_is_removed(folder: str) -> None:
    converted = home() / folder / "starter-0123456789ab"
    assert restore_command(converted / "config.json").startswith(f"rm -r {converted} ")
    assert restore_command(converted).startswith(f"rm -r {converted} ")


def test_asset_is_installed_anew() -> None:
    file = home() / "assets" / "efficientnet-lite0-0123456789ab" / "model.onnx"
    assert restore_command(file) == f"rm -r {file.parent} && sartor assets install efficientnet-lite0"


def test_model_of_the_hub_is_fetched_anew(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--owner--some-model" / "snapshots" / "0123"
    assert restore_command(snapshot / "config.json") == "hf download owner/some-model config.json --force-download"
    assert restore_command(snapshot) == "hf download owner/some-model --force-download"
