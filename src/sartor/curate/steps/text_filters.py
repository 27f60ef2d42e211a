"""Steps length, language and repetition.

The limits on fractions apply to texts of at least `min_words` words. A shorter text is dropped only for a loop: a
phrase of one to eight words at least `loop` times in succession that covers half of the text, or one character 60
times in succession.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from sartor.core.config import REQUIRED, option
from sartor.core.errors import ConfigError
from sartor.core.records import Drop, Example, drop_of
from sartor.curate.step import Removal, RowFunction, StepInput, StepResult
from sartor.text.example_text import FIELD_TEXT, Field, texts, without_code, words
from sartor.text.language_id import CODES, detector

# n -> largest fraction of the characters that the most frequent n-gram may cover (TOP_NGRAM), or repeated n-grams
# (SEEN_NGRAMS)
TOP_NGRAM = {2: 0.20, 3: 0.18, 4: 0.16}
SEEN_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
# Gopher counts any top n-gram, even one that occurs twice; in a short text that is often a figure of speech
_TOP_SEEN = 4
_LONGEST_LOOP = 8
_MAX_WORDS = 20_000  # words of a text that are examined
_ONE_CHARACTER = re.compile(r"([^\s\-=_.*#~|+\d])\1{59,}")
_RULE = re.compile(r"^\W*$")


@dataclass(frozen=True)
class Repetition:
    """Drop rows with a text that repeats itself: duplicate lines and paragraphs, n-grams, loops."""

    scale: float = option(1.0, "factor on Gopher's limits: above 1 is laxer, 0.5 is twice as strict")
    min_words: int = option(50, "words from which on the fractions hold; a shorter text goes for a loop alone")
    loop: int = option(
        8, "a text is dropped if a phrase of 1 to 8 words is repeated so often in a row and makes up half of it"
    )
    field: Field = option("replies", FIELD_TEXT)
    kind: Literal["repetition"] = "repetition"

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 10:
            raise ConfigError(f"scale is {self.scale}; it must be above 0, at most 10", "scale: 1.0")
        if self.loop < 2:
            raise ConfigError(f"loop is {self.loop}; it must be 2 or more", "loop: 8")

    def open(self, folder: Path) -> RowFunction:
        """Return the row function."""

        def apply(example: Example) -> Example | Drop:
            for text in texts(example, self.field):
                if fault := self.fault(text):
                    return drop_of(example, "repetition", fault, step=self.kind)
            return example

        return apply

    def fault(self, text: str) -> str:
        """Return a sentence about the repetition in a text; empty if there is none. Code blocks are ignored."""
        prose = without_code(text)
        if match := _ONE_CHARACTER.search(prose):
            return f"the character {match.group(1)!r} {len(match.group())} times in a row"
        text_words = words(prose)[:_MAX_WORDS]
        if fault := _loop_fault(text_words, self.loop):
            return fault
        if len(text_words) < max(self.min_words, 2):
            return ""
        return _lines_fault(prose, self.scale) or _ngrams_fault(text_words, self.scale)


def _loop_fault(text_words: Sequence[str], loop: int) -> str:
    """Return a fault for a phrase of one to eight words that is repeated in succession.

    It must occur at least `loop` times and cover at least half of the text.
    """
    if len(text_words) < loop or len(set(text_words)) > len(text_words) * (
        0.5 + _LONGEST_LOOP / max(len(text_words), 1)
    ):
        return ""
    for size in range(1, _LONGEST_LOOP + 1):
        run = longest = end = 0
        for index in range(size, len(text_words)):
            run = run + 1 if text_words[index] == text_words[index - size] else 0
            if run > longest:
                longest, end = run, index
        covered = longest + size
        if longest and covered >= size * loop and 2 * covered >= len(text_words):
            phrase = " ".join(text_words[end - size + 1 : end + 1])
            return f"{phrase[:60]!r} {covered // size} times in a row, {covered} of {len(text_words)} words"
    return ""


def _lines_fault(prose: str, scale: float) -> str:
    for unit, separator, max_share, max_characters in (
        ("lines", "\n", 0.30, 0.20),
        ("paragraphs", "\n\n", 0.30, 0.20),
    ):
        pieces = [piece.strip() for piece in prose.split(separator)]
        pieces = [piece for piece in pieces if piece and not _RULE.match(piece)]
        if len(pieces) < 3 or len(set(pieces)) == len(pieces):
            continue
        repeats: list[str] = []
        for piece, count in Counter(pieces).items():
            repeats += [piece] * (count - 1)
        share = len(repeats) / len(pieces)
        characters = sum(map(len, repeats)) / sum(map(len, pieces))
        if share > max_share * scale:
            return f"{share:.0%} of the {unit} stand there already; at most {max_share * scale:.0%}"
        if characters > max_characters * scale:
            shown = f"{characters:.0%} of the characters are in {unit} that stand there already"
            return f"{shown}; at most {max_characters * scale:.0%}"
    return ""


def _ngrams_fault(text_words: list[str], scale: float) -> str:
    counts = Counter(text_words)
    if counts.most_common(1)[0][1] < 2:
        return ""
    lengths = [len(word) for word in text_words]
    total = sum(lengths)
    for size, max_share in TOP_NGRAM.items():
        gram, count = Counter(zip(*(text_words[shift:] for shift in range(size)), strict=False)).most_common(1)[0]
        # n-grams of a loop overlap, so the fraction is limited to 1
        share = min(1.0, count * sum(map(len, gram)) / total)
        if count >= _TOP_SEEN and share > max_share * scale:
            return (
                f"{' '.join(gram)[:60]!r} {count} times, {share:.0%} of the characters; at most "
                f"{max_share * scale:.0%}"
            )
    for size, max_share in SEEN_NGRAMS.items():
        share = _repeated_characters(text_words, lengths, size) / total
        if share == 0:
            return ""  # then no longer n-gram is repeated either
        if share > max_share * scale:
            return (
                f"{share:.0%} of the characters are in {size}-grams that stand there already; at most "
                f"{max_share * scale:.0%}"
            )
    return ""


def _repeated_characters(text_words: list[str], lengths: list[int], size: int) -> int:
    """Count the characters of words in a repeated n-gram, each character once."""
    seen_grams: set[tuple[str, ...]] = set()
    covered, upto = 0, 0
    for index, gram in enumerate(zip(*(text_words[shift:] for shift in range(size)), strict=False)):
        if gram in seen_grams:
            covered += sum(lengths[max(index, upto) : index + size])
            upto = index + size
        else:
            seen_grams.add(gram)
    return covered


_FIELDS = {"reply": ("reply",), "replies": ("replies",), "prompt": ("prompt",), "all": ("prompt", "replies")}


@dataclass(frozen=True)
class LanguageFilter:
    """Drop rows in a language other than the allowed ones, by fastText's lid.176.

    `unsure` decides about short texts and uncertain detections.
    """

    allow: tuple[str, ...] = option(REQUIRED, "language codes that stay: ISO 639-1, such as en, sv, zh")
    min_confidence: float = option(0.6, "probability below which a language is not held for sure, 0..1")
    min_letters: int = option(
        25, "letters of prose below which no language is held for sure; one not Latin counts as 4"
    )
    unsure: Literal["keep", "drop"] = option(
        "keep", "what becomes of a row whose language is not sure; counted either way"
    )
    field: Literal["reply", "replies", "prompt", "all"] = option(
        "reply", "what is judged: reply, replies, prompt (each joined), or all (prompt and replies, each by itself)"
    )
    kind: Literal["language"] = "language"

    def __post_init__(self) -> None:
        if not self.allow:
            raise ConfigError("allow names no language, so every row would go", "allow: [en]")
        for code in self.allow:
            if code not in CODES:
                near = code.lower().replace("_", "-").split("-")[0]
                meant = [near if other == code else other for other in self.allow]
                remedy = f"allow: [{', '.join(meant)}]" if near in CODES else f"codes of {', '.join(sorted(CODES))}"
                raise ConfigError(f"allow: {code!r} is no language code that the model knows", remedy)
        if not 0 <= self.min_confidence <= 1:
            raise ConfigError(f"min_confidence is {self.min_confidence}; it must be 0 to 1", "min_confidence: 0.6")
        if self.min_letters < 0:
            raise ConfigError(f"min_letters is {self.min_letters}; it must be 0 or more", "min_letters: 25")

    def sketch(self, examples: Sequence[Example], folder: Path) -> Any:
        """Return code, confidence and letters of each judged text of a row, as list columns."""
        detect = detector()
        codes, confidences, letters = [], [], []
        for example in examples:
            field_texts = [texts(example, field) for field in _FIELDS[self.field]]
            languages = [detect("\n".join(parts)) for parts in field_texts if parts]
            codes.append([language.code for language in languages])
            confidences.append([language.confidence for language in languages])
            letters.append([language.letters for language in languages])
        return pa.table(
            {
                "code": pa.array(codes, pa.list_(pa.string())),
                "confidence": pa.array(confidences, pa.list_(pa.float32())),
                "letters": pa.array(letters, pa.list_(pa.int32())),
            }
        )

    def decide(self, step_input: StepInput) -> StepResult:
        """Return the removals of rows in another language, and of unsure rows if they are dropped."""
        columns = [step_input.table[name].to_pylist() for name in ("code", "confidence", "letters")]
        languages: Counter[str] = Counter()
        removals, unsure_rows, without_text = [], 0, 0
        for row, judged in enumerate(zip(*columns, strict=True)):
            pieces = list(zip(*judged, strict=True))
            verdicts = [self._verdict(*piece) for piece in pieces]
            without_text += not pieces
            languages.update(
                {code if is_sure else "unsure" for (code, _, _), (is_sure, _) in zip(pieces, verdicts, strict=True)}
            )
            foreign = next((detail for is_sure, detail in verdicts if is_sure and detail), "")
            unsure = next((detail for is_sure, detail in verdicts if not is_sure), "")
            unsure_rows += bool(unsure) and not foreign
            if foreign:
                removals.append(Removal(row, "language", foreign))
            elif unsure and self.unsure == "drop":
                removals.append(Removal(row, "language_unsure", unsure))
        facts = {
            "languages": dict(languages.most_common()),
            f"unsure_{'kept' if self.unsure == 'keep' else 'dropped'}": unsure_rows,
            "without_text": without_text,
        }
        return StepResult(removals, facts=facts)

    def _verdict(self, code: str, confidence: float, letters: int) -> tuple[bool, str]:
        """Return (whether the language is certain, reason against the text or an empty string)."""
        text = f"{code or 'no language'} with confidence {confidence:.2f}, {letters} letters"
        if letters < self.min_letters:
            return False, f"{text}: fewer than {self.min_letters} letters to judge by"
        if confidence < self.min_confidence:
            return False, f"{text}: below {self.min_confidence}"
        return True, "" if code in self.allow else f"{text}; allowed: {', '.join(self.allow)}"


@dataclass(frozen=True)
class Length:
    """Drop rows whose last reply has too few or too many words."""

    min_words: int = option(1, "fewest words of the last reply")
    max_words: int = option(100_000, "most words of the last reply")
    kind: Literal["length"] = "length"

    def __post_init__(self) -> None:
        if self.min_words > self.max_words:
            raise ConfigError(
                f"min_words {self.min_words} is above max_words {self.max_words}",
                f"min_words: {self.max_words}, max_words: {self.min_words}",
            )

    def open(self, folder: Path) -> RowFunction:
        """Return the row function."""

        def apply(example: Example) -> Example | Drop:
            words = len(example.reply.split())
            if words < self.min_words:
                detail = f"{words} words in the reply; at least {self.min_words}"
                return drop_of(example, "too_short", detail, step=self.kind)
            if words > self.max_words:
                return drop_of(
                    example, "too_long", f"{words} words in the reply; at most {self.max_words}", step=self.kind
                )
            return example

        return apply
