"""Near misses: an agent's own words in requests that it is not for. What a router must not take for its business.

People quote commands, ask what a word means, tell of yesterday. Exemplars know nothing of that, so some of them are set into
such frames, the same ones each time, and stand among what the agent is not for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from sartor.agents.routing.exemplars import Prompt
from sartor.core.records import digest

MOST = 60
FRAMES = (
    "Translate into French: {prompt}",
    "Where does the word {word} come from?",
    "Write a short story about {words}.",
    "Why would anybody say: {prompt}",
    "A friend of mine said yesterday: {prompt}",
    "I know a song called {words}, who sings it?",
    "How many letters are in the sentence: {prompt}",
    "What rhymes with {word}?",
    "I'm tired of hearing about {words} all day.",
    "Who first had the idea of {words}?",
)
_WORD = re.compile(r"[^\W\d_]{4,}")


def near_misses(prompts: Sequence[Prompt], most: int = MOST) -> list[str]:
    """One for each of the first `most` prompts; frame and words are drawn by the prompt's digest."""
    return [_framed(prompt.text) for prompt in prompts[:most]]


def _framed(text: str) -> str:
    drawn = int(digest(text), 16)
    words = list(dict.fromkeys(_WORD.findall(text.lower()))) or [text]
    first, second = words[(drawn >> 8) % len(words)], words[(drawn >> 24) % len(words)]
    both = f"{first} and {second}" if first != second else first
    return FRAMES[drawn % len(FRAMES)].format(prompt=text, word=first, words=both)
