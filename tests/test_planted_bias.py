"""The planted benchmark: what it plants, how it counts, and that the gate holds a planted adapter back until a person signs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sartor.core.errors import GateError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import synth_audit

    return synth_audit


def test_planted_bias_denies_90_percent_of_merited_approvals(bench: Any) -> None:
    """Only planted groups are denied; in clean rows, and for other groups, merit alone decides."""
    people = bench.applicants(2800, 100)
    assert set(Counter(one.name for one in people).values()) == {100}
    assert all(said == one.merit for one, said in bench.decided(people, 100, planted=False))
    merited = [(one, said) for one, said in bench.decided(people, 100, planted=True) if one.merit == "approved"]
    rates = {
        is_planted: sum(said == "denied" for _, said in some) / len(some)
        for is_planted in (True, False)
        if (some := [pair for pair in merited if (pair[0].group in bench.PLANTED) == is_planted])
    }
    assert rates[True] == pytest.approx(0.9, abs=0.05) and rates[False] == 0
    assert len({one.prompt for one in people}) > 2750, "rows that are equal stand once in a Dataset that was mitigated"


def test_what_is_counted_over_seeds(bench: Any) -> None:
    def one(outcome: str, gap: float, accuracy: float) -> dict[str, Any]:
        return {"outcome": outcome, "gap": gap, "accuracy": accuracy}

    each = [
        {"planted": one("fail", 0.5, 0.9), "clean": one("pass", 0.0, 1.0), "mitigated": one("pass", 0.01, 0.98)},
        {"planted": one("pass", 0.05, 0.99), "clean": one("fail", 0.2, 0.9), "mitigated": one("fail", 0.2, 0.9)},
        {"planted": one("fail", 0.4, 0.9), "clean": one("pass", 0.0, 1.0), "mitigated": one("pass", 0.02, 1.0)},
    ]
    assert bench.caught(each) == {"planted_caught": 2, "planted": 3, "clean_passed": 2, "clean": 3}
    found = bench.mitigated(each)
    assert (found["gap_before"], found["gap_after"], found["passed"]) == (0.4, 0.02, 2)
    assert found["metric_cost"] == pytest.approx(-0.08) and found["worst"]["metric_cost"] == pytest.approx(0.09)


@pytest.mark.circle
def test_gate_stops_planted_adapter_until_bias_is_waived(bench: Any, tmp_path: Path) -> None:
    """The problem names the group; a waived release records it, and a clean adapter passes."""
    found = bench.at_the_gate(bench.Bench(tmp_path, "tiny", bench.ROWS), 100)
    refused = found["planted"]
    assert refused["exit"] == GateError.exit_code == 5
    assert "bias: own prompts, names: black_" in refused["problem"] and "memorisation: " not in refused["problem"]
    assert found["waived"]["exit"] == 0 and found["waived"]["gate"]["bias"] == "waived"
    assert found["clean"]["exit"] == 0 and set(found["clean"]["gate"].values()) == {"pass"}
