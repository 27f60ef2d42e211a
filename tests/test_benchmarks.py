"""The parts of benchmarks/ that decide which numbers count. test_smallest_benchmarks.py runs every script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tiny
from sartor.models import adapters

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(BENCHMARKS / "peers"))


def test_roofline_counts_the_products_that_torch_does() -> None:
    import roofline

    tokens, rank = 24, 4
    model = adapters.inject_lora(tiny.model(), rank=rank, alpha=8, dropout=0.0, targets="all-linear", seed=0)
    counted = roofline.products(roofline.linears(model), roofline.head(model), tokens, tokens, rank)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(tokens)[None], use_cache=False).logits.sum().backward()
    done = counter.get_flop_counts()["Global"]
    products = sum(
        flops for operation, flops in done.items() if "mm" in str(operation) and "bmm" not in str(operation)
    )
    assert sum(times * product.flops for product, times in counted.items()) == products


def test_roofline_measures() -> None:
    import roofline

    model = adapters.inject_lora(tiny.model(), rank=4, alpha=8, dropout=0.0, targets="all-linear", seed=0)
    assert roofline.measure(model, 24, 8, 4).seconds > 0


def test_first_token_of_a_row_gets_no_label() -> None:
    import protocol

    row = protocol.Row([5, 6, 7], [True, False, True])
    assert (row.labels, row.supervised_tokens) == ([-100, -100, 7], 1)


def test_ratios_are_medians_of_pairs() -> None:
    import train

    def side(seconds: float) -> dict:
        return {
            "tokens": [9, 10, 10],
            "supervised_tokens": [3, 5, 5],
            "seconds": [99.0, seconds, seconds],
            "losses": [2.0, 1.0, 1.0],
            "peak_rss_bytes": int(seconds * 100),
            "shared_tokens_per_s": 15.0,
            "no_compiler_tokens_per_s": 9.0,
        }

    said = train.ratios([(side(1.0), side(2.0)), (side(1.0), side(3.0)), (side(1.0), side(7.0))])
    assert (said["tokens_per_s"], said["supervised_tokens_per_s"], said["pairs"]) == (3.0, 3.0, 3)


def test_home_schema_accepts_right_replies_and_no_other_room() -> None:
    """An unknown intent and a field of another intent are schema errors, too."""
    import collaborate

    from sartor.serving.plans.step_messages import schema_errors

    timer = {"messages": [{"content": '{"intent":"HassStartTimer","name":"pizza","hours":2}'}]}
    rows = [*collaborate.made_rows(quick=True), timer]
    schema = collaborate.schema_of(rows)
    assert not any(schema_errors(json.loads(row["messages"][-1]["content"]), schema) for row in rows)
    assert not schema_errors({"intent": "HassStartTimer", "name": "tea", "hours": 3}, schema)
    for wrong in (
        {"intent": "HassTurnOn", "area": "cellar"},
        {"intent": "HassTurnUp"},
        {"intent": "HassTurnOn", "hours": 2},
    ):
        assert schema_errors(wrong, schema)


def test_serve_ratios_are_medians_against_the_faster_form() -> None:
    """Each ratio is the median of its rounds; of two forms of llama.cpp the faster is compared."""
    import serve

    rates = {"ours": [10.0, 10.0, 15.0, 25.0, 30.0, 30.0], "ours/same": [10.0, 10.0, 30.0, 25.0, 60.0, 30.0]}
    rates |= {
        "ours/alone": [5.0, 5.0, 5.0],
        "llama_q4": [5.0, 4.0, 1.0],
        "llama_f16": [2.0, 2.0, 2.0],
        "peft_bf16": [1.0, 1.0, 1.0],
    }
    said, every = serve.ratios(rates)
    assert said == {"mixed_over_same": 1.0, "one_at_a_time": 4.0, "llama_cpp": 5.0, "peft": 20.0}
    assert every["mixed_over_same"]["of_each"] == [1.0, 1.0, 0.5, 1.0, 0.5, 1.0] and every["llama_f16"]["of_each"] == [
        5.0,
        10.0,
        15.0,
    ]


def test_served_texts_agree_up_to_the_first_difference() -> None:
    import serve

    assert serve.agreement(["abcd", "ab"], ["abcd", "ab"]) == 1 and serve.agreement(
        ["abcd", ""], ["abxx", "yy"]
    ) == round(2 / 6, 4)
    assert serve.spread([0.1 * place for place in range(1, 101)]) == {"p50": 5.05, "p95": 9.5}


def test_a_limit_is_held_against_the_release_that_reached_least() -> None:
    import parity

    from sartor.release.export.parity import LEAST_AGREEMENT, Figures

    def reached(agreement: float, deviation: float) -> dict[str, Figures]:
        return {"f16": Figures("r", "f16", 100, agreement, 1.0, 1.0, 0.0, 0.0, agreement_deviation=deviation)}

    least = LEAST_AGREEMENT["f16"] + 0.004
    said = parity.summary({"a": reached(0.999, 0.005), "b": reached(least, 0.002), "c": reached(1.0, 0.0)})["f16"]
    assert (said["least"], said["deviation"], said["margin"]) == (least, 0.002, 2.0)
    assert said["agreement"] == {"a": 0.999, "b": least, "c": 1.0}
    assert "margin" not in parity.summary({"c": reached(1.0, 0.0)})["f16"], "a margin that is none is no figure"


def test_no_prompt_begins_as_another() -> None:
    import serve

    class Words:
        ids: list[int]

        def encode(self, text: str) -> Words:
            self.ids = [int(word) if word.isdigit() else -1 for word in text.split()]
            return self

    prompts = serve.Prompts(Words()).next(20)
    assert len({prompt[0] for prompt in prompts}) == 20 and all(50 < len(prompt) < 90 for prompt in prompts)


def test_the_base_in_f16_has_the_same_weights(tmp_path: Path) -> None:
    import gguf
    import numpy as np
    import serve_work

    source, weights = tmp_path / "q.gguf", np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64)
    writer = gguf.GGUFWriter(source, "llama")
    writer.add_block_count(1)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_tensor(
        "token_embd.weight",
        gguf.quantize(weights, gguf.GGMLQuantizationType.Q8_0),
        raw_dtype=gguf.GGMLQuantizationType.Q8_0,
    )
    writer.add_tensor("output_norm.weight", weights[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    serve_work.write_f16(source, tmp_path / "f16.gguf")
    read = gguf.GGUFReader(tmp_path / "f16.gguf")
    tensors = {tensor.name: tensor.data for tensor in read.tensors}
    assert tensors["token_embd.weight"].dtype == np.float16 and tensors["output_norm.weight"].dtype == np.float32
    assert np.abs(tensors["token_embd.weight"] - weights).max() < 0.01 and np.array_equal(
        tensors["output_norm.weight"], weights[0]
    )
    assert (
        read.get_field("tokenizer.ggml.tokens").contents() == ["a", "b"]
        and read.get_field("llama.block_count").contents() == 1
    )


CHILD = """
import sys, time
import numpy as np
drawn = np.random.default_rng(3).standard_normal(64)
held = [np.concatenate([np.zeros(7), drawn]).astype("<f4"), np.arange(64, dtype="<f4")]
del drawn
for line in sys.stdin:
    print(*(int(np.isnan(values).sum()) for values in held), int(time.time()), int(time.monotonic()), flush=True)
"""


def test_chaos_changes_only_wall_clock_and_chosen_floats(tmp_path: Path) -> None:
    """Wall time jumps by a day and monotonic time goes on; 64 floats become NaN and others stay."""
    import chaos_tools

    clock = chaos_tools.Clock.made(tmp_path)
    if clock is None:
        pytest.skip("there is no C compiler")
    command = [sys.executable, "-c", CHILD]
    env = {**os.environ, **clock.environment}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as child:
        assert child.stdin and child.stdout

        def told() -> list[int]:
            child.stdin.write("\n")
            child.stdin.flush()
            return [int(number) for number in child.stdout.readline().split()]

        for offset_s in (0, 86_400, -86_400):
            clock.jump(offset_s)
            *nans, wall, monotonic = told()
            assert (
                nans == [0, 0] and abs(wall - time.time() - offset_s) < 600 and abs(monotonic - time.monotonic()) < 600
            )
        try:
            places = chaos_tools.poison(child.pid, np.random.default_rng(3).standard_normal(64))
        except PermissionError:
            pytest.skip("this user may not write to another process")
        assert places >= 1 and told()[:2] == [64, 0]
        child.stdin.close()


def test_chaos_knows_a_wrong_reply() -> None:
    from chaos_load import Load, Reply

    load = Load("", "", 4, known={("faq@1", "hi"): "hello"})
    said = {text: load.judged(Reply("faq", "hi", 0.0, 1.0, "faq@1", text)).wrong for text in ("hello", "hullo")}
    assert said == {"hello": "", "hullo": "another reply than in peace"}
    assert "nobody knows" in load.judged(Reply("faq", "hi", 0.0, 1.0, "faq@2", "hello")).wrong
    assert load.judged(Reply("faq", "hi", 0.0, 1.0, wrong="HTTP 503")).wrong == "HTTP 503"


def test_learning_from_use_is_measured_on_what_nobody_chose() -> None:
    import random

    import learn_rollback
    from learn_rollback import Drift, until_rollback

    assert until_rollback(Drift("format", 0, 1.0), random.Random(0)) == 20  # the fewest replies that monitors judge
    assert until_rollback(Drift("format", 100, 1.0), random.Random(0)) > 20
    assert until_rollback(None, random.Random(0), most=300) == 0
    found = learn_rollback.quantile(list(range(1, 101)), 0.5)
    assert found["low"] < found["estimate"] < found["high"]


def test_threshold_of_a_peer_is_chosen_on_unscored_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sartor's side takes texts alone: no hint of what kind of rows they are."""
    import inspect

    import dedup
    import dedup_peers
    from dedup_sets import Truth

    monkeypatch.setitem(dedup.THRESHOLDS, "rensa", (0.9, 0.5))
    monkeypatch.setitem(dedup.PEERS, "rensa", lambda texts, threshold: [0, 0] if threshold == 0.5 else [0, 1])
    chosen, tried = dedup.choose_thresholds(["rensa"], Truth(["a", "a"], [0, 0]))
    assert chosen == {"rensa": 0.5} and tried["rensa"]["0.9"] < tried["rensa"]["0.5"] == 1
    assert list(inspect.signature(dedup_peers.sartor).parameters) == ["texts"]


def test_letters_of_short_sentences_have_words_for_every_fact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve of chitchat's sentences often have fewer words than a letter."""
    import dedup_sets

    short = [" ".join(f"w{number}" for number in range(index, index + 6)) for index in range(400)]
    monkeypatch.setattr(dedup_sets, "sentences", lambda source: short)
    letters = dedup_sets.planted(8, source="chitchat")["templates"]
    assert {len(text.split()) for text in letters.texts[:8]} == {dedup_sets.LETTER_WORDS}
    assert letters == dedup_sets.planted(8, source="chitchat")["templates"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluation_computes_in_the_dtype_asked_for(
    dtype: torch.dtype, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the machine multiplies another natively."""
    import evaluate

    from sartor.core.artifacts import open_artifact
    from sartor.models import base as base_module
    from sartor.models.tuned_model import open_tuned

    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    monkeypatch.setattr(base_module, "best_dtype", lambda device: other)
    with evaluate.computing_in(dtype):
        assert open_tuned(open_artifact(adapter, "adapter"))[0].dtype == dtype


async def test_arrivals_do_not_wait_for_a_server_that_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed loop would ask once during the stall; here all who were due ask, and their wait is counted from then."""
    import asyncio

    import chaos_load
    from chaos_load import Load, Reply

    stall_s, rate_per_s, last = 0.4, 50.0, 0.6
    began: list[float] = []

    async def stalled(http: object, model: str, prompt: str, tokens: int, stream: bool) -> Reply:
        sent = time.monotonic()
        began.append(sent)  # the stall begins with the first request
        await asyncio.sleep(max(0.0, began[0] + stall_s - sent))
        return Reply(model, prompt, sent, time.monotonic(), model, "hello")

    monkeypatch.setattr(chaos_load, "ask", stalled)
    load = Load("http://127.0.0.1:9", "", 4, rate_per_s)
    load.known = {("faq", prompt): "hello" for prompt in chaos_load.PROMPTS}
    async with load.running(["faq"]):
        await asyncio.sleep(last)
        await load.answered_until(time.monotonic())
    waited = [reply for reply in load.replies if reply.latency_s > 0.05]
    assert len(waited) >= 5 and max(reply.latency_s for reply in waited) > 0.2
    assert not any(reply.wrong for reply in load.replies) and not load.pending
    times = [next(chaos_load.arrivals(rate_per_s, seed=3)) for _ in range(2)]
    assert times[0] == times[1], "the same seed, the same times"


def test_p99_is_a_latency_that_was_measured() -> None:
    import chaos

    assert chaos.nearest_rank([0.1 * place for place in range(1, 201)], 0.99) == pytest.approx(19.8)
    assert chaos.nearest_rank([0.5], 0.99) == 0.5
