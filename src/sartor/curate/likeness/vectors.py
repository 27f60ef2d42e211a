"""Texts of a sketch as vectors: which encoder, why that one, and what it did not read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

from sartor.core.encoder_registry import Encoder, open_encoder
from sartor.core.errors import MissingError
from sartor.core.records import Example

MOST_CHARACTERS = 20_000  # of a text in a sketch
MODEL_LIKENESS, TFIDF_LIKENESS = 0.8, 0.4


@dataclass(frozen=True)
class Chosen:
    """An encoder and why it is this one."""

    encoder: Encoder
    why: str

    @property
    def likeness(self) -> float:
        """The cosine from which a pair deserves a look. What tfidf does not see as common it holds to be far apart."""
        return TFIDF_LIKENESS if self.encoder.name == "tfidf" else MODEL_LIKENESS

    def facts(self) -> dict[str, Any]:
        """For the manifest and the card; `texts_cut` counts texts of the last `encode`."""
        return {"encoder": self.encoder.name, "encoder_because": self.why, "texts_cut": self.encoder.cut}


def choose(name: str) -> Chosen:
    """The encoder of a name or directory. `auto` is minilm where it can be opened here, else tfidf."""
    if name != "auto":
        return Chosen(open_encoder(name), "the recipe names it")
    try:
        return Chosen(open_encoder("minilm"), "auto: the asset minilm and torch are here")
    except MissingError as error:
        return Chosen(open_encoder("tfidf"), f"auto: {error.problem} ({error.remedy})")


class Texts(Sequence[str]):
    """A text column of a sketch, read from its memory-mapped file as it is asked for."""

    def __init__(self, column: Any) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            start, stop, step = place.indices(len(self))
            return list(self._column.slice(start, max(0, stop - start)).to_pylist()[::step])
        return str(self._column[place].as_py())

    def __iter__(self) -> Iterator[str]:
        for chunk in self._column.chunks:
            for start in range(0, len(chunk), 1024):
                yield from chunk.slice(start, 1024).to_pylist()


def prompt_text(example: Example) -> str:
    """What is asked: the text of every message before the reply but the system's."""
    return "\n".join(message.text for message in example.prompt if message.role != "system")[:MOST_CHARACTERS]


def is_cut(example: Example) -> bool:
    """Whether the prompt or the reply is longer than a sketch holds."""
    prompt = sum(len(message.text) + 1 for message in example.prompt if message.role != "system") - 1
    return max(prompt, len(example.reply)) > MOST_CHARACTERS


def system_text(example: Example) -> str:
    """What the system is told."""
    return "\n".join(message.text for message in example.prompt if message.role == "system")[:MOST_CHARACTERS]
