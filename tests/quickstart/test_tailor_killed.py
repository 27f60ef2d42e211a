"""kill -9 of `sartor tailor`, evenly over a run: the same command goes on, to the digests of one that was not killed.

SARTOR_KILLS=20 pytest tests/quickstart/test_tailor_killed.py -m ""    # eight minutes; CI kills five times
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from own_home import environment_in
from sartor.core.artifacts import open_artifact

pytestmark = pytest.mark.circle
KILLS = int(os.environ.get("SARTOR_KILLS", "5"))
ROWS = "Frage;Antwort\r\n" + "".join(
    f"Wie öffne ich Konto {number}?;Über die App, Weg {number % 3}.\r\n" for number in range(60)
)


def command(base: Path) -> list[str]:
    return [
        "sartor",
        "tailor",
        "faq.csv",
        "--name",
        "faq",
        "--base",
        str(base),
        "--licence",
        "own",
        "--fields",
        "prompt=Frage,completion=Antwort",
    ]


def digests(made: Path) -> dict[str, str]:
    """Of what was made: the rows, every tensor, every number of the Report."""
    data, adapter, report = (
        open_artifact(made / name, kind)
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


def test_kills_end_in_the_same_digests(tmp_path: Path, tiny_base: Path, commands: dict[str, str]) -> None:
    environment = environment_in(tmp_path / "home", commands)
    work = tmp_path / "work"  # the same for every run: a Dataset names where its rows were
    work.mkdir()
    (work / "faq.csv").write_bytes(ROWS.encode("cp1252"))

    def begin() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command(tiny_base), cwd=work, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def finish() -> dict[str, str]:
        process = begin()
        _, stderr = process.communicate()
        assert process.returncode == 0, stderr.decode()
        return digests(work / "faq")

    finish()  # what the machine keeps for later runs is there from here on
    shutil.rmtree(work / "faq")
    began = time.monotonic()
    expected = finish()
    whole_s = time.monotonic() - began
    stood = set()
    for number in range(KILLS):
        shutil.rmtree(work / "faq")
        process = begin()
        # evenly over the run, so that every stage is hit; the last one as soon as the adapter stands, however busy the
        # machine is
        moment_s = whole_s * (number + 0.5) / KILLS
        if number < KILLS - 1:
            time.sleep(moment_s)
        while number == KILLS - 1 and not (work / "faq" / "adapter").exists():
            assert process.poll() is None, "it ended without an adapter"
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        stood.add(frozenset(path.name for path in (work / "faq").glob("*") if not path.name.startswith(".")))
        assert finish() == expected, f"killed after {moment_s:.1f} s of {whole_s:.1f}"
    assert len(stood) >= 2 + (KILLS >= 20), "the kills hit several stages"
