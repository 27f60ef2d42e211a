"""The folder that `flwr run` bundles: lines of Python that name the installed apps, and what Flower wants to know of them.

The bundle is not where the code is: each side runs the Sartor that it has installed. See docs/federate-flower.md for what a
SuperLink that sends another bundle can reach.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sartor.core.artifacts import create_output_directory

# Flower counts who uses it, asks whether it is old, and installs what a bundle asks for, unless it is told not to
ENVIRONMENT: Mapping[str, str] = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
_PROJECT = """\
[project]
name = "sartor-rounds"
version = "1.0.0"
description = "Sartor's federated rounds, carried by Flower"
license = { file = "LICENSE" }
dependencies = ["flwr>=1.42,<1.43"]

[tool.flwr.app]
publisher = "sartor"
fab-format-version = 1
flwr-version-target = "1.42.0"

[tool.flwr.app.components]
serverapp = "sartor_rounds.server:app"
clientapp = "sartor_rounds.client:app"

# flwr run --run-config 'lead="/absolute/path.yaml"'
[tool.flwr.app.config]
lead = ""
"""
_FILES: Mapping[str, str] = {
    "pyproject.toml": _PROJECT,
    "LICENSE": "Apache License 2.0: https://www.apache.org/licenses/LICENSE-2.0\n",
    "sartor_rounds/__init__.py": '"""Sartor\'s rounds over Flower: the code is in the installed package."""\n',
    "sartor_rounds/server.py": "from sartor.federate.flower import server_app\n\napp = server_app.app\n",
    "sartor_rounds/client.py": "from sartor.federate.flower import client_app\n\napp = client_app.app\n",
}


def write_app(folder: Path) -> Path:
    """Write the folder. Raises ConfigError where something is there already."""
    with create_output_directory(folder) as part:
        for name, text in _FILES.items():
            file = part / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")
    return folder
