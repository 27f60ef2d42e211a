"""A score that is decided is changed by no continuation of the reply."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sartor.evaluate.metrics import MetricSet
from sartor.evaluate.reply_labels import WHOLE, label_of
from sartor.evaluate.scorers import SCORERS

# few characters, so that prefixes of the reference are drawn often
TEXTS = st.text(alphabet='ab \n\u00a0{}":1', max_size=8)


@st.composite
def replies_of(draw: st.DrawFn) -> tuple[str, str, str]:
    """(reference, reply so far, continuation), the reply often like the reference."""
    reference = draw(TEXTS)
    near = st.builds(lambda cut, end: reference[:cut] + end, st.integers(0, len(reference)), TEXTS)
    return reference, draw(st.one_of(TEXTS, near)), draw(TEXTS)


@pytest.mark.parametrize("name", SCORERS)
@given(case=replies_of())
def test_decided_score_never_changes(name: str, case: tuple[str, str, str]) -> None:
    reference, reply, continuation = case
    scorer = SCORERS[name]
    if scorer.is_decided(reply, reference):
        assert scorer.score(reply, reference) == scorer.score(reply + continuation, reference)


@given(case=replies_of(), other=TEXTS, field=st.sampled_from([WHOLE, "a"]))
def test_decided_label_never_changes(case: tuple[str, str, str], other: str, field: str) -> None:
    """Of macro-F1 the label matters where it is that of any reference."""
    reference, reply, continuation = case
    objects = ['{"a": 1}', '{"a": "b"}']
    measures = MetricSet([reference, other, *objects], ["g"] * 4, field)
    if measures.is_decided(0, reply, ["accuracy", "macro_f1"]):
        labels = [label_of(text, field) for text in (reply, reply + continuation)]
        assert labels[0] == labels[1] or not set(labels) & set(measures.classes)
        assert (labels[0] == measures.labels[0]) == (labels[1] == measures.labels[0])


@pytest.mark.parametrize(
    ("reply", "decided"),
    [("", False), (" ye", False), ("yes \n", False), ("yes.", True), ("no", True), ("yes y", True)],
)
def test_exact_match_is_decided_by_the_first_difference(reply: str, decided: bool) -> None:
    assert SCORERS["exact_match"].is_decided(reply, "yes") is decided


def test_reasoning_that_has_not_ended_decides_nothing() -> None:
    measures = MetricSet(["yes"], ["a"], ".")
    for reply in ("", "<", "<think>", "<think>no", "<think>no</think>", "<think>no</think>\nye"):
        assert not measures.is_decided(0, reply, ["exact_match", "accuracy"]), reply
    assert measures.is_decided(0, "<think>yes</think>no", ["exact_match"]) and measures.is_decided(
        0, "<b>", ["exact_match"]
    )
    assert measures.is_decided(0, "<think>", ["loss"])


def test_label_in_json_is_decided_by_the_first_character() -> None:
    measures = MetricSet(['{"a": 1}', "no label"], ["g", "h"], "a")
    assert not measures.is_decided(0, ' {"b', ["accuracy"]) and measures.is_decided(0, "The", ["accuracy", "ece"])
    assert measures.is_decided(1, "", ["accuracy"]), "a row without a label has no accuracy"
    assert not measures.is_decided(0, "The", ["accuracy", "f1"]) and measures.is_decided(0, "", ["loss"])
