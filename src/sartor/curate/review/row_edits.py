"""Application of a reviewer's edit to an Example."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from sartor.core import parquet_io
from sartor.core.artifacts import Artifact, check_file
from sartor.core.errors import ConfigError
from sartor.core.lineage import origin_index
from sartor.core.parquet_io import to_string_array
from sartor.core.records import Example, Message, Part
from sartor.core.splits import prompt_group
from sartor.curate.dataset_writer import EDITED
from sartor.curate.labels import class_labels
from sartor.curate.review.review_items import check_change
from sartor.curate.steps.personal_data import Masking, PersonalData
from sartor.text.pii.entities import ENTITIES

STEP = EDITED


def apply_edit(example: Example, change: Mapping[str, Any]) -> Example:
    """Return the row with the change applied.

    Raises ConfigError if the change does not fit the row, or leaves it as it is.
    """
    check_change(change)
    edited = example
    for turn, text in _turns(example, change):
        edited = _with_text(edited, turn, text)
    if "value" in change:
        edited = _with_label(edited, str(change.get("label", "reply")), str(change["value"]))
    if "weight" in change:
        weight = change["weight"]
        if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < weight < float("inf"):
            raise ConfigError(
                f"the weight is {weight!r}", "a number above 0; 1 is the usual; reject a row that is to weigh nothing"
            )
        edited = replace(edited, weight=float(weight))
    if change.get("mask"):
        edited = everywhere_masked(edited)
    if edited.id == example.id and edited.weight == example.weight:
        raise ConfigError(
            f"the edit leaves row {example.id} as it is",
            "sartor review accept DATASET ITEM --by NAME, or edit with another --reply, --prompt or --change",
        )
    if edited.id == example.id:  # a new weight alone does not make a new row
        return replace(edited, steps=(*example.steps, STEP))
    origins = []
    for origin in example.origins:
        step = origin.step
        if not origin.parents and not step.endswith(STEP):
            # a row that was read still counts as a row of its source, with the step of an edit. A row that a step made
            # keeps the name of that step: `made+review` marks one that had no parent before the edit
            step = STEP if step == "read" else f"{step}+{STEP}"
        origins.append(replace(origin, parents=(example.id,), step=step))
    group = prompt_group(edited) if example.group == prompt_group(example) else edited.group
    return replace(
        edited,
        origins=tuple(origins),
        group=group,
        steps=(*example.steps, STEP),
    )


def everywhere_masked(example: Example) -> Example:
    """Return the row with placeholders for all personal data that is detected, names of people included."""
    step = PersonalData(entities=ENTITIES)  # type: ignore[arg-type]
    masking = step.open(Path())
    assert isinstance(masking, Masking)
    return masking.everywhere(example)


def masked_text(text: str) -> str:
    """Return a person's sentence with placeholders for personal data."""
    return PersonalData(entities=ENTITIES).masker()(text)  # type: ignore[arg-type]


def _turns(example: Example, change: Mapping[str, Any]) -> list[tuple[int, str]]:
    last = len(example.messages) - 1
    result = []
    for key, text in dict(change.get("turns") or {}).items():
        if not str(key).isdecimal() or int(key) > last:
            raise ConfigError(f"row {example.id} has no turn {key!r}", f"a number from 0 to {last}")
        result.append((int(key), str(text)))
    if "reply" in change:
        result.append((last, str(change["reply"])))
    if "prompt" in change:
        users = [index for index, message in enumerate(example.messages) if message.role == "user"]
        if not users:
            raise ConfigError(
                f"row {example.id} has no question", "sartor review edit DATASET ITEM --by NAME --reply TEXT"
            )
        result.append((users[-1], str(change["prompt"])))
    return result


def _with_text(example: Example, turn: int, text: str) -> Example:
    """Return the Example with new text in one message; its images and recordings stay."""
    if not text.strip():
        raise ConfigError("an edit would leave an empty turn", "reject the row, or say what is to stand there")
    message = example.messages[turn]
    parts: list[Part] = []
    for part in message.content:
        if part.kind != "text":
            parts.append(part)
        elif not any(earlier.kind == "text" for earlier in parts):
            parts.append(Part("text", text))
    if not any(part.kind == "text" for part in parts):
        parts.append(Part("text", text))
    renewed: Message = replace(message, content=tuple(parts))
    return replace(example, messages=(*example.messages[:turn], renewed, *example.messages[turn + 1 :]))


def _with_label(example: Example, form: str, value: str) -> Example:
    reply = class_labels.with_label(example.reply, form, value)
    if reply is None:
        raise ConfigError(
            f"the reply of row {example.id} has no label {form}", "edit its reply as a whole: --reply TEXT"
        )
    return _with_text(example, len(example.messages) - 1, reply)


def rows_of(dataset: Artifact, ids: Iterable[str]) -> dict[str, Example]:
    """Return the Examples of the Dataset with these ids.

    Only row groups that contain one of them are read completely.
    """
    wanted = to_string_array(sorted(set(ids)))
    files = origin_index.example_files(dataset) if len(wanted) else []
    return {row["id"]: parquet_io.example_of(row) for file in files for row in _rows(dataset, file, wanted)}


def _rows(dataset: Artifact, file: Path, wanted: Any) -> Iterator[dict[str, Any]]:
    check_file(dataset, file.relative_to(dataset.path).as_posix())
    with pq.ParquetFile(file) as parquet:
        for group in range(parquet.num_row_groups):
            mask = pc.is_in(parquet.read_row_group(group, columns=["id"])["id"], value_set=wanted)
            if pc.any(mask).as_py():
                yield from parquet.read_row_group(group).filter(mask).to_pylist()
