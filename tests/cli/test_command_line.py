"""What every command has: -q, -v, short and long help, old spellings of flags, tables, closed pipes, completion."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sartor.cli import GROUPS, _fail, _show, _table, app, main
from sartor.cli.app import prompt_of
from sartor.cli.old_spellings import _RENAMED, renew
from sartor.core import signing
from sartor.core.errors import GateError

RECIPE = "base: starter\ndata: {path: nowhere}\n"


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)


def flags_of(command: str) -> set[str]:
    target = app
    for name in command.split():
        target = target[name]
    return {name for argument in target.assemble_argument_collection() for name in argument.names}


@pytest.mark.parametrize("command", _RENAMED)
def test_renamed_flag_is_there_by_its_new_name_alone(command: str) -> None:
    commands = (
        [command] if command != "agents" else ["agents promote", "agents remove", "agents repair", "agents rollback"]
    )
    for name in commands:
        for old, new in _RENAMED[command].items():
            flags = flags_of(name)
            assert new in flags, f"{name} has no {new}"
            assert old not in flags or (name, old) == ("export", "--key")


def test_old_spellings_work_with_a_notice(tmp_path: Path) -> None:
    lines: list[str] = []
    assert renew(["verify", "R", "--key", "k.pub"], lines.append) == ["verify", "R", "--public-key", "k.pub"]
    assert renew(["agents", "remove", "faq", "--why=old"], lines.append) == ["agents", "remove", "faq", "--reason=old"]
    assert lines == ["--key is called --public-key now", "--why is called --reason now"]
    assert renew(["release", "A", "--key", "keys"], pytest.fail) == ["release", "A", "--key", "keys"]
    signing.keygen(tmp_path / "keys")
    public = str(tmp_path / "keys" / "sartor.pub")
    assert renew(["export", "R", "--key", public], lines.append)[2] == "--public-key"
    assert renew(["export", "R", "--key", str(tmp_path / "keys")], pytest.fail)[2] == "--key"
    assert renew(["export", "R", "--sign", "keys"], lines.append)[2] == "--key"


def test_every_command_stands_in_one_group() -> None:
    grouped = [name for _, commands in GROUPS.values() for name in commands]
    assert len(grouped) == len(set(grouped))
    assert {name for name in app if not name.startswith("-")} == set(grouped)


def test_quiet_leaves_notices_out_and_says_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", str(tmp_path), "--key", "k", "-q") == 3
    error = capsys.readouterr().err
    assert "is called" not in error and error.startswith("ArtifactError")
    assert run("verify", str(tmp_path), "--key", "k") == 3
    assert capsys.readouterr().err.startswith("--key is called --public-key now")


def test_nobody_is_asked_who_would_not_see_the_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With -q, or `2> log`: the command would wait for an answer without a word."""
    asked: list[object] = []
    monkeypatch.setattr("sartor.tailor", lambda *_, ask, **__: asked.append(ask) or {"made": True})
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for flags in ([], ["-q"]):
        assert run("tailor", "rows.csv", "--name", "faq", *flags) == 0
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    assert run("tailor", "rows.csv", "--name", "faq") == 0
    assert [ask is None for ask in asked] == [False, True, True]


def test_verbose_says_where_an_error_came_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", str(tmp_path), "-v") == 3
    assert "Traceback" in capsys.readouterr().err
    assert run("verify", str(tmp_path)) == 3
    assert "Traceback" not in capsys.readouterr().err


def test_flags_of_every_command_are_no_flags_behind_two_dashes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("ask", "nowhere", "--", "-q") == 3
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--trials", "--halving"])
def test_flags_of_a_sweep_alone_are_not_ignored(flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    assert run("tune", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "a"), flag, "4") == 2
    assert f"{flag} belongs to --sweep" in capsys.readouterr().err


def test_help_is_short_and_help_all_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("tune", "--help") == 0
    short = capsys.readouterr().out
    assert run("tune", "--help-all") == 0
    whole = capsys.readouterr().out
    assert "--json" in short and "--help-all" in short and "objective.kind dpo" in " ".join(short.split())
    assert "--compute.micro_batch_tokens" in whole and "--compute.micro_batch_tokens" not in short
    assert len(short.splitlines()) < 0.7 * len(whole.splitlines())


def test_reader_who_goes_is_no_error() -> None:
    """`sartor tune --help | head -1`; and so a table."""
    for arguments in (["tune", "--help-all"], ["assets", "list"]):
        command = [sys.executable, "-c", "from sartor.cli import main; main()", *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stderr is not None
            process.stdout.close()
            assert (process.wait(60), process.stderr.read()) == (0, b"")


def test_reader_who_goes_ends_what_a_command_writes_itself() -> None:
    """`sartor inspect X --summary | head -1`, `sartor chat X | head -1`: more than a buffer, and less."""
    for count in (1, 100_000):
        code = f"import sartor, sartor.cli as cli\nsartor.chat = lambda *_, **__: print('x' * {count})\ncli.main()"
        command = [sys.executable, "-c", code, "chat", "starter"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stderr is not None
            process.stdout.close()
            assert (process.wait(60), process.stderr.read()) == (0, b"")


@pytest.mark.parametrize(
    ("code", "name", "exit_code", "says"),
    [
        (errno.ENOSPC, "out/model", 6, "the disk is full: out/model could not be written"),
        (errno.ENOSPC, None, 6, "the disk is full: a file could not be written"),
        (errno.EROFS, "/media/out", 2, "/media/out cannot be used: Read-only file system"),
        (errno.ENOTDIR, "rows.jsonl/out", 2, "rows.jsonl/out cannot be used: Not a directory"),
        (errno.EACCES, None, None, ""),  # of a socket or a process: nobody knows which path would help
        (errno.ENOENT, "lost", None, ""),
    ],
)
def test_disk_that_takes_no_file_is_no_traceback(
    code: int,
    name: str | None,
    exit_code: int | None,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code), name)

    monkeypatch.setattr("sartor.keygen", fail)
    with pytest.raises(SystemExit if exit_code else OSError) as ended:
        main(["keygen", "keys"])
    if isinstance(ended.value, SystemExit):
        assert ended.value.code == exit_code
    assert says in capsys.readouterr().err


def test_ctrl_c_in_a_conversation_speaks_of_no_artefact(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sartor.chat", interrupted)
    assert run("chat", "starter") == 130
    assert capsys.readouterr().err == ""


def test_cells_of_a_table_are_as_they_were() -> None:
    assert "a:id:b" in _table([{"name": "a:id:b"}])[1], "no emoji"


def test_missing_positional_argument_error_names_its_metavar(capsys: pytest.CaptureFixture[str]) -> None:
    """`sartor tune` without a recipe exits with 2 and says that it needs RECIPE."""
    assert run("tune") == 2
    assert "`sartor tune` needs RECIPE" in capsys.readouterr().err


def test_table_in_place_of_a_recipe_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "faq.csv").write_bytes("Größe;ja".encode("cp1252"))
    assert run("curate", str(tmp_path / "faq.csv"), "--out", str(tmp_path / "data")) == 2
    assert f"sartor init {tmp_path / 'faq.csv'}" in capsys.readouterr().err


def test_missing_flag_error_names_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("tailor", "rows.csv") == 2
    assert "`sartor tailor` needs --name NAME" in capsys.readouterr().err


def test_rows_are_a_table_and_a_pipe_gets_whole_lines() -> None:
    rows = [{"name": "a", "what": "x" * 300}, {"name": "longer", "kept": 3}]
    lines = _table(rows)
    assert lines[0].split() == ["name", "what", "kept"] and len(lines) == 3 and "x" * 300 in lines[1]
    assert lines[2].split() == ["longer", "3"]


def test_what_there_is_none_of_is_in_the_json_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """As the receipt of a local reply."""
    for as_json, shown in ((False, "reply  yes\n"), (True, '{"reply": "yes", "receipt": null}\n')):
        _show({"reply": "yes", "receipt": None}, as_json)
        assert capsys.readouterr().out == shown


def test_prompt_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "q.txt").write_text("Hello?")
    assert run("ask", "nowhere", "a prompt", "--prompt-file", str(tmp_path / "q.txt")) == 2
    assert "exclude each other" in capsys.readouterr().err
    assert run("ask", "nowhere", "--prompt-file", str(tmp_path / "none.txt")) == 2
    assert "cannot be read as text" in capsys.readouterr().err
    assert run("ask", str(tmp_path), "--prompt-file", str(tmp_path / "q.txt")) == 3
    (tmp_path / "q.txt").write_bytes(b"\xef\xbb\xbfHello?")
    assert prompt_of("", tmp_path / "q.txt") == "Hello?", "as Notepad saves it"


def test_secret_is_read_from_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[str] = []
    monkeypatch.setattr("sartor.chat", lambda *_, key, **__: keys.append(key))
    monkeypatch.setenv("CHAT_KEY", "secret\r\n")
    assert run("chat", "http://127.0.0.1:9", "--api-key-env", "CHAT_KEY") == 0 and keys == ["secret"]
    monkeypatch.delenv("CHAT_KEY")
    assert run("chat", "http://127.0.0.1:9", "--api-key-env", "CHAT_KEY") == 2
    assert "CHAT_KEY is not set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("shell", "file"),
    [("bash", "completions/sartor"), ("zsh", "completions/_*sartor"), ("fish", "completions/sartor.fish")],
)
def test_completion_is_installed_for_the_users_shell(
    shell: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script completes every command, those below a group and flags; where the shell is here, it reads the script."""
    monkeypatch.setenv("HOME", str(tmp_path))
    # what cyclopts looks at first; without it the parent process counts, here the shell that started pytest
    for name in ("bash", "zsh", "fish"):
        monkeypatch.delenv(f"{name.upper()}_VERSION", raising=False)
    monkeypatch.setenv(f"{shell.upper()}_VERSION", "1")
    assert run("--install-completion") == 0
    capsys.readouterr()
    [script] = tmp_path.rglob(file)
    text = script.read_text()
    words = {"sync", "promote", "simulate", *(name for _, commands in GROUPS.values() for name in commands)}
    assert sorted(word for word in words if not re.search(rf"\b{word}\b", text)) == []
    assert "schemas" in text  # a flag of `init`
    if shutil.which(shell):
        done = subprocess.run([shell, "-n", str(script)], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash here")
def test_a_new_bash_completes_commands_flags_and_choices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shell that reads the user's .bashrc, as a new terminal does, has what `--install-completion` wrote."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", "/bin/bash")
    assert run("--install-completion") == 0
    capsys.readouterr()
    typed = {
        "sartor rel": "release",
        "sartor edge pub": "publish",
        "sartor tune --res": "--resume",
        "sartor show DATA --split ev": "eval",
    }
    lines = [f"source {tmp_path}/.bashrc", "complete -p sartor >/dev/null || exit 1"]
    for line in typed:
        words = line.split()
        lines += [f"COMP_WORDS=({line}) COMP_CWORD={len(words) - 1} COMPREPLY=()", '_sartor; echo "${COMPREPLY[*]}"']
    # not -e: an interactive shell goes on after a command that fails
    command = ["bash", "-c", "\n".join(lines)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == list(typed.values())


def test_refusal_of_the_gate_names_each_check_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    error = GateError("the gate refuses it", "tune again")
    error.gate = {"gain": "cannot tell", "licence": "pass"}
    with pytest.raises(SystemExit) as ended:
        _fail(error, as_json=True)
    said = json.loads(capsys.readouterr().out)
    assert ended.value.code == 5 and said["gate"] == error.gate and said["error"]["kind"] == "GateError"
