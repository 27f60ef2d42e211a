"""Probes of federated tuning: rules on a few small updates, one round of three clients on a tiny base, dealt-out rows."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from edge_jobs import job, rows
from option_probes import Observer, Probe, Workspace, probes_of, with_marks
from rows import example
from sartor.core import config
from sartor.core.artifacts import open_artifact
from sartor.core.errors import GuardError, SartorError
from sartor.core.filesystem import file_digest
from sartor.core.model_refs import BaseRef
from sartor.core.signing import keygen
from sartor.edge.tuning import memory_plan
from sartor.edge.tuning.budgeted_tuning import FallbackTuning
from sartor.federate.recipe import load
from sartor.federate.robust_aggregation import Krum, MultiKrum, NormBound, Screened, Trimmed
from sartor.federate.tuning import personal_adapters
from sartor.federate.tuning.client_shards import Shards
from sartor.federate.tuning.edge_client import DeviceFile, EdgeTask, devices_of
from sartor.federate.tuning.simulated_clients import open_clients
from sartor.federate.tuning.simulation import resolve_rules, simulate
from sartor.federate.updates import Update
from sartor.tune.shared_base import SharedBase
from tune_option_probes import dataset

# --- rules on updates


def _updates() -> list[Update]:
    """Seven updates of four values: five alike, one that is long, one that points away."""
    rng = np.random.default_rng(0)
    values = [np.array([1.0, 2.0, 3.0, 4.0]) + rng.normal(0, 0.2, 4) for _ in range(5)]
    values += [4.0 * values[0], -0.8 * values[1]]
    return [Update(f"client-{index}", {"weight": value.astype(np.float32)}) for index, value in enumerate(values)]


def _pooled(cls: type) -> Observer:
    def observe(values: Any, workspace: Workspace) -> Any:
        try:
            pooled = cls(**values).pool(_updates())
        except GuardError as error:
            return error.problem
        return pooled.tensors["weight"].tolist()

    return observe


RULE_PROBES = (
    *probes_of("NormBound", _pooled(NormBound), {"times_median": (1.0, 2.0)}),
    *probes_of("Trimmed", _pooled(Trimmed), {"fraction": (0.2, 0.4)}),
    *probes_of("Krum", _pooled(Krum), {"fraction": (0.0, 0.25)}),
    *probes_of("MultiKrum", _pooled(MultiKrum), {"fraction": (0.0, 0.25)}),
    *probes_of("Screened", _pooled(Screened), {"least_cosine": (0.0, -1.0), "most_times_median": (3.0, 9.0)}),
)

# --- how rows are dealt out


def _dealt(values: Any, workspace: Workspace) -> Any:
    rows = [example(f"q{index}", json.dumps({"intent": "ab"[index % 2]}), index) for index in range(30)]
    shards = Shards(**{"count": 3, "alpha": 0.3, "by": "intent", **values})
    return sorted(shards.deal(rows).items())


SHARD_PROBES = probes_of(
    "Shards", _dealt, {"count": (3, 4), "alpha": (0.3, 5.0), "by": ("intent", ""), "seed": (0, 1)}
)

# --- rounds


def _recipe(changes: dict[str, Any], workspace: Workspace) -> dict[str, Any]:
    base: dict[str, Any] = {
        "base": str(workspace.fixture("tiny_base")),
        "data": {"path": str(dataset("switches", workspace)), "attack_rows": 0},
        "method": {"rank": 4, "alpha": 16},
        "rounds": 1,
        "local": {"updates": 1},
        "optimizer": {"learning_rate": 1e-2, "batch_tokens": 128},
    }
    recipe = {**base}
    if changes.get("base") == "BASE":
        changes = {name: value for name, value in changes.items() if name != "base"}
    for part, value in changes.items():
        is_merged = isinstance(value, dict) and isinstance(base.get(part), dict) and part != "local"
        recipe[part] = {**base[part], **value} if is_merged else value
    if recipe["data"].get("path", "").startswith("dataset:"):
        recipe["data"]["path"] = str(dataset(recipe["data"]["path"].removeprefix("dataset:"), workspace))
    return recipe


_runs: dict[str, Any] = {}


def _simulated(changes: dict[str, Any], workspace: Workspace) -> Any:
    """Weights, held-out loss and attacks of one round of three clients; runs of one recipe are made once."""
    recipe = _recipe(changes, workspace)
    key = json.dumps(recipe, sort_keys=True)
    if key not in _runs:
        out = workspace.folder() / "adapter"
        shards = {"count": 3, "alpha": 5.0, "by": ".", "seed": 1}
        try:
            done = simulate(recipe, out, shards=shards)
        except SartorError as error:
            return f"{type(error).__name__}: {error.problem}"
        manifest = open_artifact(out).manifest
        _runs[key] = (
            file_digest(out / "adapter_model.safetensors"),
            manifest["run"]["metrics"],
            len(done.as_json()["attacks"]),
            sorted(done.personal["clients"]) if done.personal else None,
        )
    return _runs[key]


def _started(values: Any, workspace: Workspace) -> Any:
    """Weights of a round that goes on from fresh factors, or from those of an earlier run."""
    if not values["start"]:
        return _simulated({}, workspace)
    out = workspace.folder() / "earlier"
    simulate(_recipe({}, workspace), out, shards={"count": 3, "alpha": 5.0, "by": ".", "seed": 1})
    return _simulated({"method": {"start": str(out)}}, workspace)


def _part(part: str, **base: Any) -> Observer:
    return lambda values, workspace: _simulated({part: {**base, **values}}, workspace)


def _resolved(values: Any, workspace: Workspace) -> Any:
    """The noise and the weights that a run's rules come to."""
    shared = {"weight": np.zeros(1000, np.float32)}
    rules = resolve_rules(load({"base": "tiny", "rounds": 3, **values}), shared, 8, 40)
    return rules.noise, rules.most_examples, rules.clip, rules.assumed_colluders


def _loaded(values: Any, workspace: Workspace) -> Any:
    """Whether a recipe is taken, by its rounds."""
    return load({"base": "tiny", **values}).rounds


def _kept_activations(value: bool, workspace: Workspace) -> Any:
    """Of how many rows activations are kept."""
    kept: list[int] = []
    workspace.patch.setattr(SharedBase, "keep_frozen", lambda self, rows, cache_bytes: kept.append(len(rows)))
    open_clients(load(_recipe({"data": {"reuse_frozen": value}}, workspace)), [], Shards(3, 5.0, ".", 1))
    return kept


PRIVATE = {"epsilon": 5.0}
OF_ROWS = {"epsilon": 50.0, "level": "example", "batch_rows": 4}

ROUND_PROBES = (
    *probes_of(
        "FederateRecipe",
        _simulated,
        {
            "base": ("nowhere", "BASE"),
            "data": ({}, {"max_length_tokens": 42}),
            "method": ({"rank": 4}, {"rank": 2}),
            "rounds": (1, 2),
            "local": ({"updates": 1}, {"updates": 2}),
            "optimizer": ({"learning_rate": 1e-2}, {"learning_rate": 1e-3}),
            "rules": ({"clip": 10.0}, {"clip": 0.001}),
            "robust": (None, "median"),
            "seed": (0, 1),
        },
    ),
    *probes_of(
        "Ranked",
        lambda values, workspace: _loaded({"method": values}, workspace),
        {"dropout": (0.0, 0.1)},
        may_refuse=True,
    ),
    *probes_of("Ranked", _started, {"start": ("", "an adapter")}),
    Probe(
        "FederateRecipe.personal",
        (None, {"rank": 2, "updates": 1}),
        lambda value, workspace: _simulated({"personal": value} if value else {}, workspace),
    ),
    Probe("FederateRecipe.mode", ({"rounds": 2}, {"rounds": 2, "mode": "alternate"}), _simulated),
    *probes_of("LocalTraining", _part("local"), {"updates": (1, 3), "epochs": (1, 2)}),
    *probes_of(
        "Ranked",
        _part("method"),
        {"rank": (4, 2), "alpha": (16, 32), "targets": ("all-linear", ["q_proj"]), "ranks": ([], [4, 4, 1])},
    ),
    *probes_of(
        "LocalData",
        _part("data"),
        {
            "path": ("dataset:switches", "dataset:whole"),
            "eval_rows": (64, 2),
            "max_length_tokens": (1024, 42),
            "micro_batch_tokens": (2048, 64),
            "attack_rows": (0, 8),
        },
    ),
    Probe("LocalData.reuse_frozen", (False, True), _kept_activations),
    *probes_of("LocalData", _part("data", path="dataset:whole"), {"eval_fraction": (0.1, 0.5)}),
    *probes_of("RoundRules", _part("rules"), {"clip": (10.0, 0.001)}),
    *probes_of(
        "RoundRules",
        lambda values, workspace: _resolved({"rules": values}, workspace),
        {"noise": ("auto", 1.0), "most_examples": ("auto", 3)},
    ),
    *probes_of(
        "RoundRules",
        lambda values, workspace: _resolved({"rules": {"noise": 1.0, **values}}, workspace),
        {"assumed_colluders": ("auto", 1)},
    ),
    Probe("FederateRecipe.privacy", ({}, {"privacy": PRIVATE}), _resolved),
    *probes_of(
        "Privacy",
        lambda values, workspace: _resolved({"privacy": {**PRIVATE, **values}}, workspace),
        {"epsilon": (5.0, 1.0), "delta": (1e-5, 1e-7), "level": ("client", "example")},
    ),
    *probes_of(
        "Privacy",
        _part("privacy", **OF_ROWS),
        {"max_grad_norm": (1.0, 0.1), "batch_rows": (4, 2), "noise_multiplier": ("auto", 9.0)},
    ),
)

# --- versions of clients' own


def _personal(values: Any, workspace: Workspace) -> Any:
    """The ranks, updates and rate that each client's tuning gets, and what it is compared with; nothing is tuned."""
    calls: list[Any] = []
    lengths = [10, 12, 14, 16]
    rows = SimpleNamespace(
        train=[SimpleNamespace(ids=[0] * length, example_id=str(length)) for length in lengths], held_out=[]
    )

    def tuned(rows: Any, start: Any, ranks: Any, budget: Any, rate: float) -> Any:
        calls.append((len(rows.train), start, budget.updates, rate))
        return {}, {}

    def open_stack(resident: Any, shared: Any, rank: int) -> Any:
        calls.append(rank)
        stack = SimpleNamespace(tuned=tuned, start="shared", fresh="fresh", personal_ranks=slice(0, rank))
        stack.write = lambda tuned, out, facts, replace: artifact
        return stack

    recipe = load({"base": "tiny", "optimizer": {"batch_tokens": 16}, "personal": values})
    clients = SimpleNamespace(rows={"a": rows, "b": rows}, held_out=[], resident=None)
    artifact = SimpleNamespace(path=workspace.folder(), id="id")
    stubs: dict[str, Any] = {
        "load_file": lambda path: {},
        "examples_of": lambda clients: {},
        "own_rows": lambda clients, name, examples: SimpleNamespace(encoded=[]),
    }
    for name, stub in stubs.items():
        workspace.patch.setattr(personal_adapters, name, stub)
    workspace.patch.setattr(personal_adapters.StackedAdapter, "open", open_stack)
    workspace.patch.setattr(personal_adapters.PersonalTuning, "_fingerprint", lambda tuning, name: {"recipe": {}})
    workspace.patch.setattr(
        personal_adapters.PersonalTuning, "_facts", lambda tuning, name, updates, losses: {"run": {}}
    )
    workspace.patch.setattr(personal_adapters.benefit_report, "report", lambda benefits: {})
    workspace.patch.setattr(personal_adapters.benefit_report, "ClientBenefit", lambda *arguments: "")
    assert recipe.personal
    personal_adapters.personalise(clients, artifact, recipe, recipe.personal, again=True, notice=lambda line: None)  # type: ignore[arg-type]
    return calls


PERSONAL_PROBES = (
    *probes_of("PersonalRanks", _personal, {"rank": (8, 4), "learning_rate": (None, 1e-2), "compare": (False, True)}),
    *probes_of("PersonalRanks", _personal, {"epochs": (1, 3), "updates": (1, 5)}),
)

# --- devices


def _devices(values: Any, workspace: Workspace) -> Any:
    """Two devices, by their Datasets and stores; or why they cannot both take part."""
    folder = workspace.folder()
    for index, device in enumerate(({"data": "one", "store": "one"}, {"data": "two", "store": "two", **values})):
        (folder / f"{index}.yaml").write_text(json.dumps({**device, "key": "key"}))
    return sorted(devices_of([folder / "0.yaml", folder / "1.yaml"]))


class _Begun(Exception):
    """A device's work began."""


def _device_task(values: Any, workspace: Workspace, base: Path) -> EdgeTask:
    """A device's part of a round, with a key."""
    folder = workspace.folder()
    if not (workspace.path / "key").exists():
        keygen(workspace.path / "key", purposes=("receipt",))
    options = {"data": "rows", "store": str(folder / "store"), "key": "key", **values}
    options["key"] = str(workspace.path / options["key"])
    ref = BaseRef("tiny", base, "d" * 64, "MIT")
    return EdgeTask(config.load(DeviceFile, options), None, "r" * 64, ref, rows())  # type: ignore[arg-type]


def _begun(values: Any, workspace: Workspace) -> Any:
    """Whether a device begins a round's work, or why it declines."""

    def attempt(tuning: Any, plan: Any, limits: Any) -> Any:
        raise _Begun

    workspace.patch.setattr(FallbackTuning, "_attempt", attempt)
    # what an empty process takes is measured by starting one
    workspace.patch.setattr(memory_plan, "floor", lambda: memory_plan.MemoryBaseline(1_000_000, True))
    base = workspace.fixture("tiny_base")
    task = _device_task(values, workspace, base)
    work = job(base, workspace.folder(), 2)
    task.device.work.mkdir(parents=True)
    (task.device.work / "pace.json").write_text(json.dumps({"start_s": 4.0, "tokens_per_s": 10.0}))
    settings = load({"base": "tiny", "local": {"updates": 3}})
    try:
        workspace.patch.setattr(EdgeTask, "_tokens", lambda task, settings: 1000)
        task._check_time(work, settings, workspace.path)  # type: ignore[arg-type]
        task._tuned(work)
    except _Begun:
        return "begun"


def _stored(values: Any, workspace: Workspace) -> Any:
    """The base and the adapter in a device's store."""
    base = workspace.folder()
    (base / "model.safetensors").write_bytes(b"0" * 4000)
    task = _device_task(values, workspace, base)
    manifest = SimpleNamespace(run="run", number=1, work=SimpleNamespace(shared="s" * 64))
    stored = task._stored(manifest, {"weight": np.zeros(1000, np.float32)})  # type: ignore[arg-type]
    return [sorted(file.name for file in folder.iterdir()) for folder in stored]


DEVICE_PROBES = (
    *probes_of("DeviceFile", _devices, {"data": ("two", "three"), "store": ("two", "one")}, may_refuse=True),
    *probes_of(
        "DeviceFile",
        _begun,
        {"key": ("key", "nowhere"), "memory_bytes": (0, 2_000_000), "disk_bytes": (0, 1000), "wall_s": (0.0, 60.0)},
        may_refuse=True,
    ),
    *probes_of("DeviceFile", _stored, {"store_bytes": (0, 1000)}, may_refuse=True),
)

PROBES: tuple[Probe, ...] = (
    *PERSONAL_PROBES,
    *DEVICE_PROBES,
    *RULE_PROBES,
    *SHARD_PROBES,
    *with_marks(ROUND_PROBES, is_slow=True),
)
