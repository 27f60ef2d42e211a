"""Probes of retrains and of personal versions: what is compared, trained and brought in, with whatever costs time stubbed."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dispatch_fakes import FakeCrew, admit
from option_probes import Probe, Workspace, beside_default, probes_of
from rows import example
from sample_data import ROWS, write_jsonl
from sartor.core.confidence_sequences import FailureRate
from sartor.core.config import load
from sartor.core.errors import UnknownAgentError
from sartor.core.records import Feedback, FeedbackAuthor
from sartor.learn import (
    personal_tuning,
    promotion_checks,
    retrain,
    training_data,
    triggers,
    user_erasure,
)
from sartor.learn.personal_options import PersonalOptions
from sartor.learn.run_record import Live
from sartor.personalization.acceptance import JudgedRows, PairedLosses, accept
from sartor.serving.dispatch.dispatcher import Dispatcher
from sartor.serving.feedback_store import FeedbackStore
from sartor.serving.receipts import team_digest
from sartor.serving.registry.registry import Registry
from sartor.serving.registry.registry_schema import AgentVersion
from sartor.serving.registry.user_versions import required_user_digest
from sartor.serving.team_config import PersonalTerms, Retraining, Team

# --- a new version against the live one


def _compared() -> list[dict[str, Any]]:
    """Scores of 40 rows: the new version loses most of the kitchen's and nothing of the others'."""
    rows = []
    for index in range(40):
        room = "kitchen" if index < 20 else "hall" if index < 36 else "attic"
        reference = json.dumps({"room": room, "on": index % 2})
        scores = {"live": 0.8, "new": 0.2 if room == "kitchen" else 0.8}
        rows.append({"id": f"r{index}", "group": f"g{index}", "reference": reference, **scores})
    return rows


def _checks(values: Any, workspace: Workspace) -> Any:
    """Checks of a new version that has lost much, and slices that are too few to be judged."""
    rules = load(Retraining, {"gate": values}).gate
    judgement = promotion_checks.judge({"held_out": _compared(), "feedback": [], "ratings": []}, Counter(), rules)
    return {name: check.outcome for name, check in judgement.checks.items()}, promotion_checks.unjudged(
        _compared(), rules
    )


def _job(workspace: Workspace, values: Any, **fields: Any) -> Any:
    """A retrain of `faq` as its stages see it."""
    state = workspace.folder()
    record = SimpleNamespace(number=1, live=Live("1", "release-1", "id"))
    facts = {"release": {"release": "r", "version": "2"}, "gate": {"gain": 0.1}, "tune": {"adapter": "a"}}
    run = SimpleNamespace(record=record, facts=facts.__getitem__, folder=state, done=lambda name: False)
    wishes = SimpleNamespace(anyway=True, ignore=(), waivers=(), promote=False)
    team = load(Team, {"base": "tiny", "state": str(state), "retrain": values})
    return SimpleNamespace(
        team=team,
        rules=team.retrain,
        run=run,
        agent="faq",
        wishes=wishes,
        at=lambda name: state / name,
        notice=print,
        **fields,
    )


def _judged(values: Any, workspace: Workspace) -> Any:
    """The gate of a retrain whose new version has lost much."""
    workspace.patch.setattr(
        retrain, "rows_by_kind", lambda job: {"held_out": _compared(), "feedback": [], "ratings": []}
    )
    workspace.patch.setattr(retrain.look_ledger, "count_looks", lambda run: Counter())
    return retrain.gate(_job(workspace, values))["checks"]


def _held_out(values: Any, workspace: Workspace) -> Any:
    """Rows that a retrain compares on, of 30 that the live version's Dataset holds out."""
    rows = [example(f"q{index}", "a", index) for index in range(30)]
    workspace.patch.setattr(training_data.parquet_io, "read_examples", lambda dataset, split: rows)
    workspace.patch.setattr(training_data.look_ledger, "count_looks", lambda run: Counter())
    dataset: Any = SimpleNamespace(manifest={})
    return len(training_data._held_out(_job(workspace, {"gate": values}), dataset, []))


GATE_PROBES = (
    *probes_of(
        "NotWorse",
        _checks,
        {"margin": (0.02, 0.9), "slice_margin": (0.1, 0.9), "slices": ([], ["on"]), "slice_rows": (6, 20)},
    ),
    *probes_of("NotWorse", _held_out, {"rows": (400, 10)}),
)

# --- the stages of a retrain


def _rehearsed(values: Any, workspace: Workspace) -> Any:
    """How many rows a retrain on eight corrections trains on; the live version's own Dataset has 60."""
    sides = {
        "feedback": [replace(example(f"asked {index}", "better", index), split="train") for index in range(8)],
        "own": [example(f"q{index}", "a", index) for index in range(60)],
    }
    trained: list[int] = []
    workspace.patch.setattr(training_data.parquet_io, "read_examples", lambda dataset, split=None: sides[dataset])
    workspace.patch.setattr(training_data, "keys_of_lines", lambda inbox: {})
    workspace.patch.setattr(training_data, "_held_out", lambda job, dataset, corrections: [])
    workspace.patch.setattr(training_data, "_write", lambda out, parents, train, held_out: trained.append(len(train)))
    workspace.patch.setattr(training_data.promotion_checks, "by_key", lambda ratings: {"k": FailureRate()})
    job = _job(workspace, values, own_rows=lambda: "own")
    return training_data.write_training_data(job, "feedback").rehearsal, trained  # type: ignore[arg-type]


def _learnt(values: Any, workspace: Workspace) -> Any:
    """How many of 24 corrections a retrain holds out."""
    live = SimpleNamespace(manifest={"use": "commercial"})
    job = _job(
        workspace, values, live=lambda: live, own_rows=lambda: SimpleNamespace(path=Path(), manifest={"files": []})
    )
    inbox = FeedbackStore(Path(job.team.state) / "inbox")
    for index in range(24):
        inbox.add(_correction(index))
    return Counter(row.split for row in training_data.parquet_io.read_examples(training_data.collect_feedback(job)))


def _correction(index: int, user: str = "", agent: str = "faq@1") -> Feedback:
    """A correction of one of several users; its date is fixed."""
    row = ROWS[index % len(ROWS)]["messages"]
    author = FeedbackAuthor("", user, "given")
    return Feedback(
        f"{index:032x}",
        agent,
        "2026-11-20T10:00:00Z",
        correction=row[1]["content"].upper(),
        messages=(row[0],),
        reply=row[1]["content"],
        by=author,
    )


def _trained(values: Any, workspace: Workspace) -> Any:
    """The plan of a leg of the tuning."""
    recipe = {"base": "tiny", "data": {"path": "rows"}, "method": {"rank": 4}, "optimizer": {"learning_rate": 1e-3}}
    workspace.patch.setattr(retrain, "open_artifact", lambda path, kind: SimpleNamespace(path=Path(path)))
    workspace.patch.setattr(training_data, "read_recipe", lambda manifest: recipe)
    workspace.patch.setattr(retrain, "is_auto_batch", lambda release: False)
    received: list[Any] = []
    done = SimpleNamespace(adapter=SimpleNamespace(path="a", manifest={"run": {"loss": {}}}))
    workspace.patch.setattr(retrain, "train", lambda recipe, out, **more: received.append(recipe) or done)
    job = _job(workspace, values)
    job.run.facts = {"curate": {"legs": ["sft"]}}.__getitem__
    retrain.tune(job)
    return [(each["budget"], each["optimizer"], each["method"]["rank"]) for each in received]


def _signed(values: Any, workspace: Workspace) -> Any:
    """With what bytes a Release is signed."""
    for name in ("one", "two"):
        (workspace.path / name).write_text(name)
    read: list[str] = []
    workspace.patch.setattr(retrain, "sign", lambda adapter, key, **more: read.append(Path(key).read_text()))
    workspace.patch.setattr(retrain, "read_registry", lambda team: SimpleNamespace(versions={}))
    workspace.patch.setattr(retrain, "open_artifact", lambda path, kind: None)
    workspace.patch.setattr(retrain.ancestry, "test_datasets", lambda adapter: [])
    live = SimpleNamespace(manifest={"version": "1", "name": "faq", "files": {}})
    retrain.release(_job(workspace, {"key": str(workspace.path / values["key"])}, live=lambda: live))
    return read


def _brought_in(values: Any, workspace: Workspace) -> Any:
    """What fraction of requests a served team's new version gets."""
    fractions: list[float] = []
    workspace.patch.setattr(retrain, "add_agent", lambda *arguments, **more: None)
    workspace.patch.setattr(retrain.server_presence, "running", lambda state: True)
    workspace.patch.setattr(retrain, "promote_agent", lambda *arguments, canary, **more: fractions.append(canary))
    return retrain.register_version(_job(workspace, values))["reason"], fractions


def _stepped_back(values: Any, workspace: Workspace) -> Any:
    """The priority and the memory that the process gives itself."""
    calls: list[Any] = []
    workspace.patch.setattr(retrain.os, "setpriority", lambda *arguments: calls.append(arguments))
    workspace.patch.setattr(retrain, "limit_data", calls.append)
    retrain._step_back(load(Retraining, values))
    return calls


def _learners(values: Any, workspace: Workspace) -> Any:
    """The agents of a team's file that are looked at, and whether there is enough to learn from."""
    folder = workspace.folder()
    file = folder / "team.yaml"
    members = [{"name": name, "release": name} for name in ("faq", "home")]
    file.write_text(json.dumps({"base": "tiny", "agents": members, "retrain": values}))
    workspace.patch.setattr(triggers, "live_version", lambda team, name: Live("1", "", ""))
    return [row["agent"] for row in triggers.list_due(file).rows]


RETRAIN_PROBES = (
    *probes_of("Retraining", _rehearsed, {"rehearsal": (4.0, 1.0)}),
    *probes_of("Retraining", _learnt, {"eval_fraction": (0.25, 0.75)}),
    *probes_of("Retraining", _trained, {"tuning": (None, {"budget": {"epochs": 5}, "method": {"rank": 2}})}),
    *probes_of("Retraining", _judged, {"gate": ({"margin": 0.02}, {"margin": 0.9})}),
    *probes_of("Retraining", _signed, {"key": ("one", "two")}),
    *probes_of("Retraining", _brought_in, {"canary": (0.1, 0.5)}),
    *probes_of("Retraining", _stepped_back, {"nice": (10, 19), "memory_bytes": (0, 1 << 40)}),
    *probes_of("Retraining", _learners, {"agents": ([], ["home"])}),
    Probe("Team.retrain", ({}, {"agents": ["home"]}), _learners),
)

# --- personal versions


class _Tuned(Exception):
    """What a tuning was to learn from, and how; it ends there."""


class _Stack:
    """The base with room for a user's ranks."""

    start = personal_ranks = None

    def __init__(self, recipe: Any, rank: int) -> None:
        self.resident, self.rank = SimpleNamespace(recipe=recipe), rank
        self.fresh: dict[str, Any] = {}

    def tuned(self, rows: Any, start: Any, ranks: Any, budget: Any, learning_rate: float) -> Any:
        """Tell what is tuned on, and how."""
        raise _Tuned(rows.dataset_rows, self.rank, budget, learning_rate, self.resident.recipe.seed)


def _stub_tuning(folder: Path, workspace: Workspace) -> None:
    """Put stubs in the place of the base, the Release and the tokens of a personal tuning."""
    none = JudgedRows([], [])
    release = SimpleNamespace(id="id", path=folder, manifest={"system_prompt": "", "base": {"digest": "d"}})
    stubs: dict[str, Any] = {
        "_release_of": lambda team, live: release,
        "own_rows": lambda dataset, rows: none,
        "probe_rows": lambda release, stack, rule: none,
        "load_file": lambda path: {},
        "recipe_of": lambda release, base, changes: {**changes, "base": "tiny"},
        "encode_rows": lambda dataset, recipe, chat: SimpleNamespace(
            train=[None],
            dataset_rows=sorted((row.split, row.reply) for row in training_data.parquet_io.read_examples(dataset)),
        ),
    }
    for name, stub in stubs.items():
        workspace.patch.setattr(personal_tuning, name, stub)
    base = SimpleNamespace(digest="d", path=folder, name="tiny")
    workspace.patch.setattr(personal_tuning.model_refs, "locate_base", lambda name: base)
    workspace.patch.setattr(
        personal_tuning.SharedBase,
        "open",
        lambda recipe, notice: SimpleNamespace(recipe=recipe, base=SimpleNamespace(chat=None)),
    )
    workspace.patch.setattr(
        personal_tuning.StackedAdapter, "open", lambda resident, shared, rank: _Stack(resident.recipe, rank)
    )


def _personal(values: Any, workspace: Workspace) -> Any:
    """The rows of a user's tuning, and its ranks, budget, rate and seed; nothing is tuned."""
    folder = workspace.folder()
    _stub_tuning(folder, workspace)
    team = load(Team, {"base": "tiny", "state": str(folder)})
    file = write_jsonl(folder / "other.jsonl", ROWS[:9])
    inbox = FeedbackStore(folder / "inbox")
    for index in range(16):
        inbox.add(_correction(index, required_user_digest("ada" if index < 12 else "ben", team_digest(folder))))
    registry = Registry.open(team.registry_url)
    registry.add(AgentVersion("faq", "1", "/faq-1", "id", "faq-1"))
    registry.close()
    options = {"agent": "faq", "user": "ada", **values}
    if options.get("data") == "file":
        options["data"] = str(file)
    try:
        return personal_tuning.tune_personal(team, PersonalOptions(**options))
    except _Tuned as tuning:
        return tuning.args
    except UnknownAgentError as error:
        return error.problem


def _own_ranks(values: Any, workspace: Workspace) -> Any:
    """How many ranks a tuning has that names no number of them."""
    opened: list[int] = []
    release = SimpleNamespace(path=workspace.path, manifest={"base": {"digest": "d"}})
    _stub_tuning(workspace.path, workspace)
    workspace.patch.setattr(
        personal_tuning.StackedAdapter,
        "open",
        lambda resident, shared, rank: opened.append(rank) or _Stack(resident.recipe, rank),
    )
    workspace.patch.setattr(
        personal_tuning, "encode_rows", lambda dataset, recipe, chat: SimpleNamespace(train=[None])
    )
    team = SimpleNamespace(base="tiny", personal=load(PersonalTerms, values))
    context = SimpleNamespace(options=PersonalOptions("faq", "ada"), release=release, team=team, live=None)
    personal_tuning._prepare(context, SimpleNamespace(path=workspace.path), print)  # type: ignore[arg-type]
    return opened


def _accepted(values: Any, workspace: Workspace) -> Any:
    """Why a user's version that is a little worse may not answer."""
    judged = JudgedRows([SimpleNamespace(supervised_tokens=5)] * 8, [str(index) for index in range(8)])  # type: ignore[list-item]
    private, probe = (PairedLosses(judged, [2.0] * 8, [loss] * 8) for loss in (2.02, 2.05))
    return accept(private, probe, personal_tuning.acceptance_rule(load(PersonalTerms, values))).why


async def _loaded(values: Any, workspace: Workspace) -> Any:
    """How many personal adapters a dispatcher holds after four users asked."""
    folder = workspace.folder()
    team = load(Team, {"base": "tiny", "state": str(folder), "personal": values})
    registry = Registry.open(team.registry_url)
    dispatcher = Dispatcher(team, FakeCrew(), registry, admit)
    selector = dispatcher.user_versions
    for index in range(4):
        version = await admit(Path(f"/faq-{index}"), "faq")
        await selector._hold(SimpleNamespace(name=version.name), version)  # type: ignore[arg-type]
    count = selector.loaded_count
    await selector.close()
    registry.close()
    return count


def _proof(values: Any, workspace: Workspace) -> Any:
    """Where a proof of an erasure says that copies may still be."""
    team = load(Team, {"base": "tiny", "state": "state", "personal": values})
    return user_erasure._proof(team, "person", 1, user_erasure._Done())["backups"]


PERSONAL_PROBES = (
    *beside_default(
        "PersonalOptions",
        _personal,
        {
            "user": "ben",
            "agent": "home",
            "data": "file",
            "rank": 4,
            "epochs": 2.0,
            "learning_rate": 1e-4,
            "eval_fraction": 0.5,
            "seed": 1,
        },
    ),
    Probe("PersonalTerms.rank", ({"rank": 2}, {"rank": 3}), _own_ranks),
    *probes_of("PersonalTerms", _accepted, {"most_worse": (0.05, 0.001), "most_elsewhere": (0.1, 0.001)}),
    *probes_of("PersonalTerms", _loaded, {"held": (16, 2)}),
    *probes_of("PersonalTerms", _proof, {"backups": ([], ["tape 7"])}),
    Probe("Team.personal", ({}, {"backups": ["tape 7"]}), _proof),
)

PROBES: tuple[Probe, ...] = (*GATE_PROBES, *RETRAIN_PROBES, *PERSONAL_PROBES)
