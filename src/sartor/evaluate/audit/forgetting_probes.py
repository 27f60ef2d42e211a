"""Three probes of forgetting, each a loss in nats per token before and after tuning, with an interval.

    small_talk   200 exchanges of the asset `chitchat`: small talk that a tuned model should still master
    arithmetic   40 sums and differences asked in words, answered in a sentence: basic knowledge
    language     40 German sentences of the asset `home-intents`, requested in German: another language than that of
                 most tunings

The probes were fixed before anything was measured with them (docs/decisions/026-chosen.md). The gate takes the worst:
each has to stay under the limit, so no correction for three of them is needed.

The losses of a base are the same in every evaluation, so they are cached:

    SARTOR_HOME/probes/<key>.json     key: digest of what they depend on (`_losses_key`); losses: nats per token of
                                      each row
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sartor.core.errors import AssetError, SourceError
from sartor.core.filesystem import PRIVATE, write_file_atomic
from sartor.core.home import folder
from sartor.core.progress import Progress
from sartor.core.records import Example, Message, Origin, canonical, digest
from sartor.core.splits import group_of
from sartor.evaluate import bootstrap
from sartor.evaluate.audit import probes
from sartor.evaluate.paired_measurement import measure_losses
from sartor.models.base import Base
from sartor.models.packing import TokenizedExample

UNIT = "nats per token"
ARITHMETIC_ROWS, ARITHMETIC_SEED = 40, 0
# largest operand and result; `number_word` has a word for every result
_MAX_OPERAND, _MAX_RESULT = 20, 40
_SENTENCES = Path(__file__).with_name("home_sentences.toml")
_UNITS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
)
_TENS = {2: "twenty", 3: "thirty", 4: "forty"}


def number_word(number: int) -> str:
    """Return the English word of 0 to 49.

    >>> number_word(7), number_word(20), number_word(34)
    ('seven', 'twenty', 'thirty-four')
    """
    if number < len(_UNITS):
        return _UNITS[number]
    tens, unit = divmod(number, 10)
    return f"{_TENS[tens]}-{_UNITS[unit]}" if unit else _TENS[tens]


def arithmetic_rows(seed: int = ARITHMETIC_SEED) -> list[Example]:
    """Return 40 sums and differences of numbers up to 20, half each, drawn by digests: the same everywhere."""
    numbers = range(2, _MAX_OPERAND + 1)
    sums = [
        (left, "plus", right, left + right) for left in numbers for right in numbers if left + right <= _MAX_RESULT
    ]
    differences = [(left, "minus", right, left - right) for left in numbers for right in numbers if right < left]
    rows = []
    for terms in (sums, differences):
        terms.sort(key=lambda term: hashlib.sha256(f"{seed}:{term}".encode()).digest())
        for left, operation, right, result in terms[: ARITHMETIC_ROWS // 2]:
            term = f"{number_word(left)} {operation} {number_word(right)}"
            reply = f"{term} is {number_word(result)}."
            reply = reply[0].upper() + reply[1:]
            messages = (Message.of("user", f"What is {term}?"), Message.of("assistant", reply))
            rows.append(Example(messages, (Origin("arithmetic", term, "Apache-2.0"),)))
    return rows


def language_rows() -> list[Example]:
    """Return the German sentences, each the reply to one German request; a group is an intent."""
    document = tomllib.loads(_SENTENCES.read_text(encoding="utf-8"))
    prompt = Message.of("user", document["prompt"])
    rows = []
    for intent, sentences in document["sentences"].items():
        origin = Origin("home-intents", f"{document['language']}.json:{intent}", document["licence"])
        for sentence in sentences:
            messages = (prompt, Message.of("assistant", sentence))
            rows.append(Example(messages, (origin,), group=intent))
    return rows


# the lambda looks the first up when it is called, so that a test may replace it
PROBES: Mapping[str, Callable[[], list[Example]]] = {
    "small_talk": lambda: probes.chitchat_rows(),
    "arithmetic": arithmetic_rows,
    "language": language_rows,
}


def measure_probes(
    base: Base, model: Any, notice: Callable[[str], object] = lambda line: None
) -> dict[str, dict[str, Any]]:
    """Return the number of rows and the five numbers of a Comparison of each probe.

    `skipped` gives the reason if a probe was not measured. The rows of all probes go through base and tuned model
    together, or through the tuned one alone if the base's losses are cached. notice: receives the progress.
    """
    results: dict[str, dict[str, Any]] = {}
    encoded_by_probe: dict[str, list[TokenizedExample]] = {}
    groups: dict[str, list[str]] = {}
    for name, make_rows in PROBES.items():
        try:
            rows = make_rows()
        except AssetError as error:
            results[name] = {"skipped": f"{error.problem} ({error.remedy})"}
            continue
        encoded, problem = _encode_rows(base, rows)
        if not encoded:  # for instance a base that takes audio alone
            results[name] = {"skipped": f"the base takes none of the {len(rows)} rows of the probe: {problem}"}
            continue
        group_by_id = {row.id: group_of(row) for row in rows}
        encoded_by_probe[name] = encoded
        groups[name] = [group_by_id[row.example_id] for row in encoded]
    all_rows = [row for encoded in encoded_by_probe.values() for row in encoded]
    with Progress("forgetting", len(all_rows), "rows", notice) as progress:
        before, after = _measure_sides(base, model, all_rows, lambda fraction: progress.show(fraction * len(all_rows)))
    start = 0
    for name, encoded in encoded_by_probe.items():
        part = slice(start, start + len(encoded))
        start += len(encoded)
        tokens = [row.supervised_tokens for row in encoded]
        comparison = bootstrap.paired_bootstrap(before[part], after[part], groups[name], tokens, is_bounded=False)
        results[name] = {"rows": len(encoded), **dataclasses.asdict(comparison)}
    return {name: results[name] for name in PROBES}


def _measure_sides(
    base: Base, model: Any, encoded: Sequence[TokenizedExample], progress: Callable[[float], object]
) -> tuple[list[float], list[float]]:
    """Return the losses of the base, cached by an earlier evaluation if possible, and of the tuned model.

    progress: called with the fraction done, 0..1.
    """
    key = _losses_key(base, encoded)
    try:
        file = folder("probes") / f"{key}.json"
        known = json.loads(file.read_bytes())
        losses = known["losses"]
        is_known = known["key"] == key and len(losses) == len(encoded) and all(map(math.isfinite, losses))
    except (OSError, ValueError, KeyError, TypeError):  # missing or unreadable: measured again
        is_known = False
    if is_known:
        return losses, measure_losses(base, model, encoded, sides=[True], progress=progress)[0]
    before, after = measure_losses(base, model, encoded, progress=progress)
    with contextlib.suppress(OSError):  # without a writable home the next evaluation measures again
        write_file_atomic(folder("probes") / f"{key}.json", canonical({"key": key, "losses": before}), mode=PRIVATE)
    return before, after


def _losses_key(base: Base, encoded: Sequence[TokenizedExample]) -> str:
    """Return the digest of all that a base's losses depend on.

    It covers the base's facts except name and licence, the rows' tokens, the versions of the code, and the device.
    """
    facts = {name: value for name, value in base.as_manifest().items() if name not in ("name", "licence")}
    rows = [[list(row.ids), list(map(int, row.learnt))] for row in encoded]
    versions = {name: importlib.metadata.version(name) for name in ("sartor", "torch", "transformers")}
    processor = torch.backends.cpu.get_cpu_capability()
    return digest([facts, rows, versions, str(base.device), processor, torch.get_num_threads()])


def _encode_rows(base: Base, rows: Sequence[Example]) -> tuple[list[TokenizedExample], str]:
    """Return the rows that the base's template accepts, and why the last of the others was refused."""
    encoded, problem = [], ""
    for row in rows:
        try:
            encoded.append(base.chat.encode(row))
        except SourceError as error:
            problem = error.problem
    return encoded, problem


def worst_probe(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the key `forgetting` of a Report: the probe whose interval ends highest.

    The result is `skipped` if a probe was not measured.
    """
    skipped = {name: result["skipped"] for name, result in results.items() if "skipped" in result}
    if skipped:
        reasons = "; ".join(f"{name.replace('_', ' ')}: {reason}" for name, reason in skipped.items())
        return {"skipped": reasons}
    name = max(results, key=lambda name: results[name]["high"])
    return {"unit": UNIT, "probe": name, **results[name]}
