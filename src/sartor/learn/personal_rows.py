"""A user's feedback or file as a Dataset."""

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
from sartor.curate.sources.feedback_lines import over
from sartor.learn.personal_options import INBOX
from sartor.serving.feedback_store import FeedbackStore
from sartor.serving.registry.user_versions import ANYBODY

# Of what a person says there is no licence; it is used for that person alone
LICENCE = "LicenseRef-personal"


@dataclass(frozen=True)
class Wanted:
    """Whose rows, of which agent, and from where: `inbox`, or a file in any form that curate reads.

    speakers: by key, for whom it may speak. Where keys are used, what others say in a person's name is not learnt from.
    system: the live version's system prompt, which stands before what clients send without one.
    """

    person: str
    agent: str
    data: str
    speakers: Mapping[str, Collection[str]]
    eval_fraction: float
    seed: int
    system: str = ""


@dataclass(frozen=True)
class Collected:
    """The Dataset, and what of the inbox is not in it."""

    dataset: Artifact
    left_out: Mapping[str, int] = field(default_factory=dict)


def collect(inbox: FeedbackStore, wanted: Wanted, folder: Path) -> Collected:
    """Write the Dataset into `folder`/rows; a quarter of its prompts, say, held out by group. Raises SourceError for no row."""
    left_out: Counter[str] = Counter()
    source = folder / "rows.jsonl"
    if wanted.data == INBOX:
        lines = list(_learnt(inbox, wanted, left_out))
        if not lines:
            said = ", ".join(f"{reason}: {count}" for reason, count in left_out.items()) or "nothing was said of its replies"
            raise SourceError(f"the inbox has no row of that user for {wanted.agent} ({said})", "--data FILE, or wait for more")
        source.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    else:
        source = _copied(Path(wanted.data), folder)
    recipe = {
        # the copy's name, not the file's: that may be the user's
        "sources": [{"path": str(source), "licence": LICENCE, "consent": "given"}],
        "split": {"eval_fraction": wanted.eval_fraction},
        "seed": wanted.seed,
        "workers": 1,
    }
    try:
        dataset: Artifact = curate(recipe, folder / "rows").dataset
    finally:
        source.unlink()
    return Collected(dataset, dict(left_out))


def _copied(file: Path, folder: Path) -> Path:
    if not file.is_file():
        raise ConfigError(f"there is no file {file}", f"--data FILE in any form that curate reads, or --data {INBOX}")
    return Path(shutil.copyfile(file, folder / f"rows{file.suffix}"))


def _learnt(inbox: FeedbackStore, wanted: Wanted, left_out: Counter[str]) -> Iterator[Mapping[str, Any]]:
    """What is to be learnt of each reply that the person spoke of: the correction, or the reply, if it was found good."""
    newest: dict[str, Feedback] = {}
    for kept in inbox.lines():
        said = kept.said
        if said is not None and said.by.user == wanted.person and said.agent.partition("@")[0] == wanted.agent:
            older = newest.pop(said.receipt, None)
            newest[said.receipt] = over(said, older) if older else said
    for said in newest.values():
        if why := _unfit(said, wanted):
            left_out[why] += 1
            continue
        row = row_of(said)
        # the server puts the system prompt there, too
        has_system = row["prompt"][0]["role"] in ("system", "developer") or not wanted.system
        system = [] if has_system else [{"role": "system", "content": wanted.system}]
        # one form for all: a file has one
        yield {"messages": [*system, *row["prompt"], *(row.get("chosen") or row["completion"])], "date": said.date}


def _unfit(said: Feedback, wanted: Wanted) -> str:
    if said.by.key and not {wanted.person, ANYBODY} & set(wanted.speakers.get(said.by.key, ())):
        return "said by a key that may not speak for that user"
    if said.by.consent == "refused":
        return "without consent"
    if not said.has_words:
        return "the server no longer knew what was asked"
    if said.correction or (said.rating or 0) > 0:
        return ""
    return "rated bad, and not corrected" if said.rating else "neither rated nor corrected"
