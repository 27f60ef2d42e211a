"""A device takes a version whose check prompts another arithmetic answered, says so, and still asks what it can judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from health_fakes import CANARIES, ROWS, answering, lines, version  # noqa: F401
from sartor.core.numerics import NUMERICS
from sartor.edge import device_commands
from sartor.edge.store.release_store import ReleaseStore
from sartor.edge.update.health_check import Health, read_prompts
from sartor.edge.update.sync import Synced

BF16 = NUMERICS["bfloat16"]
OLD = f"not checked: made by numerics 1, and this version computes bfloat16 by numerics {BF16}"
BASES = {dtype: {"dtype": dtype} for dtype in ("float32", "bfloat16")}
WRONG = {"what_colour_is_the_sky": "Mary had a little lamb", "turn_on_the_light": "no"}


def stated(dtype: str, numerics: int) -> list[dict[str, Any]]:
    return [{**one, "dtype": dtype, "numerics": numerics} for one in CANARIES]


@pytest.mark.parametrize(
    "canaries", [CANARIES, stated("float32", 1), stated("bfloat16", BF16)], ids=["none", "fp32", "bf16"]
)
def test_replies_of_the_same_numerics_decide_about_the_version(
    canaries: Any,
    tmp_path: Path,
    answering: Any,  # noqa: F811
) -> None:
    """Right replies to the release's canaries pass, wrong ones fail."""
    release = version(tmp_path, canaries=canaries, base=BASES["float32"])
    answering()
    assert Health().check(release).not_checked == "" and Health().check(release).passed
    answering(**WRONG)
    assert Health().check(release).reasons[0].startswith("canary: of the release's own prompts")


@pytest.mark.parametrize(
    ("canaries", "wanted"),
    [
        (CANARIES, OLD),
        (stated("bfloat16", 1), OLD),
        (stated("bfloat16", BF16 + 1), f"not checked: made by numerics {BF16 + 1}, of a newer"),
    ],
)
def test_replies_of_another_arithmetic_refuse_no_version(
    canaries: Any,
    wanted: str,
    tmp_path: Path,
    answering: Any,  # noqa: F811
) -> None:
    release = version(tmp_path, canaries=canaries, base=BASES["bfloat16"])
    fake = answering(**WRONG)
    check = Health(read_prompts(lines(tmp_path, *ROWS)))
    check(release)  # raises nothing
    assert check.results[0].passed and check.results[0].not_checked.startswith(wanted)
    assert len(fake.asked) == len(CANARIES) + len(ROWS)
    answering(what_colour_is_the_sky="ha" * 60, turn_on_the_light="")
    assert Health().check(release).reasons[0].startswith("degenerate"), "what says nothing is refused all the same"
    answering(hello="Goodbye.", **WRONG)
    assert "line 1 (exact)" in check.check(release).reasons[0], "what its owner expects is asked all the same"


def test_a_sync_says_what_it_did_not_compare(tmp_path: Path, answering: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    release = version(tmp_path, canaries=CANARIES, base=BASES["bfloat16"])
    answering(**WRONG)

    def bring(store: ReleaseStore, url: str, name: str, device: Any, healthy: Any, *, again: bool) -> Synced:
        healthy(release)
        return Synced(name, "1.0", "", True, 0)

    monkeypatch.setattr(device_commands, "bring", bring)
    notices: list[str] = []
    options = device_commands.DeviceOptions(tmp_path / "store", "d1", tmp_path / "root.json")
    said = device_commands.sync("file:///nowhere", "home", options, notice=notices.append)
    assert said["not_checked"].startswith(OLD) and said["changed"]
    assert [line for line in notices if OLD in line]
