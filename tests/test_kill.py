"""kill -9 at any moment of curate, tune or release leaves either no artefact or a whole one, and the next run goes through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import sartor
from killing import check, moments, run_killed
from sample_data import write_jsonl
from sartor.evaluate.audit import probes


@pytest.mark.services
@pytest.mark.parametrize("moment_s", moments(0.5, 6))
def test_killed_curate(tmp_path: Path, moment_s: float, commands: dict[str, str]) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"question": f"q{n}", "answer": f"a{n}"} for n in range(4000)])
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"sources": [str(tmp_path / "rows.jsonl")]}))
    recipe, out = str(tmp_path / "r.yaml"), tmp_path / "d"
    run_killed(
        f"import sartor.curate.pipeline as p; print('READY', flush=True); p.curate({recipe!r}, {str(out)!r})",
        moment_s,
        commands,
    )
    check(out, lambda: sartor.curate(recipe, out, replace=True))


@pytest.mark.services
@pytest.mark.parametrize("moment_s", moments(1.2, 5))
def test_killed_tune(tmp_path: Path, tune_recipe: dict[str, Any], moment_s: float, commands: dict[str, str]) -> None:
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(tune_recipe))
    recipe, out = str(tmp_path / "t.yaml"), tmp_path / "a"
    code = f"import matplotlib.figure, sartor.tune.trainer as t; print('READY', flush=True); t.tune({recipe!r}, {str(out)!r}, show=False)"
    run_killed(code, moment_s, commands)
    check(out, lambda: sartor.tune(recipe, out, replace=True, show=False))


@pytest.mark.services
@pytest.mark.parametrize("moment_s", moments(0.12, 5))
def test_killed_release(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, moment_s: float, commands: dict[str, str]
) -> None:
    few = list(sartor.read_examples(sartor.open(tmp_path / "dataset")))[:4]
    monkeypatch.setattr(probes, "chitchat_rows", lambda: few)
    sartor.evaluate(adapter)
    sartor.keygen(tmp_path / "keys", trust=True)
    out = tmp_path / "x-1"
    options = f"name='x', version='1', key={str(tmp_path / 'keys')!r}, waivers=[r.Waiver(c, 'me', 'test') for c in ('gain', 'forgetting')]"
    run_killed(
        f"import sartor.release.release as r; print('READY', flush=True); r.release({str(adapter)!r}, {options})",
        moment_s,
        commands,
    )
    waivers = [sartor.Waiver(check, "me", "test") for check in ("gain", "forgetting")]
    check(
        out,
        lambda: sartor.release(adapter, name="x", version="1", key=tmp_path / "keys", waivers=waivers, replace=True),
    )
    assert sartor.verify(out).signer
