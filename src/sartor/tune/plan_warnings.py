"""Warnings of `plan` and `tune` about runs whose result is likely to disappoint.

few_updates: fewer optimiser updates than a loss needs to fall.
unknown_language: rows in a language in which the base predicts text far worse than English small talk.
"""

from __future__ import annotations

import itertools
import json
import math
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence

import torch

from sartor.core import assets, parquet_io
from sartor.core.artifacts import Artifact
from sartor.core.errors import ExtraError
from sartor.core.row_warnings import DataWarning
from sartor.models.base import Base
from sartor.models.chat import ChatTokenizer
from sartor.models.losses.loss_backend import LossBackend
from sartor.models.packing import TokenizedExample
from sartor.text import language_id
from sartor.tune.recipe import ResolvedRecipe
from sartor.tune.sampler import count_updates

FEW_UPDATES, LANGUAGE = "few_updates", "language"
# A run with fewer updates gets a warning
LEAST_UPDATES = 50
SMALLEST_BATCH = 64
# Ratio of nats per letter on the rows to those on English small talk, from which a language counts as unknown
UNKNOWN_RATIO = 1.5
REFERENCE_LANGUAGE = "en"
# Least characters of a piece, for fastText alone; it detects the language of single short rows badly
PIECE_CHARACTERS = 300
# Words from which a reply is a text in a language, and no label
REPLY_WORDS = 4
# A piece with a less probable language has none: lists of product codes get about 0.4, rows of prose 0.9
MIN_CONFIDENCE = 0.6
# Most characters of a measured row, and of all measured rows; each row has a context of its own
ROW_CHARACTERS, MEASURED_CHARACTERS = 300, 1200
# ROWS_READ rows are read, at even distances among the first ROWS_WALKED
ROWS_READ, ROWS_WALKED = 200, 20_000
# English letters with the content of one character (ratio of the sentence lengths in FLORES-200)
HAN_LETTERS, SYLLABLE_LETTERS = 3, 2


def run_warnings(
    recipe: ResolvedRecipe,
    dataset: Artifact,
    base: Base,
    path: LossBackend,
    updates: int | None,
    row_tokens: Sequence[int],
) -> list[DataWarning]:
    """Return all warnings of a run.

    path: loss backend of the model before its first update.
    updates: of the whole run; None if unknown.
    row_tokens: tokens of each training row.
    """
    return [
        *(few_updates(recipe, updates, row_tokens) if updates is not None else ()),
        *(unknown_language(dataset, base.chat, path) if base.media is None else ()),
    ]


def few_updates(recipe: ResolvedRecipe, updates: int, row_tokens: Sequence[int]) -> Iterator[DataWarning]:
    """Yield a warning if the run makes fewer than LEAST_UPDATES updates.

    updates: of the whole run.
    row_tokens: tokens of each training row.
    """
    if updates >= LEAST_UPDATES or not row_tokens:
        return
    batch, limits = recipe.optimizer.batch_tokens, recipe.budget
    per_epoch = count_updates(row_tokens, batch, recipe.seed)
    remedies = []
    is_counted = limits.updates is not None and limits.updates < LEAST_UPDATES
    for halvings in range(1, batch.bit_length()):
        smaller = batch >> halvings
        if is_counted or smaller < SMALLEST_BATCH:
            break
        # an update has at least one row, so a smaller batch may give no more updates
        if updates * count_updates(row_tokens, smaller, recipe.seed) / per_epoch >= LEAST_UPDATES:
            remedies.append(f"--optimizer.batch_tokens {smaller}")
            break
    longer = []
    if limits.epochs is not None and limits.epochs * per_epoch < LEAST_UPDATES:
        longer.append(f"--budget.epochs {math.ceil(LEAST_UPDATES / per_epoch)}")
    if is_counted:
        longer.append(f"--budget.updates {LEAST_UPDATES}")
    rehearsal = recipe.data.rehearsal
    own_fraction = 1 - rehearsal.fraction if rehearsal.path else 1.0  # a budget of tokens counts the rehearsal's too
    needed_tokens = math.ceil(LEAST_UPDATES * sum(row_tokens) / per_epoch / own_fraction)
    if limits.tokens is not None and limits.tokens < needed_tokens:
        longer.append(f"--budget.tokens {needed_tokens}")
    if limits.minutes is not None and not longer:
        longer.append(f"--budget.minutes {limits.minutes * LEAST_UPDATES / max(updates, 1):.3g}")
    if longer:
        remedies.append(" ".join(longer))
    if not is_counted:
        remedies.append("more rows")
    plural = "" if updates == 1 else "s"
    problem = (
        f"the run makes {updates} update{plural}; with fewer than {LEAST_UPDATES} a model has hardly begun to learn"
    )
    yield DataWarning(FEW_UPDATES, problem, "; or ".join(remedies))


def unknown_language(dataset: Artifact, chat: ChatTokenizer, path: LossBackend) -> Iterator[DataWarning]:
    """Yield a warning if the base does not know the language of the rows.

    path: loss backend of the model before its first update.
    fastText identifies the language. Without that package, and for English, there is no warning.
    """
    small_talk: list[str] = []
    for part, texts in _texts(dataset).items():
        codes, texts = _foreign_languages(texts)
        if not codes:
            continue
        small_talk = small_talk or _small_talk()
        sample = _spread(texts)
        rows = _nats_per_letter(sample, chat, path)
        # the first tokens of a text cost most, so short rows are compared with texts as short
        mean_characters = round(sum(map(len, sample)) / max(len(sample), 1))
        reference = _nats_per_letter(_spread(small_talk, mean_characters), chat, path)
        if not rows >= UNKNOWN_RATIO * reference:  # NaN of weights that are not finite, which `tune` refuses itself
            continue
        problem = (
            f"the {part}' {'language is' if len(codes) == 1 else 'languages are'} {', '.join(map(repr, codes))}, in "
            f"which this base has {rows / reference:.1f} times the loss a letter that it has on English small talk "
            f"({rows:.2f} against {reference:.2f} nats; warned from {UNKNOWN_RATIO:g} times on)"
        )
        known = "the language" if len(codes) == 1 else "the languages"
        yield DataWarning(LANGUAGE, problem, f"a base that knows {known} (base: owner/model), or rows in English")
        return


def _small_talk() -> list[str]:
    """Return the turns of English small talk."""
    turns = []
    for line in (assets.install("small-talk") / "small_talk.jsonl").read_text(encoding="utf-8").splitlines():
        turns += [str(message["content"]) for message in json.loads(line)["messages"]]
    return turns


def _texts(dataset: Artifact) -> dict[str, list[str]]:
    """Return the texts of rows at even distances: user turns under "rows", then replies of several words.

    Of a row without a user turn all messages are under "rows". Labels and codes, which have no language, are no
    replies of several words. Rehearsal rows are left out.
    """
    walked = list(itertools.islice(parquet_io.read_own_examples(dataset, "train"), ROWS_WALKED))
    step = max(math.ceil(len(walked) / ROWS_READ), 1)
    rows, replies = [], []
    for example in walked[::step]:
        turns = [message.text for message in example.messages if message.role == "user"]
        rows.append("\n".join(turns) or "\n".join(message.text for message in example.messages))
        if turns and len(example.reply.split()) >= REPLY_WORDS:
            replies.append(example.reply)
    return {"rows": [text for text in rows if _is_text(text)], "replies": [text for text in replies if _is_text(text)]}


def _is_text(text: str) -> bool:
    """Return whether most characters beside spaces are letters, as in no formula and no row of readings."""
    characters = [character for character in text if not character.isspace()]
    return 2 * sum(unicodedata.category(character)[0] in "LM" for character in characters) > len(characters)


def _pieces(texts: Sequence[str]) -> list[list[str]]:
    """Return the texts in groups of PIECE_CHARACTERS or more.

    A shorter last group is dropped, unless it is the only one.
    """
    pieces: list[list[str]] = []
    piece: list[str] = []
    for text in texts:
        piece.append(text)
        if sum(map(len, piece)) >= PIECE_CHARACTERS:
            pieces.append(piece)
            piece = []
    if piece and not pieces:
        pieces.append(piece)
    return pieces


def _spread(texts: Sequence[str], max_characters: int = ROW_CHARACTERS) -> list[str]:
    """Return texts at even distances, cut to `max_characters`, of at most about MEASURED_CHARACTERS together."""
    cut = [text[: max(max_characters, 1)] for text in texts]
    count = min(math.ceil(MEASURED_CHARACTERS * len(cut) / max(sum(map(len, cut)), 1)), len(cut))
    chosen, characters = [], 0
    for index in range(count):
        text = cut[len(cut) * index // count]
        chosen.append(text)
        characters += len(text)
        if characters >= MEASURED_CHARACTERS:
            break
    return chosen


def _foreign_languages(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the languages but English of the pieces, the most frequent first, and the texts of their pieces.

    Both are empty unless these are more than half of the pieces, and without a package to detect languages.
    """
    try:
        detect = language_id.detector()
    except ExtraError:
        return [], []
    pieces = _pieces(texts)
    detected = [detect("\n".join(piece)) for piece in pieces]
    codes = [language.code if language.confidence >= MIN_CONFIDENCE else "" for language in detected]
    foreign = Counter(code for code in codes if code and not language_id.are_kin(code, REFERENCE_LANGUAGE))
    if 2 * foreign.total() <= len(pieces):
        return [], []
    of_foreign = [text for piece, code in zip(pieces, codes, strict=True) if code in foreign for text in piece]
    return [code for code, _ in foreign.most_common()], of_foreign


@torch.no_grad()
def _nats_per_letter(texts: Sequence[str], chat: ChatTokenizer, path: LossBackend) -> float:
    """Return the loss of all tokens but each text's first, divided by the number of letters.

    No text is in another's context: rows of one template would predict each other.
    """
    rows = []
    for text in texts:
        ids = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
        rows.append(TokenizedExample(list(ids), [True] * len(ids)))
    rows = [row for row in rows if len(row.ids) > 1]
    loss = float(path.losses(rows)[0].sum()) if rows else 0.0
    return loss / max(sum(map(letters, texts)), 1)


def letters(text: str) -> int:
    """Return the approximate number of alphabet letters with the same content.

    >>> letters("hello 42"), letters("你好"), letters("かな"), letters("नमस्ते")
    (5, 6, 4, 6)
    """
    count = 0
    for character in text:
        if unicodedata.category(character)[0] not in "LM":  # M: vowel signs, as in Hindi and Thai
            continue
        if unicodedata.east_asian_width(character) not in "WF":
            count += 1
        elif unicodedata.name(character, "").startswith("CJK"):
            count += HAN_LETTERS
        else:
            count += SYLLABLE_LETTERS
    return count
