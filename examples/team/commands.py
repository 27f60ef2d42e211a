"""Spoken commands of a home and their JSON, as JSONL: `python examples/team/commands.py home.jsonl general.jsonl`.

The first file holds 860 commands sampled from home-assistant-intents (the rows of `sartor demo`, see
`sartor.demo.home_intents`), the second a few rows of general talk, which every agent of this team rehearses so that it
keeps its manners.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from sartor.core import assets
from sartor.demo import home_intents

ROWS = 860


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    """One JSON object a line; the whole file or none."""
    part = file.with_name(f".{file.name}.part")
    part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    part.replace(file)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("python examples/team/commands.py HOME.jsonl GENERAL.jsonl")
    write(Path(sys.argv[2]), home_intents.rehearsal_rows())
    write(Path(sys.argv[1]), home_intents.rows(assets.install("home-intents"))[:ROWS])
