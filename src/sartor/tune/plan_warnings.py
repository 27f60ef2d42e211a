"""Warnings of `plan` and `tune`: the run begins, and its result is likely to disappoint.

few_updates: fewer optimiser updates than a loss takes to fall. unknown_language: the rows are in a language in which the base
predicts text far worse than English small talk.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence

import torch

from sartor.core import assets, parquet_io
from sartor.core.artifacts import Artifact
from sartor.core.errors import ExtraError
from sartor.core.records import Example
from sartor.core.row_warnings import DataWarning
from sartor.models.base import Base
from sartor.models.chat import ChatTokenizer
from sartor.models.losses.loss_backend import LossBackend
from sartor.models.packing import TokenizedExample
from sartor.text import language_id
from sartor.tune.recipe import ResolvedRecipe

FEW_UPDATES, LANGUAGE = "few_updates", "language"
# Fewer updates than these are warned of
LEAST_UPDATES = 50
SMALLEST_BATCH = 64
# Nats a letter on the rows over those on English small talk, from which a language counts as one that the base does not know
UNKNOWN_RATIO = 1.5
REFERENCE_LANGUAGE = "en"
# Text is measured in pieces of about so many characters, so that short rows have a context too
PIECE_CHARACTERS, PIECES = 300, 4
ROWS_READ = 200


def run_warnings(
    recipe: ResolvedRecipe, dataset: Artifact, base: Base, path: LossBackend, updates: int | None, epoch_tokens: int
) -> list[DataWarning]:
    """Return all warnings of a run. path: of the model before its first update. updates: None where they are not known."""
    return [
        *(few_updates(recipe, updates, epoch_tokens) if updates is not None else ()),
        *(unknown_language(dataset, base.chat, path) if base.media is None else ()),
    ]


def few_updates(recipe: ResolvedRecipe, updates: int, epoch_tokens: int) -> Iterator[DataWarning]:
    """Warn of fewer than LEAST_UPDATES updates. updates: of the whole run. epoch_tokens: of the training rows."""
    if updates >= LEAST_UPDATES:
        return
    batch, remedies = recipe.optimizer.batch_tokens, []
    smaller, is_counted = batch, recipe.budget.updates is not None
    while not is_counted and smaller // 2 >= SMALLEST_BATCH and updates * batch < LEAST_UPDATES * smaller:
        smaller //= 2
    if smaller < batch:
        remedies.append(f"optimizer.batch_tokens={smaller}")
    if is_counted:
        remedies.append(f"budget.updates={LEAST_UPDATES}")
    else:
        epochs = math.ceil(LEAST_UPDATES / max(epoch_tokens / batch, 1))
        remedies += [f"budget.epochs={epochs}", "more rows"]
    plural = "" if updates == 1 else "s"
    problem = f"the run makes {updates} update{plural}; with fewer than {LEAST_UPDATES} a model has hardly begun to learn"
    yield DataWarning(FEW_UPDATES, problem, "; or ".join(remedies))


def unknown_language(dataset: Artifact, chat: ChatTokenizer, path: LossBackend) -> Iterator[DataWarning]:
    """Warn of rows in a language that the base does not know. path: of the model before its first update.

    Languages are told by fastText; without that package nothing is warned of, and English never is.
    """
    pieces = _pieces(_texts(dataset))
    code = _language(pieces)
    if not code or language_id.are_kin(code, REFERENCE_LANGUAGE):
        return
    rows, reference = (_nats_per_letter(text, chat, path) for text in (pieces, _pieces(_small_talk())))
    if rows < UNKNOWN_RATIO * reference:
        return
    problem = (
        f"the rows' language is {code!r}, in which this base has {rows / reference:.1f} times the loss a letter that it has on "
        f"English small talk ({rows:.2f} against {reference:.2f} nats; warned from {UNKNOWN_RATIO:g} times on)"
    )
    yield DataWarning(LANGUAGE, problem, "a base that knows the language (base: owner/model), or rows in English")


def _texts(dataset: Artifact) -> list[str]:
    """The users' turns of the first rows; of rows without one, the text that is learnt."""
    examples = itertools.islice(parquet_io.read_examples(dataset, "train"), ROWS_READ)
    return [text for example in examples if (text := _user_text(example))]


def _user_text(example: Example) -> str:
    turns = [message.text for message in example.messages if message.role == "user"]
    return "\n".join(turns) or "\n".join(message.text for message in example.messages)


def _small_talk() -> list[str]:
    lines = (assets.install("small-talk") / "small_talk.jsonl").read_text(encoding="utf-8").splitlines()
    return [str(message["content"]) for line in lines for message in json.loads(line)["messages"]]


def _pieces(texts: Sequence[str]) -> list[str]:
    """Texts laid end to end, in up to PIECES pieces of PIECE_CHARACTERS and more."""
    pieces, piece = [], ""
    for text in texts:
        piece = f"{piece}\n{text}" if piece else text
        if len(piece) >= PIECE_CHARACTERS:
            pieces.append(piece[: 2 * PIECE_CHARACTERS])
            piece = ""
    if piece and not pieces:
        pieces.append(piece)
    return pieces[:PIECES]


def _language(pieces: Sequence[str]) -> str:
    """The language of more than half of the pieces; empty if there is none, or no package that tells it."""
    try:
        detect = language_id.detector()
    except ExtraError:
        return ""
    codes = Counter(detect(piece).code for piece in pieces)
    code, count = max(codes.items(), key=lambda item: item[1], default=("", 0))
    return code if 2 * count > len(pieces) else ""


@torch.no_grad()
def _nats_per_letter(pieces: Sequence[str], chat: ChatTokenizer, path: LossBackend) -> float:
    """Loss of all tokens but each piece's first, over the letters."""
    rows = []
    for piece in pieces:
        ids = chat.tokenizer(piece, add_special_tokens=False)["input_ids"]
        rows.append(TokenizedExample(list(ids), [True] * len(ids)))
    rows = [row for row in rows if len(row.ids) > 1]
    loss = float(path.losses(rows)[0].sum()) if rows else 0.0
    return loss / max(sum(character.isalpha() for piece in pieces for character in piece), 1)
