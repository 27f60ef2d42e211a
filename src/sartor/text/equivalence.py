"""Equivalence of two texts by their words.

An encoder puts "turn on the light" near "turn off the light", and 9 o'clock near 10. Therefore numbers and negations
must agree, no word may oppose a word of the other text, and none may replace another one ("the kitchen light", "the
garage light"). Texts that pass are scored by the fraction of words in common, with rare words weighing more and
function words left out. The check prefers false negatives: "buy a ticket" and "purchase a ticket" count as different.
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

# A word is a run of characters other than spaces, digits and punctuation (combining marks belong to it); Chinese and
# Japanese characters and numbers are words of their own.
_TOKEN = re.compile(
    r"\d+(?:[.,:]\d+)*|[\u3040-\u30ff\u3400-\u9fff]"
    r"|[^\s\d!-&(-/:-@\[-`{-~\u00a1-\u00bf\u2010-\u2018\u201a-\u205e\u3000-\u303f\u3040-\u30ff\u3400-\u9fff\u0964\u0965\u060c\u061b\u061f\uff01-\uff20]+"
)
_LETTER_A = re.compile(r"(?<=\w )A(?=\W|$)")  # hepatitis A, plan A: not an article
_MARKS = {"%": "percent", "°": "degree", "€": "euro", "$": "dollar", "£": "pound"}
_ENDINGS = ("ing", "ed", "es", "s", "e", "d")  # removed if at least STEM letters remain
STEM = 4
COMMON, TELLING = 0.5, 20  # fraction of the texts above which a word is common; fewest texts to apply it
LONG = 20  # content words from which some may be swapped
LONG_SHARE = 0.1  # fraction of the content words that may be swapped in a long text
_SWAP = 3  # most words in a swapped phrase


@dataclass(frozen=True)
class WordLists:
    """Word lists of equivalence.toml.

    opposites: word -> numbers of the groups that it is in.
    """

    function: frozenset[str]
    clitics: frozenset[str]
    phrases: re.Pattern[str]
    negation: frozenset[str]
    negation_parts: tuple[str, ...]
    opposites: Mapping[str, frozenset[int]]


@cache
def words() -> WordLists:
    """Return the word lists, read once."""
    lists = tomllib.loads((importlib.resources.files("sartor.text") / "equivalence.toml").read_text(encoding="utf-8"))
    opposites: dict[str, frozenset[int]] = {}
    for number, group in enumerate(lists["opposites"]):
        for word in group.split():
            opposites[word] = opposites.get(word, frozenset()) | {number}
    function, clitics, negation = (
        frozenset(" ".join(lists[name]).split()) for name in ("function", "clitics", "negation")
    )
    phrases = re.compile(rf"\b(?:{'|'.join(map(re.escape, sorted(lists['phrases'], key=len, reverse=True)))})\b")
    return WordLists(
        function=function,
        clitics=clitics,
        phrases=phrases,
        negation=negation,
        negation_parts=tuple(lists["negation_parts"]),
        opposites=opposites,
    )


Objection = Literal["", "numbers", "negation", "opposite", "swap"]


@dataclass(frozen=True)
class EquivalenceVerdict:
    """Result of a comparison.

    score: weighted fraction of content words in common, 0..1; 0 with an objection.
    detail: words that the objection is about.
    """

    score: float
    objection: Objection = ""
    detail: str = ""


@dataclass(frozen=True)
class TextReading:
    """Text prepared for comparison.

    tokens: words in order, in lower case.
    stems: words without endings and accents.
    numbers: tokens that are numbers.
    negations: number of negations.
    """

    tokens: tuple[str, ...]
    stems: tuple[str, ...]
    numbers: tuple[str, ...]
    negations: int

    @classmethod
    def of(cls, text: str) -> TextReading:
        """Read a text."""
        folded = unicodedata.normalize("NFKC", _LETTER_A.sub("letter-a", text)).casefold().replace("’", "'")  # noqa: RUF001
        for mark, word in _MARKS.items():
            folded = folded.replace(mark, f" {word} ")
        folded = words().phrases.sub(" ", folded)
        tokens: list[str] = []
        for token in _TOKEN.findall(folded):
            if token.endswith("n't") or "'" not in token:  # `don't` stays whole, since it is a negation
                tokens.append(token)
                continue
            # `what's` becomes `what`, `l'eau` becomes `eau`, and `n'est` becomes `ne` and `est`
            for part in token.split("'"):
                if part and part not in words().clitics:
                    tokens.append("ne" if part == "n" else part)
        negations = sum(is_negation(token) for token in tokens)
        negations += sum(folded.count(part) for part in words().negation_parts)
        return cls(
            tokens=tuple(tokens),
            stems=tuple(map(stem, tokens)),
            numbers=tuple(token for token in tokens if token[0].isdigit()),
            negations=negations,
        )

    def content(self, weights: Mapping[str, float]) -> list[str]:
        """Return the stems of content words: no function words, and no words of weight 0."""
        function = words().function
        pairs = zip(self.tokens, self.stems, strict=True)
        return [stem for token, stem in pairs if token not in function and weights.get(stem, 1.0)]


def stem(token: str) -> str:
    """Return a word without accents and without a common ending.

    `lights` gives the same as `light`, and `opened` the same as `opening`.
    """
    plain = "".join(sign for sign in unicodedata.normalize("NFKD", token) if not unicodedata.combining(sign)) or token
    plain = token if not plain.isascii() else plain
    ending = next((end for end in _ENDINGS if plain.endswith(end) and len(plain) >= STEM + len(end)), "")
    return plain.removesuffix(ending)


def is_negation(token: str) -> bool:
    """Return whether a token is a negation: `not`, `don't`, `nicht`, ..."""
    return token in words().negation or token.endswith("n't")


def reader(texts: Sequence[str]) -> Callable[[int], TextReading]:
    """Return a function row number -> TextReading, which reads each text once."""
    readings: dict[int, TextReading] = {}

    def read(row: int) -> TextReading:
        if row not in readings:
            readings[row] = TextReading.of(texts[row])
        return readings[row]

    return read


def idf_weights(texts: Iterable[str]) -> dict[str, float]:
    """Return the weight of each word: 1 + log((1 + N) / (1 + n)) for a word in n of N texts.

    The weight is 0 for a word in more than the fraction COMMON of at least TELLING texts, such as the words of an
    instruction before every question.
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
    """Compare two texts.

    weights: as from `idf_weights`; an unknown word has weight 1.
    """
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
    if not any(contents):  # only function words and words that most texts have
        first_content, second_content = first.content({}), second.content({})
        return (
            _overlap(first_content, second_content, {})
            if first_content and second_content
            else _overlap(first.stems, second.stems, {})
        )
    if min(map(len, contents)) > 1:
        return _overlap(contents[0], contents[1], weights)
    # beside a single content word, function words may change the meaning: "do you work", "how would that work"
    return _overlap(first.stems, second.stems, weights)


def opposite(first: TextReading, second: TextReading) -> tuple[str, str] | None:
    """Return a word of each text, missing in the other one, that oppose each other; None without such a pair."""
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
    """Return the phrases at the first position where the texts have different ones, or None.

    Long texts may differ at a few positions.
    """
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError:
        raise missing_package("rapidfuzz") from None
    # a fixed order, so that the alignment is the same for both orders of the texts
    first, second = sorted((first, second), key=lambda reading: reading.stems)
    n_words = min(len(first.content(weights)), len(second.content(weights)))
    allowed = LONG_SHARE * n_words if n_words >= LONG else 0.0
    swap_pair: tuple[str, str] | None = None
    for step in Levenshtein.opcodes(first.stems, second.stems):
        if step.tag != "replace":
            continue
        first_words = first.tokens[step.src_start : step.src_end]
        second_words = second.tokens[step.dest_start : step.dest_end]
        if against := _against(first_words, second_words):  # opposites at one position: "from A to B", "to A from B"
            return against
        first_only = _content(first_words, second_words)
        second_only = _content(second_words, first_words)
        size = max(len(first_only), len(second_only))
        if first_only and second_only and size <= _SWAP:
            allowed -= size
            swap_pair = swap_pair or (" ".join(first_only), " ".join(second_only))
    return swap_pair if allowed < 0 else None


def _content(tokens: Sequence[str], others: Sequence[str]) -> list[str]:
    """Return the content words whose stem is not among those of the others."""
    equal = {stem(token) for token in others}
    return [token for token in tokens if token not in words().function and stem(token) not in equal]


def _overlap(first: Sequence[str], second: Sequence[str], weights: Mapping[str, float]) -> float:
    """Return Ruzicka's similarity of two bags of words: sum_w weight min(n1, n2) / sum_w weight max(n1, n2)."""
    first_counts, second_counts = Counter(first), Counter(second)

    def weigh(bag: Counter[str]) -> float:
        return sum(n * weights.get(stem, 1.0) for stem, n in bag.items())

    total = weigh(first_counts | second_counts)
    return weigh(first_counts & second_counts) / total if total else 0.0
