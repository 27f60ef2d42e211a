"""Warnings about rows that are too few or too uniform to learn from or to evaluate on.

A warning refuses nothing, since a small set can be intended. It states the problem with its numbers, and a remedy.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sartor.core.records import Example
from sartor.core.splits import FEW_GROUPS, LEAST_GROUPS, split_group

# replies count as labels if none is longer
MAX_LABEL_CHARS = 60
# only the first rows of a larger set are checked: a label with two spellings recurs
MAX_ROWS = 20_000
_LISTED = 3


@dataclass(frozen=True)
class DataWarning:
    """A warning about data.

    reason: a stable word, such as `few_rows` or `spellings`.
    problem: the problem with its numbers.
    remedy: an instruction.
    """

    reason: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"warning: {self.problem}; {self.remedy}"


def dataset_warnings(examples: Iterable[Example]) -> list[DataWarning]:
    """Return the warnings about a Dataset's rows; only the first MAX_ROWS are checked."""
    rows = list(itertools.islice(examples, MAX_ROWS))
    groups = {split_group(row) for row in rows}
    held_out = {split_group(row) for row in rows if row.split == "eval"}
    warnings = []
    if rows and len(groups) < 2 * LEAST_GROUPS:
        problem = f"{_count(len(rows), 'row')} of {_count(len(groups), 'group')} cannot both teach and measure"
        remedy = (
            f"add rows: an interval needs {LEAST_GROUPS} held-out groups, a useful one {FEW_GROUPS}, beside those to "
            "learn from"
        )
        warnings.append(DataWarning("few_rows", problem, remedy))
    elif rows and 0 < len(held_out) < LEAST_GROUPS:
        problem = (
            f"{_count(len(held_out), 'group')} of {len(groups)} held out: no interval excludes anything below "
            f"{LEAST_GROUPS}"
        )
        fraction = min(0.5, -(-100 * LEAST_GROUPS // len(groups)) / 100)
        warnings.append(DataWarning("few_groups", problem, f"split.eval_fraction: {fraction:g}, or add rows"))
    replies = []
    for row in rows:
        if not row.is_document:
            last = row.messages[-1]
            replies.append(f"{last.text}\n{last.tool_calls}" if last.tool_calls else last.text)
    return warnings + reply_warnings(replies)


def evaluation_warnings(replies: Sequence[str], groups: Sequence[str]) -> list[DataWarning]:
    """Return the warnings about rows to evaluate on.

    replies, groups: the reference reply and the group of each of N rows.
    """
    warnings = []
    if (count := len(set(groups))) < LEAST_GROUPS:
        problem = (
            f"the {_count(len(groups), 'row')} are in {_count(count, 'group')}, and rows of one group are right or "
            "wrong "
            f"together: no interval excludes anything below {LEAST_GROUPS} groups"
        )
        remedy = f"give rows of {LEAST_GROUPS} groups or more, {FEW_GROUPS} for a useful interval"
        warnings.append(DataWarning("few_groups", problem, remedy))
    return warnings + reply_warnings(replies)


def reply_warnings(replies: Sequence[str]) -> list[DataWarning]:
    """Return the warnings about replies: all are equal, or a label has two spellings."""
    counts = Counter(replies)
    if len(replies) > 1 and len(counts) == 1:
        problem = (
            f"all {len(replies)} replies are {_quoted(replies[0])}: a model that always says so is right on every row"
        )
        return [DataWarning("one_reply", problem, "add rows with other replies")]
    spellings: defaultdict[str, list[str]] = defaultdict(list)
    for reply, _ in counts.most_common():
        spellings[_label_key(reply)].append(reply)
    if max(map(len, counts), default=0) > MAX_LABEL_CHARS:
        return []  # free text
    several = [variants for variants in spellings.values() if len(variants) > 1]
    if not several:
        return []
    examples = []
    for variants in several[:_LISTED]:
        examples.append(" and ".join(f"{_quoted(variant)} ({counts[variant]})" for variant in variants))
    subject = "1 label stands" if len(several) == 1 else f"{len(several)} labels stand"
    problem = f"{subject} in more than one spelling: {'; '.join(examples)}"
    return [DataWarning("spellings", problem, f"write each in one spelling, such as {_quoted(several[0][0])}")]


def _label_key(reply: str) -> str:
    """Return the label without case, blanks, underscores, hyphens between words and a final full stop.

    Labels with equal keys are spellings of the same label.
    """
    return re.sub(r"(?<=\w)[\s_-]+(?=\w)", " ", reply.casefold().replace("_", " ")).strip().rstrip(" .")


def _quoted(text: str) -> str:
    return repr(text if len(text) <= MAX_LABEL_CHARS else f"{text[:MAX_LABEL_CHARS]}...")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
