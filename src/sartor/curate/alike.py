"""Do two texts say the same? The second look at pairs that an encoder holds to be near: words, not vectors.

An encoder puts "turn on the light" beside "turn off the light", and 9 o'clock beside 10. So numbers must agree, negations must,
no word may stand against its opposite, and none may have another in its place ("the kitchen light", "the garage light"). What
passes is scored by the words that both have, rare ones weighing more. It errs towards keeping: two texts that share hardly a
word are not held to be equal here, however near their vectors are.
"""

from __future__ import annotations

import importlib.resources
import math
import re
import tomllib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from sartor.core.errors import need

# A word is a run of what is no space, digit or punctuation (combining marks are part of it); Chinese and Japanese signs and
# numbers stand alone.
_TOKEN = re.compile(
    r"\d+(?:[.,:]\d+)*|[\u3040-\u30ff\u3400-\u9fff]"
    r"|[^\s\d!-&(-/:-@\[-`{-~\u00a1-\u00bf\u2010-\u2018\u201a-\u205e\u3000-\u303f\u3040-\u30ff\u3400-\u9fff\u0964\u0965\u060c\u061b\u061f\uff01-\uff20]+"
)
_MARKS = {"%": "percent", "°": "degree", "€": "euro", "$": "dollar", "£": "pound"}
SPELLING = 80.0  # rapidfuzz ratio, 0..100, from which two words are forms of one
LONG = 20  # content words from which a few may differ
LONG_SHARE = 0.1  # ... this part of them
_SWAP = 3  # the most words of a place that holds one thing here, another there


@dataclass(frozen=True)
class Words:
    """The lists of words.toml. `opposites` gives the numbers of the groups that a word is in."""

    function: frozenset[str]
    negation: frozenset[str]
    negation_parts: tuple[str, ...]
    opposites: Mapping[str, frozenset[int]]


@cache
def words() -> Words:
    """The lists, read once."""
    lists = tomllib.loads((importlib.resources.files("sartor.curate") / "words.toml").read_text(encoding="utf-8"))
    opposites: dict[str, frozenset[int]] = {}
    for number, group in enumerate(lists["opposites"]):
        for word in group.split():
            opposites[word] = opposites.get(word, frozenset()) | {number}
    function, negation = (frozenset(" ".join(lists[name]).split()) for name in ("function", "negation"))
    return Words(function, negation, tuple(lists["negation_parts"]), opposites)


@dataclass(frozen=True)
class Verdict:
    """`score` 0..1: the cosine of the two texts' content words; `objection` is empty where nothing speaks against equality."""

    score: float
    objection: str = ""


@dataclass(frozen=True)
class Read:
    """A text as it is compared: its tokens in order, its numbers, how often it negates."""

    tokens: tuple[str, ...]
    numbers: tuple[str, ...]
    negations: int

    @classmethod
    def of(cls, text: str) -> Read:
        """The reading of a text."""
        folded = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")  # noqa: RUF001
        for mark, word in _MARKS.items():
            folded = folded.replace(mark, f" {word} ")
        tokens = tuple(part for token in _TOKEN.findall(folded) for part in _parts(token))
        numbers = tuple(token.replace(",", "") for token in tokens if token[0].isdigit())
        negations = sum(is_negation(token) for token in tokens) + sum(folded.count(part) for part in words().negation_parts)
        return cls(tokens, numbers, negations)

    @property
    def content(self) -> list[str]:
        """The tokens that say something."""
        return [token for token in self.tokens if token not in words().function]


def _parts(token: str) -> list[str]:
    """`what's` as `what` and `s`, `l'eau` as `l` and `eau`; `don't` stays whole, since it negates."""
    return [token] if token.endswith("n't") else [part for part in token.split("'") if part]


def is_negation(token: str) -> bool:
    """Whether a token negates: `not`, `don't`, `nicht`, ..."""
    return token in words().negation or token.endswith("n't")


def rarities(texts: Iterable[str]) -> dict[str, float]:
    """The weight of each word: the log of how rare it is among the texts, at least 1."""
    having: Counter[str] = Counter()
    count = 0
    for text in texts:
        having.update(set(Read.of(text).tokens))
        count += 1
    return {token: 1 + math.log((1 + count) / (1 + seen)) for token, seen in having.items()}


def compare(one: Read, other: Read, weights: Mapping[str, float]) -> Verdict:
    """What speaks for and against two texts saying the same. `weights` as of `rarities`; an unknown word weighs 1."""
    if one.tokens == other.tokens:
        return Verdict(1.0)
    if one.numbers != other.numbers:
        return Verdict(0.0, "numbers differ")
    if one.negations != other.negations:
        return Verdict(0.0, "one negates")
    if against := opposite(one, other):
        return Verdict(0.0, f"{against[0]} against {against[1]}")
    if swap := swapped(one, other):
        return Verdict(0.0, f"{swap[0]} in the place of {swap[1]}")
    return Verdict(_cosine(one.content, other.content, weights))


def opposite(one: Read, other: Read) -> tuple[str, str] | None:
    """A word of each text, of which the other has none, that stand against each other."""
    only_one, only_other = set(one.tokens) - set(other.tokens), set(other.tokens) - set(one.tokens)
    if not only_one or not only_other:
        return None
    groups = words().opposites
    for word in sorted(only_one):
        for against in sorted(only_other):
            if groups.get(word, frozenset()) & groups.get(against, frozenset()) or _is_undone(word, against):
                return word, against
    return None


def _is_undone(word: str, against: str) -> bool:
    short, long = sorted((word, against), key=len)
    return len(short) > 3 and long.endswith(short) and long.removesuffix(short) in ("un", "dis", "non", "in", "im", "ir", "de")


def swapped(one: Read, other: Read) -> tuple[str, str] | None:
    """The first place where the texts are alike but for what stands there. In long texts a few may differ."""
    try:
        from rapidfuzz import fuzz
        from rapidfuzz.distance import Levenshtein
    except ImportError:
        raise need("rapidfuzz") from None
    function = words().function
    allowed = LONG_SHARE * min(len(one.content), len(other.content))
    allowed = allowed if min(len(one.content), len(other.content)) >= LONG else 0.0
    found: tuple[str, str] | None = None
    for step in Levenshtein.opcodes(one.tokens, other.tokens):
        here = [token for token in one.tokens[step.src_start : step.src_end] if token not in function]
        there = [token for token in other.tokens[step.dest_start : step.dest_end] if token not in function]
        if step.tag != "replace" or not here or not there or max(len(here), len(there)) > _SWAP:
            continue
        if fuzz.ratio(" ".join(here), " ".join(there)) < SPELLING:
            allowed -= max(len(here), len(there))
            found = found or (" ".join(here), " ".join(there))
    return found if allowed < 0 else None


def _cosine(one: Sequence[str], other: Sequence[str], weights: Mapping[str, float]) -> float:
    left, right = Counter(one), Counter(other)
    if not left or not right:
        return 0.0
    _join_forms(left, right)
    shared = sum(left[token] * right[token] * weights.get(token, 1.0) ** 2 for token in left.keys() & right.keys())
    lengths = [math.sqrt(sum((n * weights.get(token, 1.0)) ** 2 for token, n in bag.items())) for bag in (left, right)]
    return min(1.0, shared / (lengths[0] * lengths[1]))


def _join_forms(left: Counter[str], right: Counter[str]) -> None:
    """Where a word has no equal but a form of itself on the other side (`lights`, a slip of the pen), both count as one."""
    from rapidfuzz import fuzz

    for word in sorted(left.keys() - right.keys()):
        near = [(fuzz.ratio(word, against), against) for against in sorted(right.keys() - left.keys())]
        best, against = max(near, default=(0.0, ""))
        if best >= SPELLING and not word[0].isdigit():
            right[word] = right.pop(against)
