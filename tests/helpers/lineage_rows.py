"""Small Datasets whose rows say what they were made from."""

from __future__ import annotations

from pathlib import Path

import sartor
from sartor.core import parquet_io
from sartor.core.artifacts import Artifact, seal
from sartor.core.lineage import origin_index

A, B = ("data/a.jsonl", "a.jsonl"), ("data/b.jsonl", "b.jsonl")


def example(text: str, *origins: sartor.Origin) -> sartor.Example:
    turns = (sartor.Message.of("user", text), sartor.Message.of("assistant", text))
    return sartor.Example(turns, origins or (origin(A, 1),), split="train")


def origin(pair: tuple[str, str], line: int, *parents: sartor.Example | str) -> sartor.Origin:
    ids = tuple(parent if isinstance(parent, str) else parent.id for parent in parents)
    return sartor.Origin(pair[0], f"{pair[1]}:{line}", "MIT", ids)


def write(
    folder: Path, examples: list[sartor.Example], drops: list[sartor.Drop] = [], *, index: bool = True, files: int = 1
) -> Artifact:
    """A Dataset of these rows, in several Parquet files. Sealed in place: what an fsync costs is not asked here."""
    for number in range(files):
        parquet_io.write_examples(folder / f"examples/part-{number:05}.parquet", examples[number::files])
    parquet_io.write_drops(folder / "drops/part-00000.parquet", drops)
    if index:
        origin_index.write(folder)
    pairs = sorted({(one.source, one.locator.rpartition(":")[0]) for row in examples for one in row.origins})
    sources = [{"source": source, "path": path, "licence": "MIT", "kept": 1} for source, path in pairs]
    return Artifact(folder, seal(folder, "dataset", {"parents": [], "sources": sources}))
