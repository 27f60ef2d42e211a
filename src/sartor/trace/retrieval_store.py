"""Retrieval index of an adapter's training rows, made once and opened by mmap afterwards.

A hundred thousand rows take some ten seconds to read and to index, and milliseconds to open. The folder is that of
stored_rows.py. It holds the rows' text: `sartor revoke` names it, and forgetting a user removes it, as the sketches.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sartor.core import records, trace_store
from sartor.core.artifacts import Artifact, read_manifest
from sartor.core.errors import ConfigError, SartorError
from sartor.core.filesystem import FileSystem, PrivateFileSystem, create_directory_atomic, writer_lock
from sartor.core.records import Example
from sartor.trace.attribution import Attribution, Method
from sartor.trace.retrieval import MediaIndex, RetrievalIndex, RowSources
from sartor.trace.stored_rows import HEADER, SCHEMA, StoredExamples, map_array, pack_examples
from sartor.trace.traced_adapter import StoredRows, TracedAdapter, TraceQuery, dataset_rows, rows_folder
from sartor.trace.word_index import WordIndex

Notice = Callable[[str], object]
# fewer rows are read and indexed in less time than a folder takes to write
LEAST_STORED_ROWS = 1_000


def open_index(traced: TracedAdapter, notice: Notice = lambda line: None) -> RetrievalIndex:
    """Return the index of the training rows, mapped from the trace store; made and stored if it is absent.

    An index that cannot be written is used all the same, and the notice says why the next call makes it again.
    """
    stored = traced.rows.examples if isinstance(traced.rows, StoredRows) else None
    if stored is not None:
        try:
            return _map_index(stored)
        except (OSError, ValueError, KeyError, TypeError) as error:
            notice(f"the index in {stored.folder} is damaged and made again: {error}")
    examples = [row.example for row in traced.rows]
    is_listed = bool(traced.row_key) and sum(traced.part_counts) == len(examples)
    if len(examples) < LEAST_STORED_ROWS or not is_listed:
        return RetrievalIndex.of(examples)
    notice(f"indexing {len(examples):,} rows once; later traces of this adapter open the index")
    index = RetrievalIndex.of(examples)
    try:
        _write_index(traced, index)
    except (OSError, SartorError) as error:
        problem = error.problem if isinstance(error, SartorError) else error
        notice(f"the index is not kept, and the next trace makes it again: {problem}")
    return index


def retrieval_scores(
    traced: TracedAdapter, queries: Sequence[TraceQuery], notice: Notice = lambda line: None
) -> Attribution:
    """Return the scores of the training rows for queries by shared words."""
    return Attribution(Method.RETRIEVAL, open_index(traced, notice).scores(queries))


def nearest_rows(artifact: Artifact, dataset: Artifact, query: TraceQuery, top: int) -> list[tuple[float, Example]]:
    """Return the `top` training Examples of a Dataset with the highest scores, each with its score, best first.

    artifact: Adapter or Release with which the index is stored. Rows that share nothing with the query are left out.
    """
    index = open_index(dataset_rows(artifact, dataset))
    scores = index.scores([query])[0]
    best = np.argsort(-scores, kind="stable")[:top]
    return [(float(scores[row]), index.examples[row]) for row in best if scores[row] > 0]


def _map_index(stored: StoredExamples) -> RetrievalIndex:
    folder = stored.folder
    names = tuple((source, licence) for source, licence in stored.header["sources"])
    return RetrievalIndex(
        stored,
        prompts=WordIndex(**_mapped(folder, "prompts", WordIndex)),
        replies=WordIndex(**_mapped(folder, "replies", WordIndex)),
        media=MediaIndex(**_mapped(folder, "media", MediaIndex)),
        sources=RowSources(names, map_array(folder, "sources.owners"), map_array(folder, "sources.ids")),
        rejected_rows=map_array(folder, "rejected_rows"),
        equal_rows=map_array(folder, "equal_rows"),
    )


def _mapped(folder: Path, name: str, kind: type) -> dict[str, Any]:
    return {field.name: map_array(folder, f"{name}.{field.name}") for field in fields(kind)}


def _arrays(name: str, part: Any) -> dict[str, Any]:
    """Return the arrays of a part of the index by their names in the folder."""
    return {f"{name}.{field.name}": getattr(part, field.name) for field in fields(part)}


def _write_index(traced: TracedAdapter, index: RetrievalIndex) -> None:
    """Write the index and the rows to the trace store.

    Raises ConfigError if another process writes it or an erasure removed the rows meanwhile, and OSError.
    """
    rows_folder(traced)  # before anything that is computed from rows is written: by it an erasure finds the folder
    folder = traced.index_folder
    arrays = {
        **pack_examples(index.examples),
        **_arrays("prompts", index.prompts),
        **_arrays("replies", index.replies),
        **_arrays("media", index.media),
        "sources.owners": index.sources.owners,
        "sources.ids": index.sources.ids,
        "rejected_rows": index.rejected_rows,
        "equal_rows": index.equal_rows,
    }
    header = {
        "schema": SCHEMA,
        "counts": traced.part_counts,
        "sources": index.sources.names,
        "system_prompt": traced.system_prompt,
        "tools": traced.tools,
    }
    files = PrivateFileSystem()
    files.make_folders(folder.parent, durable=False)
    with writer_lock(folder):
        FileSystem().remove_leftovers(folder)
        with create_directory_atomic(folder, replace=True) as part:
            part.chmod(0o700)
            for name, array in arrays.items():
                files.write(part / f"{name}.npy", _saver(array))
            files.write(part / HEADER, records.canonical(header))
            _check_rows_stand(traced)
        for other in folder.parent.glob("retrieval-*"):  # of another version, or of other rows of rehearsal
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)


def _saver(array: Any) -> Callable[[BinaryIO], object]:
    return lambda stream: np.save(stream, array, allow_pickle=False)


def _check_rows_stand(traced: TracedAdapter) -> None:
    """Raise ConfigError or ArtifactError if an erasure removed the adapter's folder or a Dataset meanwhile."""
    folder = trace_store.trace_path(trace_store.adapter_id(traced.artifact))
    if not (folder / trace_store.ORIGIN).is_file():
        raise ConfigError(f"{folder} was removed meanwhile, by an erasure or by hand", "type the same command again")
    for dataset in traced.datasets:
        if read_manifest(dataset.path)["id"] != dataset.id:
            raise ConfigError(f"{dataset.path} was replaced meanwhile", "type the same command again")
