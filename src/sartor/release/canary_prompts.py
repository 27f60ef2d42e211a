"""Canary prompts: prompts whose recorded replies a server or device reproduces.

A Release brings held-out prompts with the replies that its Report recorded (`canaries` in release.json). A Release
without any is tested with general questions, and its replies are compared with those of the base. Replies that were
computed with other arithmetic (core/numerics.py) are not compared: those prompts only have to be answered.
"""

from __future__ import annotations

import io
import math
import struct
import wave
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from rapidfuzz import fuzz

from sartor.core import numerics
from sartor.core.errors import AdmissionError
from sartor.inference.engine import BASE, Event, GenerateCall, ReplyDone, ReplyFailed, Sampling, TextDelta
from sartor.media.content_parts import url_of

SIDE = 64
RATE, SECONDS = 16_000, 0.5


@cache
def sample(kind: str) -> str:
    """Return a data URL of a test file: an image with a colour gradient, or half a second of a rising tone.

    kind: `image`; any other value gives audio.
    """
    return url_of(_picture(), "image/png") if kind == "image" else url_of(_clip(), "audio/wav")


def _picture() -> bytes:
    pixels = bytearray()
    for y in range(SIDE):
        pixels.append(0)  # each row begins with the number of its filter: none
        for x in range(SIDE):
            pixels += bytes((4 * x, 4 * y, 255 - 2 * (x + y)))
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n"
    for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")):
        png += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return png


def _clip() -> bytes:
    times = (index / RATE for index in range(int(RATE * SECONDS)))
    samples = (round(9000 * math.sin(2 * math.pi * (300 + 400 * t) * t)) for t in times)
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(RATE)
        writer.writeframes(b"".join(struct.pack("<h", value) for value in samples))
    return file.getvalue()


MOST_CANARIES = 12
SAMPLING = Sampling(max_tokens=48)
# Least mean similarity of the beginnings of replies and recorded replies, 0..1 by edit distance. Only the beginnings
# are compared, because a long free text diverges after one rounding difference. Figures:
# docs/development/measurements.md
LEAST_AGREEMENT = 0.65
COMPARED_CHARACTERS = 80
# A shorter recorded reply (a label, a number) is the same or not: `ham` and `spam` are 0.86 alike by edits
SHORT_CHARACTERS = 20
# A degenerate reply ends in repetitions of one piece of at most LONGEST_UNIT characters: at least LEAST_REPEATS times,
# over at least REPEATED_FRACTION of the reply
LONGEST_UNIT = 24
LEAST_REPEATS = 8
REPEATED_FRACTION = 0.75
GENERAL = ("Hello!", "What can you do for me?", "Write one sentence about the sea.", "List three colours.")


@dataclass(frozen=True)
class CanaryPrompts:
    """Canary prompts of a Release, with the recorded replies.

    recorded: replies to `calls` in the Report; empty for general questions.
    media_calls: calls with a generated image or clip, which only have to be answered.
    not_checked: reason why the recorded replies are not compared; empty if they are.
    """

    calls: tuple[GenerateCall, ...]
    recorded: tuple[str, ...]
    media_calls: tuple[GenerateCall, ...] = ()
    not_checked: str = ""

    @property
    def all_calls(self) -> tuple[GenerateCall, ...]:
        """All calls, in the order of the event lists for `judge_canaries`."""
        return (*self.calls, *self.media_calls)


def canaries_of(manifest: Mapping[str, Any], adapter: str, reads: Sequence[str] = ()) -> CanaryPrompts:
    """Return the canary prompts of a Release, as short greedy calls.

    A recorded prompt is used unchanged; a general one follows the Release's system prompt and is also put to the base.
    reads: kinds of media that the Release supports besides text.
    """
    canaries = [item for item in manifest.get("canaries", []) if _is_canary(item)][:MOST_CANARIES]
    system = [{"role": "system", "content": manifest["system_prompt"]}] if manifest["system_prompt"] else []
    media_calls = []
    for kind in reads:
        content = [{"type": kind, kind: sample(kind)}, {"type": "text", "text": GENERAL[1]}]
        messages = (*system, {"role": "user", "content": content})
        media_calls.append(GenerateCall(f"canary-{kind}", adapter, messages, sampling=SAMPLING))
    if canaries:
        calls = [
            GenerateCall(f"canary-{index}", adapter, tuple(canary["messages"]), sampling=SAMPLING)
            for index, canary in enumerate(canaries)
        ]
        # a canary without a dtype has that of the Release's base
        dtype = manifest.get("base", {}).get("dtype", "")
        reasons = [
            numerics.not_checked(canary.get("numerics"), str(canary.get("dtype", dtype))) for canary in canaries
        ]
        return CanaryPrompts(
            calls=tuple(calls),
            recorded=tuple(canary["reply"] for canary in canaries),
            media_calls=tuple(media_calls),
            not_checked=next(filter(None, reasons), ""),
        )
    prompts = [(*system, {"role": "user", "content": text}) for text in GENERAL]
    pairs = [(target, messages) for target in (adapter, BASE) for messages in prompts]
    calls = [
        GenerateCall(f"canary-{index}", target, messages, sampling=SAMPLING)
        for index, (target, messages) in enumerate(pairs)
    ]
    return CanaryPrompts(tuple(calls), (), tuple(media_calls))


def _is_canary(canary: Mapping[str, Any]) -> bool:
    messages = canary.get("messages")
    if not isinstance(canary.get("reply"), str) or not isinstance(messages, list):
        return False
    return all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message
        for message in messages
    )


def judge_canaries(canaries: CanaryPrompts, event_lists: Sequence[Sequence[Event]]) -> str:
    """Judge the replies to canary prompts; return a summary.

    event_lists: events of each call, in the order of `all_calls`.
    Raises AdmissionError with the reason `canary` (not answered), `degenerate` (empty or repetitive) or `agreement`
    (too
    different from the recorded replies).
    """
    replies = [_reply(call, events) for call, events in zip(canaries.all_calls, event_lists, strict=True)][
        : len(canaries.calls)
    ]
    texts = [text for text, _ in replies]
    media_note = "".join(f"; {call.id.removeprefix('canary-')} answered" for call in canaries.media_calls)
    if not canaries.recorded:
        adapter_texts, base = texts[: len(GENERAL)], texts[len(GENERAL) :]
        _check_repetition(adapter_texts, sum(is_degenerate(text) for text in base))
        return (
            f"{len(adapter_texts)} general prompts answered; the Release records no replies to compare "
            f"with{media_note}"
        )
    # Degenerate replies in the Report passed the gate or were waived, so as many are expected here
    _check_repetition(texts, sum(is_degenerate(recorded) for recorded in canaries.recorded))
    if canaries.not_checked:
        return f"{canaries.not_checked}; {len(texts)} recorded prompts answered{media_note}"
    scores = [
        _agreement(text, is_cut, recorded) for (text, is_cut), recorded in zip(replies, canaries.recorded, strict=True)
    ]
    mean = sum(scores) / len(scores)
    if mean < LEAST_AGREEMENT:
        raise AdmissionError(
            f"the replies to {len(scores)} recorded prompts are {mean:.2f} like those that its Report has; "
            f"the limit is {LEAST_AGREEMENT}",
            "evaluate and release it again, on the base and the engine that serve it",
            "agreement",
        )
    exact = sum(item == 1 for item in scores)
    return (
        f"{len(scores)} recorded prompts answered, {exact} begin word for word, {mean:.2f} alike on the "
        f"mean{media_note}"
    )


def _agreement(text: str, is_cut: bool, recorded: str) -> float:
    """Return the similarity 0..1 of a reply and the recorded one, over their beginnings of equal length.

    At most COMPARED_CHARACTERS are compared. The Report also truncates long replies without saying which, so text
    beyond the end of a recorded reply is ignored. One below SHORT_CHARACTERS is compared whole, 0 or 1,
    with a reply that ended by itself: where replies are cut, the recorded one may have been cut too.
    """
    if len(recorded) < SHORT_CHARACTERS and not is_cut:
        return float(text.strip() == recorded.strip())
    text, recorded = text[: min(COMPARED_CHARACTERS, len(recorded))], recorded[:COMPARED_CHARACTERS]
    return fuzz.ratio(text, recorded[: len(text)] if is_cut else recorded) / 100


def _reply(call: GenerateCall, events: Sequence[Event]) -> tuple[str, bool]:
    """Return a complete reply, and whether the length limit cut it. Raises AdmissionError (`canary`)."""
    end = events[-1] if events else None
    if isinstance(end, ReplyFailed):
        brief = "the adapter could not answer a canary prompt"
        raise AdmissionError(
            f"{brief}: {end.problem}",
            "sartor tune RECIPE --out ADAPTER --replace, then sartor evaluate ADAPTER --replace",
            "canary",
            brief,
        )
    if not isinstance(end, ReplyDone) or end.finish == "cancelled":
        raise AdmissionError(
            f"the reply to {call.id} did not end",
            "sartor tune RECIPE --out ADAPTER --replace, then sartor evaluate ADAPTER --replace",
            "canary",
        )
    return "".join(event.text for event in events if isinstance(event, TextDelta)), end.finish == "length"


def _check_repetition(texts: Sequence[str], expected: int) -> None:
    """Raise AdmissionError if too many replies are empty or repeat one piece.

    Too many is at least half of the replies in addition to those expected.
    """
    degenerate = [text for text in texts if is_degenerate(text)]
    if len(degenerate) - expected >= len(texts) / 2:
        excerpt = degenerate[0][:60] + ("..." if len(degenerate[0]) > 60 else "")
        brief = f"{len(degenerate)} of {len(texts)} replies to canary prompts say nothing or repeat one piece"
        raise AdmissionError(
            f"{brief}: {excerpt!a}",
            "sartor tune RECIPE --out ADAPTER --replace --optimizer.learning_rate 1e-4, then sartor evaluate ADAPTER "
            "--replace",
            "degenerate",
            brief,
        )


def is_degenerate(text: str) -> bool:
    """Return whether a reply is empty or ends in repetitions of one short piece.

    The piece has at most LONGEST_UNIT characters, and the repetitions cover REPEATED_FRACTION of the reply.
    """
    text = text.strip()
    if not text:
        return True
    # for each period `unit`, `run` is the length of the longest suffix with that period
    for unit in range(1, min(LONGEST_UNIT, len(text) // LEAST_REPEATS) + 1):
        run = unit
        while run < len(text) and text[-1 - run] == text[-1 - run + unit]:
            run += 1
        if run >= LEAST_REPEATS * unit and run >= REPEATED_FRACTION * len(text):
            return True
    return False
