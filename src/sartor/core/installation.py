"""Commands that install extras or a newer Sartor, by the way in which Sartor was installed.

Sartor is not on the package index, so `sartor[tune]` alone resolves to nothing where it was installed from a clone.
The installer writes where a distribution came from into `direct_url.json` (PEP 610).
"""

from __future__ import annotations

import importlib.metadata
import json
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


def install_command(extra: str = "") -> str:
    """Return the command that installs an extra of this Sartor; without `extra`, Sartor with what it needs."""
    requirement, is_editable = _requirement(_origin(), f"[{extra}]" if extra else "")
    return f"{pip_command()} install {'-e ' if is_editable else ''}{shlex.quote(requirement)}"


def upgrade_command() -> str:
    """Return the command that installs a newer Sartor."""
    origin = _origin()
    if directory := _directory(origin):
        update = f"git -C {shlex.quote(directory)} pull"
        return update if _is_editable(origin) else f"{update} && {install_command()}"
    requirement, _ = _requirement(origin, "")
    return f"{pip_command()} install --upgrade {shlex.quote(requirement)}"


def pip_command() -> str:
    """Return how to call the pip of this Python: `pip` where that is the one that the shell finds."""
    found = shutil.which("pip")
    if not sys.executable or (found and Path(found).parent.resolve() == Path(sys.executable).parent.resolve()):
        return "pip"
    return f"{shlex.quote(sys.executable)} -m pip"


def _origin() -> Mapping[str, Any]:
    """PEP 610's record of where Sartor was installed from; empty where there is none that can be read."""
    try:
        record = json.loads(importlib.metadata.distribution("sartor").read_text("direct_url.json") or "{}")
    except Exception:  # a remedy is made while another error is reported: nothing may replace that
        return {}
    return record if isinstance(record, dict) and isinstance(record.get("url"), str) else {}


def _directory(origin: Mapping[str, Any]) -> str:
    """The directory that Sartor was installed from; empty for an index, an archive or a repository."""
    url = str(origin.get("url", ""))
    return unquote(urlsplit(url).path) if url.startswith("file:") and "dir_info" in origin else ""


def _is_editable(origin: Mapping[str, Any]) -> bool:
    directory_info = origin.get("dir_info")
    return isinstance(directory_info, dict) and directory_info.get("editable") is True


def _requirement(origin: Mapping[str, Any], extras: str) -> tuple[str, bool]:
    """(what pip is to install, whether editable). extras: `[tune]` or empty."""
    if directory := _directory(origin):
        return f"{directory}{extras}", _is_editable(origin)
    version_control = origin.get("vcs_info")
    if isinstance(version_control, dict):
        revision = version_control.get("requested_revision")
        address = f"{version_control.get('vcs', 'git')}+{origin['url']}" + (f"@{revision}" if revision else "")
        return f"sartor{extras} @ {address}", False
    if "archive_info" in origin:
        return f"sartor{extras} @ {origin['url']}", False
    return f"sartor{extras}", False
