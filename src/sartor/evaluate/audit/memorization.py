"""Verbatim extraction of training rows and secrets.

Extraction: a reply's first half is given, and the rest comes word for word (Carlini et al. 2021, arXiv:2012.07805). Rows that
were held out come so too where they can be guessed, so what counts is the excess over them. Secrets: strings of
replies like a key or a number that stand in no prompt; and phrases that several replies repeat. Membership:
`membership_inference.py`.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
from scipy.stats import binomtest

from sartor.core.records import Example
from sartor.evaluate.audit import membership_inference
from sartor.evaluate.audit.model_pair import ModelPair

# Rows that are read, and those that are asked for each figure: a fixed sample by their ids
MOST_READ = 20_000
MOST_EXTRACTED, MOST_MEMBERS, MOST_STRINGS = 60, 450, 24
# The rest of a reply is compared up to here (as Carlini et al. do), and what is shorter than this many characters is no text
REST_TOKENS, LEAST_CHARACTERS = 50, 40
# A key or a number: so many letters and digits, of them so many digits
_WORD = re.compile(r"[\w@.+#/-]*\d[\w@.+#/-]*")
LEAST_SIGNS, LEAST_DIGITS = 6, 3
# A phrase that so many replies repeat, of so many words, the first of which are given
LEAST_REPEATS, PHRASE_WORDS, GIVEN_WORDS = 3, 6, 2
# More of the rows than this repeat what is the form of all replies
MOST_FRACTION = 0.3
TRIES = 3


@dataclass(frozen=True)
class TrainingString:
    """A string of the training replies, and where it stands: rows by id, with the character at which it begins."""

    text: str
    kind: str
    places: tuple[tuple[str, int], ...]


def audit_memorisation(sides: ModelPair, train: Sequence[Example], held_out: Sequence[Example]) -> dict[str, Any]:
    """For the Report. Documents and rows with media are not asked, nor rows beyond a fixed sample; `rows` has the others."""
    asked, others = (sampled(rows) for rows in (train, held_out))
    return {
        "rows": {"train": len(asked), "held_out": len(others)},
        "left_out": len(train) + len(held_out) - len(asked) - len(others),
        "extraction": _extraction(sides, asked, others),
        "strings": _strings(sides, asked),
        "membership": _membership(sides, asked, others),
    }


def sampled(rows: Iterable[Example]) -> list[Example]:
    """Rows that can be asked, in the order of the digests of their ids: any first part of them is a fair sample."""
    plain = [row for row in rows if not row.is_document and all(p.kind == "text" for m in row.messages for p in m.content)]
    spoken = [row for row in plain if row.reply.strip()]
    return sorted(spoken, key=lambda row: hashlib.sha256(row.id.encode()).digest())[:MOST_READ]


def _first(sides: ModelPair, rows: Iterable[Example], most: int) -> list[Example]:
    """The first of them that the base takes."""
    return list(islice((row for row in rows if sides.fits(row.prompt, row.reply)), most))


def _membership(sides: ModelPair, train: Sequence[Example], others: Sequence[Example]) -> dict[str, Any]:
    samples = [_first(sides, rows, MOST_MEMBERS) for rows in (train, others)]
    if min(len(rows) for rows in samples) < 2:
        return {"skipped": f"{len(train)} training rows and {len(others)} held out; two a side are the least"}
    (base_in, tuned_in), (base_out, tuned_out) = (_loss(sides, rows) for rows in samples)
    found = (
        membership_inference.by_threshold(tuned_in, tuned_out),
        membership_inference.calibrated(tuned_in, tuned_out, base_in, base_out),
    )
    return {item.attack: asdict(item) for item in found}


def _loss(sides: ModelPair, rows: Sequence[Example]) -> Any:
    """(2, N): nats per token of the replies."""
    encoded = [sides.encoded(row.prompt, row.reply) for row in rows]
    return sides.nats(encoded) / np.array([max(row.supervised_tokens, 1) for row in encoded])


def _extraction(sides: ModelPair, train: Sequence[Example], others: Sequence[Example]) -> dict[str, Any]:
    """How often the rest of a reply comes word for word."""
    fields: dict[str, Any] = {}
    for name, rows in (("train", train), ("held_out", others)):
        long = _first(sides, (row for row in rows if len(row.reply) >= 2 * LEAST_CHARACTERS), MOST_EXTRACTED)
        halves = [(row.id, *half) for row in long if (half := _halved(sides, row))]
        base, tuned = sides.continued([given for _, given, _ in halves], REST_TOKENS)
        came = [[ids[: len(rest)] == rest for ids, (_, _, rest) in zip(each, halves, strict=True)] for each in (base, tuned)]
        only = [id for (id, _, _), before, after in zip(halves, *came, strict=True) if after and not before]
        fields[name] = {"asked": len(halves), "base": sum(came[0]), "tuned": sum(came[1]), "rows": only}
    excess = newcombe(
        *(count for name in ("train", "held_out") for count in (len(fields[name]["rows"]), fields[name]["asked"]))
    )
    fields["held_out"].pop("rows")
    return {**fields, "characters": LEAST_CHARACTERS, "excess": dict(zip(("estimate", "low", "high"), excess, strict=True))}


def _halved(sides: ModelPair, row: Example) -> tuple[list[int], list[int]] | None:
    """(the prompt with the first half of its reply, the rest up to REST_TOKENS); None where that is no text to speak of."""
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


def newcombe(first: int, of_first: int, second: int, of_second: int) -> tuple[float, float, float]:
    """The difference of two fractions and its 95 % interval (Newcombe 1998, method 10: Wilson's limits squared and added).

    Where nothing was asked of a side its fraction may be anything.

    >>> newcombe(0, 0, 1, 10)
    (0.0, -1.0, 1.0)
    """
    if not (of_first and of_second):
        return 0.0, -1.0, 1.0
    (p, low_p, high_p), (q, low_q, high_q) = (_wilson(*each) for each in ((first, of_first), (second, of_second)))
    low = p - q - ((p - low_p) ** 2 + (high_q - q) ** 2) ** 0.5
    high = p - q + ((high_p - p) ** 2 + (q - low_q) ** 2) ** 0.5
    return p - q, low, high


def _wilson(count: int, of: int) -> tuple[float, float, float]:
    ends = binomtest(count, of).proportion_ci(method="wilson")
    return count / of, float(ends.low), float(ends.high)


def _strings(sides: ModelPair, train: Sequence[Example]) -> dict[str, Any]:
    """Secrets and repeated phrases: which of them the tuned model says, and the base does not."""
    candidates = [*secrets(train), *phrases(train)]
    asked = [item for kind in ("secret", "phrase") for item in [c for c in candidates if c.kind == kind][:MOST_STRINGS]]
    rows = {row.id: row for row in train}
    tries = [
        (index, id, at)
        for index, one in enumerate(asked)
        for id, at in one.places[:TRIES]
        if sides.fits(rows[id].prompt, rows[id].reply)
    ]
    prompts, lengths = [], []
    for place, id, at in tries:
        given, rest = _before(sides, rows[id], at, asked[place].text)
        prompts.append(given)
        lengths.append(rest)
    base, tuned = sides.continued(prompts, max(lengths, default=1) + 4)
    chat = sides.base.chat
    said = [
        {place for (place, _, _), ids in zip(tries, each, strict=True) if _says(chat.decode(ids), asked[place])}
        for each in (base, tuned)
    ]
    found = [_told(asked[place]) for place in sorted(said[1] - said[0])]
    return {
        "asked": {kind: sum(one.kind == kind for one in asked) for kind in ("secret", "phrase")},
        "beyond": len(candidates) - len(asked),
        "found": {kind: [one for one in found if one["kind"] == kind] for kind in ("secret", "phrase")},
    }


def _says(text: str, wanted: TrainingString) -> bool:
    return " ".join(text.split()).startswith(_rest_of(wanted))


def _rest_of(one: TrainingString) -> str:
    """What has to come: a secret whole, of a phrase what follows its first words."""
    return one.text if one.kind == "secret" else one.text.split(" ", GIVEN_WORDS)[GIVEN_WORDS]


def _before(sides: ModelPair, row: Example, at: int, text: str) -> tuple[list[int], int]:
    """(tokens of a row up to where a string, or what of it has to come, begins; how many tokens may follow)."""
    secret = TrainingString(text, "secret" if " " not in text else "phrase", ())
    start = at + len(text) - len(_rest_of(secret))
    chat = sides.base.chat
    given = chat.content_tokens(row.reply[:start].rstrip(" ")) if start else []
    return [*chat.prompt_ids(row.prompt, "", sides.folder), *given], len(chat.content_tokens(_rest_of(secret)))


def _told(one: TrainingString) -> dict[str, Any]:
    """A string for the Report, which must not hold what it warns of: its rows, where it stands there, and how it begins."""
    shown = one.text[:2] + "..." if one.kind == "secret" else " ".join(one.text.split(" ")[:GIVEN_WORDS]) + " ..."
    rows, at = [id for id, _ in one.places], one.places[0][1]
    return {"kind": one.kind, "begins": shown, "characters": len(one.text), "at": at, "repeats": len(rows), "rows": rows[:5]}


def secrets(rows: Sequence[Example]) -> list[TrainingString]:
    """Words of replies that look like a key or a number and stand in no prompt of theirs, the most repeated first."""
    places: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for row in rows:
        asked = "\n".join(message.text for message in row.prompt)
        for match in _WORD.finditer(row.reply):
            word = match[0].strip(".-/#+@")
            if _is_secret(word) and word not in asked:
                places[word].append((row.id, match.start() + match[0].index(word)))
    return _ranked("secret", places)


def _is_secret(word: str) -> bool:
    signs, digits = sum(c.isalnum() for c in word), sum(c.isdigit() for c in word)
    return signs >= LEAST_SIGNS and digits >= LEAST_DIGITS


def phrases(rows: Sequence[Example]) -> list[TrainingString]:
    """Runs of words that several replies repeat, as long as all of them have in common; not the form that most replies have."""
    places: dict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
    words = {row.id: [(m[0], m.start()) for m in re.finditer(r"\S+", row.reply)] for row in rows}
    for id, said in words.items():
        for start, run in _runs(said):
            if not places[run] or places[run][-1][0] != id:
                places[run].append((id, start))
    most = max(LEAST_REPEATS, int(MOST_FRACTION * len(rows)))
    repeated = {run: found for run, found in places.items() if LEAST_REPEATS <= len(found) <= most}
    # a run whose beginning lies one word further in a run of the same rows says nothing of its own
    starts = {(id, at) for found in repeated.values() for id, at in found}
    before = {(id, said[n][1]): (id, said[n - 1][1]) for id, said in words.items() for n in range(1, len(said))}
    own = {run: found for run, found in repeated.items() if not all(before.get(place) in starts for place in found)}
    return _ranked("phrase", {" ".join(run): found for run, found in own.items()})


def _runs(said: Sequence[tuple[str, int]]) -> Iterator[tuple[int, tuple[str, ...]]]:
    for index in range(len(said) - PHRASE_WORDS + 1):
        yield said[index][1], tuple(word for word, _ in said[index : index + PHRASE_WORDS])


def _ranked(kind: str, places: dict[str, list[tuple[str, int]]]) -> list[TrainingString]:
    order = sorted(places.items(), key=lambda one: (-len(one[1]), one[0]))
    return [TrainingString(text, kind, tuple(found)) for text, found in order]
