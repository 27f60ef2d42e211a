"""Hashed shingle sets and common shingles.

The texts of a batch form one buffer of bytes. Table look-ups, prefix sums and one sort do the rest (some 30 MB/s of
text a core).

**Normal form.** Rows are compared, here and for exact duplicates, by their sequence of words:

- Letters are lower-cased. A row that is not ASCII goes through NFKC and `str.casefold` first.
- White space and quotes separate words and are dropped. So are `. , ; : ! ?` before white space, a quote, a closing
  bracket, another of them, or the end. Inside a number or word (`3.5`, `10:30`, `e.g`, `don't`) they are part of the
  word.
- Every other symbol is a word of its own (`C++` is not `C`, `-5` not `5`, `a<b` not `a>b`). So is every character of a
  script without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese) and every emoji.

**Shingles.** `words`: runs of `size` words. Each word with a digit is also a shingle by itself, marked by the lowest
bit of its hash, so that `pair_scoring.py` can tell whether two rows contradict each other in numbers. `characters`:
runs of `size` characters of the words with one space between. A row shorter than one shingle is one shingle. A row
without words has none and is never a duplicate.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import Any, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from sartor.core.errors import ConfigError

U8 = NDArray[np.uint8]
U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Mask = NDArray[np.bool_]


def offsets_of(lengths: NDArray[np.integer]) -> I64:
    """Return (N + 1,) offsets from (N,) lengths."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def mixed(hashes: U64) -> U64:
    """Return the splitmix64 finaliser of hashes (Steele, Lea, Flood 2014), same shape.

    Every bit of the input affects every bit of the output.
    """
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))


Unit = Literal["words", "characters"]

# Sizes by measurement: docs/decisions/007-dedup.md
SIZES: dict[str, int] = {"words": 2, "characters": 3}
# `auto` takes rows for short records if their median is below SHORT_WORDS words, and they join at least RECORD_FIELDS
# fields or at least the fraction NUMBERS_SHARE of their words has digits
SHORT_WORDS, NUMBERS_SHARE, RECORD_FIELDS = 30, 0.25, 4
_CHUNK_BYTES = 1 << 18  # text processed at once: its 64-bit prefix sums fit in a core's cache
NUMBER = np.uint32(1)  # this bit is set in a shingle that is a word with a digit
_NUMBER_BIT = np.uint64(1 << 32)  # the same in the 64-bit hash, of which the upper half is kept
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_INVERSE = pow(_BASE, -1, 1 << 64)

_SPACE, _WORD, _SYMBOL, _STOP, _QUOTE, _CLOSING, _DIGIT = range(7)
_UNSPACED = (
    "\u0e01-\u0e7f\u0e80-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3005-\u3007\u3041-\u30ff\u31f0-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_EMOJI = "\u2190-\u21ff\u2300-\u27bf\u2b00-\u2bff\U0001f000-\U0001faff"
_ALONE = re.compile(f"([{_UNSPACED}{_EMOJI}])")
_PLAIN = {
    **dict.fromkeys("«»‹›“”„‟‚‛「」『』¿¡", '"'),
    **dict.fromkeys("‘’", "'"),
    **dict.fromkeys("‐‑‒–—―−", "-"),
    **dict.fromkeys("。｡।۔", "."),
    **dict.fromkeys("、､،", ","),
    "؟": "?",
    # invisible: zero-width space and joiners, soft hyphen, byte-order mark, variation selectors
    **dict.fromkeys("\u200b\u200c\u200d\u2060\u00ad\ufeff\ufe0e\ufe0f", ""),
}
_ODD = re.compile(f"[{''.join(_PLAIN)}]")


@dataclass(frozen=True)
class Shingling:
    """Division of rows into shingles: runs of `size` words or characters.

    reason: explanation for the output.
    """

    unit: Unit
    size: int
    reason: str = ""


@dataclass(frozen=True)
class Sketches:
    """Hashed content of a batch of N rows.

    shingles: (S,) uint32. Row i has `shingles[offsets[i]:offsets[i + 1]]`, sorted, each once.
    offsets: (N + 1,) int64.
    digests: (N, 16) uint8, the xxh3-128 of the normal form; equal for exact duplicates.
    """

    shingles: U32
    offsets: I64
    digests: U8

    @staticmethod
    def joined(parts: Sequence[Sketches]) -> Sketches:
        """Return several batches as one, in order."""
        if not parts:
            return Sketches(np.empty(0, np.uint32), np.zeros(1, np.int64), np.empty((0, 16), np.uint8))
        lengths = np.concatenate([np.diff(part.offsets) for part in parts])
        return Sketches(
            np.concatenate([part.shingles for part in parts]),
            offsets_of(lengths),
            np.concatenate([part.digests for part in parts]),
        )


def resolve(
    unit: Literal["auto", "words", "characters"], size: int, texts: Sequence[str], *, joined_fields: int = 0
) -> Shingling:
    """Return the shingling of a run. A `size` of 0 takes the unit's default.

    unit: `auto` chooses by `texts`, a sample of the rows. It is words, since one changed word may change the meaning.
    It is characters for short records, where a change may be a typing error: rows that join several fields
    (`joined_fields`) or consist largely of numbers.

    Raises ConfigError for a size outside 0..64.
    """
    if not 0 <= size <= 64:
        raise ConfigError(
            f"a shingle size of {size} makes no sense", "a size from 1 to 64, or 0 for the unit's default"
        )
    if unit != "auto":
        return Shingling(unit, size or SIZES[unit], "as asked")
    median, numbers = _profile(texts)
    reason = f"the median row has {median:g} words, {numbers:.0%} of all words hold digits"
    chosen: Unit = (
        "characters"
        if median < SHORT_WORDS and (joined_fields >= RECORD_FIELDS or numbers >= NUMBERS_SHARE)
        else "words"
    )
    if joined_fields:
        reason += f", and rows join {joined_fields} fields"
    return Shingling(chosen, size or SIZES[chosen], reason)


def _profile(texts: Sequence[str]) -> tuple[float, float]:
    """Return the median number of words of non-empty rows, and the share of words with a digit."""
    counts, numbers = [np.zeros(0, np.int64)], 0
    for chunk in _chunks(texts):
        buffer, offsets = _normal(chunk)
        starts, _ = _words(buffer)
        counts.append(np.diff(np.searchsorted(starts, offsets)))
        numbers += len(_numbers(buffer, starts))
    words = np.concatenate(counts)
    words = words[words > 0]
    return (float(np.median(words)), numbers / int(words.sum())) if len(words) else (0.0, 0.0)


def sketch(texts: Sequence[str], shingling: Shingling) -> Sketches:
    """Compute the sketches of a batch of N texts.

    It is a pure function: batches may be computed anywhere and joined.
    """
    return Sketches.joined([_sketch(chunk, shingling) for chunk in _chunks(texts)])


def _chunks(texts: Sequence[str]) -> list[Sequence[str]]:
    """Return runs of texts of at most about _CHUNK_BYTES; a longer text is a run of its own."""
    chunks, first, size = [], 0, 0
    for index, text in enumerate(texts):
        if size and size + len(text) > _CHUNK_BYTES:
            chunks.append(texts[first:index])
            first, size = index, 0
        size += len(text) + 2
    return [*chunks, texts[first:]] if first < len(texts) else chunks


def _sketch(texts: Sequence[str], shingling: Shingling) -> Sketches:
    buffer, offsets = _normal(texts)
    if shingling.unit == "words":
        starts, ends = _words(buffer)
        letters: NDArray[Any] = mixed(_spans(buffer, starts, ends))
        bounds = np.searchsorted(starts, offsets)
        rows, first, last = _windows(bounds, shingling.size)
    else:
        letters = buffer
        marks = np.append(np.flatnonzero((buffer & 0xC0) != 0x80), len(buffer))  # first bytes of the characters
        rows, first, last = _windows(np.searchsorted(marks, offsets), shingling.size)
        first, last = marks[first], marks[last]
    hashes = mixed(_spans(letters, first, last)) & ~_NUMBER_BIT
    if shingling.unit == "words":
        numbers = _numbers(buffer, starts)
        rows = np.append(rows, np.searchsorted(bounds, numbers, side="right") - 1)
        hashes = np.append(hashes, mixed(letters[numbers]) | _NUMBER_BIT)
    shingles, lengths = _sets(rows, hashes, len(texts))
    whole, ends_at = buffer.tobytes(), offsets.tolist()
    digests = b"".join([xxhash.xxh3_128_digest(whole[a:b]) for a, b in itertools.pairwise(ends_at)])
    return Sketches(shingles, offsets_of(lengths), np.frombuffer(digests, np.uint8).reshape(-1, 16))


def _numbers(buffer: U8, starts: I64) -> I64:
    """Return indices of the words with a digit, ascending. buffer: (M,) bytes. starts: (W,) word starts."""
    digits = np.flatnonzero(buffer - np.uint8(ord("0")) < 10)
    words = np.searchsorted(starts, digits, side="right") - 1
    return words[np.append(True, words[1:] != words[:-1])] if len(words) else words


def _windows(bounds: I64, size: int) -> tuple[I64, I64, I64]:
    """Return row, first letter and end of each run of `size` letters, (R,) each.

    bounds: (N + 1,) row i is `letters[bounds[i]:bounds[i + 1]]`. A shorter row is one run; an empty row has none.
    """
    counts = np.diff(bounds)
    runs = np.where(counts == 0, 0, np.maximum(counts - size + 1, 1))
    rows = np.repeat(np.arange(len(runs)), runs)
    first = np.arange(len(rows)) + (bounds[:-1] - offsets_of(runs)[:-1])[rows]
    return rows, first, np.minimum(first + size, bounds[1:][rows])


def _sets(rows: I64, hashes: U64, count: int) -> tuple[U32, I64]:
    """Return (S,) sorted sets of 32-bit hashes, row after row, and the (N,) sizes of the sets.

    rows, hashes: (R,) each; the upper 32 bits of the hashes are used.
    """
    keys = (rows.astype(np.uint64) << np.uint64(32)) | (hashes >> np.uint64(32))
    keys.sort()
    new = np.ones(len(keys), bool)
    np.not_equal(keys[1:], keys[:-1], out=new[1:])
    keys = keys[new]
    return keys.astype(np.uint32), np.bincount((keys >> np.uint64(32)).astype(np.int64), minlength=count)


def _spans(letters: NDArray[Any], starts: I64, ends: I64) -> U64:
    """Return (R,) polynomial hashes of `letters[starts[i]:ends[i]]` modulo 2^64 (Rabin-Karp).

    Apply `mixed` to the result.
    """
    # With base b and prefix sums P_k = sum_{i < k} x_i b^i, all modulo 2^64:
    #   hash(s, e) = (P_e - P_s) b^-s + (e - s) b
    power, inverse = _powers(1 << max(16, len(letters).bit_length()))
    prefix = np.zeros(len(letters) + 1, np.uint64)
    np.cumsum(letters.astype(np.uint64) * power[: len(letters)], out=prefix[1:])
    return (prefix[ends] - prefix[starts]) * inverse[starts] + (ends - starts).astype(np.uint64) * np.uint64(_BASE)


@lru_cache(2)
def _powers(count: int) -> tuple[U64, U64]:
    """Return (count,) powers of the base and of its inverse, modulo 2^64."""
    return tuple(np.multiply.accumulate(np.array([1] + [base] * (count - 1), np.uint64)) for base in (_BASE, _INVERSE))  # type: ignore[return-value]


def _words(buffer: U8) -> tuple[I64, I64]:
    """Return (W,) starts and (W,) ends of the words of a normal form."""
    ends = np.flatnonzero(buffer == ord(" "))
    starts = np.zeros_like(ends)
    starts[1:] = ends[:-1] + 1
    return starts, ends


def _plain(text: str) -> bytes:
    """Return the UTF-8 of a text, prepared so that single bytes decide on word boundaries."""
    if text.isascii():
        return text.encode()
    text = unicodedata.normalize("NFKC", _ODD.sub(lambda match: _PLAIN[match[0]], text)).casefold()
    text = " ".join(text.split())  # replaces non-ASCII spaces
    return _ALONE.sub(r" \1 ", text).encode("utf-8", "replace")


@cache
def _classes() -> tuple[U8, U8]:
    """Return (256,) the class of each byte, and (256,) the byte in lower case.

    Bytes of non-ASCII characters are letters.
    """
    classes = np.full(256, _SYMBOL, np.uint8)
    classes[: ord(" ") + 1] = _SPACE
    classes[127] = _SPACE
    classes[128:] = _WORD
    for characters, kind in (("abcdefghijklmnopqrstuvwxyz_", _WORD), ("0123456789", _DIGIT), (".,;:!?", _STOP)):
        classes[list(characters.encode())] = kind
    for characters, kind in (("\"'`", _QUOTE), (")]}", _CLOSING)):
        classes[list(characters.encode())] = kind
    lower = np.arange(256, dtype=np.uint8)
    lower[ord("A") : ord("Z") + 1] += 32
    classes[ord("A") : ord("Z") + 1] = _WORD
    return classes, lower


def _normal(texts: Sequence[str]) -> tuple[U8, I64]:
    """Return the normal form of N texts: (M,) bytes, one space after every word, and (N + 1,) row offsets."""
    # a space at both ends of every row, so that the class of a neighbouring byte never comes from another row
    parts = [_plain(text) for text in texts]
    raw = np.frombuffer(b" " + b"  ".join(parts) + b" ", np.uint8)
    lengths = np.fromiter(map(len, parts), np.int64, len(parts)) + 2
    lookup, lower = _classes()
    is_single, is_letter = _roles(raw, lookup[raw])
    ends_word = is_single | is_letter
    ends_word[:-1] &= ~(is_letter[:-1] & is_letter[1:])
    solid = is_single | is_letter
    # written[i]: bytes of output before raw byte i; a solid byte writes itself, the end of a word also a space
    written = np.zeros(len(raw) + 1, np.int64)
    np.cumsum(solid.view(np.uint8) + ends_word.view(np.uint8), out=written[1:])
    out = np.full(int(written[-1]), ord(" "), np.uint8)
    positions = np.flatnonzero(solid)
    out[written[positions]] = lower[raw[positions]]
    return out, written[offsets_of(lengths)]


def _roles(raw: U8, classes: U8) -> tuple[Mask, Mask]:
    """Return (M,) True for bytes that are single words, and (M,) True for letters of longer words.

    All other bytes separate words.
    """
    is_letter = (classes == _WORD) | (classes == _DIGIT)
    is_single = (classes == _SYMBOL) | (classes == _CLOSING)
    marks = np.flatnonzero((classes == _STOP) | (classes == _QUOTE))  # never the first or last byte, which are spaces
    mark_class, before, after = classes[marks], classes[marks - 1], classes[marks + 1]
    between_letters = is_letter[marks - 1] & is_letter[marks + 1]
    between_digits = (before == _DIGIT) & (after == _DIGIT)
    joins = (between_letters & ((raw[marks] == ord(".")) | (raw[marks] == ord("'")))) | (
        between_digits & (mark_class == _STOP)
    )
    counts = (mark_class == _STOP) & ~between_letters & ~np.isin(after, (_SPACE, _QUOTE, _CLOSING, _STOP))
    is_letter[marks[joins]] = True
    is_single[marks[counts]] = True
    return is_single, is_letter


LEVELS = 31
_TABLE_BITS = 22
CHUNK = 1 << 21
_COUNTED = 1 << 23


def spans(offsets: I64, rows: I64, max_shingles: int = CHUNK) -> Iterator[I64]:
    """Yield runs of `rows` (n,) whose sets have about `max_shingles` shingles together."""
    ends = np.cumsum(offsets[rows + 1] - offsets[rows])
    first = 0
    while first < len(rows):
        base = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, base + max_shingles, side="right")))
        yield rows[first:last]
        first = last


def shingle_positions(offsets: I64, rows: I64) -> tuple[I64 | slice, I64]:
    """Return the positions of the shingles of `rows` (n,), row after row, and (n,) the set sizes.

    The positions are (T,), or a slice if they are contiguous.
    """
    sizes = offsets[rows + 1] - offsets[rows]
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and (len(rows) == 1 or (np.diff(rows) == 1).all()):
        return slice(int(offsets[rows[0]]), int(offsets[rows[-1] + 1])), sizes
    ends = np.cumsum(sizes)
    return np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(offsets[rows] - (ends - sizes), sizes), sizes


@dataclass(frozen=True)
class FrequentShingles:
    """Common shingles.

    shingles: (C,) sorted. level: (C,) 1 at the limit, 2 more per doubling, at most LEVELS.
    """

    shingles: U32
    level: U8


def common_shingles(shingles: U32, offsets: I64, rows: I64, limit: int) -> FrequentShingles:
    """Return the shingles that are in more than `limit` of `rows` (n,).

    shingles: (S,). offsets: (N + 1,). The count is exact and the memory is bounded: a table first counts the upper
    bits of the hashes, and only shingles whose table entry exceeds the limit are counted one by one.
    """
    if len(rows) <= limit:
        return FrequentShingles(np.empty(0, np.uint32), np.empty(0, np.uint8))
    # the table also counts rows outside `rows`: this can only add candidates, and candidates are counted exactly
    shift = np.uint32(32 - _TABLE_BITS)
    table = np.zeros(1 << _TABLE_BITS, np.int64)
    for first in range(0, len(shingles), _COUNTED):
        table += np.bincount(shingles[first : first + _COUNTED] >> shift, minlength=len(table))
    suspicious = table > limit
    is_counted = np.zeros(len(offsets) - 1, bool)
    is_counted[rows] = True
    values, counts = np.empty(0, np.uint32), np.empty(0, np.int64)
    for first in range(0, len(shingles), CHUNK):
        chunk = np.asarray(shingles[first : first + CHUNK])
        positions = np.flatnonzero(suspicious[chunk >> shift])
        if len(rows) < len(is_counted):
            positions = positions[is_counted[np.searchsorted(offsets, positions + first, side="right") - 1]]
        new_values, new_counts = np.unique(chunk[positions], return_counts=True)
        values, inverse = np.unique(np.concatenate([values, new_values]), return_inverse=True)
        counts = np.bincount(inverse.ravel(), np.concatenate([counts, new_counts]), len(values)).astype(np.int64)
    is_common = counts > limit
    # level = 1 + floor(2 log2(count / limit))
    level = 1 + np.floor(2 * np.log2(counts[is_common] / limit))
    return FrequentShingles(values[is_common], np.minimum(level, LEVELS).astype(np.uint8))


def levels(shingles: U32, common: FrequentShingles) -> U8:
    """Return (S,) the level of each shingle; 0 if it is not common."""
    result = np.zeros(len(shingles), np.uint8)
    if not len(common.shingles):
        return result
    shift = np.uint32(32 - _TABLE_BITS)
    may_be_common = np.zeros(1 << _TABLE_BITS, bool)
    may_be_common[common.shingles >> shift] = True
    for first in range(0, len(shingles), CHUNK):
        chunk = np.asarray(shingles[first : first + CHUNK])
        candidates = np.flatnonzero(may_be_common[chunk >> shift])
        index = np.minimum(np.searchsorted(common.shingles, chunk[candidates]), len(common.shingles) - 1)
        result[first + candidates] = np.where(common.shingles[index] == chunk[candidates], common.level[index], 0)
    return result


# A common shingle counts as a row's text, not as a set phrase, if it is in at least half as many rows as the row's
# common shingles in the mean. Half as many rows are 2 levels less.
_CUT = 2


@dataclass(frozen=True)
class Sets:
    """Shingle sets of N rows, as in `Sketches`.

    shingles: (S,). offsets: (N + 1,). level: (S,) level of each shingle (`levels`).
    """

    shingles: U32
    offsets: I64
    level: U8

    @cached_property
    def own_sizes(self) -> I64:
        """Number of shingles of each row that are not common, (N,)."""
        return self.sums(lambda shingles, level: level == 0)

    @cached_property
    def number_sizes(self) -> I64:
        """Number of numbers of each row, (N,), for shingles of words."""
        return self.sums(lambda shingles, level: (shingles & NUMBER) > 0)

    @cached_property
    def common_cut(self) -> U8:
        """Level from which common shingles count as a row's text, (N,); 0 for a row without any."""
        total = self.sums(lambda shingles, level: level)
        common = np.diff(self.offsets) - self.own_sizes
        return np.where(common, np.maximum(np.round(total / np.maximum(common, 1)) - _CUT, 1), 0).astype(np.uint8)

    def sums(self, values_of: Any) -> I64:
        """Return (N,) sums over each row of `values_of(shingles, level)`.

        They are computed in stretches, so that memory-mapped sets stay on disk.
        """
        sums = np.zeros(len(self.offsets) - 1, np.int64)
        rows = np.searchsorted(self.offsets, np.arange(0, len(self.shingles), CHUNK), side="right") - 1
        for first, last in zip(rows, [*rows[1:], len(sums)], strict=True):
            begin, end = int(self.offsets[first]), int(self.offsets[last])
            values: NDArray[Any] = values_of(np.asarray(self.shingles[begin:end]), self.level[begin:end])
            total = np.zeros(end - begin + 1, np.int64)
            np.cumsum(values, out=total[1:])
            sums[first:last] = np.diff(total[self.offsets[first : last + 1] - begin])
        return sums
