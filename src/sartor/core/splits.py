"""Groups of rows and deterministic train/eval splits.

A group is never divided between splits, and its rows count as one unit in a measurement: intervals are over groups,
never over rows. `split_group` returns the group for a split, where rows with the same user turns stay together even in
different contexts. `group_of` returns the group for a measurement, where a row without a group is usually its own.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from sartor.core.records import Example, digest

# splits that no tuning learns from: `eval` may be used any number of times, `test` only for the release
TEST = "test"
HELD_OUT_SPLITS = ("eval", TEST)
# with fewer groups, a fault that none of them showed may still occur in one of ten
FEW_GROUPS = 40


def least_groups(tail: float = 0.025) -> int:
    """Return the fewest groups that can reach a one-sided level in a sign-flip test.

    With n groups, all better, the smallest p-value is 2^-n: 1/32 for five groups.
    """
    return math.ceil(-math.log2(tail))


# number of groups that a two-sided 95 % interval needs to exclude anything
LEAST_GROUPS = least_groups()


def group_of(row: Example) -> str:
    """Return the group of a row in a measurement: its own group, or a name derived from its whole input.

    Rows with the same input are one group, since the model answers them alike: a duplicate adds no evidence. Rows
    about the same images and recordings are one group whatever they ask.
    """
    if row.group or row.is_document:
        return row.group or row.id
    if media := _media(row):
        return media
    return f"shown:{digest([[message.plain() for message in row.prompt], row.tools])[:16]}"


def group_of_stored(row: Mapping[str, Any]) -> str:
    """Return the group of a row in a Report's table.

    Older Reports store no group for rows without one; each such row is then its own group.
    """
    return str(row["group"] or row["id"])


def stated_group(value: Any) -> str | None:
    """Return the group that a row's field states, empty for none; None if the field is not a valid name.

    pandas writes a column of whole numbers with gaps as floats, with NaN for a gap. Blank text counts as none.
    """
    if isinstance(value, float) and (math.isnan(value) or value.is_integer()):
        value = None if math.isnan(value) else int(value)
    if value is not None and not isinstance(value, (str, int)):
        return None
    text = "" if value is None else str(value)
    return text if text.strip() else ""


def split_group(row: Example) -> str:
    """Return the group that a split keeps together: the row's own, or its prompt's."""
    return row.group or prompt_group(row)


def prompt_group(row: Example) -> str:
    """Return a name for the prompt of a row; rows with the same user turns share it.

    Rows about the same images and recordings share a name whatever they ask: a held-out image must not be one that was
    trained on.
    """
    if row.is_document:
        return row.id
    if media := _media(row):
        return media
    return f"prompt:{digest([message.plain() for message in _user_messages(row)])[:16]}"


def conversation_group(row: Example) -> str:
    """Return a name for the conversation, derived from its first question.

    It equals the prompt's name if the row has a single question.
    """
    first = next(
        (index for index, message in enumerate(row.messages) if message.role == "user"), len(row.messages) - 1
    )
    return prompt_group(replace(row, messages=(*row.messages[: first + 1], row.messages[-1])))


def _user_messages(row: Example) -> list[Any]:
    return [message for message in row.messages if message.role == "user"]


def _media(row: Example) -> str:
    """Return a name for the images and recordings in the user turns; empty if there are none."""
    media: list[Any] = []
    for message in _user_messages(row):
        media += [part.plain() for part in message.content if part.media]
    return f"media:{digest(media)[:16]}" if media else ""


def test_rows(manifest: Mapping[str, Any]) -> int:
    """Return the number of rows in a Dataset's test split, as its manifest counts them."""
    return int(manifest.get("counts", {}).get("splits", {}).get(TEST, 0))


def is_of_groups(row: Example, groups: Collection[str]) -> bool:
    """Return whether the row's group or its prompt's name is one of `groups`."""
    return split_group(row) in groups or prompt_group(row) in groups


def held_out_groups(groups: Iterable[str], fraction: float, seed: int | str) -> set[str]:
    """Return groups that together hold about `fraction` of the rows.

    groups: the group of each row, or a Counter of the rows of each group.

    At least one group stays for training. A group that would overshoot the target by more than it helps is skipped, so
    that a few large groups cannot take most of the training rows.

    >>> sorted(held_out_groups(["a", "b", "c", "d"], 0.5, seed=0))
    ['a', 'd']
    """
    sizes = Counter(groups)
    target_count = round(fraction * sizes.total())
    chosen: set[str] = set()
    count = 0
    for group in sorted(sizes, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest()):
        if count >= target_count or len(chosen) == len(sizes) - 1:
            break
        if count + sizes[group] - target_count <= max(target_count - count, 1):
            chosen.add(group)
            count += sizes[group]
    return chosen


def drawn_splits(
    sizes: Mapping[str, int], eval_fraction: float, test_fraction: float, seed: int
) -> dict[str, set[str]]:
    """Return the groups of the splits eval and test that `curate` draws if no source declares a split.

    sizes: rows of each group. The test split is drawn first, and both fractions are of all rows.
    """
    test_groups = held_out_groups(Counter(sizes), test_fraction, f"{TEST}:{seed}")
    rest = Counter({group: count for group, count in sizes.items() if group not in test_groups})
    fraction = eval_fraction * sum(sizes.values()) / max(rest.total(), 1)
    return {"eval": held_out_groups(rest, fraction, seed), TEST: test_groups}


def hold_out(examples: list[Example], eval_fraction: float, seed: int) -> list[Example]:
    """Return the examples, with `eval_fraction` of them held out by group.

    They are unchanged for a fraction of 0, and if the Dataset itself holds out rows.
    """
    if not eval_fraction or any(example.split == "eval" for example in examples):
        return examples
    held_out = held_out_groups((split_group(example) for example in examples), eval_fraction, seed)
    return [replace(example, split="eval") if split_group(example) in held_out else example for example in examples]
