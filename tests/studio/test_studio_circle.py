"""From an uploaded table to a reply that is traced and repaired, in Chromium, with kills of job, studio and browser."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from own_home import environment_in

pytest.importorskip("playwright", reason="no playwright here: pip install playwright")

from studio_circle import Circle, end_jobs  # noqa: E402

from studio_visit import CHROMIUM, StudioProcess, chromium  # noqa: E402

pytestmark = [
    pytest.mark.browser,
    pytest.mark.circle,
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="no Chromium here: apt-get install chromium"),
]
KILLS = 3
QUESTIONS = [f"what colour is sky number {number}" for number in range(120)]
ANSWER = "the sky is blue"


def test_circle_survives_kills(tmp_path: Path, tiny_base: Path) -> None:
    environment = environment_in(tmp_path / "home", {})
    work, table = tmp_path / "work", tmp_path / "sky.csv"
    work.mkdir()
    table.write_text("prompt,completion\n" + "".join(f"{question},{ANSWER}\n" for question in QUESTIONS))
    key = str(tmp_path / "home" / "keys" / "default")
    keygen = [sys.executable, "-P", "-m", "sartor", "keygen", key, "--trust"]
    subprocess.run(keygen, env=environment, check=True, capture_output=True)
    try:
        with StudioProcess(work, environment) as studio, chromium() as browser:
            circle = Circle(browser, studio, work, base=str(tiny_base), rows=table, questions=QUESTIONS)
            outcome = circle.run(KILLS)
    finally:
        end_jobs(work)
    assert (outcome.untrue, outcome.lost) == ([], [])
    assert outcome.kills == {"job": 1, "studio": 1, "browser": 1}
    assert set(outcome.seconds) == {*("upload", "tailor", "evaluate", "release", "talk", "feedback", "trace", "fix")}
