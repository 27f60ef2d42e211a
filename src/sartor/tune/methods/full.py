"""Method `full`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from sartor.core.config import option
from sartor.core.lazy_import import import_module
from sartor.tune.methods.targets import ALL, Placement, Targets


@dataclass(frozen=True)
class Full:
    """Tuning of the base's weights themselves, in fp32.

    The base stays in memory beside the trained copies, so that both can be compared and the copies taken off again.
    The Adapter holds the copies whole (docs/decisions/041-methods.md).
    """

    targets: Targets = option(
        Targets(ALL),
        "which weights: all (embeddings, norms and head too), all-linear, names of modules, or {modules: all, layers: "
        "top-10}, of those layers alone",
    )
    start: str = option("", "directory of an Adapter or Release of this method, which is tuned on; empty: afresh")
    kind: Literal["full"] = "full"

    is_served: ClassVar[bool] = False
    has_factors: ClassVar[bool] = False
    base_bits: ClassVar[tuple[str | int, ...]] = ("auto", 32)
    reads_media: ClassVar[bool] = False

    def inject(self, model: Any, placement: Placement) -> Any:
        """Return `model` with copies of its weights in place of them. Raises what `adapters.inject_full` raises."""
        return import_module("sartor.models.adapters").inject_full(
            model, targets=placement.targets, seed=placement.seed, top_layers=placement.top_layers
        )

    def stored_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Return the bytes of the stored tensors, fp32. shapes: of each stored tensor."""
        return 4 * sum(math.prod(shape) for shape in shapes.values())
