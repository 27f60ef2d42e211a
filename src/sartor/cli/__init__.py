"""Command line: one command per verb, one exit code per error.

There is no logic here: every command is one call of the public API.

Every command takes `--json`: one JSON object on the last line of stdout; progress and notices always go to stderr.
`-q` hides them; `-v` adds the log of the libraries, and the traceback of an error.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import re
import select
import signal
import sys
import traceback
from collections.abc import Iterable
from typing import Any, NoReturn

from cyclopts import CycloptsError, Group, UnknownOptionError

import sartor
from sartor.cli import correcting, data, edge, federate, personal, review, serving, studio, tracing, tuning
from sartor.cli import data as assets
from sartor.cli import data as validation
from sartor.cli import edge as person
from sartor.cli import serving as agents
from sartor.cli import serving as learning
from sartor.cli.app import AS_JSON, app, notice
from sartor.cli.old_spellings import renew
from sartor.core.errors import ConfigError, GateError, MissingError, SartorError
from sartor.core.filesystem import DISK_FULL
from sartor.core.ipc import error_as_json
from sartor.core.terminal import printable

__all__ = [
    "agents",
    "app",
    "assets",
    "correcting",
    "data",
    "edge",
    "federate",
    "learning",
    "main",
    "person",
    "personal",
    "review",
    "serving",
    "studio",
    "tracing",
    "tuning",
    "validation",
]


# command -> class name of its recipe or file, and a description of that file; the class is loaded only for the help of
# that command, since that takes a while
RECIPES = {
    "curate": ("CurateRecipe", "the recipe"),
    "federate client": ("FederateRecipe", "the recipe"),
    "federate coordinator": ("FederateRecipe", "the recipe"),
    "federate simulate": ("FederateRecipe", "the recipe"),
    "plan": ("Recipe", "the recipe"),
    "release": ("GateFile", "the file that --rules names"),
    "retrain": ("Team", "the team"),
    "serve": ("Team", "the team"),
    "synthesize": ("SynthesizeRecipe", "the recipe"),
    "tune": ("Recipe", "the recipe"),
    "validate": ("ValidateOptions", "the file that --options names"),
}


# heading of `sartor --help` -> an example, and the commands below it, in this order
GROUPS = {
    "Start here": (
        "sartor tailor faq.csv --name faq --fields prompt=Frage,completion=Antwort --licence own",
        ("tailor", "studio", "chat", "ask", "show", "init", "schema", "doctor", "demo", "assets"),
    ),
    "Data": (
        "sartor curate curate.yaml --out data/faq",
        ("curate", "dedup", "rethreshold", "bias", "review", "synthesize", "validate"),
    ),
    "Train": ("sartor tune tune.yaml --out adapters/faq", ("plan", "tune", "track")),
    "Check and release": (
        "sartor release adapters/faq --name faq --version 1.0 --key keys",
        ("evaluate", "keygen", "release", "verify", "export", "inspect", "index", "revoke", "revoke-release"),
    ),
    "Share": ("sartor push data/faq OWNER/faq --private", ("push", "pull")),
    "Trace and fix": (
        "sartor ablate adapters/faq-1.0 --examples ID --prompt P --reply R --out proof",
        ("trace", "ablate", "fix"),
    ),
    "Serve and learn": ("sartor serve team.yaml", ("serve", "agents", "receipt", "retrain", "personal")),
    "Devices": ("sartor edge sync https://updates.example faq --device box-17 --root root.json", ("edge",)),
    "Federation": ("sartor federate simulate federate.yaml --out adapters/shared", ("federate",)),
}


def _group_commands() -> None:
    for index, (title, (example, commands)) in enumerate(GROUPS.items()):
        group = Group(title, help=example, sort_key=index)
        for position, name in enumerate(commands):
            app[name].group, app[name].sort_key = (group,), position


_group_commands()
app.register_install_completion_command(help="Completion by Tab in this user's shell (bash, zsh, fish).")


def _add_options(command: str, *, is_whole: bool) -> None:
    """Append the options of a command's recipe to its help; their texts come from their declarations.

    is_whole: all options; otherwise those at the top level, of short sections, and the choices of a kind.
    """
    recipe, description = RECIPES[command]
    options = list(sartor.options(getattr(sartor, recipe)))
    lines = []
    for name, declared, text in options:
        path = name.split(" ")[0].split(".")
        is_at_the_top = len(path) == 1 or (len(path) == 2 and (path[1] == "kind" or path[0] in _SECTIONS))
        if is_whole or is_at_the_top:
            # options of a file without flags, and of items of a list, have no dashes
            dashes = "" if "[]" in name or command == "release" else "--"
            form = "" if " " in name else f" ({declared})"  # a name with a space is one choice of a `kind`
            lines.append(f"- `{dashes}{name}`{form}: {text}")
    shown = len(lines)
    if command == "curate" and is_whole:  # describe_steps lists the options of each step under its name
        lines = [line for line in lines if not line.startswith("- `steps[].") or line.startswith("- `steps[].kind")]
        lines += ["", *sartor.describe_steps(table=False)]
    if not is_whole:
        lines += ["", f"{shown} of {len(options)} options; `sartor {command} --help-all` has all of them."]
    target = app
    for name in command.split():
        target = target[name]
    target.help_epilogue = "\n".join([f"Options of {description}:", "", *lines, "", app.help_epilogue or ""])


# short sections whose options a first recipe sets
_SECTIONS = ("base", "data", "budget", "optimizer", "split")


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run a command and exit: 0, 2 usage, 3 input, 4 budget, 5 refused, 6 missing, 130/143 signals, 1 a bug."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    as_json = _take(arguments, "--json")
    is_quiet = _take(arguments, "--quiet", "-q")
    is_verbose = _take(arguments, "--verbose", "-v")
    AS_JSON.set(as_json)
    signal.signal(signal.SIGTERM, _terminate)
    if is_verbose:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    try:
        with contextlib.redirect_stderr(_Nowhere()) if is_quiet else contextlib.nullcontext():
            arguments = renew(arguments, notice) if arguments else []
            if {"--help", "-h", "--help-all"} & set(arguments):
                _help(arguments)
            result = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
        _show(result, as_json)
    except SartorError as error:
        if is_verbose:
            traceback.print_exc()
        _fail(error, as_json)
    except CycloptsError as error:
        _fail(_usage_error(error, arguments), as_json)
    except KeyboardInterrupt:
        print("\ninterrupted; the artefact in work was not written", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        if not _is_reader_gone():
            raise
        _leave_stdout()
    except OSError as error:
        if error.errno not in DISK_FULL and not (error.errno in _BAD_PATH and error.filename):
            raise
        if is_verbose:
            traceback.print_exc()
        _fail(_disk_error(error), as_json)
    raise SystemExit(0)


def _take(arguments: list[str], *names: str) -> bool:
    """Remove a flag that every command has from the arguments; return whether it was given.

    Arguments after `--` are not flags.
    """
    end = arguments.index("--") if "--" in arguments else len(arguments)
    rest = [argument for argument in arguments[:end] if argument not in names]
    is_given = len(rest) < end
    arguments[:end] = rest
    return is_given


class _Nowhere(io.TextIOBase):
    """Text stream that discards its input."""

    def write(self, text: str) -> int:
        return len(text)


def _help(arguments: list[str]) -> NoReturn:
    """Print a command's help and exit. A closed pipe (`| head`) is not an error."""
    from rich.console import Console

    class PatientConsole(Console):
        def on_broken_pipe(self) -> None:
            _leave_stdout()
            raise SystemExit(0)

    for command in (" ".join(arguments[:2]), " ".join(arguments[:1])):  # of two words, or of one
        if command in RECIPES:
            _add_options(command, is_whole="--help-all" in arguments)
            break
    arguments = ["--help" if argument == "--help-all" else argument for argument in arguments]
    app(arguments, console=PatientConsole(), exit_on_error=False, print_error=False, result_action="return_value")
    raise SystemExit(0)


def _usage_error(error: CycloptsError, arguments: list[str]) -> ConfigError:
    """Return the error for a command line that Cyclopts refused.

    Cyclopts names a positional argument by a flag that users do not type; here it has its own name.
    """
    words, command = ["sartor"], app
    for argument in arguments:
        if argument.startswith("-") or argument not in command:
            break
        words.append(argument)
        command = command[argument]
    text = str(error).strip() or "the command line is wrong"
    missing = _MISSING.fullmatch(text)
    if missing and f"--{missing['parameter']}" not in arguments:
        is_flag = error.argument is not None and error.argument.field_info.is_keyword_only
        flag = f"--{missing['parameter']} " if is_flag else ""
        problem = f"`sartor {missing['command']}` needs {flag}{missing['parameter'].upper()}"
    else:
        problem = text.partition(" Available commands:")[0]  # Cyclopts lists only the first eight commands
    if isinstance(error, UnknownOptionError) and _is_of_recipe(error, " ".join(words[1:])):
        flag = _flag_of(error)
        file = next(argument.name for argument in error.argument_collection if not argument.field_info.is_keyword_only)
        file = file.lstrip("-").upper()
        remedy = f"{' '.join(words)} {file} {flag} VALUE"
        if file == "RECIPE":
            remedy += "; sartor init DATA writes recipes"
        return ConfigError(f"{flag} stands before {file}; flags of options stand behind it", remedy)
    return ConfigError(problem, f"{' '.join(words)} --help")


def _is_of_recipe(error: UnknownOptionError, command: str) -> bool:
    """Return whether a flag that stands before the recipe, or without one, is an option of it."""
    if command not in RECIPES or command == "release":  # which takes no such flags
        return False
    option = re.split(r"[.\[]", _flag_of(error).removeprefix("--"))[0].replace("-", "_")
    options = sartor.options(getattr(sartor, RECIPES[command][0]))
    return option in {re.split(r"[.\[ ]", name)[0] for name, _, _ in options}


def _flag_of(error: UnknownOptionError) -> str:
    return (error.token.keyword or error.token.value).partition("=")[0]


_MISSING = re.compile(r'Command "(?P<command>[^"]+)" parameter --(?P<parameter>[\w-]+) requires an argument\.')


# errors of an operating system that say something of a path, and nothing of Sartor
_BAD_PATH = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)


def _disk_error(error: OSError) -> SartorError:
    """Return the error for a disk that is full, or a path that cannot be used."""
    path = error.filename or "a file"
    if error.errno in DISK_FULL:
        return MissingError(
            f"the disk is full: {path} could not be written", "free some space, then repeat the command"
        )
    return ConfigError(f"{path} cannot be used: {error.strerror}", "another path, or give this user the right to it")


def _terminate(signal_number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + signal_number)


def _show(result: Any, as_json: bool) -> None:
    if result is None:  # --help and --version have printed their output
        _print([])
        return
    payload = result if isinstance(result, dict) else result.as_json()
    if as_json:
        _print([printable(json.dumps(payload, ensure_ascii=False))])
        return
    if hasattr(result, "draw") and sys.stdout.isatty():
        from rich.console import Console

        result.draw(Console())
        return
    # what there is none of, as the receipt of a local reply, is in the JSON alone
    present = [(key, value) for key, value in payload.items() if value is not None]
    rows = result.table() if hasattr(result, "table") else present
    width = max((len(name) for name, _ in rows), default=0)
    lines: list[str] = []
    for name, value in rows:
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            lines += [name, *_table(value)]
        else:
            lines += [f"{'' if index else name:{width}}  {line}" for index, line in enumerate(_lines(value))]
    _print(lines)


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """Return rows as lines, with one column per key.

    A terminal folds long cells; a pipe gets every row in one line.
    """
    from rich.console import Console
    from rich.table import Table

    columns = list(dict.fromkeys(key for row in rows for key in row))
    is_terminal = sys.stdout.isatty()
    table = Table(*columns, box=None, pad_edge=False, header_style="underline")
    for column in table.columns:
        column.no_wrap = not is_terminal
    for row in rows:
        table.add_row(*(" ".join(_lines(row.get(column, ""))) for column in columns))
    console = Console(width=None if is_terminal else _PIPE_COLUMNS, markup=False, emoji=False, highlight=False)
    with console.capture() as capture:
        console.print(table)
    return [f"  {line.rstrip()}" for line in capture.get().splitlines()]


_PIPE_COLUMNS = 100_000


def _print(lines: Iterable[str]) -> None:
    """Print lines to stdout. A closed pipe (`| head`) is not an error: the command has done its work."""
    try:
        for line in lines:
            print(line)
        sys.stdout.flush()
    except BrokenPipeError:
        _leave_stdout()


def _is_reader_gone() -> bool:
    """Return whether the broken pipe is stdout, and not a pipe of the command itself."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # poll reports errors for any event mask
    return bool(poll.poll(0))


def _leave_stdout() -> None:
    """Redirect stdout to the null device, so that Python does not fail when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _lines(value: Any) -> list[str]:
    """Return a value as readable lines: one line per item of a list."""
    if isinstance(value, list):
        return [", ".join(_lines(item)) for item in value] or ["none"]
    if isinstance(value, dict):
        return [", ".join(f"{key} {' '.join(_lines(inner))}" for key, inner in value.items()) or "none"]
    if isinstance(value, bool):
        return ["yes" if value else "no"]
    return [f"{value:.4g}" if isinstance(value, float) else printable(str(value))]


def _fail(error: SartorError, as_json: bool) -> NoReturn:
    if as_json:
        gate = {"gate": dict(error.gate)} if isinstance(error, GateError) and error.gate else {}
        print(printable(json.dumps({"error": error_as_json(error), **gate}, ensure_ascii=False)))
    else:
        print(printable(f"{error.kind}: {error.problem}\n  try: {error.remedy}"), file=sys.stderr)
    raise SystemExit(error.exit_code)
