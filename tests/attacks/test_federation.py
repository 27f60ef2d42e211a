"""Attacks on rounds with client-level noise: colluding clients, a coordinator that chooses whom to invite, old manifests."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import round_parties
from federating import COORDINATOR, write_keys
from round_parties import House
from sartor.core.errors import ArtifactError, ConfigError, RoundError
from sartor.federate.flower import flower_client
from sartor.federate.flower.flower_client import ClientOptions
from sartor.federate.privacy.accountant import Account, PrivacyBudget, Spending, epsilon_of
from sartor.federate.privacy.client_noise import colluders_of, noise_of, noised, sharers_of, without_collusion
from sartor.federate.recipe import load
from sartor.federate.rounds.round_client import EnrolmentPolicy, Participant, RoundClient
from sartor.federate.rounds.round_manifest import (
    ClientWork,
    LocalUpdate,
    Manifest,
    UpdateRules,
    read_manifest,
    terms_for,
)
from sartor.federate.rounds.transport import InProcess, run_round
from sartor.federate.secure.secagg_terms import default_colluders, least_threshold
from sartor.federate.tuning import simulated_rounds
from sartor.federate.tuning.lora_task import LoraTask
from sartor.federate.tuning.simulated_rounds import SimulationSetup
from sartor.federate.tuning.simulation import simulate
from sartor.federate.updates import pack_tensors
from sartor.models.lora_tensors import Tensors
from tuning_rounds import recipe

# an honest update of zeros: whatever an attacker is left with is noise
SILENT = {"rate": 0.0}
RULES = UpdateRules(clip=1.0, noise=3.0, most_examples=1)
PAID = RULES.noise * RULES.clip


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor in which the spread of noise can be measured."""
    monkeypatch.setattr(round_parties, "START", {"head.weight": np.zeros((200, 100), np.float32)})


@dataclass
class Conspiracy(House):
    """A House whose clients add noise; what each sent is known to those who collude."""

    sent: dict[str, Tensors] = field(default_factory=dict)

    def client(self, name: str, **options: object) -> RoundClient:
        def remembered(tensors: Tensors, manifest: Manifest) -> Tensors:
            self.sent[name] = noised(tensors, manifest)
            return self.sent[name]

        return super().client(name, **{"noise": remembered, **options})

    def spread(self, mean: Tensors, active: int, known: tuple[str, ...]) -> float:
        """Standard deviation of what is left of the sum once the vectors of `known` are subtracted."""
        left = mean["head.weight"].astype(np.float64) * active
        return float((left - sum(self.sent[name]["head.weight"] for name in known)).std())


@dataclass
class Dropping(InProcess):
    """A coordinator that keeps the masked updates of some clients back: they seem to have vanished."""

    house: House | None = None
    dropped: frozenset[str] = frozenset()

    def exchange(self, requests: Mapping[str, bytes], wait_s: float) -> Iterator[bytes]:
        assert self.house
        if self.house.coordinator.stage == "masked":
            self.offline |= self.dropped
        return super().exchange(requests, wait_s)


def test_dropped_honest_clients_leave_the_paid_noise() -> None:
    """Scenario A: fewer than a third collude, and the coordinator reports drop-outs until they weigh most."""
    house, threshold, colluders = Conspiracy(10), least_threshold(10), 3
    transport = Dropping(house.clients, house=house, dropped=frozenset(house.names[threshold:]))
    ended = run_round(house.coordinator, transport, house.plan(rules=RULES, settings=SILENT))
    assert ended.state == "done" and len(ended.active) == threshold
    left = house.spread(ended.mean, threshold, house.names[:colluders])
    assert left == pytest.approx(PAID, rel=0.03), "before: sqrt(4 / 7) of it"


@pytest.mark.parametrize("count", [3, 4, 6])
def test_peer_that_subtracts_its_own_noise_gains_nothing(count: int) -> None:
    """Scenario C: nobody lies, and a client of the cohort subtracts what it sent itself."""
    house = Conspiracy(count)
    threshold = least_threshold(count)
    transport = Dropping(house.clients, house=house, dropped=frozenset(house.names[threshold:]))
    ended = run_round(house.coordinator, transport, house.plan(rules=RULES, settings=SILENT))
    assert house.spread(ended.mean, threshold, house.names[:1]) >= 0.97 * PAID


PRIVATE = {"base": "tiny", "privacy": {"epsilon": 8.0, "delta": 1e-2}}


def _enrolled(folder: Path, house: House, recipe: Mapping[str, Any], **options: Any) -> Participant:
    """The victim as `sartor federate client` enrols it, with a roster of the whole house."""
    pytest.importorskip("dp_accounting")
    write_keys(folder, house.members[house.names[0]].identity, house.roster)
    name = house.names[0]
    files = {"key": str(folder / f"{name}.key"), "roster": str(folder / "roster"), "socket": "x"}
    chosen = ClientOptions(**files, journal=str(folder / f"{name}.sqlite"), **options)
    return flower_client.enrol(load(recipe), name, chosen)


def _refusal(house: House, victim: Participant, cohort: tuple[str, ...], **rules: Any) -> RoundError | None:
    """Why the victim refuses a round of these clients; None where it takes part."""
    house.members[house.names[0]] = victim
    house.clients[house.names[0]] = house.client(house.names[0], noise=noised)
    transport = InProcess(house.clients)
    run_round(house.coordinator, transport, house.plan(cohort=cohort, rules=replace(RULES, **rules)))
    error = transport.said_no.get(house.names[0])
    assert error is None or isinstance(error, RoundError)
    return error


def test_invited_accomplices_are_refused(tmp_path: Path) -> None:
    """Scenario B: of an enrolled ten the coordinator invites the victim and two accomplices of its own."""
    house = Conspiracy(10)
    error = _refusal(house, _enrolled(tmp_path, house, PRIVATE), house.names[:3])
    assert error and error.check == "cohort" and "among 10 or more" in str(error) and "--min-cohort" in error.remedy


def test_assumed_accomplices_are_refused(tmp_path: Path) -> None:
    """Scenario B against a client that joins small cohorts, but trusts only itself in them."""
    house = Conspiracy(10)
    recipe = {**PRIVATE, "rules": {"assumed_colluders": 2}}
    error = _refusal(house, _enrolled(tmp_path, house, recipe, min_cohort=3), house.names[:3])
    assert error and error.check == "colluders" and "counts with 1 colluding" in str(error)
    assert "assumed_colluders: 2" in error.remedy


def test_two_accomplices_cannot_thin_the_noise(tmp_path: Path) -> None:
    """A cohort of three that counts with two colluders: the victim's own noise is all of it."""
    house = Conspiracy(3)
    rules = replace(RULES, assumed_colluders=2)
    ended = run_round(house.coordinator, house.transport, house.plan(rules=rules, settings=SILENT))
    assert house.spread(ended.mean, 3, house.names[1:]) == pytest.approx(PAID, rel=0.03)


def test_client_refuses_fewer_colluders_than_its_own(tmp_path: Path) -> None:
    house = Conspiracy(10)
    victim = _enrolled(tmp_path, house, PRIVATE)
    error = _refusal(house, victim, house.names, assumed_colluders=0)
    assert error and error.check == "colluders"
    assert not victim.agreement._account.spent(), "a refused round costs nothing"  # type: ignore[attr-defined]
    assert _refusal(house, victim, house.names, assumed_colluders=3) is None


def test_library_client_refuses_fewer_colluders_too() -> None:
    house = Conspiracy(10)
    ended = run_round(house.coordinator, house.transport, house.plan(rules=replace(RULES, assumed_colluders=1)))
    assert ended.state == "abandoned"
    assert {error.check for error in house.transport.said_no.values()} == {"colluders"}  # type: ignore[attr-defined]


def _manifest(house: House, rules: UpdateRules) -> Manifest:
    plan = house.plan(rules=rules)
    manifest = house.coordinator.begin(plan)
    return replace(manifest, rules=rules)


def test_old_manifest_is_read_and_its_round_refused() -> None:
    """A manifest with noise from before the field: its signature still holds, and no client begins its round."""
    house = Conspiracy(7)
    manifest = _manifest(house, RULES)
    signed = manifest.signed(house.me)
    assert b"assumed_colluders" not in signed
    read = read_manifest(signed, COORDINATOR, house.roster)
    assert read.digest == manifest.digest
    with pytest.raises(RoundError, match="does not state how many clients might collude"):
        EnrolmentPolicy().check(read)


def test_old_round_is_finished_with_the_default_noise() -> None:
    """A round that this client began before its update adds the noise of the default, which is no less than before."""
    manifest = _manifest(Conspiracy(7), RULES)
    assert colluders_of(manifest) == default_colluders(7) == 2
    assert noise_of(manifest).sharers == least_threshold(7) - 2


def test_manifest_with_broken_colluders_is_refused() -> None:
    house = Conspiracy(7)
    for wrong in (-1, 1.5, "2", True):
        manifest = _manifest_of(house, wrong)
        with pytest.raises(ArtifactError):
            read_manifest(manifest, COORDINATOR, house.roster)


def _manifest_of(house: House, colluders: Any) -> bytes:
    rules = replace(RULES, assumed_colluders=1)
    object.__setattr__(rules, "assumed_colluders", colluders)
    terms = terms_for(house.names, round_parties.START, RULES)
    manifest = Manifest("triage", 1, COORDINATOR, ClientWork("pull", shared="0" * 64), terms, 9_999, rules)
    return manifest.signed(house.me)


def test_colluders_that_leave_nobody_are_refused() -> None:
    assert sharers_of(21, 9) == 12
    with pytest.raises(ConfigError, match="nobody's noise is sure"):
        sharers_of(3, 3)


def test_account_counts_more_with_colluders(tmp_path: Path) -> None:
    """Both epsilons: the account's, and the lower one if nobody colludes."""
    pytest.importorskip("dp_accounting")
    manifest = _manifest(Conspiracy(10), replace(RULES, assumed_colluders=3))
    account = Account(tmp_path / "account.json", PrivacyBudget(8.0))
    account.spend(noise_of(manifest).spending("round-1", 20_000))
    optimistic = epsilon_of(without_collusion(account.spent(), {"round-1": manifest}), 1e-5)
    assert optimistic == pytest.approx(epsilon_of([Spending("x", 3.0 * math.sqrt(7 / 4))], 1e-5), rel=1e-2)
    assert optimistic < account.epsilon()
    assert without_collusion(account.spent(), {}) == account.spent(), "of an unknown round nothing better is claimed"


def test_client_with_noise_wants_everybody_of_its_roster(tmp_path: Path) -> None:
    house = Conspiracy(10)
    assert _enrolled(tmp_path, house, PRIVATE).policy.least_cohort == 10


def test_client_without_noise_joins_any_three(tmp_path: Path) -> None:
    house = Conspiracy(10)
    assert _enrolled(tmp_path, house, {"base": "tiny"}).policy.least_cohort == 3
    with pytest.raises(ConfigError, match="min_cohort is 2"):
        ClientOptions("key", "roster", "socket", min_cohort=2)


# --- who is asked again, after a kill


def test_client_that_comes_back_sends_the_same_bytes(tmp_path: Path) -> None:
    """Asked again after a kill, or in an open round, it answers as before: one draw of its noise leaves it."""
    house = Conspiracy(4, tmp_path)
    name, kinds = house.names[0], []

    class Asked:
        """A client that is asked again by each request: at once, and after a restart."""

        def answer(self, request: bytes) -> bytes:
            answers = [house.clients[name].answer(request) for _ in range(2)]
            house.clients[name] = house.client(name)
            answers.append(house.clients[name].answer(request) if house.coordinator.is_open else answers[0])
            kinds.append(house.coordinator.stage)
            assert len(set(answers)) == 1
            return answers[0]

    transport = InProcess({**house.clients, name: Asked()})
    ended = run_round(house.coordinator, transport, house.plan(rules=RULES, settings=SILENT))
    assert ended.state == "done" and name in ended.active and "masked" in kinds
    assert house.tasks[name].calls == 1


def test_inspectable_round_with_noise_is_refused() -> None:
    """Each invitation would draw a client's share anew, and the mean of the answers is the update."""
    with pytest.raises(ConfigError, match="each update is seen"):
        UpdateRules(clip=1.0, noise=3.0, most_examples=1, mode="inspectable")


def test_resumed_round_is_paid_once_and_repeats_its_bits(
    tiny_base: Path, dataset: Path, tmp_path: Path, fp32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A simulation that is killed once its clients have tuned asks them again: same noise, one payment a round."""
    for package in ("opacus", "dp_accounting"):
        pytest.importorskip(package)
    updates: dict[tuple[str, str], list[bytes]] = {}
    spent: dict[Path, list[Spending]] = {}
    tuned = LoraTask.update

    def recorded(task: LoraTask, manifest: Manifest, shared: Tensors) -> LocalUpdate:
        update = tuned(task, manifest, shared)
        assert task.guard
        updates.setdefault((str(task.guard.account.file), manifest.digest), []).append(pack_tensors(update.tensors))
        spent[task.guard.account.file] = task.guard.account.spent()
        return update

    def killed(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LoraTask, "update", recorded)
    privacy = {"epsilon": 8.0, "delta": 1e-2, "level": "example", "batch_rows": 8}
    asked = recipe(tiny_base, dataset, privacy=privacy, local={"updates": 1})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SimulationSetup, "seen_metrics", killed)
        simulate(asked, tmp_path / "out", shards={"count": 3, "by": "."})
    simulate(asked, tmp_path / "out", shards={"count": 3, "by": "."}, resume=True)
    assert any(len(same) > 1 for same in updates.values()), "clients are asked again"
    assert all(len(set(same)) == 1 for same in updates.values())
    assert len(spent) == 3 and all(len(entries) == asked["rounds"] for entries in spent.values())


def test_start_that_fails_leaves_no_journal_open(
    tiny_base: Path, dataset: Path, tmp_path: Path, fp32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next try in the same process finds its own journals locked, and the noise of a round is stuck."""

    def failed(*arguments: object, **options: object) -> None:
        raise ConfigError("the roster is broken", "mend it")

    asked = recipe(tiny_base, dataset, rounds=1, local={"updates": 1})
    held: list[Any] = []  # an error that is kept, as a debugger or a retry does, keeps its frames
    with monkeypatch.context() as patch:
        patch.setattr(simulated_rounds, "RoundDriver", failed)
        try:
            simulate(asked, tmp_path / "out", shards={"count": 3, "by": "."})
        except ConfigError as error:
            held.append(error)
    assert held
    assert simulate(asked, tmp_path / "out", shards={"count": 3, "by": "."}, resume=True).adapter.id
