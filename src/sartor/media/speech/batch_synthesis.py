"""Synthesis of many texts into audio files, for training data."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import soundfile

from sartor.core.errors import ConfigError
from sartor.core.filesystem import write_file_atomic
from sartor.core.records import digest
from sartor.media.speech.audio_encoding import FORMATS
from sartor.media.speech.text_normalization import spoken
from sartor.media.speech.tts_engines import DEFAULT, open_voice
from sartor.media.speech.voice import TtsVoice

# Clips of one voice that are submitted to the threads at once
CLIPS_AT_ONCE = 64


@dataclass(frozen=True)
class Clip:
    """One text to be spoken.

    path, seconds: its file and length, once it has been spoken.
    """

    text: str
    voice: str = DEFAULT
    speed: float = 1.0
    path: Path | None = None
    seconds: float = 0.0


def say_many(
    clips: Iterable[Clip],
    folder: Path | str,
    *,
    form: str = "wav",
    rate: int = 0,
    threads: int = 0,
    told: Callable[[int, int], object] = lambda done, total: None,
) -> list[Clip]:
    """Speak clips into files in `folder`; return them in order with their paths. Existing files are reused.

    Texts are spoken as they stand.
    form: one of wav, flac, mp3, opus. rate: sample rate; 0 for the voice's own. threads: 0 for one per core.
    told: called with the number of finished clips and their total.
    Raises ConfigError, and what `open_voice` and `TtsVoice.say` raise, at the first clip that fails.
    """
    files = [name for name, file_format in FORMATS.items() if file_format.container]
    if form not in files:
        raise ConfigError(f"clips are not written as {form!r}", f"one of {', '.join(files)}")
    requested, output_folder = list(clips), Path(folder)
    output_folder.mkdir(parents=True, exist_ok=True)
    planned = []
    for clip in requested:
        name = digest({"voice": clip.voice, "speed": clip.speed, "rate": rate, "text": clip.text})[:32]
        planned.append(replace(clip, path=output_folder / f"{name}.{form}"))
    clips_by_path: dict[Path | None, Clip] = {}
    # Equal clips are spoken once. They are sorted by speed, since a voice keeps its process while its speed is equal.
    todo = sorted({clip.path: clip for clip in planned}.values(), key=lambda clip: (clip.voice, clip.speed, clip.text))
    with ThreadPoolExecutor(threads or os.cpu_count() or 1, "sartor-voice") as pool:
        for clip in _say_all(todo, pool, form, rate):
            clips_by_path[clip.path] = clip
            told(len(clips_by_path), len(todo))
    return [clips_by_path[clip.path] for clip in planned]


def speak_to_files(texts: Sequence[str], voice: str, speed: float, folder: Path) -> list[Path]:
    """Speak the spoken form of each text into a WAV file; return the paths.

    This is a `SayAll` of synthesize/teacher.py. Raises as `say_many`.
    """
    clips = say_many([Clip(spoken(text).text or text, voice, speed) for text in texts], folder)
    return [clip.path for clip in clips if clip.path]


def _say_all(clips: Sequence[Clip], pool: ThreadPoolExecutor, form: str, rate: int) -> Iterator[Clip]:
    for name, group in groupby(clips, key=lambda clip: clip.voice):
        with closing(open_voice(name)) as voice:
            waiting = list(group)
            for begin in range(0, len(waiting), CLIPS_AT_ONCE):
                yield from pool.map(lambda clip: _say(voice, clip, form, rate), waiting[begin : begin + CLIPS_AT_ONCE])


def _say(voice: TtsVoice, clip: Clip, form: str, rate: int) -> Clip:
    assert clip.path is not None
    if clip.path.is_file():
        return replace(clip, seconds=soundfile.info(clip.path).duration)
    sound = voice.say(clip.text, clip.speed)
    # atomic and durable, because an existing file is reused without a check
    write_file_atomic(clip.path, sound.at(rate or sound.rate).encoded(form))
    return replace(clip, seconds=sound.seconds)
