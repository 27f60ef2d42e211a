"""`augment_images`, `augment_audio` (the steps of `curate`, as ways), and `speech`: questions spoken by a local voice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from sartor.core.config import option
from sartor.core.errors import ConfigError
from sartor.core.records import Drop, Example, Part
from sartor.core.splits import split_group
from sartor.core.teachers import say_all
from sartor.curate.sources import media_files
from sartor.curate.step import Copy
from sartor.curate.steps.media_augmentation import AugmentAudio, AugmentImages
from sartor.curate.synthesize.contract import Made, Skipped, some, why_no_question
from sartor.curate.synthesize.ways.rewrites import ROWS


@dataclass(frozen=True)
class Speech:
    """The last question of a row as a recording instead of its words; the reply stays. Needs a voice (espeak-ng, or piper)."""

    voice: str = option("espeak", "a voice as `sartor ask --speak` names them")
    speeds: tuple[float, ...] = option((1.0,), "one recording for each, 0.5 to 2")
    rows: int = option(0, ROWS)
    kind: Literal["speech"] = "speech"

    def __post_init__(self) -> None:
        if not self.speeds or not all(0.5 <= speed <= 2 for speed in self.speeds):
            raise ConfigError(
                f"speeds is {list(self.speeds)}; each must be from 0.5 to 2, and there must be one", "speeds: [0.9, 1.1]"
            )

    def make(self, seeds: Sequence[Example], seed: int, folder: Path) -> Iterator[Made | Drop | Skipped]:
        """See MakingWay. Raises MissingError where no voice is installed."""
        wanted = some(seeds, self.rows, seed, self.kind)
        speakable = [row for row in wanted if not why_no_question(row)]
        yield from (Skipped(why) for row in wanted if (why := why_no_question(row)))
        for speed in self.speeds:
            clips = say_all([row.messages[-2].text for row in speakable], self.voice, speed, folder / "clips")
            for row, clip in zip(speakable, clips, strict=True):
                with clip.open("rb") as stream:
                    name = media_files.copy(stream, clip.name, folder / "media")
                others = tuple(part for part in row.messages[-2].content if part.kind != "text")
                asked = replace(row.messages[-2], content=(Part("audio", media=name), *others))
                spoken = replace(row, messages=(*row.messages[:-2], asked, row.messages[-1]))
                yield Made(spoken, f"{row.id[:16]}.{speed:g}", (row,), split_group(row), f"spoken by {self.voice} at {speed:g}")


def copied(step: AugmentImages | AugmentAudio, seeds: Sequence[Example], folder: Path) -> Iterator[Made | Drop | Skipped]:
    """A CopyStep of `curate` as a MakingWay: its own seed draws."""
    copies = step.open(folder)
    for row in seeds:
        number = 0
        for number, outcome in enumerate(copies(row), 1):
            if isinstance(outcome, Copy):
                yield Made(outcome.row, f"{row.id[:16]}.{number}", (row,), split_group(row), outcome.changes)
            else:
                yield outcome
        if not number:
            yield Skipped("no_media")
