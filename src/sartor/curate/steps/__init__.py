"""Every step that a recipe may name. A new one is a file here and its class in this union."""

from __future__ import annotations

from typing import Any

from sartor.curate.steps.exact import ExactDuplicates
from sartor.curate.steps.length import Length

Step = ExactDuplicates | Length


def is_set_step(step: Any) -> bool:
    """Whether a step needs all rows (SetStep), or one at a time (RowStep)."""
    return hasattr(step, "decide")
