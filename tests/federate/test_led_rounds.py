"""The coordinator's and the client's side as their commands run them, in one process, without Flower."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federating import COORDINATOR
from test_lora_rounds import recipe

import sartor
from sartor.core.artifacts import open_artifact
from sartor.core.errors import BudgetError, ConfigError, MissingError, RoundError, SartorError
from sartor.federate.flower import waiting
from sartor.federate.flower.client import ClientOptions, enrolled, round_client, task_of
from sartor.federate.flower.coordinator import CoordinatorOptions, coordinate
from sartor.federate.flower.lead import Lead, lead_rounds
from sartor.federate.rounds.journal import Journal
from sartor.federate.rounds.transport import InProcess
from sartor.federate.tuning.recipe import load
from sartor.federate.tuning.simulation import simulate

WARDS = ("ward-a", "ward-b", "ward-c")


@pytest.fixture
def asked(tiny_base: Path, dataset: Path, fp32: None) -> dict[str, Any]:
    return recipe(tiny_base, dataset, rules={"most_examples": 100})


@dataclass
class Federation:
    """Keys, a roster and clients; the coordinator's command in a thread, and in this one what SuperLink would run."""

    folder: Path
    asked: dict[str, Any]
    datasets: Mapping[str, Path]
    said: list[str] = field(default_factory=list)
    wrong: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.folder / "roster").mkdir(parents=True)
        for name in (COORDINATOR, *self.datasets):
            made = sartor.federate_keygen(self.folder / "keys" / name, name)
            Path(made["public"]).rename(self.folder / "roster" / f"{name}.pub")

    def options(self, **more: Any) -> CoordinatorOptions:
        return CoordinatorOptions(str(self.folder / "keys" / COORDINATOR), str(self.folder / "roster"), **more)

    def client(self, name: str, stack: ExitStack, **changes: Any) -> Any:
        options = ClientOptions(
            str(self.folder / "keys" / name), str(self.folder / "roster"), "", str(self.folder / f"{name}.sqlite")
        )
        own = load({**self.asked, **changes})
        member, journal = enrolled(own, name, options), stack.enter_context(Journal(Path(options.journal)))
        return round_client(member, journal, task_of(own, self.datasets[name]), own.seed)

    def command(self, out: Path, **more: Any) -> threading.Thread:
        def run() -> None:
            try:
                coordinate(self.asked, out, self.options(), notice=self.said.append, **more)
            except SartorError as error:
                self.wrong.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    def lead(self, out: Path, clients: Mapping[str, Any], rounds: int = 99) -> list[dict[str, Any]]:
        """What the ServerApp does; rounds: it is stopped after so many."""
        transport, found = InProcess(clients), []
        leading = lead_rounds(Lead.open(out.with_name(f"{out.name}.rounds") / "lead.yaml"), transport)
        for line in leading:
            found.append(json.loads(line))
            if len(found) == rounds:
                leading.close()
                break
        return found


@pytest.fixture
def federation(tmp_path: Path, asked: dict[str, Any], dataset: Path, monkeypatch: pytest.MonkeyPatch) -> Federation:
    monkeypatch.setattr(waiting, "_POLL_S", 0.05)
    return Federation(tmp_path / "federation", asked, dict.fromkeys(WARDS, dataset))


def wait_for(what: Callable[[], object], thread: threading.Thread) -> None:
    while not what():
        assert thread.is_alive(), "the command ended before"
        thread.join(0.02)


def finished(federation: Federation, out: Path, **changes: Any) -> dict[str, Any]:
    with ExitStack() as stack:
        thread = federation.command(out)
        wait_for(lambda: any("flwr run" in line for line in federation.said), thread)
        federation.lead(out, {name: federation.client(name, stack, **changes) for name in federation.datasets})
        thread.join(60)
    assert not federation.wrong, federation.wrong
    return open_artifact(out).manifest


def test_the_adapter_is_that_of_a_simulation_to_the_bit(federation: Federation, tmp_path: Path, dataset: Path) -> None:
    out = tmp_path / "led"
    run = finished(federation, out)["run"]
    simulated = simulate(federation.asked, tmp_path / "simulated", clients=[dataset] * 3).as_json()
    led, alone = ((folder / "adapter_model.safetensors").read_bytes() for folder in (out, tmp_path / "simulated"))
    assert led == alone
    assert (run["rounds"], run["clients"], run["federated"]["abandoned"]) == (2, 3, 0)
    assert run["metrics"]["eval_loss"] == simulated["metrics"]["eval_loss"]
    assert run["quantisation_error"] is None and run["loss"] == {"first": None, "last": None, "eval": None}
    assert run["federated"]["examples"] is None, "what no coordinator sees is not stated"
    # of the ring's rounding, which a simulation takes out of its figure
    assert simulated["exactness_error"] < run["exactness_error"] <= 1e-4
    # beside the update go a canary's responses, and an adapter as small as this one has few numbers
    assert simulated["uploaded_bytes"] < run["uploaded_bytes"] < 1.4 * simulated["uploaded_bytes"]
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2] and lines[0]["update_norm"] > 0
