"""Method `ia3`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from sartor.core.config import option
from sartor.core.lazy_import import import_module
from sartor.tune.methods.targets import Placement, Targets

# Modules that read the MLP's inner state; their inputs are scaled
_FEEDFORWARD = ("down_proj", "fc2", "wo", "dense_4h_to_h", "fc_out")


@dataclass(frozen=True)
class Ia3:
    """(IA)^3 (Liu et al. 2022, arXiv:2205.05638): one scale for each output of a module.

    Of the MLP's last module the inputs are scaled. The paper adapts keys, values and that module:
    `targets: [k_proj, v_proj, down_proj]`.
    """

    targets: Targets = option(Targets(), "which linear modules: all-linear, names, or {modules: ..., layers: top-10}")
    start: str = option("", "directory of an Adapter or Release of this method, which is tuned on; empty: afresh")
    kind: Literal["ia3"] = "ia3"

    is_served: ClassVar[bool] = False
    has_factors: ClassVar[bool] = False
    base_bits: ClassVar[tuple[str | int, ...]] = ("auto", 16, 32)
    reads_media: ClassVar[bool] = False

    def inject(self, model: Any, placement: Placement) -> Any:
        """Return `model` with scales of 1. Raises what `adapters.inject` raises."""
        adapters = import_module("sartor.models.adapters")
        # peft's IA3Config has no layers, so the modules are named whole
        names = sorted(adapters.linear_shapes(model, placement.targets, placement.top_layers))
        feedforward = [name for name in names if _is_feedforward(name)]
        return adapters.inject(
            model,
            lambda **options: import_module("peft").IA3Config(feedforward_modules=feedforward, **options),
            targets=names,
            seed=placement.seed,
        )

    def stored_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Return the bytes of the stored tensors, fp32. shapes: (out, in) of each adapted module."""
        return 4 * sum(ins if _is_feedforward(name) else outs for name, (outs, ins) in shapes.items())


def _is_feedforward(name: str) -> bool:
    return name.rpartition(".")[2] in _FEEDFORWARD
