"""Rounds and device tunings go on only by the arithmetic that began them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sartor.core.errors import ConfigError
from sartor.core.numerics import NUMERICS
from sartor.federate.tuning.simulation import check_same, simulate
from sartor.models import base
from tuning_rounds import recipe

SHARDS = {"count": 3, "alpha": 1.0, "by": ".", "seed": 1}


def killed(line: str) -> None:
    if line.startswith("round 1 "):
        raise KeyboardInterrupt


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_older_rounds_resume_in_fp32_and_are_refused_in_bf16(
    dtype: str, tiny_base: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds that state no numerics count as numerics 1; a refusal leaves them as they are."""
    monkeypatch.setattr(base, "best_dtype", lambda device: getattr(torch, dtype))
    asked, out = recipe(tiny_base, dataset), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        simulate(asked, out, shards=SHARDS, notice=killed)
    file = tmp_path / "out.rounds" / "fingerprint.json"
    said = json.loads(file.read_text())
    assert (said["dtype"], said["numerics"]) == (dtype, NUMERICS.get(dtype, 1))
    file.write_text(json.dumps({key: value for key, value in said.items() if key not in ("dtype", "numerics")}))
    if dtype == "bfloat16":
        with pytest.raises(
            ConfigError, match=r"the rounds in .*out\.rounds were begun by numerics 1, .* by numerics 3"
        ):
            simulate(asked, out, shards=SHARDS, resume=True)
        assert file.is_file(), "a refusal leaves the rounds as they are"
        file.write_text(json.dumps(said))
    notices: list[str] = []
    simulate(asked, out, shards=SHARDS, resume=True, notice=notices.append)
    assert any("going on after round 1" in line for line in notices) and out.is_dir()


def test_another_run_is_named_before_another_arithmetic(tmp_path: Path) -> None:
    def now(**changes: Any) -> dict[str, Any]:
        return {"recipe": {"rounds": 2}, "base": "b", **changes}

    check_same(tmp_path, now(), "torch.bfloat16")
    check_same(tmp_path, now(), "torch.bfloat16")
    with pytest.raises(ConfigError, match="of another run: recipe rounds"):
        check_same(tmp_path, now(recipe={"rounds": 3}), "torch.bfloat16")
    check_same(tmp_path, now(), "torch.float32")  # another machine: as for every checkpoint
