"""The factors of a LoRA against its config and its base: names, shapes, ranks, dtypes, values, and how much they change.

`Pair` is one adapted module: A of shape (rank, in) and B of (out, rank), which add scale * B A to the base's (out, in).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sartor.agents.admission.config import LoraConfig
from sartor.agents.admission.weights import BaseWeights
from sartor.core.errors import AdmissionError
from sartor.core.safetensors_file import FLOATS, Tensor, Values

# What may be added to a module, as a Frobenius norm: half of the base's own weight, or, where that is small (a base that was
# hardly trained), as much as two orthogonal matrices of its size. `benchmarks/norms.py` measures real adapters; what the
# limit was chosen from stands in docs/admission.md.
MOST_OF_WEIGHT = 0.5
MOST_ORTHOGONAL = 2.0
_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_TUNE = "tune it again, or release the adapter as it was"


@dataclass(frozen=True)
class Pair:
    """The two factors of a module; `scale` multiplies their product."""

    module: str
    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True)
class Norms:
    """How much is added, 1 being the limit: the most, of which module, and the median over all modules."""

    largest: float
    module: str
    median: float


def pair_up(found: Mapping[str, Tensor], config: LoraConfig, base: BaseWeights) -> list[Pair]:
    """The pairs of exactly those modules of the base that the config targets.

    Raises AdmissionError (`tensors`) for a name that is none of a factor, for half a pair, a module that the base lacks, one
    that the config does not target, and one that it targets and that has no factors.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in found.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise _refusal("tensors", f"the tensor {name} is no factor A or B of a module")
        halves.setdefault(match[1], {})[match[2]] = tensor
    modules = base.linear()
    for module, both in halves.items():
        if len(both) < 2:
            raise _refusal("tensors", f"{module} has the factor {next(iter(both))} alone")
        if module not in modules:
            raise _refusal("tensors", f"the base has no linear module {module}")
        if not config.targets_module(module):
            raise _refusal("tensors", f"{module} has factors, and the config does not target it")
    if lacking := sorted(module for module in modules if config.targets_module(module) and module not in halves):
        raise _refusal("tensors", f"{len(lacking)} modules that the config targets have no factors, the first is {lacking[0]}")
    if not halves:
        raise _refusal("tensors", "it has no factors at all")
    return [Pair(module, both["A"], both["B"], config.scale_of(module)) for module, both in sorted(halves.items())]


def check_shapes(pairs: Sequence[Pair], config: LoraConfig, base: BaseWeights) -> None:
    """Raise AdmissionError (`shapes`) unless every A is (any rank, in) and every B (the same, out) of the base's module."""
    for pair in pairs:
        shape = base.matrices[pair.module].shape
        wide = tuple(reversed(shape)) if config.is_transposed else shape
        a, b = pair.a.shape, pair.b.shape
        if len(a) != 2 or len(b) != 2 or (b[0], a[1]) != wide or a[0] != b[1]:
            raise _refusal("shapes", f"{pair.module} is {wide} in the base; A is {a} and B {b}, not (rank, in) and (out, rank)")


def check_ranks(pairs: Sequence[Pair], config: LoraConfig) -> None:
    """Raise AdmissionError (`rank`) where the factors have another rank than the config declares."""
    for pair in pairs:
        if pair.a.shape[0] != (declared := config.rank_of(pair.module)):
            raise _refusal("rank", f"{pair.module} has the rank {pair.a.shape[0]}; the config declares {declared}")


def check_dtypes(pairs: Sequence[Pair]) -> None:
    """Raise AdmissionError (`dtypes`) for a factor that is stored as anything but a float of 16 or 32 bits."""
    for tensor in (tensor for pair in pairs for tensor in (pair.a, pair.b)):
        if tensor.dtype not in FLOATS:
            raise _refusal("dtypes", f"{tensor.name} is stored as {tensor.dtype}; what is taken is {', '.join(FLOATS)}")


def check_values(pairs: Sequence[Pair], base: BaseWeights) -> Norms:
    """Read every value once. Raises AdmissionError: `finite` for a NaN or an infinity, `norms` for a product out of scale."""
    weights = base.norms([pair.module for pair in pairs])
    shares = {}
    for pair in pairs:
        shortest = min(base.matrices[pair.module].shape)
        limit = max(MOST_OF_WEIGHT * weights[pair.module], MOST_ORTHOGONAL * shortest**0.5)
        shares[pair.module] = added_norm(pair) / limit
    module, largest = max(shares.items(), key=lambda item: item[1])
    if not largest <= 1:
        raise _refusal(
            "norms",
            f"what it adds to {module} has {largest:.3g} times the norm that is allowed "
            f"({MOST_OF_WEIGHT:g} of its weight's {weights[module]:.3g}, or {MOST_ORTHOGONAL:g} of an orthogonal matrix's)",
        )
    return Norms(largest, module, float(np.median(list(shares.values()))))


def added_norm(pair: Pair) -> float:
    """||scale B A|| (Frobenius), by the two (rank, rank) Gram matrices and not by the (out, in) product."""
    a, b = _finite(pair.a), _finite(pair.b)
    squared = float(np.sum(_gram(a) * _gram(b.T)))
    return abs(pair.scale) * float(np.sqrt(max(squared, 0.0)))


def _gram(factor: Values) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    wide = factor.astype(np.float64)
    return wide @ wide.T


def _finite(tensor: Tensor) -> Values:
    values = tensor.values()
    if not np.isfinite(values).all():
        place = np.unravel_index(int(np.flatnonzero(~np.isfinite(values))[0]), values.shape)
        at = ", ".join(str(int(one)) for one in place)
        raise _refusal("finite", f"{tensor.name} holds {values[place]} at ({at})")
    return values


def _refusal(check: str, problem: str) -> AdmissionError:
    return AdmissionError(f"the adapter is refused: {problem}", _TUNE, check)
