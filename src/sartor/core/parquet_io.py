"""Examples and Drops as Parquet, and conversion between Arrow and numpy.

`examples/*.parquet` has one row per Example. `messages` has the OpenAI form, with content always a list of parts,
since a Parquet column cannot hold text in one row and a list in the next, and a turn's weight is null where it is 1.
`drops/*.parquet` has one row per Drop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sartor.core.artifacts import SCHEMA, Artifact
from sartor.core.errors import ArtifactError
from sartor.core.records import Drop, Example, Message, Origin, Part, PartKind

ROWS_PER_GROUP = 4096

_PART = pa.struct([("type", pa.string()), ("text", pa.string()), ("image", pa.string()), ("audio", pa.string())])
_MESSAGE = pa.struct(
    [
        ("role", pa.string()),
        ("content", pa.list_(_PART)),
        ("name", pa.string()),
        ("tool_calls", pa.string()),
        ("tool_call_id", pa.string()),
        ("reasoning_content", pa.string()),
        ("weight", pa.float64()),
    ]
)
_ORIGIN = pa.struct(
    [
        ("source", pa.string()),
        ("locator", pa.string()),
        ("licence", pa.string()),
        ("parents", pa.list_(pa.string())),
        ("step", pa.string()),
        ("date", pa.string()),
        ("made_by", pa.string()),
    ]
)
_FOOTER = {b"sartor.schema": str(SCHEMA).encode()}
EXAMPLES = pa.schema(
    [
        ("id", pa.string()),
        ("messages", pa.list_(_MESSAGE)),
        ("rejected", pa.list_(_MESSAGE)),
        ("tools", pa.string()),
        ("group", pa.string()),
        ("split", pa.string()),
        ("weight", pa.float64()),
        ("origins", pa.list_(_ORIGIN)),
        ("steps", pa.list_(pa.string())),
        ("rating", pa.float64()),
    ],
    metadata=_FOOTER,
)
DROPS = pa.schema(
    [
        *((name, pa.string()) for name in ("reason", "source", "locator", "detail", "step", "id", "kept", "text")),
        ("score", pa.float64()),
        ("method", pa.string()),
    ],
    metadata=_FOOTER,
)


def examples_table(examples: Iterable[Example]) -> Any:
    """Return Examples as an Arrow table with the schema EXAMPLES."""
    return pa.Table.from_pylist([example_row(example) for example in examples], EXAMPLES)


def write_examples(file: Path, examples: Iterable[Example]) -> int:
    """Write Examples to a Parquet file; return their number."""
    return write_rows(file, EXAMPLES, (example_row(example) for example in examples))


def write_drops(file: Path, drops: Iterable[Drop]) -> int:
    """Write Drops to a Parquet file; return their number."""
    return write_rows(file, DROPS, (asdict(drop) for drop in drops))


def write_rows(file: Path, schema: Any, rows: Iterable[dict[str, Any]]) -> int:
    """Write mappings to a zstd Parquet file in row groups; return their number."""
    file.parent.mkdir(parents=True, exist_ok=True)
    count, waiting = 0, []
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for row in rows:
            waiting.append(row)
            count += 1
            if len(waiting) == ROWS_PER_GROUP:
                writer.write_table(pa.Table.from_pylist(waiting, schema))
                waiting = []
        writer.write_table(pa.Table.from_pylist(waiting, schema))
    return count


def read_examples(dataset: Artifact, split: str | None = None) -> Iterator[Example]:
    """Yield the Examples of a Dataset in order, of one split if it is named."""
    for row in _read(dataset, "examples/"):
        if split is None or row["split"] == split:
            yield example_of(row)


def read_own_examples(dataset: Artifact, split: str | None = None) -> Iterator[Example]:
    """Yield the Examples as `read_examples` does, without rows that come only from rehearsal sources."""
    rehearsal = rehearsal_sources(dataset)
    for example in read_examples(dataset, split):
        if not example.origins or any(origin.source not in rehearsal for origin in example.origins):
            yield example


def count_own_groups(dataset: Artifact) -> Counter[tuple[str, str]]:
    """Return the number of rows of each (group, split), without rows that come only from rehearsal sources.

    A row without a group is its own group, named by its id. Raises ArtifactError.
    """
    rehearsal = rehearsal_sources(dataset)
    counts: Counter[tuple[str, str]] = Counter()
    for row in _read(dataset, "examples/", ["id", "group", "split", *(["origins"] if rehearsal else [])]):
        origins = row.get("origins")
        if not origins or any(origin["source"] not in rehearsal for origin in origins):
            counts[row["group"] or row["id"], row["split"]] += 1
    return counts


def rehearsal_sources(dataset: Artifact) -> set[str]:
    """Return the rehearsal sources of a Dataset: rows against forgetting, not for its own task."""
    return {source["source"] for source in dataset.manifest.get("sources", []) if source.get("rehearsal")}


def read_drops(dataset: Artifact) -> Iterator[Drop]:
    """Yield the Drops of a Dataset in order."""
    for row in _read(dataset, "drops/"):
        yield Drop(**row)


def _read(dataset: Artifact, folder: str, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    names = [name for name in dataset.manifest["files"] if name.startswith(folder) and name.endswith(".parquet")]
    for name in sorted(names):
        yield from read_file(dataset.path / name, columns=columns)


def read_file(path: Path, content: bytes | None = None, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file as mappings. Raises ArtifactError.

    content: the file's bytes, if the caller has read and checked them.
    columns: columns to read; None for all.
    """
    try:
        with pq.ParquetFile(path if content is None else pa.BufferReader(content)) as file:
            for batch in file.iter_batches(ROWS_PER_GROUP, columns=columns):
                yield from batch.to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise ArtifactError(
            f"{path} is not readable Parquet: {error}",
            "make it again: sartor curate RECIPE --out DATASET --replace; a Report by sartor evaluate ADAPTER "
            "--replace",
        ) from None


def example_row(example: Example) -> dict[str, Any]:
    """Return an Example as a row of `examples/*.parquet`, which `example_of` reads."""
    return {
        "id": example.id,
        "messages": [_message_row(message) for message in example.messages],
        "rejected": [_message_row(message) for message in example.rejected],
        "tools": example.tools,
        "group": example.group,
        "split": example.split,
        "weight": example.weight,
        "origins": [vars(origin) for origin in example.origins],  # asdict copies deeply, at ten times the cost
        "steps": list(example.steps),
        "rating": example.rating,
    }


def _message_row(message: Message) -> dict[str, Any]:
    weight = None if message.weight == 1 else message.weight
    return {**vars(message), "content": [part.plain() for part in message.content], "weight": weight}


def example_of(row: dict[str, Any]) -> Example:
    """Return the Example in a row of `examples/*.parquet`."""
    return Example(
        messages=tuple(_message_of(message) for message in row["messages"]),
        origins=tuple(origin_of(origin) for origin in row["origins"]),
        group=row["group"],
        split=row["split"],
        weight=row["weight"],
        rejected=tuple(_message_of(message) for message in row["rejected"]),
        tools=row["tools"],
        steps=tuple(row.get("steps") or ()),  # absent in a Dataset of schema 1
        rating=row.get("rating") or 0.0,  # absent in older Datasets
    )


def origin_of(row: dict[str, Any]) -> Origin:
    """Return the Origin in an element of the column `origins`."""
    # older Datasets have no `made_by`
    return Origin(**{**row, "parents": tuple(row["parents"]), "made_by": row.get("made_by") or ""})


def _message_of(row: dict[str, Any]) -> Message:
    parts = []
    for part in row["content"]:
        kind = cast(PartKind, part["type"])
        body = part[kind] or ""
        parts.append(Part(kind, text=body) if kind == "text" else Part(kind, media=body))
    # older Datasets have neither reasoning_content nor weight
    texts = ("name", "tool_calls", "tool_call_id", "reasoning_content")
    fields: dict[str, Any] = {key: row.get(key) or "" for key in texts}
    if row.get("weight") is not None:
        fields["weight"] = row["weight"]
    return Message(row["role"], tuple(parts), **fields)


def numbers(array: Any) -> Any:
    """Return an Arrow array of N numbers or booleans as a numpy array of shape (N,)."""
    if pa.types.is_boolean(array.type):
        return np.from_dlpack(pc.cast(array, pa.uint8())).view(bool)
    return np.from_dlpack(array)


def to_index_array(values: Any) -> Any:
    """Return a one-dimensional numpy array as an Arrow int64 array, for `take`."""
    contiguous = np.ascontiguousarray(values, np.int64)
    return pa.Array.from_buffers(pa.int64(), len(contiguous), [None, pa.py_buffer(contiguous)])


def to_string_array(texts: Sequence[str]) -> Any:
    """Return texts as an Arrow string array."""
    encoded = [text.encode() for text in texts]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded))]
    return pa.Array.from_buffers(pa.string(), len(encoded), buffers)


def column(table: Any, name: str) -> Any:
    """Return a column of a table as one Arrow array; the table's chunks must be combined."""
    chunked = table[name]
    return chunked.chunk(0) if chunked.num_chunks else pa.nulls(0, chunked.type)
