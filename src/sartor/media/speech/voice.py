"""Voice interface, sentence splitting, and child processes for speech."""

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
    """Limits of the speech programs.

    patience_s: seconds after which a program that has not spoken is killed.
    nice: added to the niceness of this process, so that other work comes first.
    """

    patience_s: float = 20.0
    nice: int = 0


ALONE = SpeechTerms()


def start(command: Sequence[str], nice: int, **pipes: Any) -> subprocess.Popen[bytes]:
    """Start a program.

    Text must be passed by a pipe: on the command line it could act as an option and would be visible.
    """
    # piper is a Python program; UTF-8 mode makes its input independent of the locale
    process = subprocess.Popen(list(command), env={**os.environ, "PYTHONUTF8": "1"}, **pipes)
    if nice:
        _add_niceness(process.pid, nice)
    return process


def _add_niceness(process_id: int, nice: int) -> None:
    """Set the niceness of a process or thread to this process's niceness plus `nice`.

    It is absolute, so niceness inherited from a thread does not add up.
    """
    with suppress(OSError):  # the process may have ended already
        os.setpriority(os.PRIO_PROCESS, process_id, os.getpriority(os.PRIO_PROCESS, os.getpid()) + nice)


def lower_priority(nice: int) -> None:
    """Lower the priority of this thread too. Only Linux has a niceness for each thread."""
    if sys.platform == "linux":
        _add_niceness(threading.get_native_id(), nice)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and collect its exit status, so that no zombie is left."""
    process.kill()
    process.wait()


def timeout_error(voice: str, seconds: float) -> DeadlineError:
    """Return the error for a program that was killed after `seconds`."""
    return DeadlineError(f"the voice {voice!r} had not spoken after {seconds:g} s and was stopped", ANOTHER)


def exit_error(voice: str, code: int | None) -> UnavailableError:
    """Return the error for a program that ended before it had spoken."""
    cause = f"with the code {code}" if code is None or code >= 0 else f"by the signal {-code}"
    return UnavailableError(f"the voice {voice!r} ended {cause} before it had spoken", ANOTHER)


# Characters of one piece: seconds of speech, which every voice synthesises quickly
MOST_PIECE = 300
_END = re.compile(r"(?<=[.!?…])\s+|(?<=[。！？])|\n+")
_BREAK = re.compile(r"[,;:，、]\s|\s")


def clean(text: str) -> str:
    """Return a text without characters that voices must not get: controls, lone surrogates, zero-width marks.

    `[[` is separated, since it begins phonemes in both programs. Line ends stay, because a sentence may end there.
    """
    letters = []
    for letter in text:
        category = unicodedata.category(letter)
        if letter == "\n" or category[0] != "C":
            letters.append(letter)
        elif category != "Cf":  # format characters (soft hyphen, joiner) stand inside words, so no space replaces them
            letters.append(" ")
    return re.sub(r"[^\S\n]+", " ", "".join(letters).replace("[[", "[ [")).strip()


def is_sayable(text: str) -> bool:
    """Return whether a text contains a letter or digit."""
    return any(letter.isalnum() for letter in text)


def pieces(text: str) -> list[str]:
    """Split a cleaned text into single-line pieces of at most MOST_PIECE characters; silent ones are dropped."""
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
    """Voice of a text-to-speech program. Safe to use from several threads.

    Equal text and speed give equal samples on one machine.
    speeds: slowest and fastest speed; 1.0 is the voice's own.
    """

    name: str
    speeds: tuple[float, float]

    def say(self, text: str, speed: float = 1.0) -> AudioClip:
        """Speak a text. Raises what `cut` and `speak` raise."""
        return join_clips([self.speak(piece, speed) for piece in self.cut(text, speed)])

    def cut(self, text: str, speed: float = 1.0) -> list[str]:
        """Split a text into pieces for `speak`.

        Raises ConfigError for a speed or length beyond the limits, or a text without words.
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
        """Speak one piece of `cut`.

        Raises DeadlineError if the program took too long and was killed; UnavailableError if it ended early.
        """

    def close(self) -> None:
        """End the voice's processes. The voice may speak again afterwards."""
        return
