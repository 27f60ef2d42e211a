"""The engine's blocks, compiled and in torch: every family is transformers' own, and no bit hangs on how tokens are grouped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import loras
from replies import replies
from sartor.inference.engine import GenerateCall, Sampling
from sartor.inference.generate import generate, prompt_generator, sample_token, sampling_probabilities
from sartor.inference.local.cpu_decoder import CpuDecoder, difference, open_blocks
from sartor.inference.local.local_engine import LocalEngine
from sartor.inference.local.torch_decoder import TokenRun
from sartor.models import adapters
from sartor.models.base import open_base
from sartor.models.hardware import _cpu_flags
from sartor.models.kernels import cpu
from tiny_families import MODELS, tuned

PROMPTS = [[3 + (7 * place + 5 * row) % 90 for place in range(length)] for row, length in enumerate((70, 5, 130))]


def compiled() -> None:
    try:
        cpu.load()
    except cpu.NoKernels as why:
        pytest.skip(str(why))


def opened(kind: str, dtype: torch.dtype, folder: Path) -> tuple[Any, list[torch.Tensor]]:
    """Blocks of a tiny base with an adapter under `a`, and what transformers and peft say follows PROMPTS, without it and with it."""
    model = tuned(kind, torch.float32).to(dtype)
    adapters.write_adapter(model, folder, "tiny")
    with torch.inference_mode():
        own = [model(torch.tensor([ids])).logits[0, -1].float() for ids in PROMPTS]
        with model.disable_adapter():
            plain = [model(torch.tensor([ids])).logits[0, -1].float() for ids in PROMPTS]
    blocks = open_blocks(adapters.undo(model).eval(), 64, 256)
    blocks.factors.put("a", folder)
    return blocks, [*plain, *own]


def runs(blocks: Any, first: int = 0) -> list[TokenRun]:
    """PROMPTS without and with the adapter, each in pages of its own."""
    slots = [-1] * 3 + [blocks.factors.slot("a")] * 3
    return [
        TokenRun(PROMPTS[n % 3], 0, tuple(range(first + 3 * n, first + 3 * n + 3)), slot)
        for n, slot in enumerate(slots)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", MODELS)
def test_every_family_is_transformers_own(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    compiled()
    blocks, wanted = opened(kind, dtype, tmp_path / "a")
    assert isinstance(blocks, CpuDecoder)
    got = blocks.advance(runs(blocks), range(6)).logits
    apart = [float((one.float() - other).norm() / other.norm()) for one, other in zip(got, wanted, strict=True)]
    assert max(apart) < (1e-5 if dtype == torch.float32 else 0.06)


# What a processor must have for the kernels of lesser ones: what is promised holds on each, so each is tested where it runs
LEVELS = {
    "x86-64": "sse2",
    "x86-64-v3": "avx2 fma bmi2 f16c movbe",
    "x86-64-v4": "avx512f avx512bw avx512cd avx512dq avx512vl",
}


@pytest.fixture(params=["native", *LEVELS])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Kernels as they are compiled for this processor, and for the lesser ones whose instructions it has."""
    if request.param in LEVELS:
        if lacking := set(LEVELS[request.param].split()) - set(_cpu_flags().split()):
            pytest.skip(f"this processor has no {' '.join(sorted(lacking))}")
        monkeypatch.setattr(cpu, "_machine_flags", lambda: (f"-march={request.param}",))
    for kept in (cpu.load, difference):
        kept.cache_clear()
    compiled()
    yield request.param
    for kept in (cpu.load, difference):
        kept.cache_clear()


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def blocks(request: pytest.FixtureRequest, processor: str, tmp_path: Path) -> Iterator[Any]:
    """Gemma 2: a sliding window, soft-caps and norms behind, so that every branch has its turn."""
    threads = torch.get_num_threads()
    made = opened("gemma2", request.param, tmp_path / "a")[0]
    assert isinstance(made, CpuDecoder)
    yield made
    torch.set_num_threads(threads)


def test_no_bit_hangs_on_neighbours_chunks_or_threads(blocks: Any) -> None:
    together = blocks.advance(runs(blocks), range(6)).logits
    alone = torch.cat([blocks.advance([run], [0]).logits for run in reversed(runs(blocks))]).flip(0)
    assert torch.equal(together, alone)
    torch.set_num_threads(3)
    assert torch.equal(together, blocks.advance(runs(blocks), range(6)).logits)
    parts = []
    for run in runs(blocks, 20):
        for start in range(0, len(run.ids), 29):
            scores = blocks.advance([TokenRun(run.ids[start : start + 29], start, run.pages, run.slot)], [0])
        parts.append(scores.logits)
    assert torch.equal(together, torch.cat(parts))


def test_what_a_reply_leaves_in_the_cache_is_what_a_prompt_would(blocks: Any) -> None:
    for run in runs(blocks):
        half = len(run.ids) // 2
        whole = blocks.advance([run], [0]).logits
        blocks.advance([TokenRun(run.ids[:half], 0, (40, 41, 42), run.slot)], [])
        for place in range(half, len(run.ids)):
            written = blocks.advance(
                [TokenRun(run.ids[place : place + 1], place, (40, 41, 42), run.slot, newest=True)], [0]
            )
        assert torch.equal(whole, written.logits)


def test_pages_that_hold_no_numbers_harm_nobody(blocks: Any) -> None:
    before = blocks.advance(runs(blocks), range(6)).logits
    for cache in blocks._caches:
        cache.fill_(torch.nan)
    assert torch.equal(before, blocks.advance(runs(blocks), range(6)).logits)


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.05])
def test_what_is_drawn_has_the_chances_that_likely_says(top_p: float) -> None:
    logits = torch.randn(600, generator=torch.Generator().manual_seed(0)) * 3
    chances = sampling_probabilities(logits[None], Sampling(temperature=0.9, top_p=top_p))[0]
    ordered = (logits / 0.9).softmax(-1).sort(descending=True)
    kept = 600 if top_p == 1 else int((ordered.values.cumsum(-1) - ordered.values < top_p).sum())
    assert set(chances.nonzero()[:, 0].tolist()) == set(ordered.indices[:kept].tolist())
    drawn_with = prompt_generator(Sampling(seed=1))
    counts = torch.bincount(
        torch.tensor([sample_token(chances, drawn_with) for _ in range(4000)]), minlength=600
    ).double()
    shares = chances.double() / chances.double().sum()
    assert not counts[chances == 0].any()
    assert (counts / 4000 - shares).abs().max() < 0.04


STARTER_TEXTS = [
    f"Tell me {what} in one sentence." for what in ("a story", "the time", "what rain is", "why cats sleep")
] * 2


@pytest.mark.circle
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_eight_adapters_on_the_starter_say_what_each_says_alone(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both dtypes the engine's texts are its own alone; in fp32 they are also those of peft and generate, token for token."""
    from sartor.models import base as module

    monkeypatch.setattr(module, "best_dtype", lambda device: dtype)
    base = open_base("starter")
    config = base.model.config.to_dict()
    paths = [loras.write_lora(tmp_path / f"a{n}", config, seed=n, rank=16, size=0.3) for n in range(8)]
    wanted = ""
    if dtype == torch.float32:
        tuned_base = adapters.open_adapter(base.model, paths[0])
        ids = base.chat.tokenizer(STARTER_TEXTS[0], add_special_tokens=False)["input_ids"]
        made = generate(tuned_base, [ids], stop=base.chat.stops, pad=base.chat.pad, sampling=Sampling(max_tokens=16))
        wanted = base.chat.decode(made[0].ids)
        adapters.undo(tuned_base)
    engine = LocalEngine(base, rows=8, cache_tokens=4096)
    for n, path in enumerate(paths):
        engine.attach(f"a{n}", path)
    asked = [
        GenerateCall(f"{n}", f"a{n}", text=text, sampling=Sampling(max_tokens=16))
        for n, text in enumerate(STARTER_TEXTS)
    ]
    together = replies(engine, asked)
    assert not any(text.endswith("Error>") for text in together.values())
    assert together == {call.id: replies(engine, [call])[call.id] for call in asked}
    if wanted:
        assert together["0"] == wanted
