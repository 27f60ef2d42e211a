"""The forgetting probe: what tuning cost on things that it was not about is measured on these rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

from sartor.core import assets
from sartor.core.records import Example, Message, Origin

PROBE_ROWS = 200
_FEWEST_WORDS, _MOST_WORDS = 3, 24


def chitchat_rows() -> list[Example]:
    """200 fixed exchanges of the `chitchat` asset: the first turn of a conversation and the reply to it.

    Which 200 is decided by the digest of the exchange, among those whose turns have 3 to 24 words each. Raises AssetError
    when the asset is absent and cannot be fetched.
    """
    file = assets.install("chitchat") / assets.entry("chitchat").paths[0]
    pairs = sorted(set(_exchanges(json.loads(file.read_text(encoding="utf-8")))), key=_order)[:PROBE_ROWS]
    return [
        Example(
            messages=(Message.of("user", asked), Message.of("assistant", replied)),
            origins=(Origin("chitchat", f"dataset.json:{conversation}", "MIT"),),
            group=conversation,
        )
        for conversation, asked, replied in pairs
    ]


def _exchanges(conversations: dict[str, dict[str, list[list[dict[str, str]]]]]) -> Iterator[tuple[str, str, str]]:
    for name, conversation in conversations.items():
        turns = [" ".join(line["text"] for line in turn).strip() for turn in conversation["messages"][:2]]
        if len(turns) == 2 and all(_FEWEST_WORDS <= len(turn.split()) <= _MOST_WORDS for turn in turns):
            yield name, turns[0], turns[1]


def _order(exchange: tuple[str, str, str]) -> bytes:
    return hashlib.sha256("\n".join(exchange[1:]).encode()).digest()
