"""Cost of attribution for trace.py: recording, bytes a row, seconds a reply by rows, tunings of unrolling.

The rows of the timed retrieval and gradients are generated, and so are the sketches: random numbers for up to
RANDOM_ROWS rows, and zeros for more, which take as long to read, to compare and to rank but for the disk. `sketches`
says which. Nothing else is left out of the seconds: those of gradients have the opening of base and adapter, the index
of the words and the gradient of the reply. Those of retrieval are of the whole verb in a new process. The first trace
of an adapter makes the index that later ones open: `retrieval_s` is of a later one, `retrieval_first_s` of the first.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import defaults
import numpy as np
import parts
from trace_setup import Row, Size, chat_row, filler, notice, queries_of, recipe_of, set_rows, texts_of, tune_traced

import sartor
from sartor.core.records import Example, Message, Origin
from sartor.core.sketch_matrix import PIECE_ROWS, SCALES, SketchMatrix
from sartor.core.trace_store import adapter_id, trace_folder
from sartor.trace import prepare
from sartor.trace.ensemble import part_scores
from sartor.trace.replay import Replay
from sartor.trace.traced_adapter import TracedAdapter, TrainingRow
from sartor.trace.traced_model import TracedModel
from sartor.trace.unrolling import unroll
from sartor.tune.gradient_features import RECORDED, write_moments

# tunings with and without recording, in turn
PAIRS = 3
RANDOM_ROWS = 10_000
_TRACE = """
import json, sys, time
started_s = time.monotonic()
import sartor
adapter, dataset, prompt, reply = sys.argv[1:]
result = sartor.trace(adapter, prompt, reply, data=dataset, likelihood=False)
process_s = time.monotonic() - started_s
assert result.examples
print(json.dumps({"process_s": process_s, **result.seconds}))
"""


def measure(options: defaults.Options, size: Size, folder: Path) -> dict[str, Any]:
    """Return the figures of INTERFACES, with the curves."""
    train, held_out = set_rows("home-intents", options, size.rows, size.queries)
    recipe = {**recipe_of(train, updates=size.updates, batch_rows=size.batch_rows), **size.recipe}
    seconds: dict[str, list[float]] = {"plain": [], "recorded": []}
    for number in range(PAIRS):
        for kind, values in seconds.items():
            values.append(
                parts.run(
                    f"cost: tuning, {kind}, {number + 1} of {PAIRS}",
                    lambda kind=kind, number=number: _tuning_seconds(folder / f"{kind}-{number}", train, recipe, kind),
                )
            )
    ratios = [recorded / plain for plain, recorded in zip(seconds["plain"], seconds["recorded"], strict=True)]
    traced = tune_traced(folder / "recorded-0", {"home": train}, recipe)
    queries = queries_of(traced, held_out[:1])
    unrolled = parts.run("cost: unrolling", lambda: unroll(Replay.open(traced), queries, notice=notice).facts)
    retrieval = {
        str(count): parts.run(
            f"cost: retrieval, {count} rows", lambda count=count: retrieval_seconds(traced, count, size.later_traces)
        )
        for count in sorted({size.retrieval_rows, *size.curve_rows})
    }
    other = tune_traced(folder / "recorded-1", {"home": train}, recipe)
    gradient = {
        str(count): parts.run(f"cost: gradient, {count} rows", lambda count=count: gradient_seconds(other, count))
        for count in sorted({size.gradient_rows, *size.curve_rows})
    }
    return {
        "feature_overhead": statistics.median(ratios) - 1,
        "feature_overheads": [ratio - 1 for ratio in ratios],
        "bytes_per_row": parts.run("cost: bytes", lambda: row_bytes(traced)),
        "unrolled_tunings": unrolled["tunings"],
        "unrolling": {name: unrolled[name] for name in ("updates", "seconds", "stored_bytes")},
        "retrieval_s": retrieval[str(size.retrieval_rows)]["seconds"],
        "retrieval_first_s": retrieval[str(size.retrieval_rows)]["first_s"],
        "retrieval_curve": retrieval,
        "gradient_s": gradient[str(size.gradient_rows)]["seconds"],
        "gradient_curve": gradient,
    }


def _tuning_seconds(folder: Path, rows: Sequence[Row], recipe: dict[str, Any], kind: str) -> float:
    """Return the seconds of the updates of a tuning."""
    traced = tune_traced(folder, {"home": rows}, {**recipe, "trace": {"features": kind == "recorded"}})
    return float(traced.artifact.manifest["run"]["wall_s"])


def row_bytes(traced: TracedAdapter) -> int:
    """Return the bytes of a row's recorded sketch on disk."""
    matrix = SketchMatrix.open(trace_folder(adapter_id(traced.artifact)) / RECORDED)
    if matrix is None:
        raise ValueError(f"the tuning of {traced.artifact.path} recorded no sketches")
    files = [file for file in matrix.folder.iterdir() if file.suffix in (".f16", ".f32", ".i32")]
    return round(sum(file.stat().st_size for file in files) / len(matrix.ids))


def generated_texts(count: int) -> Iterator[tuple[str, str]]:
    """Yield `count` prompts and replies: filler with a number each."""
    texts = [texts_of(row) for part in filler(min(count, 2000)).values() for row in part]
    for number in range(count):
        prompt, reply = texts[number % len(texts)]
        yield f"{prompt} {number}", f"{number} {reply}"


def generated_rows(traced: TracedAdapter, count: int) -> TracedAdapter:
    """Return the traced adapter with `count` generated rows in the place of its own."""
    rows = []
    for number, (prompt, reply) in enumerate(generated_texts(count)):
        messages = (Message.of("user", prompt), Message.of("assistant", reply))
        rows.append(TrainingRow(Example(messages, (Origin("generated", str(number)),)), traced.dataset))
    return replace(traced, rows=tuple(rows), row_key="")


def retrieval_seconds(traced: TracedAdapter, count: int, later_traces: int) -> dict[str, Any]:
    """Return the seconds of `sartor trace` by retrieval among `count` generated rows: first call, and later ones.

    `first` and `later` are what the verb reports; `seconds` is the median of later calls, each in a new process, from
    before the import of Sartor to the result. The reply's likelihood is not asked, for which the base is opened.
    """
    store = trace_folder(adapter_id(traced.artifact))
    with tempfile.TemporaryDirectory() as scratch:
        source = {"path": str(Path(scratch) / "generated.jsonl"), "licence": "CC0-1.0", "use": ["commercial"]}
        with Path(source["path"]).open("w", encoding="utf-8") as stream:
            for texts in generated_texts(count):
                stream.write(json.dumps(chat_row(*texts), ensure_ascii=False) + "\n")
        recipe = {"sources": [source], "steps": [], "split": {"eval_fraction": 0.0}}
        dataset = sartor.curate(recipe, Path(scratch) / "dataset").dataset
        prompt, reply = texts_of(_asked())
        call = [str(traced.artifact.path), str(dataset.path), prompt, reply]
        found = [_timed_trace(call) for _ in range(1 + later_traces)]
        stored = store / f"rows-{dataset.id[:16]}"
        size = sum(file.stat().st_size for file in stored.rglob("*") if file.is_file())
        shutil.rmtree(stored, ignore_errors=True)
    first, later = found[0], sorted(found[1:], key=lambda seconds: seconds["process_s"])
    middle = later[len(later) // 2]
    return {
        "seconds": middle["process_s"],
        "first_s": first["process_s"],
        "first": first,
        "later": middle,
        "bytes_per_row": round(size / count),
    }


def _timed_trace(call: Sequence[str]) -> dict[str, float]:
    """Return the seconds of a trace in a new process, its parts as the verb reports them."""
    done = subprocess.run([sys.executable, "-c", _TRACE, *call], capture_output=True, text=True, check=True)
    seconds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def gradient_seconds(traced: TracedAdapter, count: int) -> dict[str, Any]:
    """Return the seconds of the gradient method for one reply among `count` generated rows.

    The adapter's own sketches are overwritten.
    """
    generated = generated_rows(traced, count)
    folder = trace_folder(adapter_id(traced.artifact))
    model = TracedModel.open(generated)
    fields = {"layout": model.layout.as_json()}
    ids = [row.example.id for row in generated.rows]
    # one set of sketches, as `--prepare` makes
    sketches = folder / prepare.FINAL
    matrix = SketchMatrix.create(sketches, ids, model.layout.size, {**fields, "label": prepare.FINAL})
    write_moments(sketches, model.estimate_moments())  # that of the reply is preconditioned by them
    rng = np.random.default_rng(0)
    for part in (matrix, prepare.open_hidden(generated, folder, model)):
        _generate(part, rng)
    del model
    query = queries_of(generated, [_asked()])
    started = time.monotonic()
    part_scores(generated, query, notice=notice)
    seconds = time.monotonic() - started
    return {"seconds": seconds, "sketches": "random" if count <= RANDOM_ROWS else "zeros"}


def _generate(matrix: SketchMatrix, rng: np.random.Generator) -> None:
    """Write a sketch for every row."""
    if len(matrix.ids) > RANDOM_ROWS:
        # blocks that are reserved and were never written read as zeros, without the disk
        np.memmap(matrix.folder / SCALES, np.float32, "r+")[:] = 1.0
        return
    for start in range(0, len(matrix.ids), PIECE_ROWS):
        rows = list(range(start, min(start + PIECE_ROWS, len(matrix.ids))))
        matrix.write(rows, rng.standard_normal((len(rows), matrix.size), np.float32))
    matrix.flush()


def _asked() -> Row:
    return next(row for part in filler(8).values() for row in part)
