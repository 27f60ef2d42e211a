"""Whether two sides of train.py did the same arithmetic: losses of every update, gradient norms of B at update 1.

Every side begins with the same factors A, B = 0, and reads the same rows, so two right sides of one dtype differ by
rounding alone. The tolerances are derived from it.

Gradients. A product rounds its sum to the dtype (unit roundoff u: 2^-24 in fp32, 2^-9 in bf16) after K terms were
added in fp32. Errors are taken as independent (Higham 2002, section 2.8), so one product of width K costs about u +
sqrt(K) 2^-24, and N of them in a row sqrt(N) times that. A block has ROUNDINGS of them in each direction, so the
gradient of B is off by a relative

    r = sqrt(2 ROUNDINGS layers) (u + sqrt(K) 2^-24)

Its norm averages over the R columns of B (at least), so of two sides with independent errors three standard deviations
of the difference, and the bias of a norm, are

    3 sqrt(2) r / sqrt(R) + r^2

Losses. At update 1 the adapters compute nothing: 0.02 nats in bf16 (as before), and in fp32 the same relative error of
the loss. From then on each side walks along its own gradients, so the difference may grow by that relative error times
the distance that training has moved the loss. Each update has other rows, so the distance is that from the loss of the
untuned base on the same rows, which Sartor's side measures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

UNIT_ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-9}
ROUNDINGS = (
    14  # of a block, forward: 7 products, 2 norms, the activation, the rotation, attention's two products and softmax
)
FIRST_LOSS = {"bfloat16": 0.02}  # nats at update 1


@dataclass(frozen=True)
class Tolerance:
    """How far two sides of one dtype may be apart.

    gradient: of the norms of B's gradients at update 1, relative to the larger. first_loss: nats at update 1.
    """

    dtype: str
    gradient: float
    first_loss: float

    def loss(self, losses: Sequence[float], untuned: Sequence[float], index: int) -> float:
        """Return nats of difference that are allowed at an update (from 0).

        losses: of one side's updates. untuned: those of the base on the same rows.
        """
        pairs = list(zip(losses, untuned, strict=False))[: index + 1]
        moved = max(abs(loss - before) for loss, before in pairs)
        return self.first_loss + self.gradient * moved


def tolerance_of(dtype: str, *, layers: int, width: int, rank: int, loss: float) -> Tolerance:
    """Derive the tolerance of a dtype for a base of `layers` blocks. width: of the widest product. loss: at update 1,
    nats.
    """
    rounding = UNIT_ROUNDOFF[dtype] + math.sqrt(width) * UNIT_ROUNDOFF["float32"]
    error = math.sqrt(2 * ROUNDINGS * layers) * rounding
    gradient = 3 * math.sqrt(2) * error / math.sqrt(rank) + error**2
    return Tolerance(dtype, gradient, FIRST_LOSS.get(dtype, gradient * loss))


def dtype_of(result: dict[str, Any]) -> str:
    """Return the name of a result's dtype, without its library."""
    return str(result.get("dtype", "")).rpartition(".")[2]


def find_disagreement(reference: dict[str, Any], result: dict[str, Any], tolerance: Tolerance) -> str:
    """Return why a result is not the arithmetic of a reference of the same dtype; empty if it is."""
    if dtype_of(result) != tolerance.dtype:
        return f"it computed in {dtype_of(result) or 'an unknown dtype'}, not in {tolerance.dtype}"
    count = min(len(reference["losses"]), len(result["losses"]))
    if any(reference[unit][:count] != result[unit][:count] for unit in ("tokens", "supervised_tokens")):
        return "the tokens differ"
    for index, (expected, loss) in enumerate(zip(reference["losses"], result["losses"], strict=False)):
        limit = tolerance.loss(reference["losses"], reference["untuned_losses"], index)
        if not abs(expected - loss) <= limit:  # also refuses NaN
            difference = f"{abs(expected - loss):.2g}: {expected:.5f} and {loss:.5f}"
            return f"the loss at update {index + 1} differs by {difference} (at most {limit:.2g} in {tolerance.dtype})"
    expected_norms, norms = reference["b_gradients"], result.get("b_gradients") or {}
    if missing := sorted(set(expected_norms) ^ set(norms)):
        return f"gradients of B are not those of the same modules: {len(missing)} differ, such as {missing[0]}"
    for name, expected in expected_norms.items():
        if not abs(expected - norms[name]) <= tolerance.gradient * max(expected, norms[name]):
            limit_text = f"at most {tolerance.gradient:.2g} of it in {tolerance.dtype}"
            return (
                f"the gradient norm of B of {name} at update 1 is {norms[name]:.5g}, not {expected:.5g} ({limit_text})"
            )
    return ""


def largest_differences(reference: dict[str, Any], result: dict[str, Any]) -> dict[str, float]:
    """Return the largest difference of losses (nats) and of gradient norms (relative) between two agreeing results."""
    losses = [abs(left - right) for left, right in zip(reference["losses"], result["losses"], strict=False)]
    norms = [
        abs(norm - result["b_gradients"][name]) / max(norm, result["b_gradients"][name], 1e-30)
        for name, norm in reference["b_gradients"].items()
    ]
    return {"loss": max(losses), "b_gradient": max(norms)}
