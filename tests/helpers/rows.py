"""Examples for tests of steps, and steps run as the pipeline runs them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from sartor.core.config import load
from sartor.core.records import Drop, Example, Message, Origin
from sartor.curate.step import SetStep, StepInput, StepResult

HERE = Path(".")


def row(*turns: str, roles: Sequence[str] = ("user", "assistant") * 20, **fields: Any) -> Example:
    """A conversation of some turns, by default of user and assistant in turn."""
    messages = tuple(Message.of(role, text) for role, text in zip(roles, turns, strict=False))
    return Example(messages, (Origin("rows.jsonl", "rows.jsonl:1"),), **fields)


def document(text: str) -> Example:
    """A text without a question."""
    return row(text, roles=("assistant",))


def applied(step: Any, example: Example) -> Example | Drop:
    """What a RowStep makes of an Example."""
    return step.open(HERE)(example)


def reason(step: Any, example: Example) -> str:
    """Why a RowStep drops an Example; nothing where it does not."""
    outcome = applied(step, example)
    return outcome.reason if isinstance(outcome, Drop) else ""


def decided(step: Any, examples: Sequence[Example], batch: int = 7) -> StepResult:
    """What a SetStep finds in rows, sketched in batches."""
    tables = [step.sketch(examples[start : start + batch], HERE) for start in range(0, len(examples), batch)]
    table = pa.concat_tables(tables or [step.sketch([], HERE)])
    assert table.num_rows == len(examples)
    table = table.append_column("id", pa.array([example.id for example in examples], pa.string()))
    return step.decide(StepInput(table, ["rows.jsonl"], lambda numbers: [examples[number] for number in numbers]))


def step_of(cls: Any, **options: Any) -> Any:
    """A step from options as a recipe spells them."""
    return load(cls, options)


def example(
    prompt: str, reply: str, place: int = 0, *, system: str = "", source: str = "rows.jsonl", date: str = ""
) -> Example:
    told = (Message.of("system", system),) if system else ()
    asked = (Message.of("user", prompt),) if prompt else ()
    origin = Origin(source, f"{source}:{place + 1}", date=date)
    return Example((*told, *asked, Message.of("assistant", reply)), (origin,))


def gather(step: SetStep, examples: Sequence[Example], batch: int = 700) -> StepInput:
    """Sketches in batches, as the workers make them, with the pipeline's own columns."""
    tables: list[Any] = [
        step.sketch(examples[start : start + batch], Path()) for start in range(0, len(examples), batch)
    ]
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
