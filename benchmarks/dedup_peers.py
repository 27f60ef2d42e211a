"""Other de-duplicators on the same rows: each returns a class for every row, as Sartor's own side does.

A peer takes a threshold out of THRESHOLDS; dedup.py chooses it on text that is not scored. Sartor's side has the
defaults of `sartor dedup`, and is told nothing of the rows that the peers are not told.
"""

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


def sartor(texts: list[str]) -> list[int]:
    """The defaults of `sartor dedup`, by its core: each removed row is in the class of its survivor."""
    how = shingles.resolve("auto", 0, texts)
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


def datasketch(texts: list[str], threshold: float) -> list[int]:
    """text-dedup's MinHash: word 2-grams, 200 permutations, none verified; threshold: (1 / bands)^(1 / rows a
    band).
    """
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(num_perm=200, params=BANDS[threshold])
    pairs: list[tuple[int, int]] = []
    for row, text in enumerate(texts):
        sketch = MinHash(num_perm=200)
        sketch.update_batch([gram.encode() for gram in ngrams(text)])
        pairs += [(other, row) for other in index.query(sketch)]
        index.insert(row, sketch)
    return joined(len(texts), pairs)


def rensa_deduplicator(texts: list[str], threshold: float) -> list[int]:
    """rensa's RMinHashDeduplicator with LSH, a threshold of its estimate, 200 permutations in 50 bands, word
    2-grams.
    """
    index = rensa.RMinHashDeduplicator(threshold, 200, True, 50)
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
    """TF-IDF and 256 singular vectors of the rows themselves: stands in for a sentence encoder where no hub can be
    reached.
    """

    def __init__(self, texts: list[str]) -> None:
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer

        self._words = TfidfVectorizer(sublinear_tf=True, max_features=50_000)
        matrix = self._words.fit_transform(texts)
        self._directions = TruncatedSVD(min(256, matrix.shape[1] - 1), random_state=0).fit(matrix)

    def encode(self, inputs: list[str], **options: object) -> np.ndarray:
        return np.asarray(self._directions.transform(self._words.transform(list(inputs))), np.float32)


def semhash(texts: list[str], threshold: float) -> list[int]:
    """semhash with SvdEncoder; its fitting is in the time."""
    from semhash import SemHash

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        records = [{"row": str(row), "text": text} for row, text in enumerate(texts)]
        found = SemHash.from_records(records, columns=["text"], model=SvdEncoder(texts)).self_deduplicate(
            threshold=threshold
        )
        pairs = [(int(gone.record["row"]), int(gone.duplicate_of["row"])) for gone in found.filtered]
    return joined(len(texts), pairs)


# threshold of datasketch -> (bands, rows of a band); 0.38 is what text-dedup's CORE benchmark has
BANDS = {0.38: (50, 4), 0.51: (40, 5), 0.67: (25, 8), 0.79: (20, 10)}
# the first is what a peer's own benchmark or default has
THRESHOLDS: dict[str, tuple[float, ...]] = {
    "datasketch": (0.38, 0.51, 0.67, 0.79),
    "rensa": (0.65, 0.5, 0.8, 0.9),
    "semhash": (0.9, 0.8, 0.85, 0.95),
}
PEERS: dict[str, Callable[[list[str], float], list[int]]] = {
    "datasketch": datasketch,
    "rensa": rensa_deduplicator,
    "semhash": semhash,
}


def absent() -> dict[str, str]:
    """Name each peer that is not installed, with the command that installs it."""
    names = [name for name in PEERS if importlib.util.find_spec(name) is None]
    return {name: f"not installed: pip install {name} (or 'sartor[bench]')" for name in names}
