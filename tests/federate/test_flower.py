"""Rounds over a real SuperLink with TLS and node keys and three real SuperNodes, all of which are killed on the way."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

import sartor
from federating import COORDINATOR, LENIENT, identity
from flower_fleet import APART, NOBODY, ROUNDS, WARDS, Fleet, coordinator_files, node_key, path_for_another, until
from flower_trainer import certain
from round_parties import Pull
from sample_data import ROWS, write_jsonl
from sartor.core.artifacts import open_artifact
from sartor.federate.flower.driver_options import RoundDriverOptions, drive_rounds
from sartor.federate.flower.local_rpc import ask
from sartor.federate.rounds.round_client import Participant, RoundClient
from sartor.federate.rounds.round_journal import RoundJournal
from sartor.federate.rounds.transport import InProcess
from sartor.federate.secure.identities import PinnedKeys

pytestmark = [
    pytest.mark.services,
    pytest.mark.skipif(importlib.util.find_spec("flwr") is None, reason="pip install 'sartor[federated]'"),
]
# of a machine with two cores that does nothing else a stage takes ten seconds, most of which Flower's processes import
SLOW_S = 600.0


@dataclass
class Story:
    """What happened, once for all tests. took_s: by event."""

    fleet: Fleet
    took_s: dict[str, float] = field(default_factory=dict)
    refused: str = ""
    turned_away: int = 0
    asked: dict[str, bytes] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)

    def answers(self, name: str) -> int:
        return len(re.findall(r"^answered", self.fleet.said(f"trainer-{name}"), re.MULTILINE))

    def wait(self, answers: int, why: str) -> None:
        since = time.monotonic()
        until(lambda: all(self.answers(name) >= answers for name in WARDS), SLOW_S, why)
        self.took_s[why] = round(time.monotonic() - since, 1)

    @property
    def record(self) -> list[dict]:
        path = self.fleet.folder / "coordinator.rounds.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, commands: dict[str, str]) -> Iterator[Story]:
    fleet = Fleet(tmp_path_factory.mktemp("fleet"), commands)
    story = Story(fleet)
    try:
        tell(story)
        tell_of_commands(story, tiny_base)
        print(json.dumps(story.took_s), json.dumps(story.record))
        yield story
    finally:
        fleet.close()


def tell(story: Story) -> None:
    fleet, first = story.fleet, WARDS[0]
    for name in (*WARDS, "stranger"):
        node_key(fleet.folder / f"{name}.node")
    for name in WARDS:
        fleet.trainer(name)
    fleet.link()
    registered = [
        fleet.flwr("supernode", "register", f"{fleet.folder}/{name}.pub", "loop", "--name", name) for name in WARDS
    ]
    assert [one.wait(SLOW_S) for one in registered] == [0, 0, 0], fleet.said("flwr")
    for name in WARDS:
        fleet.node(name)
    fleet.node("stranger", key="stranger")
    fleet.run()
    story.wait(1, "first exchange of the first round")

    # a SuperNode, then the SuperLink with the ServerApp, in the middle of the first round
    fleet.kill(f"node-{first}")
    fleet.kill("link")  # its children notice by themselves, and the ServerApp has the journal until then
    fleet.link()
    fleet.run()
    comes_back(story, first)
    # whose first answer had arrived before the kill is not asked for it again, so of each there are two at least
    story.wait(2, "second exchange, with the SuperNode that came back")

    # the ServerApp alone
    fleet.kill_server_app()
    fleet.run()
    since = time.monotonic()
    until(lambda: len(story.record) == ROUNDS, 2 * SLOW_S, fleet.said("link")[-3000:])
    story.took_s["the rest, and the second round"] = round(time.monotonic() - since, 1)
    story.refused = fleet.said("node-stranger")
    story.asked = {
        f"{name} {said.decode()}": ask(fleet.socket(name), said, 60).content
        for name in WARDS
        for said in (b"", b"no message")
    }


def tell_of_commands(story: Story, base: Path) -> None:
    """Clients and a coordinator as their commands run them, over the SuperLink and the SuperNodes that stand."""
    fleet = story.fleet
    recipe = fleet.folder / "federate.yaml"
    recipe.write_text(json.dumps(federated(base)))
    fleet.enrol()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SARTOR_HOME", str(fleet.folder / "sartor-home"))
        for place, name in enumerate(WARDS):
            rows = write_jsonl(fleet.folder / f"{name}.jsonl", ROWS[: 40 - 10 * place])
            source = {"path": str(rows), "licence": "CC-BY-4.0"}
            sartor.curate({"sources": [source], "split": {"eval_fraction": 0.25}}, fleet.folder / "data" / name)
    since = time.monotonic()
    for name in WARDS:
        assert fleet.end(f"trainer-{name}") == 0
    for name in WARDS:
        fleet.client(name, recipe)
    for name in WARDS:
        until(lambda name=name: f"{name} answers at" in fleet.said(f"client-{name}"), SLOW_S, f"client-{name}")
    story.took_s["clients open base and rows"] = round(time.monotonic() - since, 1)
    since = time.monotonic()
    fleet.coordinator(recipe)
    record = fleet.folder / "adapter.rounds" / "coordinator.rounds.jsonl"
    until(
        lambda: record.exists() and record.read_text().endswith("\n"),
        2 * SLOW_S,
        lambda: fleet.said("coordinator")[-3000:],
    )
    fleet.kill("coordinator")
    # what was killed may be the stand-in of a fork (tests/helpers/warm.py), which ends, and lets its lock go, a moment later
    with FileLock(fleet.folder / ".adapter.rounds.lock", timeout=SLOW_S):
        pass
    story.took_s["the first round of a coordinator's command"] = round(time.monotonic() - since, 1)
    since = time.monotonic()
    fleet.coordinator(recipe, "--resume")
    until(
        lambda: fleet.running["coordinator"].poll() is not None, 2 * SLOW_S, lambda: fleet.said("coordinator")[-3000:]
    )
    story.took_s["the second, of the one that goes on"] = round(time.monotonic() - since, 1)
    story.left = {
        "coordinator": fleet.running["coordinator"].wait(),
        **{name: fleet.end(f"client-{name}") for name in WARDS},
    }


def federated(base: Path) -> dict:
    """A recipe of two rounds."""
    return {
        "base": str(base),
        "method": {"rank": 8, "alpha": 16},
        "rounds": ROUNDS,
        "local": {"updates": 2},
        "optimizer": {"learning_rate": 1e-2, "batch_tokens": 128},
        "rules": {"most_examples": 40},
    }


def comes_back(story: Story, name: str) -> None:
    """As a service that is restarted does: SuperLink turns it away until it has noticed that the first one is gone."""
    since = time.monotonic()
    while True:
        story.fleet.node(name)
        process = story.fleet.running[f"node-{name}"]
        logged = len(story.fleet.said(f"node-{name}"))
        until(
            lambda: process.poll() is not None or "SuperNode ID" in story.fleet.said(f"node-{name}")[logged:],
            SLOW_S,
            name,
        )
        if process.poll() is None:
            break
        story.turned_away += 1
        time.sleep(1.0)
        assert time.monotonic() - since < SLOW_S, story.fleet.said(f"node-{name}")
    story.took_s["until the killed SuperNode was let in"] = round(time.monotonic() - since, 1)


def test_rounds_are_finished_by_everyone(story: Story) -> None:
    assert [(one["number"], one["state"], tuple(one["active"])) for one in story.record] == [
        (number, "done", WARDS) for number in range(1, ROUNDS + 1)
    ]
    assert all(one["said_no"] == {} and one["refused"] == {} for one in story.record)


def test_a_new_run_goes_on_in_the_round_that_was_open(story: Story) -> None:
    with RoundJournal(story.fleet.folder / "coordinator.sqlite") as journal:
        assert [kept.number for kept in journal.rounds("triage")] == [2, 1]
    for name in WARDS:
        learnt = re.findall(r"learns round (\d)", story.fleet.said(f"trainer-{name}"))
        assert learnt == ["1", "2"], "what was learnt before the kill is used"


def test_the_killed_super_node_took_part_again(story: Story) -> None:
    assert story.answers(WARDS[0]) >= 5 * ROUNDS


def test_an_unregistered_node_key_is_refused(story: Story) -> None:
    assert re.search(r"2004|412|not registered|not allowed|unregistered", story.refused, re.IGNORECASE), story.refused
    assert "SuperNode ID" not in story.refused


def test_the_result_is_that_of_one_process_to_the_bit(
    story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(np.random, "default_rng", np.random.default_rng)
    certain()
    lead = RoundDriverOptions.open(coordinator_files(tmp_path))
    roster = PinnedKeys.open(tmp_path / "roster")
    clients = {
        name: RoundClient(
            Participant(identity(name), roster, COORDINATOR, LENIENT), RoundJournal(), {"pull": Pull(number)}
        )
        for number, name in enumerate(WARDS)
    }
    assert len(list(drive_rounds(lead, InProcess(clients)))) == ROUNDS
    found = [RoundJournal(folder / "coordinator.sqlite") for folder in (story.fleet.folder, tmp_path)]
    over_flower, here = (journal.load("shared triage") for journal in found)
    assert over_flower is not None and over_flower == here


def test_the_trainers_outlived_all_of_it(story: Story) -> None:
    for name in set(WARDS) - {APART}:
        assert story.asked[f"{name} "].decode() == name
        assert story.asked[f"{name} no message"] == b"ArtifactError"


def test_commands_make_the_adapter_of_a_simulation_to_the_bit(story: Story, tmp_path: Path, tiny_base: Path) -> None:
    folder = story.fleet.folder
    assert story.left == {"coordinator": 0, **dict.fromkeys(WARDS, 0)}, story.fleet.said("coordinator")[-3000:]
    made = json.loads(story.fleet.said("coordinator").splitlines()[-1])
    alone = sartor.federate_simulate(
        federated(tiny_base), tmp_path / "alone", clients=[folder / "data" / name for name in WARDS]
    )
    weights = "adapter_model.safetensors"
    assert (folder / "adapter" / weights).read_bytes() == (tmp_path / "alone" / weights).read_bytes()
    assert {"rounds", "clients", "uploaded_bytes", "exactness_error", "epsilon", "metrics"} <= set(made)
    assert (made["rounds"], made["clients"], made["epsilon"]) == (ROUNDS, len(WARDS), None)
    assert alone.as_json()["exactness_error"] < made["exactness_error"] <= 1e-4
    adapter = open_artifact(folder / "adapter").manifest
    assert adapter["run"]["federated"]["abandoned"] == 0
    assert [one["source"] for one in adapter["sources"]] == [f"client {name}" for name in WARDS]


def test_a_killed_coordinator_command_goes_on(story: Story) -> None:
    record = story.fleet.folder / "adapter.rounds" / "coordinator.rounds.jsonl"
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert [(one["number"], one["state"], tuple(one["active"])) for one in lines] == [
        (1, "done", WARDS),
        (2, "done", WARDS),
    ]
    said = story.fleet.said("coordinator")
    assert said.count("round 1 of 2 done") <= 1, "it is not said again by the one that goes on"
    assert all(f"round {number} of 2: exactness error" in said for number in (1, 2))
    for name in WARDS:
        client = json.loads(story.fleet.said(f"client-{name}").splitlines()[-1])
        # the last outcome is sent as the run ends, and not waited for: a client that is stopped then has not heard it
        assert client["rounds"] in (ROUNDS - 1, ROUNDS)
        assert client["clients"] == len(WARDS) and client["uploaded_bytes"] > 0


def test_a_client_app_may_run_apart_from_its_super_node(story: Story) -> None:
    begins, fleet = "Start `flwr-clientapp` process", story.fleet
    assert begins in fleet.said("superexec") and begins not in fleet.said(f"node-{APART}")
    assert all(begins in fleet.said(f"node-{name}") for name in WARDS if name != APART)
    assert story.answers(APART) >= 5 * ROUNDS


def test_a_client_app_of_another_user_reaches_the_socket_alone(story: Story) -> None:
    apart, folder = story.fleet.apart, story.fleet.folder
    if not apart.python:
        pytest.skip("needs root, and a Python that other users may start")
    # its trainer hears that user and nobody else, root included
    assert story.asked[f"{APART} "] == b"" and story.asked[f"{APART} no message"] == b""
    assert story.answers(APART) >= 5 * ROUNDS
    mode = stat.S_IMODE(os.stat(apart.place).st_mode)
    assert not mode & 0o022, "it cannot put its own socket there"
    for file in (
        "enrolled/ward-0002/sartor.key",
        "enrolled/ward-0002.sqlite",
        "data/ward-0002/manifest.json",
        f"{APART}.node",
    ):
        assert (folder / file).exists(), file
        code = f"open({str(folder / file)!r})"
        done = subprocess.run(
            [apart.python, "-c", code],
            env=path_for_another(),
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
        )
        assert "PermissionError" in done.stderr
    shutil.rmtree(apart.place / "home", ignore_errors=True)
