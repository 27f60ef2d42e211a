"""Tests that were slow when durations were recorded are passed over by `make quick`, and by nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import durations

ROOT = Path(__file__).parent.parent


def test_recorded_tests_are_slow_ones() -> None:
    recorded = json.loads(durations.FILE.read_text(encoding="utf-8"))
    assert recorded and all(seconds >= durations.SLOW_S for seconds in recorded.values())
    files = {name.partition("::")[0] for name in recorded}
    assert [file for file in sorted(files) if not (ROOT / file).is_file()] == [], "make durations"


def test_only_slow_tests_are_written(tmp_path: Path) -> None:
    durations.write_durations(tmp_path / "d.json", {"b": 2.04, "a": durations.SLOW_S, "c": 0.01})
    assert json.loads((tmp_path / "d.json").read_text()) == {"a": durations.SLOW_S, "b": 2.0}


def test_slow_test_is_deselected_where_it_is_asked_for(tmp_path: Path) -> None:
    """In a project of two tests, one of which is recorded."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_two.py").write_text("def test_a(): pass\n\ndef test_b(): pass\n")
    (tmp_path / "tests/durations.json").write_text('{"tests/test_two.py::test_a": 3.0}')
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  slow: x\n")
    plugin = (ROOT / "tests/helpers/durations.py").read_text()
    (tmp_path / "tests/conftest.py").write_text(plugin.replace("parents[1]", "parent"))

    def passed(*options: str) -> str:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    assert "1 passed, 1 deselected" in passed("-m", "not slow") and "2 passed" in passed()


def test_quick_alone_passes_over_slow_tests() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert makefile.count("not slow") == 1 and "not slow" in makefile.partition("\nquick:")[2].partition("\n\n")[0]
    assert "not slow" not in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
