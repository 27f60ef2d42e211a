"""Frozen activations and features that another arithmetic made are computed anew, and the log says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors
import torch

from sartor.core.home import folder
from sartor.core.numerics import NUMERICS
from sartor.models.tensor_files import TensorCache
from tiny_families import fast_path, rows, tuned

DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def counts(dtype: str, notices: list[str] | None = None) -> tuple[int, int]:
    """(packs that were computed, packs that were read) of one look at the same rows."""
    said = [] if notices is None else notices
    path = fast_path(
        tuned("llama", getattr(torch, dtype), top=1), rows(20, 30), reuse_bytes=1 << 30, notice=said.append
    )
    path.losses(rows(20, 30))
    assert path.frozen is not None
    return path.frozen.computed, path.frozen.reused


def stated() -> list[str]:
    """`numerics` of each stored file."""
    found = []
    for file in sorted(folder("activations").glob("*/*.safetensors")):
        with safetensors.safe_open(str(file), "pt") as opened:
            found.append(opened.metadata()["numerics"])
    return sorted(found)


@DTYPES
def test_stored_activations_state_numerics_and_are_reused(dtype: str) -> None:
    assert [counts(dtype), counts(dtype)] == [(1, 0), (0, 1)]
    assert stated() == [str(NUMERICS.get(dtype, 1))]


@pytest.mark.parametrize("before", [None, NUMERICS["bfloat16"] + 1], ids=["older", "newer"])
def test_activations_of_other_numerics_are_recomputed(before: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log says so once, and the files of both versions stay."""
    with monkeypatch.context() as patch:
        patch.delitem(NUMERICS, "bfloat16") if before is None else patch.setitem(NUMERICS, "bfloat16", before)
        assert counts("bfloat16") == (1, 0)
    notices: list[str] = []
    assert counts("bfloat16", notices) == (1, 0)
    (line,) = [line for line in notices if "numerics" in line]
    assert line.startswith(f"stored activations are not used: made by numerics {before or 1}, ")
    assert line.endswith("; they are computed anew")
    assert stated() == sorted([str(before or 1), str(NUMERICS["bfloat16"])]), (
        "neither version takes the other one's file"
    )
    assert counts("bfloat16", notices) == (0, 1) and len([one for one in notices if "numerics" in one]) == 1


@DTYPES
def test_activations_of_before_are_found_in_fp32_alone(dtype: str) -> None:
    """Files of versions before have no mark, neither in their name nor inside."""
    counts(dtype)
    (file,) = folder("activations").glob("*/*.safetensors")
    with safetensors.safe_open(str(file), "pt") as opened:
        content, said = opened.get_tensor("hidden"), dict(opened.metadata())
    del said["numerics"]
    file.unlink()
    from safetensors.torch import save_file

    save_file({"hidden": content}, str(file.with_name(f"{file.stem.partition('-')[0]}.safetensors")), said)
    notices: list[str] = []
    assert counts(dtype, notices) == ((0, 1) if dtype == "float32" else (1, 0))
    assert bool([line for line in notices if "made by numerics 1" in line]) == (dtype == "bfloat16")


def test_a_file_whose_mark_is_not_that_of_its_name_is_not_read(tmp_path: Path) -> None:
    shelf = TensorCache(tmp_path, 1 << 20, dtype="bfloat16")
    shelf.write("name", torch.zeros(2, 3))
    (file,) = tmp_path.glob("*/*.safetensors")
    assert shelf.read("name") is not None
    content = file.read_bytes()
    stated = f'"numerics":"{NUMERICS["bfloat16"]}"'.encode()
    file.write_bytes(content.replace(stated, b'"numerics":"1"'))
    assert file.read_bytes() != content and shelf.read("name") is None


def test_features_of_towers_are_of_fp32_and_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = TensorCache(tmp_path / "features", 1 << 20)
    shelf.write("name", torch.zeros(2, 3, dtype=torch.float16))
    assert shelf.read("name") is not None
    notices: list[str] = []
    monkeypatch.setitem(NUMERICS, "float32", 2)
    later = TensorCache(tmp_path / "features", 1 << 20, notices.append)
    assert later.read("name") is None and later.read("other") is None and later.outdated == 1
    assert notices == [
        "stored features are not used: made by numerics 1, and this version computes float32 by numerics 2: "
        "the low-rank product is added before the frozen product is rounded; they are computed anew"
    ]
