"""Adapter that is traced, with the rows that its tuning read."""

from __future__ import annotations

import bisect
import itertools
import json
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sartor.core import catalogue, config, parquet_io, records, trace_store
from sartor.core.artifacts import Artifact, adapter_manifest, kind_of, open_artifact
from sartor.core.errors import ArtifactError, ConfigError, RequestError
from sartor.core.filesystem import file_digest
from sartor.core.lineage import ancestry
from sartor.core.records import Example, Message, Part
from sartor.core.splits import TEST, hold_out
from sartor.inference.openai_messages import read_message
from sartor.trace import stored_rows
from sartor.trace.stored_rows import StoredExamples
from sartor.tune.recipe import SAMPLED, ResolvedRecipe


@dataclass(frozen=True)
class TrainingRow:
    """Row that the tuning read, and the Dataset that holds it.

    is_rehearsal: whether it was read against forgetting, beside the rows of the task.
    """

    example: Example
    dataset: Artifact
    is_rehearsal: bool = False


class StoredRows(Sequence[TrainingRow]):
    """Training rows in the trace store, which are read one at a time.

    parts: Datasets in the order of their rows, each with whether it is read against forgetting.
    """

    def __init__(self, examples: StoredExamples, parts: Sequence[tuple[Artifact, bool]]) -> None:
        self.examples, self._parts = examples, parts
        self._ends = list(itertools.accumulate(examples.header["counts"]))

    @property
    def datasets(self) -> list[Artifact]:
        """Datasets that have rows, each once, in the order of the rows."""
        counted = zip(self._parts, self.examples.header["counts"], strict=True)
        return list({dataset.id: dataset for (dataset, _), count in counted if count}.values())

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self[place] for place in range(*index.indices(len(self))))
        place = range(len(self))[index]
        dataset, is_rehearsal = self._parts[bisect.bisect_right(self._ends, place)]
        return TrainingRow(self.examples[place], dataset, is_rehearsal)


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
    is_own: whether they are the rows of its tuning; false for those of a Dataset that the caller named, which
        retrieval and gradients can rank, and unrolling cannot.
    row_key: digest of what the rows depend on, under which their index is stored; empty for rows that are not stored.
    part_counts: number of rows of each Dataset, in the order of the rows.
    """

    artifact: Artifact
    dataset: Artifact
    rows: Sequence[TrainingRow]
    is_own: bool = True
    row_key: str = ""
    part_counts: tuple[int, ...] = ()

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Manifest of the Adapter; a Release holds a copy of it."""
        return adapter_manifest(self.artifact)

    @cached_property
    def recipe(self) -> ResolvedRecipe:
        """Recipe of the tuning, without `auto`. Raises ArtifactError for an adapter that no `sartor tune` made."""
        return _recipe_of(self.artifact)

    @cached_property
    def known_recipe(self) -> ResolvedRecipe | None:
        """Recipe of the tuning; None if it is unknown or of federated rounds."""
        try:
            return self.recipe
        except ArtifactError:
            return None

    @cached_property
    def ids(self) -> list[str]:
        """Ids (N,) of the rows' Examples."""
        if isinstance(self.rows, StoredRows):
            return self.rows.examples.ids
        return [row.example.id for row in self.rows]

    @cached_property
    def indices(self) -> dict[str, int]:
        """Index in `rows` of each Example's id."""
        return {id: index for index, id in enumerate(self.ids)}

    @cached_property
    def datasets(self) -> list[Artifact]:
        """Datasets of the rows, each once, in the order of the rows."""
        if isinstance(self.rows, StoredRows):
            return self.rows.datasets
        return list({row.dataset.id: row.dataset for row in self.rows}.values())

    @property
    def command(self) -> str:
        """The command that traces it by these rows, for remedies."""
        data = "" if self.is_own else f" --data {shlex.quote(str(self.dataset.path))}"
        return f"sartor trace {shlex.quote(str(self.artifact.path))}{data}"

    @property
    def show_command(self) -> str:
        """The command that lists the rows of its own Dataset, for remedies."""
        rows = self.dataset.manifest["counts"]["splits"].get("train", 0)
        return f"sartor show {shlex.quote(str(self.dataset.path))} -n {max(rows, 1)}"

    @property
    def unrepeatable(self) -> str:
        """Reason why `sartor tune` alone cannot repeat the tuning; empty if it can."""
        run, recipe = self.manifest.get("run", {}), self.manifest.get("recipe", {})
        if not self.is_own:
            return "the rows are those of a Dataset that was named, and not of its tuning"
        if "federated" in run:
            return "it was tuned by a federation, whose rounds this machine has not seen"
        if "personal" in run:
            return "it was tuned on top of a frozen version, as a personal one"
        if recipe.get("method", {}).get("kind") == "pissa":
            return "its method is pissa, whose file has the start beside what was trained"
        objective = recipe.get("objective", {}).get("kind")
        if objective in [config.kind_of(kind) for kind in SAMPLED]:
            return f"its objective is {objective}, whose scores and sampled replies are not repeated"
        missing = [f"run.{key}" for key in ("updates", "micro_batch_tokens") if key not in run]
        missing += [key for key in ("recipe", "fingerprint", "base") if key not in self.manifest]
        return f"its manifest has no {', '.join(missing)}" if missing else ""

    @property
    def start(self) -> Mapping[str, str] | None:
        """Adapter or Release that the tuning began from, as the manifest names it; None for a fresh adapter."""
        if not self.manifest.get("recipe", {}).get("method", {}).get("start"):
            return None
        parents = self.manifest.get("parents", [])
        return next((parent for parent in parents if parent["kind"] in ("adapter", "release")), None)

    @property
    def index_folder(self) -> Path:
        """Folder of the stored rows and their index, which need not exist."""
        return _index_folder(self.artifact, self.dataset, self.row_key, is_own=self.is_own)

    def find_rows(self, ids: Sequence[str]) -> list[int]:
        """Return the indices in `rows` of Examples by id, or by a unique beginning of an id.

        Raises ConfigError for ids that no training row has.
        """
        found = []
        for id in ids:
            matches = [self.indices[id]] if id in self.indices else []
            matches = matches or [index for full_id, index in self.indices.items() if id and full_id.startswith(id)]
            if not matches:
                raise ConfigError(f"no training row is {id!r}", f"{self.show_command} lists the ids")
            if len(matches) > 1:
                several = ", ".join(self.ids[index][:16] for index in matches[:4])
                raise ConfigError(
                    f"{id!r} is the beginning of {len(matches)} ids: {several}{', ...' if len(matches) > 4 else ''}",
                    f"a longer beginning: {self.ids[matches[0]][:16]}",
                )
            found += matches
        return found

    def query(
        self,
        prompt: str | Sequence[Mapping[str, Any]] | Mapping[str, Any],
        reply: str,
        *,
        system: str | None = None,
        media: Sequence[Part] = (),
        tools: Sequence[Any] | None = None,
    ) -> TraceQuery:
        """Return a prompt and its reply as a query.

        prompt: text of one user turn, the turns in OpenAI's form, or the body of a request with `messages` and
            `tools`.
        tools: declared tools in OpenAI's form; None for those that most training rows declare.
        system: None for the system prompt that most training rows have, unless the turns begin with one; empty for
            none.
        media: images and recordings before the text.
        Raises ConfigError for an empty reply, and for turns of another form.
        """
        if not reply:
            raise ConfigError("the reply is empty", '--reply "what the model said"')
        if isinstance(prompt, Mapping):
            tools, prompt = prompt.get("tools"), prompt["messages"]
        if isinstance(prompt, str):
            user = Message("user", (*media, *([Part("text", prompt)] if prompt else [])))
            messages = [user] if user.content else []
        elif media:
            raise ConfigError("media were given beside turns", "put them into the content of a turn, as data URLs")
        else:
            messages = [_message_of(turn, index) for index, turn in enumerate(prompt)]
        has_system = bool(messages) and messages[0].role == "system"
        system = self.system_prompt if system is None else system
        if system and not has_system:
            messages = [Message.of("system", system), *messages]
        return TraceQuery(tuple(messages), reply, self.tools if tools is None else _tools_text(tools))

    @cached_property
    def system_prompt(self) -> str:
        """System prompt of most rows of the task; empty if most have none."""
        if isinstance(self.rows, StoredRows):
            return str(self.rows.examples.header["system_prompt"])
        return _most_common([_system_of(row.example) for row in self.rows if not row.is_rehearsal])

    @cached_property
    def tools(self) -> str:
        """JSON text of the tools that most rows of the task declare; empty if most have none."""
        if isinstance(self.rows, StoredRows):
            return str(self.rows.examples.header["tools"])
        return _most_common([row.example.tools for row in self.rows if not row.is_rehearsal])


def open_traced(path: Path | str, data: Path | str | None = None) -> TracedAdapter:
    """Open an Adapter or Release and the rows that it was tuned on.

    data: a Dataset whose training rows are taken instead, where those of the tuning are unknown or on another machine.
    Raises ArtifactError if it, or the Dataset it was tuned on, is damaged, changed or not on this machine.
    """
    artifact = _foreign_adapter(Path(path), data) or open_artifact(path, ("adapter", "release"))
    manifest, named = adapter_manifest(artifact), ""
    if data is not None:
        dataset = open_artifact(data, "dataset")
        is_own = dataset.id in [parent["id"] for parent in manifest.get("parents", [])]
        if not is_own or "federated" in manifest.get("run", {}):  # a client has some of the rows alone
            return _with_rows(dataset_rows(artifact, dataset))
        named = str(dataset.path)
    recipe = _recipe_of(artifact)
    left_out = {id for ids in manifest.get("left_out", {}).values() for id in ids}
    parts = []
    for parent in [parent for parent in manifest["parents"] if parent["kind"] == "dataset"]:
        is_rehearsal = parent.get("role") == ancestry.REHEARSAL
        sibling = artifact.path.parent / Path(parent["path"]).name
        paths = list(catalogue.copies(parent["id"], named, parent["path"], str(sibling)))
        if not paths and is_rehearsal:  # an asset that can be installed again; the rows of the task still explain
            continue
        parts.append((_open_dataset(artifact, parent, paths), is_rehearsal))
    if all(is_rehearsal for _, is_rehearsal in parts):
        raise ArtifactError(f"{artifact.path} names no Dataset that it was tuned on", _by_named_rows(artifact))

    def learnt(dataset: Artifact, is_rehearsal: bool) -> Iterator[Example]:
        return (example for example in _learnt(dataset, recipe, is_rehearsal) if example.id not in left_out)

    choices = [recipe.data.eval_fraction, recipe.seed, sorted(left_out)]
    return _with_rows(_open_rows(artifact, parts, choices, learnt, is_own=True))


def _foreign_adapter(path: Path, data: Path | str | None) -> Artifact | None:
    """Return an adapter that peft wrote and Sartor has no record of; None for any other path.

    Only retrieval can trace it: it needs rows alone. Raises ArtifactError without `data`.
    """
    config_file, weights = path / "adapter_config.json", path / "adapter_model.safetensors"
    if kind_of(path) is not None or not config_file.is_file() or not weights.is_file():
        return None
    if data is None:
        raise ArtifactError(
            f"{path} was tuned elsewhere: its rows, their order and the states of its tuning are not known",
            f"sartor trace {shlex.quote(str(path))} --data DATASET ranks the rows of a Dataset by retrieval; no other "
            "method works",
        )
    id = records.digest([file_digest(config_file), file_digest(weights)])
    return Artifact(path.absolute(), {"kind": "adapter", "id": id, "parents": []})


def dataset_rows(artifact: Artifact, dataset: Artifact) -> TracedAdapter:
    """Return an opened Adapter or Release with the training rows of a Dataset, not necessarily those of its tuning."""
    return _open_rows(
        artifact, [(dataset, False)], ["named"], lambda part, _: parquet_io.read_examples(part, "train"), is_own=False
    )


def _with_rows(traced: TracedAdapter) -> TracedAdapter:
    if not traced.rows:
        problem = f"no row of {traced.dataset.path} was learnt from"
        raise ArtifactError(problem, f"{traced.show_command} shows its rows")
    return traced


def rows_folder(traced: TracedAdapter) -> Path:
    """Return the folder for what is computed from the rows of `traced`, its origin recorded.

    Rows of a Dataset that the caller named have a folder of their own, beside those of the tuning.
    """
    trace_store.record_origin(traced.artifact, sorted(dataset.id for dataset in traced.datasets))
    return traced.index_folder.parent


def _open_rows(
    artifact: Artifact,
    parts: Sequence[tuple[Artifact, bool]],
    choices: Sequence[Any],
    read: Callable[[Artifact, bool], Iterable[Example]],
    *,
    is_own: bool,
) -> TracedAdapter:
    """Return the traced adapter with its stored rows, or with those that `read` gives if none are stored.

    parts: Datasets in the order of their rows, each with whether it is read against forgetting.
    choices: what else the rows depend on.
    """
    dataset = next(dataset for dataset, is_rehearsal in parts if not is_rehearsal)
    listed = [[part.id, is_rehearsal] for part, is_rehearsal in parts]
    key = records.digest([stored_rows.SCHEMA, listed, choices])
    examples = StoredExamples.open(_index_folder(artifact, dataset, key, is_own=is_own))
    rows: Sequence[TrainingRow]
    if examples is not None and len(examples.header["counts"]) == len(parts):
        rows, counts = StoredRows(examples, parts), list(examples.header["counts"])
    else:
        by_part = [[TrainingRow(example, *part) for example in read(*part)] for part in parts]
        rows, counts = tuple(itertools.chain.from_iterable(by_part)), [len(part) for part in by_part]
    return TracedAdapter(artifact, dataset, rows, is_own=is_own, row_key=key, part_counts=tuple(counts))


def _index_folder(artifact: Artifact, dataset: Artifact, key: str, *, is_own: bool) -> Path:
    folder = trace_store.trace_path(trace_store.adapter_id(artifact))
    return (folder if is_own else folder / f"rows-{dataset.id[:16]}") / f"retrieval-{key[:16]}"


def _recipe_of(artifact: Artifact) -> ResolvedRecipe:
    manifest = adapter_manifest(artifact)
    if "federated" in manifest.get("run", {}):
        raise ArtifactError(
            f"{artifact.path} was tuned by federated rounds: no machine has the rows of all clients",
            f"{_by_named_rows(artifact)}: each client its own",
        )
    try:
        return config.load_any(ResolvedRecipe, manifest["recipe"])
    except (KeyError, ConfigError):
        raise ArtifactError(
            f"{artifact.path} has no recipe of `sartor tune`, so that its rows and their order are unknown and "
            "unrolling cannot trace it",
            _by_named_rows(artifact),
        ) from None


def _by_named_rows(artifact: Artifact) -> str:
    return (
        f"sartor trace {shlex.quote(str(artifact.path))} --data DATASET ranks the rows of a Dataset by retrieval, or "
        "with --method gradient"
    )


def _open_dataset(artifact: Artifact, parent: Mapping[str, str], paths: Sequence[Path]) -> Artifact:
    """Return the Dataset of a tuning, the first of its copies that is whole.

    Raises ArtifactError if it is gone, moved or changed.
    """
    problems = []
    for path in paths:
        try:
            return open_artifact(path, "dataset")
        except ArtifactError as error:
            problems.append(error.problem)
    problem = f"was changed: {problems[0]}" if problems else "is not on this machine, or was moved"
    raise ArtifactError(
        f"the Dataset {parent['id'][:16]} that {artifact.path.name} was tuned on ({parent['path']}) {problem}",
        f"sartor index DIR finds one that was moved; {_by_named_rows(artifact)}",
    )


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
        except (ValueError, KeyError, TypeError, ConfigError) as error:
            problem = error.problem if isinstance(error, ConfigError) else error
            raise ConfigError(
                f"{file}, line {number} is no query: {problem or type(error).__name__}",
                'a line is {"prompt": "...", "reply": "..."} or {"messages": [...]}',
            ) from None
    if not queries:
        raise ConfigError(f"{file} has no query", 'a line is {"prompt": "...", "reply": "..."}')
    return queries


def _query(record: Mapping[str, Any], traced: TracedAdapter) -> TraceQuery:
    if "messages" not in record:
        words = {name: record.get(name) for name in ("prompt", "reply")}
        system = record.get("system")
        for name, text in {**words, "system": system or ""}.items():
            if not isinstance(text, str):
                raise ValueError(f"its {name} is missing or no text")
        return traced.query(str(words["prompt"]), str(words["reply"]), system=system)
    messages = [_message_of(turn, index) for index, turn in enumerate(record["messages"])]
    if not messages or messages[-1].role != "assistant" or not messages[-1].text.strip():
        raise ValueError("the last message is no reply of the assistant")
    return TraceQuery(tuple(messages[:-1]), messages[-1].text, _tools_text(record.get("tools") or []))


def _message_of(turn: Any, index: int) -> Message:
    """Return a turn in OpenAI's form as a message. Raises ConfigError for another form."""
    try:
        return read_message(turn, index)
    except RequestError as error:
        raise ConfigError(f"a turn of the prompt is no message: {error.problem}", error.remedy) from None


def _tools_text(tools: Any) -> str:
    """Return declared tools in OpenAI's form as JSON; empty for none. Raises ConfigError for another form."""
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ConfigError(
            "the tools are no list of declarations", '"tools": [{"type": "function", "function": {...}}]'
        )
    return json.dumps(list(tools)) if tools else ""


def held_out_examples(traced: TracedAdapter) -> list[Example]:
    """Return the held-out rows of the tuning whose reply is a text that was not rated bad, in the Dataset's order."""
    examples = [example for example in parquet_io.read_examples(traced.dataset) if example.split != TEST]
    left_out = {id for ids in traced.manifest.get("left_out", {}).values() for id in ids}
    recipe = traced.recipe
    return [
        example
        for example in hold_out(examples, recipe.data.eval_fraction, recipe.seed)
        if example.split != "train" and example.id not in left_out and _is_text_reply(example)
    ]


def _is_text_reply(example: Example) -> bool:
    last = example.messages[-1]
    is_text = last.role == "assistant" and bool(last.text.strip())
    return is_text and example.rating >= 0 and not (last.tool_calls or last.reasoning_content)


def _learnt(dataset: Artifact, recipe: ResolvedRecipe, is_rehearsal: bool) -> list[Example]:
    if is_rehearsal:
        return list(parquet_io.read_examples(dataset, "train"))
    examples = [example for example in parquet_io.read_examples(dataset) if example.split != TEST]
    return [
        example for example in hold_out(examples, recipe.data.eval_fraction, recipe.seed) if example.split == "train"
    ]


def _system_of(example: Example) -> str:
    return example.messages[0].text if example.messages[0].role == "system" else ""


def _most_common(texts: Sequence[str]) -> str:
    return Counter(texts).most_common(1)[0][0] if texts else ""
