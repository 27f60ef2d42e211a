"""Decides whether two texts mean the same by their words.

An encoder puts "turn on the light" beside "turn off the light", and 9 o'clock beside 10. So numbers must agree,
negations must, no word may stand against its opposite, and none may have another in its place ("the kitchen light",
"the garage light"). What passes is scored by the share of the words that both have, rare ones weighing more, and words
that change nothing set aside. It
errs towards keeping: "buy a ticket" and "purchase a ticket" are two texts to it.
"""

from __future__ import annotations

import importlib.resources
import itertools
import math
import re
import tomllib
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from sartor.core.errors import missing_package

# A word is a run of what is no space, digit or punctuation (combining marks are part of it); Chinese and Japanese
# signs and numbers stand alone.
_TOKEN = re.compile(
    r"\d+(?:[.,:]\d+)*|[\u3040-\u30ff\u3400-\u9fff]"
    r"|[^\s\d!-&(-/:-@\[-`{-~\u00a1-\u00bf\u2010-\u2018\u201a-\u205e\u3000-\u303f\u3040-\u30ff\u3400-\u9fff\u0964\u0965\u060c\u061b\u061f\uff01-\uff20]+"
)
_LETTER_A = re.compile(r"(?<=\w )A(?=\W|$)")  # hepatitis A, plan A: no article
_MARKS = {"%": "percent", "°": "degree", "€": "euro", "$": "dollar", "£": "pound"}
_ENDINGS = ("ing", "ed", "es", "s", "e", "d")  # that leave STEM letters or more
STEM = 4
COMMON, TELLING = 0.5, 20  # the share of texts that makes a word common, and how many texts that takes
LONG = 20  # content words from which a few may differ
LONG_SHARE = 0.1  # ... this part of them
_SWAP = 3  # the most words of a place that holds one thing here, another there


@dataclass(frozen=True)
class WordLists:
    """The lists of equivalence.toml. `opposites` gives the numbers of the groups that a word is in."""

    function: frozenset[str]
    clitics: frozenset[str]
    phrases: re.Pattern[str]
    negation: frozenset[str]
    negation_parts: tuple[str, ...]
    opposites: Mapping[str, frozenset[int]]


@cache
def words() -> WordLists:
    """The lists, read once."""
    lists = tomllib.loads((importlib.resources.files("sartor.text") / "equivalence.toml").read_text(encoding="utf-8"))
    opposites: dict[str, frozenset[int]] = {}
    for number, group in enumerate(lists["opposites"]):
        for word in group.split():
            opposites[word] = opposites.get(word, frozenset()) | {number}
    function, clitics, negation = (
        frozenset(" ".join(lists[name]).split()) for name in ("function", "clitics", "negation")
    )
    phrases = re.compile(rf"\b(?:{'|'.join(map(re.escape, sorted(lists['phrases'], key=len, reverse=True)))})\b")
    return WordLists(function, clitics, phrases, negation, tuple(lists["negation_parts"]), opposites)


Objection = Literal["", "numbers", "negation", "opposite", "swap"]


@dataclass(frozen=True)
class EquivalenceVerdict:
    """`score` 0..1: the weighted share of content words that both have, 0 with an objection; `detail` says what it is
    about.
    """

    score: float
    objection: Objection = ""
    detail: str = ""


@dataclass(frozen=True)
class TextReading:
    """A text as it is compared: its words in order, without endings and accents; its numbers; how often it negates.

    `tokens` are the words as they stand, in lower case.
    """

    tokens: tuple[str, ...]
    stems: tuple[str, ...]
    numbers: tuple[str, ...]
    negations: int

    @classmethod
    def of(cls, text: str) -> TextReading:
        """The reading of a text."""
        folded = unicodedata.normalize("NFKC", _LETTER_A.sub("letter-a", text)).casefold().replace("’", "'")  # noqa: RUF001
        for mark, word in _MARKS.items():
            folded = folded.replace(mark, f" {word} ")
        folded = words().phrases.sub(" ", folded)
        tokens = tuple(part for token in _TOKEN.findall(folded) for part in _parts(token))
        numbers = tuple(token for token in tokens if token[0].isdigit())
        negations = sum(is_negation(token) for token in tokens) + sum(
            folded.count(part) for part in words().negation_parts
        )
        return cls(tokens, tuple(map(stem, tokens)), numbers, negations)

    def content(self, weights: Mapping[str, float]) -> list[str]:
        """The stems that say something."""
        function = words().function
        pairs = zip(self.tokens, self.stems, strict=True)
        return [stem for token, stem in pairs if token not in function and weights.get(stem, 1.0)]


def _parts(token: str) -> list[str]:
    """`what's` as `what`, `l'eau` as `eau`, `n'est` as `ne` and `est`; `don't` stays whole, since it negates."""
    if token.endswith("n't") or "'" not in token:
        return [token]
    return ["ne" if part == "n" else part for part in token.split("'") if part and part not in words().clitics]


def stem(token: str) -> str:
    """A word without accents and without one of a few endings: `lights` and `light`, `opened` and `opening` are
    one.
    """
    plain = "".join(sign for sign in unicodedata.normalize("NFKD", token) if not unicodedata.combining(sign)) or token
    plain = token if not plain.isascii() else plain
    ending = next((end for end in _ENDINGS if plain.endswith(end) and len(plain) >= STEM + len(end)), "")
    return plain.removesuffix(ending)


def is_negation(token: str) -> bool:
    """Whether a token negates: `not`, `don't`, `nicht`, ..."""
    return token in words().negation or token.endswith("n't")


def reader(texts: Sequence[str]) -> Callable[[int], TextReading]:
    """Row number -> the reading of its text, made once."""
    readings: dict[int, TextReading] = {}

    def read(row: int) -> TextReading:
        if row not in readings:
            readings[row] = TextReading.of(texts[row])
        return readings[row]

    return read


def idf_weights(texts: Iterable[str]) -> dict[str, float]:
    """The weight of each word: 1 and the log of how rare it is among the texts.

    Nought for what more than COMMON of them have, such as the words of an instruction that stands before every
    question, where there are enough texts to tell.
    """
    document_counts: Counter[str] = Counter()
    count = 0
    for text in texts:
        document_counts.update(set(TextReading.of(text).stems))
        count += 1
    common = COMMON * count if count >= TELLING else count
    return {
        stem: 0.0 if document_count > common else 1 + math.log((1 + count) / (1 + document_count))
        for stem, document_count in document_counts.items()
    }


def compare_texts(first: TextReading, second: TextReading, weights: Mapping[str, float]) -> EquivalenceVerdict:
    """What speaks for and against two texts saying the same. `weights` as of `rarities`; an unknown word weighs 1."""
    if first.stems == second.stems and first.negations == second.negations:
        return EquivalenceVerdict(1.0)
    if first.numbers != second.numbers:
        return EquivalenceVerdict(
            0.0, "numbers", f"{' '.join(first.numbers) or 'none'} against {' '.join(second.numbers) or 'none'}"
        )
    if first.negations != second.negations:
        return EquivalenceVerdict(0.0, "negation")
    if against := opposite(first, second):
        return EquivalenceVerdict(0.0, "opposite", " against ".join(against))
    if swap := swapped(first, second, weights):
        return EquivalenceVerdict(0.0, "swap", " in the place of ".join(swap))
    return EquivalenceVerdict(_score(first, second, weights))


def _score(first: TextReading, second: TextReading, weights: Mapping[str, float]) -> float:
    contents = first.content(weights), second.content(weights)
    if not any(contents):  # nothing but words that all texts have
        first_content, second_content = first.content({}), second.content({})
        return (
            _overlap(first_content, second_content, {})
            if first_content and second_content
            else _overlap(first.stems, second.stems, {})
        )
    if min(map(len, contents)) > 1:
        return _overlap(contents[0], contents[1], weights)
    # beside a single word that says something the others may turn the sense: "do you work", "how would that work"
    return _overlap(first.stems, second.stems, weights)


def opposite(first: TextReading, second: TextReading) -> tuple[str, str] | None:
    """A word of each text, of which the other has none, that stand against each other."""
    return _against(set(first.tokens) - set(second.tokens), set(second.tokens) - set(first.tokens))


def _against(first_words: Iterable[str], second_words: Iterable[str]) -> tuple[str, str] | None:
    groups = words().opposites
    for word, against in itertools.product(sorted(first_words), sorted(second_words)):
        if word != against and (
            groups.get(word, frozenset()) & groups.get(against, frozenset()) or _is_undone(word, against)
        ):
            return word, against
    return None


def _is_undone(word: str, against: str) -> bool:
    short, long = sorted((word, against), key=len)
    return (
        len(short) > 3
        and long.endswith(short)
        and long.removesuffix(short) in ("un", "dis", "non", "in", "im", "ir", "de")
    )


def swapped(first: TextReading, second: TextReading, weights: Mapping[str, float]) -> tuple[str, str] | None:
    """The first place where the texts are alike but for what stands there. In long texts a few may differ."""
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError:
        raise missing_package("rapidfuzz") from None
    first, second = sorted(
        (first, second), key=lambda reading: reading.stems
    )  # of several shortest alignments always the same one
    n_words = min(len(first.content(weights)), len(second.content(weights)))
    allowed = LONG_SHARE * n_words if n_words >= LONG else 0.0
    swap_pair: tuple[str, str] | None = None
    for step in Levenshtein.opcodes(first.stems, second.stems):
        if step.tag != "replace":
            continue
        first_words, second_words = (
            first.tokens[step.src_start : step.src_end],
            second.tokens[step.dest_start : step.dest_end],
        )
        if against := _against(first_words, second_words):  # from A to B, to A from B
            return against
        unmatched = [
            " ".join(_content(words_here, words_there))
            for words_here, words_there in ((first_words, second_words), (second_words, first_words))
        ]
        size = max(len(text.split()) for text in unmatched)
        if all(unmatched) and size <= _SWAP:
            allowed -= size
            swap_pair = swap_pair or (unmatched[0], unmatched[1])
    return swap_pair if allowed < 0 else None


def _content(tokens: Sequence[str], others: Sequence[str]) -> list[str]:
    """The tokens that say something and have no equal among the others."""
    equal = {stem(token) for token in others}
    return [token for token in tokens if token not in words().function and stem(token) not in equal]


def _overlap(first: Sequence[str], second: Sequence[str], weights: Mapping[str, float]) -> float:
    """The weight of what both have over the weight of what either has (Ruzicka's measure)."""
    first_counts, second_counts = Counter(first), Counter(second)
    shared, total = (
        sum(n * weights.get(stem, 1.0) for stem, n in bag.items())
        for bag in (first_counts & second_counts, first_counts | second_counts)
    )
    return shared / total if total else 0.0
