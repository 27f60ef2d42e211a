"""Verb personal tune: tune, test, register.

Both are non-inferiority tests: the upper end of the 95 % interval over groups (`evaluate.compare`) may not lie above a
margin. A delta that learnt nothing passes, and changes nothing; one that is worse than it may be does not.
"""

from __future__ import annotations

import getpass
import json
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from sartor.core import catalogue, config, model_refs
from sartor.core import parquet_io as stored
from sartor.core.artifacts import WEIGHTS, Artifact, open_artifact, write_artifact
from sartor.core.errors import ArtifactError, ConfigError, GateError, ModelError, SourceError, UnknownAgentError
from sartor.core.filesystem import make_parent, writer_lock
from sartor.core.records import Example
from sartor.core.splits import group_of
from sartor.evaluate.bootstrap import LEAST_WIDTH, Comparison, paired_bootstrap
from sartor.evaluate.predictions import HeldOut
from sartor.inference.engine import adapter_digest
from sartor.learn import personal_rows
from sartor.learn.personal_options import PersonalOptions
from sartor.models.lora_tensors import Tensors
from sartor.models.packing import TokenizedExample
from sartor.personalization import benefit_report
from sartor.personalization.acceptance import LEAST_HELD_OUT, LEAST_TRAINED, too_few_prompts
from sartor.personalization.stacked_adapter import Losses, StackedAdapter
from sartor.personalization.user_rows import example_of
from sartor.personalization.user_tokens import encode_user_row, recipe_of
from sartor.serving.admission import release_copies
from sartor.serving.feedback_store import FeedbackStore
from sartor.serving.receipts import team_digest
from sartor.serving.registry.registry import ChangeCause, Registry
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
from sartor.tune.recipe import Recipe
from sartor.tune.shared_base import SharedBase
from sartor.tune.tokenized_dataset import TokenizedDataset

# Held-out rows of the live version that are looked at: more narrow the interval, and cost time
MOST_PROBE_ROWS = 64
_MORE_PROBE = "keep its Dataset where it was tuned, or tell where it is: sartor index DIR"


@dataclass(frozen=True)
class JudgedRows:
    """Rows to be judged by, and the group of each."""

    rows: Sequence[TokenizedExample]
    groups: Sequence[str]


@dataclass(frozen=True)
class AcceptanceResult:
    """Nats a token, before (the live version) and after. why: empty if it may answer. verdict: what the own interval says."""

    own: Comparison
    elsewhere: Comparison
    verdict: str
    why: str

    def as_json(self) -> dict[str, Any]:
        """What the registry and the command say."""
        return {**asdict(self), "unit": "nats per token"}


def own_rows(dataset: Artifact, rows: TokenizedDataset) -> JudgedRows:
    """The user's held-out rows. Raises SourceError where there are too few to tune on, or to tell anything by."""
    group = {example.id: group_of(example) for example in stored.read_examples(dataset)}
    asked = JudgedRows(rows.held_out, [group[row.example_id] for row in rows.held_out])
    if len(rows.train) < LEAST_TRAINED or len(set(asked.groups)) < LEAST_HELD_OUT:
        raise SourceError(
            f"{len(rows.train)} rows to tune on and {len(set(asked.groups))} held-out prompts are too few; "
            f"{LEAST_TRAINED} and {LEAST_HELD_OUT} are needed",
            "wait for more feedback of that user, or --data FILE with more rows",
        )
    return asked


def probe_rows(release: Artifact, stack: StackedAdapter) -> JudgedRows:
    """What the live version must go on to know: its Dataset's held-out rows where that is here, else the Release's canaries.

    Raises SourceError where there are fewer than two of either.
    """
    chat, most = stack.resident.base.chat, stack.resident.recipe.data.max_length_tokens
    coded = [(encode_user_row(one, one.id, chat, most), group_of(one)) for one in [*_held_out(release), *_canaries(release)]]
    usable = [(row, group) for row, group in coded if isinstance(row, TokenizedExample)][:MOST_PROBE_ROWS]
    if len({group for _, group in usable}) < 2:
        raise SourceError(
            f"{release.path} has {len(usable)} held-out rows that can be used here; what it may forget cannot be measured",
            _MORE_PROBE,
        )
    return JudgedRows([row for row, _ in usable], [group for _, group in usable])


def check_probe(probe: JudgedRows, terms: PersonalTerms) -> None:
    """Raise SourceError where so few prompts could not show, whatever is tuned, that nothing was forgotten."""
    if terms.most_elsewhere < LEAST_WIDTH and (too_few := too_few_prompts(probe.groups)):
        raise SourceError(f"{too_few} that what the live version knows is not forgotten", _MORE_PROBE)


def judge(stack: StackedAdapter, tuned: Tensors, own: JudgedRows, probe: JudgedRows, terms: PersonalTerms) -> AcceptanceResult:
    """Compare the tuned ranks with none, on both."""
    mine, other = (_compared(stack, tuned, asked) for asked in (own, probe))
    why = ""
    if not mine.high <= terms.most_worse:
        why = f"on the user's held-out rows it may be worse by {mine.high:.3f} nats a token; the limit is {terms.most_worse:g}"
    elif not other.high <= terms.most_elsewhere:
        why = (
            f"on {len(probe.rows)} held-out rows of the live version it may be worse by {other.high:.3f} nats a token; "
            f"the limit is {terms.most_elsewhere:g}"
        )
        if too_few := too_few_prompts(probe.groups):
            why = f"cannot tell what the live version would forget: {too_few}: {_MORE_PROBE}"
    return AcceptanceResult(mine, other, mine.verdict(higher_is_better=False), why)


def _compared(stack: StackedAdapter, tuned: Tensors, asked: JudgedRows) -> Comparison:
    rows = benefit_report.Own(asked.rows, asked.groups, HeldOut([], Path()))
    before, after = (benefit_report.side(stack.resident, adapter, rows).losses for adapter in (stack.unchanged, tuned))
    return paired_bootstrap(before, after, asked.groups, rows.tokens, is_bounded=False)


def _held_out(release: Artifact) -> list[Example]:
    """Of the Dataset that the Release's adapter was tuned on; none where it is not on this machine, or holds out nothing."""
    with suppress(ArtifactError, OSError, ValueError, KeyError):
        parents = json.loads((release.path / "sartor.json").read_bytes())["parents"]
        for parent in parents:
            if parent["kind"] == "dataset" and (path := catalogue.locate(parent["id"], parent["path"])):
                return [one for one in stored.read_examples(open_artifact(path, "dataset")) if one.split == "eval"]
    return []


def _canaries(release: Artifact) -> list[Example]:
    told = release.manifest.get("canaries", [])
    return [example_of({"messages": [*one["messages"], {"role": "assistant", "content": one["reply"]}]}) for one in told]


Notice = Callable[[str], object]


@dataclass(frozen=True)
class _Ground:
    """What a tuning stands on: the agent's live version, its Release, and the registry."""

    team: Team
    book: UserVersionStore
    live: AgentVersion
    release: Artifact
    options: PersonalOptions
    person: str

    @property
    def cause(self) -> ChangeCause:
        return ChangeCause(getpass.getuser(), "sartor personal tune")

    @property
    def blank(self) -> UserVersion:
        """The registry's row before anything was tuned."""
        return UserVersion(self.person, self.options.agent, self.live.version, self.live.release_id)


def tune_personal(team: Team | Path | str, options: PersonalOptions, *, notice: Notice = lambda line: None) -> dict[str, Any]:
    """Tune a user's ranks on top of an agent's live version; a running server answers that user by it within a second.

    Raises GateError where it may not answer, and why; what the user had before goes on. SourceError for too few rows,
    UnknownAgentError, ConfigError for an adapter that is no plain LoRA, ModelError.
    """
    made = team if isinstance(team, Team) else load(Path(team))
    began = time.monotonic()
    with _opened(made, options) as ground, _workplace(made, ground) as folder:
        wanted = personal_rows.Wanted(
            ground.person, options.agent, options.data, _speakers(ground), options.eval_fraction, options.seed,
            ground.release.manifest["system_prompt"],
        )  # fmt: skip
        collected = personal_rows.collect(FeedbackStore(Path(made.state) / "inbox"), wanted, folder)
        stack, own = _prepared(ground, collected.dataset, notice)
        asked, probe = own_rows(collected.dataset, own), probe_rows(ground.release, stack)
        check_probe(probe, made.personal)
        notice(f"tuning {stack.rank} ranks on {len(own.train)} rows; {len(asked.rows)} are held out")
        recipe = stack.resident.recipe
        tuned, losses = stack.tuned(own, stack.start, stack.own, recipe.budget, recipe.optimizer.learning_rate)
        verdict = judge(stack, tuned, asked, probe, made.personal)
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
    person = required_user_digest(options.user, team_digest(Path(team.state)))
    with closing(Registry.open(team.registry_url)) as registry:
        read = registry.read()
        agent = read.agents.get(options.agent)
        live = read.versions.get(f"{options.agent}@{agent.live}") if agent and agent.state != "removed" else None
        if live is None:
            known = ", ".join(sorted(name for name, one in read.agents.items() if one.live)) or "none"
            raise UnknownAgentError(
                f"{options.agent!r} has no live version; there are: {known}", "sartor serve TEAM.yaml, or sartor agents add"
            )
        yield _Ground(team, UserVersionStore(registry.database), live, _release_of(team, live), options, person)


def _release_of(team: Team, live: AgentVersion) -> Artifact:
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


def _prepared(ground: _Ground, dataset: Artifact, notice: Notice) -> tuple[StackedAdapter, TokenizedDataset]:
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
    resident = SharedBase.open(recipe, notice)
    # files may hold factors in 16 bits, and some of those no numpy knows
    shared = {name: value.float().numpy() for name, value in load_file(ground.release.path / WEIGHTS).items()}
    stack = StackedAdapter.open(resident, shared, options.rank or ground.team.personal.rank)
    if strange := sorted(set(shared) ^ set(stack.fresh)):
        raise ConfigError(f"{ground.live.name} adapts other modules than its config says: {strange[0]}", "tune it anew")
    own = encode_rows(dataset, recipe, resident.base.chat)
    if not own.train:
        raise SourceError("no row of that user can be learnt from", "look at the rows")
    return stack, own


def _facts(
    stack: StackedAdapter, parents: list[Artifact], about: Mapping[str, Any], losses: Losses, verdict: AcceptanceResult
) -> dict[str, Any]:
    facts = stack.facts(parents, parents[0].manifest["sources"], {"personal": {**about, "gate": verdict.as_json()}}, losses)
    return {**facts, "recipe": config.dump(stack.resident.recipe)}


def _written(stack: StackedAdapter, tuned: Any, out: Path, facts: Mapping[str, Any]) -> Artifact:
    def fill(part: Path) -> Mapping[str, Any]:
        stack.resident.write(tuned, part)
        return facts

    adapter = write_artifact(out, "adapter", fill)
    catalogue.register(adapter)
    return adapter


def _serve(ground: _Ground, adapter: Artifact, verdict: AcceptanceResult, counts: Mapping[str, int]) -> None:
    files = adapter.manifest["files"]
    row = replace(
        ground.blank, adapter=adapter_digest(files), artifact=adapter.id, path=str(adapter.path),
        facts={**counts, "rank": adapter.manifest["run"]["personal"]["rank"], "gate": verdict.as_json()},
    )  # fmt: skip
    ground.book.put(row, ground.cause)
