"""Clients that are edge devices: the same update out of a store and a limited process, and a round that does not fit declined."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

import sartor
from sartor.core.artifacts import open_artifact
from sartor.core.errors import BudgetError, ConfigError
from sartor.edge.store.version_pointers import installed, states
from sartor.edge.tuning import memory_plan
from sartor.edge.tuning.budgeted_tuning import verify_receipt
from sartor.edge.tuning.memory_plan import MemoryBaseline
from sartor.federate.recipe import FederateRecipe, load
from sartor.federate.rounds.round_manifest import LocalUpdate, Manifest, UpdateRules
from sartor.federate.tuning.edge_client import DeviceFile, EdgeTask, devices_of
from sartor.federate.tuning.lora_task import LoraTask, Losses
from sartor.federate.tuning.simulated_clients import Clients, open_clients
from sartor.federate.tuning.simulated_rounds import InspectedRounds, Rounds, SecureRounds, SimulationSetup
from sartor.models.lora_tensors import A, B, Tensors, add_changes, norm
from tuning_rounds import manifest


@pytest.fixture
def key(tmp_path: Path) -> Path:
    sartor.keygen(tmp_path / "device-key", trust=True, purposes=("receipt",))
    return tmp_path / "device-key"


def opened(base: Path, dataset: Path, **changes: Any) -> tuple[FederateRecipe, Clients]:
    said = {
        "base": str(base),
        "data": {"path": str(dataset)},
        "method": {"rank": 8, "alpha": 16},
        "rounds": 3,
        "local": {"updates": 3},
        "optimizer": {"learning_rate": 1e-2, "batch_tokens": 128},
        **changes,
    }
    asked = load(said)
    return asked, open_clients(asked, [dataset], None)


def on_device(people: Clients, device: DeviceFile) -> EdgeTask:
    resident = people.resident
    return EdgeTask(device, resident.recipe, resident.digest, resident.ref, people.rows["client-0"])


@pytest.mark.parametrize(("mode", "number", "half"), [("freeze_a", 2, B), ("alternate", 2, A)])
def test_a_device_learns_what_a_client_of_this_process_does(
    mode: str, number: int, half: str, tiny_base: Path, dataset: Path, tmp_path: Path, key: Path, fp32: None
) -> None:
    asked, people = opened(tiny_base, dataset, mode=mode)
    shared = people.resident.current_factors()
    source = np.random.default_rng(0)
    shared = {
        name: value + (0.02 * source.standard_normal(value.shape)).astype(np.float32) for name, value in shared.items()
    }
    said = manifest(asked, people, shared, number)
    plain = LoraTask(people.resident, people.rows["client-0"])
    wanted = plain.update(said, shared)
    device = DeviceFile(str(dataset), str(tmp_path / "store"), str(key), memory_bytes=2_000_000_000, wall_s=600.0)
    task = on_device(people, device)
    found = task.update(said, shared)
    assert found.examples == wanted.examples and set(found.tensors) == {name for name in shared if name.endswith(half)}
    # Adam divides small gradients by their own size, and their rounding with them: 1.3e-5 on a Xeon with AVX-512
    assert norm(add_changes(found.tensors, wanted.tensors, -1.0)) <= 2e-5 * norm(wanted.tensors)
    assert task.losses[number] == pytest.approx(plain.losses[number], rel=1e-5)
    store = tmp_path / "store"
    assert [one.name for one in states(store)] == ["test.base", "test.shared"]
    base = installed(store, "test.base")
    assert base and base.version == people.resident.ref.digest and (base.path / "model.safetensors").is_file()
    receipt = task.receipts[number]
    assert receipt.outcome == "done" and receipt.base["digest"] == people.resident.ref.digest
    assert verify_receipt(next(device.work.glob("round-*"))) == receipt
    assert not list(Path("/dev/shm").glob(f"sartor-*/{device.work.name}*")), "its rows as tokens are gone"
    again = task.update(said, shared)
    assert all(np.array_equal(again.tensors[name], value) for name, value in found.tensors.items())


def test_a_round_that_does_not_fit_is_declined_before_it_begins(
    tiny_base: Path, dataset: Path, tmp_path: Path, key: Path, fp32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, people = opened(tiny_base, dataset, local={"updates": 500})
    shared = people.resident.current_factors()
    said = manifest(asked, people, shared)
    small = DeviceFile(str(dataset), str(tmp_path / "small"), str(key), memory_bytes=80_000_000)
    with pytest.raises(BudgetError, match=r"declines the round: no way to tune .* fits in 80 MB") as refused:
        on_device(people, small).update(said, shared)
    assert "(recompute)" in refused.value.remedy, "layers and zeroth, which need less, are another update"
    monkeypatch.setattr(memory_plan, "floor", lambda: MemoryBaseline(1_000_000, True))
    slow = DeviceFile(str(dataset), str(tmp_path / "slow"), str(key), wall_s=60.0)
    task = on_device(people, slow)
    slow.work.mkdir()
    (slow.work / "pace.json").write_text(json.dumps({"start_s": 4.0, "tokens_per_s": 1_000.0}))
    with pytest.raises(
        BudgetError, match=r"tokens would take about \d+ s, a quarter to spare, and it has 60 s"
    ) as refused:
        task.update(said, shared)
    assert "wall_s of" in refused.value.remedy and not list(slow.work.glob("round-*")), "nothing was begun"


def test_a_pace_that_is_not_known_is_measured_first(
    tiny_base: Path, dataset: Path, tmp_path: Path, key: Path, fp32: None
) -> None:
    asked, people = opened(tiny_base, dataset, local={"updates": 100_000})
    shared = people.resident.current_factors()
    device = DeviceFile(str(dataset), str(tmp_path / "store"), str(key), wall_s=120.0)
    with pytest.raises(BudgetError, match="would take about"):
        on_device(people, device).update(manifest(asked, people, shared), shared)
    pace = json.loads((device.work / "pace.json").read_text())
    assert pace["start_s"] > 0 and pace["tokens_per_s"] > 0


@dataclass
class Still:
    """A client without a base; fits: whether the round fits its budget."""

    fits: bool = True
    losses: dict[int, Losses] = field(default_factory=dict)

    def update(self, manifest: Manifest, shared: Tensors) -> LocalUpdate:
        if not self.fits:
            raise BudgetError("this device declines the round: it is small", "a larger one")
        return LocalUpdate({name: np.full_like(value, 0.01) for name, value in shared.items() if name.endswith(B)}, 5)


@pytest.mark.parametrize("robust", [None, {"norm_bound": {}}])
def test_a_round_goes_on_without_who_declines_while_enough_stay(robust: Any, tmp_path: Path) -> None:
    source = np.random.default_rng(0)
    start = {f"x.lora_{half}.weight": source.standard_normal((4, 4)).astype(np.float32) for half in "AB"}
    resident: Any = SimpleNamespace(ref=SimpleNamespace(digest="b" * 64), digest="r" * 64)

    def rounds(count: int) -> Rounds:
        tasks = {f"client-{place}": Still(place != 1) for place in range(count)}
        asked = load({"base": "starter", "rounds": 1, **({"robust": robust} if robust else {})})
        (tmp_path / str(count)).mkdir()
        setting = SimulationSetup(asked, UpdateRules(), resident, tasks, start, tmp_path / str(count))
        return InspectedRounds(setting, asked.robust) if asked.robust else SecureRounds(setting, None)

    with closing(rounds(4)) as four:
        four.step()
        line = four.lines[0]
        assert (
            line["clients"] == 3
            and line["verdicts"][0] == "client-1 declined: this device declines the round: it is small"
        )
        assert np.allclose(four.shared["x.lora_B.weight"], start["x.lora_B.weight"] + 0.01, atol=1e-5)
    if robust:
        return
    with (
        closing(rounds(3)) as three,
        pytest.raises(BudgetError, match=r"round 1 was given up: .*client-1 declined") as ended,
    ):
        three.step()
    assert ended.value.exit_code == 4 and ended.value.remedy == "a larger one"


def written(folder: Path, name: str, dataset: Path, key: Path, **limits: Any) -> Path:
    file = folder / f"{name}.yaml"
    file.write_text(
        yaml.safe_dump({"data": str(dataset), "store": str(folder / f"{name}-store"), "key": str(key), **limits})
    )
    return file


@pytest.mark.services
def test_a_simulation_goes_on_without_the_device_that_declines(
    tiny_base: Path, tmp_path: Path, key: Path, fp32: None
) -> None:
    datasets = []
    for place in range(4):
        file = tmp_path / f"rows-{place}.jsonl"
        rows = [{"question": f"switch {place} {n} on", "answer": f"on:{n}"} for n in range(8)]
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        source = {"path": str(file), "licence": "CC-BY-4.0"}
        sartor.curate({"sources": [source], "split": {"eval_fraction": 0.25}}, tmp_path / f"data-{place}")
        datasets.append(tmp_path / f"data-{place}")
    asked = {
        "base": str(tiny_base),
        "data": {"attack_rows": 0},
        "method": {"rank": 4, "alpha": 8},
        "rounds": 1,
        "local": {"updates": 1},
        "optimizer": {"learning_rate": 1e-2, "batch_tokens": 64},
    }
    limits: list[dict[str, Any]] = [{}, {}, {"memory_bytes": 80_000_000}, {}]
    files = [written(tmp_path, f"d{place}", datasets[place], key, **limits[place]) for place in range(4)]
    made = sartor.federate_simulate(asked, tmp_path / "adapter", clients=files)
    line = json.loads((made.adapter.path / "log.jsonl").read_text())
    assert line["clients"] == 3 and "client-2 declined: this device declines the round" in line["verdicts"][0]
    assert line["exactness_error"] <= 1e-6 and line["quantisation_error"] <= 1e-3
    assert made.as_json()["upload_bytes_per_parameter"] > 4, "of those who sent something"
    assert open_artifact(tmp_path / "adapter").manifest["run"]["federated"]["examples"]["client-2"]
    with pytest.raises(BudgetError, match=r"round 1 was given up: .*client-2 declined"):
        sartor.federate_simulate(asked, tmp_path / "fewer", clients=files[:3])


def test_device_files_that_cannot_be_are_refused(tmp_path: Path) -> None:
    one, same = (written(tmp_path, name, tmp_path / "data", tmp_path) for name in ("one", "same"))
    with pytest.raises(ConfigError, match="two devices have one Dataset"):
        devices_of([one, same])
    with pytest.raises(ConfigError, match="1 of 2 clients are device files"):
        devices_of([one, tmp_path / "data"])
    assert devices_of([tmp_path / "data"]) == {}
