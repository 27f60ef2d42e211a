"""Index of texts by word and by run of words: BM25, and the texts that hold a run.

It consists of numpy arrays alone, which retrieval_store.py writes and maps back into memory. Nothing here imports
torch.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sartor.text import example_text

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]
U64 = NDArray[np.uint64]

# Okapi BM25's usual constants: saturation of a word's count, and weight of a text's length
K1, B = 1.2, 0.75
# words of a run; shorter ones are shared by chance
SPAN_WORDS = 3
_MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, so that the product with it is a bijection of 64-bit integers


@dataclass(frozen=True)
class PackedTexts(Sequence[bytes]):
    """N texts as bytes, laid end to end. content: (bytes,); starts: (N + 1,) where each begins."""

    content: U8
    starts: I64

    @classmethod
    def of(cls, texts: Iterable[bytes]) -> PackedTexts:
        """Return the texts laid end to end."""
        content, starts = bytearray(), array("q", [0])
        for text in texts:
            content += text
            starts.append(len(content))
        return cls(np.frombuffer(content, np.uint8), np.array(starts, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: Any) -> Any:
        return self.content[self.starts[index] : self.starts[index + 1]].tobytes()


@dataclass(frozen=True, eq=False)
class WordIndex:
    """Index of D texts with V words, by word and by run of SPAN_WORDS words.

    word_bytes, word_starts: the words in order, laid end to end (`PackedTexts`); a word's id is its place.
    tokens: (W,) word ids of all texts, laid end to end; starts: (D + 1,) where each text begins.
    entry_texts: (E,) the texts that hold each word, one word after another; entry_starts: (V + 1,) where each word
        begins; entry_weights: (E,) its BM25 weight in the text.
    rarity: (V,) of each word.
    run_codes: (R,) codes of all runs, sorted; run_texts: (R,) the text of each.
    """

    word_bytes: U8
    word_starts: I64
    tokens: I32
    starts: I64
    entry_texts: I32
    entry_starts: I64
    entry_weights: F32
    rarity: F64
    run_codes: U64
    run_texts: I32

    @classmethod
    def of(cls, texts: Iterable[str], *, with_runs: bool = True) -> WordIndex:
        """Index the texts; without runs of words if only `similarities` is wanted."""
        vocabulary: defaultdict[str, int] = defaultdict()
        vocabulary.default_factory = vocabulary.__len__  # a new word gets the next number
        numbers, starts = array("i"), array("q", [0])
        for text in texts:
            numbers.extend(map(vocabulary.__getitem__, example_text.words(text)))
            starts.append(len(numbers))
        ordered = sorted(vocabulary, key=_encoded)
        words = PackedTexts.of(map(_encoded, ordered))
        ids = np.empty(len(ordered), dtype=np.int32)
        ids[[vocabulary[word] for word in ordered]] = np.arange(len(ordered), dtype=np.int32)
        tokens = ids[np.array(numbers, dtype=np.int32)]
        lengths: I64 = np.diff(np.array(starts, dtype=np.int64)).astype(np.int64)
        entry_texts, entry_starts, repeats = _word_entries(tokens, lengths, len(ordered))
        n = np.diff(entry_starts)
        # rarity log(1 + (D - n + 1/2) / (n + 1/2)) of a word in n texts: Robertson and Sparck Jones's weight, kept
        # above 0 for words in most texts
        rarity = np.log1p((len(lengths) - n + 0.5) / (n + 0.5))
        saturated = _saturated(repeats, lengths[entry_texts], _mean_length(lengths))
        run_codes, run_texts = _runs(tokens, lengths if with_runs else lengths[:0])
        return cls(
            word_bytes=words.content,
            word_starts=words.starts,
            tokens=tokens,
            starts=np.array(starts, dtype=np.int64),
            entry_texts=entry_texts,
            entry_starts=entry_starts,
            entry_weights=(np.repeat(rarity, n) * saturated).astype(np.float32),
            rarity=rarity,
            run_codes=run_codes,
            run_texts=run_texts,
        )

    @property
    def count(self) -> int:
        """Number of texts, D."""
        return len(self.starts) - 1

    @cached_property
    def mean_length(self) -> float:
        """Mean number of words of a text, at least 1."""
        return _mean_length(np.diff(self.starts).astype(np.int64))

    def similarities(self, text: str) -> F64 | None:
        """Return the likeness (D,) of each text to `text` by BM25; None if it has no word.

        Words that no text holds count in full, so that few shared words among many are a small likeness.
        """
        repeats = Counter(example_text.words(text))
        if not repeats:
            return None
        scores, own_score = np.zeros(self.count), 0.0
        unseen_rarity = np.log1p((self.count + 0.5) / 0.5)
        for word, count in repeats.items():
            id = self._id(word)
            rarity = unseen_rarity if id < 0 else self.rarity[id]
            own_score += float(count * rarity * _saturated(count, repeats.total(), self.mean_length))
            if id >= 0:
                entries = slice(self.entry_starts[id], self.entry_starts[id + 1])
                scores[self.entry_texts[entries]] += self.entry_weights[entries] * np.float64(count)
        return np.clip(scores / own_score, 0, 1)

    def span_fractions(self, text: str) -> F64 | None:
        """Return the fraction (D,) of the text's runs that each indexed text holds, weighted by their rarity.

        None if it has fewer than SPAN_WORDS words.
        """
        words = example_text.words(text)
        if len(words) < SPAN_WORDS:
            return None
        fractions, total = np.zeros(self.count), 0.0
        runs = (tuple(words[start : start + SPAN_WORDS]) for start in range(len(words) - SPAN_WORDS + 1))
        # each once, in an order that does not depend on the process
        for run in dict.fromkeys(runs):
            holders = np.unique(self.holders(run))
            rarity = float(np.log1p((self.count - len(holders) + 0.5) / (len(holders) + 0.5)))
            fractions[holders] += rarity
            total += rarity
        return fractions / total

    def holders(self, run: Sequence[str]) -> I32:
        """Return the texts that hold a run of SPAN_WORDS words, one entry for each time."""
        ids = [self._id(word) for word in run]
        if min(ids) < 0:
            return self.run_texts[:0]
        code = _run_codes(np.array(ids, dtype=np.int32))[0]
        low, high = np.searchsorted(self.run_codes, code, "left"), np.searchsorted(self.run_codes, code, "right")
        return self.run_texts[low:high]

    def key(self, text: int) -> bytes:
        """Return the words of an indexed text as bytes: equal for equal words."""
        return self.tokens[self.starts[text] : self.starts[text + 1]].tobytes()

    def _id(self, word: str) -> int:
        """Return the id of a word; -1 if no text holds it."""
        words, encoded = PackedTexts(self.word_bytes, self.word_starts), _encoded(word)
        place = bisect_left(words, encoded)
        return place if place < len(words) and words[place] == encoded else -1


def _encoded(word: str) -> bytes:
    # a question from the command line may hold lone surrogates
    return word.encode("utf-8", "surrogatepass")


def _mean_length(lengths: I64) -> float:
    return max(float(lengths.mean()) if len(lengths) else 0.0, 1.0)


def _word_entries(tokens: I32, lengths: I64, words: int) -> tuple[I32, I64, I64]:
    """Return the texts (E,) that hold each word, where each word begins (V + 1,), and how often each text holds it."""
    texts = max(len(lengths), 1)
    owners = np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)
    pairs, repeats = np.unique(tokens.astype(np.int64) * texts + owners, return_counts=True)
    starts = np.zeros(words + 1, dtype=np.int64)
    np.cumsum(np.bincount(pairs // texts, minlength=words), out=starts[1:])
    return (pairs % texts).astype(np.int32), starts, repeats.astype(np.int64)


def _saturated(counts: Any, lengths: Any, mean_length: float) -> Any:
    """Return tf (K1 + 1) / (tf + K1 (1 - B + B length / mean length)) of counts tf in texts of these lengths."""
    return counts * (K1 + 1) / (counts + K1 * (1 - B + B * lengths / mean_length))


def _runs(tokens: I32, lengths: I64) -> tuple[U64, I32]:
    """Return the codes of all runs, sorted, and the text of each."""
    owners = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    codes = _run_codes(tokens[: len(owners)])
    # a run that begins in one text and ends in the next is none
    is_inside = owners[: len(codes)] == owners[len(owners) - len(codes) :]
    codes, owners = codes[is_inside], owners[: len(codes)][is_inside]
    order = np.argsort(codes, kind="stable")
    return codes[order], owners[order]


def _run_codes(tokens: I32) -> U64:
    """Return the hash of each run of SPAN_WORDS word ids, (max(0, W - SPAN_WORDS + 1),)."""
    count = max(0, len(tokens) - SPAN_WORDS + 1)
    codes = np.zeros(count, dtype=np.uint64)
    for offset in range(SPAN_WORDS):
        codes = (codes + tokens[offset : offset + count].astype(np.uint64) + np.uint64(1)) * _MIX  # modulo 2^64
        codes ^= codes >> np.uint64(29)
    return codes
