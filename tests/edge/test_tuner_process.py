"""The device's tuner: torch alone, the loop of `tune`, an adapter that PEFT opens, and a kill that costs nothing."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import edge_jobs
from edge_jobs import rows
from sartor.core.errors import ArtifactError, ConfigError, ModelError
from sartor.edge.tuning.tuner_process import read_tokens, tune, write_tokens
from sartor.edge.tuning.tuning_job import TuningJob
from sartor.models import adapters
from sartor.models.base import open_base
from sartor.models.losses import transformers_backend


def job(tiny_base: Path, folder: Path, **changes: Any) -> TuningJob:
    recipe = {"compute": {"recompute": True}, **changes.pop("recipe", {})}
    return edge_jobs.job(tiny_base, folder, 40, recipe=recipe, **changes)


def test_tokens_are_read_as_they_were_written(tmp_path: Path) -> None:
    given = rows()
    write_tokens(given, tmp_path / "t")
    found = read_tokens(tmp_path / "t")
    assert (found.train, found.held_out) == (given.train, given.held_out)
    (tmp_path / "t").write_bytes((tmp_path / "t").read_bytes()[:-9])
    with pytest.raises(ArtifactError, match="not whole"):
        read_tokens(tmp_path / "t")


def test_tuned_adapter_opens_in_peft_with_the_same_loss(tiny_base: Path, tmp_path: Path) -> None:
    """The loss falls, and transformers and PEFT compute the held-out loss that the device reported."""
    said = tune(job(tiny_base, tmp_path))
    assert said["updates"] == 40 and said["loss"]["last"] < 0.97 * said["loss"]["first"]
    base = open_base(str(tiny_base), bits=32, device=torch.device("cpu"))
    model = adapters.open_adapter(base.model, tmp_path / "out")
    with torch.no_grad():
        losses = transformers_backend.row_losses(model, rows().held_out, "cpu")
    assert float(losses.mean()) == pytest.approx(said["loss"]["eval"], abs=1e-5)


def test_it_goes_on_from_an_adapter_that_stands(tiny_base: Path, tmp_path: Path) -> None:
    first = tune(job(tiny_base, tmp_path / "a"))
    second = tune(job(tiny_base, tmp_path / "b", start=str(tmp_path / "a/out")))
    assert second["loss"]["first"] < 1.1 * first["loss"]["last"]
    with pytest.raises(ModelError, match="other factors"):
        tune(
            job(
                tiny_base,
                tmp_path / "c",
                start=str(tmp_path / "a/out"),
                recipe={"method": {"kind": "lora", "rank": 2}},
            )
        )


@pytest.mark.parametrize(
    ("recipe", "problem"),
    [
        ({"method": {"kind": "lora", "dropout": 0.1}}, "without dropout"),
        ({"method": {"kind": "lora", "targets": ["nose"]}}, "has no nose"),
    ],
)
def test_a_recipe_that_a_device_cannot_follow_is_refused(
    tiny_base: Path, tmp_path: Path, recipe: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        tune(job(tiny_base, tmp_path, recipe=recipe))


@pytest.mark.services
def test_resume_after_kill_is_bit_identical(tiny_base: Path, tmp_path: Path) -> None:
    """After SIGKILL and SIGTERM; the process imports neither transformers nor peft."""
    whole = job(tiny_base, tmp_path / "whole", recipe={"budget": {"updates": 300}})
    cut = job(tiny_base, tmp_path / "cut", recipe={"budget": {"updates": 300}})
    code = (
        "import sys\nfrom sartor.edge.tuning.tuner_process import main\ncode = main(sys.argv[1:])\n"
        "assert not {'transformers', 'peft'} & set(sys.modules)\nsys.exit(code)"
    )

    def start(one: TuningJob) -> subprocess.Popen[bytes]:
        file = Path(one.out).with_name("job.json")
        one.write(file)
        return subprocess.Popen([sys.executable, "-c", code, str(file)], stderr=subprocess.PIPE)

    with start(whole) as process:
        assert process.wait() == 0
    for number in (signal.SIGKILL, signal.SIGTERM):
        with start(cut) as process:
            log = Path(cut.out) / "log.jsonl"
            before = log.read_text().count('"update"') if log.exists() else 0
            while process.poll() is None and (not log.exists() or log.read_text().count('"update"') < before + 5):
                time.sleep(0.005)
            process.send_signal(number)
            assert process.wait() in (-9, 143)
    with start(cut) as process:
        assert process.wait() == 0
    ends = [load_file(str(Path(one.out) / "adapter_model.safetensors")) for one in (whole, cut)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0]) and len(ends[0]) > 0
    assert json.loads((Path(cut.out) / "run.json").read_text())["resumed_at"]
    shutil.rmtree(tmp_path / "cut")
