"""Fenced blocks of pages: how they are found, and which of them run."""

from __future__ import annotations

import re
from pathlib import Path

BLOCK = re.compile(
    r"(?:<!-- file: (?P<file>\S+) -->\s*\n)?^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```\s*$", re.DOTALL | re.MULTILINE
)

RUN = ("python", "bash", "sh")


def blocks(page: Path) -> list[tuple[str, str, str]]:
    text = page.read_text(encoding="utf-8")
    return [(match["info"].strip(), match["file"] or "", match["body"]) for match in BLOCK.finditer(text)]
