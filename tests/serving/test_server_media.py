"""A whole server whose agents see and hear beside one that reads: real workers, real towers, OpenAI's client."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

import sartor
from composing import Seeing
from media_files import audio_part, bomb, image_part, noise, png, sound
from sartor.core.errors import ArtifactError
from sartor.inference.engine import PROJECTORS
from server_process import serve_command

TEXT = "what colour is the sky"
PICTURE, OTHER, CLIP = png(220), png(30, 60), sound(0.4)


@contextmanager
def serving(folder: Path, lines: list[str], commands: dict[str, str]) -> Iterator[str]:
    (folder / "team.yaml").write_text("\n".join(lines) + "\n")
    command = serve_command(commands)
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=log, text=True)
    with process:
        try:
            assert process.stdout
            line = process.stdout.readline()
            assert line, (folder / "log").read_text()
            yield json.loads(line)["address"]
            assert "torch" not in Path(f"/proc/{process.pid}/maps").read_text(), "the front process has loaded torch"
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 143
        finally:
            process.kill()


def body(model: str, *parts: Any, **fields: Any) -> dict[str, Any]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 8, **fields}


def text_of(answer: Any) -> str:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def errors_of(client: httpx.Client) -> None:
    """Whatever is wrong with media is the request's fault, streamed or not, and no worker ends by it."""
    cut = image_part(noise()[:2000])  # whole by its header
    for asked, code, problem in (
        (body("eye", cut, TEXT), "invalid_request", "give a whole PNG"),
        (body("eye", cut, TEXT, stream=True), "invalid_request", ""),
        (body("eye", image_part(bomb()), TEXT), "image_bomb", "pixels"),
        (
            body("text", image_part(PICTURE), TEXT),
            "invalid_request",
            "text@1.0 reads text, and the request holds image",
        ),
        (body("base", image_part(PICTURE), TEXT), "invalid_request", "base reads text"),
        (
            body("eye", audio_part(CLIP), TEXT),
            "invalid_request",
            "eye@1.0 reads text, image, and the request holds audio",
        ),
        (body("all", audio_part(sound(120, 8000)), TEXT), "invalid_request", "tokens"),
        (body("gone", image_part(PICTURE), TEXT), "unavailable", "not admitted"),
    ):
        answer = client.post("/v1/chat/completions", json=asked)
        error = answer.json()["error"]
        assert answer.status_code == (503 if code == "unavailable" else 400), answer.text
        assert error["code"] == code and problem in error["message"] and error["remedy"], error
    health = client.get("/health").json()
    assert [worker["restarts"] for worker in health["workers"]] == [0]
    assert set(health["troubles"]) == {"gone"} and PROJECTORS in health["troubles"]["gone"]


def receipts_of(client: httpx.Client, folder: Path) -> None:
    """A receipt holds the picture by its bytes, and the reply is made anew from it."""
    asked = body("eye", image_part(PICTURE), TEXT)
    answer = client.post("/v1/chat/completions", json=asked)
    receipt = client.get(f"/v1/receipts/{answer.headers['x-sartor-receipt']}").json()
    (folder / "receipt.json").write_text(json.dumps(receipt))
    (folder / "asked.json").write_text(json.dumps(asked))
    (folder / "other.json").write_text(json.dumps(body("eye", image_part(OTHER), TEXT)))
    options = {"team": folder / "team.yaml", "reply": text_of(answer)}
    checked = sartor.verify_receipt(folder / "receipt.json", messages=folder / "asked.json", **options).checked
    assert checked["digests"] == "the same: messages, reply" and checked["text"] == "made anew, the same"
    with pytest.raises(ArtifactError, match="the messages of the question is not what"):
        sartor.verify_receipt(folder / "receipt.json", messages=folder / "other.json", **options)


@pytest.mark.services
def test_a_team_with_and_without_towers(tmp_path: Path, commands: dict[str, str]) -> None:
    import openai

    made = Seeing(tmp_path)
    for seed, (name, kinds) in enumerate({"eye": ("image",), "all": ("image", "audio"), "text": ()}.items()):
        made.release(name, kinds, seed)
    made.release("gone", spoil=lambda path: (path / PROJECTORS).write_bytes((path / PROJECTORS).read_bytes()[:-5]))
    lines = [
        f"base: {made.base}",
        f"trust: {made.maker.public}",
        "workers: {count: 1, spare: 0, start_s: 600, hang_s: 300}",
        "speech: {voice: 'off'}",
        "limits: {deadline_s: 500}",
        "agents:",
    ]
    lines += [
        f"  - {{name: {name}, release: {name}-1.0, fallback: [previous]}}" for name in ("eye", "all", "text", "gone")
    ]
    asked = {
        "eye": body("eye", image_part(PICTURE), TEXT),
        "other": body("eye", image_part(OTHER), TEXT),
        "all": body("all", audio_part(CLIP), image_part(PICTURE), TEXT),
        "text": body("text", TEXT),
        "base": body("base", TEXT),
        "plain": body("eye", TEXT),
    }
    with serving(tmp_path, lines, commands) as url, httpx.Client(base_url=url, timeout=600) as client:
        reads = {model["id"]: model["modalities"] for model in client.get("/v1/models").json()["data"]}
        assert reads == {
            "base": ["text"],
            "auto": ["text", "audio", "image"],
            "eye": ["text", "image"],
            "eye@1.0": ["text", "image"],
            "all": ["text", "audio", "image"],
            "all@1.0": ["text", "audio", "image"],
            "text": ["text"],
            "text@1.0": ["text"],
        }
        alone = {name: client.post("/v1/chat/completions", json=one) for name, one in asked.items()}
        said = {name: text_of(answer) for name, answer in alone.items()}
        assert len({said["eye"], said["other"], said["plain"]}) == 3, "the pictures matter"
        tokens = {name: answer.json()["usage"]["prompt_tokens"] for name, answer in alone.items()}
        assert tokens["eye"] - tokens["plain"] == 16 and tokens["all"] - tokens["plain"] == 16 + 3
        with ThreadPoolExecutor(12) as threads:  # one batch: rows that see, hear, read, and the base
            again = threads.map(lambda one: client.post("/v1/chat/completions", json=one), [*asked.values()] * 2)
            assert [text_of(answer) for answer in again] == [*said.values()] * 2
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as official:
            question: Any = asked["all"]["messages"]
            whole = official.chat.completions.create(model="all", messages=question, max_tokens=8)
            assert (whole.model, whole.choices[0].message.content) == ("all@1.0", said["all"])
            stream: Any = official.chat.completions.create(model="all", messages=question, max_tokens=8, stream=True)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == said["all"]
        chosen = client.post("/v1/chat/completions", json=body("auto", audio_part(CLIP)))
        assert (
            chosen.headers["x-sartor-agent"] == "all@1.0" and "alone reads audio" in chosen.headers["x-sartor-reason"]
        )
        errors_of(client)
        receipts_of(client, tmp_path)
    log = (tmp_path / "log").read_text()
    assert "base64" not in log and "Traceback" not in log
