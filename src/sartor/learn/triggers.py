"""Feedback counts, triggers of a retrain, and the watch loop.

Each retrain of the loop is a process of its own: its resources are freed when it ends, and an error of one ends no
other.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sartor.core.confidence_sequences import FailureRate, log_evidence
from sartor.core.errors import ConfigError, SartorError
from sartor.core.lineage.receipt_index import ReceiptIndex, ReceiptLocation
from sartor.core.records import Feedback
from sartor.curate.sources.feedback_inbox import MOST_BYTES
from sartor.curate.sources.feedback_lines import prefix_digest, read_feedback_lines
from sartor.learn.run_record import (
    Notice,
    RunRecord,
    list_runs,
    live_version,
    read_registry,
    resolve_trial,
    retrain_lock,
)
from sartor.serving.team_config import Retraining, Team, load

# level of the tests for a rise of bad ratings and for a drift of router scores
ALPHA = 0.01
# most receipts on either side of the comparison
MOST_RECEIPTS = 500
FEWEST_RECEIPTS = 30
EARLY_FRACTION = 0.25


@dataclass(frozen=True)
class FeedbackCounts:
    """Counts of an agent's feedback.

    since: start of the period, ISO; "" for all time.
    ratings: ratings in the period, and the bad ones among them.
    before: ratings up to `since`.
    unlearnable: corrections in the period whose prompt is no longer known.
    """

    agent: str
    since: str
    corrections: int
    ratings: FailureRate
    before: FailureRate
    unlearnable: int

    def as_json(self) -> dict[str, Any]:
        """Return the counts for --due."""
        fields = {
            "agent": self.agent,
            "since": self.since,
            "corrections": self.corrections,
            "ratings": self.ratings.seen,
        }
        return {**fields, "bad_ratings": self.ratings.bad, "not_learnable": self.unlearnable}


@dataclass(frozen=True)
class RetrainTrigger:
    """Triggers of a retrain that have fired, or the feedback that is missing."""

    counts: FeedbackCounts
    triggers: tuple[str, ...]
    lacking: str

    def as_json(self) -> dict[str, Any]:
        """Return a row of --due."""
        return {**self.counts.as_json(), "due": bool(self.triggers), "why": "; ".join(self.triggers) or self.lacking}


def feedback_counts(inbox: Path, agent: str, since: str) -> FeedbackCounts:
    """Count an agent's feedback in an inbox, over all its versions."""
    corrections, unlearnable, after, before = 0, 0, FailureRate(), FailureRate()
    for _, _, feedback in lines(inbox):
        if feedback.agent.partition("@")[0] != agent:
            continue
        is_new = feedback.date > since
        if feedback.rating:
            (after if is_new else before).count(feedback.rating < 0)
        if is_new and feedback.correction:
            corrections, unlearnable = corrections + feedback.has_words, unlearnable + (not feedback.has_words)
    return FeedbackCounts(agent, since, corrections=corrections, ratings=after, before=before, unlearnable=unlearnable)


def lines(inbox: Path) -> Iterator[tuple[Path, int, Feedback]]:
    """Yield (file, line number, feedback) of an inbox; malformed lines are skipped, since curate counts them."""
    for file in sorted(inbox.glob("feedback-*.jsonl")):
        size = file.stat().st_size
        with file.open("rb") as stream:
            sha256 = prefix_digest(stream, size)
        for number, feedback in read_feedback_lines(str(file), size, sha256, MOST_BYTES):
            if isinstance(feedback, Feedback):
                yield file, number, feedback


def last_run(state: Path, agent: str) -> RunRecord | None:
    """Return the newest retrain of an agent, or None."""
    return next(iter(reversed(list_runs(state, agent))), None)


def check_triggers(
    state: Path, agent: str, rules: Retraining, scores: tuple[Sequence[float], Sequence[float]] = ((), ())
) -> RetrainTrigger:
    """Return the triggers of an agent's retrain.

    scores: the router's for its requests, before the last retrain and since.
    """
    last_retrain = last_run(state, agent)
    since = last_retrain.record.began if last_retrain else ""
    counts = feedback_counts(state / "inbox", agent, since)
    at_least, drift = rules.at_least, rules.drift
    triggers = []
    if counts.corrections >= at_least.corrections:
        triggers.append(f"{counts.corrections} corrections")
    if counts.ratings.seen >= at_least.ratings:
        triggers.append(f"{counts.ratings.seen} ratings")
    if (
        counts.corrections >= at_least.corrections * EARLY_FRACTION
        or counts.ratings.seen >= at_least.ratings * EARLY_FRACTION
    ):
        before, after, margin = counts.before, counts.ratings, drift.bad_ratings
        if margin < 1 and log_evidence(after, before, margin) >= -math.log(ALPHA):
            triggers.append(f"bad ratings: {before.bad} of {before.seen} before, {after.bad} of {after.seen} since")
        triggers += _input_drift(*scores, drift.input)
    hours = hours_since(since)
    if rules.every_hours and hours >= rules.every_hours and (counts.corrections or counts.ratings.seen):
        triggers.append(f"{hours:.0f} hours" if since else "never retrained")
    return RetrainTrigger(counts, tuple(triggers), missing_feedback(counts, rules))


def missing_feedback(counts: FeedbackCounts, rules: Retraining) -> str:
    """Return a sentence on how much more feedback is needed."""
    floor = rules.at_least
    gap = (
        f"{max(floor.corrections - counts.corrections, 0)} more corrections or "
        f"{max(floor.ratings - counts.ratings.seen, 0)}"
    )
    return (
        f"{counts.corrections} corrections and {counts.ratings.seen} ratings since {counts.since or 'ever'}; "
        f"it takes {gap} more ratings"
    )


def hours_since(date: str) -> float:
    """Return the hours since an ISO date; infinite for none."""
    return (datetime.now(UTC) - datetime.fromisoformat(date)).total_seconds() / 3600 if date else math.inf


def _input_drift(before: Sequence[float], after: Sequence[float], min_effect: float) -> Iterator[str]:
    """Yield a reason if the router finds recent requests less like the agent's than earlier ones.

    One-sided Mann-Whitney U test at ALPHA, with n and m scores: effect = 2 U / (n m) - 1, the rank-biserial
    correlation, must be at least `min_effect`.
    """
    if min_effect >= 1 or min(len(before), len(after)) < FEWEST_RECEIPTS:
        return
    from scipy.stats import mannwhitneyu  # imported here: triggers are checked often, and the import takes a second

    test = mannwhitneyu(before, after, alternative="greater")
    # effect = 2 U / (n m) - 1: 0 if neither side is above the other, 1 if every earlier request is
    effect = 2 * float(test.statistic) / (len(before) * len(after)) - 1
    if test.pvalue < ALPHA and effect >= min_effect:
        yield f"input: the router finds the requests less like the agent's than before, by {effect:.2f} of 1"


def router_scores(state: Path, agent: str, release_id: str) -> tuple[list[float], list[float]]:
    """Return the router's scores of requests to one Release of an agent: the first ones, and as many newest ones."""
    folder = state / "receipts"
    if not folder.is_dir():
        return [], []
    receipts = list(ReceiptIndex(folder).of_releases([release_id]))
    n_receipts = min(len(receipts) // 2, MOST_RECEIPTS)
    early = [_score(folder, receipt, agent) for receipt in receipts[:n_receipts]]
    late = [_score(folder, receipt, agent) for receipt in receipts[len(receipts) - n_receipts :]]
    return [score for score in early if score is not None], [score for score in late if score is not None]


def _score(folder: Path, receipt: ReceiptLocation, agent: str) -> float | None:
    """Return the score; None for a request that named its agent, and for a damaged receipt."""
    try:
        with (folder / receipt.segment).open("rb") as stream:
            stream.seek(receipt.start)
            score = json.loads(stream.read(receipt.length))["choice"]["scores"].get(agent)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return float(score) if isinstance(score, int | float) else None


# seconds between two checks of the loop
EVERY_S = 60.0
# checks after which a retrain that ended with an error is tried again
PAUSE_LOOKS = 30
Start = Callable[[Sequence[str]], int]


@dataclass(frozen=True)
class Dues:
    """Every agent that learns, with its triggers."""

    rows: list[dict[str, Any]]

    def as_json(self) -> dict[str, Any]:
        """Return the JSON output of the command."""
        return {"rows": self.rows, "due": [row["agent"] for row in self.rows if row["due"]]}


def list_due(team: Path | str, flags: Sequence[str] = ()) -> Dues:
    """Return each agent's triggers, or what is missing. No retrain begins; the outcome of a trial is recorded."""
    loaded_team = load(Path(team), flags)
    state, rows = Path(loaded_team.state), []
    names = loaded_team.retrain.agents or sorted(
        {*(member.name for member in loaded_team.agents), *read_registry(loaded_team).agents}
    )
    for name in names:
        live = live_version(loaded_team, name)
        row = check_triggers(state, name, loaded_team.retrain, router_scores(state, name, live.release_id)).as_json()
        rows.append({**row, **_standing(loaded_team, name), "live": live.version})
    return Dues(rows)


def _standing(team: Team, name: str) -> dict[str, Any]:
    """Return the reason that prevents a new retrain, or the one that has to be resumed."""
    try:
        with retrain_lock(Path(team.state), name):
            run = last_run(Path(team.state), name)
            if run is None:
                return {}
            if run.is_open:
                return {"due": True, "why": f"{run.folder} was not finished"}
            resolve_trial(team, run)
            return {"due": False, "why": run.record.reason} if run.record.decision == "canary" else {}
    except ConfigError as error:
        return {"due": False, "why": error.problem}


def watch(
    team: Path | str,
    flags: Sequence[str] = (),
    *,
    every_s: float = EVERY_S,
    looks: int = 0,
    start: Start = lambda command: subprocess.run(command, check=False).returncode,
    notice: Notice = lambda line: None,
) -> int:
    """Check at intervals and retrain what is due, one agent after the other; return the number of retrains.

    looks: number of checks; 0 is for ever, until a signal ends the process. The running retrain ends with it and is
    resumed next time.
    """
    pausing: dict[str, int] = {}
    started, look, pause = 0, 0, threading.Event()
    while not looks or look < looks:
        look += 1
        try:
            due = [str(row["agent"]) for row in list_due(team, flags).rows if row["due"]]
        except SartorError as error:  # a locked registry, or a retrain started by hand: the next check may succeed
            notice(f"{error.kind}: {error.problem}")
            due = []
        for name in due:
            if pausing.get(name, 0) > look:
                continue
            command = [sys.executable, "-m", "sartor", "retrain", str(team), "--agent", name, *flags]
            notice(f"retraining {name}")
            started += 1
            if code := start(command):
                pausing[name] = look + PAUSE_LOOKS
                notice(f"the retrain of {name} ended with {code}; it is tried again in {PAUSE_LOOKS * every_s:.0f} s")
        if look != looks:
            pause.wait(every_s)
    return started
