"""The engine: what a row is told depends on its own prompt and adapter alone, whoever stands beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import loras
from replies import replies
from sartor.core.errors import BusyError, ModelError, RequestError
from sartor.core.records import Message
from sartor.inference.engine import GenerateCall, ReplyDone, ReplyFailed, Sampling, TextDelta
from sartor.inference.generate import generate
from sartor.inference.local.cpu_decoder import open_blocks
from sartor.inference.local.kv_cache import PAGE_TOKENS, CacheScope, PagedKvCache
from sartor.inference.local.local_engine import LocalEngine
from sartor.inference.local.torch_decoder import TokenRun
from sartor.models import adapters
from sartor.models.base import Base, open_base
from sartor.models.kernels import cpu


def messages(text: str) -> list[Message]:
    return [Message.of("user", text)]


LONG = "turn on the kitchen light " * 12


# how it is computed, and in which dtype: all four where bits are compared, two that cover both elsewhere
WAYS = [("native", torch.bfloat16), ("torch", torch.float32), ("native", torch.float32), ("torch", torch.bfloat16)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "way" in metafunc.fixturenames:
        ways = WAYS if metafunc.function.__name__ == "test_a_row_is_bit_for_bit_what_it_is_alone" else WAYS[:2]
        metafunc.parametrize("way", ways, ids=[f"{how}-{dtype}".replace("torch.", "") for how, dtype in ways])


@pytest.fixture
def base(way: tuple[str, torch.dtype], tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Base:
    from sartor.models import base as module

    monkeypatch.setattr(module, "best_dtype", lambda device: way[1])
    return open_base(str(tiny_base))


def no_kernels() -> None:
    raise cpu.NoKernels("a test")


def needs_kernels() -> None:
    try:
        cpu.load()
    except cpu.NoKernels as why:
        pytest.skip(str(why))


@pytest.fixture
def engine(
    way: tuple[str, torch.dtype], base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[LocalEngine]:
    if way[0] == "torch":
        monkeypatch.setattr(cpu, "load", no_kernels)
    else:
        needs_kernels()
    made = LocalEngine(base, rows=20, cache_tokens=64 * PAGE_TOKENS)
    for number, rank in enumerate((2, 4, 1)):
        made.attach(
            f"a{number}",
            loras.write_lora(tmp_path / f"a{number}", base.model.config.to_dict(), seed=number, rank=rank, size=1.0),
        )
    yield made


def calls(*adapters: str, prompt: str = LONG, tokens: int = 6, **options: Any) -> list[GenerateCall]:
    sampling = Sampling(max_tokens=tokens, **options)
    return [
        GenerateCall(f"{place}", adapter, ({"role": "user", "content": prompt},), sampling=sampling)
        for place, adapter in enumerate(adapters)
    ]


def test_a_row_is_bit_for_bit_what_it_is_alone(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[torch.Tensor]] = {}
    choose = LocalEngine._choose

    def noted(self: LocalEngine, rows: Any, logits: Any) -> None:
        for row, line in zip(rows, logits.logits, strict=True):
            seen.setdefault(f"{row.call.adapter}|{row.call.messages}", []).append(line.clone())
        choose(self, rows, logits)

    monkeypatch.setattr(LocalEngine, "_choose", noted)
    mixed = [
        GenerateCall(
            f"{n}",
            ("", "a0", "a1", "a2")[n % 4],
            ({"role": "user", "content": LONG[: 20 + 7 * n]},),
            sampling=Sampling(max_tokens=4 + n % 3),
        )
        for n in range(18)
    ]
    together = replies(engine, mixed)
    beside, seen = dict(seen), {}
    alone = {}
    for call in mixed:
        for adapter in ("a0", "a1", "a2"):
            engine._pages.forget(engine._adapters[adapter])
        engine._pages.forget(0)
        alone |= replies(engine, [call])
    assert together == alone
    assert seen.keys() == beside.keys()
    for key, lines in seen.items():
        assert len(lines) == len(beside[key]) and all(
            torch.equal(one, two) for one, two in zip(lines, beside[key], strict=True)
        )


def test_adapters_differ_and_the_base_is_untouched(engine: LocalEngine) -> None:
    before = replies(engine, calls(""))["0"]
    said = replies(engine, calls("a0", "", "a1", "a2"))
    assert said["1"] == before
    assert len(set(said.values())) == 4


def test_replies_are_those_of_peft(base: Base, tmp_path: Path) -> None:
    if base.dtype != torch.float32:
        pytest.skip("orders of summation differ, so in bf16 they may part")
    path = loras.write_lora(tmp_path / "a", base.model.config.to_dict(), seed=3, rank=4, size=1.0)
    prompts = [base.chat.prompt_ids(messages(LONG[:40])), base.chat.prompt_ids(messages(LONG))]
    tuned = adapters.open_adapter(base.model, path)
    wanted = [
        made.ids
        for made in generate(tuned, prompts, stop=base.chat.stops, pad=base.chat.pad, sampling=Sampling(max_tokens=12))
    ]
    adapters.undo(tuned)
    assert not isinstance(base.model, peft.PeftModel)
    engine = LocalEngine(base, rows=4, cache_tokens=1024)
    engine.attach("a", path)
    said = replies(
        engine,
        [
            *calls("a", prompt=LONG[:40], tokens=12),
            GenerateCall("1", "a", ({"role": "user", "content": LONG},), sampling=Sampling(max_tokens=12)),
        ],
    )
    assert [said["0"], said["1"]] == [base.chat.decode(ids) for ids in wanted]


def test_prefix_cache_is_reused_within_one_adapter_only(engine: LocalEngine) -> None:
    """Whole pages of tokens are reused, and the reply stays the same."""

    def done(adapter: str) -> tuple[str, ReplyDone]:
        engine.submit(calls(adapter)[0])
        events = [event for _ in iter(lambda: engine.busy, False) for event in engine.step()]
        return "".join(event.text for event in events if isinstance(event, TextDelta)), events[-1]

    cold, first = done("a0")
    warm, second = done("a0")
    _, other = done("a1")
    assert first.cached_tokens == other.cached_tokens == 0
    assert second.cached_tokens >= PAGE_TOKENS and second.cached_tokens % PAGE_TOKENS == 0
    assert cold == warm


def test_an_adapter_that_is_attached_again_meets_nothing_stale(
    engine: LocalEngine, tmp_path: Path, base: Base
) -> None:
    before = replies(engine, calls("a0"))["0"]
    engine.detach("a0")
    with pytest.raises(ModelError, match="attached"):
        engine.submit(calls("a0")[0])
    engine.attach("a0", loras.write_lora(tmp_path / "other", base.model.config.to_dict(), seed=9, rank=3, size=1.0))
    assert replies(engine, calls("a0"))["0"] != before
    engine.detach("a0")
    engine.attach("a0", tmp_path / "a0")
    assert replies(engine, calls("a0"))["0"] == before


def test_a_row_that_is_not_finite_fails_alone(engine: LocalEngine, tmp_path: Path, base: Base) -> None:
    before = replies(engine, calls("", "a0"))
    engine.attach("bad", loras.write_lora(tmp_path / "bad", base.model.config.to_dict(), seed=5, rank=2, size=1e30))
    said = replies(engine, calls("", "a0", "bad", "bad"))
    assert said["2"] == said["3"] == "<ModelError>"
    assert {key: said[key] for key in before} == before
    assert replies(engine, calls("", "a0")) == before
    assert engine._pages.free == engine._pages.total


def test_detaching_fails_its_rows_alone(engine: LocalEngine) -> None:
    for call in calls("a0", "a1"):
        engine.submit(call)
    engine.step()
    engine.detach("a0")
    events = [event for _ in iter(lambda: engine.busy, False) for event in engine.step()]
    assert [event.kind for event in events if isinstance(event, ReplyFailed)] == ["ModelError"]
    assert [event.call for event in events if isinstance(event, ReplyDone)] == ["1"]


def test_cancelled_and_refused(engine: LocalEngine) -> None:
    engine.submit(calls("a0")[0])
    engine.cancel("0")
    assert [event.finish for event in engine.step() if isinstance(event, ReplyDone)] == ["cancelled"]
    assert not engine.busy and engine._pages.free == engine._pages.total
    with pytest.raises(RequestError, match="tokens"):
        engine.submit(calls("", prompt=LONG * 40)[0])
    engine._max_waiting = 1
    engine.submit(calls("")[0])
    with pytest.raises(BusyError):
        engine.submit(calls("", "")[1])


def test_a_sampled_reply_does_not_depend_on_its_neighbours(engine: LocalEngine) -> None:
    alone = replies(engine, calls("a0", temperature=1.5, seed=4, top_p=0.9))["0"]
    beside = [
        GenerateCall("9", "a0", calls("a0")[0].messages, sampling=Sampling(6, 1.5, 0.9, 4)),
        *calls("", "a1", temperature=1.0),
    ]
    assert replies(engine, beside)["9"] == alone


def test_more_calls_than_room_are_all_answered_in_turn(base: Base) -> None:
    engine = LocalEngine(base, rows=20, cache_tokens=8 * PAGE_TOKENS)
    said = replies(engine, calls(*[""] * 9))
    assert len(set(said.values())) == 1 and set(said) == {str(n) for n in range(9)}


def test_stop_texts_logprobs_and_penalties(engine: LocalEngine) -> None:
    whole = replies(engine, calls("", tokens=10))["0"]
    stop = whole[4:6]
    assert replies(engine, calls("", tokens=10, stop=(stop,)))["0"] == whole[: whole.index(stop)]
    assert replies(engine, calls("", tokens=10, frequency_penalty=2.0, presence_penalty=2.0))["0"] != whole
    engine.submit(GenerateCall("l", messages=calls("")[0].messages, sampling=Sampling(max_tokens=5), top_logprobs=3))
    pieces = [
        event for _ in iter(lambda: engine.busy, False) for event in engine.step() if isinstance(event, TextDelta)
    ]
    told = [item for piece in pieces for item in piece.logprobs]
    assert sum(piece.tokens for piece in pieces) == len(told) == 5
    assert all(item.logprob == item.top[0][1] and len(item.top) == 3 for item in told)


def test_embeddings_are_of_unit_length_and_their_own(engine: LocalEngine) -> None:
    parts = list(engine.embed([LONG, "the sky is blue", LONG]))
    one, two, again = (part for part in parts if part is not None)
    assert abs(sum(value * value for value in one.values) - 1) < 1e-5
    assert one == again != two and one.tokens > two.tokens > 0
    assert parts.count(None) >= 3 + 2 * ((one.tokens - 1) // PAGE_TOKENS), "a long text is read in parts"
    with pytest.raises(RequestError, match="begins with 'Once.* whole: the prompt has"):
        list(engine.embed(["a", "Once upon a time " * 600]))


def test_pages_are_shared_only_whole_and_freed_when_wanted() -> None:
    pages, prompt = PagedKvCache(4), list(range(2 * PAGE_TOKENS))
    taken, cached = pages.take(CacheScope(1), prompt, 2 * PAGE_TOKENS + 1)
    assert len(taken) == 3 and cached == 0
    pages.keep(CacheScope(1), prompt, taken)
    shared, cached = pages.take(CacheScope(1), prompt, 2 * PAGE_TOKENS)
    assert shared[0] == taken[0] and shared[1] != taken[1] and cached == PAGE_TOKENS
    assert pages.take(CacheScope(2), prompt, PAGE_TOKENS) is None
    pages.give_back(taken), pages.give_back(shared)
    assert pages.free == 4
    assert pages.take(CacheScope(2), [], 4 * PAGE_TOKENS)[1] == 0
    assert pages.take(CacheScope(1), prompt, 1) is None


def test_the_compiled_blocks_compute_as_torch_does(
    base: Base, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_kernels()
    path = loras.write_lora(tmp_path / "a", base.model.config.to_dict(), seed=3, rank=5, size=1.0)
    found = []
    for opened in (base, open_base(str(tiny_base))):
        blocks = open_blocks(opened.model, 8, 512)
        blocks.factors.put("a", path)
        chunks = [
            TokenRun(list(range(40)), 0, [0], -1, False),
            TokenRun(list(range(5, 30)), 0, [1], blocks.factors.slot("a"), False),
        ]
        found.append(blocks.advance(chunks, [0, 1]).logits)
        newest = [TokenRun([7], 40, [0], -1, True), TokenRun([9], 25, [1], blocks.factors.slot("a"), True)]
        found.append(blocks.advance(newest, [0, 1]).logits)
        monkeypatch.setattr(cpu, "load", no_kernels)
    close = 1e-4 if base.dtype == torch.float32 else 0.05
    for compiled, plain in zip(found[:2], found[2:], strict=True):
        assert (compiled.float() - plain.float()).norm() <= close * plain.float().norm()


@pytest.mark.parametrize(
    ("change", "named"),
    [({"use_dora": True}, "use_dora"), ({"r": 3}, "rank 3"), ({"peft_type": "IA3"}, "IA3"), ({"bias": "all"}, "bias")],
)
def test_an_adapter_that_cannot_be_computed_is_refused(
    base: Base, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    path = loras.write_lora(tmp_path / "a", base.model.config.to_dict(), seed=0, rank=2)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=named):
        LocalEngine(base, cache_tokens=1024).attach("a", path)
