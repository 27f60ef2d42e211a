"""skips.py: in CI a skip that the list does not allow fails the run, and is named; elsewhere it is information."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import skips

TESTS = """
import pytest

@pytest.mark.parametrize("number", [1, 2])
def test_reason(number):
    pytest.skip("no widget here: pip install widget")

@pytest.mark.skipif(True, reason="not on a Tuesday")
def test_mark():
    pass

@pytest.fixture
def gadget():
    pytest.skip("no gadget")

def test_fixture(gadget):
    pass

@pytest.mark.xfail(reason="a known defect")
def test_expected():
    assert False

def test_passes():
    pass
"""
WHOLE_FILE = "import pytest\npytest.importorskip('no_such_module', reason='pip install no-such-module')\n\ndef test_never():\n    pass\n"
ALL = ["no widget*", "not on a Tuesday", "no gadget", "a known defect", "pip install no-such-module"]
PASSED = 1
XDIST = ("-p", "xdist", "-n", "2")


def entry(reason: str = "", test: str = "") -> str:
    return f'[[skip]]\nreason = "{reason}"\ntest = "{test}"\nwhy = "it is tested elsewhere"\nmachine = "any"\n'


def run(folder: Path, allowed: str, *options: str, ci: str = "true") -> subprocess.CompletedProcess[str]:
    """pytest over TESTS and WHOLE_FILE with this list, in a process of its own."""
    (folder / "test_some.py").write_text(TESTS)
    (folder / "test_whole.py").write_text(WHOLE_FILE)
    (folder / "allowed.toml").write_text(allowed)
    own = {"PYTHONPATH": str(Path(skips.__file__).parent), "CI": ci, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment = {**os.environ, **own}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "skips", "--rootdir", str(folder), "-c", os.devnull]
    listed = ["--allowed-skips", str(folder / "allowed.toml"), "-o", f"cache_dir={folder / 'cache'}"]
    return subprocess.run(
        [*command, *listed, *options, "."], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("left_out", ALL)
def test_skip_that_is_not_listed_fails_in_ci(left_out: str, tmp_path: Path) -> None:
    allowed = "".join(entry(reason) for reason in ALL if reason != left_out)
    done = run(tmp_path, allowed)
    assert done.returncode == 1, done.stdout
    count = 2 if left_out == "no widget*" else 1
    assert f"{count} not on the list. Install what the reason names, or add an entry" in done.stdout
    assert left_out.rstrip("*") in done.stdout.partition("skips that fail this run")[2]
    assert f"{PASSED} passed" in done.stdout.splitlines()[-1], "pytest's own closing line stays the last"


def test_workers_of_xdist_report_theirs_to_the_controller(tmp_path: Path) -> None:
    done = run(tmp_path, "".join(map(entry, ALL)), *XDIST)
    assert done.returncode == 0 and "skips: all are on the list" in done.stdout
    done = run(tmp_path, "".join(map(entry, ALL[1:-1])), *XDIST)
    assert done.returncode == 1 and "3 not on the list" in done.stdout, "two of a test, and a whole file"


def test_skips_that_are_listed_pass_in_ci(tmp_path: Path) -> None:
    done = run(tmp_path, "".join(map(entry, ALL)))
    assert done.returncode == 0 and "skips: all are on the list" in done.stdout
    assert "matched nothing" not in done.stdout


def test_test_that_is_skipped_is_named_with_its_reason(tmp_path: Path) -> None:
    done = run(tmp_path, "")
    listed = done.stdout.partition("skips that fail this run")[2]
    for line in (
        "skipped: test_some.py::test_reason[2]",
        "    no widget here: pip install widget",
        "xfailed: test_some.py::test_expected",
        "skipped: test_whole.py",
        "    pip install no-such-module",
    ):
        assert line in listed, listed


def test_entry_by_test_allows_no_other_test(tmp_path: Path) -> None:
    others = "".join(map(entry, ALL[1:]))
    assert run(tmp_path, others + entry(test="test_some.py::test_reason[1]")).returncode == 1
    assert run(tmp_path, others + entry(test="test_some.py::test_reason[*]")).returncode == 0
    assert run(tmp_path, others + entry("no gadget", test="test_some.py::test_reason*")).returncode == 1


@pytest.mark.parametrize("ci", ["", "false", "0"])
def test_outside_ci_a_skip_is_information(ci: str, tmp_path: Path) -> None:
    done = run(tmp_path, "", ci=ci)
    assert done.returncode == 0 and "skips that would fail in CI (CI=true)" in done.stdout


def test_entry_that_never_matches_is_reported_and_fails_nothing(tmp_path: Path) -> None:
    allowed = "".join(map(entry, [*ALL, "no moon*"]))
    done = run(tmp_path, allowed)
    assert done.returncode == 0
    assert "1 of 6 entries of the list matched nothing yet" in done.stdout and '    "no moon*"' in done.stdout
    # tiers run one after the other: what matched in an earlier run of this checkout is not stale
    done = run(tmp_path, allowed, "-k", "passes", "--ignore", "test_whole.py")
    assert "1 of 6 entries" in done.stdout


def test_failed_run_keeps_its_status(tmp_path: Path) -> None:
    (tmp_path / "test_broken.py").write_text("def test_broken():\n    assert False\n")
    assert run(tmp_path, "", "-x").returncode == pytest.ExitCode.TESTS_FAILED
    assert run(tmp_path, "", "--nonsense").returncode == pytest.ExitCode.USAGE_ERROR


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[[skip]]\nreason = 'x'\n", "say `why` it may be skipped"),
        (entry("*"), "allows every skip"),
        (entry("x") + "when = 'always'\n", "unknown field 'when'"),
        ("[[skip\n", "is not TOML"),
    ],
)
def test_bad_list_is_refused(text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "allowed.toml").write_text(text)
    with pytest.raises(pytest.UsageError, match=problem):
        skips.read_allowed(tmp_path / "allowed.toml")


def test_own_list_is_good() -> None:
    assert len({entry.name for entry in skips.read_allowed(skips.FILE)}) == len(skips.read_allowed(skips.FILE))
