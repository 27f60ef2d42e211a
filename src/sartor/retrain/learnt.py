"""What a retrain learns from: the feedback of one agent by kind, and rows of the live version's own Dataset beside it.

    feedback/     Dataset: what the inbox held of the agent when the retrain began, as curate reads it; a quarter held out
    data/         Dataset: corrections and rehearsal to train on; held out are the live version's own rows and corrections
    ratings/      Dataset: rated replies and rehearsal to train on; the same rows held out

Held-out ratings stay in feedback/: a rated reply is no reference to be compared with.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sartor.agents.monitors import Rate
from sartor.core import rows
from sartor.core.artifacts import Artifact, kind_of, open_artifact
from sartor.core.errors import ArtifactError, GateError
from sartor.core.records import Drop, Example
from sartor.curate.derived import write_derived
from sartor.curate.pipeline import curate
from sartor.curate.steps.contract import dropped
from sartor.edge.files import write_whole
from sartor.retrain import news, suspects
from sartor.retrain.job import Job

STEP = "retrain"
FEEDBACK, FOLDERS = "feedback", {"sft": "data", "kto": "ratings"}
# with --anyway; else a quarter of at_least
FEWEST = 4
LICENCE = "LicenseRef-feedback"


@dataclass(frozen=True)
class Learnt:
    """legs: which tunings there are rows for, in order. corrections, ratings: rows of each; held: those that are held out."""

    legs: tuple[str, ...]
    corrections: int
    ratings: int
    held: Mapping[str, int]
    rehearsal: int
    ignored: int


def heard(job: Job) -> Artifact:
    """feedback/: what the inbox holds of the agent now, without the keys that a person ignores."""
    out = job.at(FEEDBACK)
    if kind_of(out) == "dataset":
        return open_artifact(out, "dataset")
    inbox = job.at("inbox")
    lines = [json.dumps(said.as_json(), ensure_ascii=False) for said in _of_agent(job) if said.by.key not in job.wishes.ignore]
    if not lines:
        raise GateError(f"nothing was said of {job.agent} that may be learnt from", "see /v1/feedback in docs/serving.md")
    # a copy: what is said meanwhile is the next retrain's, and a killed curation finds the same bytes
    write_whole(inbox / "feedback-all.jsonl", "".join(f"{line}\n" for line in lines).encode())
    use = job.live().manifest.get("use", "commercial")
    recipe = {
        "sources": [{"path": f"inbox:{inbox}", "licence": LICENCE, "use": [use]}],
        "split": {"eval_fraction": job.rules.eval_fraction, "by": "prompt"},
    }
    made = curate(recipe, out, notice=job.notice).dataset
    shutil.rmtree(inbox)
    return made


def written(job: Job, feedback: Artifact) -> Learnt:
    """data/ and ratings/, as far as there are enough rows of each."""
    own = job.own_rows()
    said = list(rows.read_examples(feedback))
    corrections, ratings = [row for row in said if not row.rating], [row for row in said if row.rating]
    held = _held_out(job, own, corrections)
    least = job.rules.at_least
    counted = {"sft": (corrections, least.corrections), "kto": (ratings, least.ratings)}
    legs, rehearsal = [], 0
    for leg, (some, enough) in counted.items():
        if len(some) < (FEWEST if job.wishes.anyway else enough * news.EARLY_FRACTION):
            continue
        train = [row for row in some if row.split == "train"]
        beside = rehearsed(own, round(job.rules.rehearsal * len(train)), job.work.record.number)
        legs.append(leg)
        rehearsal += len(beside)
        _write(job.at(FOLDERS[leg]), [feedback, own], [*train, *beside], held)
    counts = {
        "feedback": sum(row.split == "eval" for row in corrections),
        "ratings": sum(row.split == "eval" for row in ratings),
    }
    ignored = sum(one.by.key in job.wishes.ignore for one in _of_agent(job)) if job.wishes.ignore else 0
    return Learnt(tuple(legs), len(corrections), len(ratings), {**counts, "all": len(held)}, rehearsal, ignored)


def rehearsed(own: Artifact, count: int, seed: int) -> list[Example]:
    """Training rows of the live version's own Dataset: another draw for each retrain, the same in a resumed one."""
    every = [row for row in rows.read_examples(own, "train") if not row.rating]
    every.sort(key=lambda row: hashlib.sha256(f"{seed}:{row.id}".encode()).digest())
    return every[:count]


def ids_of_feedback(job: Job) -> set[str]:
    """Of the corrections: which rows of a Report are such."""
    return {row.id for row in rows.read_examples(open_artifact(job.at(FEEDBACK), "dataset")) if not row.rating}


def held_ratings(job: Job) -> list[Example]:
    """Rated replies that were not trained on, where ratings were learnt from at all."""
    if "kto" not in job.work.facts("curate")["legs"]:
        return []
    return [row for row in rows.read_examples(open_artifact(job.at(FEEDBACK), "dataset"), "eval") if row.rating]


def rates_of_keys(job: Job) -> dict[str, Rate]:
    """What each key said of the agent's replies; an inbox without keys has one that is called (no key)."""
    told = (said for said in _of_agent(job) if said.by.key not in job.wishes.ignore)
    return suspects.by_key((said.by.key or "(no key)", said.rating or 0.0) for said in told)


def read_recipe(file: Path) -> dict[str, Any]:
    """The tuning recipe in a manifest of an Adapter (`sartor.json`). Raises ArtifactError."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))["recipe"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{file} says no recipe: {error}", "restore the Release from a copy") from None


def _of_agent(job: Job) -> Iterator[Any]:
    """Feedback on any version of the agent, up to when the retrain began."""
    for said in news.feedback(Path(job.team.state) / "inbox"):
        if said.agent.rpartition("@")[0] == job.agent and said.date <= job.work.record.began:
            yield said


def _held_out(job: Job, own: Artifact, corrections: Sequence[Example]) -> list[Example]:
    """Held-out corrections, and of the live version's own held-out rows as many as the gate asks; the same for every leg."""
    said = [row for row in corrections if row.split == "eval"]
    known = {row.id for row in said}
    theirs = [row for row in rows.read_examples(own, "eval") if not row.rating and row.id not in known]
    theirs.sort(key=lambda row: hashlib.sha256(row.id.encode()).digest())
    return [*said, *theirs[: max(job.rules.gate.rows - len(said), 0)]]


def _write(out: Path, parents: Sequence[Artifact], train: Sequence[Example], held: Sequence[Example]) -> None:
    if kind_of(out) == "dataset":  # killed between this Dataset and the record
        return
    groups, kept, drops = {row.group for row in held}, [], list[Drop]()
    for row in train:
        if row.group in groups:
            drops.append(dropped(row, "group_held_out", "a held-out row is of its group", step=STEP))
        else:
            kept.append(row)
    facts = {STEP: {"train": len(kept), "held_out": len(held)}}
    write_derived(out, parents, [*kept, *(replace(row, split="eval") for row in held)], drops, step=facts)
