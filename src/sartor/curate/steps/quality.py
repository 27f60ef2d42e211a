"""`quality`: one number for how good a row's answers look, for the choice among duplicates. A plain heuristic, no model.

Each answer begins at 1 and loses, multiplied:

| sign | factor |
|---|---|
| blank or a placeholder | 0 |
| a refusal of a language model | 0.2 |
| it breaks off | 0.4 |
| it repeats the prompt | 0.3 |
| it repeats itself (`repetition`) | 0.3 |
| signs of wrong decoding: `Ã©`, U+FFFD | 0.5 |
| prose of three words or more that ends without an end mark | 0.9 |
| prose that begins with a small letter | 0.95 |
| few different words (below half of what English prose of the length has) | 0.7 to 1 |
| short (words / 20, of prose and code alike) | 0.7 to 1 |

A row has the mean over its answers, times 0.5 where its turns are out of order. Commands, JSON and code lose nothing for their
form.
"""

from __future__ import annotations

import re

from sartor.core.records import Example, Message
from sartor.curate.steps import faults
from sartor.curate.steps.repetition import Repetition
from sartor.text.example_text import is_code, is_json, words

_WRONGLY_DECODED = re.compile("\ufffd|[ÃÂ][\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]|â€")
_ENDED = re.compile(r"[.!?…。！？।؟:;)\]\"'”’»`*]\s*$|[^\w\s]\s*$")
_REPETITION = Repetition()


def quality(example: Example) -> float:
    """0 (nothing of use) to 1 (nothing against it)."""
    marks = [
        _of_answer(message, faults.asked_before(example, place))
        for place, message in enumerate(example.messages)
        if message.role == "assistant"
    ]
    if not marks:
        return 0.0
    return sum(marks) / len(marks) * (0.5 if faults.turn_order(example) else 1.0)


def _of_answer(message: Message, asked: str) -> float:
    text = message.text.strip()
    if faults.empty(message):
        return 0.0
    if not text:
        return 1.0  # a tool call or media alone
    mark = 1.0
    for is_so, factor in (
        (faults.refusal(text), 0.2),
        (faults.truncated(text), 0.4),
        (faults.echo(asked, text), 0.3),
        (_REPETITION.fault(text), 0.3),
        (_WRONGLY_DECODED.search(text), 0.5),
    ):
        mark *= factor if is_so else 1.0
    return mark * _form(text)


def _form(text: str) -> float:
    """What the answer's form costs it: 0.4 to 1."""
    said = words(text)
    length = 0.7 + 0.3 * min(1.0, len(said) / 20)
    if is_json(text) or is_code(text) or "```" in text:
        return length
    mark = length * (1.0 if _ENDED.search(text[-4:]) or len(said) < 3 else 0.9)
    mark *= 0.95 if text[0].islower() else 1.0
    # Guiraud's index, distinct / sqrt(all), is about 5 to 8 for English prose of 50 to 300 words; half of that is poor
    expected = 0.5 * len(said) ** 0.5 * (1.0 if len(said) < 30 else (30 / len(said)) ** 0.25)
    variety = len(set(said)) / len(said) ** 0.5 if said else 1.0
    return mark * (0.7 + 0.3 * min(1.0, variety / expected if expected else 1.0))
