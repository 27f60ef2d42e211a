"""A base from its files alone computes what transformers' module of them computes, and needs nothing but torch for it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sartor.core.errors import ModelError
from sartor.models import adapters, packing
from sartor.models.base import open_base
from sartor.models.kernels.reference import ReferenceKernels
from sartor.models.losses import transformers_backend
from sartor.models.losses.fused_decoder import FusedDecoder
from sartor.models.losses.lora_linear import LoraLinear
from sartor.models.mmap_llama import MappedLlama
from sartor.models.packing import TokenizedExample

ROWS = [TokenizedExample(list(range(3, 3 + n)), [False] * 4 + [True] * (n - 4), str(n)) for n in (9, 20, 31)]


def bf16(tiny_base: Path, folder: Path) -> Path:
    """The tiny base as it is shipped to devices: its weights in bf16."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_base, folder)
    for file in folder.glob("*.safetensors"):
        save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    return folder


def losses(model: Any, *, recompute: bool = False) -> torch.Tensor:
    return FusedDecoder(model, ReferenceKernels(), recompute=recompute, logits_bytes=1 << 12).losses(
        packing.pack(ROWS)
    )


def test_losses_and_gradients_are_those_of_peft_on_transformers(tiny_base: Path, tmp_path: Path) -> None:
    folder = bf16(tiny_base, tmp_path / "base")
    device = MappedLlama(folder)
    device.adapt(rank=4, alpha=8.0, seed=0)
    opened = open_base(str(folder), bits=32, device=torch.device("cpu"))
    tuned = adapters.inject_lora(opened.model, rank=4, alpha=8.0, dropout=0.0, targets="all-linear", seed=0)
    theirs = {name.replace(".default", ""): part for name, part in tuned.named_parameters() if "lora_" in name}
    generator = torch.Generator().manual_seed(1)
    assert set(theirs) == set(device.factors())
    for name, parameter in device.factors().items():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 8
        theirs[name].data = parameter.data.clone()
    wanted = transformers_backend.row_losses(tuned, ROWS, "cpu")
    wanted.mean().backward()
    for recompute in (False, True):
        found = losses(device, recompute=recompute)
        assert torch.allclose(found, wanted, atol=1e-5)
        found.mean().backward()
        for name, parameter in device.factors().items():
            assert torch.allclose(parameter.grad, theirs[name].grad, atol=1e-6), name
            parameter.grad = None


def test_fresh_adapter_leaves_losses_bit_equal(tiny_base: Path, tmp_path: Path) -> None:
    """Weights stay in bf16, and only the named modules of the top layer get factors."""
    folder = bf16(tiny_base, tmp_path / "base")
    device = MappedLlama(folder)
    before = losses(device)
    assert all(module.weight.dtype == torch.bfloat16 for module in device.linear.values())
    device.adapt(rank=2, alpha=4.0, seed=0, targets=("q_proj", "down_proj"), top=1)
    assert torch.equal(losses(device), before)
    last = device.config.num_hidden_layers - 1
    assert {name for name, module in device.linear.items() if isinstance(module, LoraLinear)} == {
        f"model.layers.{last}.self_attn.q_proj",
        f"model.layers.{last}.mlp.down_proj",
    }
    a = device.linear[f"model.layers.{last}.self_attn.q_proj"].a.detach()
    assert float(a.abs().max()) <= a.shape[1] ** -0.5 and len(a.unique()) > a.numel() // 2


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"model_type": "gpt2"}, "Llama architecture"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rotary"),
        ({"hidden_size": None}, "not whole"),
        ({"num_hidden_layers": 99}, "hold no model.layers"),
    ],
)
def test_what_a_device_cannot_compute_is_refused(
    tiny_base: Path, tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    said = json.loads(file.read_text())
    said.pop("head_dim", None)
    file.write_text(json.dumps({**said, **change}))
    with pytest.raises(ModelError, match=problem):
        MappedLlama(tmp_path / "base")


def test_files_that_are_cut_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    (weights,) = (tmp_path / "base").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="not whole"):
        MappedLlama(tmp_path / "base")
    weights.unlink()
    with pytest.raises(ModelError, match="no safetensors"):
        MappedLlama(tmp_path / "base")


def test_neither_transformers_nor_peft_is_loaded() -> None:
    code = (
        "import sys, sartor.models.mmap_llama, sartor.models.losses.fused_decoder, sartor.models.kernels\n"
        "sys.exit(', '.join({'transformers', 'peft', 'pyarrow'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
