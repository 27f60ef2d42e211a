"""May a personal version answer? Losses on the user's held-out rows, and on what the live version was held out on.

Both are non-inferiority tests: the upper end of the 95 % interval over groups (`evaluate.compare`) may not lie above a
margin. A delta that learnt nothing passes, and changes nothing; one that is worse than it may be does not.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sartor.core import catalogue
from sartor.core import parquet_io as stored
from sartor.core.artifacts import Artifact, open_artifact
from sartor.core.errors import ArtifactError, SourceError
from sartor.core.records import Example
from sartor.core.splits import group_of
from sartor.evaluate.bootstrap import LEAST_WIDTH, Comparison, paired
from sartor.evaluate.predictions import HeldOut
from sartor.models.lora_tensors import Tensors
from sartor.models.packing import Encoded
from sartor.personalization import benefit_report
from sartor.personalization.acceptance import LEAST_HELD_OUT, LEAST_TRAINED, too_few_prompts
from sartor.personalization.stacked_adapter import Stack
from sartor.personalization.user_rows import example_of
from sartor.personalization.user_tokens import encoded
from sartor.serving.team_config import PersonalTerms
from sartor.tune.tokenized_dataset import Rows

# Held-out rows of the live version that are looked at: more narrow the interval, and cost time
MOST_PROBE_ROWS = 64
_MORE_PROBE = "keep its Dataset where it was tuned, or tell where it is: sartor index DIR"


@dataclass(frozen=True)
class Asked:
    """Rows to be judged by, and the group of each."""

    rows: Sequence[Encoded]
    groups: Sequence[str]


@dataclass(frozen=True)
class Verdict:
    """Nats a token, before (the live version) and after. why: empty if it may answer. verdict: what the own interval says."""

    own: Comparison
    elsewhere: Comparison
    verdict: str
    why: str

    def as_json(self) -> dict[str, Any]:
        """What the registry and the command say."""
        return {**asdict(self), "unit": "nats per token"}


def own_rows(dataset: Artifact, rows: Rows) -> Asked:
    """The user's held-out rows. Raises SourceError where there are too few to tune on, or to tell anything by."""
    group = {example.id: group_of(example) for example in stored.read_examples(dataset)}
    asked = Asked(rows.held_out, [group[row.example_id] for row in rows.held_out])
    if len(rows.train) < LEAST_TRAINED or len(set(asked.groups)) < LEAST_HELD_OUT:
        raise SourceError(
            f"{len(rows.train)} rows to tune on and {len(set(asked.groups))} held-out prompts are too few; "
            f"{LEAST_TRAINED} and {LEAST_HELD_OUT} are needed",
            "wait for more feedback of that user, or --data FILE with more rows",
        )
    return asked


def probe_rows(release: Artifact, stack: Stack) -> Asked:
    """What the live version must go on to know: its Dataset's held-out rows where that is here, else the Release's canaries.

    Raises SourceError where there are fewer than two of either.
    """
    chat, most = stack.resident.base.chat, stack.resident.recipe.data.max_length_tokens
    coded = [(encoded(one, one.id, chat, most), group_of(one)) for one in [*_held_out(release), *_canaries(release)]]
    usable = [(row, group) for row, group in coded if isinstance(row, Encoded)][:MOST_PROBE_ROWS]
    if len({group for _, group in usable}) < 2:
        raise SourceError(
            f"{release.path} has {len(usable)} held-out rows that can be used here; what it may forget cannot be measured",
            _MORE_PROBE,
        )
    return Asked([row for row, _ in usable], [group for _, group in usable])


def check_probe(probe: Asked, terms: PersonalTerms) -> None:
    """Raise SourceError where so few prompts could not show, whatever is tuned, that nothing was forgotten."""
    if terms.most_elsewhere < LEAST_WIDTH and (too_few := too_few_prompts(probe.groups)):
        raise SourceError(f"{too_few} that what the live version knows is not forgotten", _MORE_PROBE)


def judge(stack: Stack, tuned: Tensors, own: Asked, probe: Asked, terms: PersonalTerms) -> Verdict:
    """Compare the tuned ranks with none, on both."""
    mine, other = (_compared(stack, tuned, asked) for asked in (own, probe))
    why = ""
    if not mine.high <= terms.most_worse:
        why = f"on the user's held-out rows it may be worse by {mine.high:.3f} nats a token; the limit is {terms.most_worse:g}"
    elif not other.high <= terms.most_elsewhere:
        why = (
            f"on {len(probe.rows)} held-out rows of the live version it may be worse by {other.high:.3f} nats a token; "
            f"the limit is {terms.most_elsewhere:g}"
        )
        if too_few := too_few_prompts(probe.groups):
            why = f"cannot tell what the live version would forget: {too_few}: {_MORE_PROBE}"
    return Verdict(mine, other, mine.verdict(higher_is_better=False), why)


def _compared(stack: Stack, tuned: Tensors, asked: Asked) -> Comparison:
    rows = benefit_report.Own(asked.rows, asked.groups, HeldOut([], Path()))
    before, after = (benefit_report.side(stack.resident, adapter, rows).losses for adapter in (stack.unchanged, tuned))
    return paired(before, after, asked.groups, rows.tokens, is_bounded=False)


def _held_out(release: Artifact) -> list[Example]:
    """Of the Dataset that the Release's adapter was tuned on; none where it is not on this machine, or holds out nothing."""
    with suppress(ArtifactError, OSError, ValueError, KeyError):
        parents = json.loads((release.path / "sartor.json").read_bytes())["parents"]
        for parent in parents:
            if parent["kind"] == "dataset" and (path := catalogue.locate(parent["id"], parent["path"])):
                return [one for one in stored.read_examples(open_artifact(path, "dataset")) if one.split == "eval"]
    return []


def _canaries(release: Artifact) -> list[Example]:
    told = release.manifest.get("canaries", [])
    return [example_of({"messages": [*one["messages"], {"role": "assistant", "content": one["reply"]}]}) for one in told]
