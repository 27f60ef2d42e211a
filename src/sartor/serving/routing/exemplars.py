"""Router training prompts, hard negatives, measured gain.

A request needs no specialist if the Report shows no gain over the base. The whole Report is judged by its interval, as
the gate does. A slice of it has few rows and is judged by its mean: the base gets a slice of at least SLICE_LEAST rows
in which the agent was on average no better.

Users also quote commands, ask what a word means, or report about yesterday. Exemplars lack such prompts, so some of
them are put into such frames, always the same ones, and serve as negatives.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sartor.core import parquet_io, records, strict_json
from sartor.core.artifacts import MANIFESTS, MOST_NESTED
from sartor.core.errors import ArtifactError
from sartor.core.records import digest as records_digest
from sartor.evaluate.metrics import LOWER_IS_BETTER
from sartor.evaluate.training_facts import EXEMPLARS, OTHER
from sartor.release.gate import check_gain as checked
from sartor.serving.routing.text_features import TextFeatures, neighbours_of

# Most rows of a Report that are used; average rows of a slice; fewest rows of a slice that is judged
MEASURED = 200
SLICE_ROWS = 30
SLICE_LEAST = 10
REPORT_ROWS = "report/rows.parquet"
# Row-level column of a metric that is defined only for the whole set
BY_ROW = {"macro_f1": "accuracy"}


@dataclass(frozen=True)
class MeasuredRow:
    """Row of a Report.

    label: its class, empty without one.
    gain: by how much the tuned reply was better than the base's.
    """

    prompt: str
    label: str
    gain: float


@dataclass(frozen=True)
class Gain:
    """Gain of an agent over the base in its Report.

    is_shown: whether the primary metric's interval lies on the better side of 0.
    detail: the figures in a sentence.
    """

    is_shown: bool
    detail: str
    rows: tuple[MeasuredRow, ...] = ()


@dataclass(frozen=True)
class Slices:
    """Rows of a Report, cut into S slices.

    features: of M rows.
    slice_of: (M,) slice of each row.
    gain, size: (S,) mean gain and number of rows.
    """

    features: TextFeatures
    slice_of: Any
    gain: Any
    size: Any

    def nearest(self, features: TextFeatures) -> Any:
        """Return (N,) indices of the slices that the texts belong to."""
        return neighbours_of(features.likeness(self.features), self.slice_of, len(self.gain)).argmax(axis=1)

    def lacks_gain(self, index: int) -> bool:
        """Return whether the agent was no better than the base in a slice that is large enough."""
        return bool(self.size[index] >= SLICE_LEAST and self.gain[index] <= 0)

    def as_arrays(self) -> dict[str, Any]:
        """Return plain arrays, as `agent_classifier.as_arrays` does."""
        return {
            "slice_of": self.slice_of,
            "slice_gain": self.gain,
            "slice_size": self.size,
            **self.features.as_arrays("slices"),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> Slices:
        """Return the slices from the result of `as_arrays`."""
        return cls(
            TextFeatures.from_arrays("slices", arrays), arrays["slice_of"], arrays["slice_gain"], arrays["slice_size"]
        )


def _read_listed(release: Path, manifest: Mapping[str, Any], name: str) -> bytes | None:
    """Return a file of a Release if its signed manifest lists it, else None: what lies beside it is nobody's.

    Raises ArtifactError if it is not the listed file.
    """
    entry = manifest["files"].get(name)
    if entry is None:
        return None
    try:
        if (size := (release / name).stat().st_size) != entry["bytes"]:
            raise ValueError(f"{size:,} bytes instead of {entry['bytes']:,}")
        content = (release / name).read_bytes()
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise ValueError("its sha256 is another one")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{release / name} is not the file that the manifest lists: {error}", f"cp -r BACKUP/. {release}"
        ) from None
    return content


def _read_manifest(release: Path) -> dict[str, Any] | None:
    """Return release.json, None without one. Its signature was checked at admission. Raises ArtifactError."""
    file = release / MANIFESTS["release"]
    if not file.is_file():
        return None
    try:
        manifest = strict_json.loads(file.read_bytes(), max_nested=MOST_NESTED)
        if not isinstance(manifest["files"], dict):
            raise TypeError("`files` is no mapping")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{file} is not a manifest: {error}", f"cp -r BACKUP/. {release}") from None
    return dict(manifest)


def read_measured_gain(release: Path) -> Gain | None:
    """Return the gain in the Report of a Release; None without a manifest, or if it lists no rows of a Report.

    Raises ArtifactError for an invalid form.
    """
    manifest = _read_manifest(release)
    table = _read_listed(release, manifest, REPORT_ROWS) if manifest else None
    if manifest is None or table is None:
        return None
    try:
        name = manifest["primary"]
        check = checked(name, manifest["metrics"][name])
        column, sign = BY_ROW.get(name, name), -1 if name in LOWER_IS_BETTER else 1
        rows = parquet_io.read_file(release / REPORT_ROWS, table)
        measured_rows = [
            MeasuredRow(
                row["prompt"], str(row.get("label") or ""), sign * (row[f"tuned_{column}"] - row[f"base_{column}"])
            )
            for row in rows
            if row["prompt"].strip() and row.get(f"base_{column}") is not None and not row.get("media")
        ]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"the Report of {release.name} cannot be read: {error}",
            "sartor evaluate ADAPTER --replace, then sartor release ADAPTER --name NAME --version NEW --key KEYS",
        ) from None
    return Gain(check.outcome == "pass", check.detail, tuple(measured_rows))


def sliced(gain: Gain, features: TextFeatures) -> Slices | None:
    """Return the rows in slices by class, or else by similarity (average linkage).

    None for fewer than two slices.
    """
    rows = gain.rows[: features.count]
    labels = [row.label for row in rows]
    if any(labels):
        label_index = {label: index for index, label in enumerate(dict.fromkeys(labels))}
        slice_of = np.array([label_index[label] for label in labels])
    elif len(rows) >= 2 * SLICE_ROWS:
        from sklearn.cluster import AgglomerativeClustering

        distances = 1 - features.likeness(features).astype(np.float64)
        clustering = AgglomerativeClustering(len(rows) // SLICE_ROWS, metric="precomputed", linkage="average")
        slice_of = clustering.fit_predict((distances + distances.T) / 2)
    else:
        return None
    size = np.bincount(slice_of)
    if len(size) < 2:
        return None
    mean_gain = np.bincount(slice_of, [row.gain for row in rows]) / size
    return Slices(features, slice_of, mean_gain, size)


MOST_BYTES = 4 << 20
MOST_LINES = 2_000
# Most characters of a text; a longer one keeps its beginning and end, where questions usually are
MOST_CHARACTERS = 2_000
FOLDS = 5


@dataclass(frozen=True)
class ExemplarPrompt:
    """Prompt of an exemplar, with its location `agent:line` in the Release's file."""

    id: str
    text: str


@dataclass(frozen=True)
class Exemplars:
    """Exemplar prompts of one agent.

    train: prompts from its tuning.
    held_out: prompts that its tuning never saw.
    other: prompts among its rows that are not for it.
    gain: measured by its Report; None without one.
    """

    train: tuple[ExemplarPrompt, ...] = ()
    held_out: tuple[ExemplarPrompt, ...] = ()
    other: tuple[ExemplarPrompt, ...] = ()
    gain: Gain | None = None


def read_exemplars(release: Path, agent: str) -> Exemplars:
    """Return the exemplars and the measured gain of a Release.

    Empty for one whose manifest lists no exemplars (`sartor release --exemplars 0`, or an older Release).
    Raises ArtifactError for a file with another form.
    """
    file = release / EXEMPLARS
    manifest = _read_manifest(release)
    content = _read_listed(release, manifest, EXEMPLARS) if manifest else None
    if content is None:
        return Exemplars()
    remedy = "sartor release ADAPTER --name NAME --version NEW --key KEYS"
    if len(content) > MOST_BYTES:
        raise ArtifactError(f"{file} has {len(content):,} bytes; at most {MOST_BYTES:,} are read", remedy)
    by_split: dict[str, list[ExemplarPrompt]] = {"train": [], "eval": [], OTHER: []}
    try:
        for number, line in enumerate(content.decode("utf-8").splitlines()[:MOST_LINES], 1):
            fields = json.loads(line)
            if text := str(fields["text"]).strip():
                by_split[fields["split"]].append(ExemplarPrompt(f"{agent}:{number}", text))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{file} is not a file of exemplars: {type(error).__name__}: {error}", remedy) from None
    return Exemplars(
        tuple(by_split["train"]), tuple(by_split["eval"]), tuple(by_split[OTHER]), read_measured_gain(release)
    )


@cache
def general() -> Mapping[str, tuple[ExemplarPrompt, ...]]:
    """Return Sartor's own general prompts by kind (general_prompts.yaml)."""
    text = (
        importlib.resources.files("sartor")
        .joinpath("serving/routing/general_prompts.yaml")
        .read_text(encoding="utf-8")
    )
    prompts_by_kind = {}
    for kind, prompts in yaml.safe_load(text).items():
        numbered = enumerate(prompts, 1)
        prompts_by_kind[kind] = tuple(ExemplarPrompt(f"{kind}:{number}", str(prompt)) for number, prompt in numbered)
    return prompts_by_kind


def digest(exemplars: Exemplars) -> str:
    """Return the digest of an agent's exemplars, its measured gain, and the general prompts."""
    parts = []
    for part in (exemplars.train, exemplars.held_out, exemplars.other):
        parts.append([(prompt.id, prompt.text) for prompt in part])
    gain = [(row.prompt, row.label, row.gain) for row in exemplars.gain.rows] if exemplars.gain else None
    return records.digest([parts, gain, general_digest()])


def general_digest() -> str:
    """Return the digest of the general prompts."""
    texts_by_kind = {}
    for kind, prompts in general().items():
        texts_by_kind[kind] = [prompt.text for prompt in prompts]
    return records.digest(texts_by_kind)


def fold(kind: str) -> int:
    """Return the index of the fold, of FOLDS, that a kind of general prompts belongs to."""
    return zlib.crc32(kind.encode()) % FOLDS


def shortened(text: str) -> str:
    """Return a text as it is compared: of a long one the beginning and the end."""
    text = text.encode("utf-8", "replace").decode().strip()  # replaces half a surrogate pair, which a client may send
    half = MOST_CHARACTERS // 2
    return text if len(text) <= MOST_CHARACTERS else f"{text[:half]} {text[-half:]}"


MOST_NEAR_MISSES = 60
FRAMES = (
    "Translate into French: {prompt}",
    "Where does the word {word} come from?",
    "Write a short story about {words}.",
    "Why would anybody say: {prompt}",
    "A friend of mine said yesterday: {prompt}",
    "I know a song called {words}, who sings it?",
    "How many letters are in the sentence: {prompt}",
    "What rhymes with {word}?",
    "I'm tired of hearing about {words} all day.",
    "Who first had the idea of {words}?",
)
_WORD = re.compile(r"[^\W\d_]{4,}")


def near_misses(prompts: Sequence[ExemplarPrompt], limit: int = MOST_NEAR_MISSES) -> list[str]:
    """Return a framed prompt for each of the first `limit` prompts.

    The prompt's digest selects frame and words.
    """
    framed = []
    for prompt in prompts[:limit]:
        text = prompt.text
        seed = int(records_digest(text), 16)
        words = list(dict.fromkeys(_WORD.findall(text.lower()))) or [text]
        first, second = words[(seed >> 8) % len(words)], words[(seed >> 24) % len(words)]
        phrase = f"{first} and {second}" if first != second else first
        framed.append(FRAMES[seed % len(FRAMES)].format(prompt=text, word=first, words=phrase))
    return framed
