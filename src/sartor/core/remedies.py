"""Remedies shared by many errors: commands that restore a file, and how to report a defect."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from sartor.core.home import home

REPORT = "sartor doctor --json, and send its output with this message to the maintainers"
REQUEST_AGAIN = "send the same request again; at a terminal, type the same command again"
# cache path of huggingface_hub: .../models--OWNER--NAME/snapshots/REVISION/FILE
_HUB_CACHE = re.compile(r"/models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/[^/]+/?(?P<file>.*)$")
# folders of SARTOR_HOME whose content is converted from other files
_CONVERTED = ("bases", "towers")


def restore_command(path: Path) -> str:
    """Return the command that restores a damaged file or directory of a base, tower or encoder."""
    path = path.expanduser().absolute()
    assets = home() / "assets"
    if path != assets and path.is_relative_to(assets):
        folder = assets / path.relative_to(assets).parts[0]
        return f"rm -r {shlex.quote(str(folder))} && sartor assets install {folder.name.rpartition('-')[0]}"
    for made in (home() / name for name in _CONVERTED):
        if path != made and path.is_relative_to(made):
            folder = made / path.relative_to(made).parts[0]
            return f"rm -r {shlex.quote(str(folder))}   # it is converted anew at its next use"
    if cached := _HUB_CACHE.search(path.as_posix()):
        repository, file = f"{cached['owner']}/{cached['name']}", cached["file"]
        return f"hf download {shlex.quote(repository)}{f' {shlex.quote(file)}' if file else ''} --force-download"
    if path.is_dir():
        return f"cp -r BACKUP/. {shlex.quote(str(path))}"
    return f"cp {shlex.quote(f'BACKUP/{path.name}')} {shlex.quote(str(path))}"
