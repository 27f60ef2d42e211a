"""A run goes on only by the arithmetic that began it: of fp32 every checkpoint does, of 16 bits those of before are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from killed_tuning import SETTINGS, WEIGHTS, killed, tune
from sartor.cli import main
from sartor.core.artifacts import manifest_id
from sartor.core.errors import ConfigError
from sartor.core.filesystem import file_digest
from sartor.core.numerics import NUMERICS
from sartor.models import base
from sartor.tune.checkpoint import folder_of, newest

DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
CHANGE = "the low-rank product is added before the frozen product is rounded; B is scaled"


@pytest.fixture
def recipe(tune_recipe: dict[str, Any]) -> dict[str, Any]:
    return {**tune_recipe, **SETTINGS, "budget": {"updates": 6}}


@pytest.fixture
def compute_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def use(dtype: str) -> None:
        monkeypatch.setattr(base, "best_dtype", lambda device: getattr(torch, dtype))

    return use


def state(folder: Path, numerics: int | None) -> Path:
    """Have the newest checkpoint say that it was begun by this arithmetic; None: as versions before, which said nothing."""
    found = newest(folder).checkpoint
    assert found is not None
    manifest = {key: value for key, value in found.manifest.items() if key not in ("id", "numerics")}
    manifest |= {} if numerics is None else {"numerics": numerics}
    file = found.path / "checkpoint.json"
    file.write_text(json.dumps({**manifest, "id": manifest_id(manifest)}))
    return found.path


@DTYPES
def test_checkpoint_states_numerics_and_resumes_bit_identical(
    dtype: str, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compute_in: Any
) -> None:
    """In fp32 and in bf16 the manifest has dtype and numerics."""
    compute_in(dtype)
    tune(recipe, tmp_path / "whole")
    killed(monkeypatch, recipe, tmp_path / "a", update=4)
    found = newest(folder_of(tmp_path / "a")).checkpoint
    assert found is not None and found.manifest["numerics"] == NUMERICS.get(dtype, 1)
    assert found.manifest["environment"]["dtype"] == dtype
    assert tune(recipe, tmp_path / "a", resume=True).as_json()["resumed_at"] == [3]
    assert file_digest(tmp_path / "a" / WEIGHTS) == file_digest(tmp_path / "whole" / WEIGHTS)


def test_a_checkpoint_of_before_in_fp32_goes_on_to_the_same_bits(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compute_in: Any
) -> None:
    compute_in("float32")
    tune(recipe, tmp_path / "whole")
    killed(monkeypatch, recipe, tmp_path / "a", update=4)
    state(folder_of(tmp_path / "a"), None)
    assert tune(recipe, tmp_path / "a", resume=True).as_json()["resumed_at"] == [3]
    assert file_digest(tmp_path / "a" / WEIGHTS) == file_digest(tmp_path / "whole" / WEIGHTS)


@pytest.mark.parametrize(
    ("numerics", "said"),
    [
        (None, f"numerics 1, and this version computes bfloat16 by numerics 3: {CHANGE}"),
        (4, "numerics 4, of a newer Sartor"),
    ],
)
def test_a_checkpoint_of_another_arithmetic_is_refused_by_name(
    numerics: int | None,
    said: str,
    recipe: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    compute_in: Any,
) -> None:
    compute_in("bfloat16")
    out = tmp_path / "a"
    killed(monkeypatch, recipe, out, update=4)
    path = state(folder_of(out), numerics)
    for dtype in ("bfloat16", "float32"):  # elsewhere it would end at other bits, too
        compute_in(dtype)
        with pytest.raises(ConfigError) as refused:
            tune(recipe, out, resume=True)
        assert refused.value.problem.startswith(f"the checkpoint {path} was begun by {said}")
        assert f"--replace, or rm -r {folder_of(out)}" in refused.value.remedy
    assert newest(folder_of(out)).checkpoint, "a refusal leaves the checkpoint as it is"
    compute_in("bfloat16")
    with pytest.raises(ConfigError, match="another run: recipe seed"):
        tune({**recipe, "seed": 3}, out, resume=True)
    assert tune(recipe, out, replace=True).as_json()["resumed_at"] == []


def test_resume_command_refuses_other_numerics_with_exit_2(
    recipe: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    compute_in: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A bf16 checkpoint that states no numerics is a ConfigError in the JSON output."""
    compute_in("bfloat16")
    killed(monkeypatch, recipe, tmp_path / "a", update=4)
    state(folder_of(tmp_path / "a"), None)
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    with pytest.raises(SystemExit) as ended:
        main(["tune", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "a"), "--resume", "--json"])
    error = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert (ended.value.code, error["kind"]) == (2, "ConfigError") and "begun by numerics 1" in error["problem"]


def test_a_finished_adapter_of_before_is_returned_as_it_is(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compute_in: Any
) -> None:
    compute_in("bfloat16")
    with monkeypatch.context() as patch:
        patch.delitem(NUMERICS, "bfloat16")
        made = tune(recipe, tmp_path / "a")
    assert made.adapter.manifest["base"]["numerics"] == 1
    notices: list[str] = []
    assert tune(recipe, tmp_path / "a", resume=True, notice=notices.append).adapter.id == made.adapter.id
    assert "is finished" in notices[-1]
    assert tune(recipe, tmp_path / "b").adapter.manifest["base"]["numerics"] == 3


def test_refused_checkpoint_names_the_version_that_began_it(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compute_in: Any
) -> None:
    """The remedy names it if another version of Sartor runs now."""
    compute_in("bfloat16")
    killed(monkeypatch, recipe, tmp_path / "a", update=3)
    state(folder_of(tmp_path / "a"), 1)
    with monkeypatch.context() as patch, pytest.raises(ConfigError) as refused:
        patch.setattr("sartor.tune.checkpoint.importlib.metadata.version", lambda name: "99.0")
        tune(recipe, tmp_path / "a", resume=True)
    assert "the Sartor that began it (0." in refused.value.remedy
