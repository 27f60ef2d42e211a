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


UNDATED = -1e14  # seconds: older than any date
BEHIND = 1e15  # above every number of a rule, and exact beside whole ones


def ranks(examples: Sequence[Example], rule: Keep, field: Field) -> Any:
    """(N,) float64. Whatever the rule, what people wrote goes before what was synthesised."""
    return np.array([_RULES[rule](example, field) - BEHIND * example.is_synthetic for example in examples], np.float64)


def text_of(example: Example, field: Field) -> str:
    """The text that is compared."""
    if field == "reply":
        return example.reply
    roles = {"prompt": ("user",), "both": ("user", "assistant"), "all": ("system", "user", "assistant", "tool")}[field]
    return "\n".join(message.text for message in example.messages if message.role in roles)


def has_media(example: Example) -> bool:
    """Whether the row shows or plays something: then its text alone does not tell what it says."""
    return any(part.media for message in example.messages + example.rejected for part in message.content)


def has_media_or_rating(example: Example) -> bool:
    """Whether its text does not tell what it repeats: it shows something, or people rated its reply. Of two like
    replies to one question, one rated good and one bad, neither repeats the other.
    """
    return has_media(example) or bool(example.rating)


def _length(example: Example, field: Field) -> float:
    return float(len(text_of(example, field)))


def _date(example: Example, field: Field) -> float:
    """Seconds since 1970 of the newest origin; a row without a date is older than any with one."""
    timestamps = [UNDATED]
    for origin in example.origins:
        if origin.date:
            date = datetime.datetime.fromisoformat(origin.date)
            timestamps.append((date if date.tzinfo else date.replace(tzinfo=datetime.UTC)).timestamp())
    return float(max(timestamps))


def _licence(example: Example, field: Field) -> float:
    return max(compliance.rank(origin.licence) for origin in example.origins)


_RULES: dict[str, Callable[[Example, Field], float]] = {
    "longest": _length,
    "first": lambda example, field: 0.0,
    "newest": _date,
    "best_licence": _licence,
    "best_quality": lambda example, field: quality(example),
}


_RELATIONS = {"exact": "the same words as", "near": "Jaccard similarity to", "contained": "containment in or of"}
# Below this many rows a second process costs more than it saves.
WORTH_WORKERS = 20_000


@dataclass(frozen=True)
class NearDuplicates:
    """MinHash proposes pairs, true Jaccard or containment of their shingles decides; stars around survivors, never
    chains.

    Rows with an image, a recording or a rating are let be: their text does not tell it all. `image_duplicates`
    compares them.
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
        """What makes two rows duplicates. Raises ConfigError for a threshold out of range."""
        return rules_for(self._shingling(), self.threshold, self.contained)

    def _shingling(self) -> shingles.Shingling:
        return shingles.resolve(self.unit, self.size, ())

    def sketch(self, examples: Sequence[Example], folder: Path) -> Any:
        """See SetStep. Columns: shingles, digest, rank, media, rated. A row that is apart has no shingles, and so no
        like.
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
        """See SetStep."""
        rules, table = self.rules(), step_input.table
        flat, offsets = _flat(table["shingles"], step_input.folder / "shingles.u32")
        digests = np.concatenate([np.empty((0, 16), np.uint8), *[_bytes(chunk) for chunk in table["digest"].chunks]])
        rank = table["rank"].to_numpy()
        workers = step_input.workers if len(step_input) >= WORTH_WORKERS else 0
        with WorkerPool(workers if workers > 1 else 0) as pool:
            duplicate_pairs = near_duplicates.near_duplicates(
                flat, offsets, digests, rules, rank, Executor(spread=pool.spread)
            )
        removals = clusters.resolve_clusters(duplicate_pairs.pairs, rank, rules)
        locators = table["locator"]
        media, rated = (sum(table[name].to_pylist()) for name in ("media", "rated"))
        limits = clusters.RemovalLimits(self.max_source_fraction, self.max_fraction, allow=self.allow, in_recipe=True)
        clusters.check_removals(
            removals, table["source"].to_numpy(), step_input.sources, limits, lambda row: str(locators[row].as_py())
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
        row_removals.append(Removal(row, "near_duplicate", detail, kept_row, round(score, 6), name))
    return row_removals


def _ledger(pairs: Any, rules: DuplicateRules, rank: Any, step_input: StepInput) -> Any:
    """Every verified pair by the ids of its rows, with what a new decision needs: `sartor rethreshold` reads it."""
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
    """A list column of uint32 as (values, offsets). The values go through a file: they can be larger than memory."""
    lengths = [np.diff(chunk.offsets.to_numpy()) for chunk in column.chunks]
    offsets = offsets_of(np.concatenate([np.empty(0, np.int64), *lengths]))
    with file.open("wb") as stream:
        for chunk in column.chunks:
            stream.write(np.ascontiguousarray(chunk.flatten().to_numpy()).data)
    flat = np.memmap(file, np.uint32, "r") if offsets[-1] else np.empty(0, np.uint32)
    return flat, offsets


def _bytes(chunk: Any) -> Any:
    """A chunk of fixed-size binary as (N, 16) bytes."""
    width = chunk.type.byte_width
    raw = np.frombuffer(chunk.buffers()[1], np.uint8, len(chunk) * width, chunk.offset * width)
    return raw.reshape(len(chunk), width)


@dataclass(frozen=True)
class ExactDuplicates:
    """Rows of equal content become one; each further row is a Drop that names it.

    With `match: words` rows also go that differ in case, white space and punctuation only (`dedup/shingles.py` has the
    normal form). Their content is not the same, so the survivor does not take over their origins. Rows with an image,
    a recording or a rating go by their content alone.
    """

    match: Literal["content", "words"] = option(
        "content", "equal content, or also the same words (case, spaces, punctuation apart)"
    )
    field: Field = option("both", f"with `match: words`: {FIELD_HELP}")
    keep: Keep = option("first", f"with `match: words`: {KEEP_HELP}")
    kind: Literal["exact_duplicates"] = "exact_duplicates"

    def sketch(self, examples: Sequence[Example], folder: Path) -> Any:
        """See SetStep. Columns: words, rank. Of `match: content` the id says it all."""
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
        """See SetStep."""
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
            Removal(row, "exact_duplicate", f"{relation} {locator}", kept_row, 1.0, method, merge=merge)
            for row, kept_row, locator in zip(
                duplicates["row"].to_list(), duplicates["kept"].to_list(), locators, strict=True
            )
        ]


def _later(table: pl.DataFrame, key: str) -> pl.DataFrame:
    """(row, kept) of every row whose key an earlier one has; `table` is in the order that decides."""
    first = pl.col("row").first().over(key).alias("kept")
    return table.select("row", first).filter(pl.col("row") != pl.col("kept")).sort("row")
