"""Prompts whose recorded replies a server or device repeats.

A Release brings its own: held-out prompts with the replies that its Report recorded (`canaries` in release.json). One that
has none is asked general questions, and held against what the base itself answers to them. Replies that another arithmetic
made (core/numerics.py) are compared with nothing: those prompts only have to be answered.
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
    """A data URL of that kind: a picture with shades from corner to corner, half a second of a rising tone."""
    return url_of(_picture(), "image/png") if kind == "image" else url_of(_clip(), "audio/wav")


def _picture() -> bytes:
    shades = [[(4 * x, 4 * y, 255 - 2 * (x + y)) for x in range(SIDE)] for y in range(SIDE)]
    rows = b"".join(b"\0" + bytes(value for pixel in row for value in pixel) for row in shades)
    head = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def _clip() -> bytes:
    times = (place / RATE for place in range(int(RATE * SECONDS)))
    samples = (round(9000 * math.sin(2 * math.pi * (300 + 400 * at) * at)) for at in times)
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(RATE)
        out.writeframes(b"".join(struct.pack("<h", value) for value in samples))
    return file.getvalue()


MOST_CANARIES = 12
SAMPLING = Sampling(max_tokens=48)
# How alike the beginnings of replies and recorded ones must be on the mean, 0..1 by edits. Only beginnings: a long free text
# goes its own way after one rounding. What was measured stands in docs/admission.md.
LEAST_AGREEMENT = 0.65
COMPARED_CHARACTERS = 80
# A reply whose end repeats one short piece so often, over so much of it
LONGEST_UNIT = 24
LEAST_REPEATS = 8
REPEATED_FRACTION = 0.75
GENERAL = ("Hello!", "What can you do for me?", "Write one sentence about the sea.", "List three colours.")


@dataclass(frozen=True)
class CanaryPrompts:
    """What is asked, and what a recorded Release answered before: `recorded` is empty for general questions.

    looks: with a picture or a clip made here, which only have to be answered. not_checked: why what was recorded is not
    compared with the answers; empty where it is.
    """

    calls: tuple[GenerateCall, ...]
    recorded: tuple[str, ...]
    looks: tuple[GenerateCall, ...] = ()
    not_checked: str = ""

    @property
    def every(self) -> tuple[GenerateCall, ...]:
        """All of them, in the order in which `judge` wants what was said."""
        return (*self.calls, *self.looks)


def canaries_of(manifest: Mapping[str, Any], adapter: str, reads: Sequence[str] = ()) -> CanaryPrompts:
    """The canaries of a Release, greedy and short; a recorded prompt as it stands, a general one after its system prompt.

    reads: the kinds of media that it reads beside text.
    """
    said = [one for one in manifest.get("canaries", []) if _is_canary(one)][:MOST_CANARIES]
    system = [{"role": "system", "content": manifest["system_prompt"]}] if manifest["system_prompt"] else []
    looks = tuple(_look(adapter, kind, system) for kind in reads)
    if said:
        calls = [
            GenerateCall(f"canary-{place}", adapter, tuple(one["messages"]), sampling=SAMPLING)
            for place, one in enumerate(said)
        ]
        return CanaryPrompts(tuple(calls), tuple(one["reply"] for one in said), looks, _not_checked(said, manifest))
    asked = [(*system, {"role": "user", "content": text}) for text in GENERAL]
    both = [(who, messages) for who in (adapter, BASE) for messages in asked]
    calls = [GenerateCall(f"canary-{place}", who, messages, sampling=SAMPLING) for place, (who, messages) in enumerate(both)]
    return CanaryPrompts(tuple(calls), (), looks)


def _not_checked(canaries: Sequence[Mapping[str, Any]], manifest: Mapping[str, Any]) -> str:
    """Return why recorded replies cannot be compared. A canary that states no dtype has that of the Release's base."""
    dtype = manifest.get("base", {}).get("dtype", "")
    found = [numerics.not_checked(one.get("numerics"), str(one.get("dtype", dtype))) for one in canaries]
    return next(filter(None, found), "")


def _look(adapter: str, kind: str, system: Sequence[Mapping[str, Any]]) -> GenerateCall:
    content = [{"type": kind, kind: sample(kind)}, {"type": "text", "text": GENERAL[1]}]
    return GenerateCall(f"canary-{kind}", adapter, (*system, {"role": "user", "content": content}), sampling=SAMPLING)


def _is_canary(said: Mapping[str, Any]) -> bool:
    messages = said.get("messages")
    return isinstance(said.get("reply"), str) and isinstance(messages, list) and all(_is_message(one) for one in messages)


def _is_message(said: Any) -> bool:
    return isinstance(said, dict) and isinstance(said.get("role"), str) and "content" in said


def judge_canaries(canaries: CanaryPrompts, said: Sequence[Sequence[Event]]) -> str:
    """What the replies showed. Raises AdmissionError: `canary`, `degenerate` or `agreement`.

    said: the events of each call, in the order of `every`.
    """
    replies = [_reply(call, events) for call, events in zip(canaries.every, said, strict=True)][: len(canaries.calls)]
    texts = [text for text, _ in replies]
    looked = "".join(f"; {call.id.removeprefix('canary-')} answered" for call in canaries.looks)
    if not canaries.recorded:
        mine, base = texts[: len(GENERAL)], texts[len(GENERAL) :]
        _check_repetition(mine, sum(is_degenerate(text) for text in base))
        return f"{len(mine)} general prompts answered; the Release records no replies to compare with{looked}"
    # what the Report has is what the gate let pass, or somebody waived: a canary asks whether it is still so
    _check_repetition(texts, sum(is_degenerate(wanted) for wanted in canaries.recorded))
    if canaries.not_checked:
        return f"{canaries.not_checked}; {len(texts)} recorded prompts answered{looked}"
    alike = [_agreement(text, is_cut, wanted) for (text, is_cut), wanted in zip(replies, canaries.recorded, strict=True)]
    mean = sum(alike) / len(alike)
    if mean < LEAST_AGREEMENT:
        raise AdmissionError(
            f"the replies to {len(alike)} recorded prompts are {mean:.2f} like those that its Report has; "
            f"the limit is {LEAST_AGREEMENT}",
            "evaluate and release it again, on the base and the engine that serve it",
            "agreement",
        )
    same = sum(one == 1 for one in alike)
    return f"{len(alike)} recorded prompts answered, {same} begin word for word, {mean:.2f} alike on the mean{looked}"


def _agreement(text: str, is_cut: bool, wanted: str) -> float:
    """0..1, over as much of both as there is, up to what is compared.

    The Report cut long replies too, and does not say which: what goes on beyond a recorded reply is let be.
    """
    text, wanted = text[: min(COMPARED_CHARACTERS, len(wanted))], wanted[:COMPARED_CHARACTERS]
    return fuzz.ratio(text, wanted[: len(text)] if is_cut else wanted) / 100


def _reply(call: GenerateCall, events: Sequence[Event]) -> tuple[str, bool]:
    """A whole reply, and whether its length cut it."""
    end = events[-1] if events else None
    if isinstance(end, ReplyFailed):
        brief = "the adapter could not answer a canary prompt"
        raise AdmissionError(f"{brief}: {end.problem}", "tune it again", "canary", brief)
    if not isinstance(end, ReplyDone) or end.finish == "cancelled":
        raise AdmissionError(f"the reply to {call.id} did not end", "tune it again", "canary")
    return "".join(event.text for event in events if isinstance(event, TextDelta)), end.finish == "length"


def _check_repetition(texts: Sequence[str], expected: int) -> None:
    """Raise AdmissionError when half of the replies, beyond those expected, are nothing or one piece over and over."""
    found = [text for text in texts if is_degenerate(text)]
    if len(found) - expected >= len(texts) / 2:
        shown = found[0][:60] + ("..." if len(found[0]) > 60 else "")
        brief = f"{len(found)} of {len(texts)} replies to canary prompts say nothing or repeat one piece"
        raise AdmissionError(f"{brief}: {shown!a}", "tune it again", "degenerate", brief)


def is_degenerate(text: str) -> bool:
    """Whether a reply is empty, or one piece of at most `LONGEST_UNIT` characters over and over to its end."""
    text = text.strip()
    if not text:
        return True
    for unit in range(1, min(LONGEST_UNIT, len(text) // LEAST_REPEATS) + 1):
        run = unit
        while run < len(text) and text[-1 - run] == text[-1 - run + unit]:
            run += 1
        if run >= LEAST_REPEATS * unit and run >= REPEATED_FRACTION * len(text):
            return True
    return False
