"""Classifier of one agent, and its files.

It is a linear classifier, fitted by regularised least squares on the kernel of similarities (Rifkin, Yeo and Poggio
2003). One matrix is inverted. The scores of a classifier that has not seen a row, or a whole fold of rows, follow from
it without another fit.

If the engine's own base made the vectors, a file states the version of the arithmetic (core/numerics.py); one of
another version is made again.
"""

from __future__ import annotations

import io
import json
import shlex
import zipfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from sartor.core.errors import ArtifactError
from sartor.core.filesystem import PRIVATE, Content, write_file_atomic
from sartor.core.numerics import difference, numerics
from sartor.core.records import digest as digest_of
from sartor.serving.routing.exemplars import (
    FOLDS,
    MEASURED,
    ExemplarPrompt,
    Exemplars,
    Slices,
    digest,
    fold,
    general,
    near_misses,
    shortened,
    sliced,
)
from sartor.serving.routing.text_features import F32, Dense, Lexical, TextFeatures, neighbours, stacked


@dataclass(frozen=True)
class GeneralPrompts:
    """General prompts, G of them, with their features.

    folds: (G,) by the prompts' kind.
    likeness: (G, G) similarities.
    foreign: (G,) mean similarity to the nearest prompts of other folds, as a general prompt of an unlisted kind would
    have.
    """

    encoder: str
    lexical: Lexical
    dense: Dense | None
    general: TextFeatures
    folds: Any
    likeness: F32
    foreign: F32

    def features(self, texts: Sequence[str], vectors: F32 | None) -> TextFeatures:
        """Return the features of N texts. vectors: (N, D) of the encoder, None for words alone."""
        return TextFeatures(self.lexical(texts), self.dense(vectors) if self.dense is not None else None)


def general_texts() -> list[str]:
    """Return the general prompts as they are compared, in the order of GeneralPrompts."""
    return [shortened(prompt.text) for prompts in general().values() for prompt in prompts]


def make(encoder: str, vectors: F32 | None) -> GeneralPrompts:
    """Return the general prompts with their features.

    vectors: (G, D) of `general_texts()` by the encoder, None for words alone.
    """
    texts = general_texts()
    folds = np.array([fold(kind) for kind, prompts in general().items() for _ in prompts])
    lexical, dense = Lexical.of(texts), Dense.of(vectors) if vectors is not None else None
    features = TextFeatures(lexical(texts), dense(vectors) if dense is not None else None)
    likeness = features.likeness(features)
    foreign = np.zeros(len(texts), dtype=np.float32)
    for index in range(FOLDS):
        inside, outside = np.flatnonzero(folds == index), np.flatnonzero(folds != index)
        if len(inside) and len(outside):
            foreign[inside] = neighbours(likeness[np.ix_(inside, outside)])
    return GeneralPrompts(
        encoder, lexical=lexical, dense=dense, general=features, folds=folds, likeness=likeness, foreign=foreign
    )


# Most own prompts to fit on: fitting time grows with their cube, the time of a request with their number
MOST_FITTED = 300
MOST_HELD_OUT = 100
PENALTY = 0.3
# Without held-out prompts, one in LENT of the agent's own prompts is held out
LENT = 5


@dataclass(frozen=True)
class ClassifierRows:
    """Texts of an agent's classifier, in the order of its vectors.

    train: own prompts to fit on.
    nobodys: negatives to fit on.
    held_out: own prompts that are not fitted on.
    missed: near misses of the held-out prompts.
    measured: prompts of the Report.
    """

    train: tuple[ExemplarPrompt, ...]
    nobodys: tuple[str, ...]
    held_out: tuple[ExemplarPrompt, ...]
    missed: tuple[str, ...]
    measured: tuple[str, ...]

    @property
    def texts(self) -> list[str]:
        """Texts as they are compared."""
        parts = [
            [prompt.text for prompt in self.train],
            self.nobodys,
            [item.text for item in self.held_out],
            self.missed,
            self.measured,
        ]
        return [shortened(text) for part in parts for text in part]

    @property
    def bounds(self) -> list[slice]:
        """Position of each of the five groups among `texts`."""
        ends = np.cumsum([0, *(len(part) for part in vars(self).values())])
        return [slice(start, stop) for start, stop in zip(ends[:-1], ends[1:], strict=True)]


@dataclass(frozen=True)
class AgentClassifier:
    """Classifier of one agent.

    ids: of its own N prompts, whose features are `train_features`.
    words, dense, general, bias: weights of the score, which is about 1 for own prompts and -1 for others.
        score(x) = x_words . words (D,) + x_dense . dense (E,) + likeness(x, general prompts) . general (G,) + bias
        (with an encoder the first two terms are halved)
    held_out_features, near_miss_features: of held-out prompts, and of near misses of them.
    unseen: (2, G) score and similarity of each general prompt by a classifier that saw none of its fold. The score is
    nan for a prompt so near that it may be the agent's own subject.
    """

    digest: str
    ids: tuple[str, ...]
    train_features: TextFeatures
    words: Any
    dense: F32 | None
    general: F32
    bias: float
    held_out_features: TextFeatures
    near_miss_features: TextFeatures
    unseen: F32
    slices: Slices | None = None


def rows_of(exemplars: Exemplars) -> ClassifierRows:
    """Return the texts to fit an agent's classifier with."""
    train, held_out = exemplars.train[:MOST_FITTED], exemplars.held_out[:MOST_HELD_OUT]
    if not held_out and len(train) >= LENT:
        train, held_out = train[: -(len(train) // LENT)], train[len(train) - len(train) // LENT :]
    nobodys = (*(prompt.text for prompt in exemplars.other), *near_misses(train))
    measured = exemplars.gain.rows[:MEASURED] if exemplars.gain else ()
    return ClassifierRows(
        train=train,
        nobodys=nobodys,
        held_out=held_out,
        missed=tuple(near_misses(held_out)),
        measured=tuple(row.prompt for row in measured),
    )


def fit(exemplars: Exemplars, space: GeneralPrompts, vectors: F32 | None) -> AgentClassifier:
    """Return the fitted classifier of one agent, using one thread.

    vectors: (N, D) of `rows_of(exemplars).texts` by the encoder of `space`, None for words alone.
    """
    import scipy.linalg  # noqa: F401 - the limit below holds for libraries that are loaded by then
    import sklearn.linear_model  # noqa: F401

    with threadpool_limits(1):
        return _fit(exemplars, space, vectors)


def _fit(exemplars: Exemplars, space: GeneralPrompts, vectors: F32 | None) -> AgentClassifier:
    rows = rows_of(exemplars)
    features = space.features(rows.texts, vectors)
    train, nobodys, held_out, missed, measured = (features.at(bounds) for bounds in rows.bounds)
    to_general = train.likeness(space.general)
    general_rows = np.flatnonzero(~_near_agent_mask(train, to_general))
    fitted = stacked([train, nobodys])
    cross = fitted.likeness(space.general)[:, general_rows]
    # kernel over (own prompts, negatives, general prompts), (R, R); + 1 is a constant feature, the bias
    kernel = (
        np.block(
            [[fitted.likeness(fitted), cross], [cross.T, space.likeness[np.ix_(general_rows, general_rows)]]]
        ).astype(np.float64)
        + 1
    )
    target = np.where(np.arange(len(kernel)) < len(rows.train), 1.0, -1.0)
    inverse, weights = _solved(kernel, target)
    unseen = np.full((2, len(space.folds)), np.nan, dtype=np.float32)
    unseen[1] = neighbours(to_general.T)
    start = fitted.count
    for index in range(FOLDS):
        fold = np.flatnonzero(space.folds[general_rows] == index)
        if len(fold):
            # scores of a fit without the rows I of this fold: f_I = y_I - (inverse_II)^-1 weights_I
            block = start + fold
            left_out = np.linalg.solve(inverse[np.ix_(block, block)], weights[block])
            unseen[0, general_rows[fold]] = target[block] - left_out
    general = np.zeros(len(space.folds), dtype=np.float32)
    general[general_rows] = weights[start:]
    row_weights = weights[:start].astype(np.float32)
    return AgentClassifier(
        digest=digest(exemplars),
        ids=tuple(prompt.id for prompt in rows.train),
        train_features=train,
        words=fitted.words.T @ row_weights,
        dense=fitted.dense.T @ row_weights if fitted.dense is not None else None,
        general=general,
        bias=float(weights.sum()),
        held_out_features=held_out,
        near_miss_features=missed,
        unseen=unseen,
        slices=sliced(exemplars.gain, measured) if exemplars.gain else None,
    )


def _near_agent_mask(train: TextFeatures, to_general: F32) -> F32:
    """Return (G,) whether a general prompt is as similar to the agent's prompts as they are mutually.

    Such a prompt may be the agent's own subject.
    """
    likeness = train.likeness(train)
    np.fill_diagonal(likeness, -1)
    usual = np.median(neighbours(likeness)) if train.count > 1 else 1.0
    return np.asarray(neighbours(to_general.T) >= usual)


def _solved(kernel: Any, target: Any) -> tuple[Any, Any]:
    """Return (inverse, weights) of least squares in which positives and negatives have equal total weight.

    G = K + penalty * diag(1 / share);  inverse = G^-1 (R, R);  weights = G^-1 target (R,)
    """
    count, is_own = len(target), target > 0
    share = np.where(is_own, 0.5 / is_own.sum(), 0.5 / max(1, (~is_own).sum())) * count
    inverse = np.linalg.inv(kernel + PENALTY * np.diag(1 / share))
    return inverse, inverse @ target


def as_arrays(part: AgentClassifier) -> dict[str, Any]:
    """Return a classifier as plain arrays, for `from_arrays`."""
    used = np.flatnonzero(part.words)
    arrays = {"columns": used, "weights": part.words[used], "general": part.general, "unseen": part.unseen}
    arrays |= {"bias": np.array(part.bias), "width": np.array(part.words.shape[0])}
    for name, features in (
        ("own", part.train_features),
        ("held", part.held_out_features),
        ("missed", part.near_miss_features),
    ):
        arrays |= features.as_arrays(name)
    if part.dense is not None:
        arrays["dense"] = part.dense
    return arrays | (part.slices.as_arrays() if part.slices else {})


def from_arrays(digest: str, ids: tuple[str, ...], arrays: Mapping[str, Any]) -> AgentClassifier:
    """Return the classifier from the result of `as_arrays`. Raises ValueError for inconsistent arrays."""
    words = np.zeros(int(arrays["width"]), dtype=np.float32)
    words[arrays["columns"]] = arrays["weights"]
    train, held_out, missed = (TextFeatures.from_arrays(name, arrays) for name in ("own", "held", "missed"))
    part = AgentClassifier(
        digest=digest,
        ids=ids,
        train_features=train,
        words=words,
        dense=arrays.get("dense"),
        general=arrays["general"],
        bias=float(arrays["bias"]),
        held_out_features=held_out,
        near_miss_features=missed,
        unseen=arrays["unseen"],
        slices=Slices.from_arrays(arrays) if "slice_of" in arrays else None,
    )
    if (
        train.count != len(ids)
        or part.unseen.shape != (2, len(part.general))
        or (part.dense is None) != (train.dense is None)
    ):
        raise ValueError(f"its arrays do not fit each other: {train.count} prompts, {len(ids)} ids")
    return part


SCHEMA = 2
GENERAL = "general"


def save_part(folder: Path, encoder: str, part: AgentClassifier, dtype: str = "") -> None:
    """Write one agent's classifier.

    dtype: in which Sartor's engine made the encoder's vectors; empty if another library made them.
    """
    _save(_file(folder, encoder, part.digest), part.digest, as_arrays(part), {"ids": part.ids, **_made_by(dtype)})


def open_part(folder: Path, encoder: str, digest: str, dtype: str = "") -> AgentClassifier | None:
    """Return the stored classifier of these exemplars; None if absent or of another arithmetic in `dtype`.

    Raises ArtifactError for a damaged file.
    """
    file = _file(folder, encoder, digest)
    loaded = _open(file, digest, dtype)
    if loaded is None:
        return None
    arrays, fields = loaded
    try:
        return from_arrays(digest, tuple(fields["ids"]), arrays)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise _damaged(file, error) from None


def save_vectors(folder: Path, encoder: str, digest: str, vectors: Any, dtype: str = "") -> None:
    """Write an encoder's vectors (G, D) of the general prompts. dtype: as in `save_part`."""
    _save(_file(folder, encoder, GENERAL), digest, {"vectors": vectors}, _made_by(dtype))


def open_vectors(folder: Path, encoder: str, digest: str, dtype: str = "") -> Any:
    """Return the stored vectors (G, D); None if there are none with this digest and arithmetic.

    Raises ArtifactError for a damaged file.
    """
    loaded = _open(_file(folder, encoder, GENERAL), digest, dtype)
    return None if loaded is None else loaded[0].get("vectors")


def save_figures(folder: Path, encoder: str, figures: Mapping[str, Any]) -> None:
    """Write a router's held-out figures for a reader: `figures.json` beside its classifiers."""
    _write(_file(folder, encoder, GENERAL).with_name("figures.json"), json.dumps(figures, indent=1).encode())


def keep_only(folder: Path, digests: Collection[str]) -> None:
    """Remove the classifiers of other agents, because they hold texts of those agents' prompts."""
    stems = {GENERAL, *(_name(digest) for digest in digests)}
    for file in folder.glob("*/*.npz"):
        if file.stem not in stems:
            file.unlink(missing_ok=True)
    for file in (*folder.glob("*.npz"), *folder.glob("*.json")):  # files of older versions
        file.unlink(missing_ok=True)


def _save(file: Path, digest: str, arrays: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    header = json.dumps({"schema": SCHEMA, "digest": digest, **fields})
    _write(file, lambda stream: np.savez(stream, **arrays, said=np.frombuffer(header.encode(), dtype=np.uint8)))


def _made_by(dtype: str) -> dict[str, Any]:
    return {"dtype": dtype, "numerics": numerics(dtype)} if dtype else {}


def _open(file: Path, digest: str, dtype: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    if not file.is_file():
        return None
    try:
        # read into memory first, because numpy leaves a damaged file open
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as arrays:
            loaded = dict(arrays)
        fields = json.loads(loaded.pop("said").tobytes())
        is_current = not dtype or not difference(fields.get("numerics"), str(fields.get("dtype", dtype)))
        return (loaded, fields) if is_current and (fields["schema"], fields["digest"]) == (SCHEMA, digest) else None
    except (OSError, ValueError, KeyError, TypeError, EOFError, RecursionError, zipfile.BadZipFile) as error:
        raise _damaged(file, error) from None


def _damaged(file: Path, error: Exception) -> ArtifactError:
    return ArtifactError(f"{file} cannot be read: {error}", f"rm {shlex.quote(str(file))}; it is made anew")


def _file(folder: Path, encoder: str, digest: str) -> Path:
    """Return the path of a file, in a folder named for the encoder, which may itself be a path."""
    stem = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in encoder)[-64:]
    return folder / f"{stem}-{digest_of(encoder)[:8]}" / f"{_name(digest)}.npz"


def _write(file: Path, content: Content) -> None:
    """Write a file in a folder that only the team may read."""
    write_file_atomic(file, content, mode=PRIVATE)


def _name(digest: str) -> str:
    return digest[:32]
