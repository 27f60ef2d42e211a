"""Commands that install extras or a newer Sartor, according to how Sartor was installed.

Sartor is not on the package index, so `sartor[tune]` alone does not resolve after an installation from a clone. The
installer records the origin of a distribution in `direct_url.json` (PEP 610).
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
    """Return the command that installs an extra; without `extra`, Sartor and its dependencies."""
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
    """Return the pip command of this Python: `pip` if the shell finds that one."""
    found = shutil.which("pip")
    if not sys.executable or (found and Path(found).parent.resolve() == Path(sys.executable).parent.resolve()):
        return "pip"
    return f"{shlex.quote(sys.executable)} -m pip"


def _origin() -> Mapping[str, Any]:
    """Return PEP 610's record of Sartor's origin; empty if there is none or it cannot be read."""
    try:
        record = json.loads(importlib.metadata.distribution("sartor").read_text("direct_url.json") or "{}")
    except Exception:  # a remedy is built while another error is reported, and must not replace it
        return {}
    return record if isinstance(record, dict) and isinstance(record.get("url"), str) else {}


def _directory(origin: Mapping[str, Any]) -> str:
    """Return the directory from which Sartor was installed; empty for an index, an archive or a repository."""
    url = str(origin.get("url", ""))
    return unquote(urlsplit(url).path) if url.startswith("file:") and "dir_info" in origin else ""


def _is_editable(origin: Mapping[str, Any]) -> bool:
    directory_info = origin.get("dir_info")
    return isinstance(directory_info, dict) and directory_info.get("editable") is True


def _requirement(origin: Mapping[str, Any], extras: str) -> tuple[str, bool]:
    """Return (requirement for pip, whether editable).

    extras: `[tune]` or empty.
    """
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
