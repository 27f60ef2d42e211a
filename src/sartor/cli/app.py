"""Cyclopts application and the argument types that commands share."""

from __future__ import annotations

import sys
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

import sartor
from sartor.core.errors import ConfigError
from sartor.core.terminal import printable


def _shown_default(value: object) -> str | None:
    """Return the text of a default in the help; None for an empty default."""
    return None if value is None or value in ("", (), False) else str(value)


app = App(
    # no `--empty-waive` beside `--waive`
    default_parameter=Parameter(negative_iterable=(), show_default=_shown_default),
    name="sartor",
    suppress_keyboard_interrupt=False,  # `main` says what became of the work
    help="Tailor an open model to your own data, and prove what you made.",
    help_epilogue="Every command takes `--json` (one JSON object on the last line of stdout), `-q` (errors and "
    "results alone), "
    "`-v` (what the libraries log too) and `--help-all` (every option of its recipe).",
    version=sartor.__version__,
)

# `--method.rank 8`: options of a recipe, passed on unchanged
Flags = Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]
# words of a person or a model, which may begin with a hyphen, as a list does; a file, which may be `-`
WORDS = Annotated[str, Parameter(allow_leading_hyphen=True)]
FILE_OR_STDIN = Annotated[Path | None, Parameter(allow_leading_hyphen=True)]
REPLACE = Annotated[bool, Parameter(negative="")]


# whether --json was given: for commands that print their result and continue
AS_JSON: ContextVar[bool] = ContextVar("as_json", default=False)


def notice(line: str) -> None:
    """Print a notice to stderr."""
    print(printable(line), file=sys.stderr, flush=True)


def prompt_of(prompt: str, file: Path | None) -> str:
    """Return the typed prompt, or the text of a file (`-` is standard input).

    A file keeps the prompt out of the list of processes. Raises ConfigError if both are given or the file cannot be
    read.
    """
    if file is None:
        return prompt
    if prompt:
        raise ConfigError("a prompt and --prompt-file exclude each other", f"--prompt-file {file}, without a prompt")
    try:
        return sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read as text: {error}", "--prompt-file FILE, in UTF-8") from None
