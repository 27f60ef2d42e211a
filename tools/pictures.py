"""Pictures of README.md, made from a real Adapter and its Report: docs/images/report.png and docs/images/chat.svg.

    python tools/pictures.py snips/adapter snips/report "Play the newest album by Radiohead" "Book a table for four
    tonight"

The page is photographed by a headless Chromium, the conversation is that of `sartor chat` with `/compare`. Look at
both before you commit them.
"""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

import sartor

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
WIDTH, HEIGHT, COLUMNS = 1100, 900, 100


def photograph(
    page: str, file: Path, browser: str, *, size: tuple[int, int] = (WIDTH, HEIGHT), settings: Sequence[str] = ()
) -> None:
    """Write the first screen of a page as PNG.

    page: its address. size: width and height of the window, pixels. settings: further flags of the browser.
    """
    with tempfile.TemporaryDirectory() as profile:
        command = [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={profile}",
            f"--window-size={size[0]},{size[1]}",
            f"--screenshot={file}",
            *settings,
            page,
        ]
        subprocess.run(command, check=True, capture_output=True)


def converse(adapter: Path, questions: list[str], file: Path) -> None:
    """A conversation with the base beside the Adapter, as SVG."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), highlight=False)
    console.print(Text(f"$ sartor chat {adapter.name}", style="bold"))

    def typed() -> Iterator[str]:
        for line in ["/compare", *questions, "/why"]:
            console.print(Text(line, style="bold cyan"))
            yield line + "\n"

    sartor.chat(str(adapter), typed(), lambda text: console.print(Text(text), end=""), sampling={"max_tokens": 60})
    # rich names fonts of another site, which a page of ours does not load
    drawn = re.sub(r"\s*@font-face \{.*?\n    \}", "", console.export_svg(title="sartor chat"), flags=re.DOTALL)
    file.write_text(drawn, encoding="utf-8")


def main() -> None:
    """Make both pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("report", type=Path)
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--browser", default="chromium")
    arguments = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    report = (arguments.report / "report.html").resolve().as_uri()
    photograph(report, IMAGES / "report.png", arguments.browser)
    converse(arguments.adapter, arguments.questions, IMAGES / "chat.svg")


if __name__ == "__main__":
    main()
