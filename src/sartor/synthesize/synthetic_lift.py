"""Verb `prove`: gain from synthetic rows, measured on real ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any

from sartor.core import parquet_io
from sartor.core.artifacts import Artifact, check_output_free, open_artifact
from sartor.core.errors import ArtifactError, SourceError
from sartor.core.records import Example, drop_of
from sartor.core.splits import HELD_OUT_SPLITS, group_of_stored, split_group
from sartor.curate.dataset_writer import write_dataset_from
from sartor.evaluate import bootstrap
from sartor.evaluate.bootstrap import Comparison
from sartor.evaluate.evaluation import evaluate
from sartor.evaluate.metrics import LOWER_IS_BETTER
from sartor.tune import recipe as recipes
from sartor.tune.recipe import Recipe
from sartor.tune.trainer import Tuned, tune

Notice = Callable[[str], object]
STEP = "prove"


@dataclass(frozen=True)
class LiftResult:
    """Scores on real held-out rows.

    compared: its `base` is tuned without the synthetic rows, its `tuned` with them.
    metric: name of the score of a row, of which less is better if it is in LOWER_IS_BETTER.
    rows: rows compared. synthetic: synthetic rows added. left_out: synthetic rows left out.
    """

    compared: Comparison
    metric: str
    rows: int
    synthetic: int
    left_out: int
    runs: dict[str, dict[str, Any]]
    wall_s: float

    def as_json(self) -> dict[str, Any]:
        """Return the fields for the command's JSON."""
        comparison = self.compared
        return {
            "metric": self.metric,
            "without": comparison.base,
            "with": comparison.tuned,
            "gain": {"estimate": comparison.difference, "low": comparison.low, "high": comparison.high},
            "verdict": comparison.verdict(higher_is_better=self.metric not in LOWER_IS_BETTER),
            "rows": self.rows,
            "synthetic": self.synthetic,
            "left_out": self.left_out,
            "runs": self.runs,
            "wall_s": round(self.wall_s, 1),
        }


def prove(
    synthetic: Path | str,
    reality: Path | str,
    recipe: Recipe | Path | str,
    out: Path | str,
    *,
    scorer: str = "",
    most_rows: int = 200,
    replace: bool = False,
    notice: Notice = lambda line: None,
) -> LiftResult:
    """Tune a recipe on real rows without and with synthetic rows; compare both on held-out rows.

    synthetic: the Dataset of synthetic rows. reality: the Dataset of real rows.

    Both runs use the same recipe except for `data.path`. With a budget of epochs the second makes more updates; with a
    budget of updates both make the same number. Values that are `auto` are chosen for the real rows and used for both.
    Synthetic rows in the group of a held-out row are left out. The interval is over groups (`evaluate/bootstrap.py`).
    Written below `out`: `with` (the Dataset), `adapter-without`, `adapter-with`, and their reports `report-without`,
    `report-with`.

    Raises what `tune` and `evaluate` raise, and SourceError if no row is held out.
    """
    started = time.monotonic()
    out = Path(out).absolute()
    real, synthetic_artifact = open_artifact(reality, "dataset"), open_artifact(synthetic, "dataset")
    names = ("with", "adapter-without", "adapter-with", "report-without", "report-with")
    for name in names:
        check_output_free(out / name, replace=replace)
    combined, added, left_out = _together(real, synthetic_artifact, out / "with", replace)
    tuned, scored, metric = {}, {}, scorer
    shared: Recipe | Mapping[str, Any] | Path | str = recipe
    for name, dataset in (("without", real), ("with", combined)):
        notice(f"tuning {name} synthetic rows")
        chosen = recipes.load(shared, ["--data.path", str(dataset.path)])
        tuned[name] = tune(chosen, out / f"adapter-{name}", replace=replace, show=False, notice=notice)
        # the values that `auto` took on the real rows are used for both
        shared = tuned[name].adapter.manifest["recipe"]
        report = evaluate(
            out / f"adapter-{name}",
            out=out / f"report-{name}",
            scorer=scorer,
            most_rows=most_rows,
            replace=replace,
            notice=notice,
        ).report
        scored[name] = {row["id"]: row for row in parquet_io.read_file(report.path / "rows.parquet")}
        metric = metric or str(report.manifest["primary"])
    return _compared(scored, metric, counts=(added, left_out), tuned=tuned, wall_s=time.monotonic() - started)


def _together(real: Artifact, synthetic_artifact: Artifact, out: Path, replace: bool) -> tuple[Artifact, int, int]:
    """Return the Dataset of both, the number of synthetic rows in it, and of those left out."""
    real_rows = list(parquet_io.read_examples(real))
    held_out = {split_group(row) for row in real_rows if row.split in HELD_OUT_SPLITS}
    if not held_out:
        raise SourceError(f"{real.path} holds out no row to compare on", "curate it with split.eval_fraction above 0")
    ids = {row.id for row in real_rows}
    added: list[Example] = []
    drops = []
    for row in parquet_io.read_examples(synthetic_artifact):
        if split_group(row) in held_out or row.id in ids:
            drops.append(
                drop_of(row, "group_held_out", "a real row of its group is held out, or is it itself", step=STEP)
            )
        else:
            added.append(replace_fields(row, split="train"))
    dataset = write_dataset_from(
        out,
        [real, synthetic_artifact],
        [*real_rows, *added],
        drops,
        step={STEP: {"added": len(added)}},
        replace=replace,
    )
    return dataset, len(added), len(drops)


def _compared(
    scored: dict[str, dict[str, dict[str, Any]]],
    metric: str,
    counts: tuple[int, int],
    tuned: dict[str, Tuned],
    wall_s: float,
) -> LiftResult:
    shared = [name for name in scored["without"] if name in scored["with"]]
    if not shared:
        raise ArtifactError(
            "the two reports share no row",
            "sartor validate SYNTHETIC --reality DATASET --out ACCEPTED --prove RECIPE --replace",
        )
    # a metric of the whole set, such as macro-F1, has no scores by row
    column = f"tuned_{metric}" if f"tuned_{metric}" in scored["without"][shared[0]] else "tuned_exact_match"
    scores_without = [float(scored["without"][row][column]) for row in shared]
    scores_with = [float(scored["with"][row][column]) for row in shared]
    groups = [group_of_stored(scored["without"][row]) for row in shared]
    runs = {
        name: {"adapter": str(run.adapter.path), "updates": run.as_json()["updates"]} for name, run in tuned.items()
    }
    comparison = bootstrap.paired_bootstrap(scores_without, scores_with, groups)
    added, left_out = counts
    return LiftResult(
        comparison,
        column.removeprefix("tuned_"),
        rows=len(shared),
        synthetic=added,
        left_out=left_out,
        runs=runs,
        wall_s=wall_s,
    )


__all__ = ["LiftResult", "prove"]
