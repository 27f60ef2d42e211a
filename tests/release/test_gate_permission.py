"""Golden: what would help an Adapter whose sources or base forbid a use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sartor.core.artifacts import Artifact
from sartor.release.gate import licence_refusals

LEAVE_OUT = "leave out {name} and curate and tune again (sartor revoke DATASET --source {name})"
OF_BASE = "tune a base whose licence permits it"
PERMITTED = "--use non-commercial or research is permitted"


def adapter(base: str, *sources: dict[str, Any]) -> Artifact:
    said = [{"path": "a.jsonl", "kept": 2, **source} for source in sources]
    return Artifact(Path("adapter"), {"base": {"name": "tiny", "licence": base}, "sources": said, "parents": []})


NC = {"source": "/data", "licence": "CC-BY-NC-4.0"}


@pytest.mark.parametrize(
    ("made", "problems", "remedy"),
    [
        (adapter("MIT", {**NC, "licence": "MIT"}), [], ""),
        (
            adapter("MIT", NC),
            ["/data is CC-BY-NC-4.0, which forbids commercial use (2 rows)"],
            f"{PERMITTED}; {LEAVE_OUT.format(name='/data')}",
        ),
        (
            adapter("CC-BY-NC-4.0", {**NC, "licence": "MIT"}),
            ["base tiny is CC-BY-NC-4.0, which forbids commercial use"],
            f"{PERMITTED}; {OF_BASE}",
        ),
        (
            adapter("CC-BY-NC-4.0", NC),
            [
                "/data is CC-BY-NC-4.0, which forbids commercial use (2 rows)",
                "base tiny is CC-BY-NC-4.0, which forbids commercial use",
            ],
            f"{PERMITTED}; {OF_BASE}; {LEAVE_OUT.format(name='/data')}",
        ),
        (
            adapter("MIT", {**NC, "source": "base of facts"}),
            ["base of facts is CC-BY-NC-4.0, which forbids commercial use (2 rows)"],
            f"{PERMITTED}; {LEAVE_OUT.format(name='base of facts')}",
        ),
        (adapter("MIT", {**NC, "kept": 0}), [], ""),
    ],
)
def test_remedy_of_a_refused_use_is_golden(made: Artifact, problems: list[str], remedy: str) -> None:
    assert licence_refusals(made, "commercial") == (problems, remedy)
