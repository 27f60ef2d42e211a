"""A base in 4 bits for devices: NF4 by torch alone, written once, mapped, and widened product by product.

NF4 (QLoRA, Dettmers et al. 2023, arXiv:2305.14314, appendix E): 64 weights end to end share their largest absolute value; each
is the nearest of 16 quantiles of the normal distribution. Blocks' linear weights are so held, 4.5 bits a weight; embedding,
head and norms stay as they are. Mapped weights are no memory of the process in 16 bits either: what 4 bits save is the disk,
and reading it again with each pass where page cache is short.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from sartor.core.artifacts import create_output_directory
from sartor.core.errors import ModelError
from sartor.core.filesystem import write_file_atomic
from sartor.models.linear import MappedLinear
from sartor.models.streamed import write_tensors

SCHEMA, BLOCK, FILE = 1, 64, "model.safetensors"
CODES = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
# a byte -> its two values, the first weight in the high bits
_PAIRS = torch.stack([CODES.repeat_interleave(16), CODES.repeat(16)], 1)
# Bytes of codes that are widened at once: their indices take four times that
_AT_ONCE = 1 << 16


def narrowed(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight -> codes (N / 2,) uint8 and the blocks' scales (N / 64,) fp32. N must be a multiple of 64."""
    blocks = weight.detach().reshape(-1, BLOCK).float()
    scales = blocks.abs().amax(1)
    shares = blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    nearest = torch.bucketize(shares, (CODES[1:] + CODES[:-1]) / 2).to(torch.uint8).view(-1, 2)
    return nearest[:, 0] << 4 | nearest[:, 1], scales


class NarrowLinear(MappedLinear):
    """A frozen linear module in NF4. shape: (outs, D). Where a part is widened alone, it begins with a block."""

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int], bias: torch.Tensor | None) -> None:
        super().__init__(codes, bias)
        self.out_features, self.in_features = shape
        self.scales = torch.nn.Parameter(scales, requires_grad=False)

    def widen(self, out: torch.Tensor, low: int = 0) -> torch.Tensor:
        """See MappedLinear."""
        first = low * self.in_features
        codes = self.weight.detach().view(-1)[first // 2 : (first + out.numel()) // 2]
        pairs = out.view(-1, 2)
        for at in range(0, len(codes), _AT_ONCE):
            part = codes[at : at + _AT_ONCE].int()
            pairs[at : at + len(part)] = _PAIRS.index_select(0, part)
        blocks = out.view(-1, BLOCK)
        blocks.mul_(self.scales.detach()[first // BLOCK : first // BLOCK + len(blocks), None])
        return out


def write_narrow(base: Path, out: Path) -> Path:
    """Write the base below `base` in 4 bits to the directory `out`, whole or not at all. Returns `out`.

    Raises ModelError for files that are not whole, or a weight whose rows are no whole blocks.
    """
    with create_output_directory(out) as folder:
        for file in sorted(base.iterdir()):
            if file.suffix in (".json", ".jinja", ".txt") and "safetensors" not in file.name:
                shutil.copyfile(file, folder / file.name)
        write_tensors(dict(_narrow_tensors(base)), folder / FILE, {"form": "nf4", "block": str(BLOCK)})
        said = {"schema": SCHEMA, "form": "nf4", "block": BLOCK}
        write_file_atomic(folder / "narrow.json", json.dumps(said).encode() + b"\n")
    return out


def _narrow_tensors(base: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(base.glob("*.safetensors")):
        try:
            with safe_open(str(file), framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  # no mapping
                    yield from _narrow_tensor(name, opened.get_tensor(name))
        except ModelError:
            raise
        except Exception as error:  # safetensors' own errors have no common base but Exception
            raise ModelError(f"{file} is not whole: {error}", "restore it from a copy") from None


def _narrow_tensor(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    if not (name.startswith("model.layers.") and name.endswith("_proj.weight")):
        yield name, tensor
        return
    if tensor.numel() % BLOCK:
        raise ModelError(f"{name} has {tensor.numel():,} weights, and 4 bits want whole blocks of {BLOCK}", "keep its 16 bits")
    codes, scales = narrowed(tensor)
    yield f"{name}.codes", codes.view(len(tensor), -1)
    yield f"{name}.scales", scales


def narrow_linear(tensors: Mapping[str, torch.Tensor], name: str, bias: torch.Tensor | None) -> NarrowLinear | None:
    """The module `name` of a base in 4 bits; None where the base holds it as it was."""
    codes, scales = tensors.get(f"{name}.weight.codes"), tensors.get(f"{name}.weight.scales")
    if codes is None or scales is None:
        return None
    return NarrowLinear(codes, scales, (len(codes), codes.shape[1] * 2), bias)
