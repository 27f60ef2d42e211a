"""A Dataset as tokens: what is trained on, what is held out, what was left out and why."""

from __future__ import annotations

import random
from dataclasses import replace

from sartor.core import rows
from sartor.core.artifacts import Artifact
from sartor.core.errors import MediaError, SourceError
from sartor.core.holdout import held_out_groups
from sartor.core.records import Example
from sartor.models.chat import Chat
from sartor.tune import refusals
from sartor.tune.recipe import Data, Recipe
from sartor.tune.tokenised import Rows


def encode_rows(dataset: Artifact, recipe: Recipe, chat: Chat) -> Rows:
    """The Dataset's rows as tokens. A row that is too long, refused by the template or without a supervised token is
    left out and counted. Raises SourceError when nothing is left to learn from.
    """
    examples = _hold_out(list(rows.read_examples(dataset)), recipe.data, recipe.seed)
    data = Rows()
    for example in examples:
        if (
            example.split == "eval" and example.is_derived
        ):  # its group is held out here and not in the Dataset: no copy is asked
            data.left_out.setdefault("copy_of_held_out", []).append(example.id)
            continue
        try:
            row = chat.encode(example, dataset.path)
        except SourceError as error:
            reason = error.reason if isinstance(error, MediaError) else f"template: {error.problem[:120]}"
            data.left_out.setdefault(reason, []).append(example.id)
            continue
        data.lengths.append(len(row.ids))
        if len(row.ids) > recipe.data.max_length_tokens:
            data.left_out.setdefault("too_long", []).append(example.id)
        elif not row.supervised_tokens:
            data.left_out.setdefault("nothing_supervised", []).append(example.id)
        else:
            (data.train if example.split == "train" else data.held_out).append(row)
    if recipe.data.rows:
        beyond = data.train[recipe.data.rows :]
        data.train = data.train[: recipe.data.rows]
        if beyond:
            data.left_out["beyond_data_rows"] = [row.example_id for row in beyond]
    # A fixed sample, so that the held-out loss of two runs on one Dataset compares
    data.held_out = random.Random(0).sample(data.held_out, min(recipe.data.eval_rows, len(data.held_out)))
    if not data.supervised_tokens:
        reasons = ", ".join(f"{reason}: {len(ids)}" for reason, ids in data.left_out.items()) or "the Dataset has none"
        remedy = f"look at the rows of {dataset.path}"
        if "too_long" in data.left_out:
            remedy = f"data.max_length_tokens={refusals.length_that_keeps(data.lengths)} (now {recipe.data.max_length_tokens})"
        raise SourceError(f"no training row with a supervised token is left ({reasons})", remedy)
    return data


def _hold_out(examples: list[Example], data: Data, seed: int) -> list[Example]:
    """Split by group as `data` says, if the Dataset itself holds out nothing."""
    if not data.eval_fraction or any(example.split == "eval" for example in examples):
        return examples
    held_out = held_out_groups((example.group for example in examples), data.eval_fraction, seed)
    return [replace(example, split="eval") if example.group in held_out else example for example in examples]
