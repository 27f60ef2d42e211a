"""Whole: devices tune one adapter in rounds, it is attacked, evaluated, released, published, synced, and answers on one of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import sartor
from sartor.core.artifacts import open_artifact
from sartor.edge.store.version_pointers import installed, states
from sartor.federate.privacy.privacy_attacks import open_report

DEVICES = {"ann": ("kitchen", "hall"), "bob": ("attic", "porch"), "eve": ("cellar", "den")}


def device(folder: Path, name: str) -> Path:
    """A device file, with rows of its own."""
    rows = [
        {"question": f"{verb} {room} {n}", "answer": f"{n}:{room}"}
        for room in DEVICES[name]
        for n in range(4)
        for verb in "ab"
    ]
    file = folder / f"{name}.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    source = {"path": str(file), "licence": "CC-BY-4.0"}
    sartor.curate({"sources": [source], "split": {"eval_fraction": 0.25}}, folder / f"data-{name}")
    key = sartor.keygen(folder / f"key-{name}", trust=True, purposes=("receipt",))["private"]
    said = {
        "data": str(folder / f"data-{name}"),
        "store": str(folder / name),
        "key": key,
        "memory_bytes": 2_000_000_000,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(said))
    return folder / f"{name}.yaml"


@pytest.mark.services
def test_from_rounds_to_devices(tiny_base: Path, tmp_path: Path, fp32: None) -> None:
    asked = {
        "base": str(tiny_base),
        "data": {"attack_rows": 8},
        "method": {"rank": 4, "alpha": 8},
        "rounds": 1,
        "local": {"updates": 2},
        "optimizer": {"learning_rate": 1e-2, "batch_tokens": 128},
    }
    files = [device(tmp_path, name) for name in DEVICES]
    adapter = sartor.federate_simulate(asked, tmp_path / "adapter", clients=files).adapter
    sartor.evaluate(adapter.path, most_rows=2)
    sartor.keygen(tmp_path / "signer", trust=True)
    waivers = [sartor.Waiver(check, "A. Tester", "a tiny base") for check in ("gain", "forgetting")]
    made = sartor.release(adapter.path, name="rooms", version="1.0", key=tmp_path / "signer", waivers=waivers)
    assert made.as_json()["gate"]["privacy"] == "pass"
    sartor.edge_keygen(tmp_path / "update-keys")
    sartor.edge_publish(made.release.path, tmp_path / "repository", tmp_path / "update-keys")
    root = tmp_path / "repository/metadata/1.root.json"
    options = sartor.DeviceOptions(store=tmp_path / "eve", id="eve", root=root)
    sartor.edge_sync((tmp_path / "repository").as_uri(), "rooms", options, private=True)
    assert [one.name for one in states(tmp_path / "eve")] == ["rooms", "simulation.base", "simulation.shared"]
    found = installed(tmp_path / "eve", "rooms")
    assert found and open_report(found.path) == open_report(adapter.path), "what attacks found comes along"
    assert open_artifact(found.path).manifest["gate"]["privacy"]["outcome"] == "pass"
    said = sartor.edge_ask(tmp_path / "eve", "rooms", "a attic 1", sampling={"max_tokens": 4})
    assert said["version"] == "1.0" and isinstance(said["reply"], str)
