"""The version of Sartor's arithmetic: which dtype has which, and what is said of content that another one made."""

from __future__ import annotations

from typing import Any

import pytest

from sartor.core.numerics import NUMERICS, difference, not_checked, numerics

CHANGE = (
    "the low-rank product is added before the frozen product is rounded; B is scaled before it is rounded, and packs are "
    "filled up to a multiple of 32 tokens"
)


@pytest.mark.parametrize(
    ("dtype", "version"),
    [("float32", 1), ("float64", 1), ("bfloat16", 3), ("float16", 3), ("torch.bfloat16", 3), ("", 1), ("Q8_0", 1)],
)
def test_only_sixteen_bits_compute_otherwise_than_before(dtype: str, version: int) -> None:
    assert numerics(dtype) == version


@pytest.mark.parametrize(
    ("made_by", "dtype"), [(None, "float32"), (1, "float32"), (3, "bfloat16"), (3, "torch.float16")]
)
def test_content_of_the_same_arithmetic_is_checked(made_by: Any, dtype: str) -> None:
    assert difference(made_by, dtype) == not_checked(made_by, dtype) == ""


@pytest.mark.parametrize("made_by", [None, 1])
def test_content_of_before_names_both_versions_and_what_changed(made_by: Any) -> None:
    said = f"not checked: made by numerics 1, and this version computes bfloat16 by numerics 3: {CHANGE}"
    assert not_checked(made_by, "bfloat16") == said
    assert "by numerics 3: B is scaled before it is rounded" in not_checked(2, "bfloat16")


def test_content_of_a_newer_sartor_is_not_checked_either(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "not checked: made by numerics 3, of a newer Sartor: this version computes float32 by numerics 1"
    assert not_checked(3, "float32") == said
    monkeypatch.setitem(NUMERICS, "float32", 4)
    assert (
        not_checked(3, "float32") == "not checked: made by numerics 3, and this version computes float32 by numerics 4"
    )


@pytest.mark.parametrize("made_by", ["x" * 99, [], {}, 1.5])
def test_what_is_no_version_is_shown_short_and_raises_nothing(made_by: Any) -> None:
    assert not_checked(made_by, "bfloat16").startswith(f"not checked: made by numerics {str(made_by)[:20]},")
