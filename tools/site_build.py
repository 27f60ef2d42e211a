"""Build the documentation site from docs/, without a network: `make site`.

    python tools/site_build.py             # site/, with its index.html
    python tools/site_build.py --out DIR

Pages are copied to a temporary folder before. What reads well on a code host and not on a site is changed there:
links to files outside of docs/ lead to a copy of the page, or to the repository where `tool.sartor.repository` names
one, or are plain text; lists have the blank lines and the indentation that Python-Markdown asks for. Any warning of
mkdocs and any finding of tools/site_check.py is an error. Needs the extra `docs`.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from markdown_it import MarkdownIt

from site_check import find_faults

ROOT = Path(__file__).resolve().parent.parent
NAVIGATION = ROOT / "docs/nav.yaml"
THEME = ROOT / "tools/site_theme"
MEDIA = {".png", ".svg"}
# pages outside of docs/ that the site has too, and the folder that they get there
OUTSIDE = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "examples/**/README.md")
OUTSIDE_FOLDER = "repository"
LINK = re.compile(
    r"(?P<mark>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]"
    r"\((?!https?:|mailto:|#)(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)"
)
LIST_ITEM = re.compile(r" *(?:[-*+]|\d+[.)]) +(?=\S)")
# weights in the search, 1 for others: what a newcomer reads; what holds nearly every word; what is for developers
SEARCH_WEIGHTS = (
    (re.compile(r"(concepts|guide-|first-specialist|install|offline-install|(serving|recipes|curation)\.)"), 1.5),
    (re.compile(r"(reference/|index|limits|errors|glossary)"), 0.3),
    (re.compile(r"(decisions/|development/|architecture|repository/(?!CONTRIBUTING|SECURITY))"), 0.1),
)
CODE = re.compile(r"`[^`\n]+`")
MARKDOWN = MarkdownIt("commonmark").enable("table")
INDENT = 4  # of what belongs to a list item, in Python-Markdown


class ItemPart(NamedTuple):
    """A line's part in a list item. width: of the item's mark, columns. is_first: whether the item begins there."""

    width: int
    is_first: bool


def site_path(page: Path) -> Path:
    """Return where a file of the repository lies within the site's sources."""
    relative = page.relative_to(ROOT)
    below = relative.relative_to("docs") if relative.parts[0] == "docs" else Path(OUTSIDE_FOLDER) / relative
    return below.with_name("index.md") if below.name == "README.md" else below


def source_pages() -> list[Path]:
    """Return every page of the site: those of docs/, and those that OUTSIDE names."""
    outside = [page for pattern in OUTSIDE for page in sorted(ROOT.glob(pattern))]
    return [*sorted((ROOT / "docs").rglob("*.md")), *outside]


def stage(folder: Path) -> None:
    """Write the site's sources: pages with changed links and lists, pictures, styles and scripts."""
    pages = source_pages()
    known = {page: site_path(page) for page in pages}
    repository = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["sartor"]["repository"]
    for page, target in known.items():
        file = folder / target
        file.parent.mkdir(parents=True, exist_ok=True)
        text = in_python_markdown(page.read_text(encoding="utf-8"))
        text = search_weight(target) + with_links(text, page, known, repository)
        file.write_text(text, encoding="utf-8")
    for media in (path for path in (ROOT / "docs").rglob("*") if path.suffix in MEDIA):
        file = folder / site_path(media)
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(media, file)
    shutil.copytree(THEME, folder / "site")


def search_weight(page: Path) -> str:
    """Return the front matter that weighs a page in the search; empty if it weighs 1."""
    weight = next((weight for pattern, weight in SEARCH_WEIGHTS if pattern.match(page.as_posix())), None)
    return f"---\nsearch:\n  boost: {weight}\n---\n" if weight else ""


def with_links(text: str, page: Path, known: dict[Path, Path], repository: str) -> str:
    """Return a page whose links lead to pages of the site, to the repository, or are plain text."""

    def changed(match: re.Match[str]) -> str:
        target = (page.parent / match["path"]).resolve()
        anchor = match["anchor"] or ""
        text = match["text"]
        if target in known and text == target.name:  # `[install.md](install.md)`: a site has titles in place of files
            text = _title(target)
        is_shown = target.suffix in MEDIA and (match["mark"] or target.is_relative_to(ROOT / "docs"))
        if target in known or is_shown:
            address = os.path.relpath(known.get(target, site_path(target)), known[page].parent)
            return f"{match['mark']}[{text}]({address}{anchor})"
        if not target.exists() or target.is_relative_to(ROOT / "docs"):
            return match[0]  # mkdocs names it
        if repository:
            return f"[{text}]({repository}/blob/main/{target.relative_to(ROOT).as_posix()}{anchor})"
        return text

    code = _code_lines(text)
    parts = groupby(enumerate(text.split("\n")), lambda line: line[0] in code)
    joined = [(is_code, "\n".join(line for _, line in lines)) for is_code, lines in parts]
    return "\n".join(part if is_code else LINK.sub(changed, part) for is_code, part in joined)


@cache
def _title(page: Path) -> str:
    return page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ").replace("`", "")


def _code_lines(text: str) -> set[int]:
    numbers: set[int] = set()
    for token in MARKDOWN.parse(text):
        if token.type in ("fence", "code_block") and token.map:
            numbers |= set(range(*token.map))
    return numbers


def in_python_markdown(text: str) -> str:
    """Return a page of CommonMark as Python-Markdown reads it.

    A list has an empty line before it, and what belongs to an item is indented by four columns. A bar in a table's
    code has no backslash, which would be shown. A block of code has its language and no other word.
    """
    lines = text.split("\n")
    items: list[list[ItemPart]] = [[] for _ in lines]  # of each line: the items that it belongs to, outermost first
    list_starts = set()
    for token in MARKDOWN.parse(text):
        start, end = token.map or (0, 0)
        if token.type == "list_item_open":
            width = _mark_width(lines[start], items[start])
            for number in range(start, end):
                items[number].append(ItemPart(width, number == start))
        elif token.type in ("bullet_list_open", "ordered_list_open") and token.level == 0:
            list_starts.add(start)
        elif token.type == "tr_open":
            lines[start] = CODE.sub(lambda code: code[0].replace("\\|", "|"), lines[start])
        elif token.type == "fence":  # `bash no-run` is for the tests
            lines[start] = lines[start].replace(token.info, token.info.partition(" ")[0])
    written: list[str] = []
    for number, line in enumerate(lines):
        if number in list_starts and written and written[-1].strip():
            written.append("")
        written.append(_indented(line, items[number]))
    return "\n".join(written)


def _mark_width(line: str, parts: Sequence[ItemPart]) -> int:
    """Return the width of an item's mark with the blanks around it, behind the marks of the items around it."""
    for part in parts:
        line = line[part.width :]
    mark = LIST_ITEM.match(line)
    return mark.end() if mark else 0


def _indented(line: str, parts: Sequence[ItemPart]) -> str:
    prefix = ""
    for part in parts:
        blanks = len(line) - len(line.lstrip(" "))
        cut = part.width if part.is_first else min(part.width, blanks)
        prefix += f"{line[:cut].strip()} ".ljust(INDENT)
        line = line[cut:]
    return (prefix + line).rstrip()


def navigation(paths: Sequence[str]) -> list[Any]:
    """Return the navigation, with the pages of the folders that it names.

    paths: the site's pages, as `site_path` gives them.
    """

    def resolved(entry: Any) -> Any:
        if isinstance(entry, list):
            return [resolved(item) for item in entry]
        if isinstance(entry, dict):
            return {title: resolved(value) for title, value in entry.items()}
        path = site_path((NAVIGATION.parent / entry).resolve()).as_posix()
        if not entry.endswith("/"):
            return path
        below = [page for page in paths if page.startswith(f"{path}/")]
        return sorted(below, key=lambda page: (not page.endswith("/index.md"), page))

    return list(resolved(yaml.safe_load(NAVIGATION.read_text(encoding="utf-8"))))


def build(out: Path) -> list[str]:
    """Build the site in `out`, which is replaced; return what is wrong with it, one finding a line.

    Raises SystemExit with the warnings if mkdocs has any.
    """
    with tempfile.TemporaryDirectory() as work:
        sources = Path(work) / "docs"
        stage(sources)
        settings = {
            "INHERIT": str(ROOT / "mkdocs.yml"),
            "docs_dir": str(sources),
            "site_dir": str(out.resolve()),
            "nav": navigation([site_path(page).as_posix() for page in source_pages()]),
        }
        config = Path(work) / "mkdocs.yml"
        config.write_text(yaml.safe_dump(settings, allow_unicode=True), encoding="utf-8")
        command = [sys.executable, "-m", "mkdocs", "--quiet", "build", "--strict", "--clean", "-f", str(config)]
        environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode or done.stderr.strip():
            sys.exit(f"mkdocs warns:\n{done.stdout}{done.stderr}")
    return find_faults(out)


def main(arguments: list[str] | None = None) -> int:
    """Build the site; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "site", help="folder of the site, replaced")
    options = parser.parse_args(arguments)
    faults = build(options.out)
    for fault in faults:
        print(fault, file=sys.stderr)
    if faults:
        return 1
    print(options.out / "index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
