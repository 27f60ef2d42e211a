"""The first rung that fits is taken, the largest micro-batch on it, and a refusal names the least limit that would do."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from edge_jobs import job, rows
from sartor.core.errors import ArtifactError, BudgetError, ModelError
from sartor.edge.tuning.memory_plan import NAMES, MemoryBaseline, Planner
from sartor.edge.tuning.peak_memory import DeviceLoad, DeviceModelShape, MemoryMode, peak, total

FLOOR = MemoryBaseline(100_000_000, True)


@pytest.fixture
def planner(tiny_base: Path, tmp_path: Path) -> Planner:
    made = Planner(job(tiny_base, tmp_path, updates=1, rows=rows(length=200)), FLOOR)
    # of the size of a base for devices, with the tiny one's rows
    made.shape = DeviceModelShape(
        30, 576, 1536, 9, 3, 64, 49152, 8, ("q_proj", "v_proj", "down_proj"), 30, 269_000_000
    )
    made.recipe = replace(made.recipe, optimizer=replace(made.recipe.optimizer, batch_tokens=816))
    return made


def test_each_rung_needs_less_than_the_one_before(planner: Planner) -> None:
    needs: dict[str, int] = {}
    for rung in planner.rungs():
        needs[rung.name] = min(needs.get(rung.name, 1 << 60), total(planner.predict_peak(rung)))
    assert list(needs) == list(NAMES)
    assert sorted(needs.values(), reverse=True) == list(needs.values())


def test_less_memory_shrinks_micro_batch_before_the_next_rung(planner: Planner) -> None:
    """Below the last rung the refusal names the least limit that is enough."""
    seen = []
    for megabytes in range(900, 90, -2):
        try:
            plan = planner.choose(megabytes * 1_000_000)
        except BudgetError as error:
            least = int(re.search(r"at least ([\d,]+) bytes", error.remedy)[1].replace(",", ""))  # type: ignore[index]
            assert planner.choose(least).rung.name == "zeroth"
            with pytest.raises(BudgetError):
                planner.choose(least - 2_000_000)
            break
        assert plan.peak_bytes < megabytes * 1_000_000
        if not seen or seen[-1] != plan.rung:
            seen.append(plan.rung)
    assert [NAMES.index(rung.name) for rung in seen] == sorted(NAMES.index(rung.name) for rung in seen)
    assert {rung.name for rung in seen} == set(NAMES)
    first = [rung.micro_batch_tokens for rung in seen if rung.name == "lora"]
    assert first == sorted(first, reverse=True) and first[0] > first[-1] == planner.rows.longest


def test_no_limit_is_the_first_rung_and_a_barred_one_is_left_out(planner: Planner) -> None:
    assert planner.choose(0).rung.name == "lora"
    assert planner.choose(0, barred=["lora", "recompute"]).rung.id == "layers-20"
    assert planner.choose(0, barred=["lora", "recompute", "layers-20"]).rung.id == "layers-10"
    every = {rung.id for rung in planner.rungs()}
    with pytest.raises(BudgetError, match="used up"):
        planner.choose(0, barred=every)


def test_4_bit_base_is_read_where_16_bit_pages_do_not_fit(planner: Planner) -> None:
    """Without a limit, or without a base in 4 bits, the 16-bit base is read."""
    assert not planner.choose(0, narrow_bytes=117_000_000).is_narrow
    assert planner.choose(400_000_000, narrow_bytes=117_000_000).is_narrow
    assert not planner.choose(400_000_000).is_narrow


def test_zeroth_order_mode_has_no_gradients_and_no_moments() -> None:
    """With fewer trained layers all factors stay in memory, and moments shrink in proportion."""
    shape = DeviceModelShape(30, 576, 1536, 9, 3, 64, 49152, 8, ("q_proj",), 30, 0)
    held = peak(shape, DeviceLoad(256, 192, 256, False, 10_000), MemoryMode(30, True, zeroth=True), 0)
    assert held["moments"] == 0 and "gradients" not in held and held["factors"] == 4 * 30 * 8 * 2 * 576
    fewer = peak(shape, DeviceLoad(256, 192, 256, False, 10_000), MemoryMode(10, True), 0)
    assert fewer["factors"] == held["factors"] and fewer["moments"] == 2 * held["factors"] // 3


def test_what_is_not_whole_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    one = job(tiny_base, tmp_path, updates=1)
    with pytest.raises(ModelError, match="not whole"):
        Planner(replace(one, base=str(tmp_path)), FLOOR)
    Path(one.tokens).write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="not whole"):
        Planner(one, FLOOR)


def test_planning_loads_no_torch() -> None:
    code = "import sys, sartor.edge.tuning.budgeted_tuning\nsys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_attention_without_a_compiler_is_planned_as_quadratic(planner: Planner) -> None:
    """At least 4 bytes for each head and pair of tokens of the longest row."""
    rung = next(planner.rungs())
    native = total(planner.predict_peak(rung))
    planner.floor = MemoryBaseline(FLOOR.held_bytes, False)
    assert total(planner.predict_peak(rung)) > native + 4 * 9 * planner.rows.longest**2
