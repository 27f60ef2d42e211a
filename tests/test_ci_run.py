""".ci/run and the Makefile: minutes of each stage, also of a run that fails; `make bench` leaves no benchmark out."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# in the order in which their output is shown
STAGES = {
    "venv": ".venv/.dev",
    "assets": "assets",
    "check": "check",
    "default": "test-default",
    "slow": "test-slow",
    "alone": "test-alone",
}
MINUTES = re.compile(r"^(\w+(?: again)?) +(\d+\.\d) min(.*)$")

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here: apt-get install bash")


def ci_run(folder: Path, failing: str = "", *, condition: str = "true") -> subprocess.CompletedProcess[str]:
    """.ci/run with a `make` that prints what pytest would, and fails at one target; no package is installed.

    condition: one of the shell, under which alone the target fails.
    """
    programs = folder / "bin"
    programs.mkdir()
    make = f'[ "$1" = "{failing}" ] && {condition} && status=2\necho "making $1"\necho "3 passed, CI=$CI, in 1.00s"\nexit ${{status:-0}}'
    for name, body in (("make", make), ("apt-get", "exit 1")):
        (programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (programs / name).chmod(0o755)
    script = folder / ".ci" / "run"  # it works in the folder above its own
    script.parent.mkdir()
    shutil.copyfile(ROOT / ".ci" / "run", script)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "CI": ""}
    return subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=False)


def minutes(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """Stage -> what stands behind its minutes."""
    lines = done.stdout.partition("ci: minutes of each stage\n")[2].splitlines()
    return {match[1]: match[3] for match in map(MINUTES.match, lines) if match}


def test_ci_prints_the_minutes_of_each_stage_behind_its_output(tmp_path: Path) -> None:
    done = ci_run(tmp_path)
    assert done.returncode == 0
    assert [line.removeprefix("making ") for line in done.stdout.splitlines() if "making" in line] == list(
        STAGES.values()
    )
    assert minutes(done) == dict.fromkeys([*STAGES, "total"], "")
    assert "3 passed, CI=true, in 1.00s" in done.stdout.splitlines()[-len(STAGES) - 4 :], (
        "pytest's closing line is near the end"
    )


@pytest.mark.parametrize(
    ("stage", "begun"),
    [("venv", 1), ("assets", 3), ("check", 3), ("default", 6), ("slow", 6), ("alone", 6)],
)
def test_failed_ci_prints_minutes_and_runs_remaining_tiers(stage: str, begun: int, tmp_path: Path) -> None:
    """A failure before the tiers ends the run; the exit code is 2."""
    done = ci_run(tmp_path, STAGES[stage])
    again = "plain" if stage == "venv" else f"{stage} again"
    failed = [stage] if stage in ("assets", "check") else [stage, again]
    assert done.returncode == 2
    expected = dict.fromkeys([*list(STAGES)[:begun], "total"], "") | dict.fromkeys(failed, "  FAILED (2)")
    assert minutes(done) == expected


def test_ci_goes_on_where_the_lock_cannot_be_installed(tmp_path: Path) -> None:
    """A registry that offers wheels of other hashes fails the locked install alone, and is named."""
    done = ci_run(tmp_path, STAGES["venv"], condition='[ "$LOCKED" != no ]')
    assert done.returncode == 0
    assert minutes(done) == {**dict.fromkeys([*STAGES, "plain", "total"], ""), "venv": "  FAILED (2)"}
    assert "going on with LOCKED=no" in done.stderr


@pytest.mark.parametrize("tier", ["default", "slow", "alone"])
def test_what_fails_beside_others_is_run_again_by_itself(tier: str, tmp_path: Path) -> None:
    """Clocks run out while other tests compute. Only the tests that failed are run, one at a time, and that decides.

    They are named at the end, since a test that passes alone may depend on its neighbours.
    """
    cache = tmp_path / ".pytest_cache" / ("alone" if tier == "alone" else "") / "v" / "cache"
    cache.mkdir(parents=True)
    (cache / "lastfailed").write_text('{"tests/test_a.py::test_b[a \\"c\\"]": true, "tests/test_d.py::test_e": true}')
    first = f'mkdir "{tmp_path}/began" 2>/dev/null'
    asks = 'case "$AGAIN" in "") true;; *) echo "again with $AGAIN"; false;; esac'
    done = ci_run(tmp_path, f"test-{tier}", condition=f"{{ {first} || {asks}; }}")
    assert done.returncode == 0
    assert minutes(done) == {**dict.fromkeys([*STAGES, f"{tier} again", "total"], ""), tier: "  FAILED (2)"}
    assert "again with --last-failed --last-failed-no-failures none -n 0" in done.stdout
    assert done.stdout.splitlines()[-2:] == ['tests/test_a.py::test_b[a "c"]', "tests/test_d.py::test_e"]


def test_stages_beside_others_hear_ctrl_c_and_yield(tmp_path: Path) -> None:
    """A shell lets its background jobs ignore SIGINT, which tests of the tier `alone` send to their processes."""
    ignored = "[ $((0x$(sed -n 's/^SigIgn:[^0-9a-f]*//p' /proc/self/status) & 2)) -ne 0 ]"
    assert minutes(ci_run(tmp_path, "test-alone", condition=ignored)) == dict.fromkeys([*STAGES, "total"], "")
    (tmp_path / "other").mkdir()
    assert ci_run(tmp_path / "other", "test-slow", condition='[ "$(nice)" -lt 19 ]').returncode == 0


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here: apt-get install make")
def test_make_bench_runs_every_benchmark_without_the_core_type() -> None:
    lines = subprocess.run(
        ["make", "-n", "bench"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    run = {re.search(r"benchmarks/(\w+)\.py", line)[1]: line for line in lines if "benchmarks/" in line}
    assert all("env -u OPENBLAS_CORETYPE" in line and "--json" in line for line in run.values())
    # what needs an artefact of the user's, writes files for others or is started by another
    others = {"serve_sides", "serve_work", "learn_rows", "norms", "parity", "bad_adapters", "spoken_rows", "train"}
    programs = {file.stem for file in ROOT.glob("benchmarks/*.py") if "__main__" in file.read_text(encoding="utf-8")}
    assert set(run) == programs - others


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here: apt-get install make")
def test_make_test_is_every_tier_in_order() -> None:
    done = subprocess.run(["make", "-n", "test", "AGAIN="], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    tiers = [line.partition("pytest -q ")[2].partition(" $(grep")[0].strip() for line in lines if "pytest -q" in line]
    assert tiers == [
        "-n 2 --dist worksteal",
        '-n 2 --dist loadfile --no-loadscope-reorder --durations 100 -m "(circle or services or browser) and not alone"',
        '--durations 10 -o cache_dir=.pytest_cache/alone -m "(circle or services or browser) and alone"',
    ]


def test_slow_tier_marks_stand_only_in_test_files() -> None:
    """The Makefile collects the files that name such a mark alone: one that came from elsewhere would never be run."""
    marks = re.compile(r"mark\.(circle|services|browser|alone)\b")
    elsewhere = [file for file in ROOT.glob("tests/**/*.py") if not file.name.startswith("test_")]
    assert [str(file) for file in elsewhere if marks.search(file.read_text(encoding="utf-8"))] == []
    assert not re.search(r"add_marker|pytestmark", (ROOT / "tests" / "conftest.py").read_text(encoding="utf-8"))
