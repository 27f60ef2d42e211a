"""One optimiser for each kind of device, fp32 state in all, and a gradient scale where fp16 needs one."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

import tiny
from sartor.core.errors import BudgetError, ConfigError
from sartor.models import adapters
from sartor.tune import optimizers
from sartor.tune.recipe import ResolvedOptimizer

SETTINGS = ResolvedOptimizer(learning_rate=3e-3, weight_decay=0.1)


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(6, 4, dtype=dtype)) for _ in range(3)]


@pytest.fixture
def free_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What a GPU says is free: set its one element."""
    free = [1 << 30]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 1 << 34))
    return free


@pytest.mark.parametrize(("kind", "fused"), [("cpu", True), ("cuda", True), ("mps", False)])
def test_each_device_has_its_adamw(kind: str, fused: bool, free_bytes: list[int]) -> None:
    made = optimizers.make(parameters(), SETTINGS, torch.device(kind))
    assert type(made) is torch.optim.AdamW
    group = made.param_groups[0]
    assert (group["fused"], group["lr"], group["weight_decay"]) == (fused, 3e-3, 0.1)


def test_state_is_fp32_and_a_step_is_plain_adamws() -> None:
    one, other = parameters(), parameters()
    made = optimizers.make(one, SETTINGS, torch.device("cpu"))
    plain = torch.optim.AdamW(other, lr=3e-3, weight_decay=0.1, foreach=False)
    for _ in range(3):
        for few, optimizer in ((one, made), (other, plain)):
            for parameter in few:
                parameter.grad = torch.sin(parameter.detach())
            optimizer.step()
    state = made.state[one[0]]
    assert {state["exp_avg"].dtype, state["exp_avg_sq"].dtype} == {torch.float32}
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(one, other, strict=True))


def test_a_parameter_that_would_have_narrow_state_is_refused() -> None:
    with pytest.raises(TypeError, match="bfloat16"):
        optimizers.make(parameters(torch.bfloat16), SETTINGS, torch.device("cpu"))


def test_state_beyond_free_gpu_memory_is_paged(free_bytes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Optim:
        @staticmethod
        def PagedAdamW32bit(params: list[Any], **rates: float) -> str:
            calls.append((params, rates))
            return "paged"

    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", Optim)
    needed = 12 * 72
    free_bytes[0] = needed
    assert type(optimizers.make(parameters(), SETTINGS, torch.device("cuda"))) is torch.optim.AdamW
    free_bytes[0] = needed - 1
    assert optimizers.make(parameters(), SETTINGS, torch.device("cuda")) == "paged"
    (group,), rates = calls[0]
    assert [len(group["params"]), rates] == [3, {"lr": 3e-3, "weight_decay": 0.1, "eps": 1e-8}]


def test_without_bitsandbytes_it_is_refused_with_what_is_missing(
    free_bytes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    free_bytes[0] = 10
    with pytest.raises(BudgetError, match=r"864 bytes.*10 are free[\s\S]*\[quant\]"):
        optimizers.make(parameters(), SETTINGS, torch.device("cuda"))


def test_bitsandbytes_itself_takes_what_make_hands_it(free_bytes: list[int]) -> None:
    pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    free_bytes[0] = 10
    made = optimizers.make(parameters(), SETTINGS, torch.device("cuda"))
    assert type(made).__name__ == "PagedAdamW32bit"
    assert (made.is_paged, made.args.optim_bits) == (True, 32)
    assert (made.param_groups[0]["lr"], made.param_groups[0]["weight_decay"]) == (3e-3, 0.1)


def test_no_scale_where_the_base_is_not_in_fp16() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        made = optimizers.scaler(dtype, torch.device("cpu"))
        loss = torch.tensor(2.0)
        assert not made.is_enabled()
        assert made.scale(loss) is loss


def test_small_gradients_of_an_fp16_base_survive_by_the_scale() -> None:
    def gradients(dtype: torch.dtype, scaler: torch.amp.GradScaler) -> torch.Tensor:
        model = adapters.inject_lora(
            tiny.model().to(dtype), rank=4, alpha=8, dropout=0.0, targets="all-linear", seed=0
        )
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = optimizers.make(trained, SETTINGS, torch.device("cpu"))
        ids = torch.arange(3, 35)[None]
        # as if these 32 tokens were few among the 2^17 of an update
        loss = model(input_ids=ids, labels=ids).loss.float() * 32 / 2**17
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        return torch.cat([parameter.grad.flatten() for parameter in trained])

    wanted = gradients(torch.float32, optimizers.scaler(torch.float32, torch.device("cpu")))
    scaled = gradients(torch.float16, optimizers.scaler(torch.float16, torch.device("cpu")))
    unscaled = gradients(torch.float16, torch.amp.GradScaler("cpu", enabled=False))
    apart = [float((one - wanted).norm() / wanted.norm()) for one in (scaled, unscaled)]
    assert apart[0] < 0.02 < 0.2 < apart[1]


def test_a_wrong_option_is_the_one_that_is_mended() -> None:
    for option, value in (("weight_decay", -1.0), ("warmup_fraction", 1.0)):
        with pytest.raises(ConfigError) as refused:
            ResolvedOptimizer(**{option: value})  # type: ignore[arg-type]
        assert refused.value.remedy.startswith(f"{option}: ")
