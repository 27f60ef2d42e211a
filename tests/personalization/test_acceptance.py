"""The two gates of a person's version, on a device and on a server: what cannot be told never passes, and says what would do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from sartor.core.errors import SourceError
from sartor.evaluate import training_facts
from sartor.evaluate.bootstrap import paired_bootstrap
from sartor.learn import personal_tuning as server
from sartor.personalization import acceptance as device
from sartor.serving.team_config import PersonalTerms

Losses = Sequence[float]
LIMITS = SimpleNamespace(most_worse=0.05, most_elsewhere=0.1)


def asked(count: int) -> Any:
    return device.JudgedRows([SimpleNamespace(supervised_tokens=5)] * count, [str(place) for place in range(count)])  # type: ignore[list-item]


def of_device(own: Losses, probe: Losses, patch: pytest.MonkeyPatch) -> str:
    """Why a delta may not answer, by losses after it; before, each was 2."""
    private, other = ((asked(len(after)), [2.0] * len(after), after) for after in (own, probe))
    return device.judge(private, other, 0.05).why


def of_server(own: Losses, probe: Losses, patch: pytest.MonkeyPatch) -> str:
    sides = iter([own, probe])
    patch.setattr(
        server,
        "_compare",
        lambda _, tuned, one: paired_bootstrap([2.0] * len(one.rows), next(sides), one.groups, is_bounded=False),
    )
    return server.judge(None, None, asked(len(own)), asked(len(probe)), LIMITS).why  # type: ignore[arg-type]


both = pytest.mark.parametrize("why", [of_device, of_server])


@both
def test_a_loss_that_is_no_number_does_not_pass(why: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    better, same = [1.0] * 8, [2.0] * 8
    assert why(better, same, monkeypatch) == ""
    assert why([*better[1:], math.nan], same, monkeypatch)
    assert why(better, [*same[1:], math.nan], monkeypatch)


@both
def test_an_unchanged_probe_passes_by_the_default_limits_and_too_few_prompts_say_so(
    why: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    better = [1.0] * 8
    for prompts in (2, 5):
        said = why(better, [2.0] * prompts, monkeypatch)
        assert "cannot tell" in said and f"the probe has {prompts} prompts, and 6 are the least that tell: " in said
    assert why(better, [2.0] * 6, monkeypatch) == ""
    assert why(better, [2.0 + 0.001 * place for place in range(training_facts.CANARIES)], monkeypatch) == ""
    assert "cannot tell" not in why(better, [2.5] * 6, monkeypatch) != ""


def test_a_server_asks_for_its_probe_before_it_tunes() -> None:
    server.check_probe(asked(6), PersonalTerms())
    server.check_probe(asked(2), PersonalTerms(most_elsewhere=3.0))
    with pytest.raises(SourceError, match="the probe has 4 prompts"):
        server.check_probe(asked(4), PersonalTerms())
