"""After how many requests a version that drifts after its promotion is sent back: `serving/dispatch/rollout.py`, on
simulated replies.

Of the version before, WINDOW_REPLIES replies were seen. The promoted one is as good for `calm` requests; then a
fraction `bad` of its replies breaks the format, or is rated bad by those who rate (a fraction RATED of the requests).
Counted are the requests since the drift began. The interval of a quantile is by order statistics (binomial, 95 %).

    python benchmarks/learn_rollback.py --json [--runs 100]
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from typing import Any

import parts
import smallest
from results import print_result
from scipy.stats import binom

from sartor.serving.dispatch.rollout import ObservedReply, Rollouts
from sartor.serving.dispatch.sequential_tests import WINDOW_REPLIES
from sartor.serving.registry.registry_schema import Agent
from sartor.serving.team_config import Rollout

RATED = 0.2
GOOD, MOST, SMALL_RUNS = 0.02, 4000, 2
BAD_RATINGS = 0.1  # of a version that is as it should be


@dataclass(frozen=True)
class Drift:
    """What goes wrong, from which request after the promotion on, and in which fraction of the replies or ratings."""

    what: str
    calm: int
    bad: float

    @property
    def name(self) -> str:
        return f"{self.what} {self.bad:g} after {self.calm}"


DRIFTS = [
    *(Drift("format", calm, bad) for calm in (0, 300) for bad in (1.0, 0.5, 0.25)),
    *(Drift("ratings", calm, bad) for calm in (0, 300) for bad in (0.9, 0.5)),
]


def until_rollback(drift: Drift | None, draw: random.Random, most: int = MOST) -> int:
    """Requests from the drift's beginning to the verdict; 0 where there is none within `most`, below 0 for a false
    alarm.
    """
    rollouts = Rollouts(Rollout(), clock=lambda: 0.0)
    rollouts.follow(Agent("faq", "1"), None)
    for _ in range(WINDOW_REPLIES):
        _one(rollouts, "faq@1", GOOD, BAD_RATINGS, draw)
    rollouts.follow(Agent("faq", "2", earlier=("1",)), Agent("faq", "1"))
    calm = drift.calm if drift else most
    for number in range(1, calm + (most if drift else 0) + 1):
        has_drifted = drift is not None and number > calm
        broken = drift.bad if has_drifted and drift and drift.what == "format" else GOOD
        disliked = drift.bad if has_drifted and drift and drift.what == "ratings" else BAD_RATINGS
        if _one(rollouts, "faq@2", broken, disliked, draw):
            return number - calm if has_drifted else -1
    return 0


def _one(rollouts: Rollouts, version: str, broken: float, disliked: float, draw: random.Random) -> bool:
    verdict = rollouts.observe_reply(
        ObservedReply(version, failed=False, is_json=draw.random() >= broken, token_s=draw.lognormvariate(-4, 0.3))
    )
    if verdict is None and draw.random() < RATED:
        verdict = rollouts.observe_rating(version, draw.random() < disliked)
    return verdict is not None


def quantile(found: list[int], fraction: float) -> dict[str, int]:
    """Of sorted counts: the estimate, and the order statistics that hold it with 95 %."""
    low, high = (int(binom.ppf(tail, len(found), fraction)) for tail in (0.025, 0.975))
    last = len(found) - 1
    places = {"estimate": int(fraction * last + 0.5), "low": low, "high": high}
    return {name: found[min(place, last)] for name, place in places.items()}


def measure(runs: int = 100, seed: int = 0) -> dict[str, Any]:
    """{drift: {median, p95, missed, too_soon}} of so many runs each; and how often one that does not drift is sent
    back.
    """
    said: dict[str, Any] = {}
    for drift in DRIFTS:
        found = parts.run(
            f"drift: {drift.name}",
            lambda drift=drift: [until_rollback(drift, random.Random(f"{seed}{drift}{run}")) for run in range(runs)],
        )
        hits = sorted(count for count in found if count > 0)
        said[drift.name] = {"missed": found.count(0), "too_soon": sum(count < 0 for count in found)}
        if hits:
            said[drift.name] |= {"median": quantile(hits, 0.5), "p95": quantile(hits, 0.95)}
    calm = parts.run(
        "no drift", lambda: [until_rollback(None, random.Random(f"{seed}calm{run}"), 2000) for run in range(runs)]
    )
    return {
        "drifts": said,
        "false_rollbacks": {"of": runs, "requests": 2000, "count": sum(count < 0 for count in calm)},
        "runs": runs,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line (always so)")
    smallest.add_argument(parser)
    parser.add_argument("--runs", type=int, default=100)
    arguments = parser.parse_args()
    print_result(measure(SMALL_RUNS if arguments.small else arguments.runs))
