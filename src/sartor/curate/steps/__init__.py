"""Unions of all steps, and their reference page, generated from the step classes.

python -m sartor.curate.steps > docs/steps.md
"""

from __future__ import annotations

import inspect
from typing import Any, TypeGuard, get_args

from sartor.core import config
from sartor.curate.step import AugmentStep, SetStep
from sartor.curate.steps.answer_quality import ChatQuality
from sartor.curate.steps.boilerplate import Boilerplate
from sartor.curate.steps.contamination import Contamination
from sartor.curate.steps.domain import Domain
from sartor.curate.steps.group_bias import Bias, Counterfactuals
from sartor.curate.steps.image_duplicates import ImageDuplicates
from sartor.curate.steps.label_errors import SuspiciousLabels
from sartor.curate.steps.media_augmentation import AugmentAudio, AugmentImages
from sartor.curate.steps.media_filters import Audio, Images
from sartor.curate.steps.personal_data import PersonalData
from sartor.curate.steps.regex_rules import RegexRules
from sartor.curate.steps.semantic_duplicates import SemanticDuplicates
from sartor.curate.steps.text_cleaning import Markup, RepairText
from sartor.curate.steps.text_duplicates import ExactDuplicates, NearDuplicates
from sartor.curate.steps.text_filters import LanguageFilter, Length, Repetition

AnyRowStep = RepairText | Markup | RegexRules | Length | Repetition | ChatQuality | PersonalData | Images | Audio
AnySetStep = (
    LanguageFilter
    | Boilerplate
    | Domain
    | Contamination
    | ExactDuplicates
    | NearDuplicates
    | SemanticDuplicates
    | ImageDuplicates
    | SuspiciousLabels
    | Bias
)
AnyCopyStep = AugmentImages | AugmentAudio | Counterfactuals
Step = AnyRowStep | AnySetStep | AnyCopyStep


def needs_all_rows(step: Any) -> TypeGuard[SetStep]:
    """Return whether a step is a SetStep."""
    return isinstance(step, get_args(AnySetStep))


def makes_copies(step: Any) -> TypeGuard[AugmentStep]:
    """Return whether a step is an AugmentStep."""
    return isinstance(step, get_args(AnyCopyStep))


_HEAD = """# Steps of a curation recipe

Made from the declarations in `src/sartor/curate/steps/` by `python -m sartor.curate.steps`; a test holds it to them.

Steps act in the order in which the recipe names them. A step is written `length`, `{length: {min_words: 3}}` or
`{kind: length, min_words: 3}`; a scalar or list stands for its first option (`{language: [en]}`).
"""

_UNIONS = {
    "Steps that look at one row": AnyRowStep,
    "Steps that compare rows": AnySetStep,
    "Steps that copy training rows": AnyCopyStep,
}


def lines(*, table: bool) -> list[str]:
    """Return Markdown lines for every step with its options: tables, or the plain list of a help text."""
    markdown = []
    for title, union in _UNIONS.items():
        markdown += [f"## {title}", ""]
        for cls in get_args(union):
            kind = next(field.default for field in cls.__dataclass_fields__.values() if field.name == "kind")
            options = list(config.describe(cls))
            markdown += [f"### {kind}" if table else f"**{kind}**", "", inspect.cleandoc(cls.__doc__ or ""), ""]
            if table and options:
                markdown += ["| option | type, default | |", "|---|---|---|"]
            for name, type_and_default, text in options:
                cells = [cell.replace("|", "\\|") for cell in (type_and_default, text)]
                markdown.append(
                    f"| `{name}` | {cells[0]} | {cells[1]} |" if table else f"- `{name}` ({type_and_default}): {text}"
                )
            markdown.append("")
    return markdown


def reference() -> str:
    """Return the reference page in Markdown."""
    return "\n".join([_HEAD, *lines(table=True)]).rstrip() + "\n"


if __name__ == "__main__":
    print(reference(), end="")  # noqa: T201
