"""Teacher protocol: question in, answer out.

`synthesize` asks a teacher from up to `at_once` threads, one question each. On import, the package `sartor` registers
how a local base is opened as a teacher (`offer_local`) and how texts are spoken (`offer_speech`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from sartor.core.errors import MissingError
from sartor.core.records import digest

Finish = Literal["stop", "length", "refused"]


@dataclass(frozen=True)
class TeacherQuestion:
    """Question to a teacher.

    messages: (role, text) in order.
    seed: sampling seed, for a temperature above 0.
    schema: JSON Schema, as text, that the answer should satisfy; empty for none.
    """

    messages: tuple[tuple[str, str], ...]
    seed: int = 0
    max_tokens: int = 512
    temperature: float = 0.8
    schema: str = ""

    @property
    def prompt_digest(self) -> str:
        """16 hex digits of the digest of messages and schema, independent of seed and temperature."""
        return digest([self.messages, self.schema])[:16]

    def digest(self, teacher: str) -> str:
        """Return the cache key of an answer: 32 hex digits over everything that it depends on."""
        return digest([teacher, asdict(self)])[:32]

    @property
    def last(self) -> str:
        """Text of the last message."""
        return self.messages[-1][1]


@dataclass(frozen=True)
class TeacherAnswer:
    """Answer of a teacher.

    finish: `length` if it was cut at max_tokens, `refused` if the teacher would not answer.
    tokens_in, tokens_out: token counts reported by the teacher, or estimates from the length (`is_estimated`).
    """

    text: str
    finish: Finish = "stop"
    tokens_in: int = 0
    tokens_out: int = 0
    is_estimated: bool = False

    @property
    def digest(self) -> str:
        """16 hex digits of the digest of the text."""
        return digest(self.text)[:16]


class Teacher(Protocol):
    """Source of answers, called from `at_once` threads."""

    @property
    def name(self) -> str:
        """Name of the teacher, for origins and as a part of cache keys; it never contains a secret key."""
        ...

    @property
    def at_once(self) -> int:
        """Number of questions that may be asked at once."""
        ...

    def answer(self, question: TeacherQuestion) -> TeacherAnswer:
        """Return the answer to a question.

        Raises MissingError if the teacher cannot be reached, KeyRefusedError, BusyError once all tries are used,
        ModelError.
        """
        ...


OpenLocal = Callable[[str, int, Callable[[str], object]], Teacher]
# (texts, voice, speed, folder) -> one file for each text
SayAll = Callable[[Sequence[str], str, float, Path], list[Path]]
_OFFERED: dict[str, Any] = {}


def offer_local(opener: OpenLocal) -> None:
    """Register the opener of a local base as a teacher: (base, questions at once, notice) -> Teacher."""
    _OFFERED["local"] = opener


def offer_speech(say: SayAll) -> None:
    """Register the function that speaks texts with a local voice."""
    _OFFERED["speech"] = say


def open_local(base: str, at_once: int, notice: Callable[[str], object]) -> Teacher:
    """Open a base as a teacher. Raises what opening a base raises."""
    opened: Teacher = _offered("local")(base, at_once, notice)
    return opened


def say_all(texts: Sequence[str], voice: str, speed: float, folder: Path) -> list[Path]:
    """Speak each text into a file below `folder`; return the files.

    Raises MissingError if no voice is installed.
    """
    files: list[Path] = _offered("speech")(texts, voice, speed, folder)
    return files


def _offered(name: str) -> Any:
    if name not in _OFFERED:
        raise MissingError(f"nobody offers {name} here", "import sartor")
    return _OFFERED[name]
