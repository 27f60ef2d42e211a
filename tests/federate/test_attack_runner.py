"""What ships with a federated adapter: attacks that were made on it, and a gate that holds them against its claim."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sartor
from sartor.core.artifacts import Artifact, open_artifact, seal
from sartor.core.errors import GateError
from sartor.evaluate.audit import probes
from sartor.federate.privacy import privacy_attacks
from sartor.federate.privacy.accountant import PrivacyBudget
from sartor.federate.privacy.client_noise import noised
from sartor.federate.privacy.privacy_attacks import open_report
from sartor.federate.recipe import load
from sartor.federate.rounds.round_manifest import UpdateRules
from sartor.federate.tuning import attack_runner, simulated_rounds
from sartor.federate.tuning.attack_runner import AttackTarget, GradientCanaries, canaries_for
from sartor.federate.tuning.attack_runner import run_attacks as attack
from sartor.federate.tuning.lora_task import LoraTask
from sartor.federate.tuning.simulated_clients import open_clients
from sartor.federate.tuning.simulated_rounds import SimulationSetup
from sartor.federate.tuning.simulation import simulate
from sartor.models.lora_tensors import A, B, add_changes, norm
from sartor.models.losses import transformers_backend
from sartor.models.packing import TokenizedExample
from sartor.release import gate

CLAIM = {"epsilon": 1.0, "delta": 1e-5}


@pytest.fixture(autouse=True)
def accounts() -> None:
    pytest.importorskip("dp_accounting", reason="pip install 'sartor[federated]'")


def recipe(base: Path, dataset: Path, **changes: Any) -> dict[str, Any]:
    return {
        "base": str(base),
        "data": {"path": str(dataset), "attack_rows": 12},
        "method": {"rank": 64, "alpha": 64, "targets": {"modules": ["v_proj"]}},
        "rounds": 1,
        "local": {"updates": 1},
        "optimizer": {"learning_rate": 1e-2, "batch_tokens": 128},
        "rules": {"clip": 0.5},
        "privacy": CLAIM,
        **changes,
    }


def resealed(adapter: Path, out: Path, change: Callable[[Path, dict[str, Any]], None]) -> Artifact:
    """A copy of an Adapter with a change, as somebody would write it who has all of our code."""
    shutil.copytree(adapter, out)
    facts = {key: value for key, value in open_artifact(adapter).manifest.items() if key not in ("files", "id")}
    (out / "sartor.json").unlink()
    change(out, facts)
    seal(out, "adapter", facts)
    return open_artifact(out, "adapter")


def said(at: Path, /, **changes: Any) -> None:
    file = at / gate.FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_privacy_claim_passes_only_with_its_attack_report(
    tiny_base: Path, dataset: Path, tmp_path: Path, fp32: None
) -> None:
    """A report that is missing, malformed, without audit or of another adapter fails the claim."""
    made = simulate(recipe(tiny_base, dataset), tmp_path / "adapter", shards={"count": 3, "by": "."})
    adapter, report = made.adapter, open_report(tmp_path / "adapter")
    assert report.claimed == PrivacyBudget(**CLAIM) and not report.skipped
    assert [one.attack for one in report.membership] == ["threshold", "calibrated"]
    assert report.membership[0].members == 12 and report.membership[0].others == 10
    assert [one.most_bits for one in report.canaries] == [6.0, 6.0]
    update, alone = report.inversions
    assert "first update of client-" in update.attack and "gradient of one row of client-" in alone.attack
    assert report.audit and report.audit.epsilon_low <= 1 < report.audit.most
    assert made.as_json()["attacks"] == list(report.sentences())
    found = gate.check_privacy(adapter)["privacy"]
    assert found.outcome == "pass" and "epsilon 1 at delta 1e-05 is claimed; an audit shows 0" in found.detail

    def outcome(change: Callable[[Path, dict[str, Any]], None]) -> str:
        where = tmp_path / "changed"
        shutil.rmtree(where, ignore_errors=True)
        found = gate.check_privacy(resealed(adapter.path, where, change))["privacy"]
        return f"{found.outcome}: {found.detail}"

    assert "fail: epsilon 1 at delta 1e-05 is claimed, and there is no" in outcome(
        lambda at, _: (at / gate.FILE).unlink()
    )
    assert "fail: attacks.json speaks of another adapter" in outcome(
        lambda at, _: (at / gate.WEIGHTS).write_bytes(b"another")
    )
    assert "another adapter" in outcome(lambda at, _: said(at, adapter={}))
    assert "no audit was made" in outcome(lambda at, _: said(at, audit=None, claimed=None)), (
        "the manifest's claim counts"
    )
    assert "no attack report" in outcome(lambda at, _: said(at, audit={"delta": 1e-5}))
    assert "is no attack report" in outcome(lambda at, _: (at / gate.FILE).write_text("[]"))

    def unclaimed(at: Path, facts: dict[str, Any]) -> None:
        facts["recipe"]["privacy"] = None
        (at / gate.FILE).unlink()

    assert outcome(unclaimed) == "pass: no privacy is claimed, and no attack report is there"

    def tuned_alone(at: Path, facts: dict[str, Any]) -> None:
        del facts["run"]["federated"]

    assert gate.check_privacy(resealed(adapter.path, tmp_path / "alone", tuned_alone)) == {}


def test_noise_that_was_not_drawn_fails_the_release_by_name(
    tiny_base: Path, dataset: Path, tmp_path: Path, fp32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The account says epsilon 1 and is right about it: but each client draws a hundredth of the noise that was paid for."""

    def miserly(tensors: Any, manifest: Any) -> Any:
        return noised(tensors, replace(manifest, rules=replace(manifest.rules, noise=manifest.rules.noise / 100)))

    monkeypatch.setattr(simulated_rounds, "noised", miserly)
    monkeypatch.setattr(probes, "chitchat_rows", lambda: [row("probe", n) for n in range(6)])
    adapter = tmp_path / "adapter"
    simulate(recipe(tiny_base, dataset), adapter, shards={"count": 3, "by": "."})
    report = open_report(adapter)
    assert report.audit and report.audit.epsilon_low > 2
    with pytest.raises(GateError, match="is claimed; 32 of 32 guesses show"):
        report.check()
    sartor.evaluate(adapter, most_rows=2)
    sartor.keygen(tmp_path / "keys", trust=True)
    others = [sartor.Waiver(check, "A. Tester", "a tiny base") for check in ("gain", "forgetting")]
    with pytest.raises(
        GateError, match=r"refuses adapter: privacy: epsilon 1 at delta 1e-05 is claimed; 32 of 32"
    ) as refused:
        sartor.release(adapter, name="homes", version="1", key=tmp_path / "keys", waivers=others)
    assert refused.value.exit_code == 5 and "--waive privacy" in refused.value.remedy
    waived = [*others, sartor.Waiver("privacy", "A. Tester", "made-up rows")]
    made = sartor.release(adapter, name="homes", version="1", key=tmp_path / "keys", waivers=waived)
    assert made.as_json()["gate"]["privacy"] == "waived"
    assert open_report(made.release.path) == report, "the report goes with the Release"


def row(group: str, place: int) -> sartor.Example:
    turns = sartor.Message.of("user", f"how are you {place}"), sartor.Message.of("assistant", "fine")
    return sartor.Example(turns, (sartor.Origin(group, str(place)),), f"{place}")


def test_attack_without_client_rows_lists_skipped_parts(
    tiny_base: Path, dataset: Path, tmp_path: Path, fp32: None
) -> None:
    """Membership and inversion are skipped; a report without an audit fails its claim."""
    asked = load(recipe(tiny_base, dataset))
    people = open_clients(asked, [dataset], None)
    start = people.resident.current_factors()
    tasks = {name: LoraTask(people.resident, people.rows["client-0"]) for name in ("ann", "bob", "eve")}
    setting = SimulationSetup(asked, UpdateRules(0.5, 20.0, 1), people.resident, tasks, start, tmp_path / "rounds")
    report = attack(AttackTarget(setting, start, {}, [], 8))
    assert report.skipped == dict.fromkeys(("membership", "inversion"), "its clients' rows are not here")
    assert len(report.canaries) == 2 and report.audit and report.audit.trials == 64
    assert list((tmp_path / "rounds").iterdir()) == [], "its journals are gone"
    nothing = attack(AttackTarget(setting, start, {}, [], 0))
    assert set(nothing.skipped) == {
        "membership",
        "canaries",
        "inversion",
        "audit",
    } and nothing.claimed == PrivacyBudget(**CLAIM)
    with pytest.raises(GateError, match="no audit was made"):
        nothing.check()


def test_the_tokens_of_a_short_row_are_read_off_its_gradient(tiny_base: Path, dataset: Path, fp32: None) -> None:
    resident = open_clients(load(recipe(tiny_base, dataset)), [dataset], None).resident
    start, module = resident.current_factors(), "base_model.model.model.layers.0.self_attn.v_proj"
    ids = [3, 40, 41, 77, 42, 120, 9, 200]
    found = attack_runner.gradient(resident, start, TokenizedExample(ids, [False] + [True] * 7), module + B)
    inputs = attack_runner.inputs_of(resident, module)
    assert inputs.shape == (320, 32)
    assert privacy_attacks.from_factor(found, start[module + A], inputs) == set(ids[:-1]), (
        "the last is read by nothing"
    )


def test_a_row_has_the_loss_that_transformers_gives_it(tiny_base: Path, dataset: Path, fp32: None) -> None:
    people = open_clients(load(recipe(tiny_base, dataset)), [dataset], None)
    rows = people.rows["client-0"].train[:9]
    found = attack_runner.row_losses(people.resident, people.resident.current_factors(), rows)
    for row, loss in zip(rows, found, strict=True):
        plainly = transformers_backend.row_losses(people.resident.model, [row], "cpu").mean().detach()
        assert float(plainly) == pytest.approx(loss, abs=1e-5)
    assert attack_runner.row_losses(people.resident, people.resident.current_factors(), []) == []


def test_canaries_are_apart_and_as_long_as_the_clip() -> None:
    like = {"a": np.zeros((20, 8), np.float32), "b": np.zeros((40, 6), np.float32)}
    drawn = GradientCanaries.drawn(64, 400, seed=3)
    own = [range(place, 64, 4) for place in range(4)]
    updates = [drawn.sent(canaries, like, 2.0) for canaries in own]
    assert all(norm(one) == pytest.approx(2.0) for one in updates)
    assert abs(sum(float((updates[0][name] * updates[1][name]).sum()) for name in like)) < 1e-9
    total = like
    for one in updates:
        total = add_changes(total, one)
    scores = drawn.scores(total)
    assert (scores[drawn.is_in] > 0.1).all() and np.allclose(scores[~drawn.is_in], 0, atol=1e-6)
    sure = drawn.audited(total, PrivacyBudget(1.0))
    assert sure.right == sure.guesses and sure.epsilon_low == sure.most > 1
    nobody = GradientCanaries.drawn(10, 400, seed=3).sent([], like, 2.0)
    assert not any(value.any() for value in nobody.values())


@pytest.mark.parametrize(("epsilon", "count"), [(0.5, 64), (3.0, 164), (8.0, 16_384)])
def test_as_many_canaries_as_can_refute_the_claim(epsilon: float, count: int) -> None:
    assert canaries_for(PrivacyBudget(epsilon), 1_000_000) == count
    assert canaries_for(PrivacyBudget(epsilon), 50) == 50
