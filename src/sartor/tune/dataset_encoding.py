"""Encoding of a Dataset's rows and preference pairs as tokens."""

from __future__ import annotations

import random
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sartor.core import parquet_io, reply_markup
from sartor.core.artifacts import Artifact
from sartor.core.errors import SourceError
from sartor.core.records import Example
from sartor.core.splits import TEST, group_of, hold_out
from sartor.models.chat import ChatTokenizer
from sartor.models.packing import TokenizedExample
from sartor.models.reasoning_rules import with_reasoning_rule
from sartor.tune import preflight
from sartor.tune.recipe import PAIRED, SAMPLED, Data, Distil, Kto, Objective, Recipe, Rehearsal, Sft
from sartor.tune.tokenized_dataset import DistilExample, PreferenceExample, Term, TokenizedDataset, all_sequences

# Most other rows to search for a reply that differs: every row may have the same one
_MAX_OTHERS = 8


class NoRowsError(SourceError):
    """No training row with a supervised token is left.

    left_out: number of rows that are not learnt, by reason.
    """

    def __init__(self, problem: str, remedy: str, left_out: Mapping[str, int]) -> None:
        super().__init__(problem, remedy)
        self.left_out = dict(left_out)

    def __reduce__(self) -> tuple[Any, ...]:
        """Return the arguments that rebuild the error when it is unpickled."""
        return type(self), (self.problem, self.remedy, self.left_out)

    @property
    def kind(self) -> str:
        """Word that scripts know of this error."""
        return SourceError.__name__


def encode_preference(
    example: Example, objective: Objective, chat: ChatTokenizer, folder: Path
) -> list[tuple[TokenizedExample, Example]]:
    """Return the tokens to learn from a row, each with the Example whose last reply they hold.

    One entry, or two for a pair under kto. Empty if the reply was rated bad and the objective learns nothing from
    that.
    folder: below which the row's media lie.
    Weights of turns: a preference concerns the last reply alone, so the weight of that turn is the row's; the others
    have no part in it. Distillation learns a turn or does not, so its weights are 0 and 1. GRPO learns the model's own
    replies in place of the last one, so the weights above 0 are of no account.
    Raises SourceError as `ChatTokenizer.encode` does, and for weights that the objective cannot take.
    """
    if example.rejected and not isinstance(objective, (Sft, *SAMPLED)):
        example = _with_last_weight(example)
        rejected = replace(example, messages=(*example.prompt, *example.rejected), rejected=())
        good, bad = (keep_last_reply(chat.encode(item, folder), example) for item in (example, rejected))
        if isinstance(objective, PAIRED):
            return [(_lesson(good, "pair", bad), example)]
        return [(_lesson(good, "good"), example), (_lesson(bad, "bad"), rejected)]
    if example.rating and isinstance(objective, Kto):
        example = _with_last_weight(example)
        row = keep_last_reply(chat.encode(example, folder), example)
        row = replace(row, weight=row.weight * abs(example.rating))
        return [(_lesson(row, "good" if example.rating > 0 else "bad"), example)]
    if example.rating < 0:
        return []
    row = chat.encode(example, folder)
    if not isinstance(objective, SAMPLED):
        return [(row, example)]
    is_last_learnt = bool(example.messages[-1].weight)
    if isinstance(objective, Distil) and not (is_last_learnt and row.factors is None):
        raise SourceError(
            "distil learns turns of weight 0 or 1, the last of weight 1",
            "other weights of turns are for objective: sft; or set `weight` of the row",
        )
    if not is_last_learnt:
        raise SourceError(
            "the last turn has weight 0, and grpo learns replies in its place",
            "remove the turn, or set its `weight` to 1",
        )
    return [(to_distil(row, example), example)]


def _with_last_weight(example: Example) -> Example:
    """Return the row with the weight of its last turn as a factor of its own, and no weights of turns."""
    if all(message.weight == 1 for message in example.messages):
        return example
    messages = tuple(replace(message, weight=1.0) for message in example.messages)
    result = replace(example, messages=messages, weight=example.weight * example.messages[-1].weight)
    vars(result)["id"] = example.id  # the row keeps the id that it has in its Dataset
    return result


def to_distil(row: TokenizedExample, example: Example) -> DistilExample:
    """Return a row whose replies a teacher scores or a verifier rewards."""
    return DistilExample(row.ids, row.learnt, example_id=row.example_id, weight=row.weight, example=example)


def _lesson(row: TokenizedExample, term: Term, other: TokenizedExample | None = None) -> PreferenceExample:
    return PreferenceExample(row.ids, row.learnt, example_id=row.example_id, weight=row.weight, term=term, other=other)


def keep_last_reply(row: TokenizedExample, example: Example) -> TokenizedExample:
    """Return the row with only its last reply learnt.

    A rating or a preference concerns that reply and not the turns before it.
    """
    start, end = row.last_reply
    return replace(row, learnt=[start <= position < end for position in range(len(row.ids))], example_id=example.id)


def mismatched_pairs(
    rows: Sequence[TokenizedExample],
    examples: Sequence[Example],
    chat: ChatTokenizer,
    folder: Path,
    max_tokens: int,
    seed: int,
) -> list[TokenizedExample]:
    """Return the rows, each rated one with another row's reply to its prompt as `other`.

    The seed chooses the replies once for the whole run. The paper shifts the replies of a batch by one; a fixed choice
    lets the reference model compute each once.
    examples: the Example of each row.
    A row for which no other reply fits has `other` None.
    """
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    positions = {index: position for position, index in enumerate(order)}

    def others(index: int) -> Iterator[Example]:
        for step in range(1, min(len(order), _MAX_OTHERS + 1)):
            other = examples[order[(positions[index] + step) % len(order)]]
            if other.messages[-1] != examples[index].messages[-1]:
                yield other

    def beside(index: int) -> TokenizedExample | None:
        for other in others(index):
            messages = (*examples[index].prompt, other.messages[-1])
            example = _with_last_weight(replace(examples[index], messages=messages, rejected=(), rating=0.0))
            try:
                row = keep_last_reply(chat.encode(example, folder), examples[index])
            except SourceError:  # a reply that this prompt's template refuses
                continue
            if len(row.ids) <= max_tokens and row.supervised_tokens:
                return row
        return None

    return [
        replace(row, other=beside(index)) if isinstance(row, PreferenceExample) and row.term != "pair" else row
        for index, row in enumerate(rows)
    ]


def number_lessons(rows: Sequence[TokenizedExample], first: int) -> list[TokenizedExample]:
    """Return the rows; preference examples get their row number in the reference table, from `first` on."""
    result: list[TokenizedExample] = []
    for row in rows:
        if isinstance(row, PreferenceExample):
            result.append(replace(row, number=first))
            first += 1
        else:
            result.append(row)
    return result


def encode_rows(
    dataset: Artifact, recipe: Recipe, chat: ChatTokenizer, rehearsal: Artifact | None = None
) -> TokenizedDataset:
    """Return the rows as tokens for the recipe's objective, and the training rows of `rehearsal`.

    The base's markup in a reply is parsed into fields. A row is left out and counted in these cases: its reply cannot
    be parsed, it is too long, the template refuses it, it has no supervised token, or the objective learns nothing
    from its bad reply.
    Raises SourceError if no row is left to learn from.
    """
    data = TokenizedDataset()
    # rows of the test split are neither learnt nor watched: a loss that influences tuning would select by them
    examples = [example for example in parquet_io.read_examples(dataset) if example.split != TEST]
    examples = hold_out(examples, recipe.data.eval_fraction, recipe.seed)
    train_examples = [example for example in examples if example.split == "train"]
    train = _encode_examples(train_examples, dataset, recipe=recipe, chat=chat, data=data)
    held_out_examples = [example for example in examples if example.split != "train"]
    held_out = _encode_examples(held_out_examples, dataset, recipe=recipe, chat=chat, data=data)
    if recipe.data.rows and (excess := train[recipe.data.rows :]):
        data.leave_out("beyond_data_rows", *dict.fromkeys(row.example_id for row, _ in excess))
        train = train[: recipe.data.rows]
    # a fixed sample, so that the held-out losses of two runs on one Dataset can be compared
    held_out = random.Random(0).sample(held_out, min(recipe.data.eval_rows, len(held_out)))
    data.train = number_lessons(_as_lessons(train, dataset, recipe, chat), 0)
    data.held_out = number_lessons(_as_lessons(held_out, dataset, recipe, chat), len(data.train))
    data.held_out_groups = [group_of(example) for _, example in held_out]
    if not data.supervised_tokens:
        raise _no_rows_error(dataset, recipe, data)
    if rehearsal:
        sft_recipe = replace(recipe, objective=Sft())
        # rows that are measured on must not be learnt as rehearsal
        held_out_ids = {row.example_id for row in data.held_out}
        held_out_ids |= {example.id for example in parquet_io.read_examples(dataset, TEST)}
        rehearsal_examples = [
            example for example in parquet_io.read_examples(rehearsal, "train") if example.id not in held_out_ids
        ]
        # counted apart, so that rehearsal rows do not count towards data.too_long_fraction
        beside = TokenizedDataset()
        encoded = _encode_examples(rehearsal_examples, rehearsal, recipe=sft_recipe, chat=chat, data=beside)
        data.rehearsal = [row for row, _ in encoded]
        for reason, ids in beside.left_out.items():
            data.leave_out(f"rehearsal_{reason}", *ids)
        if not data.rehearsal:
            error = _no_rows_error(rehearsal, recipe, beside)
            raise SourceError(f"of the rehearsal {error.problem}", f"{error.remedy}, or --data.rehearsal none")
        data.rehearsal_factor = _rehearsal_factor(recipe.data.rehearsal, data)
        data.rehearsal = [replace(row, weight=row.weight * data.rehearsal_factor) for row in data.rehearsal]
    return data


def _rehearsal_factor(rehearsal: Rehearsal | str, data: TokenizedDataset) -> float:
    """Return the factor of the weights of rehearsal rows that gives them `weight` together, beside 1 of the own rows.

        factor = weight * (1 - f) / f * (w / t) / (v / u)

    f is the fraction of rehearsal among the tokens, and w / t and v / u are weights of the loss over tokens, of the
    own rows and of the rehearsal.
    """
    if not isinstance(rehearsal, Rehearsal) or rehearsal.weight is None:
        return 1.0
    own, beside = (
        sum(row.loss_weight for row in rows) / sum(row.tokens for row in rows) for rows in (data.train, data.rehearsal)
    )
    return rehearsal.weight * (1 - rehearsal.fraction) / rehearsal.fraction * own / beside


def _encode_examples(
    examples: Iterable[Example], dataset: Artifact, recipe: Recipe, chat: ChatTokenizer, data: TokenizedDataset
) -> list[tuple[TokenizedExample, Example]]:
    """Return the rows that can be learnt, each with the Example whose last reply it holds.

    `data` receives the reason for each row that is left out.
    """
    encoded: list[tuple[TokenizedExample, Example]] = []
    counts = Counter(data.reasoning)
    if recipe.data.empty_think == "drop":
        chat = chat.without_empty_think()
    for example in examples:
        # a derived copy whose group is held out here: only original rows are evaluated
        if example.split == "eval" and example.is_derived:
            data.leave_out("copy_of_held_out", example.id)
            continue
        try:
            example = reply_markup.read_example(example, chat.markup.spelt, keep_id=True)
            example = with_reasoning_rule(example, recipe.data.reasoning, chat, counts)
            learnt = encode_preference(example, recipe.objective, chat, dataset.path)
        except SourceError as error:
            data.leave_out(error.reason or f"template: {error.problem[:120]}", example.id)
            continue
        sequences = all_sequences(row for row, _ in learnt)
        data.lengths += [len(row.ids) for row in sequences]
        if not learnt:
            data.leave_out("rated_bad", example.id)
        elif any(len(row.ids) > recipe.data.max_length_tokens for row in sequences):
            data.leave_out("too_long", example.id)
        elif not all(row.supervised_tokens for row in sequences):
            data.leave_out("nothing_supervised", example.id)
        else:
            encoded += learnt
    data.reasoning = dict(counts)
    return encoded


def _as_lessons(
    encoded: Sequence[tuple[TokenizedExample, Example]], dataset: Artifact, recipe: Recipe, chat: ChatTokenizer
) -> list[TokenizedExample]:
    """Return the rows; for kto with the mismatched replies from which the divergence is estimated."""
    result = [row for row, _ in encoded]
    if not isinstance(recipe.objective, Kto) or recipe.objective.divergence == "none":
        return result
    examples = [example for _, example in encoded]
    return mismatched_pairs(
        result,
        examples,
        chat=chat,
        folder=dataset.path,
        max_tokens=recipe.data.max_length_tokens,
        seed=recipe.seed,
    )


def _no_rows_error(dataset: Artifact, recipe: Recipe, data: TokenizedDataset) -> NoRowsError:
    left_out = data.left_out_counts
    reasons = ", ".join(f"{reason}: {count}" for reason, count in left_out.items()) or "the Dataset has none"
    remedy = f"sartor show {shlex.quote(str(dataset.path))}, and --split dropped of it"
    commonest = max(left_out, key=left_out.__getitem__, default="")
    if commonest == "rated_bad":
        remedy = "objective: {kind: kto} learns from rows that were rated bad"
    if commonest == "too_long":
        most = recipe.data.max_length_tokens
        # not below the default, which the rows of a rehearsal need too
        limit = preflight.length_that_keeps([length for length in data.lengths if length > most])
        limit = max(limit, Data.max_length_tokens)
        remedy = f"--data.max_length_tokens {limit}; it is {most} now"
    return NoRowsError(f"no training row with a supervised token is left ({reasons})", remedy, left_out)
