"""`near_duplicates`: rows that say nearly the same go; every removal is verified, scored, and names the row that stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from sartor.core.config import option
from sartor.core.processes import Means, Workers
from sartor.core.records import Example
from sartor.curate.dedup import clusters, ledger, near, shingles
from sartor.curate.dedup.arrays import offsets_of
from sartor.curate.dedup.pairs import METHODS
from sartor.curate.dedup.verify import Rules, rules_for
from sartor.curate.steps.contract import Gathered, Removal, Verdicts
from sartor.curate.steps.survivor import FIELD_HELP, KEEP_HELP, Field, Keep, has_media, is_apart, ranks, text_of

_SAID = {"exact": "the same words as", "near": "Jaccard similarity to", "contained": "containment in or of"}
# Below this many rows a second process costs more than it saves.
WORTH_WORKERS = 20_000


@dataclass(frozen=True)
class NearDuplicates:
    """MinHash proposes pairs, true Jaccard or containment of their shingles decides; stars around survivors, never chains.

    Rows with an image, a recording or a rating are let be: their text does not tell it all. `image_duplicates` compares them.
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

    def rules(self) -> Rules:
        """What makes two rows duplicates. Raises ConfigError for a threshold out of range."""
        return rules_for(self._shingling(), self.threshold, self.contained)

    def _shingling(self) -> shingles.Shingling:
        return shingles.resolve(self.unit, self.size, ())

    def sketch(self, examples: Sequence[Example], folder: Path) -> Any:
        """See SetStep. Columns: shingles, digest, rank, media, rated. A row that is apart has no shingles, and so no like."""
        texts = ["" if is_apart(example) else text_of(example, self.field) for example in examples]
        found = shingles.sketch(texts, self._shingling())
        offsets = pa.array(found.offsets.astype(np.int32))
        return pa.table(
            {
                "shingles": pa.ListArray.from_arrays(offsets, pa.array(found.shingles)),
                "digest": pa.FixedSizeBinaryArray.from_buffers(
                    pa.binary(16), len(examples), [None, pa.py_buffer(found.digests)]
                ),
                "rank": ranks(examples, self.keep, self.field),
                "media": pa.array([has_media(example) for example in examples], pa.bool_()),
                "rated": pa.array([is_apart(example) and not has_media(example) for example in examples], pa.bool_()),
            }
        )

    def decide(self, gathered: Gathered) -> Verdicts:
        """See SetStep."""
        rules, table = self.rules(), gathered.table
        flat, offsets = _flat(table["shingles"], gathered.folder / "shingles.u32")
        digests = np.concatenate([np.empty((0, 16), np.uint8), *[_bytes(chunk) for chunk in table["digest"].chunks]])
        rank = table["rank"].to_numpy()
        workers = gathered.workers if len(gathered) >= WORTH_WORKERS else 0
        with Workers(workers if workers > 1 else 0) as pool:
            found = near.near_duplicates(flat, offsets, digests, rules, rank, Means(spread=pool.spread))
        removals = clusters.resolve(found.pairs, rank, rules)
        locators = table["locator"]
        media, rated = (sum(table[name].to_pylist()) for name in ("media", "rated"))
        limits = clusters.Limits(self.max_source_fraction, self.max_fraction, allow=self.allow, in_recipe=True)
        clusters.guard(removals, table["source"].to_numpy(), gathered.sources, limits, lambda row: str(locators[row].as_py()))
        facts = {
            "rules": asdict(rules),
            "unit": self.unit,
            "shingle_size": self._shingling().size,
            "pairs": len(found.pairs.a),
            "clusters": removals.clusters,
            "largest_cluster": removals.largest_cluster,
            "removed": removals.by_method(),
            "ignored_shingles": found.common,
            "rows_without_words": found.empty - media - rated,
            "verified_candidates": found.candidates,
        }
        if media:
            facts["rows_with_media"] = media
        if rated:
            facts["rows_rated"] = rated
        evidence = {"near_duplicates": _ledger(found.pairs, rules, rank, gathered)}
        return Verdicts(_removals(removals, locators), evidence, facts, set_aside=True)


def _removals(found: clusters.Removals, locators: Any) -> list[Removal]:
    made = []
    for row, kept, score, method in zip(
        found.rows.tolist(), found.kept.tolist(), found.score.tolist(), found.method.tolist(), strict=True
    ):
        name = METHODS[method]
        detail = f"{'' if name == 'exact' else f'{score:.3f} '}{_SAID[name]} {locators[kept].as_py()}"
        made.append(Removal(row, "near_duplicate", detail, kept, round(score, 6), name))
    return made


def _ledger(pairs: Any, rules: Rules, rank: Any, gathered: Gathered) -> Any:
    """Every verified pair by the ids of its rows, with what a new decision needs: `sartor rethreshold` reads it."""
    ids = gathered.table["id"]
    a, b = pa.array(pairs.a), pa.array(pairs.b)
    sources = pa.array(gathered.sources, pa.string()).take(gathered.table["source"].combine_chunks())
    score, methods = ledger.judgements(pairs, rules)
    return pa.table(
        {
            "a": ids.take(a), "b": ids.take(b), "score": score, "method": pa.array(methods.tolist(), pa.string()),
            "jaccard": pairs.jaccard, "containment": pairs.containment, "exact": pairs.exact,
            "rank_a": rank[pairs.a], "rank_b": rank[pairs.b], "place_a": pairs.a, "place_b": pairs.b,
            "source_a": sources.take(a), "source_b": sources.take(b),
        }
    )  # fmt: skip


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
