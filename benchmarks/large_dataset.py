"""A Dataset of a million distinct rows with its drops, written by columns in seconds, in files as of `curate`."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sartor.core.artifacts import Artifact, write_artifact
from sartor.core.parquet_io import DROPS, EXAMPLES, ROWS_PER_GROUP

ROWS = 1_003_521
ROWS_PER_FILE = 100_000
_WORDS = [
    "delivery",
    "refund",
    "parcel",
    "invoice",
    "Saturday",
    "warehouse",
    "courier",
    "address",
    "order",
    "payment",
    "card",
    "gift",
]
_MESSAGE_TYPE = EXAMPLES.field("messages").type.value_type
_PART_TYPE = _MESSAGE_TYPE.field("content").type.value_type


def write_large_dataset(path: Path, rows: int = ROWS, drops: int = 250_000) -> Artifact:
    """Every fifth row is held out. A drop is a duplicate of a row (three of four), or too long."""

    def fill(part: Path) -> dict[str, object]:
        for index, start in enumerate(range(0, rows, ROWS_PER_FILE)):
            numbers = range(start, min(rows, start + ROWS_PER_FILE))
            _write(part / f"examples/part-{index:05d}.parquet", _examples(numbers))
        for index, start in enumerate(range(0, drops, ROWS_PER_FILE)):
            numbers = range(start, min(drops, start + ROWS_PER_FILE))
            _write(part / f"drops/part-{index:05d}.parquet", _drops(numbers, rows))
        held_out = -(-rows // 5)
        reasons = {"near_duplicate": drops // 2, "exact_duplicate": drops // 4, "too_long": drops // 4}
        source = {"source": "rows.jsonl", "path": "rows.jsonl", "read": rows + drops, "kept": rows, "licence": "MIT"}
        counts = {"splits": {"train": rows - held_out, "eval": held_out}, "dropped": reasons, "read": rows + drops}
        return {"licence": "MIT", "parents": [], "sources": [source], "counts": {**counts, "kept": rows, "made": 0}}

    return write_artifact(path, "dataset", fill)


def row_id(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()[:32]


def _write(file: Path, table: Any) -> None:
    file.parent.mkdir(exist_ok=True)
    pq.write_table(table, file, compression="zstd", row_group_size=ROWS_PER_GROUP)


def _text(number: int, draw: random.Random) -> str:
    return f"question {number}: " + " ".join(draw.choices(_WORDS, k=12))


def _examples(numbers: range) -> Any:
    draw, count = random.Random(numbers.start), len(numbers)
    texts: list[str] = []
    for number in numbers:
        texts += [_text(number, draw), f"Answer {number % 97} about {draw.choice(_WORDS)}."]
    parts = pa.StructArray.from_arrays(
        [
            pa.array(["text"] * len(texts)),
            pa.array(texts),
            pa.nulls(len(texts), pa.string()),
            pa.nulls(len(texts), pa.string()),
        ],
        fields=list(_PART_TYPE),
    )
    empty, weights = pa.array([""] * len(texts)), pa.nulls(len(texts), pa.float64())
    messages = pa.StructArray.from_arrays(
        [pa.array(["user", "assistant"] * count), _lists(parts, 1), empty, empty, empty, empty, weights],
        fields=list(_MESSAGE_TYPE),
    )
    origins = pa.array(
        [[{"source": "rows.jsonl", "locator": f"rows.jsonl:{number}", "licence": "MIT", "parents": [], "step": "read",
           "date": "", "made_by": ""}] for number in numbers],
        EXAMPLES.field("origins").type,
    )  # fmt: skip
    columns = {
        "id": pa.array([row_id(number) for number in numbers]),
        "messages": _lists(messages, 2),
        "rejected": pa.array([[]] * count, EXAMPLES.field("rejected").type),
        "tools": pa.array([""] * count),
        "group": pa.array([str(number) for number in numbers]),
        "split": pa.array(["train" if number % 5 else "eval" for number in numbers]),
        "weight": pa.array([1.0] * count),
        "origins": origins,
        "steps": pa.array([[]] * count, EXAMPLES.field("steps").type),
        "rating": pa.array([0.0] * count),
    }
    return pa.table(columns, EXAMPLES)


def _lists(values: Any, size: int) -> Any:
    return pa.ListArray.from_arrays(pa.array(range(0, len(values) + 1, size), pa.int32()), values)


def _drops(numbers: range, rows: int) -> Any:
    draw = random.Random(numbers.start)
    columns: dict[str, Sequence[Any]] = {name: [""] * len(numbers) for name in DROPS.names}
    reasons = ("near_duplicate", "too_long", "near_duplicate", "exact_duplicate")
    columns["reason"] = [reasons[number % 4] for number in numbers]
    columns["source"] = ["rows.jsonl"] * len(numbers)
    columns["locator"] = [f"rows.jsonl:{rows + number}" for number in numbers]
    columns["detail"] = ["like another row" if number % 4 != 1 else "1,000 words" for number in numbers]
    # some rows have many duplicates
    originals = [draw.randrange(rows if number % 3 else 1000) for number in numbers]
    columns["kept"] = ["" if number % 4 == 1 else row_id(row) for number, row in zip(numbers, originals, strict=True)]
    columns["text"] = [f"user: {_text(row, draw)}" for row in originals]
    columns["score"] = [None if number % 4 == 1 else 0.7 + number % 30 / 100 for number in numbers]
    columns["id"] = [row_id(-number) for number in numbers]
    return pa.table({name: pa.array(columns[name], DROPS.field(name).type) for name in DROPS.names}, DROPS)
