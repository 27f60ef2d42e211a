"""Every step that a recipe may name. A new one is a file here and its class in one of these two unions."""

from __future__ import annotations

from typing import Any, TypeGuard, get_args

from sartor.curate.steps.contract import SetStep
from sartor.curate.steps.exact import ExactDuplicates
from sartor.curate.steps.labels import SuspiciousLabels
from sartor.curate.steps.length import Length
from sartor.curate.steps.semantic import SemanticDuplicates

AnyRowStep = Length
AnySetStep = ExactDuplicates | SemanticDuplicates | SuspiciousLabels
Step = AnyRowStep | AnySetStep


def needs_all_rows(step: Any) -> TypeGuard[SetStep]:
    """Whether a step is a SetStep."""
    return isinstance(step, get_args(AnySetStep) or AnySetStep)
