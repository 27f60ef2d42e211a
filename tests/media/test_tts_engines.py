"""Voices: real espeak-ng and piper where they are, and programs that hang, die or say nothing."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import sartor
from sartor.core.assets import entry
from sartor.core.errors import AssetError, ConfigError, DeadlineError, ExtraError, ModelError, UnavailableError
from sartor.media.speech.audio_encoding import FORMATS, AudioClip, join_clips
from sartor.media.speech.tts_engines import open_voice
from sartor.media.speech.voice import MOST_CHARACTERS, SpeechTerms
from speaking import SAYS, needs_espeak, needs_piper, play_espeak, play_piper

SENTENCE = "Turn on the light in the kitchen, please."


@needs_espeak
@pytest.mark.parametrize("name", ["espeak", "espeak:de", "espeak:en", "espeak:en-us+f3"])
def test_espeak_speaks(name: str) -> None:
    voice = open_voice(name)
    sound = voice.say(SENTENCE)
    assert voice.name == name
    assert (sound.rate, sound.samples.dtype) == (22_050, np.int16)
    assert 1.0 < sound.seconds < 5.0
    assert 0.02 < sound.rms < 0.5
    assert np.array_equal(sound.samples, open_voice(name).say(SENTENCE).samples)


@needs_espeak
def test_a_longer_text_is_longer_and_a_faster_one_shorter() -> None:
    voice = open_voice()
    one, ten = voice.say(SENTENCE), voice.say(SENTENCE * 1 + (" " + SENTENCE) * 19)
    assert 15 < ten.seconds / one.seconds < 22
    assert len(voice.cut((SENTENCE + " ") * 20)) > 1
    slow, fast = (voice.say(SENTENCE, speed).seconds for speed in (0.6, 2.0))
    assert fast < 0.7 * one.seconds < one.seconds < 0.9 * slow


@needs_espeak
@pytest.mark.parametrize(
    "text", ["-w owned.wav", "--version", "<speak><audio src='file:///etc/passwd'/>hi</speak>", "a\x00b", "\ud800 hi"]
)
def test_whatever_the_text_says_is_said(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_voice().say(text).seconds > 0.2
    assert not (tmp_path / "owned.wav").exists()


@needs_espeak
@pytest.mark.parametrize(
    "name",
    [
        "",
        "x",
        "espeak:",
        "espeak:xx",
        "espeak:../en-us",
        "espeak:/etc/passwd",
        "espeak:-w",
        "espeak:en-us+",
        "espeak:en-us+../m1",
        "espeak:gmw/en-US",
        "espeak:en-us+f3\x00",
        "espeak:en-us -w x",
        "espeak:mb/mb-en1",
        "piper",
        "piper:",
        "piper:nobody",
        "piper:../x.onnx",
        "Espeak",
        "espeak-ng",
    ],
)
def test_a_name_that_nobody_has_is_refused(name: str) -> None:
    with pytest.raises(ConfigError) as raised:
        open_voice(name)
    assert raised.value.remedy


@needs_espeak
@pytest.mark.parametrize(
    ("text", "speed"),
    [
        ("", 1.0),
        ("...", 1.0),
        ("\x00\x01", 1.0),
        ("hi", 0.25),
        ("hi", 4.1),
        ("hi", float("nan")),
        ("a " * MOST_CHARACTERS, 1.0),
    ],
)
def test_what_cannot_be_said_is_refused(text: str, speed: float) -> None:
    with pytest.raises(ConfigError):
        open_voice().say(text, speed)


def test_missing_voice_program_error_names_install_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without espeak-ng, a piper voice or the package piper-tts, the error has its install command."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ExtraError, match="apt-get install espeak-ng"):
        open_voice()
    with pytest.raises(AssetError, match="sartor assets install piper-joe"):
        open_voice("piper:joe")
    (tmp_path / "v.onnx").touch()
    monkeypatch.setattr("importlib.metadata.version", _no_package)
    with pytest.raises(ExtraError, match="pip install piper-tts"):
        open_voice(f"piper:{tmp_path}/v.onnx")


def _no_package(name: str) -> str:
    from importlib.metadata import PackageNotFoundError

    raise PackageNotFoundError(name)


def test_a_program_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play_espeak(tmp_path, f"echo $$ > {tmp_path}/pid\nexec sleep 60", monkeypatch)
    began = time.monotonic()
    with pytest.raises(DeadlineError, match=r"3 s"):
        open_voice("espeak", SpeechTerms(patience_s=3.0)).say("hello")
    assert time.monotonic() - began < 50
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize(("body", "how"), [("exit 3", "code 3"), ("kill -9 $$", "signal 9"), ("exit 0", "code 0")])
def test_a_program_that_ends_early_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, how: str
) -> None:
    play_espeak(tmp_path, body, monkeypatch)
    with pytest.raises(UnavailableError, match=how):
        open_voice().say("hello " * 10_000)


def test_who_speaks_in_the_background_lets_others_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play_espeak(tmp_path, "sleep 2; head -c 44 /dev/zero; nice; printf xxxx", monkeypatch)
    own = os.getpriority(os.PRIO_PROCESS, 0)
    said = open_voice("espeak", SpeechTerms(nice=7)).speak("hello", 1.0)
    assert said.samples.tobytes().startswith(str(min(own + 7, 19)).encode())


def test_piper_process_restarts_only_for_another_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts at one speed share a process; another speed or a call after close starts a new one."""
    name = play_piper(
        tmp_path, f"pathlib.Path({str(tmp_path)!r}, 'starts').open('a').write('.')\n" + SAYS, monkeypatch
    )
    voice = open_voice(name)
    assert voice.name == "piper:anna"
    pause = round(0.2 * 16_000)
    assert [len(voice.speak("x" * count, 1.0).samples) for count in (1, 2, 3)] == [
        1500 + pause,
        3000 + pause,
        4500 + pause,
    ]
    assert len(voice.speak("xx", 1.5).samples) == 2000 + pause
    assert (tmp_path / "starts").read_text() == ".."
    voice.close()
    assert len(voice.speak("x", 1.0).samples) == 1500 + pause
    voice.close()
    assert (tmp_path / "starts").read_text() == "..."


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("sys.exit(2)", UnavailableError),
        ("sys.stdin.readline(); sys.exit(2)", UnavailableError),
        ("time.sleep(60)", DeadlineError),
    ],
)
def test_piper_failure_raises_and_next_call_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, error: type[Exception]
) -> None:
    """A piper that exits or hangs fails one call; the next call starts another process."""
    start_s = "sartor.media.speech.tts_engines.START_S"
    monkeypatch.setattr(start_s, 1.0 if error is DeadlineError else 60.0)
    name = play_piper(
        tmp_path, f"if not pathlib.Path({str(tmp_path)!r}, 'well').exists():\n    {body}\n" + SAYS, monkeypatch
    )
    voice = open_voice(name, SpeechTerms(patience_s=0.5))
    with pytest.raises(error):
        voice.say("hello")
    monkeypatch.setattr(start_s, 60.0)
    (tmp_path / "well").touch()
    assert voice.say("hello").seconds > 0.2
    voice.close()


@pytest.mark.parametrize("text", ["", "[]", '{"inference": 3}', '{"inference": {"length_scale": 0}}', "[" * 100_000])
def test_a_piper_voice_without_its_description_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    name = play_piper(tmp_path, SAYS, monkeypatch)
    (tmp_path / "anna.onnx.json").write_text(text)
    with pytest.raises(ModelError, match=r"anna\.onnx\.json"):
        open_voice(name)


def test_threads_take_turns_with_piper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    voice = open_voice(play_piper(tmp_path, SAYS, monkeypatch))
    found: dict[int, int] = {}
    threads = [
        threading.Thread(target=lambda count=count: found.update({count: len(voice.speak("x" * count, 1.0).samples)}))
        for count in range(1, 9)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    voice.close()
    assert found == {count: 1500 * count + 3200 for count in range(1, 9)}


@needs_piper
@pytest.mark.circle
def test_piper_speaks() -> None:
    if not entry("piper-joe").is_installed:
        pytest.skip("sartor assets install piper-joe")
    voice = open_voice("piper:joe")
    sound, again = voice.say(SENTENCE), voice.say(SENTENCE)
    voice.close()
    assert (sound.rate, voice.name) == (22_050, "piper:joe")
    assert 1.0 < sound.seconds < 5.0
    assert 0.02 < sound.rms < 0.5
    assert np.array_equal(sound.samples, again.samples)


@pytest.mark.parametrize("form", FORMATS)
def test_every_form_of_file_holds_the_same_sound(form: str, tmp_path: Path) -> None:
    import soundfile

    tone = AudioClip((8000 * np.sin(np.arange(22_050) * 2 * np.pi * 440 / 22_050)).astype(np.int16), 22_050)
    data = tone.encoded(form)
    if form == "pcm":
        assert len(data) == 2 * 24_000
        return
    (tmp_path / "file").write_bytes(data)
    read, rate = soundfile.read(tmp_path / "file", dtype="int16")
    assert rate == (24_000 if form == "opus" else 22_050)
    assert len(read) / rate == pytest.approx(1.0, abs=0.1)
    assert AudioClip(read, rate).rms == pytest.approx(tone.rms, rel=0.1)
    assert np.argmax(np.abs(np.fft.rfft(read[: rate // 2]))) * 2 == pytest.approx(440, abs=4)
    if form in ("wav", "flac"):
        assert np.array_equal(read, tone.samples)


def test_sounds_are_joined_and_resampled() -> None:
    parts = [AudioClip(np.ones(100, np.int16), 8000), AudioClip(np.zeros(60, np.int16), 8000)]
    assert len(join_clips(parts).samples) == 160
    assert len(join_clips(parts).at(16_000).samples) == 320
    assert parts[0].at(8000) is parts[0]
    assert AudioClip(np.zeros(0, np.int16), 8000).rms == 0


@needs_espeak
def test_many_clips_have_files_by_what_they_say(tmp_path: Path) -> None:
    clips = [sartor.Clip(f"light {number % 5}", voice) for voice in ("espeak", "espeak:de") for number in range(10)]
    told: list[tuple[int, int]] = []
    made = sartor.say_many(clips, tmp_path / "clips", rate=16_000, told=lambda done, of: told.append((done, of)))
    assert [(clip.text, clip.voice) for clip in made] == [(clip.text, clip.voice) for clip in clips]
    assert len({clip.path for clip in made}) == len(list((tmp_path / "clips").iterdir())) == 10
    assert told[-1] == (10, 10)
    before = {clip.path: clip.path.read_bytes() for clip in made if clip.path}
    for path in list(before)[::2]:
        path.unlink()
    again = sartor.say_many(clips, tmp_path / "clips", rate=16_000, threads=1)
    assert {clip.path: clip.path.read_bytes() for clip in again if clip.path} == before
    assert all(0.3 < clip.seconds < 3 for clip in again)
    assert [clip.path for clip in sartor.say_many(clips, tmp_path / "other")] != [clip.path for clip in made]


def test_clips_of_no_form_or_voice_are_refused(tmp_path: Path) -> None:
    for form in ("pcm", "aac", "../wav"):
        with pytest.raises(ConfigError):
            sartor.say_many([sartor.Clip("hi")], tmp_path, form=form)
    with pytest.raises(ConfigError, match="nobody"):
        sartor.say_many([sartor.Clip("hi", "nobody")], tmp_path)
    assert sartor.say_many([], tmp_path) == []
