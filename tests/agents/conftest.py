"""Registries of tests are not kept for a power cut: no fsync."""

from __future__ import annotations

import pytest

from sartor.agents import database


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "SYNCHRONOUS", "off")
