"""The circle tier: examples/edge/farm, from its rows to the third version on the box, by its one command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import tiny

FARM = Path(__file__).parent.parent / "examples" / "edge" / "farm"


def decided_base(path: Path) -> Path:
    """The tiny base with embeddings wide enough for a sure answer, and an end of turn that is no padding: it learns the task."""
    tiny.model(initializer_range=0.3, pad_token_id=0).save_pretrained(str(path))
    tiny.tokenizer().save_pretrained(str(path))
    (path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# tiny\n")
    return path


def run(folder: Path, commands: Mapping[str, str], *options: str) -> dict[str, dict[str, Any]]:
    """Step -> what was said; the exit code as `exit`."""
    environment = {**os.environ, **commands, "SARTOR_HOME": str(folder / "home")}
    command = ["bash", str(FARM / "up.sh"), *options, "--quick", "--base", str(decided_base(folder / "base")), "farm"]
    command += ["--optimizer.learning_rate", "1e-2"]  # which a tiny base wants
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    steps = [json.loads(line) for line in done.stdout.splitlines()]
    return {step["step"]: {**step["said"], "exit": step["exit"]} for step in steps}


def written(script: Path, out: Path, *options: str) -> list[dict[str, str]]:
    subprocess.run([sys.executable, str(script), str(out), *options], check=True)
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_swapped_probe_changes_only_dry_and_soaked_rows(tmp_path: Path) -> None:
    """The script writes 96 distinct questions with and without --swapped."""
    good, swapped = (written(FARM / "rows.py", tmp_path / "rows.jsonl", *options) for options in ([], ["--swapped"]))
    assert len(good) == len({row["question"] for row in good}) == 96
    differ = [one["question"].split()[1].rstrip(",") for one, two in zip(good, swapped, strict=True) if one != two]
    assert set(differ) == {"dry", "soaked"}


def test_what_the_owner_wrote_is_in_no_row_for_everybody(tmp_path: Path) -> None:
    script = FARM.parent / "health" / "rows.py"
    everybody, owner = (written(script, tmp_path / "rows.jsonl", *options) for options in ([], ["--owner"]))
    assert len(everybody) > 100 and len(owner) > 30
    assert not {row["question"] for row in everybody} & {row["question"] for row in owner}


@pytest.mark.circle  # as exports, which a box runs without torch; Releases go the same way in docs/edge-publish.md
def test_box_rejects_regressed_version_and_takes_the_next(tmp_path: Path, commands: dict[str, str]) -> None:
    """1.1 fails on the box and its ring is halted; 1.2 passes its trial and its ring is widened."""
    pytest.importorskip("xllamacpp", reason="pip install 'sartor[llamacpp]'")
    said = run(tmp_path, commands, "--gguf")
    assert said["first version, by stick"]["version"] == "1.0" and said["first version, by stick"]["prompts"] > 4
    assert '"open"' in said["ask"]["reply"]
    assert "expired" in said["an old stick is refused"]["error"]["problem"]
    failed = said["1.1 fails here"]["error"]["problem"]
    assert failed.count("json: valve") == 3 and "1.0 stays current" in failed
    [box] = said["what is on the box"]["releases"]
    assert box["version"] == "1.0" and set(box["refused"]) == {"1.1"}
    assert said["halt the ring"]["done"] == [{"name": "farm", "version": "1.1", "did": "halt"}]
    assert said["1.1 is gone"]["changed"] is False
    assert (said["1.2"]["version"], said["1.2"]["trial"]) == ("1.2", {"left": 3, "of": 3})
    assert said["1.2"]["notes"], "the server broke off, and nobody noticed"
    assert said["it answers, and stays"]["runtime"] == "llama.cpp"
    assert said["it is reported"]["reported"] == [{"version": "1.2", "outcome": "pass", "reason": ""}]
    assert said["widen the ring"]["done"] == [{"name": "farm", "version": "1.2", "did": "widen", "percent": 50}]
    [box] = said["what is on the box at last"]["releases"]
    assert (box["version"], box["previous"], box["trial"]) == ("1.2", "1.0", None)
    assert said["every byte"]["damaged"] == []
