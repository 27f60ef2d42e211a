"""Faults of a built site: links that lead nowhere, and what a page would fetch from another host.

python tools/site_check.py site
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# tag -> attributes that a browser fetches as it shows the page; an `a` is followed by its reader alone
FETCHED = {
    "script": ("src",),
    "link": ("href",),
    "img": ("src", "srcset"),
    "source": ("src", "srcset"),
    "iframe": ("src",),
    "video": ("src", "poster"),
    "audio": ("src",),
    "object": ("data",),
    "embed": ("src",),
    "use": ("href", "xlink:href"),
    "image": ("href", "xlink:href"),
}
# `link` elements that name an address and fetch nothing
NAMING = {"canonical", "next", "prev", "alternate"}
FOREIGN = re.compile(r"^(?:[a-z][a-z0-9+.-]*:)?//", re.IGNORECASE)
STYLE_ADDRESS = re.compile(r"""(?:url\(|@import\s+)\s*["']?((?:https?:)?//[^"')\s]+)""", re.IGNORECASE)
# elements whose presence makes the theme's script load another script from a network of mirrors
DRAWN_BY_NETWORK = ("mermaid",)


class Page(HTMLParser):
    """What a page fetches and links to, and the anchors that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.classes: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect the addresses and anchors of one element."""
        values = {name: value or "" for name, value in attrs}
        self.classes |= set(values.get("class", "").split())
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag == "link" and set(values.get("rel", "").split()) & NAMING:
            return
        self.fetched += [values[name] for name in FETCHED.get(tag, ()) if name in values]


def find_faults(site: Path) -> list[str]:
    """Return every fault of a site, one a line."""
    site = site.resolve()
    faults = []
    for file in sorted(site.rglob("*")):
        name = file.relative_to(site).as_posix()
        if file.suffix == ".html":
            faults += [f"{name}: {fault}" for fault in _faults_of_page(file, site)]
        elif file.suffix in (".css", ".svg"):
            addresses = STYLE_ADDRESS.findall(file.read_text(encoding="utf-8"))
            faults += [f"{name}: fetches {address}" for address in addresses]
    return faults


def _faults_of_page(file: Path, site: Path) -> Iterator[str]:
    page = read_page(file)
    for address in page.fetched:
        if FOREIGN.match(address):
            yield f"fetches {address}"
        elif problem := _missing(address, file, site):
            yield f"fetches {problem}"
    for address in STYLE_ADDRESS.findall(file.read_text(encoding="utf-8")):
        yield f"fetches {address}"
    for drawn in DRAWN_BY_NETWORK:
        if drawn in page.classes:
            yield f"has an element of class {drawn}, which the theme draws by a script of another host"
    for address in page.links:
        if problem := _missing(address, file, site):
            yield f"links to {problem}"


@cache
def read_page(file: Path) -> Page:
    """Return a page that was parsed."""
    return Page(file.read_text(encoding="utf-8"))


def _missing(address: str, file: Path, site: Path) -> str:
    """Return an address of the site that leads nowhere; empty if it leads somewhere, or to another host."""
    parts = urlsplit(address)
    if parts.scheme or parts.netloc:
        return ""
    target = (
        file
        if not parts.path
        else (site if parts.path.startswith("/") else file.parent) / unquote(parts.path).lstrip("/")
    )
    target = target.resolve()
    if target.is_dir():
        target /= "index.html"
    if not target.is_file() or not target.is_relative_to(site):
        return address
    if parts.fragment and target.suffix == ".html" and unquote(parts.fragment) not in read_page(target).anchors:
        return f"{address}, which has no such heading"
    return ""


if __name__ == "__main__":
    found = find_faults(Path(sys.argv[1]))
    print("\n".join(found))
    sys.exit(1 if found else 0)
