"""Questions on building in Sweden, answered with the cited source: `python examples/team/cited.py construction.jsonl`.

Of the asset `construction-faq`, in English and in Swedish. Each entry is asked as it is, and one in three as a
briefing too: its passage among two others, each under its source, out of which answer and source are taken. An entry
is one group.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from commands import write

from sartor.core import assets

FILES = {"faq-en.jsonl": "Source", "faq.jsonl": "Källa"}
PASSAGES, PASSAGE_CHARACTERS = 3, 260


def briefing(entry: dict[str, Any], others: list[dict[str, Any]], word: str, draw: random.Random) -> tuple[str, str]:
    """(question with passages under their sources, answer with its source)."""
    passages = [entry, *draw.sample([one for one in others if label(one) != label(entry)], PASSAGES - 1)]
    draw.shuffle(passages)
    told = "\n".join(f"[{label(one)}] {shortened(one['a'])}" for one in passages)
    return f"{told}\n\n{entry['q']}", f"{shortened(entry['a'])}\n{word}: {label(entry)}"


def label(entry: dict[str, Any]) -> str:
    """What is cited: the entry's first source."""
    return str(entry["sources"][0])


def shortened(text: str) -> str:
    """Its first sentences, up to so many characters; one that is longer stays whole."""
    cut = text.rfind(". ", 0, PASSAGE_CHARACTERS)
    return text if len(text) <= PASSAGE_CHARACTERS or cut < 0 else text[: cut + 1]


def rows(file: Path, word: str) -> Iterator[dict[str, Any]]:
    """Both forms of each entry that has a source and does not advertise."""
    entries = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    entries = [
        one for one in entries if one["sources"] and "zaragoza" not in shortened(one["a"]).lower() + one["q"].lower()
    ]
    draw = random.Random(0)
    for place, entry in enumerate(entries):
        plain = (entry["q"], f"{shortened(entry['a'])}\n{word}: {label(entry)}")
        # a briefing costs five times the tokens of a question: one entry in three has one
        for asked, said in [plain, briefing(entry, entries, word, draw)][: 1 + (place % 3 == 0)]:
            yield {"prompt": asked, "completion": said, "group": entry["id"]}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("python examples/team/cited.py CONSTRUCTION.jsonl")
    folder = assets.install("construction-faq") / "zaragoza_construction_faq" / "data"
    write(Path(sys.argv[1]), [row for name, word in FILES.items() for row in rows(folder / name, word)])
