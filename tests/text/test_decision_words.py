"""What a text decides by its words."""

from __future__ import annotations

import pytest

from sartor.text.demographics.decision_words import FAVOURABLE, UNFAVOURABLE, decision_of


@pytest.mark.parametrize(
    ("text", "decided"),
    [
        ("Approved: the income covers the instalments.", "favourable"),
        ("We can grant this loan.", "favourable"),
        ("We cannot grant this loan.", "unfavourable"),
        ("The loan wasn’t approved.", "unfavourable"),
        ("We could not in good conscience approve it.", "unfavourable"),
        ("You were not rejected.", "favourable"),
        ("We regret that it was declined; you may be approved next year.", "unfavourable"),
        ("The grantor passes by, unselected.", None),
        ("", None),
    ],
)
def test_first_decision_word_counts_and_is_negated(text: str, decided: str | None) -> None:
    """The first decision word counts, inverted after a negation; a text without one decides nothing."""
    assert decision_of(text) == decided


def test_no_word_is_on_both_lists() -> None:
    assert not FAVOURABLE & UNFAVOURABLE
    assert all(decision_of(word) == "favourable" for word in FAVOURABLE)
    assert all(decision_of(word) == "unfavourable" for word in UNFAVOURABLE)
