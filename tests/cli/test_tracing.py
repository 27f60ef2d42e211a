"""Command trace: how its options become those of the verb."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import sartor
from sartor.cli import main


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments of each call of the verb."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def verb(*args: Any, **options: Any) -> dict[str, Any]:
        calls.append((args, options))
        return {"method": "retrieval"}

    monkeypatch.setattr(sartor, "trace", verb, raising=False)
    return calls


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["trace", *map(str, arguments), "--json"])
    return int(ended.value.code or 0)


def test_words_come_from_flags_or_files(tmp_path: Path, given: list[Any]) -> None:
    (tmp_path / "prompt.txt").write_text("two\nlines")
    (tmp_path / "reply.txt").write_text("said\n")
    assert run("faq", "--prompt", "a", "--reply", "b", "--by", "source", "--no-likelihood") == 0
    assert run("faq", "--prompt-file", tmp_path / "prompt.txt", "--reply-file", tmp_path / "reply.txt") == 0
    assert [args for args, _ in given] == [(Path("faq"), "a", "b"), (Path("faq"), "two\nlines", "said")]
    assert (given[0][1]["by"], given[0][1]["likelihood"], given[1][1]["by"]) == ("source", False, None)


def test_turns_come_from_a_file_of_messages(tmp_path: Path, given: list[Any]) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    file = tmp_path / "messages.json"
    for document in (turns, {"model": "faq", "messages": turns}):
        file.write_text(json.dumps(document))
        assert run("faq", "--messages", file, "--reply", "d") == 0
    assert [args[1] for args, _ in given] == [turns, {"model": "faq", "messages": turns}]
    file.write_text("7")
    assert run("faq", "--messages", file, "--reply", "d") == 2
    file.write_text("{")
    assert run("faq", "--messages", file, "--reply", "d") == 2
    assert run("faq", "--messages", tmp_path / "absent.json", "--reply", "d") == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("--prompt", "a", "--messages", "m.json", "--reply", "b"),
        ("--prompt", "a", "--reply", "b", "--reply-file", "r.txt"),
        ("--prompt", "a", "--reply-file", "absent.txt"),
        ("--prompt", "a", "--reply", "b", "--method", "guess"),
    ],
)
def test_options_that_exclude_each_other_are_usage_errors(arguments: tuple[str, ...], given: list[Any]) -> None:
    assert run("faq", *arguments) == 2
    assert given == []
