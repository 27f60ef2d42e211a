"""Method `rslora`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sartor.core.config import option
from sartor.tune.methods.low_rank import LowRank


@dataclass(frozen=True)
class RsLora(LowRank):
    """Rank-stabilised LoRA (Kalajdzievski 2023, arXiv:2312.03732): the scale falls with the root of the rank."""

    alpha: float = option(8.0, "scale: the update is alpha / sqrt(rank) * B A; 8 is LoRA's default at rank 16")
    kind: Literal["rslora"] = "rslora"

    @property
    def peft_options(self) -> dict[str, Any]:
        """Options of peft.LoraConfig that tell this method from plain LoRA."""
        return {"use_rslora": True}
