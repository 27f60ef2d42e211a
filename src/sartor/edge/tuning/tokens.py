"""Rows as tokens in one file, so that the process that tunes loads neither a tokenizer nor Parquet: safetensors, mapped.

ids (N,) int32, learnt (N,) uint8: the tokens of all rows, end to end; lengths (R,) int64; weights (R,) float64;
train: how many of the rows, the first ones, are trained on. Metadata: schema, and the rows' ids, one a line.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sartor.core.errors import ArtifactError
from sartor.models.packing import Encoded
from sartor.tune.tokenized_dataset import Rows

SCHEMA = "1"


def write_tokens(rows: Rows, file: Path) -> None:
    """Write what `read_tokens` reads. Whoever calls moves the file to its place."""
    every = [*rows.train, *rows.held_out]
    save_file(
        {
            "ids": torch.tensor([token for row in every for token in row.ids], dtype=torch.int32),
            "learnt": torch.tensor([on for row in every for on in row.learnt], dtype=torch.uint8),
            "lengths": torch.tensor([len(row.ids) for row in every], dtype=torch.int64),
            "weights": torch.tensor([row.weight for row in every], dtype=torch.float64),
            "train": torch.tensor([len(rows.train)]),
        },
        str(file),
        {"schema": SCHEMA, "example_ids": "\n".join(row.example_id for row in every)},
    )


def read_tokens(file: Path) -> Rows:
    """The rows of a file. Raises ArtifactError where it is not whole, or of another schema."""
    try:
        with safe_open(str(file), framework="pt") as opened:
            said = opened.metadata() or {}
            parts = {name: opened.get_tensor(name) for name in ("ids", "learnt", "lengths", "weights", "train")}
    except Exception as error:  # safetensors' own errors have no common base but Exception
        raise ArtifactError(f"{file} is not whole: {error}", "make it again from the rows") from None
    if said.get("schema") != SCHEMA:
        raise ArtifactError(f"{file} is of schema {said.get('schema')!r}; this Sartor reads {SCHEMA}", "make it again")
    every, count = list(_rows(parts, said["example_ids"].split("\n"))), int(parts["train"][0])
    return Rows(every[:count], every[count:], lengths=[len(row.ids) for row in every])


def _rows(parts: dict[str, torch.Tensor], names: list[str]) -> Iterator[Encoded]:
    low = 0
    for length, weight, name in zip(parts["lengths"].tolist(), parts["weights"].tolist(), names, strict=True):
        high = low + length
        yield Encoded(parts["ids"][low:high].tolist(), parts["learnt"][low:high].bool().tolist(), name, weight)
        low = high
