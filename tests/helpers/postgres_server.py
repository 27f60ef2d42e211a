"""A Postgres server for a test."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def postgres() -> Iterator[str]:
    """A server of its own, its password needed; as another user where this one is root, whom Postgres refuses.

    Yields its URL. DB_PASSWORD has the password. Skips where Postgres or its driver is not installed.
    """
    pytest.importorskip("psycopg", reason="pip install 'psycopg[binary]'")
    if shutil.which("initdb") is None or shutil.which("pg_ctl") is None:
        pytest.skip("apt-get install postgresql, and its bin directory into PATH")
    home = Path(tempfile.mkdtemp(prefix="sartor-postgres-"))
    (home / "password").write_text(os.environ["DB_PASSWORD"])
    user: dict[str, Any] = {}
    if os.geteuid() == 0:
        user = {"user": "nobody"}
        for path in (home, home / "password"):
            shutil.chown(path, "nobody")
    options: dict[str, Any] = {"check": True, "capture_output": True, "cwd": home, **user}
    data = home / "data"
    try:
        subprocess.run(
            ["initdb", "-D", data, "-U", "team", "-A", "scram-sha-256", f"--pwfile={home}/password"], **options
        )
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        at = f"-p {port} -k {home} -c listen_addresses=127.0.0.1"
        options.pop("capture_output")  # the server would keep the pipe open
        subprocess.run(
            ["pg_ctl", "-D", data, "-o", at, "-l", home / "log", "-w", "-t", "600", "start"],
            stdout=subprocess.DEVNULL,
            **options,
        )
        try:
            yield f"postgresql+psycopg://team:${{DB_PASSWORD}}@127.0.0.1:{port}/postgres"
        finally:
            subprocess.run(["pg_ctl", "-D", data, "-m", "immediate", "stop"], stdout=subprocess.DEVNULL, **options)
    finally:
        shutil.rmtree(home, ignore_errors=True)
