"""Recipe of a synthetic Dataset."""

from __future__ import annotations

from dataclasses import dataclass

from sartor.core.config import REQUIRED, option
from sartor.core.errors import ConfigError
from sartor.core.licences.spdx import checked
from sartor.curate.sources.types import SourceOptions
from sartor.synthesize.generators import FROM_NOTHING, Way
from sartor.synthesize.teacher_options import AnyTeacher


@dataclass(frozen=True)
class SynthesizeRecipe:
    """Recipe that makes a Dataset of synthetic rows from rows, from documents or from nothing."""

    ways: tuple[Way, ...] = option(REQUIRED, "how rows are made, in order")
    sources: tuple[SourceOptions, ...] = option(
        (), "rows and documents to make them from: as in curate, or a Dataset, whose training rows are taken"
    )
    teacher: AnyTeacher | None = option(
        None, "who answers: endpoint, local or fake; templates, counterfactual and media need none"
    )
    licence: str = option("NOASSERTION", "SPDX licence of rows that are made of nothing but this recipe")
    temperature: float = option(0.8, "of the teacher's answers, 0 to 2")
    max_tokens: int = option(512, "of an answer")
    repairs: int = option(1, "times that an answer which does not fit goes back to the teacher, 0 or 1")
    cache: str = option(
        "", "folder where answers stay for later runs; empty keeps them beside the output until it stands"
    )
    seed: int = option(0, "of all that is drawn")
    max_row_bytes: int = option(4 << 20, "a longer row of a source is dropped, not read")

    def __post_init__(self) -> None:
        object.__setattr__(self, "licence", checked(self.licence))
        if not self.ways:
            raise ConfigError("the recipe names no way", "ways: [vary]")
        if not self.sources and (
            needing_sources := [way.kind for way in self.ways if not isinstance(way, FROM_NOTHING)]
        ):
            raise ConfigError(
                f"{needing_sources[0]} makes rows of rows, and there is no source", "sources: [{path: rows.jsonl}]"
            )
        if not 0 <= self.temperature <= 2 or self.max_tokens < 1 or self.repairs not in (0, 1):
            problem = f"temperature is {self.temperature:g}, max_tokens {self.max_tokens}, repairs {self.repairs}"
            raise ConfigError(f"{problem}; they must be 0 to 2, at least 1, 0 or 1", "leave them out for the defaults")
        kinds = [way.kind for way in self.ways]
        if duplicate := next((kind for kind in kinds if kinds.count(kind) > 1 and kind not in _MANY), ""):
            raise ConfigError(
                f"{duplicate} stands twice; its rows would be the same",
                f"one way of the kind {duplicate}, with a larger per_row, per_document or rows",
            )


# kinds that may occur several times, since their options determine which rows they make
_MANY = ("templates", "schema", "scenarios")
