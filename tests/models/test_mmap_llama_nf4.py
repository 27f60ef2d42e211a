"""A base in NF4 is what the paper says, and computes about what the base does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sartor.core.errors import ConfigError, ModelError
from sartor.models import packing
from sartor.models.kernels.reference import ReferenceKernels
from sartor.models.losses.fused_decoder import FusedDecoder
from sartor.models.mmap_llama import BLOCK, CODES, MappedLlama, NarrowLinear, quantize_nf4, write_narrow
from sartor.models.packing import TokenizedExample

ROWS = [TokenizedExample(list(range(3, 3 + n)), [False] * 4 + [True] * (n - 4), str(n)) for n in (9, 20, 31)]


def plain(weight: torch.Tensor) -> torch.Tensor:
    """NF4 and back, a number at a time."""
    blocks = weight.float().reshape(-1, BLOCK)
    scales = blocks.abs().max(1, keepdim=True).values
    nearest = (blocks[..., None] / scales[..., None] - CODES).abs().argmin(-1)
    return (CODES[nearest] * scales).view(weight.shape)


def test_codes_are_the_nearest_and_widening_is_exact() -> None:
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    codes, scales = quantize_nf4(weight)
    module = NarrowLinear(codes.view(96, -1), scales, (96, 128), None)
    assert codes.numel() == weight.numel() // 2 and scales.numel() == weight.numel() // BLOCK
    assert torch.equal(module.widen(torch.empty(96, 128)), plain(weight))
    assert torch.equal(module.widen(torch.empty(10, 128), low=32), plain(weight)[32:42])
    assert not quantize_nf4(torch.zeros(64))[1].any()


def test_a_base_in_four_bits_is_mapped_and_near(tiny_base: Path, tmp_path: Path) -> None:
    narrow = MappedLlama(write_narrow(tiny_base, tmp_path / "narrow"))
    whole = MappedLlama(tiny_base)
    for name, module in narrow.linear.items():
        assert isinstance(module, NarrowLinear)
        assert torch.equal(
            module.widen(torch.empty(module.out_features, module.in_features)), plain(whole.linear[name].weight)
        )
    found, wanted = (
        FusedDecoder(model, ReferenceKernels(), logits_bytes=1 << 12).losses(packing.pack(ROWS))
        for model in (narrow, whole)
    )
    assert torch.allclose(found, wanted, atol=0.1)
    # what is trained on it learns through the same weights
    narrow.adapt(rank=2, alpha=4.0, seed=0)
    FusedDecoder(narrow, ReferenceKernels(), recompute=True).losses(packing.pack(ROWS)).mean().backward()
    assert any(bool(factor.grad.any()) for factor in narrow.factors().values())


def test_it_is_written_once_and_whole(tiny_base: Path, tmp_path: Path) -> None:
    write_narrow(tiny_base, tmp_path / "narrow")
    with pytest.raises(ConfigError, match="exists"):
        write_narrow(tiny_base, tmp_path / "narrow")
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="not whole"):
        write_narrow(torn, tmp_path / "other")
    assert not (tmp_path / "other").exists()
