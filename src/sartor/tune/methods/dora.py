"""Method `dora`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from sartor.tune.methods.low_rank import LowRank


@dataclass(frozen=True)
class Dora(LowRank):
    """Weight-decomposed LoRA (Liu et al. 2024, arXiv:2402.09353): m (W + scale B A) / ||W + scale B A||, by rows."""

    kind: Literal["dora"] = "dora"

    is_served: ClassVar[bool] = False
    base_bits: ClassVar[tuple[str | int, ...]] = ("auto", 16, 32)
    reads_media: ClassVar[bool] = False

    @property
    def peft_options(self) -> dict[str, Any]:
        """Options of peft.LoraConfig that tell this method from plain LoRA."""
        return {"use_dora": True}

    def stored_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Return the bytes of the stored tensors, fp32: the factors, and m (out,) of each adapted module."""
        return super().stored_bytes(shapes) + 4 * sum(shape[0] for shape in shapes.values())
