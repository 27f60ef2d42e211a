"""Training data from feedback, with rehearsal rows.

    feedback/     Dataset: what the inbox held of the agent when the retrain began, as curate reads it; a quarter held
                  out
    data/         Dataset: corrections and rehearsal to train on; held out are the live version's own rows and
                  corrections, as many as the gate compares on
    ratings/      Dataset: rated replies and rehearsal to train on; the same rows held out

Held-out ratings stay in feedback/: a rated reply is no reference to compare with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sartor.core import config, parquet_io
from sartor.core.artifacts import Artifact, kind_of, open_artifact
from sartor.core.confidence_sequences import FailureRate
from sartor.core.errors import ArtifactError, GateError
from sartor.core.lineage import ancestry
from sartor.core.records import Drop, Example, drop_of
from sartor.core.splits import TEST, is_of_groups, prompt_group, split_group, test_rows
from sartor.curate.dataset_writer import write_dataset_from
from sartor.curate.pipeline import curate
from sartor.curate.sources.feedback_inbox import of_folder
from sartor.curate.sources.types import InboxTerms
from sartor.learn import look_ledger, promotion_checks, triggers
from sartor.learn.run_record import RetrainContext

STEP = "retrain"
FEEDBACK, FOLDERS = "feedback", {"sft": "data", "kto": "ratings"}
# least rows of a leg with --anyway; else a quarter of at_least
FEWEST = 4
NO_KEY = "(no key)"


@dataclass(frozen=True)
class TrainingData:
    """Counts of the training data of a retrain.

    legs: tunings with enough rows, in order.
    corrections, ratings: rows of each.
    held: held-out rows, by kind.
    ignored: rows of keys that a person ignores.
    rates: key -> number of replies it rated, and of those it rated bad.
    """

    legs: tuple[str, ...]
    corrections: int
    ratings: int
    held: Mapping[str, int]
    rehearsal: int
    ignored: int
    rates: Mapping[str, FailureRate]


def collect_feedback(job: RetrainContext) -> Artifact:
    """Write feedback/, what the inbox holds of the agent now and curate trusts, or return it if it exists."""
    out = job.at(FEEDBACK)
    if kind_of(out) == "dataset":
        return open_artifact(out, "dataset")
    use = job.live().manifest.get("use", "commercial")
    recipe = {
        "sources": [{"path": f"inbox:{_inbox(job)}", "use": [use], "inbox": config.dump(_terms(job))}],
        "split": {"eval_fraction": job.rules.eval_fraction},
        "workers": 1,
    }
    return curate(recipe, out, notice=job.notice).dataset


def _terms(job: RetrainContext) -> InboxTerms:
    """Return the inbox terms, with the agent's own rows as known answers that raters are checked against."""
    dataset = job.own_rows()
    files = [name for name in dataset.manifest["files"] if name.startswith("examples/")]
    return InboxTerms(agent=job.agent, known=str(dataset.path / files[0]) if len(files) == 1 else "")


def distrusted(job: RetrainContext) -> list[str]:
    """Return a reason for each rater that contradicts the rest, except keys that a person ignores.

    Feedback of such raters is not learnt.
    """
    standings = of_folder(_inbox(job), _terms(job)).standings
    return [
        standing.reason for standing in standings if standing.is_distrusted and standing.key not in job.wishes.ignore
    ]


def write_training_data(job: RetrainContext, feedback: Artifact) -> TrainingData:
    """Write data/ and ratings/, each if there are enough rows, and return the counts."""
    dataset = job.own_rows()
    keys = keys_of_lines(_inbox(job))
    all_rows = list(parquet_io.read_examples(feedback))
    rows = [row for row in all_rows if not _keys_of(row, keys) <= set(job.wishes.ignore)]
    corrections, ratings = [row for row in rows if not row.rating], [row for row in rows if row.rating]
    rates = promotion_checks.by_key((key, row.rating) for row in ratings for key in sorted(_keys_of(row, keys)))
    held_out = _held_out(job, dataset, corrections)
    at_least = job.rules.at_least
    by_leg = {"sft": (corrections, at_least.corrections), "kto": (ratings, at_least.ratings)}
    legs, rehearsal = [], 0
    for leg, (leg_rows, min_rows) in by_leg.items():
        if len(leg_rows) < (FEWEST if job.wishes.anyway else min_rows * triggers.EARLY_FRACTION):
            continue
        train = [row for row in leg_rows if row.split == "train"]
        rehearsal_rows = draw_rehearsal(dataset, round(job.rules.rehearsal * len(train)), job.run.record.number)
        legs.append(leg)
        rehearsal += len(rehearsal_rows)
        _write(job.at(FOLDERS[leg]), [feedback, dataset], [*train, *rehearsal_rows], held_out)
    counts = {
        "feedback": sum(row.split == "eval" for row in corrections),
        "ratings": sum(row.split == "eval" for row in ratings),
    }
    return TrainingData(
        legs=tuple(legs),
        corrections=len(corrections),
        ratings=len(ratings),
        held={**counts, "all": len(held_out)},
        rehearsal=rehearsal,
        ignored=len(all_rows) - len(rows),
        rates=rates,
    )


def draw_rehearsal(dataset: Artifact, count: int, seed: int) -> list[Example]:
    """Return training rows of the live version's own Dataset.

    Each retrain draws others; a resumed one draws the same.
    """
    rows = [row for row in parquet_io.read_examples(dataset, "train") if not row.rating]
    rows.sort(key=lambda row: hashlib.sha256(f"{seed}:{row.id}".encode()).digest())
    return rows[:count]


def write_control_data(job: RetrainContext, leg: str) -> Path:
    """Write control-data-LEG/, with rehearsal rows alone and the same held-out rows, and return it.

    It has as many rows as the leg was trained on, if there are so many. Raises GateError if there is none.
    """
    out, learnt = job.at(f"control-data-{leg}"), open_artifact(job.at(FOLDERS[leg]), "dataset")
    dataset = job.own_rows()
    count = sum(1 for _ in parquet_io.read_examples(learnt, "train"))
    rows = [row for row in draw_rehearsal(dataset, count, job.run.record.number) if not _is_feedback(row)]
    if not rows:
        raise GateError(f"{dataset.path} has no rows to tune a control on", "more rows in the live version's Dataset")
    _write(out, [dataset], rows, list(parquet_io.read_examples(learnt, "eval")))
    return out


def ids_of_feedback(job: RetrainContext) -> set[str]:
    """Return the ids of corrections, on which a version erred.

    Those that an earlier retrain held out are included.
    """
    feedback = parquet_io.read_examples(open_artifact(job.at(FEEDBACK), "dataset"))
    # a row that an earlier retrain left out is only in this one's own Datasets
    datasets = [
        job.own_rows(),
        *(open_artifact(job.at(FOLDERS[leg]), "dataset") for leg in job.run.facts("curate")["legs"]),
    ]
    held_out = (row for dataset in datasets for row in parquet_io.read_examples(dataset, "eval"))
    return {row.id for row in feedback if not row.rating} | {row.id for row in held_out if _is_feedback(row)}


def _is_feedback(row: Example) -> bool:
    return any(origin.source.startswith("inbox:") for origin in row.origins)


def held_ratings(job: RetrainContext) -> list[Example]:
    """Return the rated replies that were not trained on; none if there is no leg of ratings."""
    if "kto" not in job.run.facts("curate")["legs"]:
        return []
    keys, ignored = keys_of_lines(_inbox(job)), set(job.wishes.ignore)
    rows = parquet_io.read_examples(open_artifact(job.at(FEEDBACK), "dataset"), "eval")
    return [row for row in rows if row.rating and not _keys_of(row, keys) <= ignored]


def keys_of_lines(inbox: Path) -> dict[str, str]:
    """Return the key that wrote each line of the inbox, by the line's locator; "(no key)" without one."""
    return {f"{file.name}:{line}": feedback.by.key or NO_KEY for file, line, feedback in triggers.lines(inbox)}


def _keys_of(row: Example, keys: Mapping[str, str]) -> set[str]:
    return {keys.get(origin.locator, NO_KEY) for origin in row.origins}


def read_recipe(file: Path) -> dict[str, Any]:
    """Return the tuning recipe in a manifest of an Adapter (`sartor.json`). Raises ArtifactError."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))["recipe"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{file} says no recipe: {error}", f"cp BACKUP/{file.name} {file}") from None


def _inbox(job: RetrainContext) -> Path:
    return Path(job.team.state) / "inbox"


def _held_out(job: RetrainContext, dataset: Artifact, corrections: Sequence[Example]) -> list[Example]:
    """Return held-out corrections and own rows, together as many as the gate asks for; the same for every leg.

    Corrections are at most half, and more only if there are too few own rows, since only those show what would suffer.
    Rows that fewer retrains have looked at come first: they carry more weight.
    """
    looks, most_rows = look_ledger.count_looks(job.run), job.rules.gate.rows
    held_out_corrections = [row for row in corrections if row.split == "eval"]
    rows = {row.id: row for row in (*own_held_out(dataset), *held_out_corrections)}
    by_look = sorted(rows.values(), key=lambda row: (looks[row.id], hashlib.sha256(row.id.encode()).digest()))
    correction_ids = {row.id for row in corrections}
    feedback = [row for row in by_look if row.id in correction_ids or _is_feedback(row)]
    own = [row for row in by_look if row.id not in correction_ids and not _is_feedback(row)]
    chosen = feedback[: max(most_rows // 2, most_rows - len(own))]
    return [*chosen, *own[: most_rows - len(chosen)]]


def own_held_out(dataset: Artifact) -> list[Example]:
    """Return the held-out rows of a live version's Dataset, with those that earlier retrains left out.

    The Dataset of a retrain has as many held-out rows as its gate asked for. The others are read from the Dataset that
    the retrains began with, as far as it still exists. Rows of a group that was trained on since are skipped, and rows
    with pictures or recordings, whose files the later Datasets do not have.
    """
    rows = [row for row in parquet_io.read_examples(dataset, "eval") if not row.rating]
    ancestors = ancestry.find_all(dataset, "dataset") if _is_of_retrain(dataset) else []
    first = _before_retrains(dataset, ancestors)
    if first is dataset:
        return rows
    ids = {row.id for row in rows}
    trained_groups: set[str] = set()
    for item in (dataset, *ancestors):
        for row in parquet_io.read_examples(item, "train"):
            trained_groups |= {split_group(row), prompt_group(row)}
    for row in parquet_io.read_examples(first, "eval"):
        has_media = any(part.media for message in row.messages for part in message.content)
        if not (row.rating or row.id in ids or has_media or is_of_groups(row, trained_groups)):
            rows.append(row)
    return rows


def _before_retrains(dataset: Artifact, ancestors: Sequence[Artifact]) -> Artifact:
    """Return the Dataset that the retrains began with.

    If one on the way there no longer exists, return the last one before it.
    """
    by_id = {item.id: item for item in ancestors}
    while _is_of_retrain(dataset):
        parent = by_id.get(dataset.manifest["parents"][-1]["id"])  # behind the feedback
        if parent is None:
            break
        dataset = parent
    return dataset


def _is_of_retrain(dataset: Artifact) -> bool:
    """Return whether a retrain wrote the Dataset, and no later step changed it."""
    return list((dataset.manifest.get("recipe") or {}).get("derived", ())) == [STEP]


def _write(out: Path, parents: Sequence[Artifact], train: Sequence[Example], held_out: Sequence[Example]) -> None:
    if kind_of(out) == "dataset":  # killed between this Dataset and the record
        return
    groups, train_rows, drops = {split_group(row) for row in held_out}, [], list[Drop]()
    # of the live version's Dataset and of those it was made of
    test_groups: set[str] = set()
    for dataset in (parents[-1], *ancestry.find_all(parents[-1], "dataset")):
        if test_rows(dataset.manifest):
            for row in parquet_io.read_examples(dataset, TEST):
                test_groups |= {split_group(row), prompt_group(row)}
    for row in train:
        if is_of_groups(row, test_groups):
            drops.append(drop_of(row, "group_held_out", "a row of the test split is of its group", step=STEP))
        elif split_group(row) in groups:
            drops.append(drop_of(row, "group_held_out", "a held-out row is of its group", step=STEP))
        else:
            train_rows.append(row)
    facts = {STEP: {"train": len(train_rows), "held_out": len(held_out)}}
    write_dataset_from(
        out, parents, [*train_rows, *(replace(row, split="eval") for row in held_out)], drops, step=facts
    )
