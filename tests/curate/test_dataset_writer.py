"""Every verb that writes a Dataset writes the same bytes as when `golden/` was recorded (dataset_cases.py records it anew)."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pytest
from dataset_cases import CASES, GOLDEN, PYARROW, as_text, fixed_versions, record_of, without_parquet_bytes


def test_every_golden_file_has_a_case() -> None:
    assert {file.stem for file in GOLDEN.glob("*.json")} == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_dataset_is_as_recorded(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Manifest, rows, card and `digest`; under another pyarrow all but the bytes of Parquet files and what follows from them."""
    golden = json.loads((GOLDEN / f"{case}.json").read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda file: None)  # no power is cut here
    with fixed_versions():
        written = record_of(CASES[case]())
    assert as_text(without_parquet_bytes(written)) == as_text(without_parquet_bytes(golden))
    if pa.__version__ == PYARROW.read_text().strip():
        assert as_text(written) == as_text(golden)
