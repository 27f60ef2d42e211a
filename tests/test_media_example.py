"""The circle tier: examples/media from pictures and recordings to a running server, and every block of its page beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import sartor
from served_example import run_blocks, served

pytestmark = pytest.mark.circle


@pytest.fixture(scope="module")
def team(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, commands: dict[str, str]
) -> Iterator[tuple[Path, str]]:
    """The folder of the team and the address of its server."""
    with served("media", tmp_path_factory.mktemp("example"), tiny_base, commands) as running:
        yield running


def test_every_block_of_the_page_runs_beside_the_server(team: tuple[Path, str], commands: dict[str, str]) -> None:
    printed = run_blocks("media", *team, commands)
    assert len(printed) >= 3
    assert "dictation" in printed[1]
    assert (team[0] / "stop.wav").read_bytes()[:4] == b"RIFF"


def test_reports_have_ablations_and_gates_check_modality(team: tuple[Path, str]) -> None:
    """Only the textile example has the slice rule for critical defects."""
    for name, kinds in (("textile", {"image"}), ("dictation", {"image", "audio"})):
        report = sartor.open(team[0] / "reports" / name).manifest
        assert set(report["ablation"]) == kinds
        gate = sartor.open(team[0] / "releases" / f"{name}-1.0").manifest["gate"]
        assert {"modality", "gain", "licence"} <= set(gate)
        assert ("slice:critical_not_only_repaired" in gate) == (name == "textile")
