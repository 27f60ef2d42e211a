"""Step image_duplicates: removes rows with the same question about the same image.

An image counts as the same in another size, compression or brightness.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sartor.core.config import option
from sartor.core.errors import ConfigError, MediaError
from sartor.core.records import Example, digest
from sartor.curate.dedup import clusters
from sartor.curate.dedup.pair_scoring import EXACT, DuplicateRules, ScoredPairs
from sartor.curate.step import Removal, StepInput, StepResult
from sartor.curate.steps.media_filters import media_of
from sartor.media.images import SIDE, likeness, open_picture, perceptual_hash, thumbnail

MOST_DISTANCE = 10  # bits of 64; at a distance of 8 bits 96 % of the pairs become candidates, up to 7 bits all do
BANDS, BAND_BITS = 4, 16
CROWD = 500  # above this number, rows with equal bits in a band are compared only with their neighbours by hash
NEIGHBOURS, FIRST_OF_CROWD = 64, 8
CHUNK = 2048

I64 = NDArray[np.int64]
_SCHEMA = pa.schema(
    [
        ("files", pa.binary(16)),
        ("asked", pa.binary(16)),
        ("hash", pa.uint64()),
        ("thumbnail", pa.binary(SIDE * SIDE)),
        ("pixels", pa.int64()),
    ]
)
_BITS = np.array([bin(value).count("1") for value in range(1 << 16)], np.uint8)


@dataclass(frozen=True)
class ImageDuplicates:
    """Remove rows with equal files, or with images of close hashes and correlated parts; one of each stays.

    Rows without an image are not compared. Rows with several images are compared only for equal files.
    """

    threshold: float = option(
        0.75, "correlation of the picture's parts from which two are the same picture; 1 takes equal files only"
    )
    text: Literal["question", "all", "any"] = option(
        "question", "which rows are compared: with equal question, with equal question and answer, or any"
    )
    keep: Literal["largest", "first"] = option(
        "largest", "which row stays: of the picture with most pixels, or the first read"
    )
    max_source_fraction: float = option(0.75, "one cluster may remove this fraction of a source without asking")
    max_fraction: float = option(0.9, "this fraction of all rows may go without asking")
    allow: tuple[str, ...] = option((), "sources that may go wholly")
    kind: Literal["image_duplicates"] = "image_duplicates"

    def __post_init__(self) -> None:
        if not 0.5 <= self.threshold <= 1:
            raise ConfigError(f"threshold is {self.threshold:g}; it must be from 0.5 to 1", "threshold: 0.75")

    def sketch(self, examples: Sequence[Example], folder: Path) -> Any:
        """Return the columns files and asked (digests), hash, thumbnail and pixels."""
        rows = []
        for example in examples:
            names = list(media_of(example, "image"))
            image_hash, thumb, pixels = self._picture_facts(folder / names[0]) if len(names) == 1 else (None, None, 0)
            question = bytes(16)
            if self.text != "any":
                turns = example.messages if self.text == "all" else example.prompt
                question = _digest([[message.role, message.text] for message in turns])
            rows.append(
                {
                    "files": _digest(names) if names else None,
                    "asked": question,
                    "hash": image_hash,
                    "thumbnail": thumb,
                    "pixels": pixels,
                }
            )
        return pa.Table.from_pylist(rows, _SCHEMA)

    def _picture_facts(self, file: Path) -> tuple[int | None, bytes | None, int]:
        """Return (hash, thumbnail, pixels) of an image; an unreadable one is compared only as a file."""
        if self.threshold == 1 and self.keep == "first":
            return None, None, 0
        try:
            picture = open_picture(file, 4 * SIDE)
        except MediaError:
            return None, None, 0
        thumb = thumbnail(picture.grey)
        return perceptual_hash(thumb), thumb.tobytes(), picture.width * picture.height

    def decide(self, step_input: StepInput) -> StepResult:
        """Find the duplicates; return the removals, and the pairs as evidence.

        Raises GuardError if too many rows would be removed.
        """
        table = step_input.table
        questions = _numbered(table["asked"])
        files = _numbered(table["files"])
        equal = _equal_pairs(files, questions)
        near, facts = self._near(table, files, questions, step_input)
        pairs = ScoredPairs.joined([equal, near])
        rank = table["pixels"].to_numpy().astype(np.float64) if self.keep == "largest" else np.zeros(len(step_input))
        removals = clusters.resolve_clusters(
            pairs, rank, DuplicateRules(self.threshold, self.threshold, contained=0.0)
        )
        locators = table["locator"]
        limits = clusters.RemovalLimits(self.max_source_fraction, self.max_fraction, allow=self.allow, in_recipe=True)
        clusters.check_removals(
            removals,
            table["source"].to_numpy(),
            names=step_input.sources,
            limits=limits,
            describe=lambda row: str(locators[row].as_py()),
        )
        row_removals = []
        for row, kept_row, score, method in zip(
            removals.rows.tolist(),
            removals.kept_rows.tolist(),
            removals.score.tolist(),
            removals.method.tolist(),
            strict=True,
        ):
            same = method == EXACT
            text = "the same file as" if same else f"{score:.3f} correlation of its parts with those of"
            detail = f"{text} that of {locators[kept_row].as_py()}"
            row_removals.append(
                Removal(
                    row,
                    "image_duplicate",
                    detail=detail,
                    kept_row=kept_row,
                    score=round(score, 6),
                    method="equal file" if same else "local correlation",
                )
            )
        ids = table["id"]
        evidence = pa.table(
            {"a": ids.take(pairs.a), "b": ids.take(pairs.b), "score": pairs.jaccard, "equal_file": pairs.exact}
        )
        facts |= {"pairs": len(pairs.a), "clusters": removals.clusters, "largest_cluster": removals.largest_cluster}
        return StepResult(row_removals, {"image_duplicates": evidence}, facts, set_aside=True)

    def _near(
        self, table: Any, files: I64, questions: I64, step_input: StepInput
    ) -> tuple[ScoredPairs, dict[str, int]]:
        """Return the verified pairs of different files that show the same image."""
        readable = np.flatnonzero(table["hash"].is_valid().to_numpy(zero_copy_only=False))
        facts = {"pictures": len(np.unique(files[files >= 0])), "candidates": 0, "candidates_without_detail": 0}
        if self.threshold == 1 or len(readable) < 2:
            return ScoredPairs.none(), facts
        # the first of the rows with equal files and equal question represents them
        first = readable[np.unique(np.stack([files[readable], questions[readable]]), axis=1, return_index=True)[1]]
        first.sort()
        hashes = table["hash"].combine_chunks().take(pa.array(first)).to_numpy().astype(np.uint64)
        a, b, crowded = _candidates(hashes, questions[first])
        facts["candidates"], thumbs, scored_pairs = len(a), table["thumbnail"], []
        for begin in range(0, len(a), CHUNK):
            left, right = first[a[begin : begin + CHUNK]], first[b[begin : begin + CHUNK]]
            score = likeness(_thumbs(thumbs, left), _thumbs(thumbs, right))
            facts["candidates_without_detail"] += int(np.isnan(score).sum())
            is_match = np.nan_to_num(score, nan=-1.0) >= self.threshold
            zeros = np.zeros(int(is_match.sum()), np.float32)
            scored_pairs.append(
                ScoredPairs(
                    left[is_match],
                    right[is_match],
                    jaccard=np.minimum(score[is_match], 1.0),
                    containment=zeros,
                    exact=zeros > 0,
                )
            )
        if crowded:
            facts["crowded"] = crowded
            step_input.notice(
                f"{self.kind}: {crowded:,} pictures share their hash with very many; each was held against its nearest"
            )
        return ScoredPairs.joined(scored_pairs), facts


def _candidates(hashes: NDArray[np.uint64], questions: I64) -> tuple[I64, I64, int]:
    """Return the candidate pairs (a, b), a < b, and the number of crowded rows.

    hashes, questions: (N,). A pair has equal questions and hashes within MOST_DISTANCE bits; it occurs once. If two
    64-bit hashes differ in at most 7 bits, one of their 4 bands differs in at most one bit. Each band is therefore
    looked up as it is, and with each of its bits flipped (multi-index hashing, Norouzi et al. 2014).
    """
    question_keys = np.unique(questions, return_inverse=True)[1].astype(np.int64) << BAND_BITS
    pairs, crowded = [np.empty(0, np.int64)], np.zeros(len(hashes), bool)
    for band in range(BANDS):
        bits = (hashes >> np.uint64(BAND_BITS * band)) & np.uint64((1 << BAND_BITS) - 1)
        keys = question_keys | bits.astype(np.int64)
        order = np.lexsort((hashes, keys))
        ordered = keys[order]
        crowd = np.searchsorted(ordered, keys, "right") - np.searchsorted(ordered, keys, "left") > CROWD
        crowded |= crowd
        for flip in (0, *(1 << index for index in range(BAND_BITS))):
            pairs += _matches(keys, order, ordered=ordered, flip=flip, crowd=crowd, hashes=hashes)
        if crowd.any():
            pairs.append(_neighbours(order[crowd[order]], keys, hashes))
    pair_codes = np.unique(np.concatenate(pairs))
    return pair_codes // len(hashes), pair_codes % len(hashes), int(crowded.sum())


def _matches(
    keys: I64, order: I64, ordered: I64, flip: int, crowd: NDArray[np.bool_], hashes: NDArray[np.uint64]
) -> Iterator[I64]:
    """Yield the pairs whose keys differ by exactly `flip`, a few million at a time, without crowds."""
    rows = np.flatnonzero(~crowd)
    target_keys = keys[rows] ^ flip
    begin, end = np.searchsorted(ordered, target_keys, "left"), np.searchsorted(ordered, target_keys, "right")
    counts = np.minimum(end - begin, CROWD)  # limits the pairs with a crowd that a flipped bit leads into
    cuts = np.searchsorted(np.cumsum(counts), np.arange(0, int(counts.sum()), 4_000_000), "left").tolist()
    for first, last in zip(cuts, [*cuts[1:], len(rows)] if cuts else [], strict=True):
        chunk_counts = counts[first:last]
        a = np.repeat(rows[first:last], chunk_counts)
        offsets = np.arange(int(chunk_counts.sum())) - np.repeat(np.cumsum(chunk_counts) - chunk_counts, chunk_counts)
        b = order[np.repeat(begin[first:last], chunk_counts) + offsets]
        yield _close(a, b, hashes)


def _neighbours(rows: I64, keys: I64, hashes: NDArray[np.uint64]) -> I64:
    """Return pairs of crowded rows: each row with its next rows by hash, and with the first rows of its bucket."""
    pairs = [(rows[:-step], rows[step:]) for step in range(1, min(NEIGHBOURS, len(rows) - 1) + 1)]
    begin = np.searchsorted(keys[rows], keys[rows], "left")  # rows are sorted by key
    pairs += [(rows[np.minimum(begin + index, np.arange(len(rows)))], rows) for index in range(FIRST_OF_CROWD)]
    a = np.concatenate([first for first, _ in pairs])
    b = np.concatenate([second for _, second in pairs])
    same = keys[a] == keys[b]
    return _close(a[same], b[same], hashes)


def _close(a: I64, b: I64, hashes: NDArray[np.uint64]) -> I64:
    """Return the pairs a < b within MOST_DISTANCE bits, each once, encoded as a * N + b."""
    ahead = a < b
    a, b = np.where(ahead, a, b)[a != b], np.where(ahead, b, a)[a != b]
    differ = (hashes[a] ^ hashes[b]).view(np.uint16).reshape(-1, 4)
    near = _BITS[differ].sum(1) <= MOST_DISTANCE
    return np.unique(a[near] * len(hashes) + b[near])


def _equal_pairs(files: I64, questions: I64) -> ScoredPairs:
    """Return each later row with equal files and equal question, paired with the first."""
    rows = np.flatnonzero(files >= 0)
    file_questions = np.stack([files[rows], questions[rows]])
    _, first, inverse = np.unique(file_questions, axis=1, return_index=True, return_inverse=True)
    kept_rows = rows[first[inverse.ravel()]]
    later = kept_rows != rows
    return ScoredPairs.of_exact(kept_rows[later], rows[later])


def _numbered(column: Any) -> I64:
    """Return a number for each value, (N,) int64; -1 for null."""
    coded = column.combine_chunks().dictionary_encode()
    indices = coded.indices if isinstance(coded, pa.DictionaryArray) else coded.combine_chunks().indices
    return np.asarray(indices.fill_null(-1).to_numpy(zero_copy_only=False), np.int64)


def _thumbs(column: Any, rows: I64) -> NDArray[np.uint8]:
    selected = column.take(pa.array(rows))
    chunks = [chunk for chunk in selected.chunks if len(chunk)]
    width = SIDE * SIDE
    flat = [np.frombuffer(chunk.buffers()[1], np.uint8, len(chunk) * width, chunk.offset * width) for chunk in chunks]
    return np.concatenate(flat).reshape(-1, SIDE, SIDE)


def _digest(value: Any) -> bytes:
    return hashlib.sha256(digest(value).encode()).digest()[:16]
