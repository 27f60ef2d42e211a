"""Pages below docs/reference/, written from what the code declares.

    python tools/reference.py            # writes the pages
    python tools/reference.py --check    # exits 1 if a page is not what would be written

A line of a page is changed where it is declared: the help of an option, the docstring of a command or a function, the
field of a request, `VARIABLES` in tools/reference_environment.py. Needs the extras `tune`, `serve` and `federated`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from reference_commands import write_commands
from reference_environment import write_environment
from reference_files import write_federate_files, write_recipes, write_team_file
from reference_http import write_http
from reference_names import write_names

FOLDER = Path(__file__).parent.parent / "docs/reference"
PAGES: dict[str, Callable[[], str]] = {
    "cli.md": write_commands,
    "recipes.md": write_recipes,
    "team-yaml.md": write_team_file,
    "federate-yaml.md": write_federate_files,
    "http.md": write_http,
    "python.md": write_names,
    "environment.md": write_environment,
}


def main(arguments: list[str] | None = None) -> int:
    """Write or check the pages; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare the pages with the code; write nothing")
    options = parser.parse_args(arguments)
    stale = []
    for name, write in PAGES.items():
        page, text = FOLDER / name, write()
        if page.is_file() and page.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if not options.check:
            page.parent.mkdir(parents=True, exist_ok=True)
            page.write_text(text, encoding="utf-8")
    if not options.check:
        return 0
    for name in stale:
        print(f"docs/reference/{name} is not what the code declares: python tools/reference.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
