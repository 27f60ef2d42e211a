"""Commands that install extras: by where Sartor came from, and by which Python runs it."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from sartor.core import installation
from sartor.core.errors import missing_package

CLONE = {"url": "file:///opt/my%20clone", "dir_info": {"editable": True}}


class Distribution:
    """An installed Sartor, with the `direct_url.json` that its installer wrote."""

    def __init__(self, record: Any) -> None:
        self.text = record if record is None or isinstance(record, str) else json.dumps(record)

    def read_text(self, name: str) -> str | None:
        return self.text if name == "direct_url.json" else None


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets where Sartor was installed from; `pip` is that of this Python."""
    monkeypatch.setattr(installation.shutil, "which", lambda name: str(Path(sys.executable).with_name(name)))

    def install(record: Any) -> None:
        monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution(record))

    return install


@pytest.mark.parametrize(
    ("record", "command"),
    [
        (CLONE, "pip install -e '/opt/my clone[tune]'"),
        ({"url": "file:///opt/clone", "dir_info": {}}, "pip install '/opt/clone[tune]'"),
        (None, "pip install 'sartor[tune]'"),
        (
            {
                "url": "https://git.example/s",
                "vcs_info": {"vcs": "git", "requested_revision": "v1", "commit_id": "ab"},
            },
            "pip install 'sartor[tune] @ git+https://git.example/s@v1'",
        ),
        ({"url": "file:///tmp/s-0.1.whl", "archive_info": {}}, "pip install 'sartor[tune] @ file:///tmp/s-0.1.whl'"),
    ],
)
def test_extra_is_installed_from_the_same_origin(installed: Any, record: Any, command: str) -> None:
    installed(record)
    assert installation.install_command("tune") == command


@pytest.mark.parametrize("record", ["{", "[]", "null", {"url": 3}, {"url": "file:///x", "dir_info": 3}])
def test_unreadable_record_raises_nothing(installed: Any, record: Any) -> None:
    installed(record)
    assert installation.install_command("tune").startswith("pip install ")


def test_absent_distribution_gives_the_plain_form(installed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    assert installation.install_command("tune") == "pip install 'sartor[tune]'"


@pytest.mark.parametrize("found", [None, "/usr/bin/pip"])
def test_pip_of_another_python_is_not_named(
    installed: Any, found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(None)
    monkeypatch.setattr(sys, "executable", "/venv/bin/python")
    monkeypatch.setattr(installation.shutil, "which", lambda name: found)
    assert installation.install_command("tune") == "/venv/bin/python -m pip install 'sartor[tune]'"


def test_upgrade_pulls_a_clone(installed: Any) -> None:
    installed(CLONE)
    assert installation.upgrade_command() == "git -C '/opt/my clone' pull"
    installed({"url": "file:///opt/clone", "dir_info": {}})
    assert installation.upgrade_command() == "git -C /opt/clone pull && pip install /opt/clone"
    installed(None)
    assert installation.upgrade_command() == "pip install --upgrade sartor"


def test_missing_package_names_the_command(installed: Any) -> None:
    installed(CLONE)
    assert missing_package("openpyxl", "office").remedy == "pip install -e '/opt/my clone[office]'"
    assert missing_package("numpy").remedy == "pip install -e '/opt/my clone'"
