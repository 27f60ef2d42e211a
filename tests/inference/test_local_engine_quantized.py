"""A base in 4 or 8 bits behind the engine: its replies are those of `generate` on that same base, with and without an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import loras
from replies import replies
from sartor.inference.engine import GenerateCall, Sampling
from sartor.inference.generate import generate
from sartor.inference.local.cpu_decoder import open_blocks
from sartor.inference.local.local_engine import open_engine
from sartor.inference.local.torch_decoder import TokenRun, TorchDecoder
from sartor.models import adapters, quantization
from sartor.models.base import Base, open_base

pytest.importorskip("bitsandbytes", reason="pip install 'sartor[quant]'")
BITS = pytest.mark.parametrize("bits", [4, 8])
TEXTS = ("turn on the kitchen light", "what colour is the sky", "open the window and close the door " * 9)
TOKENS = 12


def adapter(base: Base, path: Path, seed: int) -> Path:
    return loras.write_lora(path, base.model.config.to_dict(), seed=seed, rank=4, size=1.0)


def generated(base: Base, model: Any) -> list[str]:
    ids = [base.chat.tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    stop, pad = base.chat.stops, base.chat.pad
    made = [generate(model, [one], stop=stop, pad=pad, sampling=Sampling(max_tokens=TOKENS))[0] for one in ids]
    return [base.chat.decode(one.ids) for one in made]


@BITS
@pytest.mark.usefixtures("fp32")
def test_greedy_replies_are_those_of_generate_on_the_same_base(tiny_base: Path, tmp_path: Path, bits: int) -> None:
    base = open_base(str(tiny_base), bits=bits)
    paths = {f"a{seed}": adapter(base, tmp_path / f"a{seed}", seed) for seed in (1, 2)}
    wanted = {"": generated(base, base.model)}
    for name, path in paths.items():
        tuned = adapters.open_adapter(base.model, path)
        wanted[name] = generated(base, tuned)
        adapters.undo(tuned)
    engine = open_engine(str(tiny_base), rows=8, cache_tokens=4096, bits=bits)
    assert quantization.bits_of(engine._base.model) == bits
    for name, path in paths.items():
        engine.attach(name, path)
    asked = [
        GenerateCall(f"{name}/{place}", name, text=text, sampling=Sampling(max_tokens=TOKENS))
        for name in wanted
        for place, text in enumerate(TEXTS)
    ]
    said = replies(engine, asked)
    assert said == {f"{name}/{place}": text for name, texts in wanted.items() for place, text in enumerate(texts)}
    assert len({tuple(texts) for texts in wanted.values()}) == 3, "the base and both adapters speak alike"
    assert said == {call.id: replies(engine, [call])[call.id] for call in asked}


@BITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_follows_is_what_the_quantised_base_computes(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int, dtype: torch.dtype
) -> None:
    """Of the whole distribution and in bf16 too, where orders of summation differ."""
    from sartor.models import base as module

    monkeypatch.setattr(module, "best_dtype", lambda device: dtype)
    base = open_base(str(tiny_base), bits=bits)
    path, ids = adapter(base, tmp_path / "a", 1), list(range(20, 110))
    tuned = adapters.open_adapter(base.model, path)
    with torch.inference_mode():
        wanted = tuned(torch.tensor([ids])).logits[0, -1].float()
    blocks = open_blocks(adapters.undo(tuned).eval(), 8, 256)
    assert isinstance(blocks, TorchDecoder), "compiled blocks read dense weights"
    blocks.factors.put("a", path)
    blocks.advance([TokenRun(ids[:64], 0, (0, 1), blocks.factors.slot("a"))], [])
    got = blocks.advance([TokenRun(ids[64:], 64, (0, 1), blocks.factors.slot("a"))], [0]).logits[0].float()
    apart = float((got - wanted).norm() / wanted.norm())
    assert apart < (1e-5 if dtype == torch.float32 else 0.06)
