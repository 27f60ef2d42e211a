"""Teacher protocol: question in, answer out.

`curate` asks a teacher one question at a time, from as many threads as `at_once` says; the façade says at import how a
local base is opened as one (`offer_local`) and how clips are spoken (`offer_speech`).
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
    """What a teacher is asked. messages: (role, text) in order. schema: JSON Schema that the answer should obey, ""
    for none.

    seed: of what is drawn at a temperature above 0.
    """

    messages: tuple[tuple[str, str], ...]
    seed: int = 0
    max_tokens: int = 512
    temperature: float = 0.8
    schema: str = ""

    @property
    def prompt_digest(self) -> str:
        """16 hex digits of what is said, whatever seed and temperature."""
        return digest([self.messages, self.schema])[:16]

    def digest(self, teacher: str) -> str:
        """What an answer is kept under: 32 hex digits of everything that it follows from."""
        return digest([teacher, asdict(self)])[:32]

    @property
    def last(self) -> str:
        """The text of the last message."""
        return self.messages[-1][1]


@dataclass(frozen=True)
class TeacherAnswer:
    """What a teacher said. finish: `length` if it was cut at max_tokens, `refused` if the teacher would not answer.

    tokens_in, tokens_out: as the teacher counts them, or estimated from the length where it says none
    (`is_estimated`).
    """

    text: str
    finish: Finish = "stop"
    tokens_in: int = 0
    tokens_out: int = 0
    is_estimated: bool = False

    @property
    def digest(self) -> str:
        """16 hex digits of the text."""
        return digest(self.text)[:16]


class Teacher(Protocol):
    """Answers questions. Called from `at_once` threads."""

    @property
    def name(self) -> str:
        """Who it is, for origins and as part of what an answer is kept under: never a key."""
        ...

    @property
    def at_once(self) -> int:
        """How many questions may be asked at once."""
        ...

    def answer(self, question: TeacherQuestion) -> TeacherAnswer:
        """Raises MissingError where it cannot be reached, KeyRefusedError, BusyError at the end of its patience,
        ModelError.
        """
        ...


OpenLocal = Callable[[str, int, Callable[[str], object]], Teacher]
# (texts, voice, speed, folder) -> a file of each text
SayAll = Callable[[Sequence[str], str, float, Path], list[Path]]
_OFFERED: dict[str, Any] = {}


def offer_local(opener: OpenLocal) -> None:
    """Make known how a base is opened as a teacher: (its name, questions at once, what is told of slow things)."""
    _OFFERED["local"] = opener


def offer_speech(say: SayAll) -> None:
    """Make known how texts are spoken by a voice of this machine."""
    _OFFERED["speech"] = say


def open_local(base: str, at_once: int, notice: Callable[[str], object]) -> Teacher:
    """The base as a teacher. Raises what opening a base raises."""
    opened: Teacher = _offered("local")(base, at_once, notice)
    return opened


def say_all(texts: Sequence[str], voice: str, speed: float, folder: Path) -> list[Path]:
    """A file below `folder` in which each text is spoken. Raises MissingError where no voice is installed."""
    files: list[Path] = _offered("speech")(texts, voice, speed, folder)
    return files


def _offered(name: str) -> Any:
    if name not in _OFFERED:
        raise MissingError(f"nobody offers {name} here", "import sartor")
    return _OFFERED[name]
