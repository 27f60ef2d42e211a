"""TF-IDF and static encoders, nearest neighbours, and the choice of an encoder.

TF-IDF compares the words that texts share, not their meaning. It is fitted on the given texts, so vectors of two calls
are not comparable.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from sartor.core.encoder_registry import TextEncoder, open_encoder
from sartor.core.errors import MissingError, ModelError, missing_package
from sartor.core.records import Example
from sartor.core.remedies import restore_command

BITS = 16  # 2^16 columns for words, and as many for pieces of words
WIDTH = 256
FITTED = 20_000  # texts that the projection is fitted on; more would not change it
COMMON = 0.2  # lower bound of a column's weight, so that texts of only common words can be compared
CHUNK = 10_000
MOST_CHARACTERS = 20_000  # characters of a text that are read
_STOPS = re.compile(r"[.,;:!?\"'()\[\]{}\u2010-\u2027\u3001\u3002\uff01\uff0c\uff1f\u0964\u060c\u061f]+")


class Tfidf:
    """Latent semantic analysis (Deerwester et al. 1990) by a seeded randomised SVD (Halko et al. 2011)."""

    name = "tfidf"
    tokens = 0

    def __init__(self) -> None:
        self._cut = 0

    @property
    def cut(self) -> int:
        """Number of texts of the last `encode` that were longer than MOST_CHARACTERS."""
        return self._cut

    def encode(self, texts: Sequence[str]) -> Any:
        """Return the vectors of N texts, (N, D) float32, each of length 1, or 0 for a text without content.

        Up to WIDTH texts keep their exact cosines.
        """
        self._cut = sum(len(text) > MOST_CHARACTERS for text in texts)
        if not texts:
            return np.zeros((0, 1), dtype=np.float32)
        # X = (1 + log counts) * weights, (N, 2^17) sparse; vectors = X V with V (2^17, WIDTH), the right singular
        # vectors of a sample; for few texts, any vectors with the Gram matrix of the rows of X
        weights = np.maximum(rarity(texts), COMMON)
        if len(texts) <= WIDTH:
            vectors = _exact(counts(texts).multiply(weights).tocsr())
        else:
            turn = _fitted(texts, weights)
            vectors = np.vstack([(counts(chunk).multiply(weights).tocsr() @ turn) for chunk in chunks(texts)])
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return (vectors / np.where(lengths > 1e-6, lengths, 1)).astype(np.float32)


def chunks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yield the texts in chunks of CHUNK, which bounds the memory."""
    for start in range(0, len(texts), CHUNK):
        yield texts[start : start + CHUNK]


def counts(texts: Sequence[str]) -> Any:
    """Return damped counts 1 + log n of hashed terms, a sparse float32 matrix (N, 2^17).

    The terms are words, pairs of words, and pieces of 2 to 5 characters.
    """
    sparse, words, pieces = _parts()
    cut = [_STOPS.sub(" ", text[:MOST_CHARACTERS]) for text in texts]
    result = sparse.hstack([words.transform(cut), pieces.transform(cut)], format="csr", dtype=np.float32)
    result.data = 1 + np.log(result.data)
    return result


def _parts() -> tuple[Any, Any, Any]:
    try:
        import scipy.sparse
        from sklearn.feature_extraction.text import HashingVectorizer
    except ImportError:
        raise missing_package("scikit-learn") from None
    shared = {"n_features": 1 << BITS, "norm": None, "alternate_sign": False, "dtype": np.float32}
    words = HashingVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b", **shared)
    return scipy.sparse, words, HashingVectorizer(analyzer="char_wb", ngram_range=(2, 5), **shared)


def rarity(texts: Sequence[str]) -> Any:
    """Return the weight of each column, (1, D) float32: log((1 + N) / (1 + n)) for a term in n of N texts.

    The weight is 0 for a term in every text.
    """
    document_counts = np.zeros(2 << BITS, dtype=np.int64)
    for chunk in chunks(texts):
        document_counts += np.bincount(counts(chunk).indices, minlength=2 << BITS)
    return np.log((1 + len(texts)) / (1 + document_counts)).astype(np.float32)[None, :]


def _fitted(texts: Sequence[str], weights: Any) -> Any:
    from sklearn.utils.extmath import randomized_svd

    rows = np.random.default_rng(0).choice(len(texts), min(len(texts), FITTED), replace=False)
    sample = counts([texts[row] for row in np.sort(rows)]).multiply(weights).tocsr()
    used = np.unique(sample.indices)
    width = min(WIDTH, len(used))
    _, _, right = randomized_svd(_unit(sample[:, used]), width, n_iter=3, random_state=0)
    turn = np.zeros((2 << BITS, width), dtype=np.float32)
    turn[used] = right.T
    return turn


def _exact(rows: Any) -> Any:
    """Return dense vectors (N, N) with the cosines of N sparse rows.

    The Gram matrix of the rows, scaled to length 1, is G = Q diag(l) Q^T; the vectors are Q diag(sqrt(l)).
    """
    values, vectors = np.linalg.eigh((_unit(rows) @ _unit(rows).T).toarray().astype(np.float64))
    return vectors * np.sqrt(np.maximum(values, 0))


def _unit(rows: Any) -> Any:
    from sklearn.preprocessing import normalize

    return normalize(rows)


I64 = NDArray[np.int64]
F32 = NDArray[np.float32]
EXACT_ROWS = 50_000
_CELLS = 32_000_000  # entries in a block of the matrix of cosines


def nearest(vectors: F32, queries: I64, n_neighbours: int) -> Iterator[tuple[I64, I64, F32]]:
    """Yield (rows, neighbours, likeness) for blocks of B `queries`, nearest neighbours first.

    vectors: (N, D), each of length 1. queries: (Q,) row numbers. k: min(n_neighbours, N - 1).
    Yields shapes (B,), (B, k), (B, k). A row is not its own neighbour; likeness is the cosine.
    """
    n_neighbours = min(n_neighbours, len(vectors) - 1)
    if n_neighbours < 1:
        return
    search = _neighbours_exact if len(vectors) <= EXACT_ROWS else _graph(vectors)
    block = max(1, _CELLS // len(vectors))
    for start in range(0, len(queries), block):
        rows = queries[start : start + block]
        neighbours, likeness = search(vectors, rows, n_neighbours)
        yield rows, neighbours, likeness


class NearPairs:
    """Iterable of (a, b, cosine), a < b, for each row and its nearest rows above a threshold.

    Each row contributes its `n_neighbours` nearest rows with a cosine at or above the threshold; each pair occurs
    once, in the order of the rows. A row of zeros (an empty text) has no neighbours.
    crowded: after an iteration, the number of rows whose `n_neighbours` nearest were all at or above the threshold;
    there may be more of them.
    """

    def __init__(self, vectors: F32, threshold: float, n_neighbours: int) -> None:
        self._vectors, self._threshold, self._n_neighbours = vectors, threshold, n_neighbours
        self.crowded = 0

    def __iter__(self) -> Iterator[tuple[int, int, float]]:
        self.crowded = 0
        yielded: set[int] = set()
        count = len(self._vectors)
        nonzero_rows = np.flatnonzero(np.abs(self._vectors).sum(1) > 0)
        for rows, neighbours, likeness in nearest(self._vectors, nonzero_rows, self._n_neighbours):
            is_near = likeness >= self._threshold
            if is_near.shape[1] == self._n_neighbours:
                self.crowded += int(is_near.all(1).sum())
            near_rows, near_columns = np.nonzero(is_near)
            firsts = rows[near_rows].tolist()
            others = neighbours[near_rows, near_columns].tolist()
            scores = np.minimum(likeness[near_rows, near_columns], 1).tolist()
            for row, other, score in zip(firsts, others, scores, strict=True):
                a, b = min(row, other), max(row, other)
                if a * count + b not in yielded:
                    yielded.add(a * count + b)
                    yield a, b, score


def _neighbours_exact(vectors: F32, rows: I64, n_neighbours: int) -> tuple[I64, F32]:
    likeness = vectors[rows] @ vectors.T
    likeness[np.arange(len(rows)), rows] = -2
    if n_neighbours < len(vectors) - 1:
        neighbours = np.argpartition(-likeness, n_neighbours - 1, axis=1)[:, :n_neighbours]
    else:
        all_rows = np.arange(len(vectors), dtype=np.int64)
        neighbours = np.stack([np.delete(all_rows, row) for row in rows])
    scores = np.take_along_axis(likeness, neighbours, axis=1)
    # ties are ordered by row number, so that the order does not depend on the library
    order = np.lexsort((neighbours, -scores), axis=1)
    return np.take_along_axis(neighbours, order, axis=1), np.take_along_axis(scores, order, axis=1)


def _graph(vectors: F32) -> Any:
    try:
        from usearch.index import Index
    except ImportError:
        raise missing_package("usearch") from None
    index = Index(
        ndim=vectors.shape[1], metric="cos", dtype="f16", connectivity=16, expansion_add=64, expansion_search=64
    )
    # one thread: with more, the graph and so the result would depend on their timing
    index.add(np.arange(len(vectors)), vectors, threads=1)

    def search(_: F32, rows: I64, n_neighbours: int) -> tuple[I64, F32]:
        matches = index.search(vectors[rows], n_neighbours + 1)
        neighbours = np.array(matches.keys, np.int64).reshape(len(rows), -1)
        # the graph stores float16; the cosines are computed from the float32 vectors
        scores = np.einsum("bd,bkd->bk", vectors[rows], vectors[neighbours]).astype(np.float32)
        scores[neighbours == rows[:, None]] = -2
        order = np.lexsort((neighbours, -scores), axis=1)[:, :n_neighbours]
        return np.take_along_axis(neighbours, order, axis=1), np.take_along_axis(scores, order, axis=1)

    return search


def fits(path: Path) -> bool:
    """Return whether a directory holds a model2vec model, also as a sentence-transformers module."""
    for file, word in (("config.json", "model2vec"), ("modules.json", "StaticEmbedding")):
        if (path / file).is_file() and word in (path / file).read_text(encoding="utf-8", errors="replace"):
            return True
    return False


class StaticEncoder:
    """Encoder by the mean of a text's token vectors, scaled to length 1. No text is cut."""

    cut = 0
    tokens = 0

    def __init__(self, path: Path) -> None:
        try:
            from model2vec import StaticModel
        except ImportError:
            raise missing_package("model2vec", "static") from None
        try:
            self._model = StaticModel.from_pretrained(path, force_download=False)
        except Exception as error:  # its readers raise several types for truncated or missing files
            message = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            raise ModelError(
                f"{path} cannot be opened as a model2vec model: {message}",
                restore_command(path),
            ) from None
        self.name = f"model2vec {path.name}"

    def encode(self, texts: Sequence[str]) -> Any:
        """Return the vectors of N texts, (N, D) float32, each of length 1, or 0 for a text without content."""
        import numpy as np

        vectors = self._model.encode(list(texts), max_length=None, use_multiprocessing=False).astype(np.float32)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors / np.where(lengths > 0, lengths, 1)


MODEL_LIKENESS, TFIDF_LIKENESS = 0.8, 0.4


@dataclass(frozen=True)
class ChosenEncoder:
    """Encoder, with the reason for its choice."""

    encoder: TextEncoder
    reason: str

    @property
    def likeness(self) -> float:
        """Cosine from which a pair is worth a comparison; lower for TF-IDF, which sees only shared words."""
        return TFIDF_LIKENESS if self.encoder.name == "tfidf" else MODEL_LIKENESS

    def facts(self) -> dict[str, Any]:
        """Return the facts for the manifest and the card; `texts_cut` counts texts of the last `encode`."""
        return {"encoder": self.encoder.name, "encoder_because": self.reason, "texts_cut": self.encoder.cut}


def choose_encoder(name: str) -> ChosenEncoder:
    """Return the encoder of a name or directory; `auto` is minilm if it can be opened, else TF-IDF."""
    if name != "auto":
        return ChosenEncoder(open_encoder(name), "the recipe names it")
    try:
        return ChosenEncoder(open_encoder("minilm"), "auto: the asset minilm and torch are here")
    except MissingError as error:
        return ChosenEncoder(open_encoder("tfidf"), f"auto: {error.problem} ({error.remedy})")


class Texts(Sequence[str]):
    """Text column of a sketch as a sequence, read from its memory-mapped file on access."""

    def __init__(self, column: Any) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return list(self._column.slice(start, max(0, stop - start)).to_pylist()[::step])
        return str(self._column[index].as_py())

    def __iter__(self) -> Iterator[str]:
        for chunk in self._column.chunks:
            for start in range(0, len(chunk), 1024):
                yield from chunk.slice(start, 1024).to_pylist()


def prompt_text(example: Example) -> str:
    """Return the text of every message before the reply, without system messages."""
    return "\n".join(message.text for message in example.prompt if message.role != "system")[:MOST_CHARACTERS]


def is_cut(example: Example) -> bool:
    """Return whether the prompt or the reply is longer than a sketch stores."""
    prompt = sum(len(message.text) + 1 for message in example.prompt if message.role != "system") - 1
    return max(prompt, len(example.reply)) > MOST_CHARACTERS


def system_text(example: Example) -> str:
    """Return the text of the system messages."""
    return "\n".join(message.text for message in example.prompt if message.role == "system")[:MOST_CHARACTERS]
