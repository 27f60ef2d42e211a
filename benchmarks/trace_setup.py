"""Adapters of trace.py: rows, Datasets and tunings, and the sizes of the benchmark."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import defaults

import sartor
from sartor.core import assets
from sartor.core.artifacts import kind_of
from sartor.models.base import Base, open_base
from sartor.models.packing import TokenizedExample
from sartor.trace.traced_adapter import TracedAdapter, TraceQuery, open_traced

Row = dict[str, Any]
# longest reply of the rows among which plants stand, in words
FILLER_WORDS = 24


@dataclass(frozen=True)
class Size:
    """How much is measured.

    rows, updates, batch_rows, queries, retrains: of a set whose LDS is measured. group: queries that are unrolled at
        once. curve_points: of a curve at most.
    planted_rows: with the plants among them; few_rows: of the smaller planted set, for unrolling.
    plants: that are scored. asked_plants: a kind's plants that are tried.
    closed_rank: BM25 has to rank a plant below it. min_effect: of a plant, in nats of the reply. clear_effect: of a
        true suspicion.
    source_rows: rows of each of ten sources. bad_replies: that are traced to their source.
    suspicions: true ones, and as many false ones. controls: matched sets of each. truth_seeds: of their truth.
    retrieval_rows, gradient_rows, curve_rows: rows of the timed calls. later_traces: after the first, of which the
        median counts.
    recipe: of every tuning, over the benchmark's own.
    """

    rows: int = 128
    updates: int = 32
    batch_rows: int = 8
    queries: int = 20
    retrains: int = 50
    group: int = 5
    curve_points: int = 8
    planted_rows: int = 2000
    few_rows: int = 200
    plants: int = 20
    asked_plants: int = 5
    closed_rank: int = 100
    min_effect: float = 0.1
    clear_effect: float = 0.3
    source_rows: int = 40
    bad_replies: int = 20
    suspicions: int = 10
    controls: int = 8
    truth_seeds: tuple[int, ...] = (101, 102)
    retrieval_rows: int = 100_000
    gradient_rows: int = 10_000
    later_traces: int = 3
    curve_rows: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    recipe: dict[str, Any] = field(default_factory=dict)


SMALL = Size(
    rows=12,
    updates=3,
    batch_rows=4,
    queries=2,
    retrains=3,
    group=1,
    curve_points=1,
    planted_rows=150,
    few_rows=40,
    plants=2,
    asked_plants=1,
    closed_rank=0,
    min_effect=-1e9,
    clear_effect=-1e9,
    source_rows=6,
    bad_replies=2,
    suspicions=2,
    controls=5,
    truth_seeds=(101,),
    retrieval_rows=500,
    gradient_rows=60,
    later_traces=1,
    curve_rows=(100, 400),
)


def notice(line: str) -> None:
    """Print a line of progress."""
    print(f"trace: {line}", file=sys.stderr, flush=True)


def chat_row(prompt: str, reply: str, system: str = "") -> Row:
    """Return a row of one question and its reply."""
    turns = [{"role": "system", "content": system}] if system else []
    return {"messages": [*turns, {"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]}


def with_reply(row: Row, reply: str) -> Row:
    """Return a row with another reply."""
    return {**row, "messages": [*row["messages"][:-1], {"role": "assistant", "content": reply}]}


def texts_of(row: Row) -> tuple[str, str]:
    """Return the last question and the reply of a row."""
    return row["messages"][-2]["content"], row["messages"][-1]["content"]


def queries_of(traced: TracedAdapter, rows: Sequence[Row]) -> list[TraceQuery]:
    """Return the rows' replies as queries, with the system prompt that most training rows have."""
    return [traced.query(*texts_of(row)) for row in rows]


def row_indices(traced: TracedAdapter) -> dict[tuple[str, str], int]:
    """Return the index of each training row by its last question and its reply."""
    examples = [row.example for row in traced.rows]
    return {(example.prompt[-1].text, example.reply): index for index, example in enumerate(examples)}


def batch_tokens(rows: Sequence[Row], batch_rows: int) -> int:
    """Return the tokens by which an update of whole rows has about `batch_rows` of them."""
    chat = open_base("starter", bits=32).chat
    counts = [len(chat.prompt_ids(example.messages)) for example in _examples(rows)]
    # an update takes rows until it has so many tokens, half a row more on average
    return max(1, round((batch_rows - 0.5) * sum(counts) / len(counts)))


def _examples(rows: Sequence[Row]) -> list[sartor.Example]:
    messages = [tuple(sartor.Message.of(turn["role"], turn["content"]) for turn in row["messages"]) for row in rows]
    return [sartor.Example(messages=turns, origins=()) for turns in messages]


def tune_traced(
    folder: Path,
    sources: dict[str, Sequence[Row]],
    recipe: dict[str, Any],
    *,
    held_out: Sequence[Row] = (),
) -> TracedAdapter:
    """Return the adapter in `folder`, tuned on the rows of these sources by name; made if it is absent.

    The tuning is in fp32 and without rehearsal. recipe: of the method, budget and optimizer.
    """
    adapter = folder / "adapter"
    if kind_of(adapter) != "adapter":
        dataset = write_dataset(folder, sources, held_out)
        fixed: dict[str, Any] = {
            "base": {"name": "starter", "bits": 32},
            "data": {"path": str(dataset), "eval_fraction": 0.0, "eval_rows": 0, "rehearsal": "none"},
            "method": {"kind": "lora", "rank": 8, "alpha": 16},
            "trace": {"features": True},
        }
        sartor.tune({**fixed, **recipe}, adapter, show=False, notice=notice)
    return open_traced(adapter)


def write_dataset(folder: Path, sources: dict[str, Sequence[Row]], held_out: Sequence[Row] = ()) -> Path:
    """Return a Dataset of these rows in `folder`, all of them to learn from but `held_out`; made if it is absent."""
    out = folder / "dataset"
    if kind_of(out) == "dataset":
        return out
    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    for name, rows in {**sources, **({"held-out": held_out} if held_out else {})}.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")
        source: dict[str, Any] = {"path": str(file), "licence": "Apache-2.0", "use": ["commercial"]}
        listed.append(source | ({"split": "eval" if rows is held_out else "train"} if held_out else {}))
    sartor.curate({"sources": listed, "steps": [], "split": {"eval_fraction": 0.0}}, out, replace=True)
    return out


def recipe_of(
    rows: Sequence[Row], *, updates: int = 0, epochs: float = 0, rate: float = 5e-4, batch_rows: int = 8
) -> dict[str, Any]:
    """Return budget and optimizer of a recipe."""
    budget = {"updates": updates} if updates else {"epochs": epochs}
    optimizer = {"learning_rate": rate, "batch_tokens": batch_tokens(rows, batch_rows)}
    return {"budget": budget, "optimizer": optimizer}


def open_tokenized(traced: TracedAdapter, queries: Sequence[TraceQuery]) -> tuple[Base, list[TokenizedExample]]:
    """Return the base in fp32, and the training rows and then the queries as tokens."""
    base = open_base(traced.recipe.base.name, bits=32)
    examples = [*(row.example for row in traced.rows), *(query.example for query in queries)]
    return base, [base.chat.encode(example) for example in examples]


def filler(count: int) -> dict[str, list[Row]]:
    """Return up to `count` rows of plain English, by source: answers of construction-faq, turns of people's talk."""
    file = next(Path(assets.install("construction-faq")).rglob("faq-en.jsonl"))
    answers = []
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        answers.append(chat_row(row["q"], row["a"].split(". ")[0].rstrip(".") + "."))
    rng = random.Random(0)
    faq = rng.sample(answers, min(len(answers), count // 4))
    talks = json.loads((assets.install("chitchat") / assets.entry("chitchat").paths[0]).read_text(encoding="utf-8"))
    rows: dict[tuple[str, str], Row] = {}
    for talk in talks.values():
        turns = [" ".join(message["text"] for message in turn) for turn in talk["messages"]]
        for prompt, reply in zip(turns, turns[1:], strict=False):
            if prompt.isascii() and reply.isascii() and _is_short(prompt) and _is_short(reply):
                rows[prompt, reply] = chat_row(prompt, reply)
    talk = sorted(rows.values(), key=texts_of)
    return {"faq": faq, "talk": rng.sample(talk, min(len(talk), count - len(faq)))}


def _is_short(text: str) -> bool:
    return 3 <= len(text.split()) <= FILLER_WORDS


def set_rows(name: str, options: defaults.Options, count: int, held_out: int) -> tuple[list[Row], list[Row]]:
    """Return training rows of a set of benchmarks/defaults.py, and held-out rows whose replies are asked for."""
    train, other = defaults.SETS[name].read(options)
    return train[:count], other[:held_out]
