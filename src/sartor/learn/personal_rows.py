"""Dataset of a user's feedback or file."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sartor.core.artifacts import Artifact
from sartor.core.errors import ConfigError, SourceError
from sartor.core.records import Feedback
from sartor.curate.pipeline import curate
from sartor.curate.sources.feedback_inbox import row_of
from sartor.curate.sources.feedback_lines import merge_feedback
from sartor.learn.personal_options import INBOX
from sartor.serving.feedback_store import FeedbackStore
from sartor.serving.registry.user_versions import ANYBODY

# a person's feedback has no licence; it is used for that person alone
LICENCE = "LicenseRef-personal"


@dataclass(frozen=True)
class RowQuery:
    """Query for a user's rows for one agent.

    person: keyed digest of the user's id.
    data: `inbox`, or a file in any form that curate reads.
    speakers: key -> users that it may speak for. Where keys are used, feedback in a user's name from another key is
    not learnt from.
    has_keys: whether the team's server asks for keys; what was said before it did is then not learnt from, because
        anybody could say it.
    system: the live version's system prompt, put before prompts that clients send without one.
    """

    person: str
    agent: str
    data: str
    speakers: Mapping[str, Collection[str]]
    eval_fraction: float
    seed: int
    system: str = ""
    has_keys: bool = False


@dataclass(frozen=True)
class Collected:
    """Dataset of a user's rows, and the number of inbox entries left out by reason."""

    dataset: Artifact
    left_out: Mapping[str, int] = field(default_factory=dict)


def collect(inbox: FeedbackStore, query: RowQuery, folder: Path) -> Collected:
    """Write the user's Dataset into `folder`/rows, with `eval_fraction` of its prompts held out by group.

    Raises SourceError if there is no row, ConfigError for a missing file.
    """
    left_out: Counter[str] = Counter()
    source = folder / "rows.jsonl"
    if query.data == INBOX:
        lines = list(_learnable_rows(inbox, query, left_out))
        if not lines:
            text = (
                ", ".join(f"{reason}: {count}" for reason, count in left_out.items())
                or "nothing was said of its replies"
            )
            raise SourceError(
                f"the inbox has no row of that user for {query.agent} ({text})", "--data FILE, or wait for more"
            )
        source.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    else:
        file = Path(query.data)
        if not file.is_file():
            raise ConfigError(
                f"there is no file {file}", f"--data FILE in any form that curate reads, or --data {INBOX}"
            )
        source = Path(shutil.copyfile(file, folder / f"rows{file.suffix}"))
    recipe = {
        # the copy's name, as the file's own name may identify the user
        "sources": [{"path": str(source), "licence": LICENCE, "consent": "given"}],
        "split": {"eval_fraction": query.eval_fraction},
        "seed": query.seed,
        "workers": 1,
    }
    try:
        dataset: Artifact = curate(recipe, folder / "rows").dataset
    finally:
        source.unlink()
    return Collected(dataset, dict(left_out))


def _learnable_rows(inbox: FeedbackStore, query: RowQuery, left_out: Counter[str]) -> Iterator[Mapping[str, Any]]:
    """Yield the row to learn from each reply with feedback of the user.

    The row has the correction, or the reply if it was rated good.
    """
    newest: dict[tuple[str, str], Feedback] = {}  # receipt and key: one key does not speak for another
    for line in inbox.lines():
        feedback = line.feedback
        if (
            feedback is not None
            and feedback.by.user == query.person
            and feedback.agent.partition("@")[0] == query.agent
        ):
            identity = feedback.receipt, feedback.by.key
            older = newest.pop(identity, None)
            newest[identity] = merge_feedback(feedback, older) if older else feedback
    accepted: dict[str, Feedback] = {}
    for feedback in newest.values():
        if reason := _rejection(feedback, query):
            left_out[reason] += 1
            continue
        accepted.pop(feedback.receipt, None)
        accepted[feedback.receipt] = feedback  # of two keys that may speak for the user, the newer counts
    for feedback in accepted.values():
        row = row_of(feedback)
        # as the server does, put the system prompt first
        has_system = row["prompt"][0]["role"] in ("system", "developer") or not query.system
        system = [] if has_system else [{"role": "system", "content": query.system}]
        # all rows in one form, as a file has one
        yield {"messages": [*system, *row["prompt"], *(row.get("chosen") or row["completion"])], "date": feedback.date}


def _rejection(feedback: Feedback, query: RowQuery) -> str:
    if feedback.asker:
        return "said of a reply to another user"
    if query.has_keys and not feedback.by.key:
        return "said before the team asked for keys"
    if feedback.by.key and not {query.person, ANYBODY} & set(query.speakers.get(feedback.by.key, ())):
        return "said by a key that may not speak for that user"
    if feedback.by.consent == "refused":
        return "without consent"
    if not feedback.has_words:
        return "the server no longer knew what was asked"
    if feedback.correction or (feedback.rating or 0) > 0:
        return ""
    return "rated bad, and not corrected" if feedback.rating else "neither rated nor corrected"
