"""A recording is heard as one channel at the rate that was asked for, whatever it is stored as."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from sartor.core.errors import MediaError
from sartor.media.audio import read_sound

RATE = 16_000


def tone(seconds: float, rate: int, pitch: float = 440, loud: float = 0.5) -> Any:
    return loud * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)


def encoded(samples: Any, rate: int, form: str = "WAV", subtype: str | None = None) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format=form, subtype=subtype)
    return out.getvalue()


def pitch_of(sound: Any, rate: int) -> float:
    spectrum = np.abs(np.fft.rfft(sound * np.hanning(len(sound))))
    return float(np.fft.rfftfreq(len(sound), 1 / rate)[spectrum.argmax()])


@pytest.mark.parametrize("rate", [8000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_any_rate_and_channels_become_one_at_the_rate(rate: int, channels: int) -> None:
    samples = np.repeat(tone(0.5, rate)[:, None], channels, axis=1)
    sound = read_sound(encoded(samples, rate), RATE)
    assert sound.dtype == np.float32 and sound.ndim == 1
    assert len(sound) == pytest.approx(RATE // 2, abs=2)
    assert pitch_of(sound, RATE) == pytest.approx(440, abs=4)
    assert np.abs(sound[1000:-1000]).max() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("form", "subtype"),
    [
        ("WAV", "PCM_U8"),
        ("WAV", "PCM_16"),
        ("WAV", "PCM_24"),
        ("WAV", "PCM_32"),
        ("WAV", "FLOAT"),
        ("WAV", "DOUBLE"),
        ("WAV", "ULAW"),
        ("WAV", "ALAW"),
        ("WAV", "GSM610"),
        ("FLAC", "PCM_16"),
        ("FLAC", "PCM_24"),
        ("OGG", "VORBIS"),
        ("OGG", "OPUS"),
        ("MP3", "MPEG_LAYER_III"),
        ("AIFF", "PCM_16"),
        ("CAF", "ALAC_16"),
        ("AU", "PCM_16"),
        ("W64", "PCM_16"),
    ],
)
def test_what_libsndfile_has_is_heard(form: str, subtype: str, tmp_path: Path) -> None:
    if not soundfile.check_format(form, subtype):
        pytest.skip(f"this libsndfile has no {form} {subtype}")
    rate = 8000 if subtype == "GSM610" else 16_000 if subtype == "OPUS" else 22_050
    content = encoded(tone(1, rate), rate, form, subtype)
    (tmp_path / "recording").write_bytes(content)
    from_bytes, from_file = read_sound(content, RATE), read_sound(tmp_path / "recording", RATE)
    assert np.array_equal(from_bytes, from_file)
    assert len(from_bytes) == pytest.approx(RATE, rel=0.1)  # MP3 and GSM fill up whole frames
    assert pitch_of(from_bytes, RATE) == pytest.approx(440, abs=4)


def test_channels_are_averaged() -> None:
    samples = np.stack([tone(0.2, RATE), np.zeros(RATE // 5)], axis=1)
    sound = read_sound(encoded(samples, RATE, "WAV", "FLOAT"), RATE)
    assert np.allclose(sound, samples.mean(1), atol=1e-6)


def test_a_recording_at_the_rate_itself_needs_no_resampler() -> None:
    code = """import sys
sys.modules["soxr"] = None
from sartor.media.audio import read_sound
print(len(read_sound(sys.stdin.buffer.read(), 16000)))"""
    for rate, said in ((RATE, "1600"), (8000, "ExtraError")):
        content = encoded(tone(0.1, rate), rate)
        done = subprocess.run([sys.executable, "-c", code], input=content, capture_output=True, check=False)
        assert said in (done.stdout if rate == RATE else done.stderr).decode()
    assert "[multimodal]'" in done.stderr.decode()


def numbered(value: float) -> bytes:
    samples = tone(0.1, RATE).astype(np.float32)
    samples[100] = value
    return encoded(samples, RATE, "WAV", "FLOAT")


WHOLE = {
    form: encoded(np.random.default_rng(0).normal(0, 0.1, 40_000), RATE, form)
    for form in ("WAV", "FLAC", "OGG", "MP3")
}
REFUSED = {
    "nothing": b"",
    "text": b"no recording at all",
    "a picture": b"\x89PNG\r\n\x1a\n" + b"\0" * 100,
    "no samples": encoded(np.zeros(0), RATE),
    "not a number": numbered(np.nan),
    "infinite": numbered(np.inf),
    "cut in its header": WHOLE["WAV"][:30],
    **{f"cut {form}": WHOLE[form][: len(WHOLE[form]) // 2] for form in ("FLAC", "OGG", "MP3")},
    "a FLAC of unknown length": WHOLE["FLAC"][:21]
    + bytes([WHOLE["FLAC"][21] & 0xF0])
    + b"\0" * 4
    + WHOLE["FLAC"][26:],
    "one sample at a high rate": encoded(np.zeros(1), 768_000),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_heard_is_refused(case: str, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(REFUSED[case])
    for given in (REFUSED[case], tmp_path / "a.wav"):
        with pytest.raises(MediaError) as found:
            read_sound(given, RATE)
        assert found.value.reason == "unreadable_audio"
        assert found.value.problem and found.value.remedy and str(tmp_path) not in found.value.problem


def test_of_a_cut_wav_what_is_there_is_heard() -> None:
    """Programs that write to a pipe cannot go back and put the length in, so a WAV's header is not believed."""
    assert len(read_sound(WHOLE["WAV"][: len(WHOLE["WAV"]) // 2], RATE)) == pytest.approx(20_000, abs=50)


def test_a_long_recording_is_refused_before_it_is_decoded() -> None:
    content = encoded(tone(3, RATE), RATE)
    with pytest.raises(MediaError, match=r"3\.0 s or more; at most 2") as found:
        read_sound(content, RATE, max_seconds=2)
    assert found.value.reason == "audio_too_long"
    assert len(read_sound(content, RATE, max_seconds=3)) == 3 * RATE
