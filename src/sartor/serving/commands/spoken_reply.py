"""Speech output of a reply, as an audio file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from sartor.core.errors import ConfigError
from sartor.core.filesystem import write_file_atomic
from sartor.media.speech.audio_encoding import ENDINGS
from sartor.media.speech.text_normalization import spoken
from sartor.media.speech.tts_engines import DEFAULT, open_voice
from sartor.serving.commands.ask_types import AskReply, SpokenFile


def speaking(file: Path | str, voice: str = DEFAULT, speed: float = 1.0) -> Callable[[AskReply], AskReply]:
    """Return a function that speaks a reply into `file` and records it in the reply.

    The file's suffix is .wav, .flac, .mp3, .opus or .ogg. Problems that can be known before the reply are raised here,
    before a base is opened: ConfigError for an invalid file, and what `open_voice` raises. The file is written whole
    or not at all.
    """
    path = Path(file)
    form = ENDINGS.get(path.suffix.lower())
    if form is None:
        raise ConfigError(f"{path.name!r} does not say a form of sound", f"a name that ends in {', '.join(ENDINGS)}")
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise ConfigError(f"{path} cannot be written", "a file in a directory that is there and may be written to")
    speaker = open_voice(voice)
    speaker.cut(form, speed)

    def speak(reply: AskReply) -> AskReply:
        speech = spoken(reply.reply)
        if not speech.text:
            raise ConfigError(f"nothing in the reply can be said: {reply.reply[:80]!r}", "ask without --speak")
        with contextlib.closing(speaker):
            sound = speaker.say(speech.text, speed)
        write_file_atomic(path, sound.encoded(form))
        return replace(
            reply,
            spoken=SpokenFile(
                str(path),
                text=speech.text,
                seconds=round(sound.seconds, 3),
                voice=speaker.name,
                left_out=speech.left_out,
            ),
        )

    return speak
