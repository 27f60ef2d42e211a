"""A router that is ready: prompts, weights over them, a threshold. Plain arrays, written as .npz and JSON, never pickled."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sartor.agents.routing.features import F32, Dense, Features, Lexical
from sartor.core.errors import ArtifactError

SCHEMA = 1
NEIGHBOURS = 3
BASE = "base"


@dataclass(frozen=True)
class Judged:
    """What the router finds in one text. score: by agent, 0..1; nearest: by agent, (exemplar's id, likeness)."""

    score: Mapping[str, float]
    nearest: Mapping[str, tuple[str, float]]

    def best(self, openable: Collection[str]) -> list[tuple[str, float]]:
        """(agent, score) of those that may be chosen, the best first."""
        return sorted(((name, self.score[name]) for name in self.score if name in openable), key=lambda pair: -pair[1])


@dataclass(frozen=True)
class Fitted:
    """The classifier. `labels` says whose each of the N prompts is: an agent's place, or len(agents) for a general one.

    A text's logits are its likenesses to the prompts times `weights` (N, agents + 1), plus `intercept`: a linear classifier,
    said by the rows that it was fitted on. Its score for an agent is the probability times the mean likeness to the agent's
    NEIGHBOURS nearest prompts: what is like nothing that the agent has seen is not for it, whatever the classifier believes.
    """

    agents: tuple[str, ...]
    encoder: str
    digest: str
    threshold: float
    ids: tuple[str, ...]
    labels: Any
    lexical: Lexical
    dense: Dense | None
    features: Features
    weights: F32
    intercept: F32
    figures: Mapping[str, Any] = field(default_factory=dict)

    def judge(self, texts: Sequence[str], vectors: F32 | None = None) -> list[Judged]:
        """Each text judged; `vectors` are the encoder's (N, D), where the router has an encoder."""
        asked = Features(self.lexical(texts), self.dense(vectors) if self.dense is not None else None)
        likeness = asked.likeness(self.features)
        score = scores(likeness, likeness @ self.weights + self.intercept, self.labels)
        return [self._judged(*row) for row in zip(likeness, score, strict=True)]

    def _judged(self, likeness: F32, score: F32) -> Judged:
        nearest = {}
        for place, agent in enumerate(self.agents):
            own = np.flatnonzero(self.labels == place)
            best = own[np.argmax(likeness[own])]
            nearest[agent] = (self.ids[best], float(likeness[best]))
        return Judged(dict(zip(self.agents, map(float, score), strict=True)), nearest)

    def save(self, folder: Path) -> None:
        """Write `ENCODER.npz` and `ENCODER.json` below a folder of the team's own, each in one rename, the JSON last."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        words = self.features.words
        arrays = {"labels": self.labels, "weights": self.weights, "intercept": self.intercept, "rarity": self.lexical.weights}
        arrays |= {"data": words.data, "indices": words.indices, "indptr": words.indptr, "shape": np.array(words.shape)}
        if self.dense is not None:
            arrays |= {"mean": self.dense.mean, "scale": self.dense.scale, "dense": self.features.dense}
        said = {"schema": SCHEMA, "digest": self.digest, "encoder": self.encoder, "agents": self.agents, "ids": self.ids}
        said |= {"threshold": self.threshold, "figures": self.figures}
        stem = _stem(self.encoder)
        part = folder / f".{stem}.part-{os.getpid()}"
        try:
            with part.open("wb") as stream:
                np.savez(stream, **arrays)
            os.replace(part, folder / f"{stem}.npz")
            part.write_text(json.dumps(said), encoding="utf-8")
            os.replace(part, folder / f"{stem}.json")
        finally:
            part.unlink(missing_ok=True)


def scores(likeness: F32, logits: F32, labels: Any) -> F32:
    """(N, agents): probability times likeness. likeness: (N, M) to the prompts; logits: (N, agents + 1)."""
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    probability = raised / raised.sum(axis=1, keepdims=True)
    return probability[:, :-1] * np.maximum(neighbours(likeness, labels, logits.shape[1] - 1), 0)


def neighbours(likeness: F32, labels: Any, agents: int) -> F32:
    """(N, agents): mean likeness to the NEIGHBOURS nearest prompts of each agent (of as many as it has)."""
    found = []
    for place in range(agents):
        own = likeness[:, labels == place]
        most = min(NEIGHBOURS, own.shape[1])
        found.append(np.partition(own, own.shape[1] - most, axis=1)[:, own.shape[1] - most :].mean(axis=1))
    return np.stack(found, axis=1)


def open_fitted(folder: Path, encoder: str, digest: str) -> Fitted | None:
    """The router that `save` wrote for these exemplars; None if there is none. Raises ArtifactError for a damaged one."""
    import scipy.sparse

    stem = _stem(encoder)
    if not (folder / f"{stem}.json").is_file():
        return None
    try:
        said = json.loads((folder / f"{stem}.json").read_text(encoding="utf-8"))
        if (said["schema"], said["digest"], said["encoder"]) != (SCHEMA, digest, encoder):
            return None
        # numpy leaves a damaged file open
        stream = io.BytesIO((folder / f"{stem}.npz").read_bytes())
        with np.load(stream, allow_pickle=False) as arrays:
            found = dict(arrays)
        words = scipy.sparse.csr_matrix((found["data"], found["indices"], found["indptr"]), tuple(found["shape"]))
        has_encoder = "dense" in found
        fitted = Fitted(
            agents=tuple(said["agents"]),
            encoder=encoder,
            digest=digest,
            threshold=float(said["threshold"]),
            ids=tuple(said["ids"]),
            labels=found["labels"],
            lexical=Lexical(found["rarity"]),
            dense=Dense(found["mean"], found["scale"]) if has_encoder else None,
            features=Features(words, found["dense"] if has_encoder else None),
            weights=found["weights"],
            intercept=found["intercept"],
            figures=said["figures"],
        )
        _check(fitted)
    except (OSError, ValueError, KeyError, TypeError, EOFError, RecursionError, zipfile.BadZipFile) as error:
        raise ArtifactError(f"{folder / stem}.npz cannot be read: {error}", f"rm -r {folder}; it is made anew") from None
    return fitted


def _check(fitted: Fitted) -> None:
    """Raise ValueError where arrays of two writers stand beside each other."""
    rows, classes = len(fitted.ids), len(fitted.agents) + 1
    shapes = (fitted.labels.shape, fitted.weights.shape, fitted.intercept.shape, fitted.features.words.shape[0])
    if shapes != ((rows,), (rows, classes), (classes,), rows):
        raise ValueError(f"its arrays do not fit each other: {shapes}")


def _stem(encoder: str) -> str:
    """A file's name for an encoder, which may be a path."""
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in encoder)[-80:]
