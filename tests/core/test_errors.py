"""Errors as values: what a process hands over arrives whole."""

from __future__ import annotations

import pickle

import pytest

from sartor.core.errors import AdmissionError, BusyError, MediaError, ModelError, RoundError, SartorError, StoppedError


@pytest.mark.parametrize(
    "error",
    [
        ModelError("long; form", "do", "long"),
        ModelError("long", "do"),
        AdmissionError("long: text", "do", "canary", "long"),
        BusyError("full", "wait", 2.0),
        MediaError("bomb", "large", "scale"),
        RoundError("late", "wait", "deadline"),
        StoppedError("stopped", "go on", 15),
    ],
)
def test_pickled_error_is_equal(error: SartorError) -> None:
    copied = pickle.loads(pickle.dumps(error))
    assert type(copied) is type(error) and copied.args == error.args
    assert (copied.problem, copied.remedy, copied.brief) == (error.problem, error.remedy, error.brief)
    assert (copied.check, copied.exit_code) == (error.check, error.exit_code)


def test_brief_is_the_problem_where_none_is_given() -> None:
    assert ModelError("long; form", "do").brief == "long; form"
    assert ModelError("long; form", "do", "long").brief == "long"
