"""Generators without a teacher: templates, slots, counterfactuals, media.

Source: Louvan & Magnini 2020, "Simple is Better! Lightweight Data Augmentation for Low Resource Slot Filling and
Intent Classification" (arXiv:2009.03695).
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sartor.core.config import REQUIRED, option
from sartor.core.errors import ConfigError
from sartor.core.records import Drop, Example, Message, Part, digest
from sartor.core.splits import split_group
from sartor.curate.sources import media_files
from sartor.curate.step import AugmentedRow
from sartor.curate.steps.media_augmentation import AugmentAudio, AugmentImages
from sartor.synthesize.generator import GeneratedRow, Skipped, draw_of, refusal_reason, sample_seeds, with_text
from sartor.synthesize.generators.rewrite_generators import ROWS
from sartor.synthesize.teacher import say_all
from sartor.text.demographics.group_terms import KINDS, Kind, groups, mentions, swap

# Draws per copy: a draw may repeat an earlier one, so a row with few values gives fewer copies than requested
TRIES = 4
_NUMBER = re.compile(r"(?<![\w.,-])\d+(?![\w]|[.,]\d)")


@dataclass(frozen=True)
class SlotSubstitution:
    """Copies of rows with a value replaced by another of its list, in last question and reply alike.

    A value is replaced only if it stands once in each, as a word of its own. A value that occurs twice in the
    question, or not in the reply, stays. A value of two lists also stays, since its alternatives are ambiguous.
    """

    slots: Any = option(REQUIRED, "a mapping: slot -> list of values that may stand for one another")
    numbers: bool = option(False, "whole numbers too, by others of as many digits")
    per_row: int = option(4, "copies of a row at most")
    rows: int = option(0, ROWS)
    kind: Literal["slot_substitution"] = "slot_substitution"

    def __post_init__(self) -> None:
        is_listed = isinstance(self.slots, dict) and all(
            isinstance(values, list) and len(values) > 1 for values in self.slots.values()
        )
        if not is_listed or not (self.slots or self.numbers):
            raise ConfigError(
                "slots must be a mapping of lists with two values or more", "slots: {room: [hall, attic]}"
            )
        if self.per_row < 1 or self.rows < 0:
            raise ConfigError(
                f"per_row is {self.per_row} and rows {self.rows}; neither can be less", "per_row: 1, rows: 0"
            )

    def make(self, seeds: Sequence[Example], seed: int, folder: Path) -> Iterator[GeneratedRow | Drop | Skipped]:
        """Yield the copies of each drawn seed, or why it is skipped."""
        alternatives = self._alternatives()
        for row in sample_seeds(seeds, self.rows, seed, self.kind):
            if reason := refusal_reason(row):
                yield Skipped(reason)
                continue
            question, reply = row.messages[-2].text, row.reply
            numbers = dict.fromkeys(_NUMBER.findall(question)) if self.numbers else {}
            values = [value for value in (*alternatives, *numbers) if _once(value, question) and _once(value, reply)]
            # no part of another value: with "living room" and "room", the longer one is meant
            whole_values = []
            for value in values:
                pattern = _pattern(value)
                if not any(value != other and pattern.search(other) for other in values):
                    whole_values.append(value)
            copies = self._copies(row, whole_values, alternatives, seed)
            if not copies:
                yield Skipped("no_value_in_both")
            yield from copies

    def _alternatives(self) -> dict[str, list[str]]:
        """Return value -> the values of its list; values of two lists are left out."""
        lists = [list(map(str, values)) for values in self.slots.values()]
        list_counts = Counter[str]()
        for values in lists:
            list_counts.update(set(values))
        return {value: values for values in lists for value in values if list_counts[value] == 1}

    def _copies(
        self, row: Example, values: Sequence[str], alternatives: dict[str, list[str]], seed: int
    ) -> list[GeneratedRow]:
        draw = draw_of(seed, self.kind, row.id)
        result: list[GeneratedRow] = []
        used_changes: set[tuple[tuple[str, str], ...]] = {()}
        for _ in range(TRIES * self.per_row):
            if len(result) == self.per_row or not values:
                break
            replacements = {value: _other(value, alternatives.get(value), draw) for value in values}
            changes = tuple((old, new) for old, new in replacements.items() if old != new)
            # two values must not become equal, since they could no longer be distinguished
            if changes in used_changes or len(set(replacements.values())) < len(replacements):
                continue
            used_changes.add(changes)
            words = "; ".join(f"{old} to {new}" for old, new in changes)
            result.append(
                GeneratedRow(
                    _changed(row, replacements),
                    f"{row.id[:16]}.{len(result) + 1}",
                    parents=(row,),
                    group=split_group(row),
                    changes=words,
                )
            )
        return result


def _pattern(value: str) -> re.Pattern[str]:
    """Return a pattern for the value as a word of its own.

    A number does not match inside a longer number or behind a minus sign.
    """
    return re.compile(rf"(?<![\w-]){re.escape(value)}(?![\w]|[.,]\d)")


def _once(value: str, text: str) -> bool:
    return len(_pattern(value).findall(text)) == 1


def _other(value: str, choices: Sequence[str] | None, draw: random.Random) -> str:
    if choices is not None:
        return draw.choice(choices)
    lowest = 10 ** (len(value) - 1) if len(value) > 1 else 1
    return str(draw.randrange(lowest, 10 ** len(value)))


def _changed(row: Example, replacements: dict[str, str]) -> Example:
    """Return the row with all values replaced at once, so that an inserted value is not replaced again."""
    pattern = re.compile("|".join(_pattern(value).pattern for value in replacements))

    def turned(text: str) -> str:
        return pattern.sub(lambda match: replacements[match[0]], text)

    question, reply = (with_text(message, turned(message.text)) for message in row.messages[-2:])
    return replace(row, messages=(*row.messages[:-2], question, reply), rejected=())


# Separates the texts of a conversation, which are swapped together so that a name changes in the same way everywhere
_APART = "\n\x1e\n"


@dataclass(frozen=True)
class Counterfactual:
    """Copies of rows that name a group, about another group with the same outcome.

    The model should not distinguish such pairs. Texts whose grammar or sense cannot be kept give no copy (as
    documented in `text/demographics/group_terms.py`).
    """

    kinds: tuple[Kind, ...] = option(KINDS, "what is swapped: names, pronouns, age, nationality, disability")
    to: tuple[str, ...] = option((), "groups to swap to; empty takes every other one")
    per_row: int = option(1, "copies of a row for each kind at most, drawn by the seed")
    rows: int = option(0, ROWS)
    kind: Literal["counterfactual"] = "counterfactual"

    def __post_init__(self) -> None:
        if not self.kinds:
            raise ConfigError("kinds is empty; it must name at least one", f"kinds: [{', '.join(KINDS)}]")
        known = {group for kind in self.kinds for group in groups(kind)}
        if unknown := [group for group in self.to if group not in known]:
            raise ConfigError(
                f"{unknown[0]!r} is no group of {', '.join(self.kinds)}", f"one of {', '.join(sorted(known))}"
            )
        if self.per_row < 1 or self.rows < 0:
            problem = f"per_row is {self.per_row}, rows {self.rows}; they must be at least 1, and 0 or more"
            raise ConfigError(problem, "per_row: 1" if self.per_row < 1 else "rows: 0")

    def make(self, seeds: Sequence[Example], seed: int, folder: Path) -> Iterator[GeneratedRow | Drop | Skipped]:
        """Yield the copies of each drawn seed, or why it is skipped."""
        for row in sample_seeds(seeds, self.rows, seed, self.kind):
            messages = row.messages + row.rejected
            text = _APART.join(part.text for message in messages for part in message.content if part.kind == "text")
            named_kinds = [kind for kind in self.kinds if mentions(text, kind)]
            copies = [item for kind in named_kinds for item in self._swapped(row, text, kind, seed)]
            if not copies:
                yield Skipped("not_swappable" if named_kinds else "no_group_named")
            yield from copies

    def _swapped(self, row: Example, text: str, kind: Kind, seed: int) -> list[GeneratedRow]:
        targets = list(self.to or groups(kind))
        draw_of(seed, self.kind, row.id, kind).shuffle(targets)
        result: list[GeneratedRow] = []
        for target in targets:
            if target in groups(kind) and len(result) < self.per_row and (changed := swap(text, kind, target)):
                number = f"{row.id[:16]}.{kind}.{target}"
                result.append(
                    GeneratedRow(
                        _with_texts(row, changed.split(_APART)),
                        number,
                        parents=(row,),
                        group=split_group(row),
                        changes=f"{kind} to {target}",
                    )
                )
        return result


def _with_texts(row: Example, texts: Sequence[str]) -> Example:
    remaining_texts = iter(texts)

    def turned(messages: tuple[Message, ...]) -> tuple[Message, ...]:
        turned_messages = []
        for message in messages:
            content = [
                Part("text", next(remaining_texts)) if part.kind == "text" else part for part in message.content
            ]
            turned_messages.append(replace(message, content=tuple(content)))
        return tuple(turned_messages)

    return replace(row, messages=turned(row.messages), rejected=turned(row.rejected))


@dataclass(frozen=True)
class SpokenQuestions:
    """The last question of a row as a recording instead of text; the reply stays.

    Needs a voice (espeak-ng or piper).
    """

    voice: str = option("espeak", "a voice as `sartor ask --speak` names them")
    speeds: tuple[float, ...] = option((1.0,), "one recording for each, 0.5 to 2")
    rows: int = option(0, ROWS)
    kind: Literal["speech"] = "speech"

    def __post_init__(self) -> None:
        if not self.speeds or not all(0.5 <= speed <= 2 for speed in self.speeds):
            raise ConfigError(
                f"speeds is {list(self.speeds)}; each must be from 0.5 to 2, and there must be one",
                "speeds: [0.9, 1.1]",
            )

    def make(self, seeds: Sequence[Example], seed: int, folder: Path) -> Iterator[GeneratedRow | Drop | Skipped]:
        """Yield a spoken copy of each drawn seed at each speed, or why it is skipped.

        Raises MissingError if no voice is installed.
        """
        sampled = sample_seeds(seeds, self.rows, seed, self.kind)
        speakable = [row for row in sampled if not refusal_reason(row)]
        yield from (Skipped(reason) for row in sampled if (reason := refusal_reason(row)))
        for speed in self.speeds:
            clips = say_all([row.messages[-2].text for row in speakable], self.voice, speed, folder / "clips")
            for row, clip in zip(speakable, clips, strict=True):
                with clip.open("rb") as stream:
                    name = media_files.copy(stream, clip.name, folder / "media")
                media_parts = tuple(part for part in row.messages[-2].content if part.kind != "text")
                question = replace(row.messages[-2], content=(Part("audio", media=name), *media_parts))
                spoken = replace(row, messages=(*row.messages[:-2], question, row.messages[-1]))
                yield GeneratedRow(
                    spoken,
                    f"{row.id[:16]}.{speed:g}",
                    parents=(row,),
                    group=split_group(row),
                    changes=f"spoken by {self.voice} at {speed:g}",
                )


def copied(
    step: AugmentImages | AugmentAudio, seeds: Sequence[Example], folder: Path
) -> Iterator[GeneratedRow | Drop | Skipped]:
    """Yield the copies of an AugmentStep of `curate` as generated rows; its own seed is used."""
    copies = step.open(folder)
    for row in seeds:
        number = 0
        for number, outcome in enumerate(copies(row), 1):
            if isinstance(outcome, AugmentedRow):
                yield GeneratedRow(
                    outcome.row,
                    f"{row.id[:16]}.{number}",
                    parents=(row,),
                    group=split_group(row),
                    changes=outcome.changes,
                )
            else:
                yield outcome
        if not number:
            yield Skipped("no_media")


_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Templates:
    """Every combination of the slots' values in every prompt, or `count` of them drawn by the seed.

    Rows of one prompt form one group; if they were split, the model could learn held-out rows by heart. Only `{name}`
    of a slot is filled. Other braces stay, such as those of JSON.
    """

    prompts: tuple[str, ...] = option(REQUIRED, "questions with {slots}")
    reply: str = option(REQUIRED, "the reply with {slots}")
    slots: Any = option(REQUIRED, "a mapping: slot -> list of values")
    system: str = option("", "system prompt of the rows")
    count: int = option(0, "rows to make; 0 makes every combination")
    kind: Literal["templates"] = "templates"

    def __post_init__(self) -> None:
        is_listed = isinstance(self.slots, dict) and all(
            isinstance(values, list) and values for values in self.slots.values()
        )
        if not is_listed or not self.prompts or self.count < 0:
            raise ConfigError(
                "slots must be a mapping of lists, none empty, and prompts a list", "slots: {room: [hall, attic]}"
            )
        for text in self.prompts:
            if missing := set(_SLOT.findall(self.reply)) & set(self.slots) - set(_SLOT.findall(text)):
                problem = f"the reply says {{{sorted(missing)[0]}}}, which the prompt {text!r} does not"
                raise ConfigError(problem, "a reply can only tell what was asked")

    def make(self, seeds: Sequence[Example], seed: int, folder: Path) -> Iterator[GeneratedRow | Drop | Skipped]:
        """Yield the chosen combinations, in order."""
        prompts: list[tuple[str, list[str]]] = []
        sizes: list[int] = []
        for text in self.prompts:
            names = [name for name in dict.fromkeys(_SLOT.findall(text)) if name in self.slots]
            prompts.append((text, names))
            sizes.append(math.prod(len(self.slots[name]) for name in names))
        total = sum(sizes)
        numbers = range(total)
        chosen = sorted(draw_of(seed, self.kind).sample(numbers, self.count)) if 0 < self.count < total else numbers
        starts = [0, *itertools.accumulate(sizes)]
        index = 0
        for number in chosen:
            while number >= starts[index + 1]:
                index += 1
            text, names = prompts[index]
            position = number - starts[index]
            yield self._row(text, self._values(names, position), f"{index + 1}.{position + 1}")

    def _values(self, names: Sequence[str], number: int) -> dict[str, str]:
        values = {}
        for name in reversed(names):
            number, index = divmod(number, len(self.slots[name]))
            values[name] = str(self.slots[name][index])
        return values

    def _row(self, text: str, values: dict[str, str], number: str) -> GeneratedRow:
        def filled(template: str) -> str:
            return _SLOT.sub(lambda match: values.get(match[1], match[0]), template)

        messages = [Message.of("system", self.system)] if self.system else []
        messages += [Message.of("user", filled(text)), Message.of("assistant", filled(self.reply))]
        return GeneratedRow(Example(tuple(messages), ()), number, group=f"template:{digest(text)[:16]}", changes=text)
