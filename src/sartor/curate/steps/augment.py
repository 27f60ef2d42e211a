"""What `augment_images` and `augment_audio` share: copies of a row in which its media are changed and all else is as it was.

What is drawn follows from (step, seed, id of the row, number of the copy) and from nothing else, so copies are the same bytes
in whatever process and order they are made. All media of a row are drawn for alike: of two pictures that are compared both are
turned by one angle.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from sartor.core.errors import ConfigError, MediaError
from sartor.core.records import Drop, Example, Message, PartKind, canonical, dropped
from sartor.curate.sources import media
from sartor.curate.steps.contract import Copy, CopyFunction
from sartor.curate.steps.images import media_of

MOST_COPIES = 100
T = TypeVar("T")


class Written(NamedTuple):
    """A changed medium as a file: its bytes, its suffix, and in words what was changed."""

    content: bytes
    suffix: str
    changes: list[str]


class Changing(Protocol, Generic[T]):
    """A step as it is seen here: how its media are decoded, and how one is changed."""

    @property
    def kind(self) -> str:
        """Its name in a recipe."""
        ...

    @property
    def copies(self) -> int:
        """Further rows for each row."""
        ...

    @property
    def seed(self) -> int:
        """Of what is drawn."""
        ...

    def decoded(self, file: Path) -> T:
        """Raises MediaError."""
        ...

    def changed(self, medium: T, file: Path, draw: np.random.Generator) -> Written:
        """The medium with changes by `draw`, whose first values do not depend on the medium. `file` is where it was."""
        ...


def copying(step: Changing[T], part: PartKind, folder: Path) -> CopyFunction:
    """The function of a CopyStep that changes the media of one kind of part."""

    def copies(example: Example) -> Iterator[Copy | Drop]:
        names = list(dict.fromkeys(media_of(example, part)))
        decoded: dict[str, T] = {}
        for number in range(1, step.copies + 1) if names else ():
            try:
                decoded = decoded or {name: step.decoded(folder / name) for name in names}
                written = {
                    name: step.changed(medium, folder / name, _draw(step.kind, step.seed, example.id, number))
                    for name, medium in decoded.items()
                }
            except MediaError as error:
                yield _failed(example, step.kind, number, error)
                continue
            row = _copy(example, step.kind, {name: _stored(one, folder) for name, one in written.items()})
            yield Copy(row, f"copy {number}: {', '.join(written[names[0]].changes) or 'nothing'}")

    return copies


def _draw(kind: str, seed: int, row: str, number: int) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(canonical([kind, seed, row, number])).digest(), "big"))


def _stored(written: Written, folder: Path) -> str:
    return media.copy(io.BytesIO(written.content), f"copy{written.suffix}", folder / "media")


def _copy(example: Example, kind: str, now: dict[str, str]) -> Example:
    """The row with other media. Its origins say what it was made from, so that revoking the row or its source reaches it."""
    return replace(
        example,
        messages=_with_media(example.messages, now),
        rejected=_with_media(example.rejected, now),
        origins=tuple(replace(origin, parents=(example.id,), step=kind) for origin in example.origins),
        steps=(*example.steps, kind),
    )


def _with_media(messages: tuple[Message, ...], now: dict[str, str]) -> tuple[Message, ...]:
    return tuple(
        replace(message, content=tuple(replace(part, media=now.get(part.media, part.media)) for part in message.content))
        for message in messages
    )


def _failed(example: Example, kind: str, number: int, error: MediaError) -> Drop:
    """The Drop of one copy. It has no id: the row itself is kept under it."""
    drop = dropped(example, f"{kind}:{error.reason}", f"copy {number} of {example.id}: {error.problem}", step=kind)
    return replace(drop, id="")


def check_copies(copies: int, *, is_idle: bool) -> None:
    """Raises ConfigError for a number of copies that cannot be, or where no change is asked for."""
    if not 1 <= copies <= MOST_COPIES:
        raise ConfigError(f"copies is {copies}; it must be from 1 to {MOST_COPIES}", "copies: 2")
    if is_idle:
        raise ConfigError("every change is off, and a copy would be the row itself", "leave the options out for the defaults")


def check_between(name: str, value: float, least: float, most: float, remedy: object) -> None:
    """Raises ConfigError for an option outside of its bounds."""
    if not least <= value <= most:
        raise ConfigError(f"{name} is {value:g}; it must be from {least:g} to {most:g}", f"{name}: {remedy}")
