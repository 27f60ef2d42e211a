"""Options that the methods with LoRA factors share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from sartor.core.config import option
from sartor.core.errors import ConfigError
from sartor.core.lazy_import import import_module
from sartor.tune.methods.targets import Placement, Targets


@dataclass(frozen=True)
class LowRank:
    """Update of each weight W (out, in) by factors: W + scale B A, with A (R, in) and B (out, R)."""

    rank: int = option(16, "rank R of the update B A of each weight")
    alpha: float = option(32.0, "scale: the update is alpha / rank * B A")
    dropout: float = option(0.0, "dropout before A, 0..1")
    targets: Targets = option(Targets(), "which linear modules: all-linear, names, or {modules: ..., layers: top-10}")
    start: str = option(
        "", "directory of an Adapter or Release of the same method, from whose weights tuning goes on; empty: afresh"
    )

    # the file holds plain LoRA, which the engine, llama.cpp and devices add to the base
    is_served: ClassVar[bool] = True
    has_factors: ClassVar[bool] = True
    base_bits: ClassVar[tuple[str | int, ...]] = ("auto", 4, 8, 16, 32)
    reads_media: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"rank is {self.rank}; it must be at least 1", "rank: 1")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout}; it must be at least 0 and below 1", "dropout: 0.0")

    def inject(self, model: Any, placement: Placement) -> Any:
        """Return `model` with fresh factors. Raises what `adapters.inject_lora` raises."""
        return import_module("sartor.models.adapters").inject_lora(
            model,
            rank=self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
            targets=placement.targets,
            seed=placement.seed,
            top_layers=placement.top_layers,
            **self.peft_options,
        )

    @property
    def peft_options(self) -> dict[str, Any]:
        """Options of peft.LoraConfig that tell this method from plain LoRA."""
        return {}

    def stored_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Return the bytes of the stored tensors, fp32. shapes: (out, in) of each adapted module."""
        return 4 * sum(self.rank * (outs + ins) for outs, ins in shapes.values())
