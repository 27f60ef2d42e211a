"""Steps exact_duplicates and near_duplicates."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import pyarrow as pa

from sartor.core.config import option
from sartor.core.licences import compliance
from sartor.core.processes import Executor, WorkerPool
from sartor.core.records import Example
from sartor.curate.dedup import clusters, near_duplicates, pair_store, shingles
from sartor.curate.dedup.pair_scoring import METHODS, DuplicateRules, rules_for
from sartor.curate.dedup.shingles import offsets_of
from sartor.curate.step import Removal, StepInput, StepResult
from sartor.curate.steps.answer_quality import quality

Keep = Literal["longest", "first", "newest", "best_licence", "best_quality"]
Field = Literal["both", "prompt", "reply", "all"]
KEEP_HELP = (
    "which row stays: the longest, first (read), newest (by its date), best_licence (that permits most), best_quality"
)
FIELD_HELP = (
    "what is compared: prompt (the user's turns), reply (the last), both (all of user and assistant), all (system too)"
)


UNDATED = -1e11  # seconds; earlier than any date
# above every rank of a rule; in float64 whole numbers stay exact beside it, and qualities of 0 to 1 to 0.0002
BEHIND = 1e12


def ranks(examples: Sequence[Example], rule: Keep, field: Field) -> Any:
    """Return the rank of each row, (N,) float64; the row of the highest rank stays.

    Under every rule, rows that people wrote rank above synthetic ones.
    """
    return np.array([_RULES[rule](example, field) - BEHIND * example.is_synthetic for example in examples], np.float64)


def text_of(example: Example, field: Field) -> str:
    """Return the text of a row that is compared, reasoning included."""
    if field == "reply":
        return example.messages[-1].text_with_reasoning
    roles = {"prompt": ("user",), "both": ("user", "assistant"), "all": ("system", "user", "assistant", "tool")}[field]
    return "\n".join(message.text_with_reasoning for message in example.messages if message.role in roles)


def has_media(example: Example) -> bool:
    """Return whether a row has images or recordings, without which its text is incomplete."""
    return any(part.media for message in example.messages + example.rejected for part in message.content)


def has_media_or_rating(example: Example) -> bool:
    """Return whether the text alone does not decide if a row is a duplicate: it has media or a rating.

    Of two equal replies to one question, one rated good and one bad, neither is a duplicate of the other.
    """
    return has_media(example) or bool(example.rating)


def _date(example: Example, field: Field) -> float:
    """Return the date of the newest origin, in seconds since 1970; UNDATED without a date."""
    timestamps = [UNDATED]
    for origin in example.origins:
        if origin.date:
            date = datetime.datetime.fromisoformat(origin.date)
            timestamps.append((date if date.tzinfo else date.replace(tzinfo=datetime.UTC)).timestamp())
    return float(max(timestamps))


_RULES: dict[str, Callable[[Example, Field], float]] = {
    "longest": lambda example, field: float(len(text_of(example, field))),
    "first": lambda example, field: 0.0,
    "newest": _date,
    "best_licence": lambda example, field: max(compliance.rank(origin.licence) for origin in example.origins),
    "best_quality": lambda example, field: quality(example),
}


_RELATIONS = {"exact": "the same words as", "near": "Jaccard similarity to", "contained": "containment in or of"}
# Below this many rows, more processes cost more time than they save.
WORTH_WORKERS = 20_000


@dataclass(frozen=True)
class NearDuplicates:
    """Remove near duplicates: MinHash proposes pairs, exact Jaccard similarity or containment decides.

    Each removed row is a duplicate of the row that stays, never only of another removed row. Rows with an image, a
    recording or a rating are not compared, since their text is incomplete. `image_duplicates` compares images.
    """

    threshold: float = option(0.0, "Jaccard similarity from which two rows are duplicates; 0 takes the unit's own")
    field: Field = option("both", FIELD_HELP)
    keep: Keep = option("longest", KEEP_HELP)
    unit: Literal["words", "characters"] = option(
        "words", "shingles are runs of words, or of characters (short records, typing errors)"
    )
    size: int = option(0, "words or characters of a shingle; 0 takes the unit's own")
    contained: float | None = option(
        None, "containment from which a row counts as part of another; 0 never, empty the unit's own"
    )
    max_source_fraction: float = option(0.75, "one cluster may remove this fraction of a source without asking")
    max_fraction: float = option(0.9, "this fraction of all rows may go without asking")
    allow: tuple[str, ...] = option((), "sources that may go wholly")
    kind: Literal["near_duplicates"] = "near_duplicates"

    def __post_init__(self) -> None:
        self.rules()

    def rules(self) -> DuplicateRules:
        """Return the conditions under which two rows are duplicates.

        Raises ConfigError for a threshold out of range.
        """
        return rules_for(self._shingling(), self.threshold, self.contained)

    def _shingling(self) -> shingles.Shingling:
        return shingles.resolve(self.unit, self.size, ())

    def sketch(self, examples: Sequence[Example], folder: Path) -> Any:
        """Return the columns shingles, digest, rank, media and rated.

        A row with media or a rating has no shingles, and so no duplicates.
        """
        texts = ["" if has_media_or_rating(example) else text_of(example, self.field) for example in examples]
        sketches = shingles.sketch(texts, self._shingling())
        offsets = pa.array(sketches.offsets.astype(np.int32))
        return pa.table(
            {
                "shingles": pa.ListArray.from_arrays(offsets, pa.array(sketches.shingles)),
                "digest": pa.FixedSizeBinaryArray.from_buffers(
                    pa.binary(16), len(examples), [None, pa.py_buffer(sketches.digests)]
                ),
                "rank": ranks(examples, self.keep, self.field),
                "media": pa.array([has_media(example) for example in examples], pa.bool_()),
                "rated": pa.array(
                    [has_media_or_rating(example) and not has_media(example) for example in examples], pa.bool_()
                ),
            }
        )

    def decide(self, step_input: StepInput) -> StepResult:
        """Find the duplicates; return the removals, and the verified pairs as evidence.

        Raises GuardError if too many rows would be removed.
        """
        rules, table = self.rules(), step_input.table
        flat, offsets = _flat(table["shingles"], step_input.folder / "shingles.u32")
        digests = np.concatenate([np.empty((0, 16), np.uint8), *[_bytes(chunk) for chunk in table["digest"].chunks]])
        rank = table["rank"].to_numpy()
        workers = step_input.workers if len(step_input) >= WORTH_WORKERS else 0
        with WorkerPool(workers if workers > 1 else 0) as pool:
            duplicate_pairs = near_duplicates.near_duplicates(
                flat, offsets, digests=digests, rules=rules, rank=rank, executor=Executor(spread=pool.spread)
            )
        removals = clusters.resolve_clusters(duplicate_pairs.pairs, rank, rules)
        locators = table["locator"]
        media, rated = (sum(table[name].to_pylist()) for name in ("media", "rated"))
        limits = clusters.RemovalLimits(self.max_source_fraction, self.max_fraction, allow=self.allow, in_recipe=True)
        clusters.check_removals(
            removals,
            table["source"].to_numpy(),
            names=step_input.sources,
            limits=limits,
            describe=lambda row: str(locators[row].as_py()),
        )
        facts = {
            "rules": asdict(rules),
            "unit": self.unit,
            "shingle_size": self._shingling().size,
            "pairs": len(duplicate_pairs.pairs.a),
            "clusters": removals.clusters,
            "largest_cluster": removals.largest_cluster,
            "removed": removals.by_method(),
            "ignored_shingles": duplicate_pairs.common,
            "rows_without_words": duplicate_pairs.empty - media - rated,
            "verified_candidates": duplicate_pairs.candidates,
        }
        if media:
            facts["rows_with_media"] = media
        if rated:
            facts["rows_rated"] = rated
        evidence = {"near_duplicates": _ledger(duplicate_pairs.pairs, rules, rank, step_input)}
        return StepResult(_removals(removals, locators), evidence, facts, set_aside=True)


def _removals(removals: clusters.Removals, locators: Any) -> list[Removal]:
    row_removals = []
    for row, kept_row, score, method in zip(
        removals.rows.tolist(),
        removals.kept_rows.tolist(),
        removals.score.tolist(),
        removals.method.tolist(),
        strict=True,
    ):
        name = METHODS[method]
        detail = f"{'' if name == 'exact' else f'{score:.3f} '}{_RELATIONS[name]} {locators[kept_row].as_py()}"
        row_removals.append(
            Removal(row, "near_duplicate", detail=detail, kept_row=kept_row, score=round(score, 6), method=name)
        )
    return row_removals


def _ledger(pairs: Any, rules: DuplicateRules, rank: Any, step_input: StepInput) -> Any:
    """Return every verified pair by the ids of its rows, with the columns that `sartor rethreshold` needs."""
    ids = step_input.table["id"]
    a, b = pa.array(pairs.a), pa.array(pairs.b)
    sources = pa.array(step_input.sources, pa.string()).take(step_input.table["source"].combine_chunks())
    score, methods = pair_store.score_pairs(pairs, rules)
    return pa.table(
        {
            "a": ids.take(a),
            "b": ids.take(b),
            "score": score,
            "method": pa.array(methods.tolist(), pa.string()),
            "jaccard": pairs.jaccard,
            "containment": pairs.containment,
            "exact": pairs.exact,
            "rank_a": rank[pairs.a],
            "rank_b": rank[pairs.b],
            "place_a": pairs.a,
            "place_b": pairs.b,
            "source_a": sources.take(a),
            "source_b": sources.take(b),
        }
    )


def _flat(column: Any, file: Path) -> tuple[Any, Any]:
    """Return a list column of uint32 as (values, offsets).

    The values are stored in `file` and memory-mapped, since they can be larger than memory.
    """
    lengths = [np.diff(chunk.offsets.to_numpy()) for chunk in column.chunks]
    offsets = offsets_of(np.concatenate([np.empty(0, np.int64), *lengths]))
    with file.open("wb") as stream:
        for chunk in column.chunks:
            stream.write(np.ascontiguousarray(chunk.flatten().to_numpy()).data)
    flat = np.memmap(file, np.uint32, "r") if offsets[-1] else np.empty(0, np.uint32)
    return flat, offsets


def _bytes(chunk: Any) -> Any:
    """Return a chunk of N fixed-size binary values as an (N, width) uint8 array."""
    width = chunk.type.byte_width
    raw = np.frombuffer(chunk.buffers()[1], np.uint8, len(chunk) * width, chunk.offset * width)
    return raw.reshape(len(chunk), width)


@dataclass(frozen=True)
class ExactDuplicates:
    """Merge rows of equal content; each further row is a Drop that names the first.

    With `match: words`, rows that differ only in case, white space and punctuation are removed too (normal form in
    `dedup/shingles.py`). Their content differs, so the remaining row does not take over their origins. Rows with an
    image, a recording or a rating are compared by content only.
    """

    match: Literal["content", "words"] = option(
        "content", "equal content, or also the same words (case, spaces, punctuation apart)"
    )
    field: Field = option("both", f"with `match: words`: {FIELD_HELP}")
    keep: Keep = option("first", f"with `match: words`: {KEEP_HELP}")
    kind: Literal["exact_duplicates"] = "exact_duplicates"

    def sketch(self, examples: Sequence[Example], folder: Path) -> Any:
        """Return the columns words and rank, both null for `match: content`, which compares ids."""
        if self.match == "content":
            return pa.table(
                {"words": pa.nulls(len(examples), pa.string()), "rank": pa.nulls(len(examples), pa.float64())}
            )
        plain = shingles.resolve("words", 0, ())
        sketches = shingles.sketch([text_of(example, self.field) for example in examples], plain)
        empty = sketches.offsets[1:] == sketches.offsets[:-1]
        excluded = [
            is_empty or has_media_or_rating(example) for is_empty, example in zip(empty, examples, strict=True)
        ]
        words = [
            None if is_excluded else row.tobytes().hex()
            for row, is_excluded in zip(sketches.digests, excluded, strict=True)
        ]
        return pa.table({"words": pa.array(words, pa.string()), "rank": ranks(examples, self.keep, self.field)})

    def decide(self, step_input: StepInput) -> StepResult:
        """Return the removals of rows with equal content, or equal words."""
        columns = [pl.Series(name, step_input.table[name]) for name in ("id", "words", "rank")]
        table = pl.DataFrame(columns).with_row_index("row")
        duplicates = _later(table, "id")
        removals = self._removals(duplicates, step_input, "the same content as", merge=True)
        if self.match == "words":
            removed_rows = {removal.row for removal in removals}
            rest = table.filter(pl.col("words").is_not_null() & ~pl.col("row").is_in(sorted(removed_rows)))
            best = rest.sort("rank", "row", descending=[True, False])
            removals += self._removals(_later(best, "words"), step_input, "the same words as", merge=False)
        return StepResult(removals, facts={"removed": len(removals)} if removals else {})

    @staticmethod
    def _removals(duplicates: pl.DataFrame, step_input: StepInput, relation: str, *, merge: bool) -> list[Removal]:
        locators = step_input.table["locator"].take(pa.array(duplicates["kept"].to_list(), pa.int64())).to_pylist()
        method = "equal content" if merge else "equal words"
        return [
            Removal(
                row,
                "exact_duplicate",
                detail=f"{relation} {locator}",
                kept_row=kept_row,
                score=1.0,
                method=method,
                merge=merge,
            )
            for row, kept_row, locator in zip(
                duplicates["row"].to_list(), duplicates["kept"].to_list(), locators, strict=True
            )
        ]


def _later(table: pl.DataFrame, key: str) -> pl.DataFrame:
    """Return (row, kept) of every row whose key an earlier row has; the order of `table` decides."""
    first = pl.col("row").first().over(key).alias("kept")
    return table.select("row", first).filter(pl.col("row") != pl.col("kept")).sort("row")
