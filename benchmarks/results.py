"""The last line of every benchmark: one JSON object whose figures were all measured, and what was not measured by
name.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import parts

ROOT = Path(__file__).resolve().parent.parent


def undefined(value: Any, path: str = "") -> Iterator[str]:
    """Yield the paths in a result at which nothing stands: null, NaN or an infinite number."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        yield path or "the result"
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from undefined(inner, f"{path}.{key}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from undefined(inner, f"{path}[{index}]")


def print_result(result: dict[str, Any], *, indent: int | None = None) -> None:
    """Print a result as JSON.

    Exits with 1 if a value of it is null or no number: a figure that is absent is named instead. Exits with UNFINISHED
    after printing if `unfinished` of the result names what the same command will measure in a later call.
    """
    if paths := list(undefined(result)):
        print(json.dumps(result, default=str), file=sys.stderr)
        sys.exit(f"not measured: {', '.join(paths)}")
    print(json.dumps(result, indent=indent, allow_nan=False), flush=True)
    if result.get("unfinished"):
        sys.exit(parts.UNFINISHED)


def run_tests(python: str, file: Path, keyword: str = "") -> dict[str, bool]:
    """Run the tests of a file in a process of its own; return whether each passed. Exits with 1 if none was run.

    keyword: of pytest's `-k`, for some of them.
    """
    # of a process that has imported everything before, pytest cannot rewrite the assertions of plugins' modules
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning", "-k", keyword]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [python, "-m", "pytest", str(file), *options, f"--junitxml={report}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        cases = list(ElementTree.parse(report).iter("testcase")) if report.is_file() else []
    if not cases:
        sys.exit(f"{file.name}: no test was run: {done.stdout[-1000:]}{done.stderr[-1000:]}")
    return {case.attrib["name"]: not list(case) for case in cases}


def last_line(command: Sequence[str], **options: Any) -> dict[str, Any]:
    """Run another process and return the JSON object on the last line that it prints. Exits with 1 if it fails."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace", **options}
    done = subprocess.run(command, check=False, **options)
    try:
        result = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        result = None
    if done.returncode or not isinstance(result, dict):
        sys.exit(f"{' '.join(map(str, command))} failed with {done.returncode}: {(done.stderr or '')[-2000:]}")
    return result
