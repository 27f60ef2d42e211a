"""Rounds over a real SuperLink with TLS and node keys and three real SuperNodes, all of which are killed on the way."""

from __future__ import annotations

import importlib.util
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from federating import COORDINATOR, LENIENT, identity
from flower_fleet import ROUNDS, WARDS, Fleet, coordinator_files, node_key, until
from flower_trainer import certain
from round_parties import Pull

from sartor.federate.flower.hatch import ask
from sartor.federate.flower.lead import Lead, lead_rounds
from sartor.federate.rounds.client import Member, RoundClient
from sartor.federate.rounds.journal import Journal
from sartor.federate.rounds.transport import InProcess
from sartor.federate.secure.identity import Roster

pytestmark = [
    pytest.mark.services,
    pytest.mark.alone,
    pytest.mark.skipif(importlib.util.find_spec("flwr") is None, reason="pip install 'sartor[federated]'"),
]
# of a machine with two cores that does nothing else a stage takes five seconds
SLOW_S = 240.0


@dataclass
class Story:
    """What happened, once for all tests. took_s: by event."""

    fleet: Fleet
    took_s: dict[str, float] = field(default_factory=dict)
    refused: str = ""
    turned_away: int = 0

    def answers(self, name: str) -> int:
        return len(re.findall(r"^answered", self.fleet.said(f"trainer-{name}"), re.MULTILINE))

    def wait(self, answers: int, why: str, of: tuple[str, ...] = WARDS) -> None:
        since = time.monotonic()
        until(lambda: all(self.answers(name) >= answers for name in of), SLOW_S, why)
        self.took_s[why] = round(time.monotonic() - since, 1)

    @property
    def record(self) -> list[dict]:
        path = self.fleet.folder / "coordinator.rounds.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    fleet = Fleet(tmp_path_factory.mktemp("fleet"))
    story = Story(fleet)
    try:
        tell(story)
        print(json.dumps(story.took_s), json.dumps(story.record))
        yield story
    finally:
        fleet.close()


def tell(story: Story) -> None:
    fleet, (first, *others) = story.fleet, WARDS
    for name in (*WARDS, "stranger"):
        node_key(fleet.folder / f"{name}.node")
    for name in WARDS:
        fleet.trainer(name)
    fleet.link()
    registered = [fleet.flwr("supernode", "register", f"{fleet.folder}/{name}.pub", "loop", "--name", name) for name in WARDS]
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
    story.wait(2, "second exchange, of those whose SuperNode lives", tuple(others))
    comes_back(story, first)
    story.wait(3, "third exchange, with the SuperNode that came back")

    # the ServerApp alone
    fleet.kill_server_app()
    fleet.run()
    since = time.monotonic()
    until(lambda: len(story.record) == ROUNDS, 2 * SLOW_S, fleet.said("link")[-3000:])
    story.took_s["the rest, and the second round"] = round(time.monotonic() - since, 1)
    story.refused = fleet.said("node-stranger")


def comes_back(story: Story, name: str) -> None:
    """As a service that is restarted does: SuperLink turns it away until it has noticed that the first one is gone."""
    since = time.monotonic()
    while True:
        story.fleet.node(name)
        process = story.fleet.running[f"node-{name}"]
        logged = len(story.fleet.said(f"node-{name}"))
        until(lambda: process.poll() is not None or "SuperNode ID" in story.fleet.said(f"node-{name}")[logged:], SLOW_S, name)
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
    with Journal(story.fleet.folder / "coordinator.sqlite") as journal:
        assert [kept.number for kept in journal.rounds("triage")] == [2, 1]
    for name in WARDS:
        learnt = re.findall(r"learns round (\d)", story.fleet.said(f"trainer-{name}"))
        assert learnt == ["1", "2"], "what was learnt before the kill is used"


def test_the_killed_super_node_took_part_again(story: Story) -> None:
    assert story.answers(WARDS[0]) >= 5 * ROUNDS


def test_an_unregistered_node_key_is_refused(story: Story) -> None:
    assert re.search(r"2004|412|not registered|not allowed|unregistered", story.refused, re.IGNORECASE), story.refused
    assert "SuperNode ID" not in story.refused


def test_the_result_is_that_of_one_process_to_the_bit(story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np.random, "default_rng", np.random.default_rng)
    certain()
    lead = Lead.open(coordinator_files(tmp_path))
    roster = Roster.open(tmp_path / "roster")
    clients = {
        name: RoundClient(Member(identity(name), roster, COORDINATOR, LENIENT), Journal(), {"pull": Pull(number)})
        for number, name in enumerate(WARDS)
    }
    assert len(list(lead_rounds(lead, InProcess(clients)))) == ROUNDS
    found = [Journal(folder / "coordinator.sqlite") for folder in (story.fleet.folder, tmp_path)]
    over_flower, here = (journal.kept("shared triage") for journal in found)
    assert over_flower is not None and over_flower == here


def test_the_trainers_outlived_all_of_it(story: Story) -> None:
    for name in WARDS:
        assert ask(story.fleet.folder / f"{name}.sock", b"", 5).content.decode() == name
        assert ask(story.fleet.folder / f"{name}.sock", b"no message", 5).content == b"ArtifactError"
