"""Fixtures of the tests of tuning."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def timed_batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each batch of replies that a plan times, as they come."""
    from sartor.inference.generate import generate

    batches: list[int] = []

    def watched(model: Any, prompts: Any, **options: Any) -> Any:
        batches.append(len(prompts))
        return generate(model, prompts, **options)

    monkeypatch.setattr("sartor.tune.distil_cost.generate", watched)
    return batches
