"""Parquet index of the origins of every Example.

    row      position of the Example among all rows of examples/*.parquet, from 0
    id       of the Example
    source   as the recipe declares it         path     a file of the source
    locator  position in it (faq.jsonl:12)     parents  ids of the Examples from which this one was made

It is written by columns, a batch at a time, so memory does not grow with the Dataset. A million rows take some 20 MB
and are read, digest included, in well under a second. For a Dataset without the index (schema 1) the `origins` column
is read instead.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sartor.core.artifacts import SCHEMA, Artifact, check_file
from sartor.core.errors import ArtifactError, ConfigError
from sartor.core.parquet_io import column, numbers, to_index_array, to_string_array

INDEX = "lineage/rows.parquet"
ROWS_PER_GROUP = 1 << 16
_WORD = pa.dictionary(pa.int32(), pa.string())
COLUMNS = pa.schema(
    [
        ("row", pa.int64()),
        ("id", pa.string()),
        ("source", _WORD),
        ("path", _WORD),
        ("locator", pa.string()),
        ("parents", pa.list_(pa.string())),
    ],
    metadata={b"sartor.schema": str(SCHEMA).encode()},
)

Pair = tuple[str, str]  # (declared source, file of it)


def write(part: Path) -> int:
    """Write the index of a Dataset's directory from its `examples/*.parquet`; return its number of origins."""
    file = part / INDEX
    file.parent.mkdir(exist_ok=True)
    count = 0
    options = {
        "compression": "zstd",
        "use_dictionary": ["source", "path"],
        "column_encoding": {"row": "DELTA_BINARY_PACKED"},
    }
    with pq.ParquetWriter(file, COLUMNS, **options) as writer:
        for batch in _origins(sorted((part / "examples").glob("*.parquet"))):
            writer.write_batch(batch)
            count += batch.num_rows
    return count


def _origins(files: Iterable[Path]) -> Iterator[Any]:
    """Yield the rows of the index as record batches, read from Examples."""
    first = 0
    for file in files:
        with _opened(file) as parquet:
            for batch in parquet.iter_batches(ROWS_PER_GROUP, columns=["id", "origins"]):
                owner = pc.list_parent_indices(batch["origins"])
                origin = pc.list_flatten(batch["origins"])
                locator = pc.struct_field(origin, "locator")
                columns = [
                    pc.add(pc.cast(owner, pa.int64()), first),
                    batch["id"].take(owner),
                    pc.struct_field(origin, "source").dictionary_encode(),
                    _path_of(locator).dictionary_encode(),
                    locator,
                    pc.struct_field(origin, "parents"),
                ]
                yield pa.RecordBatch.from_arrays(columns, schema=COLUMNS)
                first += batch.num_rows


def _path_of(locator: Any) -> Any:
    """Return the file of each locator in a column: `faq.jsonl` for `faq.jsonl:12`."""
    return pc.replace_substring_regex(locator, r":[^:]*$", "")


def example_files(dataset: Artifact, folder: str = "examples/") -> list[Path]:
    """Return the Parquet files in a folder of a Dataset, in order."""
    names = sorted(name for name in dataset.manifest["files"] if name.startswith(folder) and name.endswith(".parquet"))
    return [dataset.path / name for name in names]


def read(dataset: Artifact, columns: Sequence[str]) -> Any:
    """Return columns of the index as an Arrow table with one chunk per column.

    No other file of the Dataset is read, unless it has no index; its Examples are then checked and read instead.
    Raises ArtifactError if the index was changed or cannot be read.
    """
    if INDEX in dataset.manifest["files"]:
        check_file(dataset, INDEX)
        with _opened(dataset.path / INDEX) as parquet:
            table = parquet.read(list(columns))
    else:
        files = example_files(dataset)
        for file in files:
            check_file(dataset, file.relative_to(dataset.path).as_posix())
        table = pa.Table.from_batches(_origins(files), COLUMNS).select(list(columns))
    return table.unify_dictionaries().combine_chunks()


def _opened(file: Path) -> Any:
    try:
        return pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as error:
        raise ArtifactError(
            f"{file} is not readable Parquet: {error}", "sartor curate RECIPE --out DATASET --replace"
        ) from None


def whole_id(ids: Any, example: str) -> str:
    """Return the id that begins with `example`, if exactly one does: cards show the first twelve digits.

    ids: Arrow array of the ids.
    Otherwise returns `example` unchanged. Raises ConfigError if several ids match.
    """
    if not 6 <= len(example) < 32:
        return example
    matches = pc.unique(pc.filter(ids, pc.starts_with(ids, example)))
    if len(matches) > 1:
        raise ConfigError(f"{len(matches)} ids begin with {example}", f"--example {matches[0].as_py()}")
    return str(matches[0].as_py()) if len(matches) else example


def display_name(source: str, path: str) -> str:
    """Return the name of a file in messages; it includes the source, since two sources may hold files of one name."""
    if source == path or source.endswith("/" + path):
        return source
    return path if re.search(r"[*?\[]", source) else f"{source}/{path}"


@dataclass(frozen=True)
class OriginFiles:
    """Source and file of each of M origins of the index.

    codes: (M,) int64, source code * len(paths) + path code.
    """

    sources: list[str]
    paths: list[str]
    codes: Any

    @classmethod
    def of(cls, table: Any) -> OriginFiles:
        """Build it from the index's columns `source` and `path`."""
        source, path = column(table, "source"), column(table, "path")
        sources, paths = source.dictionary.to_pylist(), path.dictionary.to_pylist()
        codes = numbers(source.indices).astype(np.int64) * max(1, len(paths)) + numbers(path.indices)
        return cls(sources, paths, codes)

    def pairs(self) -> set[Pair]:
        """Return every pair of a source and one of its files."""
        if not len(self.codes):
            return set()
        # rows of a file are adjacent, so the positions where the code changes give every pair without a sort
        starts = np.flatnonzero(np.diff(self.codes, prepend=-1))
        return {
            (self.sources[code // len(self.paths)], self.paths[code % len(self.paths)])
            for code in set(self.codes[starts])
        }

    def mask(self, pairs: Collection[Pair]) -> Any:
        """Return a mask (M,) of the origins in these files."""
        source_code = {word: code for code, word in enumerate(self.sources)}
        path_code = {word: code for code, word in enumerate(self.paths)}
        file_codes = [
            source_code[source] * len(self.paths) + path_code[path]
            for source, path in pairs
            if source in source_code and path in path_code
        ]
        if len(file_codes) == 1:
            return self.codes == file_codes[0]
        return np.isin(self.codes, np.array(file_codes, np.int64))


def known_pairs(manifest: Mapping[str, Any], files: OriginFiles) -> set[Pair]:
    """Return the (source, file) pairs of a Dataset, including those without a remaining row."""
    return files.pairs() | {(source["source"], source["path"]) for source in manifest.get("sources", [])}


def pairs_by_name(pairs: Iterable[Pair], name: str) -> dict[str, set[Pair]]:
    """Return the pairs that `name` matches, by display name: a declared source, `source/path`, or a file's path.

    More than one key means that several files share a bare file name.
    """
    spellings = {name, os.path.normpath(name)}
    pairs = list(pairs)
    for rule in (lambda pair: pair[0], lambda pair: display_name(*pair), lambda pair: "/".join(pair)):
        if matches := {pair for pair in pairs if rule(pair) in spellings}:
            return {name: matches}
    by_display_name: dict[str, set[Pair]] = {}
    for pair in pairs:
        if pair[1] in spellings:
            by_display_name.setdefault(display_name(*pair), set()).add(pair)
    return by_display_name


@dataclass(frozen=True)
class RowSample:
    """Rows that a query matched.

    count: number of rows.
    first: (id, locator) of the first few.
    """

    count: int
    first: list[Pair]


def rows_only_from(
    dataset: Artifact, pairs: Collection[Pair], selected: Collection[Pair], max_rows: int = 3
) -> RowSample:
    """Return the rows with an origin in `selected` and none outside `pairs`.

    Only `pairs` gives permission to use these rows.
    """
    table = read(dataset, ["row", "id", "source", "path", "locator"])
    files, row = OriginFiles.of(table), numbers(column(table, "row"))
    count = int(row[-1]) + 1 if len(row) else 0
    outside = np.bincount(row[~files.mask(pairs)], minlength=count) > 0
    positions = np.flatnonzero(files.mask(selected) & ~outside[row])
    _, first_indices = np.unique(row[positions], return_index=True)
    sample = to_index_array(positions[first_indices[:max_rows]])
    ids, locators = column(table, "id").take(sample).to_pylist(), column(table, "locator").take(sample).to_pylist()
    return RowSample(len(first_indices), list(zip(ids, locators, strict=True)))


def dropped_ids(dataset: Artifact, ids: Any, pairs: Collection[Pair]) -> list[str]:
    """Return those of `ids` that belong to dropped rows of these files."""
    dropped: list[str] = []
    value_set = to_string_array(["\n".join(pair) for pair in pairs])
    for file in example_files(dataset, "drops/") if len(ids) else []:
        check_file(dataset, file.relative_to(dataset.path).as_posix())
        with _opened(file) as parquet:
            for batch in parquet.iter_batches(ROWS_PER_GROUP, columns=["id", "source", "locator"]):
                batch = batch.filter(pc.is_in(batch["id"], value_set=ids))
                pair = pc.binary_join_element_wise(batch["source"], _path_of(batch["locator"]), "\n")
                dropped += batch["id"].filter(pc.is_in(pair, value_set=value_set)).to_pylist()
    return dropped
