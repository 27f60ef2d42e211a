"""Rows of Datasets and Reports as tables of pandas, Polars and the `datasets` library."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sartor.core.artifacts import Dataset, Report, RowSplit, check_file
from sartor.core.errors import ConfigError, missing_package
from sartor.core.parquet_io import DROPS, EXAMPLES

_METRIC_COLUMNS = ("base", "tuned", "difference", "low", "high")


def dataset_frame(dataset: Dataset, split: RowSplit | None) -> Any:
    """Return rows as a pandas DataFrame, as `Dataset.to_pandas` documents it."""
    return _to_pandas(_dataset_table(dataset, split))


def dataset_polars(dataset: Dataset, split: RowSplit | None) -> Any:
    """Return rows as a Polars DataFrame."""
    import polars

    return polars.from_arrow(_dataset_table(dataset, split))


def dataset_hf(dataset: Dataset, split: RowSplit | None) -> Any:
    """Return rows as a Dataset of the `datasets` library. Raises ExtraError without it."""
    try:
        import datasets
    except ImportError:
        raise missing_package("datasets", "hub") from None
    table = _dataset_table(dataset, split)
    if split != "dropped":
        for name in ("messages", "rejected"):
            table = table.set_column(table.schema.get_field_index(name), name, _openai_turns(table[name]))
    return datasets.Dataset(table)


def report_frame(report: Report, table: str) -> Any:
    """Return the rows or the metrics of a Report as a pandas DataFrame. Raises ConfigError for another table."""
    if table == "rows":
        check_file(report, "rows.parquet")
        return _to_pandas(pq.read_table(report.path / "rows.parquet").replace_schema_metadata(None))
    if table != "metrics":
        raise ConfigError(
            f"a Report has no table {table!r:.80}", 'report.to_pandas("rows") or report.to_pandas("metrics")'
        )
    rows = []
    for name, metric in report.manifest["metrics"].items():
        rows.append({"metric": name, **{column: metric[column] for column in _METRIC_COLUMNS}})
    return _to_pandas(pa.Table.from_pylist(rows)).set_index("metric")


def _dataset_table(dataset: Dataset, split: RowSplit | None) -> Any:
    """Return the rows of a Dataset, or its dropped rows, as an Arrow table.

    Its files are checked again, since they may have changed after it was opened. Raises ConfigError for an unknown
    split, ArtifactError for a changed file.
    """
    if split is not None and split not in get_args(RowSplit):
        raise ConfigError(
            f"there is no split {split!r:.80}",
            f"one of {', '.join(get_args(RowSplit))}; or none, for all but dropped rows",
        )
    folder, schema = ("drops/", DROPS) if split == "dropped" else ("examples/", EXAMPLES)
    tables = []
    for name in sorted(dataset.manifest["files"]):
        if name.startswith(folder) and name.endswith(".parquet"):
            check_file(dataset, name)
            tables.append(pq.read_table(dataset.path / name))
    table = pa.concat_tables(tables or [schema.empty_table()], promote_options="default").replace_schema_metadata(None)
    if split == "dropped":
        return table
    if split is not None:
        table = table.filter(pc.equal(table["split"], split))
    prompts, replies = [], []
    for prompt, reply in _texts(table):
        prompts.append(prompt)
        replies.append(reply)
    table = table.add_column(0, "reply", pa.array(replies, pa.string()))
    return table.add_column(0, "prompt", pa.array(prompts, pa.string()))


def _texts(table: Any) -> Iterator[tuple[str, str]]:
    """Yield (text of the turn before the last, text of the last turn) of each row; a document has no prompt."""
    for batch in table.select(["messages"]).to_batches(1024):
        for turns in batch.column(0).to_pylist():
            texts = ["".join(part["text"] or "" for part in turn["content"]) for turn in turns[-2:]]
            yield ("" if len(texts) < 2 else texts[0]), texts[-1]


_FIELDS = ("name", "tool_calls", "tool_call_id", "reasoning_content")
_PART = pa.struct([("type", pa.string()), ("text", pa.string()), ("image", pa.string()), ("audio", pa.string())])


def _openai_turns(column: Any) -> Any:
    """Return conversations in the OpenAI form: an Arrow array of lists of turns, without fields that no turn uses.

    Turns have a `weight`, null for 1, if any has one that is not 1. The content of a turn is text, or a list of parts
    if any turn has media: a column cannot hold both.
    """
    stored = [row or [] for row in column.to_pylist()]
    turns = [turn for row in stored for turn in row]
    has_weight = any(turn.get("weight") is not None for turn in turns)
    has_media = any(part["type"] != "text" for turn in turns for part in turn["content"])
    used = ["role", *(name for name in _FIELDS if any(turn.get(name) for turn in turns))]
    conversations = []
    for row in stored:
        conversation = []
        for turn in row:
            content = turn["content"] if has_media else "".join(part["text"] for part in turn["content"])
            fields_of_turn = {"content": content, **{name: turn[name] or None for name in used}}
            if has_weight:
                fields_of_turn["weight"] = turn["weight"]
            conversation.append(fields_of_turn)
        conversations.append(conversation)
    fields = [(name, pa.string()) for name in used]
    fields.insert(1, ("content", pa.list_(_PART) if has_media else pa.string()))
    if has_weight:
        fields.append(("weight", pa.float64()))
    return pa.array(conversations, pa.list_(pa.struct(fields)))


def _to_pandas(table: Any) -> Any:
    """Return an Arrow table as a pandas DataFrame. Raises ExtraError without pandas."""
    try:
        import pandas  # noqa: F401
    except ImportError:
        raise missing_package("pandas", "notebook") from None
    return table.to_pandas()
