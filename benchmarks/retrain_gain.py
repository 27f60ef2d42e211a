"""How often a retrain promotes a version that is no better, and one that is better by 0.1: simulated, through the real
gate.

    python benchmarks/retrain_gain.py --json [--series 400]
    python benchmarks/retrain_gain.py --json --small

A series is one agent that is retrained LOOKS times on the same held-out rows. Each time people ask new questions,
correct replies where the live version failed, and rate others; a quarter of the feedback is held out, all that was
held out before
stays. Nothing is tuned: the replies of a version are drawn. `promotion_checks.judge` decides on them as in a retrain,
with the ledger of looks on the disk; a version that is promoted is the live one of the next retrain.

A retrain without a gain draws a part of all outcomes again (CHANGE), each right with the row's own probability; the
control does the same, independently. Every reply that the live version gave is less likely under both, and a bad one
by more, since it was less sure of it.

false_promotions    series without a gain in which any version was promoted; `high`: one-sided 95 % bound
                    (Clopper-Pearson)
                    `by_look`: the first promotion; `uncorrected`: what any 95 % interval over the live version lets
                    pass at the first look (the rule before docs/decisions/024-gain.md), its check alone, and all
                    checks
                    `gain_shown`: series in which a version passed the test of the gain, refused by another check or
                    not
false_promotions_restless   the same, where as many outcomes change on the held-out rows as on feedback
power               retrains of a version whose held-out accuracy is 0.1 higher on 300 rows: promoted at the k-th look
feedback_power      a version that learnt what people corrected (120 a retrain), and is as good as the live one
                    elsewhere
learnt_before       false promotions where the live version has learnt the held-out corrections of earlier retrains,
                    and the
                    control forgets a fifth of them: the new version is as good as the live one, and better than the
                    control
larger_change       false promotions where the new version changes twice as many outcomes as the control: a limit
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import parts
import smallest
from numpy.typing import NDArray
from results import print_result

from sartor.core.statistics import clopper_pearson_upper, lower_bound
from sartor.learn import look_ledger, promotion_checks
from sartor.learn.promotion_checks import Judgement
from sartor.learn.run_record import Live, RunRecord
from sartor.serving.team_config import NotWorse

LOOKS = 4
CHANGE = 0.3
# accuracy of a live version on the held-out corrections of earlier retrains, of which it learnt others
LEARNT = 0.6
# of those who rate a reply: who is content mostly says nothing
BAD_RATINGS = 0.7
INTENTS = 10
LIVE = Live("1", "/agent-1", "a" * 64)


@dataclass(frozen=True)
class Scenario:
    """What a retrain brings.

    held_out: rows. corrections, ratings: of a retrain. gain: of held-out accuracy; feedback_gain: part of the failures
    on
    corrections that are mended. change: part of the outcomes on feedback that is drawn again; control_change: by the
    control;
    held_out_change: on held-out rows, of which a version is surer. learnt: held-out corrections of earlier retrains,
    of which the live version has LEARNT right; control_loss: part of them that the control forgets.
    """

    held_out: int = 200
    corrections: int = 120
    ratings: int = 100
    gain: float = 0.0
    feedback_gain: float = 0.0
    change: float = CHANGE
    control_change: float = CHANGE
    held_out_change: float = 0.03
    learnt: int = 0
    control_loss: float = 0.0
    looks: int = LOOKS


@dataclass
class Rows:
    """Rows of one kind: ids, the chance of each that a version is right, and whether the live one is."""

    ids: list[str] = field(default_factory=list)
    chances: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    live: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))

    def add(self, ids: Iterable[str], chances: NDArray[np.float64], live: NDArray[np.bool_]) -> None:
        """Append rows."""
        self.ids.extend(ids)
        self.chances, self.live = np.concatenate([self.chances, chances]), np.concatenate([self.live, live])


class Agent:
    """An agent that is retrained again and again; its state is a folder, as a team's is."""

    def __init__(self, state: Path, seed: int, scenario: Scenario) -> None:
        self.state, self.rng, self.scenario = state, np.random.default_rng(seed), scenario
        self.held_out, self.corrections, self.ratings = Rows(), Rows(), list[dict[str, Any]]()
        chances = self._chances(scenario.held_out)
        ids = [f"own-{index}" for index in range(scenario.held_out)]
        self.held_out.add(ids, chances, self.rng.random(len(chances)) < chances)
        learnt = np.full(scenario.learnt, LEARNT)
        self.corrections.add(
            [f"learnt-{index}" for index in range(scenario.learnt)], learnt, self.rng.random(len(learnt)) < learnt
        )

    def retrain(self) -> Judgement:
        """Collect feedback, draw a new version and let the gate judge it."""
        run = RunRecord.create(self.state, "agent", LIVE)
        self._ask(run.record.number)
        kinds = self._kinds()
        looked = {kind: [row["id"] for row in rows] for kind, rows in kinds.items()}
        looks = look_ledger.count_looks(run)
        without = {
            kind: [{key: row[key] for key in row if key != "control"} for row in rows] for kind, rows in kinds.items()
        }
        judgement = promotion_checks.judge(without, looks, NotWorse())
        if not judgement.needless_control:
            judgement = promotion_checks.judge(kinds, looks, NotWorse())
        look_ledger.record_look(run, looked)
        if not judgement.refused:
            for rows, kind in ((self.held_out, "held_out"), (self.corrections, "feedback")):
                rows.live = np.asarray([row["new"] > 0 for row in kinds[kind]])
        return judgement

    def _chances(self, count: int) -> NDArray[np.float64]:
        return self.rng.beta(1.4, 0.6, count)  # 0.7 on average

    def _ask(self, number: int) -> None:
        """People correct replies that are wrong; they rate others, mostly wrong ones."""
        scenario = self.scenario
        chances = self._chances(20 * (scenario.corrections + scenario.ratings))
        is_right = self.rng.random(len(chances)) < chances
        held_out = chances[~is_right][: round(scenario.corrections / 4)]
        ids = [f"correction-{number}-{index}" for index in range(len(held_out))]
        self.corrections.add(ids, held_out, np.zeros(len(held_out), bool))
        for index in range(round(scenario.ratings / 4)):
            rating = -1.0 if self.rng.random() < BAD_RATINGS else 1.0
            self.ratings.append({"id": f"rating-{number}-{index}", "group": "", "rating": rating})

    def _tuned(self, rows: Rows, change: float, gain: float = 0.0) -> NDArray[np.bool_]:
        """Outcomes of a version: a part of the live one's drawn again; `gain`: part of the failures that is mended."""
        drawn = self.rng.random(len(rows.live)) < rows.chances
        after = np.where(self.rng.random(len(rows.live)) < change, drawn, rows.live)
        return np.asarray(after | (self.rng.random(len(rows.live)) < gain))

    def _kinds(self) -> dict[str, list[dict[str, Any]]]:
        scenario = self.scenario
        failed = 1 - self.held_out.live.mean()
        new = self._tuned(self.held_out, scenario.held_out_change, min(1.0, scenario.gain / max(failed, 1e-9)))
        held_out = [
            _row(row_id, live, after, intent=index % INTENTS if scenario.gain else -1)
            for index, (row_id, live, after) in enumerate(zip(self.held_out.ids, self.held_out.live, new, strict=True))
        ]
        new = self._tuned(self.corrections, scenario.change, scenario.feedback_gain)
        other = self._tuned(self.corrections, scenario.control_change)
        if scenario.control_loss:
            other &= self.rng.random(len(other)) >= scenario.control_loss
        feedback = [
            _row(row_id, live, after) | {"control": float(control)}
            for row_id, live, after, control in zip(
                self.corrections.ids, self.corrections.live, new, other, strict=True
            )
        ]
        return {"held_out": held_out, "feedback": feedback, "ratings": [self._rated(row) for row in self.ratings]}

    def _rated(self, row: dict[str, Any]) -> dict[str, Any]:
        """Log-likelihoods of a reply that the live version gave: any other version finds it less likely."""
        sureness = self.rng.exponential(0.1 if row["rating"] > 0 else 0.3)
        falls = {
            "new": self.rng.exponential(sureness * self.scenario.change),
            "control": self.rng.exponential(sureness * self.scenario.control_change),
        }
        nats = {"live": -sureness, **{version: -sureness - fall for version, fall in falls.items()}}
        return row | {version: row["rating"] * value for version, value in nats.items()}


def _row(row_id: str, live: bool, new: bool, intent: int = -1) -> dict[str, Any]:
    reference = json.dumps({"intent": str(intent)}) if intent >= 0 else "yes"
    return {"id": row_id, "group": row_id, "reference": reference, "live": float(live), "new": float(new)}


def judge_series(seed: int, scenario: Scenario) -> list[Judgement]:
    """Return the judgements of a series, up to its first promotion."""
    judgements: list[Judgement] = []
    with tempfile.TemporaryDirectory() as folder:
        agent = Agent(Path(folder), seed, scenario)
        while len(judgements) < scenario.looks and (not judgements or judgements[-1].refused):
            judgements.append(agent.retrain())
    return judgements


def false_promotions(series: int, scenario: Scenario) -> dict[str, Any]:
    """Return how many series without a gain had a promotion, with the one-sided bound of their fraction."""
    runs = [judge_series(seed, scenario) for seed in range(series)]
    firsts = [len(judgements) for judgements in runs if not judgements[-1].refused]
    by_look = {str(look): firsts.count(look) for look in range(1, scenario.looks + 1)}
    return {
        "series": series,
        "count": len(firsts),
        "gain_shown": sum(any(judgement.decisive.is_gain for judgement in judgements) for judgements in runs),
        "high": clopper_pearson_upper(len(firsts), series, 0.95),
        "by_look": by_look,
        "uncorrected": _uncorrected([judgements[0] for judgements in runs]),
    }


def _uncorrected(judgements: Sequence[Judgement]) -> dict[str, float]:
    """Fractions that any 95 % interval over the live version lets pass, as before decision 024: its check, and all
    checks.
    """
    passing = [
        judgement for judgement in judgements if any(compared.low > 0 for compared in judgement.comparisons.values())
    ]
    harmless = [
        judgement
        for judgement in passing
        if not any(check.holds_back for name, check in judgement.checks.items() if name != promotion_checks.GAIN)
    ]
    return {"gain": len(passing) / len(judgements), "promoted": len(harmless) / len(judgements)}


def power(trials: int, scenario: Scenario, look: int = 1) -> dict[str, Any]:
    """Return how many retrains with a gain are promoted at the k-th look at their rows: the looks before brought none.

    gain_shown: those that pass the test of the gain, whether another check refuses them or not.
    """
    count, shown = 0, 0
    for seed in range(trials):
        with tempfile.TemporaryDirectory() as folder:
            agent = Agent(Path(folder), seed, replace(scenario, gain=0.0, feedback_gain=0.0))
            for _ in range(look - 1):
                look_ledger.record_look(
                    RunRecord.create(Path(folder), "agent", LIVE), {"held_out": agent.held_out.ids}
                )
            agent.scenario = scenario
            judgement = agent.retrain()
            count += not judgement.refused
            shown += judgement.decisive.is_gain
    return {"trials": trials, "count": count, "low": lower_bound(count, trials, 0.95), "gain_shown": shown}


NO_GAIN = Scenario()
RESTLESS = replace(NO_GAIN, held_out_change=CHANGE)
GAIN = Scenario(held_out=300, gain=0.1, held_out_change=CHANGE)
LEARNT_BEFORE = Scenario(corrections=0, ratings=0, change=0.1, control_change=0.1, learnt=150, control_loss=0.2)
FEEDBACK_GAIN = Scenario(held_out=300, feedback_gain=0.8, held_out_change=0.01)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="(always: the last line is one JSON object)")
    smallest.add_argument(parser)
    parser.add_argument("--series", type=int, default=400)
    asked = parser.parse_args()
    series, trials = (10, 4) if asked.small else (asked.series, asked.series // 3)
    began = time.monotonic()
    drawn_anew, larger_change = replace(GAIN, held_out_change=1.0), replace(NO_GAIN, change=2 * CHANGE)
    result: dict[str, Any] = {
        "false_promotions": parts.run("false promotions", lambda: false_promotions(series, NO_GAIN)),
        "false_promotions_restless": parts.run("restless", lambda: false_promotions(series, RESTLESS)),
        "power": {
            str(look): parts.run(f"power at look {look}", lambda look=look: power(trials, GAIN, look))
            for look in (1, 2, 3, 5)
        },
        "power_all_drawn_anew": parts.run("power, all drawn anew", lambda: power(trials, drawn_anew)),
        "feedback_power": parts.run("power of feedback", lambda: power(trials, FEEDBACK_GAIN)),
        "learnt_before": parts.run("learnt before", lambda: false_promotions(series, LEARNT_BEFORE)),
        "larger_change": parts.run("larger change", lambda: false_promotions(trials, larger_change)),
    }
    print_result({**result, "wall_s": round(time.monotonic() - began, 1)})


if __name__ == "__main__":
    main()
