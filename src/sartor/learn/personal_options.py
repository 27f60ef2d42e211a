"""Options of personal tuning."""

from __future__ import annotations

from dataclasses import dataclass

from sartor.core.errors import ConfigError
from sartor.serving.team_config import MOST_OWN_RANKS

INBOX = "inbox"


@dataclass(frozen=True)
class PersonalOptions:
    """Options of a personal tuning: user, agent, rows and training.

    data: `inbox`, or a file in any form that curate reads.
    rank: 1 to 4; 0 is the team's `personal.rank`.
    eval_fraction: fraction of the user's rows held out for the gate, by group.
    """

    agent: str
    user: str
    data: str = INBOX
    rank: int = 0
    epochs: float = 5.0
    learning_rate: float = 5e-4
    eval_fraction: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rank <= MOST_OWN_RANKS:
            raise ConfigError(f"rank is {self.rank}; a user's own has 1 to {MOST_OWN_RANKS}", "--rank 2")
        if not (self.epochs > 0 and 0 < self.learning_rate < 1 and 0 < self.eval_fraction < 1):
            text = (
                f"epochs {self.epochs:g}, learning_rate {self.learning_rate:g}, eval_fraction {self.eval_fraction:g}"
            )
            raise ConfigError(f"{text}: out of range", "--epochs 5 --learning-rate 5e-4 --eval-fraction 0.25")
