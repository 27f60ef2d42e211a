"""Step contamination: drops rows of evaluation sets.

Word n-grams, as in Brown et al. 2020 (arXiv:2005.14165, appendix C), there 13 words. A text of an item counts as found
in a row when at least `threshold` of its n-grams stand in the row; one of fewer than two times `ngram` words is looked
for by shorter n-grams (half its words, at least 5). Passages that many items share, such as an instruction before each
question, are
no part of an item: those of 5 words or more in over 10 items and over 1 % of them. An item of which fewer than 8 words
in a
row are left is found only whole: a turn of the user that is one of its texts, of 4 words or more, or a row whose texts
are all of the item's.

Of a row with pictures or recordings its texts say little, since many such rows ask the same: it goes where an item
names one of its files, by the files' digests.

Any form that a source may have is read as a row (its question and its answer are two texts). A row of no known form
gives each of its text fields; a text or Markdown file gives each of its paragraphs. What cannot be read is counted,
per set.

A word's hash is 64 bits of blake2b; that of an n-gram is a sum of its words' hashes, each times its own odd number,
mod 2^64.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import itertools
import os
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
    """One named set. `items`: (place such as `test.jsonl:12`, texts). `media`: sha256 of a picture or a recording ->
    number of the first item that names it. `unread` counts what could not be used, by reason.
    """

    name: str
    items: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    media: dict[str, int] = field(default_factory=dict)
    unread: Counter[str] = field(default_factory=Counter)


def read_set(path: str) -> EvalSet:
    """The set at a path, or `asset:NAME/path inside it`. Raises ConfigError when there is none or nothing in it can be
    used.
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
    """(file, name) of every file of a set. Raises ConfigError for a path that names none."""
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
            f"against: {path!r} names no file", f"ls {root.parent}; the path is taken from the current directory"
        )
    return [(file, file.relative_to(root).as_posix() if root.is_dir() else file.name) for file in files]


def _items(file: Path, unread: Counter[str]) -> Iterator[tuple[str, tuple[str, ...], list[str]]]:
    """(place, texts, sha256 of the media that lie where it says) of each item."""
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
    """Note the digest of a medium; one that is not there is the set's own affair."""
    with contextlib.suppress(MalformedRow, OSError):
        if value.startswith("data:"):
            digests.append(media_files.digest_of(media_files.of_data_url(kind, value)))
        else:
            with open_regular(media_files.locate(kind, value, folder)) as stream:
                digests.append(media_files.digest_of(stream))
    return value


def _texts(row: Any, form: str, media: row_formats.Media) -> tuple[str, ...]:
    """The texts of a row that count as items of an evaluation. Raises Malformed."""
    if isinstance(row, MalformedRow):
        raise row
    if not isinstance(row, dict):
        raise MalformedRow("not_an_object", f"the row is a {type(row).__name__}")
    if form and row_formats.detect_row_format(row) == form:
        try:
            example = row_formats.parse_row(row, form, Origin("", ""), media)
        except MalformedRow:
            return tuple(_strings(row))  # a test item without an answer is an item all the same
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

    def of(self, text_words: Sequence[str]) -> Any:
        """uint64 array of the words' hashes."""
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
    prefilter: Any = field(init=False)  # whether some n-gram has these bits: a look-up that spares most searches

    def __post_init__(self) -> None:
        self.mask = np.uint64((1 << max(16, (16 * len(self.grams)).bit_length())) - 1)
        self.prefilter = np.zeros(int(self.mask) + 1, bool)
        self.prefilter[self.grams & self.mask] = True

    def best(self, rows: Sequence[tuple[Sequence[str], Sequence[str]]]) -> list[tuple[int, float]]:
        """(item, overlap 0..1) of the entry that each row holds most of; (-1, 0.0) where it holds none.

        A row is (what the user says, what the assistant says).
        """
        row_words = [[words(text) for text in (*prompts, *replies)] for prompts, replies in rows]
        texts = [text for row in row_words for text in row]
        hashes = self.hashes.of([word for text in texts for word in text])
        text_of = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
        row_of = np.repeat(np.arange(len(row_words)), [len(row) for row in row_words])
        hits: dict[int, set[int]] = defaultdict(set)  # row -> places in `grams`
        for size in self.sizes:
            grams = ngrams(hashes, size)
            # an n-gram that begins in one text and ends in another is none
            positions = np.flatnonzero(
                self.prefilter[grams & self.mask] & (text_of[: len(grams)] == text_of[size - 1 :][: len(grams)])
            )
            low, high = (np.searchsorted(self.grams, grams[positions], side) for side in ("left", "right"))
            for position, start, end in zip(positions, low, high, strict=True):
                hits[int(row_of[text_of[position]])].update(range(int(start), int(end)))
        return [
            self._best_of(hits.get(row, set()), row_words[row], len(rows[row][0])) for row in range(len(row_words))
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
    """The index of items' texts, and the numbers of the items that can only be found whole."""
    item_words = [[text for text in map(words, texts) if text] for texts in items]
    arrays = [[hashes.of(text) for text in texts] for texts in item_words]
    common = _common(arrays)
    grams, entries = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    owners: list[int] = []
    sizes: set[int] = set()
    whole: dict[tuple[str, ...], int] = {}
    short: list[int] = []
    for item, texts in enumerate(arrays):
        for array in texts:
            runs = _uncommon_runs(array, common)
            if not runs:
                continue
            sized_grams = [(size, ngrams(run, size)) for run in runs for size in (size_for(len(run), ngram),)]
            sizes.update(size for size, _ in sized_grams)
            unique = np.unique(np.concatenate([gram_hashes for _, gram_hashes in sized_grams]))
            grams.append(unique)
            entries.append(np.full(len(unique), len(owners), np.int64))
            owners.append(item)
        if texts and not (owners and owners[-1] == item):
            short.append(item)
            whole.setdefault(_whole_key(item_words[item]), item)
            for text in item_words[item]:
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
    unique_grams, counts = np.unique(np.concatenate(of_items), return_counts=True)
    return unique_grams[counts > max(MOST_ITEMS, len(arrays) // 100)]


def _uncommon_runs(array: Any, common: Any) -> list[Any]:
    """The runs of at least WHOLE words of a text that are in no common n-gram."""
    is_common = np.zeros(len(array), bool)
    if len(common):
        for start in np.flatnonzero(np.isin(ngrams(array, SHORTEST), common)):
            is_common[start : start + SHORTEST] = True
    edges = np.flatnonzero(np.diff(np.concatenate([[True], is_common, [True]]).astype(np.int8)))
    return [array[start:end] for start, end in edges.reshape(-1, 2) if end - start >= WHOLE]


@dataclass(frozen=True)
class Contamination:
    """Drop rows that hold an item of an evaluation set."""

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
        """See Reading."""
        return [file for path in self.against for file, _ in files_of(path)]

    def sketch(self, examples: Sequence[Example], folder: Path) -> Any:
        """See SetStep: the number of the item that a row holds most of (-1: none), and how much of it."""
        index = _index(self.against, self.ngram, _stamp(self.against))
        media = [_media_of(example) for example in examples]
        row_texts = [
            ([], []) if names else (example_text.texts(example, "prompt"), example_text.texts(example, "replies"))
            for example, names in zip(examples, media, strict=True)
        ]
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
        """See SetStep. Raises ConfigError where a set cannot be read."""
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


def _media_of(example: Example) -> list[str]:
    """sha256 of a row's pictures and recordings: they lie under it in a Dataset."""
    return [PurePath(name).stem for kind in ("image", "audio") for name in media_of(example, kind)]


def _stamp(paths: tuple[str, ...]) -> tuple[Any, ...]:
    """What tells one state of the files from another, so that a process that lives on reads a changed file anew."""
    return tuple(_file_stamp(path) for path in paths)


def _file_stamp(path: str) -> tuple[int, int]:
    try:
        stat = os.stat(Path(path).expanduser())
    except OSError:
        return (0, 0)
    return (stat.st_mtime_ns, stat.st_size)


@dataclass(frozen=True)
class _Index:
    """Evaluation sets, ready to be looked for."""

    sets: list[EvalSet]
    grams: Index
    names: list[tuple[str, str]]  # of each item: its set, its place
    too_short: Counter[str]  # items of a set that can only be found whole
    media: dict[str, int]  # sha256 of a file -> number of the first item that names it

    def of_media(self, digests: Sequence[str]) -> tuple[int, float] | None:
        """(item, 1) of the first file that an item names."""
        return next(((self.media[digest], 1.0) for digest in digests if digest in self.media), None)


@cache
def _index(paths: tuple[str, ...], ngram: int, stamp: tuple[Any, ...]) -> _Index:
    sets = [read_set(path) for path in paths]
    names = [(eval_set.name, location) for eval_set in sets for location, _ in eval_set.items]
    grams, short = build_index([texts for eval_set in sets for _, texts in eval_set.items], ngram, WordHashes())
    starts = itertools.accumulate((len(eval_set.items) for eval_set in sets), initial=0)
    media = {
        digest: start + item
        for start, eval_set in zip(starts, sets, strict=False)
        for digest, item in eval_set.media.items()
    }
    return _Index(sets, grams, names, Counter(names[item][0] for item in short), media)
