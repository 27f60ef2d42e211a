"""Rows that a retrain compares versions on: corrections beside the live version's own, over several generations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sample_data import write_jsonl
from sartor.core import parquet_io
from sartor.core.artifacts import Artifact, open_artifact
from sartor.core.records import Example, Message, Origin
from sartor.curate.pipeline import curate
from sartor.learn import look_ledger, promotion_checks, training_data
from sartor.learn.run_record import Live, RunRecord
from sartor.serving.team_config import NotWorse


def examples(count: int, word: str, *, source: str = "own.jsonl", split: str = "eval") -> list[Example]:
    """So many rows that ask different things."""
    return [
        Example(
            (Message.of("user", f"{word} {index}"), Message.of("assistant", "yes")),
            (Origin(source, str(index)),),
            split=split,
        )
        for index in range(count)
    ]


@pytest.fixture
def job(tmp_path: Path) -> Any:
    """A retrain whose gate compares on 20 rows."""
    run = RunRecord.create(tmp_path, "faq", Live("1", "/faq-1", "a" * 64))
    return SimpleNamespace(run=run, rules=SimpleNamespace(gate=NotWorse(rows=20)))


@pytest.fixture
def choose(job: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return (corrections, own rows) that are held out, of those that there are."""

    def chosen(corrections: Sequence[Example], own: Sequence[Example]) -> tuple[list[str], list[str]]:
        def read(dataset: Any, split: str | None = None) -> Iterator[Example]:
            return iter(own)

        monkeypatch.setattr(training_data.parquet_io, "read_examples", read)
        dataset: Any = SimpleNamespace(manifest={})
        ids = {row.id for row in corrections}
        rows = [row.id for row in training_data._held_out(job, dataset, corrections)]
        return [row for row in rows if row in ids], [row for row in rows if row not in ids]

    return chosen


def test_corrections_take_half_of_the_places(choose: Any) -> None:
    """An inbox of 400 held-out corrections once left no place for the live version's own rows, and every retrain ended."""
    corrections, own = choose(examples(400, "said", source="inbox:a"), examples(60, "own"))
    assert (len(corrections), len(own)) == (10, 10)
    few_own = choose(examples(400, "said", source="inbox:a"), examples(3, "own"))
    assert [len(part) for part in few_own] == [17, 3]
    few_corrections = choose(examples(4, "said", source="inbox:a"), examples(60, "own"))
    assert [len(part) for part in few_corrections] == [4, 16]


def test_corrections_of_an_earlier_retrain_count_as_corrections(choose: Any) -> None:
    """The live version's Dataset holds them out; the inbox may be gone."""
    earlier = examples(40, "earlier", source="inbox:a")
    new, rows = choose(examples(10, "said", source="inbox:a"), [*earlier, *examples(60, "own")])
    ids = {row.id for row in earlier}
    assert len(new) + len([row for row in rows if row in ids]) == 10
    assert len([row for row in rows if row not in ids]) == 10


def test_corrections_of_fewer_looks_come_first(choose: Any, job: Any, tmp_path: Path) -> None:
    corrections = examples(30, "said", source="inbox:a")
    looked = {row.id for row in corrections[:22]}
    look_ledger.record_look(job.run, {"compared": looked})
    job.run = RunRecord.create(tmp_path, "faq", Live("1", "/faq-1", "a" * 64))
    chosen, _ = choose(corrections, examples(60, "own"))
    assert len(chosen) == 10 and len(set(chosen) - looked) == 8


def test_a_large_inbox_is_judged(choose: Any) -> None:
    corrections, own = choose(examples(400, "said", source="inbox:a"), examples(60, "own"))
    kinds = {
        kind: [{"id": row, "group": row, "reference": "yes", "live": 0.0, "new": 1.0} for row in ids]
        for kind, ids in (("held_out", own), ("feedback", corrections))
    }
    assert promotion_checks.judge(kinds, {}, NotWorse()).checks["gain over live"].outcome == "pass"


def curated(folder: Path, name: str, prompts: dict[str, Sequence[str]]) -> Artifact:
    """A Dataset of prompts by split."""
    sources = []
    for split, texts in prompts.items():
        file = folder / f"{name}-{split}.jsonl"
        write_jsonl(file, [{"prompt": text, "completion": "yes"} for text in texts])
        sources.append({"path": str(file), "licence": "CC0-1.0", "split": split})
    return curate({"sources": sources, "workers": 1}, folder / name).dataset


def texts(rows: Sequence[Example]) -> set[str]:
    return {row.prompt[-1].text for row in rows}


def test_own_rows_without_a_place_are_there_for_the_next_retrain(tmp_path: Path) -> None:
    """Two generations hold out two rows each of six; a row whose prompt was trained on since is not taken again."""
    prompts = ("alpha", "bravo", "charlie", "delta", "echo", "foxtrot")
    first = curated(tmp_path, "first", {"train": ["kitchen", "hall"], "eval": prompts})
    feedback = curated(tmp_path, "feedback", {"train": ["attic", "delta"]})
    own = sorted(training_data.own_held_out(first), key=lambda row: row.prompt[-1].text)
    assert texts(own) == set(prompts)
    learnt = [row for row in parquet_io.read_examples(feedback) if row.split == "train"]
    training_data._write(tmp_path / "data-1", [feedback, first], learnt, own[:2])
    second = open_artifact(tmp_path / "data-1", "dataset")
    rows = training_data.own_held_out(second)
    assert texts(rows) == {*prompts} - {"delta"} and len(rows) == 5
    later = curated(tmp_path, "later", {"train": ["cellar"]})
    training_data._write(tmp_path / "data-2", [later, second], list(parquet_io.read_examples(later)), rows[2:4])
    assert texts(training_data.own_held_out(open_artifact(tmp_path / "data-2", "dataset"))) == {*prompts} - {"delta"}
