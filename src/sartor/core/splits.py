"""Groups of rows and deterministic train/eval splits.

A group is what may not straddle a split, and what fails together when a model is measured: intervals are over groups,
never over rows. `split_group` names it for a split, where rows that ask the same of different contexts must stay
together;
`group_of` names it for a measurement, where a row without a group is a group of its own.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from sartor.core.records import Example, digest

# splits that no tuning learns from. `eval` may be looked at as often as one likes; `test` is for the release alone
TEST = "test"
HELD_OUT_SPLITS = ("eval", TEST)
# Of fewer groups what none of them showed may still be there in one of ten
FEW_GROUPS = 40


def least_groups(tail: float = 0.025) -> int:
    """Return the fewest groups that can reach a one-sided level: of five, all better, the flip of all signs is one of
    32.
    """
    return math.ceil(-math.log2(tail))


# that a two-sided 95 % interval needs to exclude anything
LEAST_GROUPS = least_groups()


def group_of(row: Example) -> str:
    """Return the group of a row that is measured: its own group, or else a name for all that the model is shown.

    Rows that show the model the same are one group, since it answers them alike: a row that stands twice is no more
    evidence than once. Rows about the same pictures and recordings are one group whatever they ask.
    """
    if row.group or row.is_document:
        return row.group or row.id
    if media := _media(row):
        return media
    return f"shown:{digest([[message.plain() for message in row.prompt], row.tools])[:16]}"


def group_of_stored(row: Mapping[str, Any]) -> str:
    """Return the group of a row in a Report's table. Older Reports have none of rows without a group: then it is the
    row.
    """
    return str(row["group"] or row["id"])


def stated_group(value: Any) -> str | None:
    """Return the group that a row's field names, empty for none; None where the field is no name.

    A column of whole numbers with gaps is one of floats where pandas wrote it, a gap is NaN; blanks name nothing.
    """
    if isinstance(value, float) and (math.isnan(value) or value.is_integer()):
        value = None if math.isnan(value) else int(value)
    if value is not None and not isinstance(value, (str, int)):
        return None
    text = "" if value is None else str(value)
    return text if text.strip() else ""


def split_group(row: Example) -> str:
    """Return the group that a split keeps together: the row's own, or else its prompt's."""
    return row.group or prompt_group(row)


def prompt_group(row: Example) -> str:
    """A name for what the row asks: rows with the same user turns share it, and rows about the same pictures and
    recordings,
    whatever they ask of them: a picture that is held out must not be one that was trained on.
    """
    if row.is_document:
        return row.id
    if media := _media(row):
        return media
    return f"prompt:{digest([message.plain() for message in _user_messages(row)])[:16]}"


def conversation_group(row: Example) -> str:
    """A name for the conversation: that of its first question, which is the prompt's own where it asks one thing."""
    first = next(
        (index for index, message in enumerate(row.messages) if message.role == "user"), len(row.messages) - 1
    )
    return prompt_group(replace(row, messages=(*row.messages[: first + 1], row.messages[-1])))


def _user_messages(row: Example) -> list[Any]:
    return [message for message in row.messages if message.role == "user"]


def _media(row: Example) -> str:
    """A name for the pictures and recordings that the row asks about; empty where there are none."""
    media = [part.plain() for message in _user_messages(row) for part in message.content if part.media]
    return f"media:{digest(media)[:16]}" if media else ""


def test_rows(manifest: Mapping[str, Any]) -> int:
    """Return the number of rows in a Dataset's test split, as its manifest counts them."""
    return int(manifest.get("counts", {}).get("splits", {}).get(TEST, 0))


def is_of_groups(row: Example, groups: Collection[str]) -> bool:
    """Whether a row is in one of the groups, or asks what one of them is named after."""
    return split_group(row) in groups or prompt_group(row) in groups


def held_out_groups(groups: Iterable[str], fraction: float, seed: int | str) -> set[str]:
    """Groups that together hold about `fraction` of the rows. `groups` names the group of each row.

    At least one group stays for training. A group that would overshoot the wanted count by more than it helps is
    passed over, so a few large groups cannot eat the training rows.

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
