"""The services tier: what the resolver and a fresh venv say of the package."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.services


def test_a_plain_install_brings_no_torch_and_curates(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "v")], check=True)
    python = str(tmp_path / "v/bin/python")
    # what is never imported is not compiled: a minute less
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-compile", str(ROOT)], check=True, capture_output=True
    )
    listed = subprocess.run([python, "-m", "pip", "list"], check=True, capture_output=True, text=True).stdout.lower()
    assert "sartor" in listed and not any(name in listed for name in ("torch", "transformers", "presidio", "spacy"))
    (tmp_path / "rows.jsonl").write_text('{"question": "q", "answer": "a"}\n' * 3)
    (tmp_path / "c.yaml").write_text(f"sources: [{tmp_path / 'rows.jsonl'}]\nsplit: {{eval_fraction: 0}}\n")
    sartor = str(tmp_path / "v/bin/sartor")
    done = subprocess.run(
        [sartor, "curate", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "d"), "--json"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (tmp_path / "t.yaml").write_text(f"base: starter\ndata: {tmp_path / 'd'}\n")
    done = subprocess.run(
        [sartor, "tune", str(tmp_path / "t.yaml"), "--out", str(tmp_path / "a")], capture_output=True, text=True
    )
    assert done.returncode == 6
    assert f"-m pip install '{ROOT}[tune]'" in done.stderr and "Traceback" not in done.stderr


def test_all_extras_resolve_together() -> None:
    """What the Makefile installed for the tests stays as it is when the rest of `all` comes to it."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--report", "-", f"{ROOT}[all]"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    to_install = {install["metadata"]["name"].lower() for install in json.loads(done.stdout)["install"]}
    installed = {
        re.sub("[-_.]+", "-", distribution.name).lower() for distribution in importlib.metadata.distributions()
    }
    everything = {
        "torch",
        "transformers",
        "peft",
        "flwr",
        "ray",
        "bitsandbytes",
        "tuf",
        "hassil",
        "tensorboard",
        "fastapi",
    }
    assert everything <= installed - to_install
