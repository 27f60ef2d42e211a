"""Hashes of word n-grams, whole arrays at a time, and an index that says which item's n-grams a row holds.

A word's hash is 64 bits of blake2b; that of an n-gram is a sum of its words' hashes, each times its own odd number, mod 2^64.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sartor.text.example_text import words

SHORTEST = 5  # words of the shortest n-gram
WHOLE = 8  # words below which a text is not looked for by n-grams
ALONE = 4  # words from which on a turn of the user that is a text of an item shows the item
# An n-gram in more items than this (and than 1 % of them) is a common instruction or phrase.
MOST_ITEMS = 10
_REMEMBERED = 1_000_000


@dataclass
class WordHashes:
    """Words -> 64-bit hashes, remembered."""

    known: dict[str, int] = field(default_factory=dict)

    def of(self, said: Sequence[str]) -> Any:
        """uint64 array of the words' hashes."""
        if len(self.known) > _REMEMBERED:
            self.known.clear()
        return np.fromiter(map(self._one, said), np.uint64, len(said))

    def _one(self, word: str) -> int:
        value = self.known.get(word)
        if value is None:
            value = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
            self.known[word] = value
        return value


def ngrams(hashes: Any, size: int) -> Any:
    """uint64 hashes of the n-grams of `size` words over an array of word hashes; empty where there are fewer words."""
    count = len(hashes) - size + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    total = np.zeros(count, np.uint64)
    with np.errstate(over="ignore"):
        for shift in range(size):
            total += hashes[shift : shift + count] * _weight(shift)
    # sizes are told apart: a sum of 5 words must not equal one of 6 whose last hash is small
    return total ^ np.uint64(size * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF)


def _weight(shift: int) -> Any:
    return np.uint64(((shift + 1) * 0xD1B54A32D192ED03 * 2 + 1) & 0xFFFFFFFFFFFFFFFF)


def size_for(count: int, ngram: int) -> int:
    """The n-gram size for a text of `count` words, WHOLE or more: `ngram`, or less for a short one."""
    return ngram if count >= 2 * ngram else max(SHORTEST, min(ngram, count // 2))


@dataclass
class Index:
    """Texts of items by their n-grams. A text is one entry; an item may have several."""

    hashes: WordHashes
    sizes: list[int]
    grams: Any  # sorted uint64, each as often as entries hold it
    entries: Any  # the entry of each
    totals: Any  # n-grams of each entry
    items: Any  # the item of each entry
    whole: dict[tuple[str, ...], int]  # items that are found only whole: their texts
    mask: Any = field(init=False)  # of the bits of a hash that `sieve` is asked by
    sieve: Any = field(init=False)  # whether some n-gram has these bits: a look-up that spares most searches

    def __post_init__(self) -> None:
        self.mask = np.uint64((1 << max(16, (16 * len(self.grams)).bit_length())) - 1)
        self.sieve = np.zeros(int(self.mask) + 1, bool)
        self.sieve[self.grams & self.mask] = True

    def best(self, rows: Sequence[tuple[Sequence[str], Sequence[str]]]) -> list[tuple[int, float]]:
        """(item, overlap 0..1) of the entry that each row holds most of; (-1, 0.0) where it holds none.

        A row is (what the user says, what the assistant says).
        """
        said = [[words(text) for text in (*asked, *replies)] for asked, replies in rows]
        texts = [text for row in said for text in row]
        hashes = self.hashes.of([word for text in texts for word in text])
        text_of = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
        row_of = np.repeat(np.arange(len(said)), [len(row) for row in said])
        hits: dict[int, set[int]] = defaultdict(set)  # row -> places in `grams`
        for size in self.sizes:
            made = ngrams(hashes, size)
            # an n-gram that begins in one text and ends in another is none
            places = np.flatnonzero(self.sieve[made & self.mask] & (text_of[: len(made)] == text_of[size - 1 :][: len(made)]))
            low, high = (np.searchsorted(self.grams, made[places], side) for side in ("left", "right"))
            for place, start, end in zip(places, low, high, strict=True):
                hits[int(row_of[text_of[place]])].update(range(int(start), int(end)))
        return [self._best_of(hits.get(row, set()), said[row], len(rows[row][0])) for row in range(len(said))]

    def _best_of(self, hits: set[int], said: Sequence[Sequence[str]], asked: int) -> tuple[int, float]:
        best, overlap = -1, 0.0
        for entry, count in sorted(Counter(int(self.entries[place]) for place in hits).items()):
            if (share := count / int(self.totals[entry])) > overlap:
                best, overlap = int(self.items[entry]), share
        if overlap < 1 and self.whole:
            keys = [*((" ".join(text),) for text in said[:asked]), _whole_key(said)]
            found = next((self.whole[key] for key in keys if key in self.whole), None)
            return (best, overlap) if found is None else (found, 1.0)
        return best, overlap


def _whole_key(said: Sequence[Sequence[str]]) -> tuple[str, ...]:
    return tuple(sorted(" ".join(text) for text in said))


def built(items: Sequence[Sequence[str]], ngram: int, hashes: WordHashes) -> tuple[Index, list[int]]:
    """The index of items' texts, and the numbers of the items that can only be found whole."""
    said = [[text for text in map(words, texts) if text] for texts in items]
    arrays = [[hashes.of(text) for text in texts] for texts in said]
    common = _common(arrays)
    grams, entries = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    owners: list[int] = []
    sizes: set[int] = set()
    whole: dict[tuple[str, ...], int] = {}
    short: list[int] = []
    for item, texts in enumerate(arrays):
        for array in texts:
            runs = _own_runs(array, common)
            if not runs:
                continue
            made = [(size, ngrams(run, size)) for run in runs for size in (size_for(len(run), ngram),)]
            sizes.update(size for size, _ in made)
            unique = np.unique(np.concatenate([found for _, found in made]))
            grams.append(unique)
            entries.append(np.full(len(unique), len(owners), np.int64))
            owners.append(item)
        if texts and not (owners and owners[-1] == item):
            short.append(item)
            whole.setdefault(_whole_key(said[item]), item)
            for text in said[item]:
                if len(text) >= ALONE:
                    whole.setdefault((" ".join(text),), item)
    flat, flat_entries = np.concatenate(grams), np.concatenate(entries)
    order = np.argsort(flat, kind="stable")
    totals = np.bincount(flat_entries, minlength=len(owners))
    index = Index(hashes, sorted(sizes), flat[order], flat_entries[order], totals, np.array(owners, np.int64), whole)
    return index, short


def _common(arrays: Sequence[Sequence[Any]]) -> Any:
    """Sorted hashes of the shortest n-grams that stand in many items."""
    of_items = [np.unique(np.concatenate([ngrams(array, SHORTEST) for array in texts])) for texts in arrays if texts]
    if not of_items:
        return np.empty(0, np.uint64)
    found, counts = np.unique(np.concatenate(of_items), return_counts=True)
    return found[counts > max(MOST_ITEMS, len(arrays) // 100)]


def _own_runs(array: Any, common: Any) -> list[Any]:
    """The runs of at least WHOLE words of a text that are in no common n-gram."""
    is_common = np.zeros(len(array), bool)
    if len(common):
        for start in np.flatnonzero(np.isin(ngrams(array, SHORTEST), common)):
            is_common[start : start + SHORTEST] = True
    edges = np.flatnonzero(np.diff(np.concatenate([[True], is_common, [True]]).astype(np.int8)))
    return [array[start:end] for start, end in edges.reshape(-1, 2) if end - start >= WHOLE]
