"""Check prompts say which arithmetic made their replies; those of another one are asked, and compared with nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from release_fixtures import keys, probe, release  # noqa: F401
from sartor.core import parquet_io
from sartor.core.artifacts import Artifact, open_artifact
from sartor.core.errors import AdmissionError
from sartor.core.numerics import NUMERICS, numerics
from sartor.evaluate import training_facts
from sartor.inference.engine import Event, ReplyDone, TextDelta
from sartor.release import canary_prompts
from training_examples import example, facts

OLD = "not checked: made by numerics 1, and this version computes bfloat16 by numerics 3"
REPLIES = ("the sky is blue", "the light is on")


def manifest(dtype: str, /, **made_by: Any) -> dict[str, Any]:
    """What of release.json is read: two check prompts."""
    asked = [{"messages": [{"role": "user", "content": reply}], "reply": reply, **made_by} for reply in REPLIES]
    return {"system_prompt": "", "base": {"dtype": dtype}, "canaries": asked}


def said(*texts: str) -> list[Sequence[Event]]:
    return [[TextDelta("c", text, 3), ReplyDone("c", "stop", 5, 3)] for text in texts]


@pytest.mark.parametrize(
    ("dtype", "made_by"),
    [
        ("float32", {}),
        ("float32", {"numerics": 1, "dtype": "float32"}),
        ("bfloat16", {"numerics": 3, "dtype": "bfloat16"}),
        ("bfloat16", {"numerics": 1, "dtype": "float32"}),  # the Report's dtype, not the Adapter's
    ],
)
def test_replies_of_the_same_arithmetic_are_compared(dtype: str, made_by: dict[str, Any]) -> None:
    asked = canary_prompts.canaries_of(manifest(dtype, **made_by), "a")
    assert canary_prompts.judge_canaries(asked, said(*REPLIES)).startswith(
        "2 recorded prompts answered, 2 begin word for word"
    )
    with pytest.raises(AdmissionError, match="alike|like those"):
        canary_prompts.judge_canaries(asked, said("quite another thing", "no"))


@pytest.mark.parametrize(
    ("dtype", "made_by", "wanted"),
    [
        ("bfloat16", {}, OLD),
        ("float32", {"dtype": "bfloat16", "numerics": 1}, OLD),
        ("float32", {"dtype": "float32", "numerics": 5}, "not checked: made by numerics 5, of a newer Sartor"),
    ],
)
def test_replies_of_another_arithmetic_are_not_compared(dtype: str, made_by: dict[str, Any], wanted: str) -> None:
    asked = canary_prompts.canaries_of(manifest(dtype, **made_by), "a")
    found = canary_prompts.judge_canaries(asked, said("quite another thing", "no"))
    assert found.startswith(wanted) and found.endswith("; 2 recorded prompts answered")
    with pytest.raises(AdmissionError, match="say nothing or repeat one piece") as caught:
        canary_prompts.judge_canaries(asked, said("", "ha" * 60))
    assert caught.value.check == "degenerate"


def test_prompts_state_the_arithmetic_of_the_report(tmp_path: Path) -> None:
    held_out = [example(f"q{n}", "r" * n, "eval") for n in (1, 2)]
    table = [{"id": one.id, "prompt": one.prompt[-1].text, "tuned_reply": one.reply} for one in held_out]
    parquet_io.write_rows(tmp_path / "rows.parquet", pa.Table.from_pylist(table).schema, table)

    def made_by(base: dict[str, Any]) -> list[tuple[str, int]]:
        found = training_facts.recorded_canaries(
            facts(example("q", "r"), *held_out), Artifact(tmp_path, {"base": base})
        )
        return [(one["dtype"], one["numerics"]) for one in found]

    assert made_by({"dtype": "bfloat16", "numerics": 3}) == [("bfloat16", 3)] * 2
    assert made_by({"dtype": "bfloat16"}) == [("bfloat16", 1)] * 2, "a Report of before"


def test_numerics_are_recorded_and_a_mismatch_is_not_checked(
    release: Path,
    monkeypatch: pytest.MonkeyPatch,  # noqa: F811
) -> None:
    """Adapter, Report, Release and canaries state them; canaries of other numerics are not compared."""
    made = open_artifact(release, "release").manifest
    bases = [open_artifact(release.parent / name).manifest["base"] for name in ("adapter", "adapter-report")]
    for base in (*bases, made["base"]):
        assert base["numerics"] == numerics(base["dtype"])
    assert made["canaries"] and all(one["numerics"] == numerics(one["dtype"]) for one in made["canaries"])
    assert canary_prompts.canaries_of(made, "a").not_checked == ""
    monkeypatch.setitem(NUMERICS, made["base"]["dtype"], 9)
    assert f"made by numerics {made['base']['numerics']}," in canary_prompts.canaries_of(made, "a").not_checked
