"""SIGKILL of a coordinator and of a client around everything that they write to their journals: every stage, before and after."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import killed_round
from round_parties import mean_of_numbers

VICTIM = 1
EVERYONE, WITHOUT = mean_of_numbers([0, 1, 2, 3, 4]), mean_of_numbers([0, 2, 3, 4])


def kills(root: Path, who: str, each: int, comes_back: bool = True) -> list[tuple[int, str, list[str], list[float]]]:
    script = Path(killed_round.__file__)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(script), str(root), who, str(each), str(int(comes_back))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=1800)
    assert done.returncode == 0, done.stderr
    *found, last = [tuple(json.loads(line)) for line in done.stdout.splitlines()]
    assert last[1] == "", "the last one lived to the end"
    return found


def stages(found: list[tuple[int, str, list[str], list[float]]]) -> set[str]:
    return {what.removeprefix("before ").removeprefix("after ") for _, what, _, _ in found}


@pytest.mark.services
def test_killed_coordinator_resumes_and_both_sums_are_exact(memory: Path) -> None:
    """It is killed before and after journal writes of each stage, at 40 points or more."""
    found = kills(memory, "coordinator", 3)
    assert len(found) >= 40
    assert stages(found) == {"keep", "begin", "add answer", "add close", "end"}
    for at, what, states, values in found:
        assert states == ["done", "done"], (at, what)
        np.testing.assert_allclose(values, 2 * EVERYONE, atol=1e-6, err_msg=f"{at} {what}")


@pytest.mark.services
def test_a_client_that_is_killed_and_comes_back_is_in_both_sums(memory: Path) -> None:
    found = kills(memory, str(VICTIM), 1)
    assert len(found) >= 28
    assert stages(found) == {
        "begin",
        "keep",
        "end",
        *(f"add request {one}" for one in ("shares", "masked", "consent", "reveal")),
    }
    for at, what, states, values in found:
        assert states == ["done", "done"], (at, what)
        np.testing.assert_allclose(values, 2 * EVERYONE, atol=1e-6, err_msg=f"{at} {what}")


@pytest.mark.services
def test_client_killed_and_away_joins_the_next_sum(memory: Path) -> None:
    """If its vector had been sent it is in both sums, otherwise in the second alone."""
    found = kills(memory, str(VICTIM), 3, comes_back=False)
    first = [one for one in found if one[0] < 14]
    assert len(first) >= 5
    for at, what, states, values in first:
        assert states == ["done", "done"], (at, what)
        # its vector had been sent
        is_in = any(word in what for word in ("consent", "reveal", "end"))
        expected = EVERYONE + (EVERYONE if is_in else WITHOUT)
        np.testing.assert_allclose(values, expected, atol=1e-6, err_msg=f"{at} {what}")
