"""The `chitchat` asset -> rows in the `messages` form: `python examples/chitchat/convert.py chitchat.jsonl`.

The asset is one JSON mapping, name -> {"messages": [[{"text", "timestamp", "sender"}, ...], ...]}. Each conversation
becomes
one row: who speaks first is the user, the other the assistant; lines that one of them sends in a row become one turn,
a line each; the row's group is the conversation, its date that of the first line. A conversation that ends with the
user's words loses that last turn, since nothing follows from it. One in which only one person speaks stays as it is:
`sartor curate` drops and counts it (`no_answer`).
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sartor.core import assets


def turns(conversation: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(sender, text) of each turn; lines of one sender in a row are one turn. Blank lines are left out."""
    sender, lines = "", []
    for line in (line for burst in conversation["messages"] for line in burst):
        if line["sender"] != sender and lines:
            yield sender, "\n".join(lines)
            lines = []
        sender = line["sender"]
        if line["text"].strip():
            lines.append(line["text"].strip())
    if lines:
        yield sender, "\n".join(lines)


def row(name: str, conversation: dict[str, Any], counts: Counter[str]) -> dict[str, Any]:
    """The row of a conversation; `counts` takes note of what was left out."""
    said = list(turns(conversation))
    # a sender whose lines were all blank leaves two turns of the other in a row
    merged: list[tuple[str, str]] = []
    for sender, text in said:
        if merged and merged[-1][0] == sender:
            merged[-1] = (sender, f"{merged[-1][1]}\n{text}")
        else:
            merged.append((sender, text))
    if len(merged) > 1 and len(merged) % 2:
        counts["last turn of the user left out"] += 1
        merged.pop()
    counts["one person speaks" if len(merged) < 2 else "conversation"] += 1
    roles = ("user", "assistant")
    messages = [{"role": roles[place % 2], "content": text} for place, (_, text) in enumerate(merged)]
    return {"messages": messages, "group": name, "date": conversation.get("start", "")[:10]}


def main(out: Path) -> None:
    """Write the rows, and say what was made of them."""
    file = assets.install("chitchat") / assets.entry("chitchat").paths[0]
    conversations = json.loads(file.read_text(encoding="utf-8"))
    counts: Counter[str] = Counter()
    with out.open("w", encoding="utf-8") as stream:
        for name, conversation in conversations.items():
            stream.write(json.dumps(row(name, conversation, counts), ensure_ascii=False) + "\n")
    sys.stdout.write(json.dumps({"rows": len(conversations), **counts}) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("python examples/chitchat/convert.py OUT.jsonl")
    main(Path(sys.argv[1]))
