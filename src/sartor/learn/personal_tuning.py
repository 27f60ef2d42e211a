"""The verb: rows of a user -> ranks of their own on an agent's live version -> served, or refused with the reason."""

from __future__ import annotations

import getpass
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from sartor.core import catalogue, config, model_refs
from sartor.core.artifacts import WEIGHTS, Artifact, open_artifact, write_artifact
from sartor.core.errors import ArtifactError, ConfigError, GateError, ModelError, SourceError, UnknownAgentError
from sartor.core.filesystem import make_parent, writer_lock
from sartor.inference.engine import adapter_digest
from sartor.personal import gate, rows
from sartor.personal.gate import Verdict
from sartor.personal.options import PersonalOptions
from sartor.personalization.stacked_adapter import Losses, Stack
from sartor.personalization.user_tokens import recipe_of
from sartor.serving.admission import release_copies
from sartor.serving.feedback_store import Inbox
from sartor.serving.receipts import team_digest
from sartor.serving.registry.registry import Cause, Registry
from sartor.serving.registry.registry_schema import Version
from sartor.serving.registry.user_versions import ADAPTER, TUNING, PeopleBook, Personal, folder_of, named, speakers
from sartor.serving.team_config import Team, load
from sartor.tune.dataset_encoding import encode_rows
from sartor.tune.recipe import Recipe
from sartor.tune.shared_base import Resident
from sartor.tune.tokenized_dataset import Rows

Notice = Callable[[str], object]


@dataclass(frozen=True)
class _Ground:
    """What a tuning stands on: the agent's live version, its Release, and the registry."""

    team: Team
    book: PeopleBook
    live: Version
    release: Artifact
    options: PersonalOptions
    person: str

    @property
    def cause(self) -> Cause:
        return Cause(getpass.getuser(), "sartor personal tune")

    @property
    def blank(self) -> Personal:
        """The registry's row before anything was tuned."""
        return Personal(self.person, self.options.agent, self.live.version, self.live.release_id)


def tune_personal(team: Team | Path | str, options: PersonalOptions, *, notice: Notice = lambda line: None) -> dict[str, Any]:
    """Tune a user's ranks on top of an agent's live version; a running server answers that user by it within a second.

    Raises GateError where it may not answer, and why; what the user had before goes on. SourceError for too few rows,
    UnknownAgentError, ConfigError for an adapter that is no plain LoRA, ModelError.
    """
    made = team if isinstance(team, Team) else load(Path(team))
    began = time.monotonic()
    with _opened(made, options) as ground, _workplace(made, ground) as folder:
        wanted = rows.Wanted(
            ground.person, options.agent, options.data, _speakers(ground), options.eval_fraction, options.seed,
            ground.release.manifest["system_prompt"],
        )  # fmt: skip
        collected = rows.collect(Inbox(Path(made.state) / "inbox"), wanted, folder)
        stack, own = _prepared(ground, collected.dataset, notice)
        asked, probe = gate.own_rows(collected.dataset, own), gate.probe_rows(ground.release, stack)
        gate.check_probe(probe, made.personal)
        notice(f"tuning {stack.rank} ranks on {len(own.train)} rows; {len(asked.rows)} are held out")
        recipe = stack.resident.recipe
        tuned, losses = stack.tuned(own, stack.start, stack.own, recipe.budget, recipe.optimizer.learning_rate)
        verdict = gate.judge(stack, tuned, asked, probe, made.personal)
        if verdict.why:
            ground.book.refuse(ground.blank, verdict.why, ground.cause)
            raise GateError(
                f"{options.agent} stays as it is for that user: {verdict.why}",
                "more rows of that user, fewer --epochs, a lower --learning-rate; or `personal` in TEAM.yaml has other limits",
            )
        about = {"person": ground.person, "agent": ground.live.name, "rank": stack.rank, "examples": len(own.train)}
        facts = _facts(stack, [collected.dataset, ground.release], about, losses, verdict)
        facts["run"]["wall_s"] = round(time.monotonic() - began, 3)
        adapter = _written(stack, tuned, folder / ADAPTER, facts)
        _serve(ground, adapter, verdict, {"rows": len(own.train), "held_out": len(asked.rows)})
        left_out = {**collected.left_out, **{reason: len(ids) for reason, ids in own.left_out.items()}}
        return {
            **about, "adapter": str(adapter.path), "held_out": len(asked.rows), "left_out": left_out, "loss": dict(losses),
            "gate": verdict.as_json(), "wall_s": facts["run"]["wall_s"],
        }  # fmt: skip


@contextmanager
def _opened(team: Team, options: PersonalOptions) -> Iterator[_Ground]:
    person = named(options.user, team_digest(Path(team.state)))
    with closing(Registry.open(team.registry_url)) as registry:
        read = registry.read()
        agent = read.agents.get(options.agent)
        live = read.versions.get(f"{options.agent}@{agent.live}") if agent and agent.state != "removed" else None
        if live is None:
            known = ", ".join(sorted(name for name, one in read.agents.items() if one.live)) or "none"
            raise UnknownAgentError(
                f"{options.agent!r} has no live version; there are: {known}", "sartor serve TEAM.yaml, or sartor agents add"
            )
        yield _Ground(team, PeopleBook(registry.database), live, _release_of(team, live), options, person)


def _release_of(team: Team, live: Version) -> Artifact:
    """The Release of the live version: the team's own copy, or where it was registered. Raises ArtifactError."""
    copy = release_copies.folder(Path(team.state)) / live.release_id
    found = open_artifact(copy if copy.is_dir() else Path(live.release), "release")
    if found.id != live.release_id:
        raise ArtifactError(f"{found.path} is not the Release of {live.name} any more", "sartor agents list")
    return found


def _speakers(ground: _Ground) -> Mapping[str, frozenset[str]]:
    with ground.book.database.read() as connection:
        return speakers(connection)


@contextmanager
def _workplace(team: Team, ground: _Ground) -> Iterator[Path]:
    """A folder of this tuning's own below the person's. That which the registry names in the end stays, and no other."""
    parent = folder_of(Path(team.state), ground.person, ground.options.agent)
    make_parent(parent)
    for above in (parent.parent.parent, parent.parent, parent):
        above.mkdir(mode=0o700, exist_ok=True)
    with writer_lock(parent / TUNING):
        folder = parent / secrets.token_hex(4)
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            named_ = ground.book.read(ground.person).known.get((ground.person, ground.options.agent))
            stays = Path(named_.path).parent if named_ and named_.path else None
            for other in (one for one in parent.iterdir() if one.is_dir() and one != stays):
                _remove(other)


def _remove(folder: Path) -> None:
    for path in [one for one in folder.iterdir() if one.is_dir()]:
        catalogue.forget(path)
    shutil.rmtree(folder)


def _prepared(ground: _Ground, dataset: Artifact, notice: Notice) -> tuple[Stack, Rows]:
    """The base with room for both adapters, and the user's rows as tokens."""
    options, said = ground.options, ground.release.manifest["base"]
    found = model_refs.locate_base(ground.team.base)
    if found.digest != said["digest"]:
        problem = f"{ground.live.name} was tuned on the base {said['digest'][:12]}, and {found.name} is {found.short_digest}"
        raise ModelError(problem, "base: the one that the team serves")
    optimizer = {"learning_rate": options.learning_rate, "batch_tokens": 1024}
    changes = {
        "base": {"name": ground.team.base, "bits": said.get("bits") if said.get("bits") in (4, 8) else "auto"},
        "data": {"path": str(dataset.path), "eval_rows": 256},
        "budget": {"epochs": options.epochs}, "optimizer": optimizer, "seed": options.seed,
    }  # fmt: skip
    recipe = config.load(Recipe, recipe_of(ground.release.path, found.path, changes))
    resident = Resident.open(recipe, notice)
    # files may hold factors in 16 bits, and some of those no numpy knows
    shared = {name: value.float().numpy() for name, value in load_file(ground.release.path / WEIGHTS).items()}
    stack = Stack.open(resident, shared, options.rank or ground.team.personal.rank)
    if strange := sorted(set(shared) ^ set(stack.fresh)):
        raise ConfigError(f"{ground.live.name} adapts other modules than its config says: {strange[0]}", "tune it anew")
    own = encode_rows(dataset, recipe, resident.base.chat)
    if not own.train:
        raise SourceError("no row of that user can be learnt from", "look at the rows")
    return stack, own


def _facts(stack: Stack, parents: list[Artifact], about: Mapping[str, Any], losses: Losses, verdict: Verdict) -> dict[str, Any]:
    facts = stack.facts(parents, parents[0].manifest["sources"], {"personal": {**about, "gate": verdict.as_json()}}, losses)
    return {**facts, "recipe": config.dump(stack.resident.recipe)}


def _written(stack: Stack, tuned: Any, out: Path, facts: Mapping[str, Any]) -> Artifact:
    def fill(part: Path) -> Mapping[str, Any]:
        stack.resident.write(tuned, part)
        return facts

    adapter = write_artifact(out, "adapter", fill)
    catalogue.register(adapter)
    return adapter


def _serve(ground: _Ground, adapter: Artifact, verdict: Verdict, counts: Mapping[str, int]) -> None:
    files = adapter.manifest["files"]
    row = replace(
        ground.blank, adapter=adapter_digest(files), artifact=adapter.id, path=str(adapter.path),
        facts={**counts, "rank": adapter.manifest["run"]["personal"]["rank"], "gate": verdict.as_json()},
    )  # fmt: skip
    ground.book.put(row, ground.cause)
