"""What recordings take of a real server: its front and its worker, at the limits and beyond them."""

from __future__ import annotations

import io
import json
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile

from composing import Seeing
from media_files import audio_part, silence, sound
from sartor.serving.team_config import MediaLimits
from server_process import serve_command

MOST_ABOVE_IDLE = 64 << 20


@contextmanager
def hearing(folder: Path) -> Iterator[tuple[httpx.Client, list[int]]]:
    """A server of one agent that hears recordings of 300 s, and the processes that it has."""
    made = Seeing(folder)
    made.release("ear", ("audio",), 0)
    lines = [
        f"base: {made.base}",
        f"trust: {made.maker.public}",
        "workers: {count: 1, spare: 0, start_s: 600, hang_s: 300}",
        "speech: {voice: 'off'}",
        "limits: {deadline_s: 500}",
        "agents: [{name: ear, release: ear-1.0}]",
    ]
    (folder / "team.yaml").write_text("\n".join(lines) + "\n")
    command = serve_command()
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=log, text=True)
    with process:
        try:
            assert process.stdout
            line = process.stdout.readline()
            assert line, (folder / "log").read_text()
            tasks = Path(f"/proc/{process.pid}/task").iterdir()
            workers = [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
            with httpx.Client(base_url=json.loads(line)["address"], timeout=600) as client:
                yield client, [process.pid, *workers]
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 143
        finally:
            process.kill()


def memory(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def ask(client: httpx.Client, *contents: tuple[bytes, str]) -> Any:
    parts = [audio_part(content, form) for content, form in contents]
    content = [*parts, {"type": "text", "text": "what colour is the sky"}]
    body = {"model": "ear", "messages": [{"role": "user", "content": content}], "max_tokens": 4}
    return client.post("/v1/chat/completions", json=body)


def above_idle(client: httpx.Client, pids: Sequence[int], *contents: tuple[bytes, str]) -> tuple[Any, list[int]]:
    """The answer, and what each process took beyond what it had."""
    idle = []
    for pid in pids:
        Path(f"/proc/{pid}/clear_refs").write_text("5")
        idle.append(memory(pid, "VmRSS"))
    answer = ask(client, *contents)
    return answer, [memory(pid, "VmHWM") - before for pid, before in zip(pids, idle, strict=True)]


def noise(frames: int) -> bytes:
    """A WAV of so many samples, which no codec could make smaller."""
    samples = np.random.default_rng(0).integers(-3000, 3000, frames).astype(np.int16)
    out = io.BytesIO()
    soundfile.write(out, samples, 48_000, format="WAV", subtype="PCM_16")
    return out.getvalue()


@pytest.mark.services
def test_server_takes_at_most_64_mb_for_recordings(tmp_path: Path) -> None:
    refused = {
        "rate": [(silence(655_350, 300), "flac")],
        "channels": [(silence(48_000, 1, 9, "WAV"), "wav")],
        "samples": [(silence(96_000, 300, 8), "flac")],
        "sixteen": [(silence(655_350, 200), "flac")] * 16,
    }
    at_the_limit = {
        "384 kHz": [(silence(384_000, 300), "flac")],
        "8 channels": [(silence(48_000, 300, 8), "flac")],
        "Ogg": [(silence(48_000, 300, 2, "OGG"), "ogg")],
        "sixteen": [(silence(384_000, 300), "flac")] * 16,
    }
    largest = int(MediaLimits().bytes / 2) - 4096  # samples of two bytes, and a header
    at_the_limit["bytes"] = [(noise(largest), "wav")]
    with hearing(tmp_path) as (client, pids):
        assert len(pids) >= 2
        accepted = ask(client, (sound(2, 384_000, "FLAC"), "flac"))
        assert accepted.status_code == 200, accepted.text
        for name, contents in refused.items():
            answer, above = above_idle(client, pids, *contents)
            error = answer.json()["error"]
            assert answer.status_code == 400 and error["param"].startswith("messages[0].content[0]"), (name, error)
            assert "ffmpeg -i" in error["remedy"] and max(above) < MOST_ABOVE_IDLE, (name, above)
        for name, contents in at_the_limit.items():
            answer, above = above_idle(client, pids, *contents)  # heard, and then too long for the tiny base's context
            assert answer.status_code == 400 and "tokens" in answer.json()["error"]["message"], (name, answer.text)
            assert max(above) < MOST_ABOVE_IDLE, (name, above)
        health = client.get("/health").json()
        assert [worker["restarts"] for worker in health["workers"]] == [0] and health["troubles"] == {}
