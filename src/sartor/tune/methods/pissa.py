"""Method `pissa`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from sartor.core.config import option
from sartor.core.errors import ConfigError
from sartor.core.lazy_import import import_module
from sartor.tune.methods.targets import Placement, Targets


@dataclass(frozen=True)
class Pissa:
    """LoRA that begins at the principal singular vectors of each weight (Meng et al. 2024, arXiv:2404.02948).

    The base is not changed: the update is scale (B A - B_0 A_0), of which B_0 A_0, the start, is frozen. It is stored
    as LoRA of twice the rank, which every server of LoRA takes.
    """

    rank: int = option(16, "rank R that is trained; the file has LoRA factors of rank 2 R")
    alpha: float = option(16.0, "scale: the update is alpha / rank * (B A - B_0 A_0)")
    iterations: int = option(0, "0: exact singular vectors; else by so many iterations of the randomised method")
    targets: Targets = option(Targets(), "which linear modules: all-linear, names, or {modules: ..., layers: top-10}")
    start: str = option(
        "", "directory of an Adapter or Release of this method, whose 2 R ranks are trained on; empty: afresh"
    )
    kind: Literal["pissa"] = "pissa"

    is_served: ClassVar[bool] = True
    has_factors: ClassVar[bool] = True
    base_bits: ClassVar[tuple[str | int, ...]] = ("auto", 16, 32)
    reads_media: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.rank < 1 or self.iterations < 0:
            problem = f"rank is {self.rank} and iterations {self.iterations}; they must be at least 1 and 0"
            raise ConfigError(problem, "rank: 16, iterations: 0")

    def inject(self, model: Any, placement: Placement) -> Any:
        """Return `model` with factors at the start, or with plain LoRA for the weights of `start`.

        Raises ConfigError for a rank above the smaller side of a module, and what `adapters.inject_lora` raises.
        """
        adapters = import_module("sartor.models.adapters")
        if self.start:
            return adapters.inject_lora(
                model,
                rank=2 * self.rank,
                alpha=2 * self.alpha,
                dropout=0.0,
                targets=placement.targets,
                seed=placement.seed,
                top_layers=placement.top_layers,
            )
        shapes = adapters.linear_shapes(model, placement.targets, placement.top_layers)
        narrowest = min(shapes, key=lambda name: min(shapes[name]))
        if self.rank > (smaller_side := min(shapes[narrowest])):
            problem = f"method.rank is {self.rank}, and the smaller side of {narrowest} is {smaller_side}"
            raise ConfigError(problem, f"--method.rank {smaller_side}")
        return adapters.inject_pissa(
            model,
            rank=self.rank,
            alpha=self.alpha,
            iterations=self.iterations,
            targets=placement.targets,
            seed=placement.seed,
            top_layers=placement.top_layers,
        )

    def stored_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Return the bytes of the stored tensors, fp32. shapes: (out, in) of each adapted module."""
        return 4 * sum(2 * self.rank * (outs + ins) for outs, ins in shapes.values())
