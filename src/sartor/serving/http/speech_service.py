"""Voices and concurrency of speech.

The voices' programs have processes of their own, and threads of their own wait for them and write the files. Both have
a lower priority, so that no reply waits for speech. The unit is a piece of a sentence or two, and no long text holds
up a short one.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from sartor.core.errors import BusyError, ConfigError, ExtraError, UnknownAgentError
from sartor.media.speech import tts_engines
from sartor.media.speech.audio_encoding import AudioClip, join_clips
from sartor.media.speech.text_normalization import spoken
from sartor.media.speech.tts_engines import open_voice
from sartor.media.speech.voice import SpeechTerms, TtsVoice, lower_priority
from sartor.serving.http.http_errors import FieldError
from sartor.serving.team_config import SpeechOptions

T = TypeVar("T")
# The name that clients ask for as `model`, and that a key opens; the team's own voice
MODEL, DEFAULT = "speech", "default"
OFF, AUTO = "off", "auto"
NICE = 10


@dataclass(frozen=True)
class SpokenText:
    """A text that was spoken. text: what was said of it. sound: the bytes of a file."""

    text: str
    sound: bytes


class SpeechService:
    """The voices of a team. Raises what `open_voice` raises for those that the team names."""

    def __init__(self, options: SpeechOptions) -> None:
        self._options = options
        self._terms = SpeechTerms(options.patience_s, NICE)
        default = _default(options.voice)
        opened = [open_voice(name, self._terms) for name in ([default, *options.voices] if default else [])]
        self._voices = {voice.name: voice for voice in opened}
        self._pool = ThreadPoolExecutor(options.at_once, "sartor-voice", lambda: lower_priority(NICE))
        self._text_count = 0

    @property
    def default(self) -> str:
        """Who speaks where nobody else is named; "" where the team does not speak."""
        return next(iter(self._voices), "")

    def check_on(self) -> None:
        """Raises UnknownAgentError where the team does not speak."""
        if not self._voices:
            problem = f"there is no model {MODEL!r}: this team does not speak"
            raise UnknownAgentError(problem, "speech: {voice: espeak} in TEAM.yaml, and `apt-get install espeak-ng`")

    def voice(self, name: str, param: str = "voice") -> TtsVoice:
        """The voice that a client names: the team's, or any of espeak-ng's where the team has one of them.

        Raises FieldError: no client names a file or a program.
        """
        self.check_on()
        if result := self._voices.get(self.default if name == DEFAULT else name):
            return result
        voice_names = [DEFAULT, *self._voices]
        if has_espeak := any(isinstance(voice, tts_engines.Espeak) for voice in self._voices.values()):
            voice_names.append("espeak:LANGUAGE+VARIANT, as espeak:de or espeak:en-us+f3")
        if has_espeak and name.partition(":")[0] == tts_engines.ESPEAK_NAME:
            with contextlib.suppress(ConfigError):
                return open_voice(name, self._terms)
        raise FieldError(f"no voice has the name {name[:80]!a}", f"one of {', '.join(voice_names)}", param)

    def check_length(self, text: str) -> None:
        """Raises FieldError for a text that is longer than one request may have."""
        if len(text) > self._options.characters:
            problem = f"input has {len(text)} characters; the limit of one request is {self._options.characters}"
            raise FieldError(problem, "send it in parts, or raise speech.characters in TEAM.yaml", "input")

    async def sounds(self, text: str, voice: TtsVoice, speed: float = 1.0) -> AsyncGenerator[AudioClip, None]:
        """The spoken form of a written text, a piece at a time. Raises BusyError, and what a voice raises."""
        with self._slot():
            spoken_form = await self.aside(lambda: spoken(text))
            for piece in await self.aside(lambda: voice.cut(spoken_form.text, speed)):
                yield await self.aside(functools.partial(voice.speak, piece, speed))

    async def say(self, text: str, voice: TtsVoice, form: str, speed: float = 1.0) -> SpokenText:
        """All of it, as the bytes of a file."""
        with self._slot():
            spoken_form = await self.aside(lambda: spoken(text))
            pieces = await self.aside(lambda: voice.cut(spoken_form.text, speed))
            clips = [await self.aside(functools.partial(voice.speak, piece, speed)) for piece in pieces]
            return SpokenText(spoken_form.text, await self.aside(lambda: join_clips(clips).encoded(form)))

    async def aside(self, work: Callable[[], T]) -> T:
        """The result of some work in a thread of the voices."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    @contextlib.contextmanager
    def _slot(self) -> Iterator[None]:
        if self._text_count >= self._options.waiting:
            raise BusyError(
                f"{self._text_count} texts are spoken or wait; the limit is {self._options.waiting}",
                "send it again after the seconds of Retry-After, or raise speech.waiting in the team's file",
            )
        self._text_count += 1
        try:
            yield
        finally:
            self._text_count -= 1

    async def close(self) -> None:
        """End the voices' processes; what waits is dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for voice in self._voices.values():
            await asyncio.to_thread(voice.close)


def _default(voice: str) -> str:
    """The voice that a team's option means, "" for none."""
    if voice != AUTO:
        return "" if voice == OFF else voice
    try:
        tts_engines.program()
    except ExtraError:
        return ""
    return tts_engines.ESPEAK_NAME
