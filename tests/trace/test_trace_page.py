"""Page of a trace: rows stand beside the reply, shared words are marked, and no row becomes markup."""

from __future__ import annotations

import dataclasses
import stat
from pathlib import Path
from typing import Any

import pytest

import sartor
from page_markup import HOSTILE, Tags
from rows import row
from sartor.core.artifacts import Artifact, open_artifact
from sartor.core.records import Example, Message, Origin
from sartor.trace.attribution import Method
from sartor.trace.credit import RowHistory, SourceCredit
from sartor.trace.retrieval import RetrievalIndex
from sartor.trace.trace import Refusal, TracedRow, TraceResult
from sartor.trace.trace_page import render
from sartor.trace.traced_adapter import TracedAdapter, TraceQuery, TrainingRow

ACTING = {"script", "iframe", "object", "embed", "form", "link", "base"}


def result_of(examples: list[Example], query: TraceQuery, **changes: Any) -> TraceResult:
    """A result of retrieval over these rows, of an adapter that is a name alone."""
    dataset = Artifact(Path("/data/faq"), {"kind": "dataset", "id": "d" * 64})
    rows = tuple(TrainingRow(example, dataset) for example in examples)
    stated = {"run": {"updates": 3, "micro_batch_tokens": 64}, "recipe": {}, "fingerprint": {}, "base": {}}
    adapter = Artifact(Path("/adapters/faq"), {"kind": "adapter", "id": "a" * 64, **stated})
    traced = TracedAdapter(adapter, dataset, rows)
    matches = RetrievalIndex.of(examples).matches(query, range(len(rows)))
    shown = [
        TracedRow(item, match.score, match, RowHistory(2, ("Ada",)), ("c" * 32,))
        for item, match in zip(rows, matches, strict=True)
    ]
    result = TraceResult(traced, query, Method.RETRIEVAL, lds=None, examples=shown)
    return dataclasses.replace(result, **changes)


def test_rows_stand_beside_the_reply_with_marked_words() -> None:
    query = TraceQuery((Message.of("user", "When do you open?"),), "We open at nine o'clock")
    page = render(result_of([row("when do you open", "We open at nine, on weekdays")], query))
    tags = Tags(page)
    assert "<mark>We open at nine</mark>" in page and "rows.jsonl:1" in tags.text
    assert "not measured" in tags.text and "--calibrate" in tags.text
    assert "reviewed by Ada" in tags.text and "2 duplicates were dropped" in tags.text
    assert [name for name, _ in tags.tags].count("section") == 1


def test_page_says_what_limits_the_ranking() -> None:
    query = TraceQuery((Message.of("user", "a"),), "b c d")
    page = render(
        result_of(
            [row("a", "b c d")],
            query,
            lds=0.41,
            refused=Refusal(Method.GRADIENT, 0.11),
            base_says_it=True,
            likelihood={"tuned_nats": 3.0, "base_nats": 2.5, "tokens": 4},
            approximate="a run in bf16",
            notes=["something was not there"],
            by_source=[SourceCredit("faq.csv", "CC0-1.0", score=2.0, rows=3)],
        )
    )
    text = Tags(page).text
    for words in ("0.41", "0.11", "the base already says this", "a run in bf16", "something was not there", "faq.csv"):
        assert words in text, words


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_rows_are_text(hostile: str) -> None:
    example = Example(
        (Message.of("user", f"{hostile} one two"), Message.of("assistant", f"{hostile} three four")),
        (Origin(hostile, hostile, hostile, step=hostile),),
        steps=(hostile,),
    )
    query = TraceQuery((Message.of("user", f"{hostile} one two"),), f"{hostile} three four")
    result = result_of([example], query, notes=[hostile], by_source=[SourceCredit(hostile, hostile, score=1, rows=1)])
    tags = Tags(render(result))
    assert not ACTING & {name for name, _ in tags.tags} and tags.acting({"srcdoc", "action", "href"}) == set()
    assert all(
        not value or value.startswith("data:")
        for name, attributes in tags.tags
        for key, value in attributes.items()
        if key == "src"
    )
    assert "\x1b" not in "".join(str(cell) for line in result.table() for cell in line)


def test_page_is_written_for_its_owner_and_not_over_another(tmp_path: Path, adapter: Path) -> None:
    file = tmp_path / "why.html"
    said = {"likelihood": False, "html": file}
    result = sartor.trace(adapter, "switch office on", "on:office", **said)
    assert result.as_json()["html"] == str(file) and stat.S_IMODE(file.stat().st_mode) == 0o600
    assert open_artifact(adapter).id[:12] in file.read_text(encoding="utf-8")
    with pytest.raises(sartor.SartorError, match="exists"):
        sartor.trace(adapter, "switch office on", "on:office", **said)
    sartor.trace(adapter, "switch office on", "on:office", replace=True, **said)
