"""Rows as the pipeline hands them to a SetStep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from sartor.core.records import Example, Message, Origin
from sartor.curate.step import SetStep, StepInput


def example(
    prompt: str, reply: str, place: int = 0, *, system: str = "", source: str = "rows.jsonl", date: str = ""
) -> Example:
    told = (Message.of("system", system),) if system else ()
    asked = (Message.of("user", prompt),) if prompt else ()
    origin = Origin(source, f"{source}:{place + 1}", date=date)
    return Example((*told, *asked, Message.of("assistant", reply)), (origin,))


def gather(step: SetStep, examples: Sequence[Example], batch: int = 700) -> StepInput:
    """Sketches in batches, as the workers make them, with the pipeline's own columns."""
    tables: list[Any] = [step.sketch(examples[start : start + batch], Path()) for start in range(0, len(examples), batch)]
    table = pa.concat_tables(tables or [step.sketch([], Path())])
    sources = sorted({one.origins[0].source for one in examples})
    own = {
        "id": pa.array([one.id for one in examples], pa.string()),
        "source": pa.array([sources.index(one.origins[0].source) for one in examples], pa.int64()),
        "locator": pa.array([one.origins[0].locator for one in examples], pa.string()),
    }
    for name, column in own.items():
        table = table.append_column(name, column)
    return StepInput(table, sources, lambda wanted: [examples[row] for row in wanted])
