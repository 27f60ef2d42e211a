"""Warnings about rows that are too few or too uniform to learn from or to evaluate on.

A warning refuses nothing, since a small set can be intended. It states the problem with its numbers, and a remedy.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import statistics
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sartor.core.records import Example
from sartor.core.splits import (
    FEW_GROUPS,
    HELD_OUT_SPLITS,
    LEAST_GROUPS,
    TEST,
    drawn_splits,
    held_out_groups,
)

# replies count as labels if none is longer
MAX_LABEL_CHARS = 60
# Fraction of longer replies up to which the others count as labels
MOST_LONG_FRACTION = 0.1
# only the first replies of a larger set are checked: a label with two spellings recurs
MAX_ROWS = 20_000
_LISTED = 3
# With more values a field of JSON replies holds names or copied text, whose spelling is the prompt's
_MAX_FIELD_VALUES = 40
# Prompts look like labels where so many rows have the same one, and so large a fraction of the replies differ
_ROWS_OF_A_LABEL = 5
_DIFFERENT_REPLIES = 0.9
# most groups that a remedy asks for: half of 4 * LEAST_GROUPS groups of equal size fill both splits
MAX_ADDED_GROUPS = 4 * LEAST_GROUPS
_SPLIT_PHRASES = {"eval": "held out", TEST: "in the test split"}


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


def dataset_warnings(
    examples: Iterable[Example], counts: Mapping[tuple[str, str], int], recipe: Mapping[str, Any]
) -> list[DataWarning]:
    """Return the warnings about a Dataset's rows; the replies of only the first MAX_ROWS are checked.

    counts: number of rows of each (group, split), of the whole Dataset.
    recipe: curation recipe of the manifest.
    """
    replies, pairs = [], []
    for row in itertools.islice(examples, MAX_ROWS):
        if not row.is_document:
            last = row.messages[-1]
            replies.append(f"{last.text}\n{last.tool_calls}" if last.tool_calls else last.text)
            turns = [message for message in row.messages if message.role != "system"]
            if len(turns) == 2 and all(part.kind == "text" for turn in turns for part in turn.content):
                pairs.append((turns[0].text, last.text))
    warnings = group_warnings(counts, recipe) + reply_warnings(replies)
    return warnings + (swap_warnings(pairs) if len(pairs) == len(replies) else [])


def group_warnings(counts: Mapping[tuple[str, str], int], recipe: Mapping[str, Any]) -> list[DataWarning]:
    """Return the warnings about too few groups: of a Dataset, or of a split that its recipe asks for.

    counts: number of rows of each (group, split), of the whole Dataset.
    recipe: curation recipe of the manifest.
    """
    groups = {group for group, _ in counts}
    if not groups:
        return []
    if len(groups) < 2 * LEAST_GROUPS:
        problem = (
            f"{_count(sum(counts.values()), 'row')} of {_count(len(groups), 'group')} cannot both teach and measure"
        )
        remedy = (
            f"add rows: an interval needs {LEAST_GROUPS} held-out groups, a useful one {FEW_GROUPS}, beside those to "
            "learn from"
        )
        return [DataWarning("few_rows", problem, remedy)]
    held_out = {split: {group for group, other in counts if other == split} for split in HELD_OUT_SPLITS}
    fractions = {split: float(recipe.get("split", {}).get(f"{split}_fraction", 0.0)) for split in HELD_OUT_SPLITS}
    short = [
        split for split, members in held_out.items() if len(members) < LEAST_GROUPS and (members or fractions[split])
    ]
    remedy = _split_remedy(counts, held_out, fractions, recipe) if short else ""
    warnings = []
    for split in short:
        problem = (
            f"{_count(len(held_out[split]), 'group')} of {len(groups)} {_SPLIT_PHRASES[split]}: no interval excludes "
            f"anything below {LEAST_GROUPS}"
        )
        warnings.append(DataWarning("few_groups", problem, remedy))
    return warnings


def _split_remedy(
    counts: Mapping[tuple[str, str], int],
    held_out: Mapping[str, set[str]],
    fractions: Mapping[str, float],
    recipe: Mapping[str, Any],
) -> str:
    """Return the fractions with which each split has LEAST_GROUPS groups, or the number of groups to add."""
    sizes: Counter[str] = Counter()
    for (group, _), count in counts.items():
        sizes[group] += count
    seed = int(recipe.get("seed", 0))
    # rows that their source puts in a split are not drawn, so the effect of a fraction is not known
    if any(source.get("split") and not source.get("rehearsal") for source in recipe.get("sources", ())):
        return f"add held-out rows of {LEAST_GROUPS} groups or more, or leave out `split` of the sources"
    if drawn_splits(sizes, fractions["eval"], fractions[TEST], seed) != held_out:
        return f"add held-out rows of {LEAST_GROUPS} groups or more"
    if found := _sufficient_fractions(sizes, fractions, seed):
        changes = [f"split.{split}_fraction: {found[split]:g}" for split in found if found[split] != fractions[split]]
        return f"{' and '.join(changes)}, or add rows"
    # groups of the median size are added until a fraction would do
    median = sorted(sizes.values())[len(sizes) // 2]
    larger = Counter(sizes)
    for extra in range(1, MAX_ADDED_GROUPS + 1):
        larger[f"added:{extra}"] = median
        if _sufficient_fractions(larger, fractions, seed):
            break
    return (
        f"add rows of about {_count(extra, 'more group')}: with these, no fraction holds out {LEAST_GROUPS} groups a "
        "split and leaves half of the rows to learn from"
    )


def _sufficient_fractions(sizes: Counter[str], fractions: Mapping[str, float], seed: int) -> dict[str, float]:
    """Return the smallest sufficient fraction of each split; empty if there are none.

    Fractions are sufficient if each split has LEAST_GROUPS groups and half of the rows remain for training. A present
    fraction is kept where that is possible. The test split's draw does not depend on the other fraction.
    """
    steps = [index / 100 for index in range(1, 50)]
    candidates = {split: [present, *steps] if present else [present] for split, present in fractions.items()}
    for test_fraction in candidates[TEST]:
        test_groups = held_out_groups(sizes, test_fraction, f"{TEST}:{seed}")
        if test_fraction and len(test_groups) < LEAST_GROUPS:
            continue
        for eval_fraction in candidates["eval"]:
            if test_fraction + eval_fraction >= 1:
                continue
            drawn = drawn_splits(sizes, eval_fraction, test_fraction, seed)
            has_groups = len(drawn["eval"]) >= LEAST_GROUPS or not eval_fraction
            held_out_rows = sum(sizes[group] for members in drawn.values() for group in members)
            if has_groups and 2 * held_out_rows <= sizes.total():
                return {"eval": eval_fraction, TEST: test_fraction}
    return {}


def evaluation_warnings(replies: Sequence[str], groups: Sequence[str]) -> list[DataWarning]:
    """Return the warnings about rows to evaluate on.

    replies, groups: the reference reply and the group of each of N rows.
    """
    warnings = []
    if (count := len(set(groups))) < LEAST_GROUPS:
        verb = "is" if len(groups) == 1 else "are"
        problem = (
            f"the {_count(len(groups), 'row')} {verb} in {_count(count, 'group')}, and rows of one group are right or "
            "wrong "
            f"together: no interval excludes anything below {LEAST_GROUPS} groups"
        )
        remedy = f"give rows of {LEAST_GROUPS} groups or more, {FEW_GROUPS} for a useful interval"
        warnings.append(DataWarning("few_groups", problem, remedy))
    return warnings + reply_warnings(replies)


def reply_warnings(replies: Sequence[str]) -> list[DataWarning]:
    """Return the warnings about replies: all are equal, or a label has two spellings.

    Where all replies are JSON objects, labels are the values of each field, and else whole replies. A field with one
    value beside others that vary is no reason to warn.
    """
    counts = Counter(replies)
    if len(replies) > 1 and len(counts) == 1:
        problem = (
            f"all {len(replies)} replies are {_quoted(replies[0])}: a model that always says so is right on every row"
        )
        return [DataWarning("one_reply", problem, "add rows with other replies")]
    warnings = []
    for name, values in _label_fields(counts).items():
        warnings += _spelling_warnings(values, f" of the field {_quoted(name)}")
    return warnings or _spelling_warnings(counts)


def _label_fields(replies: Counter[str]) -> dict[str, Counter[str]]:
    """Return field -> its texts, of the fields that name a class; empty unless all replies are JSON objects.

    A field names a class if it has few values, most of which recur. Spellings of one label are one value.
    """
    fields: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for reply, count in replies.items():
        try:
            data = json.loads(reply)
        except (ValueError, RecursionError):
            return {}
        if not isinstance(data, dict):
            return {}
        for name, value in data.items():
            if isinstance(value, str):
                fields[name][value] += count
    result = {}
    for name, texts in fields.items():
        labels: Counter[str] = Counter()
        for text, count in texts.items():
            labels[_label_key(text)] += count
        if len(labels) <= _MAX_FIELD_VALUES and statistics.median(labels.values()) > 1:
            result[name] = texts
    return result


def _spelling_warnings(counts: Counter[str], of_field: str = "") -> list[DataWarning]:
    """Return the warning that a label has two spellings; none where the texts are no labels.

    of_field: the field of the texts, for the message.
    """
    spellings: defaultdict[str, list[str]] = defaultdict(list)
    for text, _ in counts.most_common():
        spellings[_label_key(text)].append(text)
    long = sum(count for text, count in counts.items() if len(text) > MAX_LABEL_CHARS)
    if long > MOST_LONG_FRACTION * counts.total():
        return []  # free text
    several = [variants for variants in spellings.values() if len(variants) > 1]
    if not several:
        return []
    examples = []
    for variants in several[:_LISTED]:
        examples.append(" and ".join(f"{_quoted(variant)} ({counts[variant]})" for variant in variants))
    subject = f"1 label{of_field} stands" if len(several) == 1 else f"{len(several)} labels{of_field} stand"
    problem = f"{subject} in more than one spelling: {'; '.join(examples)}"
    # the commonest one; not its blanks at the ends, which nobody sees
    return [DataWarning("spellings", problem, f"write each in one spelling, such as {_quoted(several[0][0].strip())}")]


def swap_warnings(pairs: Sequence[tuple[str, str]]) -> list[DataWarning]:
    """Return the warning that prompts and replies may have changed places.

    Prompts then are what replies of a classifier are: short, few, and each with many texts.

    pairs: prompt and reply of rows of one question, of text alone.
    """
    prompts = Counter(prompt for prompt, _ in pairs)
    replies = {reply for _, reply in pairs}
    is_swapped = (
        1 < len(prompts) <= len(pairs) / _ROWS_OF_A_LABEL
        and len(replies) >= _DIFFERENT_REPLIES * len(pairs)
        and max(map(len, prompts)) <= MAX_LABEL_CHARS
        and sum(len(prompt) < len(reply) for prompt, reply in pairs) > len(pairs) / 2
    )
    if not is_swapped:
        return []
    prompt, count = prompts.most_common(1)[0]
    problem = (
        f"{len(pairs):,} rows have {len(prompts):,} prompts, such as {_quoted(prompt)} ({count}), and "
        f"{len(replies):,} replies: the prompts look like labels of the replies"
    )
    remedy = "if they have changed places, fields: {prompt: COLUMN_OF_REPLIES, completion: COLUMN_OF_PROMPTS}"
    return [DataWarning("swapped", problem, remedy)]


def _label_key(reply: str) -> str:
    """Return the label without case, blanks, underscores, hyphens between words and a final full stop.

    Labels with equal keys are spellings of the same label. Forms of the same character count as one (Unicode's NFKC),
    invisible characters and the dot over a Turkish i not at all, nor do the spaces of a JSON object.
    """
    if reply.startswith("{"):
        with contextlib.suppress(ValueError, RecursionError):
            reply = json.dumps(json.loads(reply), ensure_ascii=False, sort_keys=True)
    reply = unicodedata.normalize("NFKC", reply).casefold().replace("i\u0307", "i").replace("\u0131", "i")
    reply = "".join(character for character in reply if unicodedata.category(character) != "Cf")
    return re.sub(r"(?<=\w)[\s_-]+(?=\w)", " ", reply.replace("_", " ")).strip().rstrip(" .")


def _quoted(text: str) -> str:
    return repr(text if len(text) <= MAX_LABEL_CHARS else f"{text[:MAX_LABEL_CHARS]}...")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
