"""kill -9 of `sartor tailor` at twenty moments: the same command goes on, to the digests of one that was not killed."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from own_home import environment_in
from sartor.core.artifacts import open_artifact

pytestmark = pytest.mark.circle
KILLS = 20
ROWS = "Frage;Antwort\r\n" + "".join(
    f"Wie öffne ich Konto {number}?;Über die App, Weg {number % 3}.\r\n" for number in range(60)
)


def command(folder: Path, base: Path) -> list[str]:
    return ["sartor", "tailor", "faq.csv", "--name", "faq", "--base", str(base), "--licence", "own", "--out", str(folder / "faq"),
            "--fields", "prompt=Frage,completion=Antwort"]  # fmt: skip


def digests(folder: Path) -> dict[str, str]:
    """Of what was made: the rows, every tensor, every number of the Report. Paths and clocks differ from folder to folder."""
    data, adapter, report = (
        open_artifact(folder / "faq" / name, kind)
        for name, kind in (("data", "dataset"), ("adapter", "adapter"), ("report", "report"))
    )
    return {
        "data": data.manifest["digest"],
        "adapter": adapter.manifest["files"]["adapter_model.safetensors"]["sha256"],
        "config": adapter.manifest["files"]["adapter_config.json"]["sha256"],
        "rows": report.manifest["files"]["rows.parquet"]["sha256"],
        "metrics": str(report.manifest["metrics"]),
        "forgetting": str(report.manifest["forgetting"]),
    }


def test_twenty_kills_end_in_the_same_digests(tmp_path: Path, tiny_base: Path, commands: dict[str, str]) -> None:
    environment = environment_in(tmp_path / "home", commands)

    def begin(folder: Path) -> subprocess.Popen[bytes]:
        folder.mkdir(exist_ok=True)
        (folder / "faq.csv").write_bytes(ROWS.encode("cp1252"))
        return subprocess.Popen(
            command(folder, tiny_base), cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def finish(folder: Path) -> None:
        process = begin(folder)
        _, stderr = process.communicate()
        assert process.returncode == 0, stderr.decode()

    began = time.monotonic()
    finish(tmp_path / "whole")
    whole_s = time.monotonic() - began
    expected = digests(tmp_path / "whole")
    stood = set()
    for number in range(KILLS):
        folder = tmp_path / f"killed-{number}"
        process = begin(folder)
        # evenly over the run, so that every stage is hit
        time.sleep(whole_s * (number + 0.5) / KILLS)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        stood.add(frozenset(path.name for path in (folder / "faq").glob("*") if not path.name.startswith(".")))
        finish(folder)
        assert digests(folder) == expected, f"killed after {whole_s * (number + 0.5) / KILLS:.1f} s"
    assert len(stood) >= 3, "the kills hit several stages"
