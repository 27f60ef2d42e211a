"""The verb `personal tune`: tunes, tests and registers a user's version of an agent.

Two non-inferiority tests decide (`personalization/acceptance.py`), on the user's held-out rows and on rows of the live
version. A delta that learnt nothing passes, and changes nothing; one that may be worse than a limit does not.
"""

from __future__ import annotations

import getpass
import json
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from sartor.core import catalogue, config, model_refs
from sartor.core import parquet_io as stored
from sartor.core.artifacts import WEIGHTS, Artifact, open_artifact
from sartor.core.errors import ArtifactError, ConfigError, GateError, ModelError, SourceError, UnknownAgentError
from sartor.core.filesystem import make_parent, writer_lock
from sartor.core.records import Example
from sartor.core.splits import group_of
from sartor.inference.engine import adapter_digest
from sartor.learn import personal_rows
from sartor.learn.personal_options import PersonalOptions
from sartor.personalization.acceptance import AcceptanceResult, AcceptanceRule, JudgedRows, accept, too_few_rows
from sartor.personalization.stacked_adapter import StackedAdapter
from sartor.personalization.user_rows import canary_examples
from sartor.personalization.user_tokens import encode_probe, recipe_of
from sartor.serving.admission import release_copies
from sartor.serving.api_keys import read_mark
from sartor.serving.feedback_store import FeedbackStore
from sartor.serving.receipts import team_digest
from sartor.serving.registry.registry import ChangeCause, Registry
from sartor.serving.registry.registry_head import KEYED
from sartor.serving.registry.registry_schema import AgentVersion
from sartor.serving.registry.user_versions import (
    ADAPTER,
    TUNING,
    UserVersion,
    UserVersionStore,
    folder_of,
    required_user_digest,
    speakers,
)
from sartor.serving.team_config import PersonalTerms, Team, load
from sartor.tune.dataset_encoding import encode_rows
from sartor.tune.recipe import ResolvedRecipe
from sartor.tune.shared_base import SharedBase
from sartor.tune.tokenized_dataset import TokenizedDataset

# most probe rows of the live version: more would narrow the interval, and cost time
MOST_PROBE_ROWS = 64
_MORE_PROBE = "keep its Dataset where it was tuned, or tell where it is: sartor index DIR"


def acceptance_rule(terms: PersonalTerms) -> AcceptanceRule:
    """Return the rule by which a team accepts a user's version."""
    return AcceptanceRule(terms.most_worse, terms.most_elsewhere, _MORE_PROBE)


def gate_fields(result: AcceptanceResult) -> dict[str, Any]:
    """Return the result as the registry and the command show it."""
    return {
        "own": asdict(result.private),
        "elsewhere": asdict(result.probe),
        "verdict": result.private.verdict(higher_is_better=False),
        "why": result.why,
        "unit": "nats per token",
    }


def own_rows(dataset: Artifact, rows: TokenizedDataset) -> JudgedRows:
    """Return the user's held-out rows.

    Raises SourceError if there are too few rows to tune on, or too few held-out prompts to judge by.
    """
    group_by_id = {example.id: group_of(example) for example in stored.read_examples(dataset)}
    held_out = JudgedRows(rows.held_out, [group_by_id[row.example_id] for row in rows.held_out])
    if too_few := too_few_rows(len(rows.train), held_out.groups):
        raise SourceError(too_few, "wait for more feedback of that user, or --data FILE with more rows")
    return held_out


def probe_rows(release: Artifact, stack: StackedAdapter, rule: AcceptanceRule) -> JudgedRows:
    """Return the rows that show whether the live version's knowledge is kept.

    They are its Dataset's held-out rows where that is on this machine, and the Release's canaries, at most 64 in all.
    Raises SourceError for fewer than two groups, or too few to show by the rule that nothing was forgotten.
    """
    chat, max_tokens = stack.resident.base.chat, stack.resident.recipe.data.max_length_tokens
    usable = encode_probe([*_held_out(release), *canary_examples(release.manifest)], chat, max_tokens)
    probe = JudgedRows(usable.encoded[:MOST_PROBE_ROWS], usable.groups[:MOST_PROBE_ROWS])
    if len(set(probe.groups)) < 2:
        raise SourceError(
            f"{release.path} has {len(probe.encoded)} held-out rows that can be used here; what it may forget cannot "
            "be measured",
            _MORE_PROBE,
        )
    if problem := rule.probe_problem(probe.groups):
        raise SourceError(problem, _MORE_PROBE)
    return probe


def _held_out(release: Artifact) -> list[Example]:
    """Return the held-out rows of the Dataset that the Release's adapter was tuned on.

    Empty if it is not on this machine, or holds out nothing.
    """
    with suppress(ArtifactError, OSError, ValueError, KeyError):
        parents = json.loads((release.path / "sartor.json").read_bytes())["parents"]
        for parent in parents:
            if parent["kind"] == "dataset" and (path := catalogue.locate(parent["id"], parent["path"])):
                return [
                    example
                    for example in stored.read_examples(open_artifact(path, "dataset"))
                    if example.split == "eval"
                ]
    return []


Notice = Callable[[str], object]


@dataclass(frozen=True)
class _TuningContext:
    """Context of a tuning: the agent's live version, its Release, and the registry.

    generation: of the registry when it began; nothing is stored of a user who was forgotten since.
    """

    team: Team
    store: UserVersionStore
    live: AgentVersion
    release: Artifact
    options: PersonalOptions
    person: str
    generation: int

    @property
    def cause(self) -> ChangeCause:
        return ChangeCause(getpass.getuser(), "sartor personal tune")

    @property
    def blank(self) -> UserVersion:
        """Row of the registry before anything was tuned."""
        return UserVersion(self.person, self.options.agent, self.live.version, self.live.release_id)


def tune_personal(
    team: Team | Path | str, options: PersonalOptions, *, notice: Notice = lambda line: None
) -> dict[str, Any]:
    """Tune a user's ranks on top of an agent's live version.

    A running server answers that user with them within a second. Raises GateError with the reason if the version may
    not answer; what the user had before stays in use. Raises SourceError for too few rows, UnknownAgentError,
    ConfigError for an adapter that is no plain LoRA, ModelError.
    """
    loaded_team = team if isinstance(team, Team) else load(Path(team))
    began = time.monotonic()
    with _open_context(loaded_team, options) as context, _tuning_folder(loaded_team, context) as folder:
        with context.store.database.read() as connection:
            users_by_key = speakers(connection)
            has_keys = read_mark(connection) == KEYED
        query = personal_rows.RowQuery(
            person=context.person,
            agent=options.agent,
            data=options.data,
            speakers=users_by_key,
            has_keys=has_keys,
            eval_fraction=options.eval_fraction,
            seed=options.seed,
            system=context.release.manifest["system_prompt"],
        )
        collected = personal_rows.collect(FeedbackStore(Path(loaded_team.state) / "inbox"), query, folder)
        stack, rows = _prepare(context, collected.dataset, notice)
        rule = acceptance_rule(loaded_team.personal)
        held_out, probe = own_rows(collected.dataset, rows), probe_rows(context.release, stack, rule)
        notice(f"tuning {stack.rank} ranks on {len(rows.train)} rows; {len(held_out.encoded)} are held out")
        recipe = stack.resident.recipe
        tuned, losses = stack.tuned(
            rows,
            stack.start,
            ranks=stack.personal_ranks,
            budget=recipe.budget,
            learning_rate=recipe.optimizer.learning_rate,
        )
        acceptance = accept(stack.pair(tuned, held_out), stack.pair(tuned, probe), rule)
        if acceptance.why:
            context.store.refuse(context.blank, acceptance.why, context.cause, since=context.generation)
            raise GateError(
                f"{options.agent} stays as it is for that user: {acceptance.why}",
                "more rows of that user, fewer --epochs, a lower --learning-rate; or `personal` in TEAM.yaml has "
                "other limits",
            )
        summary = {
            "person": context.person,
            "agent": context.live.name,
            "rank": stack.rank,
            "examples": len(rows.train),
        }
        gate = gate_fields(acceptance)
        parents, run = [collected.dataset, context.release], {"personal": {**summary, "gate": gate}}
        facts = stack.facts(parents, collected.dataset.manifest["sources"], run, losses)
        facts["recipe"] = config.dump(recipe)
        facts["run"]["wall_s"] = round(time.monotonic() - began, 3)
        adapter = stack.write(tuned, folder / ADAPTER, facts)
        counts = {"rows": len(rows.train), "held_out": len(held_out.encoded)}
        _serve(context, adapter, {**counts, "rank": stack.rank, "gate": gate})
        left_out = {**collected.left_out, **rows.left_out_counts}
        return {
            **summary,
            "adapter": str(adapter.path),
            "held_out": len(held_out.encoded),
            "left_out": left_out,
            "loss": dict(losses),
            "gate": gate,
            "wall_s": facts["run"]["wall_s"],
        }


@contextmanager
def _open_context(team: Team, options: PersonalOptions) -> Iterator[_TuningContext]:
    person = required_user_digest(options.user, team_digest(Path(team.state)))
    with closing(Registry.of(team)) as registry:
        snapshot = registry.read()
        agent = snapshot.agents.get(options.agent)
        live = snapshot.versions.get(f"{options.agent}@{agent.live}") if agent and agent.state != "removed" else None
        if live is None:
            known = ", ".join(sorted(name for name, entry in snapshot.agents.items() if entry.live)) or "none"
            raise UnknownAgentError(
                f"{options.agent!r} has no live version; there are: {known}",
                "sartor serve TEAM.yaml, or sartor agents add RELEASE --team TEAM.yaml",
            )
        yield _TuningContext(
            team=team,
            store=UserVersionStore(registry.database),
            live=live,
            release=_release_of(team, live),
            options=options,
            person=person,
            generation=UserVersionStore(registry.database).read(person).generation,
        )


def _release_of(team: Team, live: AgentVersion) -> Artifact:
    """Return the Release of the live version: the team's own copy, or where it was
    registered. Raises ArtifactError.
    """
    copy = release_copies.folder(Path(team.state)) / live.release_id
    result = open_artifact(copy if copy.is_dir() else Path(live.release), "release")
    if result.id != live.release_id:
        raise ArtifactError(f"{result.path} is not the Release of {live.name} any more", "sartor agents list")
    return result


@contextmanager
def _tuning_folder(team: Team, context: _TuningContext) -> Iterator[Path]:
    """Hold a new folder of this tuning below the user's.

    In the end the folder that the registry names stays, and all others are deleted.
    """
    parent = folder_of(Path(team.state), context.person, context.options.agent)
    make_parent(parent / TUNING, is_private=True)
    with writer_lock(parent / TUNING):
        # an erasure that began before the lock was there has not seen this tuning
        context.store.check_not_forgotten(context.person, context.generation)
        folder = parent / secrets.token_hex(4)
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            version = context.store.read(context.person).versions.get((context.person, context.options.agent))
            current = Path(version.path).parent if version and version.path else None
            for stale in [item for item in parent.iterdir() if item.is_dir() and item != current]:
                for artifact in [item for item in stale.iterdir() if item.is_dir()]:
                    catalogue.forget(artifact)
                shutil.rmtree(stale)


def _prepare(context: _TuningContext, dataset: Artifact, notice: Notice) -> tuple[StackedAdapter, TokenizedDataset]:
    """Return the base with room for both adapters, and the user's tokenized rows."""
    options, base = context.options, context.release.manifest["base"]
    local = model_refs.locate_base(context.team.base)
    if local.digest != base["digest"]:
        problem = (
            f"{context.live.name} was tuned on the base {base['digest'][:12]}, and {local.name} is "
            f"{local.short_digest}"
        )
        raise ModelError(problem, "base: the one that the team serves")
    optimizer = {"learning_rate": options.learning_rate, "batch_tokens": 1024}
    changes = {
        "base": {"name": context.team.base, "bits": base.get("bits") if base.get("bits") in (4, 8) else "auto"},
        "data": {"path": str(dataset.path), "eval_rows": 256},
        "budget": {"epochs": options.epochs},
        "optimizer": optimizer,
        "seed": options.seed,
    }
    recipe = config.load(ResolvedRecipe, recipe_of(context.release.path, local.path, changes))
    resident = SharedBase.open(recipe, notice)
    # files may hold factors in 16 bits, some of which (bfloat16) numpy lacks
    shared = {name: value.float().numpy() for name, value in load_file(context.release.path / WEIGHTS).items()}
    stack = StackedAdapter.open(resident, shared, options.rank or context.team.personal.rank)
    if mismatched := sorted(set(shared) ^ set(stack.fresh)):
        raise ConfigError(
            f"{context.live.name} adapts other modules than its config says: {mismatched[0]}",
            "sartor tune RECIPE --out ADAPTER --replace, release it, then sartor agents promote NAME VERSION",
        )
    rows = encode_rows(dataset, recipe, resident.base.chat)
    if not rows.train:
        raise SourceError(
            "no row of that user can be learnt from",
            "sartor personal show TEAM --user USER lists them; --data FILE gives others",
        )
    return stack, rows


def _serve(context: _TuningContext, adapter: Artifact, facts: Mapping[str, Any]) -> None:
    row = replace(
        context.blank,
        adapter=adapter_digest(adapter.manifest["files"]),
        artifact=adapter.id,
        path=str(adapter.path),
        facts=facts,
    )
    context.store.put(row, context.cause, since=context.generation)
