"""Verbatim extraction of training rows and secrets.

Extraction: the model is given the first half of a reply and writes the rest word for word (Carlini et al. 2021,
arXiv:2012.07805). Held-out rows are extracted too where they can be guessed, so the excess over them counts. Secrets:
strings of replies that look like a key or a number and are in no prompt; and phrases that several replies repeat.
Membership: `membership_inference.py`.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from typing import Any

import numpy as np
from scipy.stats import binomtest

from sartor.core.records import Example
from sartor.evaluate.audit import membership_inference
from sartor.evaluate.audit.model_pair import ModelPair

# Maximum number of rows that are read, and that are asked for each figure: a fixed sample by their ids
MOST_READ = 20_000
MOST_EXTRACTED, MOST_MEMBERS, MOST_STRINGS = 60, 450, 24
# The rest of a reply is compared up to this many tokens (as Carlini et al. do); a shorter rest than this many
# characters does not count
REST_TOKENS, LEAST_CHARACTERS = 50, 40
# A key or a number has at least so many letters and digits, and at least so many digits
_WORD = re.compile(r"[\w@.+#/-]*\d[\w@.+#/-]*")
LEAST_SIGNS, LEAST_DIGITS = 6, 3
# A phrase is repeated by at least so many replies and has so many words, the first GIVEN_WORDS of which are given
LEAST_REPEATS, PHRASE_WORDS, GIVEN_WORDS = 3, 6, 2
# A phrase in a larger fraction of the rows belongs to the form of all replies
MOST_FRACTION = 0.3
TRIES = 3


@dataclass(frozen=True)
class TrainingString:
    """A string of the training replies.

    places: (id of a row, character at which the string begins in its reply).
    """

    text: str
    kind: str
    places: tuple[tuple[str, int], ...]


def audit_memorisation(sides: ModelPair, train: Sequence[Example], held_out: Sequence[Example]) -> dict[str, Any]:
    """Return the audit for the Report.

    Documents, rows with media, rows without a reply and rows beyond a fixed sample are left out; `left_out` counts
    them and `rows` the others.
    """
    train_sample, held_out_sample = sampled(train), sampled(held_out)
    return {
        "rows": {"train": len(train_sample), "held_out": len(held_out_sample)},
        "left_out": len(train) + len(held_out) - len(train_sample) - len(held_out_sample),
        "extraction": _extraction(sides, train_sample, held_out_sample),
        "strings": _strings(sides, train_sample),
        "membership": _membership(sides, train_sample, held_out_sample),
    }


def sampled(rows: Iterable[Example]) -> list[Example]:
    """Return the rows that can be asked, in the order of the digests of their ids.

    Any first part of them is a fair sample.
    """
    answered_rows = []
    for row in rows:
        has_media = any(part.kind != "text" for message in row.messages for part in message.content)
        if not (row.is_document or has_media) and row.reply.strip():
            answered_rows.append(row)
    return sorted(answered_rows, key=lambda row: hashlib.sha256(row.id.encode()).digest())[:MOST_READ]


def _first(sides: ModelPair, rows: Iterable[Example], max_rows: int) -> list[Example]:
    """Return the first `max_rows` rows that the base accepts."""
    return list(islice((row for row in rows if sides.fits(row.prompt, row.reply)), max_rows))


def _membership(sides: ModelPair, train: Sequence[Example], others: Sequence[Example]) -> dict[str, Any]:
    """Return the results of both attacks, or `skipped` with the reason."""
    members, non_members = _first(sides, train, MOST_MEMBERS), _first(sides, others, MOST_MEMBERS)
    if min(len(members), len(non_members)) < 2:
        return {"skipped": f"{len(train)} training rows and {len(others)} held out; two a side are the least"}
    base_in, tuned_in = _loss(sides, members)
    base_out, tuned_out = _loss(sides, non_members)
    results = (
        membership_inference.by_threshold(tuned_in, tuned_out),
        membership_inference.calibrated(tuned_in, tuned_out, base_in, base_out),
    )
    return {item.attack: asdict(item) for item in results}


def _loss(sides: ModelPair, rows: Sequence[Example]) -> Any:
    """Return the losses of the replies, nats per token, (2, N) of base and tuned."""
    encoded = [sides.encoded(row.prompt, row.reply) for row in rows]
    return sides.nats(encoded) / np.array([max(row.supervised_tokens, 1) for row in encoded])


def _extraction(sides: ModelPair, train: Sequence[Example], others: Sequence[Example]) -> dict[str, Any]:
    """Return how often the rest of a reply comes word for word, on training and held-out rows."""
    fields: dict[str, Any] = {}
    for name, rows in (("train", train), ("held_out", others)):
        long_rows = _first(sides, (row for row in rows if len(row.reply) >= 2 * LEAST_CHARACTERS), MOST_EXTRACTED)
        ids, prefixes, rests = [], [], []
        for row in long_rows:
            half = _halved(sides, row)
            if half is not None:
                ids.append(row.id)
                prefixes.append(half[0])
                rests.append(half[1])
        base, tuned = sides.continued(prefixes, REST_TOKENS)
        base_count, tuned_count, tuned_only = 0, 0, []
        for id, rest, before, after in zip(ids, rests, base, tuned, strict=True):
            is_of_base, is_of_tuned = before[: len(rest)] == rest, after[: len(rest)] == rest
            base_count += is_of_base
            tuned_count += is_of_tuned
            if is_of_tuned and not is_of_base:
                tuned_only.append(id)
        fields[name] = {"asked": len(ids), "base": base_count, "tuned": tuned_count, "rows": tuned_only}
    trained, held_out = fields["train"], fields["held_out"]
    excess = newcombe(len(trained["rows"]), trained["asked"], len(held_out["rows"]), held_out["asked"])
    fields["held_out"].pop("rows")
    return {
        **fields,
        "characters": LEAST_CHARACTERS,
        "excess": dict(zip(("estimate", "low", "high"), excess, strict=True)),
    }


def _halved(sides: ModelPair, row: Example) -> tuple[list[int], list[int]] | None:
    """Return the prompt with the first half of its reply, and the rest up to REST_TOKENS.

    The result is None if the rest is shorter than LEAST_CHARACTERS.
    """
    encoded = sides.encoded(row.prompt, row.reply)
    start = encoded.learnt.index(True)
    reply = encoded.ids[start:]
    while reply and reply[-1] in sides.base.chat.stops:
        reply.pop()
    half = len(reply) // 2
    rest = reply[half : half + REST_TOKENS]
    if len(sides.base.chat.decode(rest)) < LEAST_CHARACTERS:
        return None
    return encoded.ids[: start + half], rest


def newcombe(first: int, first_total: int, second: int, second_total: int) -> tuple[float, float, float]:
    """Return the difference of two fractions and its 95 % interval (Newcombe 1998, method 10).

    With p = first / first_total, q = second / second_total and their Wilson limits:
    low = p - q - sqrt((p - low_p)^2 + (high_q - q)^2); high = p - q + sqrt((high_p - p)^2 + (q - low_q)^2).
    If a total is 0, the fraction may be anything.

    >>> newcombe(0, 0, 1, 10)
    (0.0, -1.0, 1.0)
    """
    if not (first_total and second_total):
        return 0.0, -1.0, 1.0
    p, low_p, high_p = _wilson(first, first_total)
    q, low_q, high_q = _wilson(second, second_total)
    low = p - q - ((p - low_p) ** 2 + (high_q - q) ** 2) ** 0.5
    high = p - q + ((high_p - p) ** 2 + (q - low_q) ** 2) ** 0.5
    return p - q, low, high


def _wilson(count: int, total: int) -> tuple[float, float, float]:
    """Return a fraction and its 95 % interval (Wilson 1927)."""
    bounds = binomtest(count, total).proportion_ci(method="wilson")
    return count / total, float(bounds.low), float(bounds.high)


def _strings(sides: ModelPair, train: Sequence[Example]) -> dict[str, Any]:
    """Return the secrets and repeated phrases that the tuned model writes and the base does not."""
    candidates = [*secrets(train), *phrases(train)]
    strings = []
    for kind in ("secret", "phrase"):
        strings += [string for string in candidates if string.kind == kind][:MOST_STRINGS]
    rows = {row.id: row for row in train}
    chat = sides.base.chat
    indices, prompts, lengths = [], [], []
    for index, string in enumerate(strings):
        rest = _rest_of(string)
        for id, position in string.places[:TRIES]:
            row = rows[id]
            if sides.fits(row.prompt, row.reply):
                # the row up to the expected text
                start = position + len(string.text) - len(rest)
                reply_ids = chat.content_tokens(row.reply[:start].rstrip(" ")) if start else []
                indices.append(index)
                prompts.append([*chat.prompt_ids(row.prompt, "", sides.folder), *reply_ids])
                lengths.append(len(chat.content_tokens(rest)))
    base, tuned = sides.continued(prompts, max(lengths, default=1) + 4)
    by_base: set[int] = set()
    by_tuned: set[int] = set()
    for written, continuations in ((by_base, base), (by_tuned, tuned)):
        for index, ids in zip(indices, continuations, strict=True):
            if " ".join(chat.decode(ids).split()).startswith(_rest_of(strings[index])):
                written.add(index)
    found: dict[str, list[dict[str, Any]]] = {"secret": [], "phrase": []}
    for index in sorted(by_tuned - by_base):
        found[strings[index].kind].append(_string_as_json(strings[index]))
    return {
        "asked": {kind: sum(string.kind == kind for string in strings) for kind in ("secret", "phrase")},
        "beyond": len(candidates) - len(strings),
        "found": found,
    }


def _rest_of(string: TrainingString) -> str:
    """Return the text that has to follow: a secret as a whole, or a phrase after its first words."""
    return string.text if string.kind == "secret" else string.text.split(" ", GIVEN_WORDS)[GIVEN_WORDS]


def _string_as_json(string: TrainingString) -> dict[str, Any]:
    """Return a string for the Report, which must not contain the string itself.

    The entry holds its rows, its position in the first of them, and its beginning.
    """
    beginning = (
        string.text[:2] + "..." if string.kind == "secret" else " ".join(string.text.split(" ")[:GIVEN_WORDS]) + " ..."
    )
    rows, position = [id for id, _ in string.places], string.places[0][1]
    return {
        "kind": string.kind,
        "begins": beginning,
        "characters": len(string.text),
        "at": position,
        "repeats": len(rows),
        "rows": rows[:5],
    }


def secrets(rows: Sequence[Example]) -> list[TrainingString]:
    """Return words of replies that look like a key or a number and are not in the row's prompt.

    The most repeated come first.
    """
    places: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for row in rows:
        prompt_text = "\n".join(message.text for message in row.prompt)
        for match in _WORD.finditer(row.reply):
            word = match[0].strip(".-/#+@")
            signs, digits = sum(letter.isalnum() for letter in word), sum(letter.isdigit() for letter in word)
            if signs >= LEAST_SIGNS and digits >= LEAST_DIGITS and word not in prompt_text:
                places[word].append((row.id, match.start() + match[0].index(word)))
    return _ranked("secret", places)


def phrases(rows: Sequence[Example]) -> list[TrainingString]:
    """Return runs of words that several replies repeat, the most repeated first.

    Each run has PHRASE_WORDS words. Of a longer repeated run only its first words are kept. Runs of more than
    MOST_FRACTION of the rows belong to the form of all replies and are left out.
    """
    places: dict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
    words = {row.id: [(match[0], match.start()) for match in re.finditer(r"\S+", row.reply)] for row in rows}
    for id, row_words in words.items():
        for index in range(len(row_words) - PHRASE_WORDS + 1):
            run = tuple(word for word, _ in row_words[index : index + PHRASE_WORDS])
            if not places[run] or places[run][-1][0] != id:
                places[run].append((id, row_words[index][1]))
    max_repeats = max(LEAST_REPEATS, int(MOST_FRACTION * len(rows)))
    repeated = {
        run: occurrences for run, occurrences in places.items() if LEAST_REPEATS <= len(occurrences) <= max_repeats
    }
    # drop a run that starts one word after another repeated run at every occurrence: it is the tail of a longer one
    starts = {occurrence for occurrences in repeated.values() for occurrence in occurrences}
    previous = {}
    for id, row_words in words.items():
        for (_, position), (_, next_position) in pairwise(row_words):
            previous[id, next_position] = (id, position)
    distinct = {}
    for run, occurrences in repeated.items():
        if not all(previous.get(occurrence) in starts for occurrence in occurrences):
            distinct[" ".join(run)] = occurrences
    return _ranked("phrase", distinct)


def _ranked(kind: str, places: dict[str, list[tuple[str, int]]]) -> list[TrainingString]:
    """Return the strings, the most repeated first."""
    order = sorted(places.items(), key=lambda entry: (-len(entry[1]), entry[0]))
    return [TrainingString(text, kind, tuple(occurrences)) for text, occurrences in order]
