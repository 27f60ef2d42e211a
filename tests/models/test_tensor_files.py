"""Tensors that are written one after the other are read by safetensors as they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sartor.models.tensor_files import NAMES, write_tensors


def test_every_dtype_and_shape_is_read_as_it_was_written(tmp_path: Path) -> None:
    given = {f"t{n}": torch.arange(6).to(dtype).view(2, 3) for n, dtype in enumerate(NAMES)}
    given |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "turned": torch.arange(6.0).view(2, 3).T}
    write_tensors(given, tmp_path / "file", {"format": "pt"})
    found = load_file(tmp_path / "file")
    assert set(found) == set(given)
    assert all(found[name].dtype == part.dtype and torch.equal(found[name], part) for name, part in given.items())
    with safe_open(str(tmp_path / "file"), framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_a_dtype_that_the_format_has_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        write_tensors({"x": torch.zeros(1, dtype=torch.complex64)}, tmp_path / "file")
