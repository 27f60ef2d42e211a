"""espeak-ng (GPL-3.0): a program, started for each piece, which takes some milliseconds. Never a part of our process."""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache

from sartor.core.errors import ConfigError, ExtraError
from sartor.speech import processes
from sartor.speech.processes import ALONE, Terms
from sartor.speech.sound import Sound, read_wav
from sartor.speech.voice import Voice

NAME, PROGRAM = "espeak", "espeak-ng"
LANGUAGE = "en-us"
OWN_WORDS_PER_MINUTE = 175
# Below 80 words a minute it does not get slower
SLOWEST, FASTEST = round(80 / OWN_WORDS_PER_MINUTE + 0.005, 2), 4.0
HEAD_BYTES = 44
_OTHER = re.compile(r"\((\S+) \d+\)")


class Espeak(Voice):
    """A language of espeak-ng's and perhaps a variant: `de`, `en-us+f3`; "" is American English."""

    speeds = (SLOWEST, FASTEST)

    def __init__(self, language: str = "", terms: Terms = ALONE) -> None:
        self._program = program()
        self.name = f"{NAME}:{language}" if language else NAME
        self._language = language or LANGUAGE
        self._terms = terms
        _check(self._program, self._language)

    def speak(self, piece: str, speed: float) -> Sound:
        """See Voice."""
        pace = str(round(OWN_WORDS_PER_MINUTE * speed))
        # -b 1: UTF-8; -D: nothing random, which some variants have
        command = [self._program, "-v", self._language, "-s", pace, "-b", "1", "-D", "--stdin", "--stdout"]
        pipe = subprocess.PIPE
        with processes.start(command, self._terms.nice, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as process:
            try:
                said, _ = process.communicate(piece.encode(), self._terms.patience_s)
            except subprocess.TimeoutExpired:
                processes.kill(process)
                raise processes.too_slow(self.name, self._terms.patience_s) from None
        if process.returncode or len(said) <= HEAD_BYTES:
            raise processes.ended(self.name, process.returncode)
        return read_wav(said, HEAD_BYTES)


def program() -> str:
    """Where espeak-ng is. Raises ExtraError."""
    found = shutil.which(PROGRAM)
    if found is None:
        raise ExtraError(f"{PROGRAM}, which speaks, is not on this machine", f"apt-get install {PROGRAM} (macOS: brew install)")
    return found


def _check(where: str, language: str) -> None:
    """espeak-ng takes a path for a name, and any variant: only what it lists itself is let through to it."""
    name, plus, variant = language.partition("+")
    if name not in languages(where):
        raise ConfigError(f"{PROGRAM} has no language {name[:80]!a}", f"`{PROGRAM} --voices` lists them; en-us, de, fr-fr, ...")
    if plus and variant not in variants(where):
        raise ConfigError(
            f"{PROGRAM} has no variant {variant[:80]!a}", f"`{PROGRAM} --voices=variant` lists them; f1 to f5, m1 to m8, ..."
        )


@cache
def languages(where: str) -> frozenset[str]:
    """Every language that it lists, by all of its codes."""
    lines = _listed(where, "--voices")
    return frozenset(code for line in lines for code in (line.split()[1], *_OTHER.findall(line)))


@cache
def variants(where: str) -> frozenset[str]:
    """Every variant of a voice: the names of their files."""
    return frozenset(name for line in _listed(where, "--voices=variant") for name in re.findall(r"!v/(\S+)", line))


def _listed(where: str, what: str) -> list[str]:
    try:
        done = subprocess.run([where, what], capture_output=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise ExtraError(f"`{where} {what}` does not say which voices there are: {error}", f"install {PROGRAM} anew") from None
    return [line for line in done.stdout.decode("utf-8", "replace").splitlines()[1:] if len(line.split()) > 3]
