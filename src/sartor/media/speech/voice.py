"""Voice interface, sentence splitting, speech child processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sartor.core.errors import ConfigError, DeadlineError, UnavailableError
from sartor.media.speech.audio_encoding import AudioClip, join_clips

ANOTHER = "try again, or another voice"


@dataclass(frozen=True)
class SpeechTerms:
    """patience_s: after which a program that has not spoken is killed. nice: added to its niceness, so that others go
    first.
    """

    patience_s: float = 20.0
    nice: int = 0


ALONE = SpeechTerms()


def start(command: Sequence[str], nice: int, **pipes: Any) -> subprocess.Popen[bytes]:
    """The program, running. Text goes in by a pipe alone: on a command line it could be read as an option, and be
    seen.
    """
    # piper is a Python program: whatever the locale, what comes in is UTF-8
    process = subprocess.Popen(list(command), env={**os.environ, "PYTHONUTF8": "1"}, **pipes)
    if nice:
        _add_niceness(process.pid, nice)
    return process


def _add_niceness(process_id: int, nice: int) -> None:
    """That process or thread has so much more than this process; what it inherited from a thread does not add up."""
    with suppress(OSError):  # it may be over already
        os.setpriority(os.PRIO_PROCESS, process_id, os.getpriority(os.PRIO_PROCESS, os.getpid()) + nice)


def lower_priority(nice: int) -> None:
    """Let others go before this thread too. Linux alone has a niceness for each thread."""
    if sys.platform == "linux":
        _add_niceness(threading.get_native_id(), nice)


def kill(process: subprocess.Popen[bytes]) -> None:
    """End it at once, and leave no zombie."""
    process.kill()
    process.wait()


def timeout_error(voice: str, seconds: float) -> DeadlineError:
    """The error for a program that was killed."""
    return DeadlineError(f"the voice {voice!r} had not spoken after {seconds:g} s and was stopped", ANOTHER)


def exit_error(voice: str, code: int | None) -> UnavailableError:
    """The error for a program that ended before it had spoken."""
    cause = f"with the code {code}" if code is None or code >= 0 else f"by the signal {-code}"
    return UnavailableError(f"the voice {voice!r} ended {cause} before it had spoken", ANOTHER)


# Of one piece: a few seconds of speech, which no voice takes long for
MOST_PIECE = 300
_END = re.compile(r"(?<=[.!?…])\s+|(?<=[。！？])|\n+")
_BREAK = re.compile(r"[,;:，、]\s|\s")


def clean(text: str) -> str:
    """The text without what no voice may be given: control characters, halves of surrogate pairs, marks without a
    width.

    `[[` would begin phonemes in both programs. Line ends stay, since a sentence may end there.
    """
    cleaned = "".join(
        letter if letter == "\n" or unicodedata.category(letter)[0] != "C" else _instead(letter) for letter in text
    )
    return re.sub(r"[^\S\n]+", " ", cleaned.replace("[[", "[ [")).strip()


def _instead(letter: str) -> str:
    """Nothing for a mark inside a word (soft hyphen, joiner), a space for whatever else is no character."""
    return "" if unicodedata.category(letter) == "Cf" else " "


def is_sayable(text: str) -> bool:
    """Whether anything in it has a sound."""
    return any(letter.isalnum() for letter in text)


def pieces(text: str) -> list[str]:
    """A cleaned text in pieces of at most MOST_PIECE characters, each a line, none without a sound."""
    lines: list[str] = []
    for sentence in _sentences(text):
        if lines and len(lines[-1]) + 1 + len(sentence) <= MOST_PIECE:
            lines[-1] = f"{lines[-1]} {sentence}"
        else:
            lines.append(sentence)
    return [piece for piece in lines if is_sayable(piece)]


def _sentences(text: str) -> Iterator[str]:
    for sentence in _END.split(text):
        rest = sentence.strip()
        while len(rest) > MOST_PIECE:
            breaks = [match.end() for match in _BREAK.finditer(rest, 0, MOST_PIECE)]
            position = breaks[-1] if breaks else MOST_PIECE
            yield rest[:position].strip()
            rest = rest[position:].strip()
        if rest:
            yield rest


MOST_CHARACTERS = 100_000


class TtsVoice(ABC):
    """Who speaks. speeds: the slowest and the fastest; 1.0 is the voice's own. Safe to use from several threads.

    Equal text and speed are equal samples, on one machine.
    """

    name: str
    speeds: tuple[float, float]

    def say(self, text: str, speed: float = 1.0) -> AudioClip:
        """The text, spoken. Raises what `cut` and `speak` raise."""
        return join_clips([self.speak(piece, speed) for piece in self.cut(text, speed)])

    def cut(self, text: str, speed: float = 1.0) -> list[str]:
        """The text in pieces, each of which `speak` takes. Raises ConfigError for a text or a speed that it cannot
        say.
        """
        slowest, fastest = self.speeds
        if not slowest <= speed <= fastest:
            raise ConfigError(
                f"the voice {self.name!r} speaks at {slowest:g} to {fastest:g} times its speed, not {speed:g}",
                f"a speed from {slowest:g} to {fastest:g}, or another voice",
            )
        if len(text) > MOST_CHARACTERS:
            raise ConfigError(
                f"the text has {len(text):,} characters; the limit is {MOST_CHARACTERS:,}",
                f"several texts of at most {MOST_CHARACTERS:,} characters, each spoken by itself",
            )
        result = pieces(clean(text))
        if not result:
            raise ConfigError("nothing in the text can be said", "give a text with words in it")
        return result

    @abstractmethod
    def speak(self, piece: str, speed: float) -> AudioClip:
        """One piece of `cut`, spoken.

        Raises DeadlineError for a program that was killed since it took too long, UnavailableError for one that ended
        early.
        """

    def close(self) -> None:
        """End what the voice keeps running. It may speak again afterwards."""
        return
