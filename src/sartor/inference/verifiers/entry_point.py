"""Verifier `python`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sartor.core.config import REQUIRED, option
from sartor.core.errors import ConfigError
from sartor.inference.verifiers.limited_scoring import Network, check_time, score_in_child
from sartor.inference.verifiers.submission import Submission

_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


@dataclass(frozen=True)
class EntryPointVerifier:
    """A Python function of your own, (reply, reference, prompt) -> 0..1, in a limited process without a network."""

    function: str = option(REQUIRED, "module:function, importable from the working directory")
    time_s: float = option(10.0, "seconds for one reply, after which the function is killed and the run ends")
    network: Network = option(
        "none", "none: refused where the system cannot take it away; allowed: the code may use it"
    )
    kind: Literal["python"] = "python"

    def __post_init__(self) -> None:
        check_time(self.time_s)
        if not _NAME.fullmatch(self.function):
            raise ConfigError(f"function is {self.function!r:.80}", "function: my_module:my_function")

    def missing(self, row: Submission) -> str:
        """Return an empty string: what is needed, the function knows."""
        return ""

    def right_reply(self, row: Submission) -> str:
        """Return the reference."""
        return row.reference

    def rewards(self, submissions: Sequence[Submission]) -> list[float]:
        """Return what the function returns. Raises what `score_in_child` raises."""
        items = [
            {"reply": each.reply, "reference": each.reference, "prompt": list(map(dict, each.prompt))}
            for each in submissions
        ]
        return score_in_child(
            {"function": self.function, "items": items},
            submissions,
            name=f"python ({self.function})",
            time_s=self.time_s,
            network=self.network,
        ).rewards
