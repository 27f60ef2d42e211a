"""The verb `federate simulate`: coordinator and clients in one process.

    Datasets, or one dealt out --rows--> clients --updates--> secure sum (or a declared robust rule) --mean--> shared
    adapter

Journals and keys stand beside OUT (`OUT.rounds`) until the Adapter is written: `resume` continues from them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sartor.core import catalogue, config, numerics, records
from sartor.core.artifacts import Adapter, check_output_free, kind_of, write_artifact
from sartor.core.errors import ConfigError
from sartor.core.filesystem import write_file_atomic, writer_lock
from sartor.core.licences import compliance
from sartor.core.progress import Progress
from sartor.federate.privacy.accountant import calibrated
from sartor.federate.privacy.client_noise import ClientNoise, sharers_of
from sartor.federate.privacy.privacy_attacks import AttackReport, open_report
from sartor.federate.recipe import MODES, FederateRecipe
from sartor.federate.recipe import load as load_recipe
from sartor.federate.rounds.round_manifest import Mode, UpdateRules, terms_for
from sartor.federate.secure.secagg_terms import default_colluders, least_threshold
from sartor.federate.tuning.attack_runner import AttackTarget, run_attacks
from sartor.federate.tuning.client_shards import Shards
from sartor.federate.tuning.edge_client import DeviceFile, EdgeTask, devices_of
from sartor.federate.tuning.personal_adapters import check_free as check_personal_free
from sartor.federate.tuning.personal_adapters import personalise
from sartor.federate.tuning.simulated_clients import Clients, open_clients
from sartor.federate.tuning.simulated_rounds import (
    InspectedRounds,
    ResidualRounds,
    Rounds,
    SecureRounds,
    SimulationSetup,
    TuningTask,
)
from sartor.models import adapters, hardware
from sartor.models.base import machine_facts
from sartor.models.lora_tensors import Tensors
from sartor.tune import resume as resumption
from sartor.tune.checkpoint import CheckpointState, full_disk
from sartor.tune.shared_base import SharedBase

Notice = Callable[[str], object]
_FINGERPRINT = "fingerprint.json"


@dataclass(frozen=True)
class Simulated:
    """Result of `simulate`: the Adapter, and the report on each client's personal Adapter, if any."""

    adapter: Adapter
    personal: Mapping[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the JSON output of the command."""
        run = self.adapter.manifest["run"]
        report = open_report(self.adapter.path)
        names = (
            "rounds",
            "clients",
            "uploaded_bytes",
            "upload_bytes_per_parameter",
            "exactness_error",
            "quantisation_error",
            "epsilon",
            "epsilon_without_collusion",
            "metrics",
            "trainable",
            "wall_s",
        )
        fields = {
            "adapter": str(self.adapter.path),
            # an Adapter of an older version has no epsilon_without_collusion
            **{name: run.get(name) for name in names},
            "attacks": list(report.sentences()),
        }
        return fields if self.personal is None else {**fields, "personal": dict(self.personal)}


def simulate(
    recipe: FederateRecipe | Mapping[str, Any] | Path | str,
    out: Path | str,
    *,
    clients: Sequence[Path | str] = (),
    shards: Shards | Mapping[str, Any] | None = None,
    resume: bool = False,
    replace: bool = False,
    notice: Notice = lambda line: None,
) -> Simulated:
    """Tune one adapter over many clients, all in this process, and write it to `out` as `tune` does.

    clients: a Dataset each, or a device file (`edge_client.DeviceFile`), whose work runs within its budget.
    shards: instead of clients, {count, alpha, by, seed} deals out the Dataset at the recipe's data.path.
    resume: continue after the last round that ended, with the same bits as an uninterrupted run (except for noise,
    which is drawn once).

    Raises ConfigError (recipe, clients, taken `out`, a run of something else), ArtifactError, SourceError (a client's
    Dataset), ModelError (base; a client whose loss explodes), RoundError (a cohort below 3), BudgetError (privacy),
    GuardError (a rule).
    """
    recipe, out = load_recipe(recipe), Path(out).absolute()
    # the personal tuning after the rounds does not change them
    personal, recipe = recipe.personal, dataclasses.replace(recipe, personal=None)
    shard_options = config.load_any(Shards, shards) if shards is not None else None
    folder = out.with_name(f"{out.name}.rounds")
    check_outputs(out, folder, resume=resume, replace=replace)
    if personal:
        check_personal_free(out, is_meant=resume or replace)
    with full_disk(f"{folder} could not be written"), writer_lock(folder):
        if replace:
            shutil.rmtree(folder, ignore_errors=True)
        devices = devices_of(clients)
        loaded_clients = open_clients(recipe, list(devices) or clients, shard_options, notice)
        rows_digest = records.digest({name: rows.digest() for name, rows in loaded_clients.rows.items()})
        fingerprint = fingerprint_of(recipe, loaded_clients, rows=rows_digest)
        if resume and (adapter := resumption.finished(out, CheckpointState(), fingerprint)):
            notice(f"{out} is finished: no round is left to do")
        else:
            setup = _setup(recipe, loaded_clients, folder, list(devices.values()))
            check_same(folder, fingerprint, str(loaded_clients.resident.dtype))
            adapter = _run(setup, loaded_clients, out, fingerprint, replace=replace, notice=notice)
            shutil.rmtree(folder, ignore_errors=True)
        if personal is None:
            return Simulated(adapter)
        report = personalise(loaded_clients, adapter, recipe, personal, again=replace, notice=notice)
    return Simulated(adapter, report)


def check_outputs(out: Path, folder: Path, *, resume: bool, replace: bool) -> None:
    """Raise ConfigError if the output is taken.

    The same if an unfinished run exists and neither flag says what to do with it, or if both flags are given.
    """
    if resume and replace:
        raise ConfigError(
            "--resume goes on and --replace starts over; both were given",
            f"--resume alone to go on in {folder}, or --replace alone",
        )
    if not (resume and kind_of(out) == "adapter"):
        check_output_free(out, replace=replace)
    if folder.exists() and not (resume or replace):
        problem = f"an unfinished run of {out} stands in {folder}"
        raise ConfigError(problem, "add --resume to go on there, or --replace to start over")
    folder.parent.mkdir(parents=True, exist_ok=True)


def _setup(recipe: FederateRecipe, clients: Clients, folder: Path, devices: Sequence[DeviceFile]) -> SimulationSetup:
    """Return the setup: tasks on one base in memory, or each on its device, with the rules resolved."""
    tasks: dict[str, TuningTask] = {**clients.tasks(recipe, folder / "rows")}
    if devices:
        _check_devices(recipe)
    resident = clients.resident
    for device, (name, rows) in zip(devices, clients.rows.items(), strict=False):
        tasks[name] = EdgeTask(device, resident.recipe, resident.digest, ref=resident.ref, rows=rows)
    start = resident.current_factors()
    largest = max(len(rows.train) for rows in clients.rows.values())
    rules = resolve_rules(recipe, start, len(tasks), largest)
    return SimulationSetup(recipe, rules, resident, tasks=tasks, start=start, folder=folder)


def _check_devices(recipe: FederateRecipe) -> None:
    """Raise ConfigError for features that a device's tuner lacks."""
    of_rows = recipe.privacy is not None and recipe.privacy.level == "example"
    for is_requested, feature in ((of_rows, "privacy of level example"), (recipe.method.ranks, "method.ranks")):
        if is_requested:
            raise ConfigError(
                f"the clients are devices, whose tuner has no {feature}",
                "--clients DATASET..., with no device, or leave that option out of the recipe",
            )


def resolve_rules(recipe: FederateRecipe, shared: Tensors, clients: int, largest: int) -> UpdateRules:
    """Return the rules of a run, with `auto` resolved.

    shared: the adapter, whose shapes give the number of values P. largest: examples of the largest client. `auto`
    noise is the least z with which all rounds stay within the budget. A sum of discrete Gaussians counts as the
    smaller z' (`ClientNoise.effective_multiplier`), so the noise is raised to z^2 / z'. Raises ConfigError,
    BudgetError.
    """
    round_rules = recipe.rules
    budget = recipe.of_clients
    noise = calibrated(budget, recipe.rounds) if budget and round_rules.noise == "auto" else recipe.noise_asked
    if round_rules.most_examples != "auto":
        max_examples = round_rules.most_examples
    elif noise or recipe.privacy:
        # a weight by the number of rows would reveal rows
        max_examples = 1
    else:
        max_examples = largest
    mode: Mode = "inspectable" if recipe.robust else "private"
    rules = UpdateRules(clip=round_rules.clip, noise=noise, most_examples=max_examples, mode=mode)
    threshold = least_threshold(clients)
    if noise:
        asked = recipe.colluders_asked
        colluders = default_colluders(clients) if asked is None else asked
        rules = dataclasses.replace(rules, assumed_colluders=colluders)
        # also where the noise is given: a run whose noise nobody is sure to add should not begin
        sharers_of(threshold, colluders)
    if not (noise and round_rules.noise == "auto"):
        return rules
    # z' is lowest for the largest upload of any round, so P counts all factors
    upload = MODES[recipe.mode].sent(shared, 1)
    layout = terms_for([f"client-{index}" for index in range(clients)], upload, rules, seed="0" * 64).layout
    client_noise = ClientNoise(rules.clip, noise, sharers_of(threshold, colluders), layout[0].scale)
    effective = client_noise.effective_multiplier(sum(value.size for value in shared.values()))
    return dataclasses.replace(rules, noise=noise * noise / effective * (1 + 1e-4))


def fingerprint_of(recipe: FederateRecipe, clients: Clients, /, **of_clients: Any) -> dict[str, Any]:
    """Return what determines the result, and what a resumed run must have in common with the one that began."""
    resident, start = clients.resident, clients.start
    return {
        "recipe": config.dump(recipe),
        "base": resident.ref.digest,
        "template": resident.base.chat.template_digest,
        # absent without one, as in runs that an older version began
        **({"start": records.digest(start.manifest["files"])} if start else {}),
        **of_clients,
    }


def check_same(folder: Path, fingerprint: Mapping[str, Any], dtype: str) -> None:
    """Raise ConfigError if the journals in `folder` are of another run or arithmetic; else record this run's.

    dtype: in which the base computes here; also assumed for older journals that do not state it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / _FINGERPRINT
    if file.exists():
        recorded = json.loads(file.read_text(encoding="utf-8"))
        if differing := resumption.differences(recorded, fingerprint):
            problem = f"the rounds in {folder} are of another run: {'; '.join(differing)}"
            raise ConfigError(problem, "undo the change, or start over with --replace")
        if difference := numerics.difference(recorded.get("numerics"), recorded.get("dtype", dtype)):
            problem = f"the rounds in {folder} were begun by {difference}"
            raise ConfigError(problem, "start over with --replace; the Sartor that began them can finish them")
        return
    write_file_atomic(
        file,
        records.canonical(
            {**fingerprint, "dtype": dtype.removeprefix("torch."), "numerics": numerics.numerics(dtype)}
        ),
    )


def _run(
    setup: SimulationSetup,
    clients: Clients,
    out: Path,
    fingerprint: Mapping[str, Any],
    *,
    replace: bool,
    notice: Notice,
) -> Adapter:
    """Run all rounds that are left, then the attacks, and write the Adapter."""
    began, recipe = time.monotonic(), setup.recipe
    rounds: Rounds
    if recipe.robust is None:
        rounds = SecureRounds(setup, recipe.of_clients)
    else:
        rounds = (ResidualRounds if recipe.mode == "residual" else InspectedRounds)(setup, recipe.robust)
    with contextlib.closing(rounds):
        for line in clients.summary_lines(setup.rules):
            notice(line)
        if rounds.lines:
            notice(f"going on after round {len(rounds.lines)} of {recipe.rounds}")
        with Progress("simulate", recipe.rounds - len(rounds.lines), "rounds", notice) as progress:
            while len(rounds.lines) < recipe.rounds:
                rounds.step()
                notice(round_line(rounds.lines[-1], recipe.rounds))
                progress.advance()
        shared, lines = rounds.shared, rounds.lines
    target = AttackTarget(
        setup, shared, rows=clients.rows, held_out=clients.held_out, most_rows=recipe.data.attack_rows
    )
    report = run_attacks(target, notice)
    facts = facts_of(setup, clients, lines, shared, fingerprint)
    facts["run"]["wall_s"] = round(time.monotonic() - began, 3)
    return write_adapter(out, clients.resident, lines, shared, facts, report, replace=replace)


def write_adapter(
    out: Path,
    resident: SharedBase,
    lines: Sequence[Mapping[str, Any]],
    shared: Tensors,
    facts: Mapping[str, Any],
    report: AttackReport,
    *,
    replace: bool,
) -> Adapter:
    """Write the Adapter: its log with a line for each round, PEFT's files, the attack report and the manifest.

    shared: LoRA factors A (R, in), B (out, R).
    """

    def fill(part: Path) -> Mapping[str, Any]:
        (part / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
        resident.write(shared, part)
        report.write(part)
        return facts

    adapter = write_artifact(out, "adapter", fill, replace=replace)
    catalogue.register(adapter)
    return adapter


def round_line(line: Mapping[str, Any], rounds: int) -> str:
    """Return the metrics of a round as a line of the log."""
    loss = "" if line["loss_first"] is None else f"loss {line['loss_first']:.3f} -> {line['loss_last']:.3f}, "
    clipped = f", {line['clipped']} of {line['clients']} updates clipped" if line["clipped"] else ""
    epsilon = "" if line["epsilon"] is None else f", epsilon {line['epsilon']:.3g}"
    # absent in lines of an older version
    if (without := line.get("epsilon_without_collusion")) is not None:
        epsilon += f" ({without:.3g} if nobody colludes)"
    verdicts = "".join(f"; {verdict}" for verdict in line["verdicts"])
    exact = "not measured" if line["exactness_error"] is None else f"{line['exactness_error']:.1e}"
    return f"round {line['round']} of {rounds}: {loss}exactness error {exact}{clipped}{epsilon}{verdicts}"


def facts_of(
    setup: SimulationSetup,
    clients: Clients,
    lines: Sequence[Mapping[str, Any]],
    shared: Tensors,
    fingerprint: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the manifest of the Adapter: that of `tune`, with the facts of the rounds.

    shared: LoRA factors A (R, in), B (out, R).
    """
    resident, base = clients.resident, clients.resident.base
    mode, rules = MODES[setup.recipe.mode], setup.rules
    resident.hold(lambda name: True)
    _, parameter_count = adapters.trainable(resident.model)
    # without the frozen ranks of a residual
    trained = sum(value.size for value in setup.start.values())
    uploaded = sum(line["uploaded_bytes"] for line in lines)
    sent_values = 0
    for line in lines:
        sent = mode.sent(setup.start, line["round"])
        sent_values += line["clients"] * sum(value.size for value in sent.values())
    rounding = [line["quantisation_error"] for line in lines]
    errors = [line["exactness_error"] for line in lines]
    return {
        "base": base.as_manifest(),
        "recipe": config.dump(setup.recipe),
        "parents": [parent.as_parent() for parent in clients.parents],
        "sources": clients.sources,
        "licence": compliance.combine([*(parent.licence for parent in clients.parents), base.ref.licence]),
        "left_out": clients.left_out,
        "run": {
            "federated": {
                "task": "lora",
                "mode": mode.kind,
                "sum": setup.recipe.robust.kind if setup.recipe.robust else "secure",
                "rules": config.dump(rules),
                "examples": {name: len(rows.train) for name, rows in clients.rows.items()},
            },
            "rounds": len(lines),
            "clients": len(clients.rows),
            "uploaded_bytes": uploaded,
            "upload_bytes_per_parameter": round(uploaded / sent_values, 4),
            "exactness_error": None if None in errors else max(errors),
            "quantisation_error": None if None in rounding else max(rounding),
            "epsilon": lines[-1]["epsilon"],
            "epsilon_without_collusion": lines[-1].get("epsilon_without_collusion"),
            "metrics": {"eval_loss": clients.losses(shared)},
            "loss": {"first": lines[0]["loss_first"], "last": lines[-1]["loss_last"], "eval": None},
            "peak_memory_bytes": hardware.peak_bytes(),
            "trainable": trained,
            "trainable_fraction": trained / parameter_count,
        },
        "machine": machine_facts(),
        "versions": {name: importlib.metadata.version(name) for name in ("sartor", "torch", "transformers", "peft")},
        # without the recipe, which stands beside it
        "fingerprint": {name: digest for name, digest in fingerprint.items() if name != "recipe"},
    }
