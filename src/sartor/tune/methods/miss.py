"""Method `miss`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from sartor.core.config import option
from sartor.core.errors import ConfigError
from sartor.core.lazy_import import import_module
from sartor.tune.methods.targets import Placement, Targets


@dataclass(frozen=True)
class Miss:
    """Matrix shard sharing (Kang & Yin 2024, arXiv:2409.15371): one block D (R, out), shared by shards of the input.

    y = W x + D^T (sum of the shards of x), so the update has one factor where LoRA has two.
    """

    rank: int = option(32, "rows R of the shared block, at most a module's inputs; 32 has about LoRA's size at 16")
    targets: Targets = option(Targets(), "which linear modules: all-linear, names, or {modules: ..., layers: top-10}")
    start: str = option("", "directory of an Adapter or Release of this method, which is tuned on; empty: afresh")
    kind: Literal["miss"] = "miss"

    is_served: ClassVar[bool] = False
    has_factors: ClassVar[bool] = False
    base_bits: ClassVar[tuple[str | int, ...]] = ("auto", 16, 32)
    reads_media: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"rank is {self.rank}; it must be at least 1", "rank: 32")

    def inject(self, model: Any, placement: Placement) -> Any:
        """Return `model` with blocks that are zero.

        Raises ConfigError for a rank above the inputs of a module, and what `adapters.inject` raises.
        """
        adapters = import_module("sartor.models.adapters")
        for name, (_, ins) in adapters.linear_shapes(model, placement.targets, placement.top_layers).items():
            if self.rank > ins:
                problem = f"method.rank is {self.rank}, and {name} has {ins} inputs"
                raise ConfigError(problem, f"method.rank: {ins}, or less")
        return adapters.inject(
            model,
            lambda **options: import_module("peft").MissConfig(r=self.rank, **options),
            targets=placement.targets,
            seed=placement.seed,
            top_layers=placement.top_layers,
        )

    def stored_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Return the bytes of the stored tensors, fp32. shapes: (out, in) of each adapted module."""
        return 4 * sum(self.rank * outs for outs, _ in shapes.values())
