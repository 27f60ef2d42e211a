"""Examples as tokens, under an objective: which rows teach a preference, and what each is computed beside."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from sartor.core.errors import SourceError
from sartor.core.records import Example
from sartor.models.chat import Chat
from sartor.models.packing import Encoded
from sartor.tune.recipe import Dpo, Kto, Sft
from sartor.tune.tokenised import Lesson, Term

# A row's own reply may be every other row's too; so many others are looked at for one that is not
_LOOKED_AT = 8


def encode(example: Example, objective: Sft | Dpo | Kto, chat: Chat, folder: Path) -> list[tuple[Encoded, Example]]:
    """What a row is learnt as, and the Example whose last reply that is: one row, or of a pair under kto two; none where the
    reply is bad and the objective has no use for that.

    Raises SourceError as `Chat.encode` does. folder: below which its media lie.
    """
    if example.rejected and not isinstance(objective, Sft):
        worse = replace(example, messages=(*example.prompt, *example.rejected), rejected=())
        good, bad = (_last_reply(chat.encode(one, folder), example) for one in (example, worse))
        if isinstance(objective, Dpo):
            return [(_lesson(good, "pair", bad), example)]
        return [(_lesson(good, "good"), example), (_lesson(bad, "bad"), worse)]
    if example.rating and isinstance(objective, Kto):
        row = _last_reply(chat.encode(example, folder), example)
        return [
            (_lesson(replace(row, weight=row.weight * abs(example.rating)), "good" if example.rating > 0 else "bad"), example)
        ]
    return [] if example.rating < 0 else [(chat.encode(example, folder), example)]


def _lesson(row: Encoded, term: Term, other: Encoded | None = None) -> Lesson:
    return Lesson(row.ids, row.learnt, row.example_id, row.weight, term, other)


def _last_reply(row: Encoded, of: Example) -> Encoded:
    """The row with its last run of learnt tokens alone: a rating is of that reply, and not of the turns before it."""
    end = max((place for place, is_learnt in enumerate(row.learnt) if is_learnt), default=-1) + 1
    start = end
    while start and row.learnt[start - 1]:
        start -= 1
    return replace(row, learnt=[start <= place < end for place in range(len(row.ids))], example_id=of.id)


def mismatched(
    rows: Sequence[Encoded], examples: Sequence[Example], chat: Chat, folder: Path, most_tokens: int, seed: int
) -> list[Encoded]:
    """Each rated row beside another's reply to its prompt, chosen by the seed once for the whole run.

    The paper shifts the replies of a batch by one; a choice that stays lets the reference compute each once. examples: of the
    rows, one each. A row for which no other reply fits has none.
    """
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    place = {index: at for at, index in enumerate(order)}

    def others(index: int) -> Iterator[Example]:
        for step in range(1, min(len(order), _LOOKED_AT + 1)):
            other = examples[order[(place[index] + step) % len(order)]]
            if other.messages[-1] != examples[index].messages[-1]:
                yield other

    def beside(index: int) -> Encoded | None:
        for other in others(index):
            example = replace(examples[index], messages=(*examples[index].prompt, other.messages[-1]), rejected=(), rating=0.0)
            try:
                row = _last_reply(chat.encode(example, folder), examples[index])
            except SourceError:  # a reply that this prompt's template refuses
                continue
            if len(row.ids) <= most_tokens and row.supervised_tokens:
                return row
        return None

    return [
        replace(row, other=beside(index)) if isinstance(row, Lesson) and row.term != "pair" else row
        for index, row in enumerate(rows)
    ]


def numbered(rows: Sequence[Encoded], first: int) -> list[Encoded]:
    """Lessons with their lines in the table of reference log-probabilities, from `first` on."""
    made: list[Encoded] = []
    for row in rows:
        if isinstance(row, Lesson):
            made.append(replace(row, number=first))
            first += 1
        else:
            made.append(row)
    return made
