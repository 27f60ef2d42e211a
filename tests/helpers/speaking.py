"""What tests of speech share: programs that play espeak-ng and piper, and whether the real ones are here."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import stat
from pathlib import Path

import pytest

needs_espeak = pytest.mark.skipif(
    shutil.which("espeak-ng") is None, reason="no espeak-ng here: apt-get install espeak-ng"
)
needs_piper = pytest.mark.skipif(
    importlib.util.find_spec("piper") is None, reason="no piper here: pip install piper-tts"
)
VOICES = """Pty Language       Age/Gender VoiceName          File                 Other Languages
 2  en-us           --/M      English_(America)  gmw/en-US            (en 3)
"""


def play_espeak(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An espeak-ng that lists one language, and for the rest does what `body` says; it is first on PATH."""
    program = folder / "bin" / "espeak-ng"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\ncase \"$1\" in --voices*) cat <<'END'\n{VOICES}END\nexit;; esac\n{body}\n")
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return program


def play_piper(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package `piper` that does what `body` says with `model` and `folder`; returns a voice's name."""
    package = folder / "packages" / "piper"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    head = "import pathlib, sys, time, wave\ngiven = dict(zip(sys.argv[1::2], sys.argv[2::2]))\nfolder = pathlib.Path(given['--output-dir'])\n"
    (package / "__main__.py").write_text(head + body)
    about = folder / "packages" / "piper_tts-0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: piper-tts\nVersion: 0\n")
    monkeypatch.setenv("PYTHONPATH", str(folder / "packages"))
    monkeypatch.syspath_prepend(str(folder / "packages"))
    voice = folder / "anna.onnx"
    voice.touch()
    Path(f"{voice}.json").write_text(json.dumps({"inference": {"length_scale": 1.5}}))
    return f"piper:{voice}"


# Says its arguments and each line's length in samples
SAYS = """
for number, line in enumerate(sys.stdin):
    file = folder / f"{number}.wav"
    with wave.open(str(file), "wb") as sound:
        sound.setframerate(16000), sound.setsampwidth(2), sound.setnchannels(1)
        sound.writeframes(b"\\1\\0" * len(line.strip()) * round(1000 * float(given["--length-scale"])))
    print(f"INFO:__main__:Wrote {file}", file=sys.stderr, flush=True)
"""
