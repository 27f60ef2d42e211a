"""Voices and concurrency of speech.

The voices run as processes of their own; threads of their own wait for them and write the audio files. Both have a
lower priority, so that no reply waits for speech. The unit of work is a piece of one or two sentences, so that a long
text does not hold up a short one.
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
# MODEL: name of speech as `model` in requests, and in the list of names that a key opens. DEFAULT: the team's voice.
MODEL, DEFAULT = "speech", "default"
OFF, AUTO = "off", "auto"
NICE = 10


@dataclass(frozen=True)
class SpokenText:
    """Synthesised text.

    text: spoken form of the text. sound: bytes of an audio file.
    """

    text: str
    sound: bytes


class SpeechService:
    """Text-to-speech with the voices of a team. Raises what `open_voice` raises for the voices in TEAM.yaml."""

    def __init__(self, options: SpeechOptions) -> None:
        self._options = options
        self._terms = SpeechTerms(options.patience_s, NICE)
        default = _default(options.voice)
        names = [default, *options.voices] if default else []
        opened = [open_voice(name, self._terms) for name in names]
        self._voices = {voice.name: voice for voice in opened}
        self._pool = ThreadPoolExecutor(options.at_once, "sartor-voice", lambda: lower_priority(NICE))
        self._text_count = 0

    @property
    def default(self) -> str:
        """Name of the voice that speaks by default; "" if the team has no voice."""
        return next(iter(self._voices), "")

    def check_on(self) -> None:
        """Raise UnknownAgentError if the team has no voice."""
        if not self._voices:
            problem = f"there is no model {MODEL!r}: this team does not speak"
            raise UnknownAgentError(problem, "speech: {voice: espeak} in TEAM.yaml, and `apt-get install espeak-ng`")

    def voice(self, name: str, param: str = "voice") -> TtsVoice:
        """Return the voice that a client names.

        It is one of the team's voices, or any voice of espeak-ng if the team has one of them.
        param: field of the request, for the error.
        Raises UnknownAgentError if the team has no voice; FieldError for other names, such as files and programs.
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
        """Raise FieldError for a text above the length limit of one request."""
        if len(text) > self._options.characters:
            problem = f"input has {len(text)} characters; the limit of one request is {self._options.characters}"
            raise FieldError(problem, "send it in parts, or raise speech.characters in TEAM.yaml", "input")

    async def sounds(self, text: str, voice: TtsVoice, speed: float = 1.0) -> AsyncGenerator[AudioClip, None]:
        """Yield the audio of a text piece by piece.

        Raises BusyError, and what the voice raises.
        """
        with self._slot():
            spoken_form = await self.aside(lambda: spoken(text))
            for piece in await self.aside(lambda: voice.cut(spoken_form.text, speed)):
                yield await self.aside(functools.partial(voice.speak, piece, speed))

    async def say(self, text: str, voice: TtsVoice, form: str, speed: float = 1.0) -> SpokenText:
        """Return the audio of a whole text as one file.

        form: name of the file format. Raises BusyError, and what the voice raises.
        """
        with self._slot():
            spoken_form = await self.aside(lambda: spoken(text))
            pieces = await self.aside(lambda: voice.cut(spoken_form.text, speed))
            clips = [await self.aside(functools.partial(voice.speak, piece, speed)) for piece in pieces]
            return SpokenText(spoken_form.text, await self.aside(lambda: join_clips(clips).encoded(form)))

    async def aside(self, work: Callable[[], T]) -> T:
        """Return the result of `work`, run in a thread of the voices."""
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
        """End the voices' processes and drop the waiting work."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for voice in self._voices.values():
            await asyncio.to_thread(voice.close)


def _default(voice: str) -> str:
    """Return the voice of the option `speech.voice`; "" for `off`, and for `auto` without espeak-ng."""
    if voice != AUTO:
        return "" if voice == OFF else voice
    try:
        tts_engines.program()
    except ExtraError:
        return ""
    return tts_engines.ESPEAK_NAME
