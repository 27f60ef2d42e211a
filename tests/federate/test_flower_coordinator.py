"""The coordinator's and the client's side as their commands run them, in one process, without Flower."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sartor
from federating import COORDINATOR
from sartor.cli import main
from sartor.core.artifacts import open_artifact
from sartor.core.errors import ConfigError, GuardError, MissingError, RoundError, SartorError
from sartor.federate.flower import flower_run
from sartor.federate.flower.driver_options import RoundDriverOptions, drive_rounds
from sartor.federate.flower.flower_client import ClientOptions, enrol, round_client, task_of
from sartor.federate.flower.flower_coordinator import CoordinatorOptions, coordinate
from sartor.federate.recipe import load
from sartor.federate.rounds.round_client import RoundClient
from sartor.federate.rounds.round_journal import RoundJournal
from sartor.federate.rounds.round_manifest import ClientWork, Manifest, UpdateRules, terms_for
from sartor.federate.rounds.transport import InProcess
from sartor.federate.tuning import round_schedule
from sartor.federate.tuning.lora_task import LoraTask
from sartor.federate.tuning.simulation import simulate
from tuning_rounds import recipe

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
    transport: InProcess = field(default_factory=lambda: InProcess({}))
    tasks: dict[str, LoraTask] = field(default_factory=dict)

    def __post_init__(self) -> None:
        (self.folder / "roster").mkdir(parents=True)
        for name in (COORDINATOR, *self.datasets):
            made = sartor.federate_keygen(self.folder / "keys" / name, name)
            Path(made["public"]).rename(self.folder / "roster" / f"{name}.pub")

    def options(self, **more: Any) -> CoordinatorOptions:
        return CoordinatorOptions(str(self.folder / "keys" / COORDINATOR), str(self.folder / "roster"), **more)

    def client(self, name: str, stack: ExitStack, **changes: Any) -> RoundClient:
        """As `sartor federate client` has it; those of one Dataset and recipe take turns on one base."""
        options = ClientOptions(
            str(self.folder / "keys" / name), str(self.folder / "roster"), "", str(self.folder / f"{name}.sqlite")
        )
        own = load({**self.asked, **changes})
        member, journal = enrol(own, name, options), stack.enter_context(RoundJournal(Path(options.journal)))
        key = f"{self.datasets[name]} {changes}"
        if key not in self.tasks:
            self.tasks[key] = task_of(own, self.datasets[name], self.folder / f"{name}.rows")
        return round_client(member, journal, self.tasks[key], own.seed)

    def command(self, out: Path, notice: Callable[[str], object] | None = None, **more: Any) -> threading.Thread:
        def run() -> None:
            try:
                coordinate(self.asked, out, self.options(), notice=notice or self.said.append, **more)
            except (SartorError, KeyboardInterrupt) as error:
                self.wrong.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    def lead(self, out: Path, rounds: int = 99, **changes: Any) -> list[dict[str, Any]]:
        """What the ServerApp does, with clients that go on from their journals; rounds: it is stopped after so many."""
        found: list[dict[str, Any]] = []
        with ExitStack() as stack:
            self.transport = InProcess({name: self.client(name, stack, **changes) for name in self.datasets})
            lead = RoundDriverOptions.open(out.with_name(f"{out.name}.rounds") / "lead.yaml")
            # each client answers at once, or says no
            lead = replace(lead, round=replace(lead.round, stage_s=0, work_s=0))
            for line in stack.enter_context(contextlib.closing(drive_rounds(lead, self.transport))):
                found.append(json.loads(line))
                if len(found) == rounds:
                    break
        return found

    def refusals(self) -> set[str]:
        return {f"{error.kind} {error.check}".strip() for error in self.transport.said_no.values()}


@pytest.fixture
def federation(tmp_path: Path, asked: dict[str, Any], dataset: Path, monkeypatch: pytest.MonkeyPatch) -> Federation:
    monkeypatch.setattr(flower_run, "_POLL_S", 0.05)
    return Federation(tmp_path / "federation", asked, dict.fromkeys(WARDS, dataset))


def wait_for(what: Callable[[], object], thread: threading.Thread) -> None:
    while not what():
        assert thread.is_alive(), "the command ended before"
        thread.join(0.02)


def led(federation: Federation, out: Path, **changes: Any) -> None:
    """The command, and the rounds that it asks for."""
    thread = federation.command(out)
    wait_for(lambda: any("flwr run" in line for line in federation.said), thread)
    federation.lead(out, **changes)
    thread.join(600)


def finished(federation: Federation, out: Path) -> dict[str, Any]:
    led(federation, out)
    assert not federation.wrong, federation.wrong
    return open_artifact(out).manifest


def weights(adapter: Path) -> bytes:
    return (adapter / "adapter_model.safetensors").read_bytes()


def test_the_adapter_is_that_of_a_simulation_to_the_bit(federation: Federation, tmp_path: Path, dataset: Path) -> None:
    out = tmp_path / "led"
    run = finished(federation, out)["run"]
    simulated = simulate(federation.asked, tmp_path / "simulated", clients=[dataset] * 3).as_json()
    assert weights(out) == weights(tmp_path / "simulated")
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


def test_resume_after_coordinator_kill_is_bit_identical(federation: Federation, tmp_path: Path) -> None:
    """It needs resume=True and the same number of rounds; round 1 is not run again."""

    def killed(line: str) -> None:
        if "round 1 of 2 done" in line:
            raise KeyboardInterrupt

    whole, out = tmp_path / "whole", tmp_path / "killed"
    finished(federation, whole)
    thread = federation.command(out, killed)
    wait_for(lambda: (tmp_path / "killed.rounds" / "lead.yaml").exists(), thread)
    assert len(federation.lead(out, rounds=1)) == 1
    thread.join(600)
    assert [type(error) for error in federation.wrong] == [KeyboardInterrupt] and not out.exists()
    with pytest.raises(ConfigError, match="unfinished"):
        coordinate(federation.asked, out, federation.options())
    with pytest.raises(ConfigError, match=r"another run.*rounds: 3 -> 2|another run.*rounds: 2 -> 3"):
        coordinate({**federation.asked, "rounds": 3}, out, federation.options(), resume=True)
    federation.wrong.clear()
    thread = federation.command(out, resume=True)
    assert [line["number"] for line in federation.lead(out)] == [2], "the first round is not done again"
    thread.join(600)
    assert weights(out) == weights(whole)
    assert coordinate(federation.asked, out, federation.options(), resume=True).adapter.id == open_artifact(out).id


def test_a_robust_run_is_inspectable_and_that_of_a_simulation(
    federation: Federation, tmp_path: Path, dataset: Path
) -> None:
    federation.asked |= {"robust": "norm_bound"}
    out = tmp_path / "seen"
    run = finished(federation, out)["run"]
    simulated = simulate(federation.asked, tmp_path / "simulated", clients=[dataset] * 3)
    assert weights(out) == weights(tmp_path / "simulated")
    for found in (run, simulated.adapter.manifest["run"]):
        assert (found["federated"]["sum"], found["federated"]["rules"]["mode"]) == ("norm_bound", "inspectable")
    assert run["exactness_error"] == simulated.as_json()["exactness_error"] and run["quantisation_error"] == 0


@pytest.mark.parametrize(
    ("theirs", "mine", "refusal"),
    [
        ({"robust": "median"}, {"robust": None}, "RoundError mode"),
        ({}, {"robust": "median"}, "RoundError mode"),
        ({}, {"method": {"rank": 4, "alpha": 16}}, "RoundError manifest"),
        ({}, {"privacy": {"epsilon": 8.0, "delta": 1e-2}}, "RoundError noise"),
    ],
    ids=[
        "inspectable, of a private client",
        "private, of an inspectable one",
        "another recipe",
        "without the noise agreed to",
    ],
)
def test_a_client_refuses_what_it_did_not_agree_to(
    theirs: dict[str, Any], mine: dict[str, Any], refusal: str, federation: Federation, tmp_path: Path
) -> None:
    if "privacy" in mine:
        pytest.importorskip("dp_accounting")
    federation.asked |= {"rounds": 1, **theirs}
    led(federation, tmp_path / "out", **mine)
    assert federation.refusals() == {refusal}
    (error,) = federation.wrong
    assert (
        isinstance(error, RoundError)
        and "none of the 1 rounds was done" in str(error)
        and not (tmp_path / "out").exists()
    )
    if refusal.endswith("mode"):
        said = str(next(iter(federation.transport.said_no.values())))
        assert "this client enrolled for" in said and "the round is" in said


def test_a_client_keeps_its_own_account_of_privacy(federation: Federation, tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting")
    federation.asked |= {"rounds": 1, "privacy": {"epsilon": 8.0, "delta": 1e-2}, "rules": {"clip": 0.01}}
    run = finished(federation, tmp_path / "first")["run"]
    assert 7 < run["epsilon"] <= 8 and run["exactness_error"] is None, "under noise nobody is asked for a response"
    federation.said.clear()
    led(federation, tmp_path / "second")
    assert federation.refusals() == {"BudgetError"}, "a second run, under another name, is not paid for"
    assert not (tmp_path / "second").exists()


def test_an_enrolment_that_cannot_be_is_refused_at_once(federation: Federation, tmp_path: Path) -> None:
    out, roster = tmp_path / "out", federation.folder / "roster"
    for options, asked, says in (
        (federation.options(clients=WARDS[:2]), {}, "cohort has 2"),
        (federation.options(clients=(*WARDS, "ward-x")), {}, "has no key of it"),
        (federation.options(name="ward-a"), {}, "the roster has the key"),
        (federation.options(), {"rules": {}}, "most_examples is auto"),
    ):
        with pytest.raises(ConfigError, match=says) as caught:
            coordinate({**federation.asked, **asked}, out, options)
        assert ("federate keygen DIR --name NAME" in caught.value.remedy) == (says == "cohort has 2")
    with pytest.raises(ConfigError, match="stage_s is 0"):
        federation.options(stage_s=0)
    own = ClientOptions(str(federation.folder / "keys" / "ward-b"), str(roster), str(tmp_path / "s.sock"))
    with pytest.raises(ConfigError, match="the roster has the key"):
        enrol(load(federation.asked), "ward-a", own)
    (roster / "coordinator.pub").unlink()
    with pytest.raises(ConfigError, match=r"put coordinator\.pub there"):
        enrol(load(federation.asked), "ward-b", own)
    assert not out.with_name("out.rounds").exists()


def test_failing_flower_run_is_retried_until_patience_ends(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The MissingError quotes the log; an error that the run wrote is raised as it is."""
    begun: list[float] = []

    def fails(watch: flower_run.RunWatcher) -> subprocess.Popen[bytes]:
        begun.append(watch.patience_s)
        watch.log.write_text("nobody is at that address\n")
        return subprocess.Popen(["false"])

    monkeypatch.setattr(flower_run, "_begun", fails)
    monkeypatch.setattr(flower_run, "_AGAIN_S", 0.05)
    with pytest.raises(MissingError, match="nobody is at that address"):
        coordinate(federation.asked, tmp_path / "out", federation.options(link="wards", patience_s=5.0))
    assert len(begun) > 1

    def stopped(watch: flower_run.RunWatcher) -> subprocess.Popen[bytes]:
        watch.lead.trouble.write_text('{"kind": "GuardError", "problem": "half", "remedy": "look"}')
        return fails(watch)

    monkeypatch.setattr(flower_run, "_begun", stopped)
    with pytest.raises(GuardError, match="half"):
        coordinate(federation.asked, tmp_path / "out", federation.options(link="wards"), resume=True)


def tensors(seed: int, b: float = 1.0) -> dict[str, np.ndarray]:
    chance = np.random.default_rng(seed)
    found = {}
    for place in range(6):
        found[f"m{place}.lora_A.weight"] = chance.standard_normal((4, 24)).astype(np.float32)
        found[f"m{place}.lora_B.weight"] = (b * chance.standard_normal((16, 4))).astype(np.float32)
    return found


@pytest.mark.parametrize(("sent", "exact"), [("B", True), ("A", True), ("", False)])
def test_canary_in_sum_tells_exact_mean_from_inexact_mean(sent: str, exact: bool) -> None:
    """If only A or only B is sent the error is at most 1e-6; if both are it exceeds 1e-3."""
    shared, rules = tensors(0), UpdateRules(clip=2.0)
    trained = {name: value for name, value in shared.items() if f"lora_{sent}" in name}
    beside = round_schedule.side_tensors(round_schedule.of_round(shared, 5, 1), shared, trained, rules.clip)
    manifest = Manifest(
        "r", 1, "c", ClientWork("lora", "0" * 64), terms_for("abc", trained, rules, side_tensors=beside), 0, rules
    )
    bounds = {one.name: one.bound for one in beside}
    changes = [{name: 3 * tensors(seed)[name] for name in trained} for seed in (1, 2, 3)]
    found = [round_schedule.responses(manifest, shared, change, 5) for change in changes]
    for one in found:
        assert {name: value.shape for name, value in one.items()} == {one.name: one.shape for one in beside}
        assert all(np.abs(value).max() <= bounds[name] for name, value in one.items()), "it fits into the ring"
    clip = [
        {name: value * 2 / np.sqrt(sum((v**2).sum() for v in c.values())) for name, value in c.items()}
        for c in changes
    ]
    mean = {name: np.mean([one[name] for one in clip], axis=0) for name in trained}
    mean |= {name: np.mean([one[name] for one in found], axis=0) for name in bounds}
    error = round_schedule.error_of(shared, mean, 5, 1)
    assert error is not None and (error <= 1e-6 if exact else error > 1e-3)
    assert round_schedule.error_of(shared, {name: mean[name] for name in trained}, 5, 1) is None


def test_the_commands_refuse_before_anything_takes_long(
    federation: Federation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, keys, roster = tmp_path / "federate.yaml", federation.folder / "keys", str(federation.folder / "roster")
    file.write_text(json.dumps(federation.asked))

    def run(command: str, *arguments: str) -> dict[str, Any]:
        with pytest.raises(SystemExit) as ended:
            main(["federate", command, str(file), *arguments, "--roster", roster, "--json"])
        assert ended.value.code == 2
        return dict(json.loads(capsys.readouterr().out.splitlines()[-1])["error"])

    lead = ("--key", str(keys / COORDINATOR), "--out", str(tmp_path / "out"))
    assert "most_examples is auto" in run("coordinator", *lead, "--rules.most_examples", "auto")["problem"]
    assert "cohort has 2" in run("coordinator", *lead, "--clients", "ward-a", "ward-b")["problem"]
    follow = (
        "--dataset",
        str(federation.datasets["ward-a"]),
        "--name",
        "ward-a",
        "--socket",
        str(tmp_path / "s.sock"),
    )
    assert "the roster has the key" in run("client", *follow, "--key", str(keys / "ward-b"))["problem"]
    assert (
        "no such user" in run("client", *follow, "--key", str(keys / "ward-a"), "--hear", "nobody-of-here")["problem"]
    )
    assert not (tmp_path / "out.rounds").exists() and not Path("ward-a.sqlite").exists()
