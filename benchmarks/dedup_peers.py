"""Other de-duplicators on the same rows: each returns a class for every row, as Sartor's own side does."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterable

import numpy as np
import rensa

from sartor.curate.dedup import clusters, near_duplicates, pair_scoring, shingles


def joined(count: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """Classes by union-find over pairs."""
    parent = list(range(count))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    for a, b in pairs:
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    return [root(row) for row in range(count)]


def sartor(texts: list[str], joined_fields: int = 0) -> list[int]:
    """The defaults of `sartor dedup`, by its core: each removed row is in the class of its survivor."""
    how = shingles.resolve("auto", 0, texts, joined_fields=joined_fields)
    rules = pair_scoring.rules_for(how)
    sketches = shingles.sketch(texts, how)
    rank = np.array([len(text) for text in texts])
    found = near_duplicates.near_duplicates(sketches.shingles, sketches.offsets, sketches.digests, rules, rank)
    removals = clusters.resolve_clusters(found.pairs, rank, rules)
    return joined(len(texts), zip(removals.rows.tolist(), removals.kept_rows.tolist(), strict=True))


def words_of(text: str) -> list[str]:
    return text.lower().split()


def ngrams(text: str, size: int = 2) -> set[str]:
    words = words_of(text)
    return {" ".join(words[at : at + size]) for at in range(max(1, len(words) - size + 1))}


def datasketch(texts: list[str]) -> list[int]:
    """text-dedup's MinHash as its CORE benchmark sets it: word 2-grams, 200 permutations, 50 x 4, no candidate verified."""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(num_perm=200, params=(50, 4))
    pairs: list[tuple[int, int]] = []
    for row, text in enumerate(texts):
        sketch = MinHash(num_perm=200)
        sketch.update_batch([gram.encode() for gram in ngrams(text)])
        pairs += [(other, row) for other in index.query(sketch)]
        index.insert(row, sketch)
    return joined(len(texts), pairs)


def rensa_deduplicator(texts: list[str]) -> list[int]:
    """rensa's RMinHashDeduplicator with LSH, threshold 0.65 of its estimate, 200 permutations in 50 bands, word 2-grams."""
    index = rensa.RMinHashDeduplicator(0.65, 200, True, 50)
    pairs: list[tuple[int, int]] = []
    for row, text in enumerate(texts):
        sketch = rensa.RMinHash(200, 42)
        sketch.update(list(ngrams(text)))
        twins = index.get_duplicates(sketch)
        pairs += [(int(other), row) for other in twins]
        if not twins:
            index.add(str(row), sketch)
    return joined(len(texts), pairs)


class SvdEncoder:
    """TF-IDF and 256 singular vectors of the rows themselves: stands in for a sentence encoder where no hub can be reached."""

    def __init__(self, texts: list[str]) -> None:
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer

        self._words = TfidfVectorizer(sublinear_tf=True, max_features=50_000)
        matrix = self._words.fit_transform(texts)
        self._directions = TruncatedSVD(min(256, matrix.shape[1] - 1), random_state=0).fit(matrix)

    def encode(self, inputs: list[str], **options: object) -> np.ndarray:
        return np.asarray(self._directions.transform(self._words.transform(list(inputs))), np.float32)


def semhash(texts: list[str]) -> list[int]:
    """semhash at its default threshold of 0.9, with SvdEncoder; its fitting is in the time."""
    from semhash import SemHash

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        records = [{"row": str(row), "text": text} for row, text in enumerate(texts)]
        found = SemHash.from_records(records, columns=["text"], model=SvdEncoder(texts)).self_deduplicate()
        pairs = [(int(gone.record["row"]), int(gone.duplicate_of["row"])) for gone in found.filtered]
    return joined(len(texts), pairs)


PEERS: dict[str, Callable[[list[str]], list[int]]] = {
    "datasketch": datasketch,
    "rensa": rensa_deduplicator,
    "semhash": semhash,
}


def absent() -> dict[str, str]:
    """Name each peer that is not installed, with the command that installs it."""
    names = [name for name in PEERS if importlib.util.find_spec(name) is None]
    return {name: f"not installed: pip install {name} (or 'sartor[bench]')" for name in names}
