"""Inspectable rounds: what a coordinator takes for an update, and that it goes on after a kill."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from federating import COORDINATOR, LENIENT, identity, names, roster_of
from round_parties import START, Pull
from sartor.core.errors import ArtifactError, ConfigError, ConflictError, RoundError, SignatureError
from sartor.federate import updates as arrays
from sartor.federate.rounds.round_client import EnrolmentPolicy, Participant, RoundClient
from sartor.federate.rounds.round_coordinator import Coordinator, Inspected, RoundPlan
from sartor.federate.rounds.round_journal import RoundJournal
from sartor.federate.rounds.round_manifest import ClientWork, Manifest, UpdateRules, terms_for
from sartor.federate.rounds.transport import InProcess, finish
from sartor.federate.secure import messages
from sartor.federate.secure.messages import Payload, Shown
from sartor.federate.updates import Update, mean
from sartor.models.lora_tensors import Tensors

WARDS = names(3)
RULES = UpdateRules(clip=1.0, most_examples=10, mode="inspectable")
ROSTER = roster_of(identity(COORDINATOR), *map(identity, WARDS), identity("stranger"))
GOOD = {name: np.full_like(value, 0.1) for name, value in START.items()}


def manifest() -> Manifest:
    work = ClientWork("pull", arrays.digest(arrays.pack_tensors(START)))
    return Manifest("triage", 1, COORDINATOR, work, terms_for(WARDS, START, RULES, seed="0" * 64), 0, RULES)


def shown(name: str, update: Tensors = GOOD, weight: float = 0.3, key: str = "") -> bytes:
    packed = arrays.pack_tensors({**update, arrays.WEIGHT: np.array([weight], np.float32)})
    me = identity(key or name)
    return messages.sealed(Shown(Payload(packed)), manifest().digest, type(me)(name, me.key))


def test_updates_come_out_as_they_were_shown() -> None:
    server = Inspected(manifest(), ROSTER)
    assert server.take(shown(WARDS[1])) and not server.take(shown(WARDS[1])), "the same again changes nothing"
    assert server.missing == (WARDS[0], WARDS[2]) and server.lists.active == (WARDS[1],)
    with pytest.raises(ConflictError):
        server.take(shown(WARDS[1], weight=0.5))
    with pytest.raises(RoundError, match="threshold is 3"):
        server.close()
    server.take(shown(WARDS[0]))
    server.take(shown(WARDS[2]))
    assert server.close() == "done" and server.missing == ()
    assert [(one.client, one.examples) for one in server.updates()] == [(name, 3) for name in WARDS]
    assert all(np.array_equal(server.updates()[0].tensors[name], value) for name, value in GOOD.items())


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (shown(WARDS[0], {**GOOD, "more": np.zeros(1, np.float32)}), ArtifactError),
        (shown(WARDS[0], {name: value[:1] for name, value in GOOD.items()}), ArtifactError),
        (shown(WARDS[0], {name: value * np.nan for name, value in GOOD.items()}), ArtifactError),
        (shown(WARDS[0], {name: value * 100 for name, value in GOOD.items()}), ArtifactError),
        (shown(WARDS[0], weight=2.0), ArtifactError),
        (shown(WARDS[0], weight=0.0), ArtifactError),
        (shown(WARDS[0], weight=float("nan")), ArtifactError),
        (shown(WARDS[0], key=WARDS[1]), SignatureError),
        (shown("stranger"), RoundError),
    ],
    ids=[
        "one tensor more",
        "another shape",
        "not finite",
        "longer than the clip",
        "heavy",
        "weightless",
        "nan",
        "forged",
        "stranger",
    ],
)
def test_what_is_no_update_of_the_round_is_refused(content: bytes, error: type[Exception]) -> None:
    server = Inspected(manifest(), ROSTER)
    with pytest.raises(error):
        server.take(content)
    assert server.missing == WARDS


def test_a_killed_coordinator_has_what_was_shown(tmp_path: Path) -> None:
    pooled: list[Sequence[Update]] = []

    def pool(updates: Sequence[Update]) -> Tensors:
        pooled.append(updates)
        return mean(updates)

    def lead() -> tuple[RoundJournal, Coordinator]:
        journal = RoundJournal(tmp_path / "coordinator.sqlite")
        member = Participant(identity(COORDINATOR), ROSTER, COORDINATOR, LENIENT)
        return journal, Coordinator(member, journal, "triage", clock=lambda: 1_000.0, pool=pool)

    journal, coordinator = lead()
    coordinator.start(START)
    coordinator.begin(RoundPlan("pull", WARDS, RULES, stage_s=60))
    members = [
        Participant(identity(name), ROSTER, COORDINATOR, LENIENT, EnrolmentPolicy("inspectable")) for name in WARDS
    ]
    tasks = [Pull(number) for number in range(3)]
    clients = {
        one.identity.name: RoundClient(one, RoundJournal(), {"pull": task}, clock=lambda: 1_000.0)
        for one, task in zip(members, tasks, strict=True)
    }
    requests = coordinator.requests()
    for name in WARDS[:2]:
        answer = clients[name].answer(requests[name])
        assert answer == clients[name].answer(requests[name]), "asked again it shows the same"
        assert coordinator.take(answer)
    journal.close()
    journal, coordinator = lead()
    assert coordinator.missing == WARDS[2:] and set(coordinator.requests()) == set(WARDS[2:])
    ended = finish(coordinator, InProcess(clients))
    assert ended and ended.state == "done" and ended.active == WARDS
    assert [one.examples for one in pooled[-1]] == [1, 2, 3] and [task.calls for task in tasks] == [1, 1, 1]
    transcript = coordinator.transcript(journal.rounds("triage")[0].digest)
    assert len(transcript) == 3 and max(map(len, transcript)) < 600, "signed lines, without the updates"
    journal.close()


def test_without_a_rule_there_is_no_inspectable_round() -> None:
    with RoundJournal() as journal:
        coordinator = Coordinator(Participant(identity(COORDINATOR), ROSTER, COORDINATOR, LENIENT), journal, "triage")
        coordinator.start(START)
        with pytest.raises(ConfigError, match="pool"):
            coordinator.begin(RoundPlan("pull", WARDS, RULES))
