"""A small file cannot take gigabytes: limits by its header and while it is decoded, and the memory of a process that reads it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr

from media_files import ogg_pages, silence, sound, vorbis_packets
from sartor.core.errors import MediaError
from sartor.curate.steps.media_augmentation import AugmentAudio
from sartor.curate.steps.media_filters import listen
from sartor.media import audio

RATE, SECONDS = 16_000, 300.0
MOST_ABOVE_IDLE = 64 << 20

# What a process takes to read a file `times` over, above what it had before; it has read one file, so libraries are loaded.
CHILD = """
import io, json, sys
from pathlib import Path
from sartor.media import audio
from sartor.core.errors import MediaError

def memory(name):
    return next(int(line.split()[1]) << 10 for line in Path("/proc/self/status").read_text().splitlines() if name in line)

file, small, times = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
audio.read_sound(small.read_bytes(), 16_000)
Path("/proc/self/clear_refs").write_text("5")
idle, results = memory("VmRSS"), []
audio.limit_seconds(300.0)
for _ in range(times):
    try:
        results.append(len(audio.read_sound(file.read_bytes(), 16_000)))
    except MediaError as error:
        results.append([error.reason, error.problem, error.remedy])
print(json.dumps({"above": memory("VmHWM") - idle, "results": results}))
"""


def read_apart(content: bytes, folder: Path, times: int = 1) -> dict[str, Any]:
    """What a process of its own made of a file: `results`, and `above`, bytes of memory above idle."""
    (folder / "large").write_bytes(content)
    (folder / "small").write_bytes(sound(1, 8000, "FLAC"))
    command = [sys.executable, "-c", CHILD, str(folder / "large"), str(folder / "small"), str(times)]
    return dict(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))


def wav_of_4_gb() -> bytes:
    """A WAV whose header says 4 GB of eight channels at 384 kHz, and that holds a tenth of a second."""
    content = bytearray(silence(384_000, 0.1, 8, "WAV"))
    size = content.index(b"data") + 4
    content[4:8] = content[size : size + 4] = (0xFFFFFFF0).to_bytes(4, "little")
    return bytes(content)


def flac_that_says(seconds: int) -> bytes:
    """A FLAC of 300 s at 384 kHz whose header says `seconds`."""
    content = bytearray(silence(384_000, 300))
    content[22:26] = (384_000 * seconds).to_bytes(4, "big")
    return bytes(content)


REFUSED = {
    "FLAC at 655,350 Hz": (
        lambda: silence(655_350, 300),
        "unreadable_audio",
        "655350 samples a second; at most 384000",
    ),
    "WAV at 768 kHz": (lambda: silence(768_000, 0.1, form="WAV"), "unreadable_audio", "at most 384000"),
    "WAV at 3 Hz": (
        lambda: silence(3, 299.5, form="WAV"),
        "unreadable_audio",
        "it has 3 samples a second; at least 50",
    ),
    "WAV at 49 Hz": (
        lambda: silence(49, 299.5, form="WAV"),
        "unreadable_audio",
        "it has 49 samples a second; at least 50",
    ),
    "9 channels": (lambda: silence(48_000, 1, 9, "WAV"), "unreadable_audio", "9 channels; at most 8"),
    "8 channels at 96 kHz": (
        lambda: silence(96_000, 300, 8),
        "audio_too_long",
        "230400000 samples or more in 8 channels",
    ),
    "2 channels at 384 kHz": (lambda: silence(384_000, 151, 2), "audio_too_long", "at most 115200000"),
    "301 s": (lambda: silence(48_000, 301), "audio_too_long", "301.0 s or more; at most 300"),
    "Ogg of 400 s": (lambda: silence(8000, 400, 1, "OGG"), "audio_too_long", "400.0 s or more"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bomb_is_refused_within_the_memory_limit(case: str, tmp_path: Path) -> None:
    make, reason, problem = REFUSED[case]
    content = make()
    assert len(content) < 1 << 20 or "kHz" in case
    outcome = read_apart(content, tmp_path)
    [[reason_given, problem_given, remedy]] = outcome["results"]
    assert reason_given == reason and problem in problem_given and "ffmpeg -i" in remedy
    assert outcome["above"] < MOST_ABOVE_IDLE


ACCEPTED = {
    "FLAC of 300 s at 384 kHz": (lambda: silence(384_000, 300), 300),
    "FLAC of 300 s in 8 channels": (lambda: silence(48_000, 300, 8), 300),
    "Ogg of 300 s in stereo": (lambda: silence(48_000, 300, 2, "OGG"), 300),
    "Opus of 100 s": (lambda: silence(48_000, 100, 1, "OGG", "OPUS"), 100),
    "MP3 of 60 s": (lambda: silence(8000, 60, 1, "MP3"), 60),
    "FLAC of 300 s that says 1 s": (lambda: flac_that_says(1), 1),
    "WAV of 300 s at 50 Hz": (lambda: silence(50, 300, form="WAV"), 300),
    "WAV that says 4 GB": (wav_of_4_gb, 0.1),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_recording_at_the_limits_is_read_within_the_memory_limit(case: str, tmp_path: Path) -> None:
    make, seconds = ACCEPTED[case]
    outcome = read_apart(make(), tmp_path)
    assert outcome["results"] == [pytest.approx(seconds * RATE, abs=0.2 * RATE)]
    assert outcome["above"] < MOST_ABOVE_IDLE


def test_sixteen_parts_one_after_the_other_take_no_more_than_one(tmp_path: Path) -> None:
    outcome = read_apart(silence(384_000, 40), tmp_path, times=16)
    assert outcome["results"] == [40 * RATE] * 16
    assert outcome["above"] < MOST_ABOVE_IDLE


def bomb_in_pages_of_one_segment() -> bytes:
    return b"".join(ogg_pages(vorbis_packets(8, 20), cut=1))


def bomb_among_another_stream() -> bytes:
    """Pages of an Opus stream between those of the Vorbis stream."""
    other = ogg_pages([b"OpusHead\1\1" + bytes(9), *[bytes(300)] * 9], serial=2, cut=1)
    pages = ogg_pages(vorbis_packets(1, 20), cut=1)
    return b"".join(page for pair in zip(pages, other, strict=False) for page in pair) + b"".join(pages[len(other) :])


BOMBS = {
    "one codebook of 2**20 entries": (
        lambda: b"".join(ogg_pages(vorbis_packets(1, 20))),
        "1048576 entries in a codebook",
    ),
    "64 codebooks of 2**19": (lambda: b"".join(ogg_pages(vorbis_packets(64, 19))), "524288 entries in a codebook"),
    "255 codebooks of 2**13": (
        lambda: b"".join(ogg_pages(vorbis_packets(255, 13))),
        "entries in its codebooks or more",
    ),
    "split over pages": (bomb_in_pages_of_one_segment, "1048576 entries in a codebook"),
    "multiplexed": (bomb_among_another_stream, "1048576 entries in a codebook"),
    "chained": (
        lambda: sound(form="OGG") + b"".join(ogg_pages(vorbis_packets(1, 20))),
        "1048576 entries in a codebook",
    ),
    "behind an ID3 tag": (lambda: b"ID3\3" + bytes(6) + b"".join(ogg_pages(vorbis_packets(1, 20))), "an ID3 tag"),
    "another checksum": (
        lambda: b"OggS" + bytes(23) + b"".join(ogg_pages(vorbis_packets(1, 20))),
        "at byte 0 is not whole",
    ),
    "cut short": (lambda: sound(form="OGG")[:-9], "is not whole"),
    "something between pages": (lambda: sound(form="OGG") + b"x" + sound(form="OGG"), "there is no Ogg page"),
}


@pytest.mark.parametrize("case", BOMBS)
def test_ogg_that_would_end_the_process_is_refused(case: str, tmp_path: Path) -> None:
    make, problem = BOMBS[case]
    outcome = read_apart(make(), tmp_path)
    [[reason_given, problem_given, _]] = outcome["results"]
    assert reason_given == "unreadable_audio" and problem in problem_given
    assert outcome["above"] < MOST_ABOVE_IDLE


@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (16_000, 2), (44_100, 6), (48_000, 8)])
@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_ogg_of_an_encoder_is_read(rate: int, channels: int, subtype: str, tmp_path: Path) -> None:
    content = silence(48_000 if subtype == "OPUS" else rate, 1, channels, "OGG", subtype)
    (tmp_path / "a.ogg").write_bytes(content + b"TAG" + bytes(125))
    for source in (content, content + b"TAG" + bytes(125), tmp_path / "a.ogg"):
        assert len(audio.read_sound(source, RATE)) == pytest.approx(RATE, abs=10)


class Endless:
    """A recording whose header says one frame and that never ends."""

    samplerate, channels, frames = 1000, 2, 1

    def __init__(self) -> None:
        self.given = 0

    def read(self, size: int, **options: Any) -> Any:
        self.given += size
        return np.zeros((size, 2), np.float32)


def test_samples_are_counted_while_they_are_decoded() -> None:
    endless: Any = Endless()
    with pytest.raises(MediaError, match="more in 2 channels; at most 5000") as caught:
        for _ in audio.blocks(endless, float("inf"), 100, 5000):
            pass
    assert caught.value.reason == "audio_too_long" and endless.given <= 2600
    endless = Endless()
    assert sum(len(block) for block in audio.blocks(endless, 3.0, 100)) == 3100, "one block beyond the limit is seen"


def test_the_process_limit_holds_where_no_other_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(audio._longest, "seconds", audio.MOST_SECONDS)
    content = sound(3, 8000)
    assert len(audio.read_sound(content, 8000)) == 24_000
    audio.limit_seconds(2.0)
    with pytest.raises(MediaError, match=r"3\.0 s or more; at most 2"):
        audio.read_sound(content, 8000)
    assert len(audio.read_sound(content, 8000, 3.0)) == 24_000


@pytest.mark.parametrize("source_rate", [50, 8000, 11_025, 22_050, 44_100, 48_000, 96_000, 192_000, 384_000])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_blocks_make_bit_for_bit_what_one_piece_makes(source_rate: int, channels: int) -> None:
    """Features, and the digests of Datasets that were made before, rest on these samples."""
    frames = max(3, round(2.6 * source_rate))
    samples = np.random.default_rng(0).normal(0, 0.1, (frames, channels)).astype(np.float32)
    content = sounds_file(samples, source_rate)
    mixed = np.concatenate(
        [samples[:source_rate].mean(1, dtype=np.float32), samples[source_rate:].mean(1, dtype=np.float32)]
    )
    at_once = soxr.resample(mixed, source_rate, RATE)
    assert np.array_equal(audio.read_sound(content, RATE), at_once)
    assert np.array_equal(audio.resampled(mixed, source_rate, RATE), at_once)
    assert np.array_equal(audio.read_sound(content, source_rate), mixed)


def test_resampling_in_blocks_equals_one_soxr_call() -> None:
    """Blocks that end inside the signal change no bit, also at fractional source rates."""
    samples = np.random.default_rng(1).normal(0, 0.1, 3 * audio.BLOCK_SAMPLES + 7).astype(np.float32)
    for source_rate in (44_100, 48_000.5, 0.9 * 22_050):
        assert np.array_equal(audio.resampled(samples, source_rate, RATE), soxr.resample(samples, source_rate, RATE))


def sounds_file(samples: Any, rate: int) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format="WAV", subtype="FLOAT")
    return out.getvalue()


@pytest.mark.parametrize("level", [1e30, -1e30, 3e38, 70_000.0])
@pytest.mark.parametrize("channels", [1, 2])
def test_samples_of_which_nothing_finite_can_be_made_are_refused(level: float, channels: int) -> None:
    samples = np.zeros((3 * RATE, channels), np.float32)
    samples[2 * RATE] = level
    with pytest.raises(MediaError, match="where full scale is 1; at most 65536") as caught:
        audio.read_sound(sounds_file(samples, RATE), RATE)
    assert caught.value.reason == "unreadable_audio"


def test_float_samples_at_the_scale_of_integers_are_read() -> None:
    samples = np.random.default_rng(0).integers(-32_768, 32_767, (RATE, 2)).astype(np.float32)
    assert np.array_equal(audio.read_sound(sounds_file(samples, RATE), RATE), samples.mean(1, dtype=np.float32))


def test_curation_refuses_what_serving_refuses(tmp_path: Path) -> None:
    (tmp_path / "rate.flac").write_bytes(silence(655_350, 0.1))
    with pytest.raises(MediaError, match="at most 384000"):
        listen(tmp_path / "rate.flac", 3600)
    (tmp_path / "hour.flac").write_bytes(silence(96_000, 601))
    with pytest.raises(MediaError, match="601.0 s or more; at most 600"):
        AugmentAudio().decoded(tmp_path / "hour.flac")
