"""`sartor ask --image --audio`: media go before the question, in their order, and what is wrong with one is said."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

import sartor
from composing import Seeing
from media_files import bomb, data_url, png, sound
from sartor.cli import main
from sartor.core.errors import ConfigError, MediaError, RequestError
from sartor.core.records import Message, Part
from sartor.inference.engine import Sampling
from sartor.inference.generate import generate
from sartor.models.tuned_model import open_tuned
from sartor.serving.commands.ask_types import AskPrompt


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Seeing:
    return Seeing(tmp_path_factory.mktemp("seeing"))


def command(*arguments: Any, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments), "--json"])
    return int(ended.value.code or 0), json.loads(capsys.readouterr().out.splitlines()[-1])


def test_ask_reply_equals_the_models_for_media_in_order(
    made: Seeing, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Image, audio and image precede the question; the reversed order gives another reply."""
    release = made.release("eye")
    files = {"a.png": png(220), "b.wav": sound(), "c.png": png(20)}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    code, said = command(
        "ask",
        release,
        "what colour is the sky",
        "--image",
        tmp_path / "a.png",
        "--audio",
        tmp_path / "b.wav",
        "--image",
        tmp_path / "c.png",
        "--key",
        made.maker.public,
        capsys=capsys,
    )
    assert code == 0 and [media["kind"] for media in said["media"]] == ["image", "audio", "image"]
    base, model = open_tuned(sartor.open(release))
    parts = [
        Part("audio" if name.endswith("wav") else "image", media=data_url(content)) for name, content in files.items()
    ]
    wanted = []
    for order in (parts, parts[::-1]):
        ids = base.chat.prompt_ids([Message("user", (*order, Part("text", "what colour is the sky")))])
        made_ids = generate(model, [ids], stop=base.chat.stops, pad=base.chat.pad, sampling=Sampling(8))[0].ids
        wanted.append(base.chat.decode(made_ids))
    assert said["reply"] == wanted[0] != wanted[1]
    assert said["prompt"] == "what colour is the sky"


def test_invalid_media_of_ask_are_errors_with_a_remedy(
    made: Seeing, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unreadable files, bombs, wrong flags and media that the Release does not read have an exit code."""
    text = made.release("text", kinds=())
    for name, content in {
        "bomb.png": bomb(),
        "zero.png": bomb(0),
        "cut.png": png()[:20],
        "a.txt": b"hi",
        "a.png": png(),
        "a.wav": sound(),
    }.items():
        (tmp_path / name).write_bytes(content)
    for flags, kind, exit_code, problem in (
        (["--image", "absent.png"], "MediaError", 3, "No such file"),
        (["--image", "."], "MediaError", 3, "Is a directory"),
        (["--image", "bomb.png"], "MediaError", 3, "10000000000 pixels"),
        (["--image", "zero.png"], "MediaError", 3, "cannot be read as image"),
        (["--image", "cut.png"], "MediaError", 3, "cannot be read as image"),
        (["--image", "a.wav"], "MediaError", 3, "cannot be read as image"),
        (["--audio", "a.png"], "MediaError", 3, "cannot be read as audio"),
        (["--audio", "a.txt"], "MediaError", 3, "cannot be read as audio"),
        (["--image"], "ConfigError", 2, "requires an argument"),
        (["--image=-", "--audio=-"], "ConfigError", 2, "named twice"),
        (["--image", "a.png"], "RequestError", 3, "text@1.0 reads text, and the question holds image"),
    ):
        named = [str(tmp_path / one) if one[:1] not in ("-", "") else one for one in flags]
        code, said = command("ask", text, "hi", *named, "--key", made.maker.public, capsys=capsys)
        assert (code, said["error"]["kind"]) == (exit_code, kind), said
        assert problem in said["error"]["problem"] and said["error"]["remedy"], said


def test_a_question_may_come_by_standard_input_and_without_words(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stdin:
        buffer = io.BytesIO(png())

    monkeypatch.setattr("sys.stdin", Stdin)
    question = AskPrompt.of("", [("image", "-")])
    assert question.kinds == ("image",) and [part.kind for part in question.message.content] == ["image"]
    question.check(("image",), "eye@1.0")
    with pytest.raises(RequestError, match=r"ear@1.0 reads text, audio, and the question holds image"):
        question.check(("audio",), "ear@1.0")
    with pytest.raises(ConfigError, match="empty"):
        AskPrompt.of("  ").check((), "eye@1.0")
    with pytest.raises(MediaError, match="cannot be read"):
        AskPrompt.of("hi", images=["\0"])
