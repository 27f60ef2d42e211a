"""README's six lines for one's own data, as they stand, from a spreadsheet's CSV to a chat: on the tiny base, as commands."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from doc_blocks import blocks
from own_home import environment_in

pytestmark = pytest.mark.circle
ROOT = Path(__file__).parent.parent
ROWS = [(f"Wie öffne ich das Konto Nummer {number}?", f"Über die App, Menü {number % 5}.") for number in range(300)]
TALK = "Wie öffne ich das Konto Nummer 7?\n/why\n/compare\nUnd Nummer 8?\n/save talk.jsonl\n/quit\n"


def readme_commands() -> list[str]:
    """`sartor` lines of the block that names `tailor`, without their comments."""
    [body] = [body for info, _, body in blocks(ROOT / "README.md") if "sartor tailor" in body]
    return [line.partition("  #")[0].strip() for line in body.splitlines() if line.startswith("sartor ")]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "cp1252"])
def test_a_spreadsheet_becomes_a_chat(
    encoding: str, tmp_path: Path, tiny_base: Path, commands: dict[str, str]
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    lines = ["Frage;Antwort", *(f"{question};{answer}" for question, answer in ROWS)]
    (work / "faq.csv").write_bytes("\r\n".join(lines).encode(encoding))
    environment = environment_in(tmp_path / "home", commands)
    doctor, tailor, chat = readme_commands()

    def run(command: str, typed: str = "") -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=work,
            env=environment,
            input=typed,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    assert "processor" in run(doctor).stdout
    made = run(f"{tailor} --base {tiny_base}")
    assert "plan     time" in made.stderr and "report.html" in made.stdout
    assert ("cp1252" in made.stderr) == (encoding == "cp1252"), "the code page that was found is named"
    said = run(chat, TALK).stdout
    assert "(unreleased)>" in said and "base> " in said and "Konto" in said
    # the tiny base may say so much that a second reply no longer fits its context
    assert '"role": "assistant"' in (work / "talk.jsonl").read_text()
