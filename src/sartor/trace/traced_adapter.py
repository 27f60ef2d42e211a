"""Adapter that is traced, with the rows that its tuning read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sartor.core import config, parquet_io
from sartor.core.artifacts import Artifact, open_artifact
from sartor.core.errors import ArtifactError, ConfigError
from sartor.core.lineage import ancestry
from sartor.core.records import Example, Message, Part
from sartor.core.splits import TEST
from sartor.tune.dataset_encoding import hold_out
from sartor.tune.recipe import ResolvedRecipe


@dataclass(frozen=True)
class TrainingRow:
    """Row that the tuning read, and the Dataset that holds it.

    is_rehearsal: whether it was read against forgetting, beside the rows of the task.
    """

    example: Example
    dataset: Artifact
    is_rehearsal: bool = False


@dataclass(frozen=True)
class TraceQuery:
    """Reply to explain, with the prompt that led to it.

    prompt: all turns before the reply, with the system prompt if there was one.
    tools: JSON text of the declared tools; empty for none.
    """

    prompt: tuple[Message, ...]
    reply: str
    tools: str = ""

    @property
    def example(self) -> Example:
        """Prompt and reply as a row, which the chat template encodes like a training row."""
        return Example(messages=(*self.prompt, Message.of("assistant", self.reply)), origins=(), tools=self.tools)


@dataclass(frozen=True)
class TracedAdapter:
    """Adapter or Release, the Dataset of its tuning, and the training rows in the Dataset's order.

    artifact: Adapter or Release.
    dataset: its own Dataset.
    rows: (N,) rows that the tuning learnt from, then those of rehearsal. Rows that it left out are not among them.
    """

    artifact: Artifact
    dataset: Artifact
    rows: tuple[TrainingRow, ...]

    @property
    def recipe(self) -> ResolvedRecipe:
        """Recipe of the tuning, without `auto`."""
        return config.load_any(ResolvedRecipe, self.artifact.manifest["recipe"])

    @cached_property
    def indices(self) -> dict[str, int]:
        """Index in `rows` of each Example's id."""
        return {row.example.id: index for index, row in enumerate(self.rows)}

    def find_rows(self, ids: Sequence[str]) -> list[int]:
        """Return the indices in `rows` of Examples by id, or by a unique beginning of an id.

        Raises ConfigError for ids that no training row has.
        """
        found = []
        for id in ids:
            matches = [self.indices[id]] if id in self.indices else []
            matches = matches or [index for full_id, index in self.indices.items() if id and full_id.startswith(id)]
            if len(matches) != 1:
                problem = f"{id!r} is the beginning of {len(matches)} ids" if matches else f"no training row is {id!r}"
                raise ConfigError(problem, f"sartor show {self.dataset.path} lists the ids")
            found += matches
        return found

    def query(self, prompt: str, reply: str, *, system: str | None = None, media: Sequence[Part] = ()) -> TraceQuery:
        """Return a prompt of one user turn and its reply as a query.

        system: None for the system prompt that most training rows have; empty for none.
        """
        if not reply:
            raise ConfigError("the reply is empty", '--reply "what the model said"')
        system = self.system_prompt if system is None else system
        user = Message("user", (*media, *([Part("text", prompt)] if prompt else [])))
        messages = ([Message.of("system", system)] if system else []) + ([user] if user.content else [])
        return TraceQuery(tuple(messages), reply, self.tools)

    @cached_property
    def system_prompt(self) -> str:
        """System prompt of most rows of the task; empty if most have none."""
        return _most_common([_system_of(row.example) for row in self.rows if not row.is_rehearsal])

    @cached_property
    def tools(self) -> str:
        """JSON text of the tools that most rows of the task declare; empty if most have none."""
        return _most_common([row.example.tools for row in self.rows if not row.is_rehearsal])


def open_traced(path: Path | str) -> TracedAdapter:
    """Open an Adapter or Release and the rows that it was tuned on.

    Raises ArtifactError if it, or the Dataset it was tuned on, is damaged, changed or not on this machine.
    """
    artifact = open_artifact(path, ("adapter", "release"))
    if "recipe" not in artifact.manifest:
        raise ArtifactError(
            f"{artifact.path} was not tuned by Sartor: it has no recipe and no order of rows",
            "trace an Adapter that `sartor tune` made",
        )
    recipe = config.load_any(ResolvedRecipe, artifact.manifest["recipe"])
    # a Release is made from an Adapter, whose parents are the Datasets
    own_parents = _dataset_parents(artifact)
    opened = {dataset.id: dataset for dataset in ancestry.training_datasets(artifact)}
    rows: list[TrainingRow] = []
    own_dataset: Artifact | None = None
    for parent in own_parents:
        is_rehearsal = parent.get("role") == ancestry.REHEARSAL
        dataset = opened.get(parent["id"])
        if dataset is None:
            if is_rehearsal:  # an asset that can be installed again; the rows of the task still explain
                continue
            raise ArtifactError(
                f"the Dataset {parent['id'][:16]} of {artifact.path.name} is not at {parent.get('path', '')}, or was "
                "changed",
                "sartor index DIR finds a Dataset that was moved",
            )
        if not is_rehearsal:
            own_dataset = own_dataset or dataset
        rows += [TrainingRow(example, dataset, is_rehearsal) for example in _learnt(dataset, recipe, is_rehearsal)]
    if own_dataset is None:
        raise ArtifactError(
            f"the Dataset of {artifact.path} is unknown", "trace an Adapter or Release that `sartor tune` made"
        )
    left_out = {id for ids in artifact.manifest.get("left_out", {}).values() for id in ids}
    return TracedAdapter(artifact, own_dataset, tuple(row for row in rows if row.example.id not in left_out))


def read_queries(file: Path, traced: TracedAdapter) -> list[TraceQuery]:
    """Return the queries of a JSONL file: {"prompt", "reply"[, "system"]} or {"messages"[, "tools"]} in each line.

    Raises ConfigError with the number of a line that is neither.
    """
    queries = []
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}", "--queries FILE.jsonl, in UTF-8") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            queries.append(_query(json.loads(line), traced))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{file}, line {number} is no query: {error or type(error).__name__}",
                'a line is {"prompt": "...", "reply": "..."} or {"messages": [...]}',
            ) from None
    if not queries:
        raise ConfigError(f"{file} has no query", 'a line is {"prompt": "...", "reply": "..."}')
    return queries


def _query(record: Mapping[str, Any], traced: TracedAdapter) -> TraceQuery:
    if "messages" not in record:
        return traced.query(str(record["prompt"]), str(record["reply"]), system=record.get("system"))
    messages = [Message.of(str(turn["role"]), str(turn["content"])) for turn in record["messages"]]
    if not messages or messages[-1].role != "assistant":
        raise ValueError("the last message is not the assistant's")
    tools = record.get("tools")
    return TraceQuery(tuple(messages[:-1]), messages[-1].text, json.dumps(tools) if tools else "")


def _dataset_parents(artifact: Artifact) -> list[dict[str, str]]:
    """Return the Dataset entries in the parents of the Adapter that the artefact is, or was released from."""
    parents = [parent for parent in artifact.manifest.get("parents", []) if parent["kind"] == "dataset"]
    if parents or artifact.kind == "adapter":
        return parents
    adapter = ancestry.find_parent(artifact, "adapter")
    return _dataset_parents(adapter) if adapter else []


def _learnt(dataset: Artifact, recipe: ResolvedRecipe, is_rehearsal: bool) -> list[Example]:
    if is_rehearsal:
        return list(parquet_io.read_examples(dataset, "train"))
    examples = [example for example in parquet_io.read_examples(dataset) if example.split != TEST]
    return [example for example in hold_out(examples, recipe.data, recipe.seed) if example.split == "train"]


def _system_of(example: Example) -> str:
    return example.messages[0].text if example.messages[0].role == "system" else ""


def _most_common(texts: Sequence[str]) -> str:
    return Counter(texts).most_common(1)[0][0] if texts else ""
