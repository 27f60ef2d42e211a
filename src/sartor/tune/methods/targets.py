"""Trained parts of a base, as a recipe names them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sartor.core.config import option
from sartor.core.errors import ConfigError

# Every weight, which the method `full` alone can train
ALL = "all"


@dataclass(frozen=True)
class LanguageTargets:
    """Linear modules of the language model that get an adapter."""

    modules: str | tuple[str, ...] = option("all-linear", "all-linear, or names of linear modules")
    layers: str = option("all", "all, or top-N: the N layers next to the head, so that the layers below stay frozen")


@dataclass(frozen=True)
class Targets:
    """Trained parts: linear modules of the language model, and the media parts of a base."""

    modules: str | tuple[str, ...] = option("all-linear", "all-linear, or names of linear modules")
    layers: str = option("all", "all, or top-N: the N layers next to the head, so that the layers below stay frozen")
    language: LanguageTargets | None = option(
        None, "the same two, beside the other parts: all-linear, names, or {modules:, layers:}"
    )
    projector: Literal["full", "all-linear", "none"] = option(
        "full", "what turns media into tokens: trained whole, by an adapter (native bases), or frozen"
    )
    tower: Literal["all-linear", "none"] = option(
        "none", "the encoders of media: frozen, or an adapter (native bases)"
    )

    def __post_init__(self) -> None:
        if self.language:
            object.__setattr__(self, "modules", self.language.modules)
            object.__setattr__(self, "layers", self.language.layers)
            object.__setattr__(self, "language", None)
        if isinstance(self.modules, str) and self.modules not in ("all-linear", ALL):
            # a single name becomes a tuple of one, because peft reads a bare string as a regular expression
            object.__setattr__(self, "modules", (self.modules,))
        if self.layers != "all" and not (
            self.layers.startswith("top-") and self.layers[4:].isdigit() and int(self.layers[4:])
        ):
            raise ConfigError(f"layers is {self.layers!r}; it must be `all` or `top-N`", "layers: top-10")

    @property
    def top(self) -> int | None:
        """Number of adapted layers next to the head; None for all."""
        return None if self.layers == "all" else int(self.layers[4:])


@dataclass(frozen=True)
class Placement:
    """Parts of an opened base that a method is put on.

    targets: `all-linear`, names of modules, or the result of `trainable_parts.choose_targets`.
    top_layers: number of adapted layers next to the head; None for all.
    seed: of the start.
    """

    targets: Any
    top_layers: int | None
    seed: int
