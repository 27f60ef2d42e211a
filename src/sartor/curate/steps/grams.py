"""Hashes of word n-grams, whole arrays at a time, and an index that says which item's n-grams a row holds.

A word's hash is 64 bits of blake2b; that of an n-gram is a sum of its words' hashes, each times its own odd number, mod 2^64.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sartor.curate.steps.texts import words

SHORTEST = 5  # words of the shortest n-gram
WHOLE = 8  # a text of fewer words is looked for as a whole: by itself among the user's turns from this many on,
ALONE = 4  # and below that only with all the other texts of its item
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
    """The n-gram size for a text of `count` words: `ngram`, or less for a short text. 0: to be looked for as a whole."""
    if count < WHOLE:
        return 0
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

    def best(self, rows: Sequence[tuple[Sequence[str], Sequence[str]]]) -> list[tuple[int, float]]:
        """(item, overlap 0..1) of the entry that each row holds most of; (-1, 0.0) where it holds none.

        A row is (what the user says, what the assistant says).
        """
        said = [[words(text) for text in (*asked, *replies)] for asked, replies in rows]
        flat = [text for texts in said for text in texts]
        arrays = [self.hashes.of(text) for text in flat]
        row_of = np.repeat(np.arange(len(said)), [len(texts) for texts in said])
        hits: dict[int, set[int]] = defaultdict(set)  # row -> places in `grams`
        for size in self.sizes:
            for place, values in self._hits(arrays, size):
                hits[int(row_of[place])].update(values)
        return [self._best_of(hits.get(row, set()), said[row], len(rows[row][0])) for row in range(len(said))]

    def _hits(self, arrays: Sequence[Any], size: int) -> Iterable[tuple[int, list[int]]]:
        """(text, places in `grams`) for each text that has an n-gram of the index."""
        made = [ngrams(array, size) for array in arrays]
        lengths = [len(array) for array in made]
        if not sum(lengths):
            return
        whole = np.concatenate(made)
        low = np.searchsorted(self.grams, whole, "left")
        known = low < len(self.grams)
        known[known] = self.grams[low[known]] == whole[known]
        at = np.flatnonzero(known)
        texts = np.searchsorted(np.cumsum(lengths), at, "right")
        for place, text in zip(at, texts, strict=True):
            high = int(np.searchsorted(self.grams, whole[place], "right"))
            yield int(text), list(range(int(low[place]), high))

    def _best_of(self, hits: set[int], said: Sequence[Sequence[str]], asked: int) -> tuple[int, float]:
        best, overlap = -1, 0.0
        for entry, count in sorted(Counter(int(self.entries[place]) for place in hits).items()):
            if (share := count / int(self.totals[entry])) > overlap:
                best, overlap = int(self.items[entry]), share
        if overlap < 1 and self.whole:
            keys = [(" ".join(text),) for text in said[:asked] if len(text) < WHOLE]
            found = next((self.whole[key] for key in [*keys, _whole_key(said)] if key in self.whole), None)
            return (best, overlap) if found is None else (found, 1.0)
        return best, overlap


def _whole_key(said: Sequence[Sequence[str]]) -> tuple[str, ...]:
    return tuple(sorted(" ".join(text) for text in said)) if all(len(text) < WHOLE for text in said) else ()


@dataclass(frozen=True)
class Unfindable:
    """Items by number: those found only whole, and those of which every n-gram is common."""

    short: list[int]
    common: list[int]


def built(items: Sequence[Sequence[str]], ngram: int, hashes: WordHashes) -> tuple[Index, Unfindable]:
    """The index of items' texts, and which items it can not or hardly find."""
    grams, entries = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    owners: list[int] = []
    sizes: set[int] = set()
    whole: dict[tuple[str, ...], int] = {}
    short: list[int] = []
    for item, texts in enumerate(items):
        said = [text for text in map(words, texts) if text]
        for text in said:
            if not (size := size_for(len(text), ngram)):
                continue
            sizes.add(size)
            unique = np.unique(ngrams(hashes.of(text), size))
            grams.append(unique)
            entries.append(np.full(len(unique), len(owners), np.int64))
            owners.append(item)
        if said and not (owners and owners[-1] == item):
            short.append(item)
            whole.setdefault(_whole_key(said), item)
            for text in said:
                if len(text) >= ALONE:
                    whole.setdefault((" ".join(text),), item)
    owner = np.array(owners, np.int64)
    flat, flat_entries = _without_common(np.concatenate(grams), np.concatenate(entries), owner, len(items))
    totals = np.bincount(flat_entries, minlength=len(owners))
    common = sorted(set(owners) - {owners[entry] for entry in np.flatnonzero(totals)})
    return Index(hashes, sorted(sizes), flat, flat_entries, totals, owner, whole), Unfindable(short, common)


def _without_common(grams: Any, entries: Any, owner: Any, items: int) -> tuple[Any, Any]:
    """Both sorted by n-gram, without those that many items share."""
    if not len(grams):
        return grams, entries
    order = np.argsort(grams, kind="stable")
    grams, entries = grams[order], entries[order]
    _, inverse = np.unique(grams, return_inverse=True)
    pairs = np.unique(np.stack([inverse, owner[entries]], axis=1), axis=0)
    holders = np.bincount(pairs[:, 0])
    stays = holders[inverse] <= max(MOST_ITEMS, items // 100)
    return grams[stays], entries[stays]
