"""Step contamination: drops rows of evaluation sets.

It compares word n-grams, as Brown et al. 2020 (arXiv:2005.14165, appendix C), who use 13 words. A row contains a text
of an item if at least `threshold` of the text's n-grams occur in the row. A text with fewer than twice `ngram` words
uses shorter n-grams (half its words, at least 5). Passages shared by many items, such as an instruction before each
question, do not count: those of at least 5 words in more than 10 items and more than 1 % of the items.

An item whose texts then have no run of at least 8 words is matched only as a whole. It matches a user turn that equals
one of its texts of at least 4 words, and a row whose texts are all of the item's texts.

The texts of a row with images or recordings say little, since many such rows ask the same. Such a row is dropped if an
item names one of its files, compared by digest.

Any format that a source may have is read as rows (question and answer are two texts). A row of no known format
contributes each of its text fields; a text or Markdown file contributes each of its paragraphs. Unreadable items are
counted per set.

A word's hash h(w) is 64 bits of blake2b. The hash of an n-gram is sum_j m_j h(w_j) mod 2^64 with a different odd
number m_j for each position, combined by XOR with a number for its size.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import itertools
import os
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path, PurePath
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from sartor.core import assets
from sartor.core.config import REQUIRED, option
from sartor.core.errors import ConfigError
from sartor.core.records import Example, MalformedRow, Origin
from sartor.curate.sources import media_files, row_formats, row_readers
from sartor.curate.sources.row_readers import Read
from sartor.curate.sources.safe_paths import open_regular
from sartor.curate.step import Removal, StepInput, StepResult
from sartor.curate.steps.media_filters import media_of
from sartor.text import example_text
from sartor.text.example_text import words

_HEAD_ROWS = 50
_MOST_BYTES = 64 << 20


@dataclass
class EvalSet:
    """One named evaluation set.

    items: (location such as `test.jsonl:12`, texts).
    media: SHA-256 of an image or recording -> number of the first item that names it.
    unread: reason -> number of unreadable items.
    """

    name: str
    items: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    media: dict[str, int] = field(default_factory=dict)
    unread: Counter[str] = field(default_factory=Counter)


def read_set(path: str) -> EvalSet:
    """Read the evaluation set at a path, or at `asset:NAME/path inside it`.

    Raises ConfigError if there is none, or if no item of it can be read.
    """
    eval_set = EvalSet(path)
    for file, name in files_of(path):
        for line, texts, digests in _items(file, eval_set.unread):
            for digest in digests:
                eval_set.media.setdefault(digest, len(eval_set.items))
            eval_set.items.append((f"{name}:{line}", texts))
    if not eval_set.items:
        reasons = ", ".join(f"{count} {reason}" for reason, count in eval_set.unread.items()) or "it is empty"
        raise ConfigError(
            f"the evaluation set {path!r} has no item that can be read: {reasons}", "give JSONL, CSV, Parquet or text"
        )
    return eval_set


def files_of(path: str) -> list[tuple[Path, str]]:
    """Return (file, name) of every file of a set.

    Raises ConfigError for a path that names none.
    """
    if path.startswith("asset:"):
        name, _, inner_path = path.removeprefix("asset:").partition("/")
        root = assets.install(name) / inner_path
        if not root.resolve().is_relative_to(assets.entry(name).directory.resolve()):
            raise ConfigError(f"{path!r} leaves the folder of its asset", "against: [asset:NAME/path]")
    else:
        root = Path(path).expanduser()
    if root.is_file():
        return [(root, root.name)]
    if root.is_dir():
        files = [
            file for file in sorted(root.rglob("*")) if file.is_file() and file.suffix.lower() in row_readers.READERS
        ]
    else:
        files = [Path(name) for name in sorted(glob.glob(str(root), recursive=True)) if Path(name).is_file()]
    if not files:
        raise ConfigError(
            f"against: {path!r} names no file",
            f"ls {shlex.quote(str(root.parent))}; the path is taken from the current directory",
        )
    return [(file, file.relative_to(root).as_posix() if root.is_dir() else file.name) for file in files]


def _items(file: Path, unread: Counter[str]) -> Iterator[tuple[str, tuple[str, ...], list[str]]]:
    """Yield (line, texts, SHA-256 of the media files that exist) of each item."""
    rows = row_readers.read_rows(file, _MOST_BYTES)
    if file.suffix.lower() in (".txt", ".md"):
        yield from _paragraphs(rows, unread)
        return
    head = list(itertools.islice(rows, _HEAD_ROWS))
    counts = Counter(form for _, row in head if isinstance(row, dict) and (form := row_formats.detect_row_format(row)))
    form = counts.most_common(1)[0][0] if counts else ""
    for line, row in itertools.chain(head, rows):
        digests: list[str] = []
        try:
            texts = _texts(row, form, partial(_record_digest, file.parent, digests))
        except MalformedRow as fault:
            unread[fault.reason] += 1
            continue
        if texts:
            yield line, texts, digests
        else:
            unread["no_text"] += 1


def _record_digest(folder: Path, digests: list[str], kind: str, value: str) -> str:
    """Append the digest of a medium to `digests`, if the medium can be read; return `value`."""
    with contextlib.suppress(MalformedRow, OSError):
        if value.startswith("data:"):
            digests.append(media_files.digest_of(media_files.of_data_url(kind, value)))
        else:
            with open_regular(media_files.locate(kind, value, folder)) as stream:
                digests.append(media_files.digest_of(stream))
    return value


def _texts(row: Any, form: str, media: row_formats.Media) -> tuple[str, ...]:
    """Return the texts of a row that count as an item.

    Raises MalformedRow.
    """
    if isinstance(row, MalformedRow):
        raise row
    if not isinstance(row, dict):
        raise MalformedRow("not_an_object", f"the row is a {type(row).__name__}")
    if form and row_formats.detect_row_format(row) == form:
        try:
            example = row_formats.parse_row(row, form, Origin("", ""), media)
        except MalformedRow:
            return tuple(_strings(row))  # a test item without an answer still counts
        questions = [message.text for message in example.messages if message.role == "user"]
        return tuple(text for text in (*questions, example.reply) if text.strip())
    return tuple(_strings(row))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str) and value.strip():
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def _paragraphs(rows: Read, unread: Counter[str]) -> Iterator[tuple[str, tuple[str, ...], list[str]]]:
    for _, row in rows:
        if isinstance(row, MalformedRow):
            unread[row.reason] += 1
            continue
        line = 1
        for paragraph in row["text"].split("\n\n"):
            if paragraph.strip():
                yield str(line), (paragraph,), []
            line += paragraph.count("\n") + 2


SHORTEST = 5  # words in the shortest n-gram
WHOLE = 8  # fewest words of a text that is searched by n-grams
ALONE = 4  # fewest words of a text that a user turn matches as a whole
# An n-gram in more items than this (and than 1 % of them) is a common instruction or phrase.
MOST_ITEMS = 10
_REMEMBERED = 1_000_000


@dataclass
class WordHashes:
    """64-bit hashes of words, with a cache."""

    known: dict[str, int] = field(default_factory=dict)

    def of(self, text_words: Sequence[str]) -> Any:
        """Return the hashes of N words, (N,) uint64."""
        if len(self.known) > _REMEMBERED:
            self.known.clear()
        return np.fromiter(map(self._hash, text_words), np.uint64, len(text_words))

    def _hash(self, word: str) -> int:
        value = self.known.get(word)
        if value is None:
            value = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
            self.known[word] = value
        return value


def ngrams(hashes: Any, size: int) -> Any:
    """Return the hashes of all n-grams of `size` words, (max(N - size + 1, 0),) uint64.

    hashes: (N,) uint64 word hashes.
    """
    count = len(hashes) - size + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    # g_i = sum_{j < size} m_j h_{i+j} mod 2^64, m_j odd
    total = np.zeros(count, np.uint64)
    with np.errstate(over="ignore"):
        for shift in range(size):
            multiplier = ((shift + 1) * 0xD1B54A32D192ED03 * 2 + 1) & 0xFFFFFFFFFFFFFFFF
            total += hashes[shift : shift + count] * np.uint64(multiplier)
    # XOR with a number for the size: a sum over 5 words must not equal one over 6 whose last hash is small
    return total ^ np.uint64(size * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF)


def size_for(count: int, ngram: int) -> int:
    """Return the n-gram size for a text of `count` >= WHOLE words: `ngram`, or less for a short text."""
    return ngram if count >= 2 * ngram else max(SHORTEST, min(ngram, count // 2))


@dataclass
class Index:
    """Inverted index from n-grams to the texts of items. A text is one entry; an item may have several."""

    hashes: WordHashes
    sizes: list[int]
    grams: Any  # (G,) uint64, sorted, once for each entry that contains it
    entries: Any  # (G,) entry of each n-gram
    totals: Any  # (E,) number of n-grams of each entry
    items: Any  # (E,) item of each entry
    whole: dict[tuple[str, ...], int]  # texts of the items that are matched only as a whole
    mask: Any = field(init=False)  # low bits of a hash that index `prefilter`
    prefilter: Any = field(init=False)  # whether some n-gram has these low bits; it avoids most binary searches

    def __post_init__(self) -> None:
        self.mask = np.uint64((1 << max(16, (16 * len(self.grams)).bit_length())) - 1)
        self.prefilter = np.zeros(int(self.mask) + 1, bool)
        self.prefilter[self.grams & self.mask] = True

    def best(self, rows: Sequence[tuple[Sequence[str], Sequence[str], Sequence[str]]]) -> list[tuple[int, float]]:
        """Return (item, overlap 0..1) of the entry with the largest overlap for each row; (-1, 0.0) without any.

        rows: (user texts, assistant texts, reasoning) of each row. Items have no reasoning, so that a whole match
        passes over it.
        """
        row_words = []
        texts: list[list[str]] = []
        for row_texts in rows:
            row_words.append([words(text) for part in row_texts for text in part])
            texts += row_words[-1]
        hashes = self.hashes.of([word for text in texts for word in text])
        text_of = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
        row_of = np.repeat(np.arange(len(row_words)), [len(row) for row in row_words])
        hits: dict[int, set[int]] = defaultdict(set)  # row -> positions in `grams`
        for size in self.sizes:
            grams = ngrams(hashes, size)
            # an n-gram that begins in one text and ends in another does not count
            positions = np.flatnonzero(
                self.prefilter[grams & self.mask] & (text_of[: len(grams)] == text_of[size - 1 :][: len(grams)])
            )
            low = np.searchsorted(self.grams, grams[positions], "left")
            high = np.searchsorted(self.grams, grams[positions], "right")
            for position, start, end in zip(positions, low, high, strict=True):
                hits[int(row_of[text_of[position]])].update(range(int(start), int(end)))
        return [
            self._best_of(hits.get(row, set()), row_words[row][: len(prompts) + len(replies)], len(prompts))
            for row, (prompts, replies, _) in enumerate(rows)
        ]

    def _best_of(self, hits: set[int], row_words: Sequence[Sequence[str]], prompt_count: int) -> tuple[int, float]:
        best, overlap = -1, 0.0
        for entry, count in sorted(Counter(int(self.entries[position]) for position in hits).items()):
            if (share := count / int(self.totals[entry])) > overlap:
                best, overlap = int(self.items[entry]), share
        if overlap < 1 and self.whole:
            keys = [*((" ".join(text),) for text in row_words[:prompt_count]), _whole_key(row_words)]
            item = next((self.whole[key] for key in keys if key in self.whole), None)
            return (best, overlap) if item is None else (item, 1.0)
        return best, overlap


def _whole_key(row_words: Sequence[Sequence[str]]) -> tuple[str, ...]:
    return tuple(sorted(" ".join(text) for text in row_words))


def build_index(items: Sequence[Sequence[str]], ngram: int, hashes: WordHashes) -> tuple[Index, list[int]]:
    """Return the index of the items' texts, and the numbers of the items that are matched only as a whole."""
    item_words, arrays = [], []
    for texts in items:
        text_words = [text for text in map(words, texts) if text]
        item_words.append(text_words)
        arrays.append([hashes.of(text) for text in text_words])
    common = _common(arrays)
    grams, entries = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    owners: list[int] = []
    sizes: set[int] = set()
    whole: dict[tuple[str, ...], int] = {}
    short: list[int] = []
    for item, item_arrays in enumerate(arrays):
        for array in item_arrays:
            runs = _uncommon_runs(array, common)
            if not runs:
                continue
            run_grams = []
            for run in runs:
                size = size_for(len(run), ngram)
                sizes.add(size)
                run_grams.append(ngrams(run, size))
            unique = np.unique(np.concatenate(run_grams))
            grams.append(unique)
            entries.append(np.full(len(unique), len(owners), np.int64))
            owners.append(item)
        if item_arrays and not (owners and owners[-1] == item):
            short.append(item)
            whole.setdefault(_whole_key(item_words[item]), item)
            for text in item_words[item]:
                if len(text) >= ALONE:
                    whole.setdefault((" ".join(text),), item)
    flat, flat_entries = np.concatenate(grams), np.concatenate(entries)
    order = np.argsort(flat, kind="stable")
    totals = np.bincount(flat_entries, minlength=len(owners))
    index = Index(
        hashes,
        sorted(sizes),
        grams=flat[order],
        entries=flat_entries[order],
        totals=totals,
        items=np.array(owners, np.int64),
        whole=whole,
    )
    return index, short


def _common(arrays: Sequence[Sequence[Any]]) -> Any:
    """Return the sorted hashes of the shortest n-grams that occur in many items."""
    of_items = []
    for item_arrays in arrays:
        if item_arrays:
            item_grams = np.concatenate([ngrams(array, SHORTEST) for array in item_arrays])
            of_items.append(np.unique(item_grams))
    if not of_items:
        return np.empty(0, np.uint64)
    unique_grams, counts = np.unique(np.concatenate(of_items), return_counts=True)
    return unique_grams[counts > max(MOST_ITEMS, len(arrays) // 100)]


def _uncommon_runs(array: Any, common: Any) -> list[Any]:
    """Return the runs of at least WHOLE words of a text outside all common n-grams."""
    is_common = np.zeros(len(array), bool)
    if len(common):
        for start in np.flatnonzero(np.isin(ngrams(array, SHORTEST), common)):
            is_common[start : start + SHORTEST] = True
    edges = np.flatnonzero(np.diff(np.concatenate([[True], is_common, [True]]).astype(np.int8)))
    return [array[start:end] for start, end in edges.reshape(-1, 2) if end - start >= WHOLE]


@dataclass(frozen=True)
class Contamination:
    """Drop rows that contain an item of an evaluation set."""

    against: tuple[str, ...] = option(REQUIRED, "evaluation sets: files, folders, glob patterns, or asset:NAME/path")
    ngram: int = option(13, "words of an n-gram; shorter items are looked for by shorter ones")
    threshold: float = option(0.5, "fraction of a text's n-grams that must stand in a row, above 0 up to 1")
    kind: Literal["contamination"] = "contamination"

    def __post_init__(self) -> None:
        if not self.against:
            raise ConfigError("against names no evaluation set", "against: [test.jsonl]")
        if not 5 <= self.ngram <= 100:
            raise ConfigError(f"ngram is {self.ngram}; it must be 5 to 100 words", "ngram: 13")
        if not 0 < self.threshold <= 1:
            raise ConfigError(f"threshold is {self.threshold}; it must be above 0, at most 1", "threshold: 0.5")

    def files(self) -> Sequence[Path]:
        """Return the files of the evaluation sets."""
        return [file for path in self.against for file, _ in files_of(path)]

    def sketch(self, examples: Sequence[Example], folder: Path) -> Any:
        """Return the columns item (best match, -1 for none), overlap (0..1) and is_file (has media)."""
        index = _index(self.against, self.ngram, _stamp(self.against))
        media: list[list[str]] = []
        row_texts: list[tuple[list[str], list[str], list[str]]] = []
        for example in examples:
            # SHA-256 digests of its images and recordings: their file names in a Dataset
            names = [PurePath(name).stem for kind in ("image", "audio") for name in media_of(example, kind)]
            media.append(names)
            if names:
                row_texts.append(([], [], []))
            else:
                prompts, replies = (
                    example_text.texts(example, field, with_reasoning=False) for field in ("prompt", "replies")
                )
                reasoning = [message.reasoning_content for message in example.messages if message.reasoning_content]
                row_texts.append((prompts, replies, reasoning))
        matches = [
            index.of_media(names) or best for names, best in zip(media, index.grams.best(row_texts), strict=True)
        ]
        return pa.table(
            {
                "item": pa.array([item for item, _ in matches], pa.int64()),
                "overlap": pa.array([overlap for _, overlap in matches], pa.float32()),
                "is_file": pa.array([bool(names) for names in media], pa.bool_()),
            }
        )

    def decide(self, step_input: StepInput) -> StepResult:
        """Return the removals of rows whose overlap reaches the threshold.

        Raises ConfigError if a set cannot be read.
        """
        index = _index(self.against, self.ngram, _stamp(self.against))
        items = step_input.table["item"].to_numpy()
        overlaps = step_input.table["overlap"].to_numpy()
        is_file = step_input.table["is_file"].to_pylist()
        removals, counts = [], Counter[str]()
        for row in np.flatnonzero((items >= 0) & (overlaps >= np.float32(self.threshold))):
            name, location = index.names[int(items[row])]
            counts[name] += 1
            overlap = float(overlaps[row])
            detail = f"{overlap:.0%} of {location} of the evaluation set {name} stands in it"
            method = f"word {self.ngram}-grams"
            if is_file[row]:
                detail, method = f"{location} of the evaluation set {name} names a file of it", "equal file"
            removals.append(Removal(int(row), "contamination", detail, score=overlap, method=method))
        facts = {
            "sets": [
                {
                    "name": eval_set.name,
                    "items": len(eval_set.items),
                    "found_only_whole": index.too_short[eval_set.name],
                    "unread": dict(eval_set.unread),
                    "rows": counts[eval_set.name],
                }
                for eval_set in index.sets
            ]
        }
        return StepResult(removals, facts=facts)


def _stamp(paths: tuple[str, ...]) -> tuple[Any, ...]:
    """Return modification time and size of each path, as a cache key.

    A path that is no file or folder, such as a pattern or an asset, has (0, 0).
    """
    stamps = []
    for path in paths:
        try:
            stat = os.stat(Path(path).expanduser())
            stamps.append((stat.st_mtime_ns, stat.st_size))
        except OSError:
            stamps.append((0, 0))
    return tuple(stamps)


@dataclass(frozen=True)
class _Index:
    """Evaluation sets with their search indexes."""

    sets: list[EvalSet]
    grams: Index
    names: list[tuple[str, str]]  # set and location of each item
    too_short: Counter[str]  # set -> number of items that are matched only as a whole
    media: dict[str, int]  # SHA-256 of a file -> number of the first item that names it

    def of_media(self, digests: Sequence[str]) -> tuple[int, float] | None:
        """Return (item, 1.0) for the first of the files that an item names, or None."""
        return next(((self.media[digest], 1.0) for digest in digests if digest in self.media), None)


@cache
def _index(paths: tuple[str, ...], ngram: int, stamp: tuple[Any, ...]) -> _Index:
    sets = [read_set(path) for path in paths]
    names = [(eval_set.name, location) for eval_set in sets for location, _ in eval_set.items]
    grams, short = build_index([texts for eval_set in sets for _, texts in eval_set.items], ngram, WordHashes())
    media: dict[str, int] = {}
    start = 0
    for eval_set in sets:
        media.update({digest: start + item for digest, item in eval_set.media.items()})
        start += len(eval_set.items)
    return _Index(sets, grams, names=names, too_short=Counter(names[item][0] for item in short), media=media)
