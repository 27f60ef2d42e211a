"""Whole rounds: what comes of them, who comes late, who goes on after a stop, and what is refused."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from federating import COORDINATOR, identity
from round_parties import RULES, START, House, mean_of_numbers
from sartor.core.errors import (
    ArtifactError,
    BusyError,
    ConfigError,
    ConflictError,
    RoundError,
    SartorError,
    SignatureError,
)
from sartor.federate import updates as arrays
from sartor.federate.rounds import round_manifest as manifests
from sartor.federate.rounds.round_coordinator import RoundResult
from sartor.federate.rounds.round_journal import RoundJournal, StoredRound
from sartor.federate.rounds.round_manifest import ClientWork, Manifest, UpdateRules
from sartor.federate.rounds.transport import InProcess, TransferStats, finish, run_round
from sartor.federate.secure import messages
from sartor.federate.secure.messages import Invite, Payload, RoundOutcome, SurvivorLists
from sartor.models.lora_tensors import norm


def run(house: House, **plan: object) -> RoundResult:
    return run_round(house.coordinator, house.transport, house.plan(**plan))


def invite(house: House, manifest: Manifest, shared: bytes = b"", signer: str = COORDINATOR) -> bytes:
    content = manifest.signed(replace(house.me, key=identity(signer).key))
    return messages.sealed(Invite(content, Payload(shared or arrays.pack_tensors(START))), manifest.digest, house.me)


def refused(
    check: str, house: House, manifest: Manifest, kind: type[SartorError] = RoundError, shared: bytes = b""
) -> None:
    with pytest.raises(kind) as caught:
        house.clients[house.names[0]].answer(invite(house, manifest, shared))
    assert getattr(caught.value, "check", "") == check
    assert not house.journals[house.names[0]].rounds("triage"), "a round that is refused leaves nothing behind"


def test_two_rounds_add_the_mean_weighted_by_examples() -> None:
    house, carried = House(), TransferStats()
    first = run_round(house.coordinator, house.transport, house.plan(), carried)
    second = run(house)
    mean = mean_of_numbers(list(range(5)))
    assert [(one.number, one.state, one.active) for one in (first, second)] == [
        (n, "done", house.names) for n in (1, 2)
    ]
    for name, value in house.coordinator.shared.items():
        np.testing.assert_allclose(value, START[name] + 2 * mean, atol=1e-6)
    assert carried.received_bytes and carried.sent_bytes and not carried.refused and not house.transport.said_no
    assert [kept.state for kept in house.journals[house.names[0]].rounds("triage")] == ["done", "done"]


def test_equal_weights_and_a_part_of_the_tensors() -> None:
    house = House()
    for task in house.tasks.values():
        learn = task.update
        task.update = lambda manifest, shared, learn=learn: replace(  # type: ignore[method-assign]
            learn(manifest, shared), tensors={"tail.weight": learn(manifest, shared).tensors["tail.weight"]}
        )
    run(house, trained=("tail.weight",), rules=UpdateRules(most_examples=1), settings={"rate": 0.1})
    shared = house.coordinator.shared
    assert np.array_equal(shared["head.weight"], START["head.weight"])
    np.testing.assert_allclose(shared["tail.weight"], 1 + 0.1 * 3, atol=1e-6)


def test_an_update_is_clipped_to_the_manifests_norm() -> None:
    house = House()
    ended = run(house, rules=UpdateRules(clip=0.05, most_examples=1), settings={"rate": 1.0})
    assert norm(ended.mean) == pytest.approx(0.05, rel=1e-5)


def test_no_count_of_examples_is_in_any_message() -> None:
    house = House()
    house.coordinator.begin(house.plan())
    finish(house.coordinator, house.transport)
    digest = house.journals[COORDINATOR].rounds("triage")[0].digest
    transcript = house.coordinator.transcript(digest)
    assert len(transcript) == 5 * 5
    assert not any(b"example" in line or b"count" in line for line in transcript)


@dataclass
class Vanishing(InProcess):
    """Clients who are offline from a stage of a round on."""

    house: House | None = None
    plan: Mapping[tuple[int, str], set[str]] | None = None

    def exchange(self, requests: Mapping[str, bytes], wait_s: float) -> Iterator[bytes]:
        coordinator = self.house.coordinator
        if coordinator.is_open:
            number = coordinator._open.manifest.number
            self.offline |= self.plan.get((number, coordinator.stage), set())
        return super().exchange(requests, wait_s)


@pytest.mark.parametrize("stage", ["keys", "shares", "masked", "consent", "reveal"])
def test_who_vanishes_is_left_out_and_comes_back(stage: str) -> None:
    house = House(count=7)
    gone = set(house.names[:2])
    house.transport = Vanishing(house.clients, house=house, plan={(1, stage): gone})
    first = run(house)
    late = stage in ("consent", "reveal")
    assert (first.state, set(first.active)) == ("done", set(house.names) if late else set(house.names[2:]))
    house.transport.offline.clear()
    second = run(house)
    assert (second.state, second.active) == ("done", house.names)
    means = [mean_of_numbers(list(range(7) if late else range(2, 7))), mean_of_numbers(list(range(7)))]
    np.testing.assert_allclose(house.coordinator.shared["head.weight"], np.full((2, 3), sum(means)), atol=1e-6)
    # the last of who came back knows how both rounds ended for it
    states = [kept.state for kept in house.journals[house.names[0]].rounds("triage")]
    assert states == ["done", "done" if late else "left out"]


def test_round_below_threshold_is_abandoned_and_next_runs() -> None:
    """The shared tensors stay as they were, and all clients take part in the next round."""
    house = House()
    house.transport = Vanishing(house.clients, house=house, plan={(1, "masked"): set(house.names[:2])})
    first = run(house)
    assert (first.state, first.active) == ("abandoned", ())
    assert "threshold" in first.reason
    assert np.array_equal(house.coordinator.shared["tail.weight"], START["tail.weight"])
    house.transport.offline.clear()
    assert run(house).active == house.names
    assert house.tasks[house.names[4]].calls == 2


def test_an_update_that_missed_its_sum_counts_less_in_the_next() -> None:
    house = House()
    late = house.names[4]
    house.transport = Vanishing(house.clients, house=house, plan={(1, "masked"): {late}})
    assert late not in run(house).active
    house.transport.offline.clear()
    run(house, rules=replace(RULES, stale_rounds=1))
    assert (house.tasks[late].calls, house.tasks[house.names[0]].calls) == (1, 2)
    numbers = range(5)
    weights = [number + 1 if number < 4 else 5 / np.sqrt(2) for number in numbers]
    second = 0.01 * sum(weight * (number + 1) for number, weight in zip(numbers, weights, strict=True)) / sum(weights)
    expected = mean_of_numbers([0, 1, 2, 3]) + second
    np.testing.assert_allclose(house.coordinator.shared["head.weight"], np.full((2, 3), expected), atol=1e-6)


def test_possibly_summed_update_is_not_offered_again() -> None:
    """Its client sent the vector and never heard of the end."""
    house = House()
    late = house.names[4]
    house.transport = Vanishing(house.clients, house=house, plan={(1, "consent"): {late}})
    assert late in run(house).active
    house.transport.offline.clear()
    house.transport._waiting.clear()  # the carrier lost what waited
    run(house, rules=replace(RULES, stale_rounds=5))
    assert house.tasks[late].calls == 2


def test_everyone_is_opened_anew_before_every_exchange(tmp_path: Path) -> None:
    """A stop between any two exchanges: the same round, and the same sum, from the journals alone."""
    house = House(folder=tmp_path)
    house.coordinator.begin(house.plan(stage_s=100))
    stages = []
    while house.coordinator.is_open:
        stages.append(house.coordinator.stage)
        house.coordinator = house.lead()
        for name in house.names:
            house.clients[name] = house.client(name)
        requests = house.coordinator.requests()
        answers = [house.clients[name].answer(request) for name, request in requests.items()]
        again = [house.client(name).answer(request) for name, request in requests.items()]
        assert again == answers, "the same answers, after another stop"
        for name in house.names:
            house.clients[name] = house.client(name)
        assert all(house.coordinator.take(answer) for answer in answers)
        house.coordinator = house.lead()
        assert not any(house.coordinator.take(answer) for answer in answers)
        house.coordinator.advance()
    assert stages == ["keys", "shares", "masked", "consent", "reveal"]
    house.coordinator = house.lead()
    np.testing.assert_allclose(
        house.coordinator.shared["head.weight"], np.full((2, 3), mean_of_numbers(list(range(5)))), atol=1e-6
    )
    assert all(task.calls == 1 for task in house.tasks.values())
    assert set(house.coordinator.outcomes()) == set(house.names)


def test_secrets_of_a_round_are_gone_when_it_ends(tmp_path: Path) -> None:
    house = House(folder=tmp_path)
    house.coordinator.begin(house.plan())
    for request in [house.coordinator.requests()[house.names[0]]]:
        house.clients[house.names[0]].answer(request)
    kept = house.journals[house.names[0]].rounds("triage")[0]
    files = [tmp_path / f"{house.names[0]}.sqlite{end}" for end in ("", "-wal")]
    assert any(kept.secret in file.read_bytes() for file in files)
    assert all(file.stat().st_mode & 0o077 == 0 for file in files if os.name == "posix")
    finish(house.coordinator, house.transport)
    assert not any(kept.secret in file.read_bytes() for file in files if file.exists())
    assert house.journals[house.names[0]].rounds("triage")[0].secret == b""


def made(house: House, **changes: object) -> Manifest:
    rules = RULES
    terms = manifests.terms_for(house.names, START, rules, seed="ab" * 32)
    fields = {
        "run": "triage",
        "number": 1,
        "coordinator": COORDINATOR,
        "work": ClientWork("pull", arrays.digest(arrays.pack_tensors(START))),
        "terms": terms,
        "deadline": 2_000,
        "rules": rules,
    }
    return Manifest(**{**fields, **changes})


def test_a_manifest_comes_back_as_it_was_signed() -> None:
    house = House()
    manifest = made(house, work=ClientWork("pull", "ab" * 32, "base", "recipe", {"rate": 0.1, "names": ["a"]}))
    assert manifests.read_manifest(manifest.signed(house.me), COORDINATOR, house.roster) == manifest
    assert manifest.digest == manifests.read_manifest(manifest.signed(house.me), COORDINATOR, house.roster).digest


@pytest.mark.parametrize(
    "change",
    [
        b'"number":1>"number":2',
        b'"threshold":4>"threshold":1',
        b'"clip":1.0>"clip":99.0',
        b'"task":"pull">"task":"push"',
    ],
)
def test_altered_manifest_is_refused(change: bytes) -> None:
    house = House()
    was, _, now = change.partition(b">")
    content = made(house).signed(house.me)
    assert was in content
    with pytest.raises(SignatureError):
        manifests.read_manifest(content.replace(was, now), COORDINATOR, house.roster)
    with pytest.raises(SignatureError):
        manifests.read_manifest(made(house).signed(identity(COORDINATOR, seed=1)), COORDINATOR, house.roster)
    with pytest.raises(SignatureError):  # a client signs a manifest in its own name
        manifests.read_manifest(made(house, coordinator="zz").signed(house.me), COORDINATOR, house.roster)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"schema": 1}', b"\xff", b"[" * 100_000])
def test_what_is_no_manifest_is_refused(content: bytes) -> None:
    with pytest.raises(ArtifactError):
        manifests.read_manifest(content, COORDINATOR, House(count=3).roster)


def test_rounds_that_a_client_will_not_join() -> None:
    house = House()
    refused("task", house, made(house, work=ClientWork("push", arrays.digest(arrays.pack_tensors(START)))))
    refused("deadline", house, made(house, deadline=999))
    refused("manifest", house, made(house), shared=arrays.pack_tensors({"w": np.zeros(3)}))
    terms = made(house).terms
    refused("threshold", house, made(house, terms=replace(terms, threshold=1)))
    refused("cohort", house, made(house, terms=replace(terms, cohort=house.names[:1], threshold=1)))
    refused("noise", house, made(house, rules=UpdateRules(noise=1.0, most_examples=1)))


def test_replayed_rounds_are_refused() -> None:
    house = House()
    house.coordinator.begin(house.plan())
    request = house.coordinator.requests()[house.names[0]]
    lists = messages.sealed(SurvivorLists(house.names, ()), messages.read_message(request).round, house.me)
    finish(house.coordinator, house.transport)
    client = house.clients[house.names[0]]
    for replayed in (
        request,
        lists,
        invite(house, made(house)),
    ):  # the whole round, a request of it, another first round
        with pytest.raises(RoundError) as caught:
            client.answer(replayed)
        assert caught.value.check == "replayed"
    unknown = messages.sealed(SurvivorLists(house.names, ()), "ab" * 32, house.me)
    with pytest.raises(RoundError):
        client.answer(unknown)


def test_only_the_coordinator_ends_a_round() -> None:
    house = House()
    house.coordinator.begin(house.plan())
    request = house.coordinator.requests()[house.names[0]]
    client = house.clients[house.names[0]]
    client.answer(request)
    digest = messages.read_message(request).round
    forged = messages.sealed(RoundOutcome("done", house.names, "", ""), digest, house.members[house.names[1]].identity)
    with pytest.raises(RoundError):
        client.answer(forged)
    assert house.journals[house.names[0]].rounds("triage")[0].state == "open"


def test_answers_that_do_not_count_are_counted_by_kind() -> None:
    house = House()

    class Noisy(InProcess):
        def exchange(self, requests: Mapping[str, bytes], wait_s: float) -> Iterator[bytes]:
            yield b"nonsense"
            yield from super().exchange(requests, wait_s)

    carried = TransferStats()
    ended = run_round(house.coordinator, Noisy(house.clients), house.plan(), carried)
    assert (ended.state, carried.refused["ArtifactError"]) == ("done", 5)


def test_coordinator_opens_single_round_with_enough_clients() -> None:
    """An empty or too small plan, a second open round and a message of another kind are refused."""
    house = House()
    for plan in (house.plan(cohort=()), house.plan(trained=("nothing",))):
        with pytest.raises(ConfigError):
            house.coordinator.begin(plan)
    with pytest.raises(RoundError):
        house.coordinator.begin(house.plan(cohort=house.names[:2]))
    house.coordinator.begin(house.plan())
    with pytest.raises(ConflictError):
        house.coordinator.begin(house.plan())
    with pytest.raises(ConflictError):
        house.coordinator.start(START)
    with pytest.raises(RoundError):
        other = RoundOutcome("done", (), "", "")
        house.coordinator.take(messages.sealed(other, "ab" * 32, house.me))


def test_a_round_whose_time_is_over_is_abandoned() -> None:
    now = [1_000.0]
    house = House(clock=lambda: now[0])
    house.coordinator.begin(house.plan(stage_s=60, work_s=100, length_s=600))
    assert house.coordinator.advance() is True
    assert (house.coordinator.stage, house.coordinator.left_s()) == ("keys", 160)
    now[0] += 601
    ended = finish(house.coordinator, house.transport)
    assert (ended.state, "time is over" in ended.reason) == ("abandoned", True)


@pytest.mark.parametrize(
    "rules",
    [
        {"clip": 0.0},
        {"noise": -1.0},
        {"most_examples": 0},
        {"noise": 1.0},
        {"noise": 1.0, "most_examples": 1, "stale_rounds": 1},
        {"clip": float("nan")},
    ],
)
def test_rules_out_of_range_are_refused(rules: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        UpdateRules(**rules)


def test_noise_is_added_by_the_clients() -> None:
    house = House()
    for name in house.names:
        house.clients[name] = house.client(
            name, noise=lambda tensors, manifest: {key: value + 1 for key, value in tensors.items()}
        )
    house.transport = InProcess(house.clients)
    ended = run(house, rules=UpdateRules(noise=0.5, most_examples=1))
    np.testing.assert_allclose(ended.mean["tail.weight"], 1 + 0.01 * 3, atol=1e-5)


def test_a_journal_is_one_process_alone_and_says_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "one.sqlite"
    with RoundJournal(path) as journal:
        journal.begin(StoredRound("ab", "run", 1, b"m", b"s", "open"))
        with pytest.raises(BusyError):
            RoundJournal(path)
        assert journal._base.execute("PRAGMA synchronous").fetchone() == (2,)
        assert journal._base.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    with RoundJournal(path) as journal:
        assert [kept.digest for kept in journal.rounds("run")] == ["ab"]
        journal._base.execute("PRAGMA user_version=9")
    with pytest.raises(SartorError, match="schema 9"):
        RoundJournal(path)
    path.write_bytes(b"no journal" * 1000)
    with pytest.raises(SartorError, match="no journal"):
        RoundJournal(path)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="read by others"):
        RoundJournal(path)


def test_tensors_come_back_from_their_bytes() -> None:
    found = arrays.unpack_tensors(arrays.pack_tensors(START))
    assert all(np.array_equal(found[name], value) and found[name].dtype == np.float32 for name, value in START.items())
    for broken in (b"", b"[]\n", b'{"a":[2]}\n1234', b'{"a":"x"}\n', b'{"a":[-1]}\n'):
        with pytest.raises(ArtifactError):
            arrays.unpack_tensors(broken)
    with pytest.raises(ConfigError):
        arrays.clipped({"a": np.array([np.inf])}, 1.0)
