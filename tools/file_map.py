"""Map of src/sartor, written from the docstrings: docs/development/file-map.md.

    python tools/file_map.py            # writes the page
    python tools/file_map.py --check    # exits 1 if the page is not what would be written

Packages stand level by level, in the order that tests/test_architecture.py holds the imports to. Beside each file is
the first sentence of its module docstring; of a file of another kind the first sentence of the comment at its top.
Files are read and none is imported.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = Path("src/sartor")
LEVELS = Path("tests/test_architecture.py")
PAGE = Path("docs/development/file-map.md")
MAX_SENTENCE = 100
COMMENTS = {".toml": "#", ".yaml": "#", ".cpp": "//", ".h": "//", ".j2": "{#"}
# of files that can hold no comment; one in a style sheet would change the bytes of every page
WORDLESS = {
    "page.css": "Style of every page.",
    "card.css": "Style of a card, on top of every page's.",
    "colours.css": "Colours of plots, in a card and in files of their own.",
    "report.css": "Style of a Report's page, on top of every page's.",
    "py.typed": "Marks the package as typed (PEP 561).",
    "htmx.LICENSE": "Licence of htmx.min.js (0BSD).",
    "htmx.min.js": "htmx, vendored; a test holds its digest.",
    "icon.svg": "Icon of the studio in a browser's tab.",
    "studio.css": "Style of the studio's pages.",
    "studio.js": "What htmx does not do: keys, live plots, scrolling.",
    "general_text.jsonl": "Asset `general-text`: rows on which `loss: kl` holds a model at its base.",
    "small_talk.jsonl": "Asset `small-talk`: rows of general talk for rehearsal.",
}
HEAD = """\
# File map

Every file of `src/sartor`, with the first sentence of its docstring. `python tools/file_map.py` writes this page from
the code, and a test holds it: to change a line, change the docstring. How the parts work together:
[architecture](../architecture.md). Where to look for one thing: [where things are](where-things-are.md).

A package imports packages of lower levels only.
"""


def read_levels(root: Path) -> tuple[tuple[str, ...], ...]:
    """Return the packages of each level, lowest first: the constant ORDER of the architecture test."""
    tree = ast.parse((root / LEVELS).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ORDER":
            levels: tuple[tuple[str, ...], ...] = ast.literal_eval(node.value)
            return levels
    sys.exit(f"{LEVELS} has no constant ORDER: name the packages of each level there, lowest first")


def first_sentence(text: str) -> str:
    """Return the first sentence of the first paragraph, on one line.

    A sentence ends at a full stop, question mark or exclamation mark that white space follows: not within
    `manifest.json`.
    """
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    match = re.match(r".+?[.!?](?=\s|$)", paragraph)
    return match[0] if match else paragraph


def leading_comment(text: str, mark: str) -> str:
    """Return the block of comment lines at the top of a file, without their marks."""
    lines = []
    for line in text.splitlines():
        if not line.startswith(mark):
            break
        lines.append(line.removeprefix(mark).strip())
    return "\n".join(lines)


def describe(path: Path) -> str:
    """Return what a file says of itself in one sentence; "" if it says nothing."""
    if path.suffix in (".py", ".pyi"):
        return first_sentence(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")
    if path.suffix in COMMENTS:
        return first_sentence(leading_comment(path.read_text(encoding="utf-8"), COMMENTS[path.suffix]))
    return WORDLESS.get(path.name, "")


def files_of(source: Path, package: str) -> list[Path]:
    """Return the files of a package, or the one file of a module at the top; a folder's own file stands before the
    others.
    """
    module = source / f"{package}.py"
    if module.is_file():
        return [module]
    files = (path for path in (source / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return sorted(files, key=lambda path: (path.parent.parts, path.name != "__init__.py", path.name))


def write_rows(source: Path, files: list[Path]) -> Iterator[str]:
    """Yield the lines of a table of files."""
    yield "| file | content |"
    yield "|---|---|"
    for path in files:
        name = path.relative_to(source).as_posix()
        text = describe(path).replace("|", "\\|")
        yield f"| [`{name}`](../../{SOURCE.as_posix()}/{name}) | {text} |"


def write_page(root: Path) -> str:
    """Return the page of a checkout."""
    source = root / SOURCE
    lines = [HEAD]
    levels = read_levels(root)
    for level, packages in enumerate(levels, start=1):
        for package in packages:
            if files := files_of(source, package):
                title = f"`{package}`" if files[0].parent != source else f"`{package}.py`"
                lines += [f"## Level {level}: {title}", "", *write_rows(source, files), ""]
    in_levels = {path for packages in levels for package in packages for path in files_of(source, package)}
    others = [path for path in sorted(source.iterdir()) if path.is_file() and path not in in_levels]
    if others:
        lines += ["## Data beside the packages", "", *write_rows(source, others), ""]
    return "\n".join(lines).rstrip() + "\n"


def find_faults(root: Path) -> list[str]:
    """Return the Python files whose docstring has no first sentence, or one of more than MAX_SENTENCE characters."""
    faults = []
    for path in sorted((root / SOURCE).rglob("*.py")):
        text = describe(path)
        if not text:
            faults.append(f"{path.relative_to(root)} has no docstring: give it one that begins with a noun phrase")
        elif len(text) > MAX_SENTENCE:
            faults.append(
                f"{path.relative_to(root)}: a first sentence of {len(text)} characters; shorten it to {MAX_SENTENCE}"
            )
    return faults


def main(arguments: list[str] | None = None) -> int:
    """Write or check the page; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare the page with the code; write nothing")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout (this one by default)")
    options = parser.parse_args(arguments)
    faults = find_faults(options.root)
    for fault in faults:
        print(fault, file=sys.stderr)
    page, text = options.root / PAGE, write_page(options.root)
    if not options.check:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(text, encoding="utf-8")
        return 1 if faults else 0
    if not page.is_file() or page.read_text(encoding="utf-8") != text:
        print(f"{PAGE} is not what the docstrings say: run python tools/file_map.py", file=sys.stderr)
        return 1
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
