"""Method `lora`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sartor.tune.methods.low_rank import LowRank


@dataclass(frozen=True)
class Lora(LowRank):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685)."""

    kind: Literal["lora"] = "lora"
