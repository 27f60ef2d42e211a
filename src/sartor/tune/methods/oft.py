"""Method `oft`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from sartor.core.config import option
from sartor.core.errors import ConfigError
from sartor.core.lazy_import import import_module
from sartor.tune.methods.targets import Placement, Targets


@dataclass(frozen=True)
class Oft:
    """Orthogonal fine-tuning (Qiu et al. 2023, arXiv:2306.07280): rotations of blocks of each module's input.

    A block of size N has N (N - 1) / 2 values, the skew-symmetric Q of R = (I + Q) (I - Q)^-1. The inverse is a
    Neumann series (arXiv:2506.19847).
    """

    block_size: int = option(32, "inputs that one rotation mixes; it must divide the inputs of each adapted module")
    targets: Targets = option(Targets(), "which linear modules: all-linear, names, or {modules: ..., layers: top-10}")
    start: str = option("", "directory of an Adapter or Release of this method, which is tuned on; empty: afresh")
    kind: Literal["oft"] = "oft"

    is_served: ClassVar[bool] = False
    has_factors: ClassVar[bool] = False
    base_bits: ClassVar[tuple[str | int, ...]] = ("auto", 16, 32)
    reads_media: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.block_size < 2:
            raise ConfigError(f"block_size is {self.block_size}; it must be at least 2", "block_size: 32")

    def inject(self, model: Any, placement: Placement) -> Any:
        """Return `model` with rotations that are the identity.

        Raises ConfigError for a block size that does not divide the inputs of a module, and what `adapters.inject`
        raises.
        """
        adapters = import_module("sartor.models.adapters")
        shapes = adapters.linear_shapes(model, placement.targets, placement.top_layers)
        for name, (_, ins) in shapes.items():
            if ins % self.block_size:
                sizes = ", ".join(str(size) for size in range(2, min(ins, 129)) if ins % size == 0)
                raise ConfigError(
                    f"method.block_size is {self.block_size}, and {name} has {ins} inputs",
                    f"method.block_size: one of {sizes}; or method.targets without it",
                )
        return adapters.inject(
            model,
            lambda **options: import_module("peft").OFTConfig(oft_block_size=self.block_size, **options),
            targets=placement.targets,
            seed=placement.seed,
            top_layers=placement.top_layers,
        )

    def stored_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Return the bytes of the stored tensors, fp32. shapes: (out, in) of each adapted module."""
        block_values = self.block_size * (self.block_size - 1) // 2
        return 4 * sum(ins // self.block_size * block_values for _, ins in shapes.values())
