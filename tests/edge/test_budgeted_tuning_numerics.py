"""A device's tuning states its arithmetic, in checkpoints and receipts, and goes on by that alone."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import sartor
from edge_jobs import job
from sartor.core import signing
from sartor.core.artifacts import manifest_id
from sartor.core.errors import ConfigError
from sartor.core.numerics import NUMERICS
from sartor.edge.tuning.budgeted_tuning import SCHEMA, Receipt, verify_receipt
from sartor.edge.tuning.tuner_process import tune
from sartor.tune.checkpoint import newest
from sartor.tune.training_loop import TrainingRun

FEW: dict[str, Any] = {"updates": 4, "recipe": {"compute": {"recompute": True}}}


def cut(tiny_base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tune until the third update; returns the checkpoint's manifest."""
    whole = TrainingRun._check

    def dies(self: TrainingRun, *arguments: Any) -> None:
        if self.counters.updates == 2:
            raise KeyboardInterrupt
        whole(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainingRun, "_check", dies)
        tune(job(tiny_base, folder, **FEW))
    found = newest(folder / "out" / "checkpoints").checkpoint
    assert found is not None and found.update == 2
    return found.path / "checkpoint.json"


def test_checkpoint_without_numerics_counts_as_version_1(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It resumes; under another version of the numerics it is refused, and the remedy removes the checkpoints."""
    file = cut(tiny_base, tmp_path, monkeypatch)
    said = json.loads(file.read_text())
    assert (said["numerics"], said["environment"]) == (1, {"dtype": "float32"})
    before = {key: value for key, value in said.items() if key not in ("id", "numerics", "environment")}
    file.write_text(json.dumps({**before, "id": manifest_id(before)}))
    with monkeypatch.context() as patch:
        patch.setitem(NUMERICS, "", 2)  # what states no dtype, either
        with pytest.raises(ConfigError, match="was begun by numerics 1, and this version") as refused:
            tune(job(tiny_base, tmp_path, **FEW))
        assert f"rm -r {tmp_path / 'out' / 'checkpoints'}" in refused.value.remedy
    assert tune(job(tiny_base, tmp_path, **FEW))["resumed_at"] == [2]


def test_a_receipt_states_it_and_one_of_before_is_read(tmp_path: Path) -> None:
    sartor.keygen(tmp_path / "keys", purposes=("receipt",))
    key = signing.open_private(tmp_path / "keys")
    fields = (SCHEMA, {"name": "tiny"}, {}, {}, {}, [], [], {}, "paused", "a signal")
    receipt = Receipt(*fields, 1)  # type: ignore[arg-type]
    receipt.write(tmp_path, key)
    assert json.loads((tmp_path / "receipt.json").read_text())["said"]["numerics"] == 1
    trusted = [key.public_key()]
    assert verify_receipt(tmp_path, trusted) == receipt
    old = {name: value for name, value in asdict(receipt).items() if name != "numerics"}
    document = json.dumps(old, sort_keys=True, separators=(",", ":")).encode()
    (tmp_path / "receipt.json").write_text(
        json.dumps({"said": old, "signature": signing.signature_of(document, key, "receipt")})
    )
    assert verify_receipt(tmp_path, trusted) == receipt
