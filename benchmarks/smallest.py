"""The smallest size of a benchmark: `--small`, which shows that a script runs and measures everything that it
promises.

    with smallest.home(arguments.small, "home-intents"):
        ...

In that block SARTOR_HOME is a temporary folder in which `starter` is a tiny base and the named assets are made-up ones
of the same layout (smallest_assets.py), so nothing is fetched and a run takes seconds. Its figures say nothing of the
real sizes.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import parts

HELPERS = Path(__file__).resolve().parent.parent / "tests" / "helpers"
PYTHON = "SARTOR_BENCH_PYTHON"
HELP = "the smallest size: a tiny base and made-up data, in seconds; shows that everything runs"
# options that decide nothing of a result
NO_RESULT = {"work", "minutes", "json", "write"}
LEFT_OUT = "left out at the smallest size"


def add_argument(
    parser: argparse.ArgumentParser, *aliases: str, has_work: bool = False, selections: Sequence[str] = ()
) -> None:
    """Add `--small` (and other names under which a script has had it), `--work` and `--minutes`.

    When the command line is parsed, the clock of the call starts (parts.py). has_work: whether the script adds
    `--work` itself.
    selections: options that choose among results and change none, so that calls with other values share what is kept.
    """
    parser.add_argument("--small", *aliases, action="store_true", help=HELP)
    if not has_work:
        parser.add_argument("--work", type=Path, help="folder of finished parts, from which the same command goes on")
    parser.add_argument("--minutes", type=float, default=parts.MINUTES, help="end the call after so many")
    parser.parse_args = functools.partial(_parse, parser.parse_args, {*NO_RESULT, *selections})  # type: ignore[assignment]


def _parse(parse: Callable[..., argparse.Namespace], no_result: set[str], *arguments: Any) -> argparse.Namespace:
    """Parse a command line and start the clock of the call."""
    options = parse(*arguments)
    values = {name: value for name, value in vars(options).items() if name not in no_result}
    work = Path(options.work) if options.work else None
    parts.begin(Path(sys.argv[0]).stem, values, work, options.minutes)
    return options


def python() -> str:
    """The Python that the processes of a benchmark run by.

    The tests set SARTOR_BENCH_PYTHON to one that has imported everything before (tests/helpers/warm.py).
    """
    return os.environ.get(PYTHON) or sys.executable


@contextmanager
def home(is_small: bool, *assets: str, layers: int = 2) -> Iterator[None]:
    """Run a block in a home of the smallest size; in the user's own if not `is_small`. layers: of the tiny base."""
    if not is_small:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="sartor-small-") as folder:
        # pip without an index: an asset that is not made up fails at once, and is not fetched
        changed = {"SARTOR_HOME": folder, "PIP_NO_INDEX": "1"}
        before = {name: os.environ.get(name) for name in changed}
        os.environ.update(changed)
        try:
            _write(assets, layers)
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


def write_image_tower(folder: Path) -> Path:
    """Write a CLIP of random weights, which sees a picture in a millisecond; in a block of `home` alone."""
    import tiny_towers

    return tiny_towers.tiny_clip(folder)


def _write(assets: tuple[str, ...], layers: int) -> None:
    if str(HELPERS) not in sys.path:
        sys.path.insert(0, str(HELPERS))
    # only here: at its real size a benchmark needs nothing of tests/
    import smallest_assets

    smallest_assets.write_starter(layers)
    for name in assets:
        smallest_assets.write(name)
