"""The tuner as a real process: no network, a cgroup's limit, a kill for memory, a pause, and the starter's own size."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from edge_jobs import adapter, job, key, rows  # noqa: F401
from sartor.core import model_refs
from sartor.core.resource_limits import ResourceLimits, holder, run
from sartor.core.signing import open_public
from sartor.edge.tuning import budgeted_tuning
from sartor.edge.tuning.budgeted_tuning import (
    DeviceBudget,
    planned_job,
    tune_within_budget,
    verify_receipt,
)
from sartor.edge.tuning.memory_plan import MemoryBaseline, MemorySetting, Planner
from sartor.edge.tuning.tuning_job import tuner_command

MB = 1_000_000
ALONE = ["unshare", "--net", "--map-root-user", "--user"]


def needs_cgroup() -> Any:
    made = holder(100 << 20)
    made.close()
    return pytest.mark.skipif(not made.name.startswith("cgroup"), reason="no cgroup can be made here: run as root")


def can_be_alone() -> bool:
    for command in (["unshare", "--net"], ALONE):
        if (
            shutil.which("unshare")
            and not subprocess.run([*command, "true"], capture_output=True, check=False).returncode
        ):
            ALONE[:] = command
            return True
    return False


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.services
@pytest.mark.skipif(
    not can_be_alone(), reason="no network namespace can be made here: run as root, with util-linux's unshare"
)
def test_it_tunes_where_there_is_no_network_interface(tiny_base: Path, tmp_path: Path) -> None:
    one = job(tiny_base, tmp_path, updates=2)
    one.write(tmp_path / "job.json")
    code = (
        "import sys, os, socket\n"
        "assert [name for _, name in socket.if_nameindex()] in ([], ['lo']), socket.if_nameindex()\n"
        "try: socket.create_connection(('127.0.0.1', 9), 1)\n"
        "except OSError as error: assert error.errno == 101, error  # unreachable: not even the loopback is up\n"
        "from sartor.edge.tuning.tuner_process import main\nsys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [*ALONE, sys.executable, "-c", code, str(tmp_path / "job.json")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(adapter(one)) > 0


@pytest.mark.services
@needs_cgroup()
@pytest.mark.usefixtures("threads")
def test_a_memory_kill_goes_on_smaller_and_is_in_the_receipt(tiny_base: Path, tmp_path: Path, key: Path) -> None:
    one = job(tiny_base, tmp_path, updates=6, rows=rows(length=480), recipe={"optimizer": {"batch_tokens": 480}})
    planner = Planner(one)
    least = sum(planner.predict_peak(MemorySetting("recompute", 2, 484)).values())

    class Rash(Planner):
        """Believes that the first rung needs nothing."""

        def held(self, rung: MemorySetting) -> dict[str, int]:
            return {"floor": least - MB} if rung.name == "lora" else super().predict_peak(rung)

    hog = tmp_path / "hog.py"
    hog.write_text(
        "import json, sys\nfrom sartor.edge.tuning import tuner_process\n"
        "job = json.load(open(sys.argv[1]))\n"
        "held = bytearray(0 if job['recipe']['compute']['recompute'] else 400_000_000)\n"
        "held[::4096] = b'x' * len(held[::4096])\n"
        "sys.exit(tuner_process.main(sys.argv[1:]))\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budgeted_tuning, "tuner_command", lambda file: [sys.executable, str(hog), str(file)])
        receipt = tune_within_budget(
            one, DeviceBudget(memory_bytes=least + 40 * MB), key=key, planner=Rash(one, planner.floor)
        )
    assert [attempt.rung for attempt in receipt.attempts] == ["lora", "recompute"]
    first, last = receipt.attempts
    assert (first.usage.killed, first.reason, last.usage.exit_code) == ("memory", "memory", 0)
    assert last.usage.held_by.startswith("cgroup") and last.usage.peak_bytes <= least + 40 * MB
    assert verify_receipt(Path(one.out), [open_public(key.with_name("sartor.pub"))]).outcome == "done"


@pytest.mark.services
@pytest.mark.usefixtures("threads")
def test_resume_after_policy_and_signal_is_bit_identical(tiny_base: Path, tmp_path: Path, key: Path) -> None:
    """The policy pauses the run once, SIGTERM a second time; the adapter is that of an uninterrupted run."""
    whole, cut = job(tiny_base, tmp_path / "a", updates=300), job(tiny_base, tmp_path / "b", updates=300)
    planner = Planner(whole, MemoryBaseline(200 * MB, True))
    assert tune_within_budget(whole, DeviceBudget(), key=key, planner=planner).outcome == "done"

    def after(updates: int) -> Iterator[str]:
        log = Path(cut.out) / "log.jsonl"
        while not log.exists() or log.read_text().count('"update"') < updates:
            yield ""
        while True:
            yield "it is hot"

    asked = after(5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budgeted_tuning, "ASK_S", 0.0)
        receipt = tune_within_budget(cut, DeviceBudget(), key=key, policy=lambda: next(asked), planner=planner)
    assert (receipt.outcome, receipt.reason) == ("paused", "it is hot") and 5 <= receipt.attempts[0].updates < 300

    tuning = threading.Event()

    def tell() -> None:
        log = Path(cut.out) / "log.jsonl"
        while tuning.is_set() and log.read_text().count('"update"') < receipt.attempts[0].updates + 5:
            time.sleep(0.01)
        if tuning.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda *_: None)  # one that comes late must not end pytest
    tuning.set()
    teller = threading.Thread(target=tell)
    teller.start()
    second = tune_within_budget(cut, DeviceBudget(), key=key, planner=planner)
    tuning.clear()
    teller.join()
    signal.signal(signal.SIGTERM, before)
    assert (second.outcome, second.reason) == ("paused", "SIGTERM")
    third = tune_within_budget(cut, DeviceBudget(), key=key, planner=planner)
    assert third.outcome == "done" and len(third.resumed_at) == 2
    assert json.loads((Path(cut.out) / "run.json").read_text())["resumed_at"] == third.resumed_at
    ends = adapter(whole), adapter(cut)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.services
@needs_cgroup()
@pytest.mark.usefixtures("threads")
def test_the_starter_is_held_as_it_was_predicted(tmp_path: Path) -> None:
    found = sorted((Path.home() / ".cache/sartor/bases").glob("starter-*"))
    if not found:
        pytest.skip(f"the {model_refs.STARTER} base is not converted: sartor demo does it once")
    one = job(
        found[0], tmp_path, updates=1, rows=rows(4, 252), recipe={"method": {"kind": "lora", "rank": 8, "alpha": 16}}
    )
    planner = Planner(one)
    rung = MemorySetting("recompute", planner.shape.layers, planner.rows.longest)
    predicted = sum(planner.predict_peak(rung).values())
    planned_job(one, rung).write(tmp_path / "job.json")
    used = run(
        tuner_command(tmp_path / "job.json"),
        ResourceLimits(memory_bytes=round(1.04 * predicted)),
        log=tmp_path / "stderr",
    )
    assert used.exit_code == 0, (used, (tmp_path / "stderr").read_text()[-500:])
    assert used.peak_bytes == pytest.approx(predicted, rel=0.1)
