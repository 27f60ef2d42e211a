"""Pictures of the built site at the width of a telephone and of a desktop, light and dark.

    make site && python tools/site_pictures.py pictures

Look at them after a change of the theme, of site.css or of the navigation. Needs Chromium (Debian: chromium).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from PIL import Image

from pictures import photograph

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    "index.html",
    "install.html",
    "first-specialist.html",
    "curation.html",
    "reference/cli.html",
    "reference/team-yaml.html",
    "reference/http.html",
    "development/scoreboard.html",
)
WIDTHS = {390: 1400, 1280: 1100}  # width -> height, pixels
SCHEMES = {"light": 1, "dark": 0}  # Chromium's numbers of prefers-color-scheme
FRAME = """<!doctype html>
<style>body {{ margin: 0 }} iframe {{ border: 0; width: {width}px; height: {height}px }}</style>
<iframe src="{page}"></iframe>
"""


def take(site: Path, folder: Path, browser: str) -> list[Path]:
    """Write a picture of each page at each width in each scheme, and return the files."""
    files = []
    for page in PAGES:
        for width, height in WIDTHS.items():
            for scheme, number in SCHEMES.items():
                file = folder / f"{page.removesuffix('.html').replace('/', '-')}-{width}-{scheme}.png"
                with tempfile.TemporaryDirectory() as work:
                    # a window of a browser has a least width, and a frame in it has none
                    frame = Path(work) / "frame.html"
                    address = (site / page).resolve().as_uri()
                    frame.write_text(FRAME.format(width=width, height=height, page=address), encoding="utf-8")
                    settings = (f"--blink-settings=preferredColorScheme={number}", "--virtual-time-budget=4000")
                    photograph(frame.as_uri(), file, browser, size=(max(width, 500), height), settings=settings)
                with Image.open(file) as picture:
                    picture.crop((0, 0, width, height)).save(file)
                files.append(file)
    return files


def main() -> None:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--site", type=Path, default=ROOT / "site")
    parser.add_argument("--browser", default="chromium")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for file in take(arguments.site, arguments.folder.resolve(), arguments.browser):
        print(file)


if __name__ == "__main__":
    main()
