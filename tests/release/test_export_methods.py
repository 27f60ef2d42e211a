"""Releases of methods that no runtime adds to a base: exported merged, as GGUF of the merged model, and for peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import releases
import sartor
from method_rows import ROWS, logits, placed, trained
from sartor.core import config
from sartor.core.errors import ModelError
from sartor.models import adapters
from sartor.models.base import open_base
from sartor.release.export import parity
from sartor.tune.recipe import Recipe

# the rest takes the same ways, and seconds each
KINDS = [
    "oft",
    "full",
    *(pytest.param(kind, marks=pytest.mark.circle) for kind in ("dora", "miss", "ia3", "pissa", "rslora")),
]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short replies, and no llama.cpp: what is compared is the same."""
    monkeypatch.setattr(parity, "REPLY_TOKENS", 4)
    monkeypatch.setattr(parity, "LLAMA_CPP", "no_such_runtime")


def released(folder: Path, base: Path, kind: str) -> Path:
    """A signed Release of an Adapter of the method."""
    method = config.load(Recipe, {"base": "x", "data": "y", "method": ROWS[kind].options}).method
    model = trained(placed(method, open_base(str(base), bits=32).model.requires_grad_(False)))
    release = releases.signed(folder, base, files=lambda part: adapters.write_adapter(model, part, str(base)))
    return release.path


@pytest.mark.parametrize("kind", KINDS)
def test_release_of_each_method_is_exported_merged(kind: str, tmp_path: Path, tiny_base: Path) -> None:
    release = released(tmp_path, tiny_base, kind)
    options: dict[str, Any] = {"key": tmp_path / "keys"}
    sartor.export(release, tmp_path / "merged", to="merged", options=sartor.ExportOptions(**options))
    merged = open_base(str(tmp_path / "merged"), bits=32).model
    tuned = adapters.open_adapter(open_base(str(tiny_base), bits=32).model, release)
    assert (logits(merged) - logits(tuned)).abs().max() < 1e-4
    assert not torch.equal(logits(tuned), logits(open_base(str(tiny_base), bits=32).model))


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_has_the_merged_model_alone(kind: str, tmp_path: Path, tiny_base: Path) -> None:
    release = released(tmp_path, tiny_base, kind)
    options: dict[str, Any] = {"key": tmp_path / "keys", "allow_unmeasured": True}
    sartor.export(release, tmp_path / "gguf", to="gguf", options=sartor.ExportOptions(**options))
    adapter = ["switch-1.0-adapter.gguf"] if ROWS[kind].is_fast else []
    assert sorted(file.name for file in (tmp_path / "gguf").glob("*.gguf")) == [*adapter, "switch-1.0-f16.gguf"]
    if not ROWS[kind].is_fast:
        assert "the merged model" in (tmp_path / "gguf" / "README.md").read_text()
        with pytest.raises(ModelError, match=f"of method {kind}"):
            none = sartor.ExportOptions(["none"], **options)
            sartor.export(release, tmp_path / "none", to="gguf", options=none)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_the_release_of_each_method(kind: str, tmp_path: Path, tiny_base: Path) -> None:
    release = released(tmp_path, tiny_base, kind)
    options = sartor.ExportOptions(key=tmp_path / "keys")
    exported = sartor.export(release, tmp_path / "peft", to="peft", options=options).as_json()
    assert exported["parity"]["files"][adapters.WEIGHTS]["agreement"] == 1.0
    assert ("vllm" in (tmp_path / "peft" / "README.md").read_text()) == ROWS[kind].is_fast
