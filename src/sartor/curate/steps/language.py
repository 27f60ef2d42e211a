"""`language`: rows in another language than the ones allowed go; how many rows are in which language stands in the facts."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from sartor.core.config import REQUIRED, option
from sartor.core.errors import ConfigError
from sartor.core.records import Example
from sartor.curate.steps.contract import Gathered, Removal, Verdicts
from sartor.text.example_text import texts
from sartor.text.language_id import CODES, detector

_FIELDS = {"reply": ("reply",), "replies": ("replies",), "prompt": ("prompt",), "all": ("prompt", "replies")}


@dataclass(frozen=True)
class Language:
    """Drop rows in another language than the allowed ones, by fastText's lid.176; short and unsure texts by `unsure`."""

    allow: tuple[str, ...] = option(REQUIRED, "language codes that stay: ISO 639-1, such as en, sv, zh")
    min_confidence: float = option(0.6, "probability below which a language is not held for sure, 0..1")
    min_letters: int = option(25, "letters of prose below which no language is held for sure; one not Latin counts as 4")
    unsure: Literal["keep", "drop"] = option("keep", "what becomes of a row whose language is not sure; counted either way")
    field: Literal["reply", "replies", "prompt", "all"] = option(
        "reply", "what is judged: reply, replies, prompt (each joined), or all (prompt and replies, each by itself)"
    )
    kind: Literal["language"] = "language"

    def __post_init__(self) -> None:
        if not self.allow:
            raise ConfigError("allow names no language, so every row would go", "allow: [en]")
        for code in self.allow:
            if code not in CODES:
                near = code.lower().replace("_", "-").split("-")[0]
                meant = near if near in CODES else next(iter(difflib.get_close_matches(near[:2], sorted(CODES), n=1)), "en")
                raise ConfigError(f"allow: {code!r} is no language code that the model knows", f"allow: [{meant}]")
        if not 0 <= self.min_confidence <= 1:
            raise ConfigError(f"min_confidence is {self.min_confidence}; it must be 0 to 1", "min_confidence: 0.6")
        if self.min_letters < 0:
            raise ConfigError(f"min_letters is {self.min_letters}; it must be 0 or more", "min_letters: 25")

    def sketch(self, examples: Sequence[Example], folder: Path) -> Any:
        """See SetStep: code, confidence and letters of each judged text of a row, as lists."""
        detect = detector()
        rows = [
            [detect("\n".join(found)) for field in _FIELDS[self.field] if (found := texts(example, field))]
            for example in examples
        ]
        return pa.table(
            {
                "code": pa.array([[tongue.code for tongue in row] for row in rows], pa.list_(pa.string())),
                "confidence": pa.array([[tongue.confidence for tongue in row] for row in rows], pa.list_(pa.float32())),
                "letters": pa.array([[tongue.letters for tongue in row] for row in rows], pa.list_(pa.int32())),
            }
        )

    def decide(self, gathered: Gathered) -> Verdicts:
        """See SetStep."""
        columns = [gathered.table[name].to_pylist() for name in ("code", "confidence", "letters")]
        languages: Counter[str] = Counter()
        removals, unsure_rows, without_text = [], 0, 0
        for row, judged in enumerate(zip(*columns, strict=True)):
            pieces = list(zip(*judged, strict=True))
            verdicts = [self._verdict(*piece) for piece in pieces]
            without_text += not pieces
            languages.update(
                {code if is_sure else "unsure" for (code, _, _), (is_sure, _) in zip(pieces, verdicts, strict=True)}
            )
            foreign = next((detail for is_sure, detail in verdicts if is_sure and detail), "")
            unsure = next((detail for is_sure, detail in verdicts if not is_sure), "")
            unsure_rows += bool(unsure) and not foreign
            if foreign:
                removals.append(Removal(row, "language", foreign))
            elif unsure and self.unsure == "drop":
                removals.append(Removal(row, "language_unsure", unsure))
        facts = {
            "languages": dict(languages.most_common()),
            f"unsure_{'kept' if self.unsure == 'keep' else 'dropped'}": unsure_rows,
            "without_text": without_text,
        }
        return Verdicts(removals, facts=facts)

    def _verdict(self, code: str, confidence: float, letters: int) -> tuple[bool, str]:
        """(whether the language is sure, what speaks against the text or nothing)."""
        said = f"{code or 'no language'} with confidence {confidence:.2f}, {letters} letters"
        if letters < self.min_letters:
            return False, f"{said}: fewer than {self.min_letters} letters to judge by"
        if confidence < self.min_confidence:
            return False, f"{said}: below {self.min_confidence}"
        return True, "" if code in self.allow else f"{said}; allowed: {', '.join(self.allow)}"
