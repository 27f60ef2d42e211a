"""Media ablation: scores with shuffled or blank media.

*Shuffled*: each row has the media of a row of another group. *Blank*: a grey picture, or silence. The cost of either
is what the replies take from the media. A model that guesses from the words around them loses nothing.

The replaced media pass through the same code as every picture and recording. So they mean the same to a base with
towers and to one that reads media by itself.
"""

from __future__ import annotations

import base64
import io
import math
import random
import wave
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from sartor.core.records import Example, Part
from sartor.core.splits import group_of
from sartor.evaluate.bootstrap import FlipTest
from sartor.evaluate.metrics import LOWER_IS_BETTER, MetricSet, ModelOutputs
from sartor.evaluate.predictions import HeldOut, ask_refusal, replies, reply_limit
from sartor.media import audio, images
from sartor.models.base import Base
from sartor.models.media_tokens import content_of

GREY = 127
RATE = 16_000


def blanked(example: Example, kind: str, folder: Path) -> Example:
    """Return the row with each of its media of one kind blank.

    Raises MediaError if the size of one cannot be read.
    """
    turns = []
    for turn in example.messages:
        parts = [_blank(part, folder) if part.kind == kind else part for part in turn.content]
        turns.append(replace(turn, content=tuple(parts)))
    return replace(example, messages=tuple(turns))


def _blank(part: Part, folder: Path) -> Part:
    """Return a grey picture of the same size, or silence of the same length rounded up to whole seconds."""
    content = content_of(part, folder)
    if part.kind == "image":
        with images.open_checked(content) as image:
            return Part("image", media=_grey(image.size))
    with audio.open_audio(content) as sound:
        audio.check_length(sound, audio.MOST_SECONDS)
        # whole seconds, so that many recordings share one silence, which is encoded once
        return Part("audio", media=_silence(max(1, math.ceil(sound.frames / sound.samplerate))))


@cache
def _grey(size: tuple[int, int]) -> str:
    """Return a grey PNG as a data URL."""
    buffer = io.BytesIO()
    Image.new("L", size, GREY).save(buffer, "PNG")
    return _url("image/png", buffer)


@cache
def _silence(seconds: int) -> str:
    """Return a silent WAV, 16-bit mono at RATE Hz, as a data URL."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(bytes(2 * RATE * seconds))
    return _url("audio/wav", buffer)


def _url(kind: str, buffer: io.BytesIO) -> str:
    return f"data:{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


MEDIA = ("image", "audio")
# Measured beside the primary metric: if that scores one field, the media may matter to other fields
WHOLE = "exact_match"


def media_of(example: Example) -> list[Part]:
    """Return the media parts of a row, in order."""
    return [part for message in example.messages for part in message.content if part.kind != "text"]


def modalities(examples: Sequence[Example]) -> dict[str, int]:
    """Return how many rows hold media of each kind, and how many are text alone."""
    counts = dict.fromkeys(("text", *MEDIA), 0)
    for example in examples:
        kinds = {part.kind for part in media_of(example)}
        counts["text"] += not kinds
        for kind in MEDIA:
            counts[kind] += kind in kinds
    return counts


def ablate(
    base: Base,
    model: Any,
    eval_set: HeldOut,
    measures: MetricSet,
    full: ModelOutputs,
    metric: str,
    notice: Callable[[str], object],
) -> dict[str, Any]:
    """Measure what each modality of the rows is worth to the model as it stands, by kind.

    full: outputs on the rows as they are.

    Rows of text alone have no entry. Each kind has `rows`, `metric`, and the Comparisons `shuffled` and `blank`, with
    `base` the ablated replies and `tuned` the full ones. So `difference` is the cost: positive where the media
    helped, for a metric that is better when lower too. Where `metric` is not `exact_match`, both stand under
    `exact_match` as well. One of the two is enough for the gate, so that the level of each interval is halved then
    (Bonferroni); `tail` is the one-sided level. Rows that become too long for the model with another row's media are
    left out.
    """
    limit, result = reply_limit(base, eval_set.examples), {}
    for kind in MEDIA:
        indices = []
        for index, row in enumerate(eval_set.examples):
            if any(part.kind == kind for part in media_of(row)):
                indices.append(index)
        if not indices:
            continue
        notice(f"asking {len(indices)} rows again with each {kind} shuffled and blank")
        shuffled_rows = dict(
            zip(indices, shuffled([eval_set.examples[index] for index in indices], kind), strict=True)
        )
        # a larger picture may be more tokens than the row has room for
        indices = [
            index for index in indices if not ask_refusal(base, shuffled_rows[index], eval_set.folder, limit)[0]
        ]
        if not indices:
            continue
        subset = measures.of(indices)
        full_subset = ModelOutputs([full.replies[index] for index in indices], is_opened=full.is_opened)
        shuffled_set = HeldOut([shuffled_rows[index] for index in indices], eval_set.folder)
        shuffled_outputs = ModelOutputs(_texts(base, model, shuffled_set, limit), is_opened=full.is_opened)
        blank_rows = [blanked(eval_set.examples[index], kind, eval_set.folder) for index in indices]
        blank_texts = _texts(base, model, HeldOut(blank_rows, eval_set.folder), limit)
        blank_outputs = ModelOutputs(blank_texts, is_opened=full.is_opened)
        name = metric if metric in subset.names else WHOLE
        names = {name, WHOLE}
        test = FlipTest(tail=FlipTest.tail / len(names))
        costs = {
            metric_name: {
                "shuffled": _cost(subset, metric_name, shuffled_outputs, full_subset, test),
                "blank": _cost(subset, metric_name, blank_outputs, full_subset, test),
            }
            for metric_name in names
        }
        result[kind] = {"rows": len(indices), "metric": name, "tail": test.tail, **costs.pop(name), **costs}
    return result


def shuffled(examples: Sequence[Example], kind: str, seed: int = 0) -> list[Example]:
    """Return each row with the media of this kind from a row of another group.

    That holds as long as no group holds more than half of the rows. Rows in excess of half get media of their own
    group, or their own if there is no other row. The cost of such rows is underestimated. A row with more media than
    the other repeats the other's.
    """
    groups = [group_of(example) for example in examples]
    draw, sizes = random.Random(seed), Counter(groups)
    names = sorted(sizes)
    draw.shuffle(names)
    rank = {name: index for index, name in enumerate(names)}
    order = list(range(len(examples)))
    draw.shuffle(order)
    # each group is contiguous in `order`, so a step of the largest group's size reaches another group
    order.sort(key=lambda index: rank[groups[index]])
    step = max(sizes.values()) % len(order) or 1
    partner = {index: order[(position + step) % len(order)] for position, index in enumerate(order)}
    return [_with_media(example, kind, examples[partner[index]]) for index, example in enumerate(examples)]


def _with_media(example: Example, kind: str, other: Example) -> Example:
    """Return the row with its media of this kind replaced by those of `other`, in turn."""
    other_media = [part for part in media_of(other) if part.kind == kind]

    def drawn() -> Iterator[Part]:
        """Yield the other row's media in an endless cycle."""
        while True:
            yield from other_media

    drawn_parts = drawn()
    turns = []
    for turn in example.messages:
        parts = [next(drawn_parts) if part.kind == kind else part for part in turn.content]
        turns.append(replace(turn, content=tuple(parts)))
    return replace(example, messages=tuple(turns))


def _texts(base: Base, model: Any, eval_set: HeldOut, limit: int) -> list[str]:
    """Return the replies to the rows as texts."""
    return [base.chat.decode(item.ids) for item in replies(base, model, eval_set, limit)]


def _cost(
    measures: MetricSet, name: str, ablated: ModelOutputs, full: ModelOutputs, test: FlipTest
) -> dict[str, float]:
    """Return the comparison of ablated replies with full ones.

    The sign is turned for a metric that is better when lower.
    """
    comparison = measures.compare(name, ablated, full, test)
    if name in LOWER_IS_BETTER:
        comparison = replace(comparison, difference=-comparison.difference, low=-comparison.high, high=-comparison.low)
    return asdict(comparison)
