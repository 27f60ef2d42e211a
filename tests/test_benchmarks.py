"""The parts of benchmarks/ that decide which numbers count. The measurements themselves are run by hand: they need the peers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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
    products = sum(flops for operation, flops in done.items() if "mm" in str(operation) and "bmm" not in str(operation))
    assert sum(times * product.flops for product, times in counted.items()) == products


def test_roofline_measures() -> None:
    import roofline

    model = adapters.inject_lora(tiny.model(), rank=4, alpha=8, dropout=0.0, targets="all-linear", seed=0)
    assert roofline.measure(model, 24, 8, 4).seconds > 0


def test_first_token_of_a_row_gets_no_label() -> None:
    import protocol

    row = protocol.Row([5, 6, 7], [True, False, True])
    assert (row.labels, row.supervised_tokens) == ([-100, -100, 7], 1)


def test_only_the_same_work_counts() -> None:
    import train

    ours = {"tokens": [10, 12], "supervised_tokens": [4, 5], "losses": [2.0, 1.9]}
    assert train.objection(ours, {**ours, "losses": [2.019, 9.0]}) == ""
    assert "differs" in train.objection(ours, {**ours, "losses": [2.021, 1.9]})
    assert "differs" in train.objection(ours, {**ours, "losses": [float("nan"), 1.9]})
    assert "tokens" in train.objection(ours, {**ours, "supervised_tokens": [4, 4]})


def test_ratios_are_medians_of_pairs() -> None:
    import train

    def side(seconds: float) -> dict:
        return {
            "tokens": [9, 10, 10], "supervised_tokens": [3, 5, 5], "seconds": [99.0, seconds, seconds],
            "losses": [2.0, 1.0, 1.0], "peak_rss_bytes": int(seconds * 100), "shared_tokens_per_s": 15.0, "no_compiler_tokens_per_s": 9.0,
        }  # fmt: skip

    said = train.ratios([(side(1.0), side(2.0)), (side(1.0), side(3.0)), (side(1.0), side(7.0))])
    assert (said["tokens_per_s"], said["supervised_tokens_per_s"], said["pairs"]) == (3.0, 3.0, 3)


def test_a_peer_that_cannot_run_says_why(tmp_path: Path) -> None:
    """By an interpreter that has none of it."""
    (tmp_path / "job.json").write_text("{}")
    command = [sys.executable, "-I", "-S", str(BENCHMARKS / "peers" / "trl" / "run.py"), "job.json", "result.json"]
    subprocess.run(command, cwd=tmp_path, check=True)
    said = json.loads((tmp_path / "result.json").read_text())
    assert said["failed"].startswith("KeyError") and said["versions"]["trl"] == "absent" and "Traceback" in said["traceback"]
