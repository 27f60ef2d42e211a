"""The options of an inbox as a source. One declaration per option."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from sartor.core.config import option
from sartor.core.errors import ConfigError


@dataclass(frozen=True)
class InboxTerms:
    """Which feedback is read, and how far one key is trusted."""

    agent: str = option("", "that of this agent alone: faq, or one version faq@1.2; all of it is looked at to judge keys")
    consent: Literal["assumed", "given"] = option(
        "assumed", "given: only where a client said so; assumed: also where nobody asked"
    )
    most_rows: int = option(20, "a key may give so many rows in any case")
    most_fraction: float = option(0.25, "of the rows that one key, or one user, may give; twice the even share where few speak")
    disagreement: float = option(
        0.33, "of its ratings a key may contradict the others', or what is known; with more it is distrusted"
    )
    alpha: float = option(0.01, "how probable it may be that an honest key is set aside, of all keys together")
    known: str = option(
        "", "file of rows whose replies are known to be right, or wrong (`rejected`): keys are held against it too"
    )
    seed: int = option(0, "of the draw among the rows of a key that gives too many")

    def __post_init__(self) -> None:
        for name, low, high in (("most_fraction", 0.0, 1.0), ("disagreement", 0.0, 0.9), ("alpha", 1e-9, 0.5)):
            value = getattr(self, name)
            if not low <= value <= high:
                default = next(one.default for one in fields(self) if one.name == name)
                raise ConfigError(f"inbox.{name} is {value:g}; it must be from {low:g} to {high:g}", f"{name}: {default:g}")
        if self.most_rows < 0:
            raise ConfigError(f"inbox.most_rows is {self.most_rows}; it must be 0 or more", "most_rows: 20")
