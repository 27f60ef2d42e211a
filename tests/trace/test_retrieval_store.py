"""The stored retrieval index: the same bits as one made anew, kills, two writers, erasures, and what a trace reads."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sartor
from lineage_rows import write
from media_files import png
from rows import document, row
from sartor.core import catalogue, filesystem, home, parquet_io, trace_store
from sartor.core.artifacts import Artifact, write_artifact
from sartor.core.records import Example, Message, Origin, Part
from sartor.media import content_parts
from sartor.trace import retrieval_store
from sartor.trace.attribution import Method
from sartor.trace.credit import rank_groups, sum_by_source
from sartor.trace.retrieval import RetrievalIndex
from sartor.trace.retrieval_store import nearest_rows, open_index
from sartor.trace.stored_rows import StoredExamples
from sartor.trace.traced_adapter import StoredRows, TracedAdapter, TraceQuery, dataset_rows, open_traced

PICTURES = [png(shade) for shade in (10, 200)]
QUERIES = [
    TraceQuery((Message.of("user", "what colour is door 3?"),), "door 3 is red as a rose"),
    TraceQuery((Message.of("system", "be brief"), Message.of("user", "问")), "商店九点开门"),
    TraceQuery((Message.of("user", "nothing alike \udc80"),), "zzz"),
    TraceQuery(
        (
            Message(
                "user", (Part("image", media=content_parts.url_of(PICTURES[0], "image/png")), Part("text", "what?"))
            ),
        ),
        "a scratch",
    ),
]


@pytest.fixture(autouse=True)
def every_index_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval_store, "LEAST_STORED_ROWS", 1)


def rows() -> list[Example]:
    """Plain rows, a pair, documents, duplicates, Chinese, tools, media, several origins."""
    origins = (Origin("a", "a.jsonl:1", "MIT", ("parent",)), Origin("b", "b.jsonl:2", "CC0-1.0"))
    media = [Part("image", media=f"media/{hashlib.sha256(picture).hexdigest()}.png") for picture in PICTURES]
    listed = [
        *(row(f"what colour is door {n}?", f"door {n} is {'red' if n % 2 else 'blue'}") for n in range(12)),
        row("what colour is door 3?", "Door 3 is red!"),
        row("colour?", "blue as the sky", rejected=(Message.of("assistant", "red as a rose"),)),
        row("问", "商店九点开门"),
        row("act", "done", tools='[{"type":"function"}]', rating=-0.5, weight=0.25, steps=("clean",), group="g"),
        row("sys", "a", "b", roles=("system", "user", "assistant")),
        document("The shop opens at nine."),
        *(
            Example((Message("user", (part, Part("text", "what?"))), Message.of("assistant", "a scratch")), origins)
            for part in media
        ),
    ]
    return [dataclasses.replace(example, split="train") for example in listed]


def made(tmp_path: Path, examples: list[Example] | None = None) -> TracedAdapter:
    """An adapter by its manifest alone, and the rows of a Dataset."""
    dataset = write(tmp_path / "d", rows() if examples is None else examples, files=2)
    adapter = write_artifact(tmp_path / "a", "adapter", lambda part: {"parents": [dataset.as_parent()]})
    catalogue.register(adapter)
    return dataset_rows(adapter, dataset)


def reopened(traced: TracedAdapter) -> TracedAdapter:
    return dataset_rows(traced.artifact, traced.dataset)


def folders() -> list[Path]:
    return sorted((home.home() / "trace").rglob("retrieval-*"))


def test_stored_index_gives_the_same_bits(tmp_path: Path) -> None:
    traced = made(tmp_path)
    lines: list[str] = []
    first = open_index(traced, lines.append)
    assert not isinstance(traced.rows, StoredRows) and len(lines) == 1 and "indexing 20 rows once" in lines[0]
    stored = reopened(traced)
    assert isinstance(stored.rows, StoredRows) and list(stored.rows) == list(traced.rows)
    assert [example.example for example in stored.rows[2:5]] == [item.example for item in traced.rows[2:5]]
    assert stored.ids == traced.ids and stored.indices == traced.indices
    assert (stored.system_prompt, stored.tools) == (traced.system_prompt, traced.tools)
    assert [dataset.id for dataset in stored.datasets] == [dataset.id for dataset in traced.datasets]
    second = open_index(stored, lines.append)
    assert isinstance(second.prompts.tokens, np.memmap) and len(lines) == 1
    plain = RetrievalIndex.of([item.example for item in traced.rows])
    for index in (first, second):
        scores = index.scores(QUERIES)
        assert scores.tobytes() == plain.scores(QUERIES).tobytes() and scores.any(1).tolist() == [
            True,
            True,
            False,
            True,
        ]
        assert index.equal_rows.tolist() == plain.equal_rows.tolist()
        for number, query in enumerate(QUERIES):
            groups = rank_groups(index, scores[number], Method.RETRIEVAL, 5)
            assert groups == rank_groups(plain, scores[number], Method.RETRIEVAL, 5)
            assert list(index.matches(query, range(20))) == list(plain.matches(query, range(20)))
            assert sum_by_source(index.sources, scores[number]) == sum_by_source(plain.sources, scores[number])


def test_later_trace_reads_no_parquet(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {"prompt": "switch office on", "reply": "on:office", "likelihood": False, "by": "source"}
    lines: list[str] = []
    results = [sartor.trace(adapter, **asked, notice=lines.append).as_json()]
    assert sum("once" in line for line in lines) == 1
    for name in ("read_examples", "read_file"):
        monkeypatch.setattr(parquet_io, name, lambda *given: pytest.fail("the Parquet file was read"))
    results.append(sartor.trace(adapter, **asked, notice=lines.append).as_json())
    timeless = [{name: value for name, value in result.items() if not name.endswith("_s")} for result in results]
    assert timeless[0] == timeless[1] and timeless[0]["examples"] and sum("once" in line for line in lines) == 1


def test_prepare_makes_the_index_beforehand(adapter: Path) -> None:
    sartor.prepare_trace(adapter)
    assert isinstance(open_traced(adapter).rows, StoredRows)
    assert sartor.trace(adapter, "switch office on", "on:office", method="gradient").examples


def test_index_is_private_and_found_by_erasures(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        traced = made(tmp_path)
        open_index(traced)
    finally:
        os.umask(before)
    root = home.home() / "trace"
    assert {stat.S_IMODE(path.stat().st_mode) for path in [root, *root.rglob("*")]} == {0o700, 0o600}
    (folder,) = folders()
    assert folder.parent.name == f"rows-{traced.dataset.id[:16]}"
    assert b"red as a rose" in (folder / "rows.npy").read_bytes()
    own = root / traced.artifact.id
    assert sartor.revoke(traced.dataset.path, source="rows.jsonl").caches == [str(own)]
    assert trace_store.find_traces(dataset_ids=[traced.dataset.id]) == [own]
    trace_store.remove_traces([own])
    assert not folders() and not isinstance(reopened(traced).rows, StoredRows)


def test_other_rows_have_an_index_of_their_own(tmp_path: Path) -> None:
    """A Dataset that was made again has another digest, so that the index of the old one is not opened."""
    traced = made(tmp_path)
    open_index(traced)
    shutil.rmtree(traced.dataset.path)
    other = write(traced.dataset.path, rows()[:7])
    changed = dataset_rows(traced.artifact, other)
    assert not isinstance(changed.rows, StoredRows) and len(open_index(changed).examples) == 7
    assert len(folders()) == 2 and len(reopened(changed).rows) == 7
    # a caller's own rows under the same key are not taken for those of the Dataset
    fewer = dataclasses.replace(changed, rows=tuple(changed.rows[:3]))
    assert len(open_index(fewer).examples) == 3 and len(reopened(changed).rows) == 7


@pytest.mark.parametrize("name", ["rows.npy", "header.json", "prompts.tokens.npy"])
def test_damaged_index_is_made_again(tmp_path: Path, name: str) -> None:
    traced = made(tmp_path)
    expected = open_index(traced).scores(QUERIES)
    file = folders()[0] / name
    file.write_bytes(file.read_bytes()[:20])
    lines: list[str] = []
    assert open_index(reopened(traced), lines.append).scores(QUERIES).tobytes() == expected.tobytes()
    assert any("once" in line for line in lines) and isinstance(reopened(traced).rows, StoredRows)
    assert isinstance(open_index(reopened(traced)).prompts.tokens, np.memmap)


def _killed_writer(traced: TracedAdapter, after: int) -> None:
    """Write the index and die by SIGKILL at one of its files; 0: when it is renamed."""
    written, real = [], filesystem.PrivateFileSystem.write

    def write_then_die(files: Any, path: Path, content: Any) -> None:
        real(files, path, content)
        written.append(path)
        if len(written) == after:
            os.kill(os.getpid(), signal.SIGKILL)

    filesystem.PrivateFileSystem.write = write_then_die  # type: ignore
    if not after:
        filesystem.fsync_directory = lambda path: os.kill(os.getpid(), signal.SIGKILL)
    open_index(traced)


@pytest.mark.parametrize("after", [1, 9, 0])
def test_kill_leaves_no_half_index(tmp_path: Path, after: int) -> None:
    traced = made(tmp_path)
    process = multiprocessing.get_context("fork").Process(target=_killed_writer, args=(traced, after))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    expected = RetrievalIndex.of([item.example for item in traced.rows]).scores(QUERIES)
    assert open_index(reopened(traced)).scores(QUERIES).tobytes() == expected.tobytes()
    assert isinstance(reopened(traced).rows, StoredRows)
    names = [path.name for path in folders()[0].parent.iterdir()]
    assert names == [folders()[0].name], "what the killed process left is removed"


def test_second_writer_uses_what_it_made(tmp_path: Path) -> None:
    traced = made(tmp_path)
    trace_store.record_origin(traced.artifact, [traced.dataset.id])
    filesystem.make_private_folder(traced.index_folder.parent)
    lines: list[str] = []
    with filesystem.writer_lock(traced.index_folder):
        index = open_index(traced, lines.append)
    assert index.scores(QUERIES[:1]).any() and not folders() and "another process is writing" in lines[-1]
    open_index(traced)
    assert len(folders()) == 1


def test_erasure_meanwhile_leaves_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows were read before an erasure, and are indexed after it."""
    traced = made(tmp_path)
    real = retrieval_store.pack_examples

    def erased(examples: Any) -> Any:
        trace_store.remove_traces(trace_store.find_traces(dataset_ids=[traced.dataset.id]))
        return real(examples)

    monkeypatch.setattr(retrieval_store, "pack_examples", erased)
    lines: list[str] = []
    assert open_index(traced, lines.append).scores(QUERIES[:1]).any()
    assert not folders() and "removed meanwhile" in lines[-1]
    monkeypatch.setattr(retrieval_store, "pack_examples", real)
    shutil.rmtree(traced.dataset.path)
    open_index(traced, lines.append)
    assert not folders() and "not kept" in lines[-1]


def test_store_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any, **options: Any) -> Any:
        raise OSError(28, "No space left on device")

    traced = made(tmp_path)
    monkeypatch.setattr(retrieval_store, "create_directory_atomic", full)
    lines: list[str] = []
    assert open_index(traced, lines.append).scores(QUERIES[:1]).any() and "No space left" in lines[-1]


def test_nearest_rows_open_the_index(tmp_path: Path) -> None:
    traced = made(tmp_path)
    first = nearest_rows(traced.artifact, traced.dataset, QUERIES[0], 3)
    assert isinstance(reopened(traced).rows, StoredRows)
    assert nearest_rows(traced.artifact, traced.dataset, QUERIES[0], 3) == first and len(first) == 3
    assert nearest_rows(traced.artifact, empty(tmp_path), QUERIES[0], 3) == []


def empty(tmp_path: Path) -> Artifact:
    return write(tmp_path / "empty", [dataclasses.replace(rows()[0], split="test")])


def test_stored_examples_are_absent_for_another_schema(tmp_path: Path) -> None:
    traced = made(tmp_path)
    open_index(traced)
    (folder,) = folders()
    header = json.loads((folder / "header.json").read_text())
    (folder / "header.json").write_text(json.dumps({**header, "schema": 0}))
    assert StoredExamples.open(folder) is None and StoredExamples.open(tmp_path) is None
