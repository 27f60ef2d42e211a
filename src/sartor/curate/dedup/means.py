"""How a run does its work: who hears of its progress, and which processes share it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


def _silent(stage: str, done: int, of: int) -> None:
    pass


def serial(function: Callable[..., T], items: Iterable[tuple[Any, ...]]) -> Iterator[T]:
    """`function(*item)` of every item, in order, in this process."""
    return (function(*item) for item in items)


@dataclass(frozen=True)
class Means:
    """`show(stage, done, of)` hears of progress; `spread` calls a module's function on items, in order (also `workers.py`)."""

    show: Callable[[str, int, int], None] = _silent
    spread: Callable[..., Iterator[Any]] = serial


ALONE = Means()
