"""Table of which attacks succeeded on older code: docs/development/attacks.md.

    git worktree add --detach BEFORE COMMIT
    cp -r tests/attacks BEFORE/tests/; cp tests/helpers/fuzz*.py BEFORE/tests/helpers/
    python tools/attack_table.py run BEFORE [FILE...]   # the tests, a file at a time, each at most 300 s
    python tools/attack_table.py write BEFORE           # the page, from what was run

A run leaves JUnit files in BEFORE/attack-results. It rewrites the copied tests so that a name that cannot be imported
is an error only where it is used. A test whose cases are many fails where one of them does. A test that ends in a
name, an attribute or an argument that the older code lacks tests something that did not exist.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
PAGE = Path("docs/development/attacks.md")
LIMIT_S = 300
FAILED, SOUND, NEW, SKIPPED, UNKNOWN = "yes", "no", "new", "skipped", "unknown"
# of a test with several cases the first of these that a case has
ORDER = (FAILED, NEW, UNKNOWN, SOUND, SKIPPED)
MEANINGS = {
    FAILED: "the attack succeeded",
    NEW: "the test cannot run there, since what it tests did not exist",
    SOUND: "the older code held too: the test is a guard",
    SKIPPED: "not run: something that it needs was absent",
    UNKNOWN: f"not run, or no result within {LIMIT_S} s a file",
}
ABSENT = re.compile(
    r"ImportError|ModuleNotFoundError|AttributeError|fixture '\w+' not found|unexpected keyword argument|"
    r"positional arguments? but|missing \d+ required|has no option|unknown key|is no option|no such table|"
    r"examples/tls/"
)
SOFTENED = """\
class _Absent:
    def __init__(self, name):
        self._name = name
    def __getattr__(self, name):
        raise AttributeError(f"{self._name} is absent in the older code")
    def __call__(self, *arguments, **options):
        raise AttributeError(f"{self._name} is absent in the older code")
"""
HEAD = """\
# Attacks on older code

Each test of `tests/attacks` was run on {date} on the code of {commit}:
{subject}.
What fails there is what a mend has closed. `tools/attack_table.py` says how, and wrote this page.

{counts}

"""


def main() -> None:
    """Run the attacks on older code, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "write"))
    parser.add_argument("before", type=Path)
    parser.add_argument("files", nargs="*")
    options = parser.parse_args()
    before = options.before.resolve()
    if options.action == "run":
        run_files(
            before, options.files or [file.name for file in sorted((before / "tests/attacks").glob("test_*.py"))]
        )
    else:
        (ROOT / PAGE).write_text(page_of(before), encoding="utf-8")


def run_files(before: Path, names: list[str]) -> None:
    """Run test files of a worktree on its own code, one after the other."""
    results = before / "attack-results"
    results.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": f"{before / 'src'}:{before}"}
    for name in names:
        file = results / f"{Path(name).stem}.xml"
        file.unlink(missing_ok=True)
        soften(before / "tests/attacks" / name)
        command = [sys.executable, "-m", "pytest", "-q", "-m", "", f"tests/attacks/{name}", f"--junitxml={file}"]
        try:
            subprocess.run(command, cwd=before, env=environment, timeout=LIMIT_S, check=False)
        except subprocess.TimeoutExpired:
            print(f"{name}: no result within {LIMIT_S} s", file=sys.stderr)


def soften(path: Path) -> None:
    """Rewrite the imports of a test file: a name that is absent ends the tests that use it, and not the file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if any(isinstance(node, ast.ClassDef) and node.name == "_Absent" for node in tree.body):
        return
    lines = []
    for node in tree.body:
        if not isinstance(node, ast.ImportFrom) or node.module == "__future__":
            lines.append(ast.unparse(node))
            continue
        for alias in node.names:
            name = alias.asname or alias.name
            imported = ast.unparse(ast.ImportFrom(node.module, [alias], node.level))
            lines.append(f"try:\n    {imported}\nexcept ImportError:\n    {name} = _Absent({name!r})")
        lines.append("")
    # after the docstring and `from __future__`
    begins = next(index for index, line in enumerate(lines) if line.startswith("from __future__")) + 1
    path.write_text("\n".join([*lines[:begins], SOFTENED, *lines[begins:]]), encoding="utf-8")


def page_of(before: Path) -> str:
    """Return the page from the results of a worktree."""
    verdicts = {path: verdicts_of(before, path) for path in sorted((before / "tests/attacks").glob("test_*.py"))}
    log = ["git", "-C", str(before), "log", "-1", "--format=%h%x09%s"]
    commit, subject = subprocess.run(log, capture_output=True, text=True, check=True).stdout.strip().split("\t")
    counted = Counter(verdict for file in verdicts.values() for verdict in file.values())
    counts = "\n".join(
        ["| fails there | tests | meaning |", "|---|---|---|"]
        + [f"| {verdict} | {counted[verdict]} | {MEANINGS[verdict]} |" for verdict in ORDER]
    )
    text = HEAD.format(commit=f"`{commit}`", subject=subject, date=datetime.date.today(), counts=counts)
    for path, file in verdicts.items():
        text += f"\n## {path.name}\n\n| test | fails there |\n|---|---|\n"
        text += "".join(f"| `{test}` | {verdict} |\n" for test, verdict in file.items())
    return text


def verdicts_of(before: Path, path: Path) -> dict[str, str]:
    """Return the verdict of each test function of a file, in its order."""
    names = [node.name for node in ast.walk(ast.parse(path.read_text())) if is_test(node)]
    results = before / "attack-results" / f"{path.stem}.xml"
    if not results.exists():
        return dict.fromkeys(names, UNKNOWN)
    cases: dict[str, list[str]] = {}
    for name, verdict in verdicts_in(results):
        cases.setdefault(name, []).append(verdict)
    if not cases.keys() & set(names):  # the file could not be imported
        return dict.fromkeys(names, NEW)
    return {name: min(cases.get(name, [UNKNOWN]), key=ORDER.index) for name in names}


def is_test(node: ast.AST) -> bool:
    """Return whether a node is a test function."""
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")


def verdicts_in(results: Path) -> Iterator[tuple[str, str]]:
    """Yield each test case of a JUnit file: the function's name, and the verdict."""
    for case in ElementTree.parse(results).getroot().iter("testcase"):
        name = str(case.get("name")).partition("[")[0]
        harms = [*case.findall("failure"), *case.findall("error")]
        if case.find("skipped") is not None:
            yield name, SKIPPED
        elif not harms:
            yield name, SOUND
        else:
            # the last line of pytest that begins with E names what was raised
            raised = [line for line in str(harms[0].text).splitlines() if line.startswith("E ")]
            is_absent = any(ABSENT.search(line) for line in (str(harms[0].get("message")), *raised[:1]))
            yield name, NEW if is_absent else FAILED


if __name__ == "__main__":
    main()
