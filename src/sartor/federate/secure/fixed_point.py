"""Conversion between floats and fixed-point integers modulo 2**32.

A tensor's scale, the value of one unit, stands in the manifest. Each client therefore rounds alike, and the sum needs
no scales of its own:

    units = round(x / scale),   |units| <= (2**31 - 1) // n,   sum of n clients < 2**31

A larger value is rejected, not clipped: a clipped value would be wrong without notice. Rounding is to the nearest
unit, or stochastic: floor(x / scale + U), with U uniform on [0, 1), is right on average (Suresh et al. 2017), so its
errors do not add up over rounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sartor.core.errors import BudgetError, ConfigError, RoundError
from sartor.federate.secure.secagg_terms import MOST_SUM, SecureSumTerms, TensorSlot

Vector = npt.NDArray[np.uint32]
Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Rounding = Literal["nearest", "stochastic"]


def scale_for(bound: float, cohort_size: int) -> float:
    """Return the finest scale at which `cohort_size` clients may each send magnitudes up to `bound`.

    scale = bound / ((2**31 - 1) // n). Raises ConfigError for a bound or a cohort size out of range.
    """
    if not (bound > 0 and 1 <= cohort_size <= MOST_SUM):
        raise ConfigError(f"no scale holds {bound} of {cohort_size} clients", "a bound above 0, such as the clip")
    # slightly wider, so that a value equal to the bound is not rejected for the division's last bit
    return bound / (MOST_SUM // cohort_size) * (1 + 1e-12)


def layout_for(
    tensors: Mapping[str, Any], bound: float | Mapping[str, float], cohort_size: int
) -> tuple[TensorSlot, ...]:
    """Return a layout for tensors of these names and shapes, in the order of names.

    bound: the largest magnitude, for all tensors or by name.
    """
    bounds = bound if isinstance(bound, Mapping) else dict.fromkeys(tensors, bound)
    return tuple(
        TensorSlot(name, tuple(tensors[name].shape), scale_for(bounds[name], cohort_size)) for name in sorted(tensors)
    )


def quantise(
    tensors: Mapping[str, Any],
    layout: Sequence[TensorSlot],
    rounding: Rounding = "nearest",
    chance: np.random.Generator | None = None,
) -> Integers:
    """Return all tensors in units of their scales, as one vector in the layout's order.

    tensors: name -> array of the layout's shape. Result: (S,) int64, with S the sum of the sizes.
    chance: source of stochastic rounding; by default seeded from the system.
    Raises ConfigError where a name or a shape is not the layout's or a value is not finite.
    """
    if set(tensors) != {slot.name for slot in layout}:
        differing = sorted(set(tensors) ^ {slot.name for slot in layout})
        raise ConfigError(
            f"the update's tensors are not the manifest's: {', '.join(differing[:3])}", "the layout of the round"
        )
    chance = chance or np.random.default_rng()
    units = np.empty(sum(slot.size for slot in layout), np.int64)
    start = 0
    for slot in layout:
        values = np.asarray(tensors[slot.name])
        if values.shape != slot.shape:
            raise ConfigError(
                f"{slot.name} has the shape {values.shape}; the round's is {slot.shape}", "the round's layout"
            )
        scaled = values.astype(np.float64).ravel() / slot.scale
        if not np.isfinite(scaled).all():
            raise ConfigError(
                f"{slot.name} holds a value that is not finite", "look at the tuning: its loss has diverged"
            )
        # int64 cannot hold every float; 2**40 units are too many in any case, and `to_ring` still rejects them
        np.clip(scaled, -(2.0**40), 2.0**40, out=scaled)
        rounded = np.rint(scaled) if rounding == "nearest" else np.floor(scaled + chance.random(scaled.size))
        units[start : start + slot.size] = rounded
        start += slot.size
    return units


def to_ring(units: Integers, terms: SecureSumTerms) -> Vector:
    """Return integers (with noise, if any) as elements of the ring.

    units: (S,) int64. Result: (S,) uint32, the two's complement. Raises BudgetError above the headroom of the cohort.
    """
    worst = int(np.abs(units).max(initial=0))
    if worst > terms.max_units:
        index = int(np.abs(units).argmax())
        slot = _slot_at(terms.layout, index)
        raise BudgetError(
            f"{slot.name} holds {units[index] * slot.scale:.6g}; of {len(terms.cohort)} clients each may send "
            f"{terms.max_units * slot.scale:.6g} at most, or the sum could leave the ring",
            "clip the update, or begin the round with a larger scale",
        )
    return (units & 0xFFFFFFFF).astype(np.uint32)


def encode(
    tensors: Mapping[str, Any],
    terms: SecureSumTerms,
    rounding: Rounding = "nearest",
    chance: np.random.Generator | None = None,
) -> Vector:
    """Return `to_ring` of `quantise`: (S,) uint32."""
    return to_ring(quantise(tensors, terms.layout, rounding, chance), terms)


def decode(vector: Vector, layout: Sequence[TensorSlot]) -> dict[str, Floats]:
    """Return the sum's tensors in the layout's shapes, float64; vector: (S,) uint32.

    A sum in the ring has up to 31 bits, and float32 holds 24. Raises RoundError for a vector of another size.
    """
    if vector.size != (size := sum(slot.size for slot in layout)):
        raise RoundError(
            f"the vector has {vector.size} numbers; the layout {size}", "the layout of the round", "manifest"
        )
    tensors, start = {}, 0
    for slot in layout:
        units = vector[start : start + slot.size].view(np.int32).astype(np.float64)
        tensors[slot.name] = (units * slot.scale).reshape(slot.shape)
        start += slot.size
    return tensors


def _slot_at(layout: Sequence[TensorSlot], index: int) -> TensorSlot:
    for slot in layout:
        if index < slot.size:
            return slot
        index -= slot.size
    raise IndexError(index)
