"""`sartor ask --speak`: a reply into a file, and what is refused before there is a reply."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import soundfile

import sartor
from sartor.cli import main
from sartor.core.errors import ConfigError
from sartor.serving.commands.ask_types import AskReply
from speaking import needs_espeak, play_espeak

REPLY = AskReply("q", '{"intent": "HassTurnOn", "area": "hall"}', "stop", "home@1.0", "asked by name", [])


@needs_espeak
@pytest.mark.parametrize("name", ["hi.wav", "hi.flac", "hi.mp3", "hi.OPUS", "hi.ogg"])
def test_a_reply_is_spoken_into_a_file(tmp_path: Path, name: str) -> None:
    said = sartor.speaking(tmp_path / name, "espeak:en-gb")(REPLY).as_json()
    assert said["reply"] == REPLY.reply
    assert said["spoken"]["file"] == str(tmp_path / name)
    assert (said["spoken"]["text"], said["spoken"]["voice"]) == ("intent: Hass Turn On.\narea: hall.", "espeak:en-gb")
    assert soundfile.info(tmp_path / name).duration == pytest.approx(said["spoken"]["seconds"], abs=0.15)
    assert 1 < said["spoken"]["seconds"] < 5
    assert {path.name for path in tmp_path.iterdir()} <= {name, "sartor-home"}


def test_what_was_not_spoken_is_no_key_of_the_reply() -> None:
    assert "spoken" not in REPLY.as_json()


@needs_espeak
@pytest.mark.parametrize("name", ["hi", "hi.txt", "hi.pcm", ".wav", "absent/hi.wav", "folder.wav"])
def test_a_file_that_cannot_be_is_refused_at_once(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.wav").mkdir()
    with pytest.raises(ConfigError):
        sartor.speaking(tmp_path / name)
    with pytest.raises(ConfigError):
        sartor.speaking(tmp_path / "hi.wav", "nobody")


@needs_espeak
def test_a_reply_without_words_is_an_error_that_shows_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="👍"):
        sartor.speaking(tmp_path / "hi.wav")(AskReply("q", "👍", "stop", "a", "r", []))
    assert not (tmp_path / "hi.wav").exists()


def test_a_voice_that_fails_leaves_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play_espeak(tmp_path, "exit 1", monkeypatch)
    (tmp_path / "hi.wav").write_text("before")
    with pytest.raises(sartor.SartorError):
        sartor.speaking(tmp_path / "hi.wav")(REPLY)
    assert (tmp_path / "hi.wav").read_text() == "before"


@needs_espeak
@pytest.mark.parametrize("is_team", [False, True])
def test_both_forms_of_ask_speak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_team: bool
) -> None:
    asked: list[str] = []

    def answer(verb: str) -> Any:
        return lambda *args, **options: asked.append(verb) or REPLY

    monkeypatch.setitem(vars(sartor), "ask", answer("ask"))
    monkeypatch.setitem(vars(sartor), "ask_team", answer("ask_team"))
    place = tmp_path / "team.yaml"
    if is_team:
        place.touch()
    command = ["ask", str(place), "q", "--speak", str(tmp_path / "hi.wav"), "--voice", "espeak:de", "--json"]
    with pytest.raises(SystemExit) as ended:
        main(command)
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (ended.value.code, asked) == (0, ["ask_team" if is_team else "ask"])
    assert (said["spoken"]["voice"], said["spoken"]["file"]) == ("espeak:de", str(tmp_path / "hi.wav"))
    with pytest.raises(SystemExit) as ended:
        main([*command[:-3], "--voice", "nobody", "--json"])
    error = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert (ended.value.code, error["kind"], len(asked)) == (2, "ConfigError", 1)
