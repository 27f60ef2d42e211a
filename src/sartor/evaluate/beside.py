"""A new version and the one that is live on the rows of the new one's Report: scores row by row, to be paired."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from sartor.core import parquet_io
from sartor.core.artifacts import Artifact, open_artifact
from sartor.core.errors import ArtifactError
from sartor.core.lineage import ancestry
from sartor.core.records import Example
from sartor.core.splits import group_of_stored
from sartor.evaluate.answering import answer, losses, side
from sartor.evaluate.held_out import HeldOut
from sartor.evaluate.measures import LOWER_IS_BETTER, Measures
from sartor.evaluate.tasks import open_tuned

# of a metric of the whole set, the score of a row that it is made of
_OF_A_ROW = {"macro_f1": "accuracy"}


@dataclass(frozen=True)
class Beside:
    """Scores of `metric`, the higher the better; of each row `id, group, reference, live_reply, new_reply, live, new`."""

    metric: str
    table: list[dict[str, Any]]


def beside(
    adapter: Path | str, report: Path | str, live: Path | str, notice: Callable[[str], object] = lambda line: None
) -> Beside:
    """Let `live` (a Release or an Adapter) answer what the Report of `adapter` was made of, and score it as the Report did.

    The rows are looked up in the Dataset of `adapter`. Rows without a score of the primary metric are left out. Raises
    ArtifactError where the Dataset or one of the rows is gone, ModelError.
    """
    new, found, standing = (
        open_artifact(adapter, "adapter"), open_artifact(report, "report"), open_artifact(live, ("adapter", "release"))
    )  # fmt: skip
    said = list(parquet_io.read_file(found.path / "rows.parquet"))
    asked = _asked(new, said)
    base, model = open_tuned(standing, notice)
    notice(f"the live version answers the same {len(said)} rows")
    answered = answer(base, model, asked, found.manifest["label"], tuned=True)
    primary = str(found.manifest["primary"])
    metric = _OF_A_ROW.get(primary, primary)
    heard = [place for place, row in enumerate(said) if row.get(f"tuned_{metric}") is not None] if metric == "wer" else []
    measures = Measures(
        [row["reference"] for row in said], [group_of_stored(row) for row in said], found.manifest["label"], None, heard
    )
    mine = answered.loss if metric == "loss" else measures.by_row(answered)[metric]
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    table = [
        {
            **{name: row[name] for name in ("id", "reference")},
            "group": group_of_stored(row),
            "live_reply": reply,
            "new_reply": row["tuned_reply"],
            "live": sign * score,
            "new": sign * row[f"tuned_{metric}"],
        }
        for row, reply, score in zip(said, answered.replies, mine, strict=True)
        if score is not None and row[f"tuned_{metric}"] is not None
    ]
    return Beside(metric, table)


def write_beside(file: Path, found: Beside) -> None:
    """The rows as Parquet, for a person and for `rows.read_file`."""
    parquet_io.write_rows(file, pa.Table.from_pylist(found.table).schema, found.table)


def likelihoods(
    path: Path | str, examples: Sequence[Example], notice: Callable[[str], object] = lambda line: None
) -> list[float]:
    """Nats per token that a Release or Adapter gives to each row's own reply, negative: the higher, the likelier. Text rows."""
    base, model = open_tuned(open_artifact(path, ("adapter", "release")), notice)
    with side(model, tuned=True):
        means, _ = losses(base, model, [base.chat.encode(example) for example in examples])
    return [-mean for mean in means]


def _asked(adapter: Artifact, said: Sequence[dict[str, Any]]) -> HeldOut:
    datasets = ancestry.find_parents(adapter, "dataset")
    known = {example.id: example for dataset in datasets for example in parquet_io.read_examples(dataset, "eval")}
    gone = [row["id"] for row in said if row["id"] not in known]
    if gone or not datasets:
        raise ArtifactError(
            f"{len(gone) or 'all'} rows of the Report are in no Dataset of {adapter.path} that is still there",
            "evaluate on the Dataset's own rows; sartor index DIR finds one that was moved",
        )
    return HeldOut([known[row["id"]] for row in said], datasets[0].path)
