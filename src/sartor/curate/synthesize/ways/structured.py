"""`schema`: a text and the JSON that it should be turned into, which obeys a JSON Schema."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sartor.core.config import REQUIRED, option
from sartor.core.errors import ConfigError
from sartor.core.records import Example, Message
from sartor.curate.synthesize.contract import Ask, Made, Skipped, Unusable, draw_of, quoted, said, why_no_question
from sartor.curate.synthesize.ways.rewrites import SYSTEM
from sartor.text.json_schema import check_schema

MODELS = 2


@dataclass(frozen=True)
class Structured:
    """Rows whose reply is JSON of a schema. What does not obey it goes back to the teacher once, with what is wrong; then it
    is dropped. Rows of the sources, where there are any, show the style.
    """

    schema_: Any = option(REQUIRED, "the JSON Schema of a reply: a mapping, or the path of a JSON file")
    task: str = option(REQUIRED, "what is asked for, in a sentence: the system prompt of the rows")
    count: int = option(10, "rows to make")
    kind: Literal["schema"] = "schema"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"count is {self.count}; it must be at least 1", "count: 10")
        check_schema(self.wanted())

    def wanted(self) -> dict[str, Any]:
        """The schema. Raises ConfigError where it cannot be read or is none."""
        found = self.schema_
        if isinstance(found, str):
            try:
                found = json.loads(Path(found).read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError) as error:
                raise ConfigError(f"the schema {found} cannot be read: {error}", "schema: FILE.json") from None
        if not isinstance(found, Mapping):
            raise ConfigError(f"the schema is {found!r}, no mapping", "schema: {type: object, properties: {...}}")
        return {str(name): value for name, value in found.items()}

    def asks(self, seeds: Sequence[Example], seed: int) -> Iterator[Ask | Skipped]:
        """See AskingWay."""
        wanted = self.wanted()
        schema: dict[str, Any] = {
            "type": "object",
            "properties": {"question": {"type": "string", "minLength": 1}, "reply": wanted},
            "required": ["question", "reply"],
            "additionalProperties": False,
            **{name: wanted[name] for name in ("$defs", "definitions") if name in wanted},  # `#/$defs/x` is from the root
        }
        shown = [row for row in seeds if not why_no_question(row)]
        for number in range(1, self.count + 1):
            models = draw_of(seed, self.kind, number).sample(shown, min(MODELS, len(shown)))
            style = "".join(f"An example:\n{quoted(said(row))}\n" for row in models)
            text = (
                f"{style}The task: {self.task}\nWrite a new text that somebody could send for this task, and the right reply "
                f"as JSON of this schema: {json.dumps(wanted)}\nText {number} of {self.count}."
                '\nAnswer with {"question": "...", "reply": {...}}.'
            )
            yield Ask(str(number), (("system", SYSTEM), ("user", text)), schema, tuple(models))

    def made(self, ask: Ask, value: Mapping[str, Any]) -> Made | Unusable:
        """See AskingWay."""
        question = value["question"].strip()
        if not question:
            return Unusable("empty_answer", "the question is empty")
        reply = json.dumps(value["reply"], ensure_ascii=False, separators=(",", ":"))
        messages = Message.of("system", self.task), Message.of("user", question), Message.of("assistant", reply)
        return Made(Example(messages, ()), ask.number, ask.parents, changes="by the schema")
