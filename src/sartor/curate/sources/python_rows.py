"""Rows given from Python: lists of mappings, DataFrames, Datasets of the `datasets` library.

A source `rows:NAME` means the rows with that name. They are written as JSON Lines below the work directory, row by
row, and from there read like any other file: in pieces, by several processes, with the same forms and Drops. Line N is
row N, counted from 1, so a locator is `NAME:N`; the file's digest is that of the rows, whichever library they came
from. Images and recordings are written beside it, once each.

A missing value (None, NaN, NaT, NA) is an absent field. Dates and times become ISO 8601, categories and class numbers
their names, numbers of numpy plain numbers, decimals text.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import hashlib
import io
import json
import math
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from sartor.core.errors import ConfigError, SourceError
from sartor.core.html import clipped
from sartor.curate.sources import file_formats, source_files
from sartor.curate.sources.row_formats import column_names, suggest_columns
from sartor.curate.sources.source_files import HEAD_ROWS, ROWS
from sartor.curate.sources.types import SourceOptions

DEFAULT_NAME = "rows"
BATCH_ROWS = 1024
# names of parts of a DatasetDict that are held out
HELD_OUT = ("eval", "test", "validation", "valid", "dev")
_SCALARS = (str, int, bool, type(None))  # written as they are
_PLAIN = (*_SCALARS, float)


@dataclass
class WrittenRows:
    """Rows of one name on disk.

    head: the first rows, by which their form is found.
    notes: sentences about values that were written in another form.
    """

    file: Path
    count: int = 0
    head: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    notes: dict[str, None] = field(default_factory=dict)


def named_rows(rows: Any) -> dict[str, Any]:
    """Return rows by name: each part of a DatasetDict or of a mapping of rows, or all as `rows`.

    Raises ConfigError for a mapping of columns, for a name that no locator can hold, and for an object that holds no
    rows.
    """
    if not isinstance(rows, Mapping):
        return {DEFAULT_NAME: rows}
    if not rows:
        raise ConfigError("rows is an empty mapping", 'rows=[{"question": "...", "answer": "..."}]')
    for name, part in rows.items():
        if not isinstance(name, str) or not name or any(mark in name for mark in "/\\:\0\n"):
            raise ConfigError(f"{name!r:.80} is no name of rows", 'rows={"train": ..., "test": ...}')
        if isinstance(part, (str, bytes, int, float)) or (
            isinstance(part, Sequence) and part and not isinstance(part[0], Mapping)
        ):
            raise ConfigError(
                f"rows is a mapping, and {name!r} holds a {type(part).__name__}, not rows",
                "rows=pandas.DataFrame(rows) for columns, rows=[row] for one row",
            )
    return dict(rows)


def write_rows(
    rows: Any,
    folder: Path,
    name: str = DEFAULT_NAME,
    *,
    on_head: Callable[[WrittenRows], object] = lambda written: None,
    on_rows: Callable[[int], object] = lambda count: None,
) -> WrittenRows:
    """Write rows to `folder/NAME.jsonl` and their media to `folder/media`, one batch in memory at a time.

    on_head: called once, when the first rows are known. on_rows: called with the number of rows written, now and then.
    Raises ConfigError for what holds no rows and for columns of one name; SourceError for no row, and for a value that
    no row can hold, with its row and column.
    """
    written = WrittenRows(folder / f"{name}.jsonl")
    writer = _RowWriter(folder, written.notes)
    (folder / "media").mkdir(parents=True, exist_ok=True)
    with written.file.open("wb") as stream:
        for number, row in enumerate(_iterate(rows, written.notes), 1):
            if not isinstance(row, Mapping):
                raise ConfigError(
                    f"row {number} is a {type(row).__name__}, not a mapping of columns to values",
                    'rows=[{"text": text} for text in texts]' if isinstance(row, str) else "[row._asdict(), ...]",
                )
            try:
                plain = writer.plain_row(row, number)
                line = _line(plain)
            except RecursionError:
                problem = f"row {number} is nested too deeply, or holds itself"
                raise SourceError(problem, "leave that column out, or make it text") from None
            if number <= HEAD_ROWS:
                written.head.append((str(number), plain))
            stream.write(line)
            written.count = number
            if number == HEAD_ROWS:
                on_head(written)
            if number % BATCH_ROWS == 0:
                on_rows(number)
    if not written.count:
        problem = f"{name}: the {_describe(rows)} holds no row"
        raise SourceError(problem, 'rows=[{"question": "...", "answer": "..."}], with one row at least')
    if written.count < HEAD_ROWS:
        on_head(written)
    return written


def _line(row: Mapping[str, Any]) -> bytes:
    """Return a row as a line of JSON in UTF-8; with a lone surrogate in ASCII, for the reader to count as a Drop."""
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(row, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def check_form(source: SourceOptions, written: WrittenRows) -> None:
    """Raise ConfigError, with the columns, unless the first rows have a form that is read."""
    if source_files.form_of(written.head, source, f"the table {written.file.stem!r}"):
        return
    rows = [row for _, row in written.head]
    columns = column_names(rows)
    prompt, completion = suggest_columns(rows)
    raise ConfigError(
        f"the rows have the columns {', '.join(map(repr, columns[:12])) or 'none'}, and none is called prompt or "
        "completion",
        f'fields={{"prompt": {prompt!r}, "completion": {completion!r}}}',
    )


def source_path(name: str) -> str:
    """Return the path of the source that means the rows of a name."""
    return ROWS if name == DEFAULT_NAME else f"{ROWS}{name}"


@dataclass(frozen=True)
class _RowWriter:
    """Conversion of rows to JSON values. notes: see WrittenRows."""

    folder: Path
    notes: dict[str, None]

    def plain_row(self, row: Mapping[Any, Any], number: int) -> dict[str, Any]:
        """Return a row as JSON values without its missing ones. Raises SourceError."""
        plain: dict[str, Any] = {}
        for key, value in row.items():
            name = key if type(key) is str else str(key)
            if name in plain:
                raise SourceError(f"row {number} has two columns called {name!r}", "give each a name of its own")
            value = value if type(value) in _SCALARS else self._plain(value, number, name)
            if value is not None:
                plain[name] = value
        return plain

    def _plain(self, value: Any, number: int, column: str) -> Any:
        """Return a value as JSON value; None for a missing one."""
        value = _plain_scalar(value)
        if type(value) in _PLAIN:
            return value
        if isinstance(value, PurePath) and file_formats.kind_of(value.name) not in file_formats.MEDIA_KINDS:
            return str(value)
        if isinstance(value, (bytes, bytearray, PurePath)) or hasattr(value, "getbands"):
            return self._media(value, number, column)
        if isinstance(value, Mapping):
            return self._plain_mapping(value, number, column)
        if isinstance(value, (set, frozenset)):
            value = sorted(value, key=repr)
        if isinstance(value, (list, tuple)):
            return [self._plain(item, number, column) for item in value]
        if callable(tolist := getattr(value, "tolist", None)):  # numpy's arrays and numbers, tensors, columns
            return self._plain(tolist(), number, column)
        raise SourceError(
            f"row {number}: the column {column!r} holds a {_describe(value)}, which no row can hold",
            f"leave the column out, or make it text: str(row[{column!r}])",
        )

    def _plain_mapping(self, value: Mapping[Any, Any], number: int, column: str) -> Any:
        """Return a nested mapping; {bytes, path}, as the `datasets` library stores media, as the media."""
        if set(value) == {"bytes", "path"}:
            if value["bytes"] is not None:
                return self._media(value["bytes"], number, column)
            return None if value["path"] is None else self._media(Path(value["path"]), number, column)
        plain = {str(key): self._plain(inner, number, f"{column}.{key}") for key, inner in value.items()}
        if len(plain) < len(value):
            raise SourceError(f"row {number}: {column!r} has two keys of one spelling", "give each a name of its own")
        return {key: inner for key, inner in plain.items() if inner is not None}

    def _media(self, value: Any, number: int, column: str) -> str:
        """Write an image or a recording beside the rows; return its path from there. Raises SourceError.

        value: bytes, the path of a file, or a picture of Pillow, which is written as PNG.
        """
        if isinstance(value, PurePath):
            try:
                value = Path(value).expanduser().read_bytes()
            except OSError as error:
                problem = f"row {number}: the file {str(value)!r} of the column {column!r}: {error.strerror}"
                raise SourceError(
                    problem, f"ls -l {str(value)!r}; a path is taken from the current directory"
                ) from None
        elif not isinstance(value, (bytes, bytearray)):
            buffer = io.BytesIO()
            try:
                value.save(buffer, "PNG")
            except (OSError, ValueError) as error:  # a mode that PNG has not, or a file that is truncated
                problem = f"row {number}: the picture of the column {column!r} cannot be written as PNG: {error}"
                raise SourceError(problem, f"row[{column!r}].convert('RGB')") from None
            value = buffer.getvalue()
            self.notes[f"{column}: pictures in memory are written as PNG"] = None
        content = bytes(value)
        suffix = file_formats.suffix_of(content[: file_formats.HEAD_BYTES])
        if not suffix:
            raise SourceError(
                f"row {number}: the column {column!r} holds {len(content):,} bytes that are no image or recording",
                f"decode text: row[{column!r}].decode(); or leave the column out",
            )
        name = f"media/{hashlib.sha256(content).hexdigest()}{suffix}"
        file = self.folder / name
        if not file.exists():
            file.write_bytes(content)
        return name


def _plain_scalar(value: Any) -> Any:
    """Return a single value as text, number, boolean or None; any other value as it is."""
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, (str, datetime.timedelta, uuid.UUID)):
        return str(value)
    # pandas' NA and NaT, numpy's NaT
    if type(value).__name__ in ("NAType", "NaTType") or (type(value).__name__ == "datetime64" and str(value) == "NaT"):
        return None
    if isinstance(value, (float, decimal.Decimal)):
        if math.isnan(value):
            return None
        return float(value) if isinstance(value, float) and math.isfinite(value) else str(value)
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    # numpy would give nanoseconds as a number
    return str(value) if type(value).__name__ == "datetime64" else value


def _iterate(rows: Any, notes: dict[str, None]) -> Iterator[Any]:
    """Yield the rows of any kind of table. Raises ConfigError for an object that holds no rows."""
    names = {f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in type(rows).__mro__}
    if "pandas.DataFrame" in names:
        return _pandas_rows(rows, notes)
    if "polars.DataFrame" in names:
        return (row for part in rows.iter_slices(BATCH_ROWS) for row in part.iter_rows(named=True))
    if "polars.LazyFrame" in names:
        raise ConfigError("rows is a LazyFrame, whose rows are not there yet", "rows=frame.collect()")
    if names & {"datasets.Dataset", "datasets.IterableDataset"}:
        return _hf_rows(rows, notes)
    if names & {"pyarrow.Table", "pyarrow.RecordBatch", "pyarrow.RecordBatchReader"}:
        _check_names(rows.schema.names)
        batches = rows.to_batches(BATCH_ROWS) if "pyarrow.Table" in names else rows
        return (row for batch in ([rows] if "pyarrow.RecordBatch" in names else batches) for row in batch.to_pylist())
    if isinstance(rows, (str, bytes, PurePath)):
        raise ConfigError(
            f"rows is {clipped(repr(rows), 80)}, and rows are given as they are",
            f'sartor.curate({{"sources": [{{"path": {clipped(repr(str(rows)), 80)}, "licence": "own"}}]}}, out)',
        )
    if not isinstance(rows, Iterable):
        raise ConfigError(
            f"rows is a {_describe(rows)}, which holds no rows",
            "a list of dicts, a DataFrame of pandas or polars, or a Dataset of the datasets library",
        )
    return iter(rows)


def _pandas_rows(frame: Any, notes: dict[str, None]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a DataFrame of pandas. An index that has a name is a column; others are positions."""
    if frame.columns.nlevels > 1:
        problem = f"the columns have {frame.columns.nlevels} levels"
        raise ConfigError(problem, "frame.columns = ['_'.join(map(str, names)) for names in frame.columns]")
    index_names = [name for name in frame.index.names if name is not None]
    _check_names([*index_names, *frame.columns])
    if not index_names and not str(frame.index.dtype).startswith(("int", "uint")):
        notes["the index has no name and is not read: frame.reset_index() makes it a column"] = None
    for start in range(0, len(frame), BATCH_ROWS):
        part = frame.iloc[start : start + BATCH_ROWS]
        values = {str(name): part.index.get_level_values(name).astype(object) for name in index_names}
        # by column: DataFrame.to_dict would make whole numbers beside a fraction fractions
        values |= {str(name): part.iloc[:, position].astype(object) for position, name in enumerate(frame.columns)}
        for row in zip(*values.values(), strict=True):
            yield dict(zip(values, row, strict=True))


def _hf_rows(dataset: Any, notes: dict[str, None]) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a Dataset of the `datasets` library as they are stored: media as bytes, classes as names.

    A Dataset with a transform of its own is read through it.
    """
    if (getattr(dataset, "format", None) or {}).get("type") == "custom":
        yield from dataset
        return
    features = dataset.features or {}
    classes = {name: feature for name, feature in features.items() if type(feature).__name__ == "ClassLabel"}
    for name in classes:
        notes[f"{name}: class numbers are written as their names"] = None
    for batch in dataset.with_format("arrow").iter(BATCH_ROWS):
        for row in batch.to_pylist():
            for name, feature in classes.items():
                # the library writes -1 for a class that nobody stated
                row[name] = feature.int2str(row[name]) if row[name] is not None and row[name] >= 0 else None
            yield row


def _check_names(names: Iterable[Any]) -> None:
    """Raise ConfigError for two columns of one name, one of which would hide the other."""
    seen: set[str] = set()
    for name in map(str, names):
        if name in seen:
            raise ConfigError(
                f"two columns are called {name!r}; one would hide the other",
                "give each a name of its own: frame.columns = [...]",
            )
        seen.add(name)


def _describe(rows: Any) -> str:
    return f"{type(rows).__module__.partition('.')[0]}.{type(rows).__name__}".removeprefix("builtins.")
