"""A run that is killed, stopped or full goes on to the very bits of an uninterrupted one, or says why it will not."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import sartor
from killed_tuning import SETTINGS, WEIGHTS, killed, tune
from sample_data import ROWS, recipe_on, write_jsonl
from sartor.core.artifacts import open_artifact
from sartor.core.errors import ArtifactError, ConfigError, MissingError, ModelError, StoppedError
from sartor.core.filesystem import file_digest
from sartor.core.processes import DeferredSignals
from sartor.models import tensor_files
from sartor.tune import checkpoint, optimizers, resume, sampler
from sartor.tune.checkpoint import RandomState, folder_of, newest, open_checkpoint, seed_all
from sartor.tune.resume import changed, differences
from sartor.tune.training_loop import TrainingRun


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """A shell starts its background jobs with SIGINT ignored, and Python leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def recipe(tune_recipe: dict[str, Any]) -> dict[str, Any]:
    """Ten updates or so."""
    return {**tune_recipe, **SETTINGS}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "a"


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, originals: Path, tiny_base: Path) -> Path:
    """The adapter of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SARTOR_HOME", str(folder / "home"))
        tune({**recipe_on(originals / "dataset", tiny_base), **SETTINGS}, folder / "whole")
    return folder / "whole"


@pytest.fixture
def whole(straight: Path) -> str:
    """Its sha256."""
    return file_digest(straight / WEIGHTS)


def test_what_is_saved_comes_back(monkeypatch: pytest.MonkeyPatch, recipe: dict[str, Any], out: Path) -> None:
    states = []
    save = TrainingRun.save

    def watched(self: TrainingRun) -> None:
        tensors, facts = self.state()
        states.append(({name: tensor.clone() for name, tensor in tensors.items()}, facts, list(self.journal.lines)))
        save(self)

    monkeypatch.setattr(TrainingRun, "save", watched)
    killed(monkeypatch, recipe, out, update=4)
    tensors, facts, lines = states[-1]
    found = newest(folder_of(out)).checkpoint
    assert found is not None and found.update == 3
    held = found.tensors()
    assert set(held) == set(tensors) and all(torch.equal(held[name], tensors[name]) for name in tensors)
    assert {"adapter", "optimizer", "rng"} == {name.split(".")[0] for name in held}
    assert {name: found.manifest[name] for name in facts if name != "wall_s"} == {
        name: value for name, value in facts.items() if name != "wall_s"
    }
    assert found.lines() == lines
    assert found.manifest["schema"] == 1 and found.manifest["position"]["place"] > 0


@pytest.mark.parametrize("updates", [(1,), (2, 3), (4, 5, 6, 9)])
def test_resume_after_kills_is_bit_identical(
    monkeypatch: pytest.MonkeyPatch,
    recipe: dict[str, Any],
    out: Path,
    straight: Path,
    whole: str,
    updates: tuple[int, ...],
) -> None:
    """Also after several kills; the log has each update once, with the figures of a whole run."""
    for place, update in enumerate(updates):
        killed(monkeypatch, recipe, out, update, resume=place > 0)
        # what the process held in its generators is lost with it
        seed_all(99)
    said = tune(recipe, out, resume=True).as_json()
    assert file_digest(out / WEIGHTS) == whole
    assert said["resumed_at"] == [update - 1 for update in updates if update > 1]
    assert not folder_of(out).exists()
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines if "loss" in line] == list(range(1, said["updates"] + 1))
    wanted = [json.loads(line) for line in (straight / "log.jsonl").read_text().splitlines()]
    for key in ("loss", "grad_norm", "learning_rate", "eval_loss"):
        assert [line[key] for line in lines if key in line] == [line[key] for line in wanted if key in line]


@pytest.mark.parametrize("scaled_before", [True, False])
def test_fp16_scale_is_restored_or_started_on_resume(
    monkeypatch: pytest.MonkeyPatch, recipe: dict[str, Any], out: Path, whole: str, scaled_before: bool
) -> None:
    """A run saved without a scaler may go on where a scaler is needed, to the same bits."""

    def scaled(scale: float) -> None:
        monkeypatch.setattr(optimizers, "scaler", lambda *arguments: torch.amp.GradScaler("cpu", init_scale=scale))

    if scaled_before:
        scaled(2.0**9)
    killed(monkeypatch, recipe, out, update=4)
    scaled(2.0**8)
    kept: list[float] = []
    restore = TrainingRun.restore

    def watched(self: TrainingRun, found: checkpoint.Checkpoint) -> None:
        restore(self, found)
        kept.append(self.scaler.get_scale())

    monkeypatch.setattr(TrainingRun, "restore", watched)
    tune(recipe, out, resume=True)
    assert kept == [2.0**9 if scaled_before else 2.0**8]
    assert file_digest(out / WEIGHTS) == whole  # a power of two scales without rounding


def test_between_saves_updates_are_done_again(
    monkeypatch: pytest.MonkeyPatch, recipe: dict[str, Any], out: Path, whole: str
) -> None:
    seldom = {**recipe, "checkpoints": {"every_minutes": 1000}}
    monkeypatch.setattr(checkpoint.Saver, "is_due", property(lambda self: self._saved_update == 0))
    killed(monkeypatch, seldom, out, update=7)
    assert [path.name for path in folder_of(out).iterdir()] == ["update-00000001"]
    assert tune(recipe, out, resume=True).as_json()["resumed_at"] == [1]
    assert file_digest(out / WEIGHTS) == whole


def damage_truncate(path: Path) -> None:
    state = path / "state.safetensors"
    os.truncate(state, state.stat().st_size // 2)


def damage_flip(path: Path) -> None:
    state = path / "state.safetensors"
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)


def damage_manifest(path: Path) -> None:
    file = path / "checkpoint.json"
    file.write_text(file.read_text().replace('"epoch": 0', '"epoch": 1'))


def damage_half_manifest(path: Path) -> None:
    file = path / "checkpoint.json"
    file.write_text(file.read_text()[:200])


def damage_missing(path: Path) -> None:
    (path / "log.jsonl").unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_truncate, "state.safetensors has"),
        (damage_flip, "state.safetensors was changed"),
        (damage_manifest, "checkpoint.json was changed"),
        (damage_half_manifest, "cannot be read"),
        (damage_missing, "log.jsonl is missing"),
    ],
)
def test_damaged_checkpoint_falls_back_to_the_previous(
    monkeypatch: pytest.MonkeyPatch, recipe: dict[str, Any], out: Path, damage: Any, said: str
) -> None:
    """The notice names the damage; the run goes on after update 2 and saves update 3 again."""
    killed(monkeypatch, recipe, out, update=4)
    damage(folder_of(out) / "update-00000003")
    notices: list[str] = []
    killed(monkeypatch, recipe, out, update=4, resume=True, notice=notices.append)
    assert any("update-00000003" in line and said in line for line in notices), notices
    assert any("going on after update 2" in line for line in notices), notices
    assert open_checkpoint(folder_of(out) / "update-00000003")  # made again


def test_of_another_schema_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, recipe: dict[str, Any], out: Path
) -> None:
    killed(monkeypatch, recipe, out, update=2)
    file = folder_of(out) / "update-00000001" / "checkpoint.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "schema": 2}))
    with pytest.raises(ArtifactError, match="its schema is 2; this version of Sartor reads 1"):
        open_checkpoint(file.parent)
    with pytest.raises(ConfigError, match="left only damaged checkpoints"):
        tune(recipe, out)


def test_older_checkpoints_are_pruned(monkeypatch: pytest.MonkeyPatch, recipe: dict[str, Any], out: Path) -> None:
    killed(monkeypatch, {**recipe, "checkpoints": {"every_minutes": 0, "keep": 3}}, out, update=7)
    assert sorted(path.name for path in folder_of(out).iterdir()) == [f"update-{n:08d}" for n in (4, 5, 6)]


def test_unfinished_run_needs_resume_or_replace(
    monkeypatch: pytest.MonkeyPatch, recipe: dict[str, Any], out: Path, whole: str
) -> None:
    """Both flags together are refused; --replace starts anew and removes the checkpoints."""
    killed(monkeypatch, recipe, out, update=4)
    with pytest.raises(ConfigError, match="reached update 3") as refused:
        tune({**recipe, "base": "/nowhere"}, out)
    assert "--resume" in refused.value.remedy and "--replace" in refused.value.remedy
    with pytest.raises(ConfigError, match="both were given"):
        tune(recipe, out, resume=True, replace=True)
    said = tune(recipe, out, replace=True).as_json()
    assert said["resumed_at"] == [] and file_digest(out / WEIGHTS) == whole
    assert not folder_of(out).exists()


def test_resume_starts_anew_or_returns_the_finished_run(recipe: dict[str, Any], out: Path) -> None:
    """Without a checkpoint it starts at the beginning; a finished run of another recipe is refused."""
    notices: list[str] = []
    made = tune(recipe, out, resume=True, notice=notices.append)
    assert any("starting from the beginning" in line for line in notices)
    folder_of(out).mkdir()  # as a kill between the rename and the clearing leaves it
    again = tune(recipe, out, resume=True, notice=notices.append)
    assert again.adapter.id == made.adapter.id and "is finished" in notices[-1]
    assert not folder_of(out).exists()
    with pytest.raises(ConfigError, match="is of another run: recipe method.rank: 8 -> 4"):
        tune({**recipe, "method": {**recipe["method"], "rank": 4}}, out, resume=True)


def test_checkpoint_resumed_by_another_process_is_not_read(
    monkeypatch: pytest.MonkeyPatch, recipe: dict[str, Any], out: Path
) -> None:
    """The ConfigError names the checkpoint that went missing meanwhile."""
    killed(monkeypatch, recipe, out, update=3)
    before = resume.finished

    def meanwhile(*arguments: Any) -> Any:
        (folder_of(out) / "update-00000002").rename(out.with_name("gone"))
        return before(*arguments)

    monkeypatch.setattr(resume, "finished", meanwhile)
    with pytest.raises(ConfigError, match="another process went on from .*update-00000002 meanwhile"):
        tune(recipe, out, resume=True)


def test_resumed_replace_run_replaces_its_old_adapter(
    monkeypatch: pytest.MonkeyPatch, recipe: dict[str, Any], out: Path
) -> None:
    """The old adapter stays until then, and the resume needs no second --replace."""
    old = tune({**recipe, "seed": 5}, out).adapter.id
    killed(monkeypatch, recipe, out, update=3, replace=True)
    assert open_artifact(out).id == old
    assert tune(recipe, out, resume=True).as_json()["resumed_at"] == [2]
    assert open_artifact(out).id != old


def test_resume_with_other_recipe_dataset_or_base_is_refused(
    monkeypatch: pytest.MonkeyPatch, recipe: dict[str, Any], out: Path, tmp_path: Path
) -> None:
    """The error says what differs; a moved Dataset and other checkpoint settings are accepted."""
    import tiny

    killed(monkeypatch, recipe, out, update=2)
    method = {**recipe["method"], "rank": 4}
    with pytest.raises(ConfigError, match="recipe method.rank: 8 -> 4; recipe seed: 0 -> 3"):
        tune({**recipe, "method": method, "seed": 3}, out, resume=True)
    write_jsonl(tmp_path / "fewer.jsonl", ROWS[:30])
    sartor.curate({"sources": [str(tmp_path / "fewer.jsonl")]}, tmp_path / "fewer")
    with pytest.raises(ConfigError, match=r"dataset: digest [0-9a-f]{16} -> [0-9a-f]{16}"):
        tune({**recipe, "data": str(tmp_path / "fewer")}, out, resume=True)
    other = tiny.write_base(tmp_path / "other", tiny.CHATML + "{# another #}")
    with pytest.raises(ConfigError, match=r"base: digest [0-9a-f]{16} -> [0-9a-f]{16}"):
        tune({**recipe, "base": str(other)}, out, resume=True)
    assert newest(folder_of(out)).checkpoint, "a refusal leaves the checkpoint as it is"
    moved = tmp_path / "moved"
    Path(recipe["data"]["path"]).rename(moved)
    settings = {"every_minutes": 5.0, "keep": 1}
    assert tune({**recipe, "data": str(moved), "checkpoints": settings}, out, resume=True).as_json()["resumed_at"] == [
        1
    ]


def test_other_threads_or_versions_are_said_and_not_refused(
    monkeypatch: pytest.MonkeyPatch, recipe: dict[str, Any], out: Path
) -> None:
    killed(monkeypatch, recipe, out, update=2)
    monkeypatch.setattr("sartor.tune.resume.environment", lambda base: {"threads": 64, "torch": "9.9"})
    notices: list[str] = []
    tune(recipe, out, resume=True, notice=notices.append)
    assert any("threads" in line and "-> 64" in line and "last bits" in line for line in notices), notices
    assert list(changed({"threads": 2}, {"threads": 2})) == []


def test_differences_are_named_option_by_option() -> None:
    was = {"recipe": {"a": {"b": 1, "c": [1]}, "data": {"path": "x"}}, "dataset": "0" * 64}
    now = {"recipe": {"a": {"b": 2, "c": [1]}, "data": {"path": "y"}}, "dataset": "1" * 64}
    assert differences(was, now) == [f"dataset: digest {'0' * 16} -> {'1' * 16}", "recipe a.b: 1 -> 2"]
    assert differences(was, was) == []


def test_what_auto_came_to_is_taken_over(monkeypatch: pytest.MonkeyPatch, recipe: dict[str, Any], out: Path) -> None:
    from sartor.tune import cost_model

    with monkeypatch.context() as scarce:
        scarce.setattr(cost_model, "LADDER", (40,))
        killed(scarce, recipe, out, update=2)
    seen = []
    train = TrainingRun.train
    monkeypatch.setattr(
        TrainingRun,
        "train",
        lambda self, signals: (seen.append(self.resolved.micro_batch_tokens), train(self, signals)),
    )
    tune(recipe, out, resume=True)
    assert seen == [46]  # the longest row; where nothing is scarce it would be 128


def test_nan_or_exploding_loss_saves_the_state_before_it(
    monkeypatch: pytest.MonkeyPatch, recipe: dict[str, Any], out: Path, whole: str
) -> None:
    """The error names update and rows; a resume ends with the bits of a whole run."""
    check = TrainingRun._check
    for bad in (float("nan"), 1e4):
        with monkeypatch.context() as patch:
            patch.setattr(
                TrainingRun,
                "_check",
                lambda self, rows, loss, norm: check(self, rows, bad if self.counters.updates == 3 else loss, norm),
            )
            patch.setattr(checkpoint.Saver, "is_due", False)
            with pytest.raises(ModelError, match="update 4: the loss is .* rows [0-9a-f]{8}") as stopped:
                tune(recipe, out, resume=bad == 1e4)
        assert ("over the limit of" in stopped.value.problem) == (bad == 1e4)
        found = newest(folder_of(out)).checkpoint
        assert found is not None and found.update == 3
    tune(recipe, out, resume=True)
    assert file_digest(out / WEIGHTS) == whole, "the generators too are those before the bad update"


def full(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """The disk is full from the `at`-th save on."""
    count = 0
    write = tensor_files.write_tensors

    def fails(tensors: Any, path: Path) -> None:
        nonlocal count
        count += 1
        if count >= at:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(tensors, path)

    monkeypatch.setattr(checkpoint, "write_tensors", fails)


def test_a_full_disk_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, recipe: dict[str, Any], out: Path, whole: str
) -> None:
    with (
        monkeypatch.context() as patch,
        pytest.raises(MissingError, match="the disk is full: the checkpoint .*00003") as failed,
    ):
        full(patch, at=3)
        tune(recipe, out)
    assert failed.value.exit_code == 6 and "--resume" in failed.value.remedy
    assert sorted(path.name for path in folder_of(out).iterdir()) == ["update-00000001", "update-00000002"]
    with (
        monkeypatch.context() as patch,
        pytest.raises(MissingError, match=f"the disk is full: {out} could not be written"),
    ):
        from sartor.models import adapters

        def no_room(*arguments: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(adapters, "write_adapter", no_room)
        tune(recipe, out, resume=True)
    assert not out.exists() and newest(folder_of(out)).checkpoint
    tune(recipe, out, resume=True)
    assert file_digest(out / WEIGHTS) == whole


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_run_after_a_saved_update(
    monkeypatch: pytest.MonkeyPatch, recipe: dict[str, Any], out: Path, whole: str, number: signal.Signals
) -> None:
    """SIGINT and SIGTERM exit with 128 + number and name --resume, which gives the same bits."""
    update = TrainingRun._update
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]

    def signalled(self: TrainingRun, rows: Any) -> None:
        if self.counters.updates == 4:
            signal.raise_signal(number)
        update(self, rows)

    with monkeypatch.context() as patch, pytest.raises(StoppedError, match=f"{number.name} after update 5") as stopped:
        patch.setattr(TrainingRun, "_update", signalled)
        tune({**recipe, "checkpoints": {"every_minutes": 60}}, out)
    assert stopped.value.exit_code == 128 + number and "--resume" in stopped.value.remedy
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    tune(recipe, out, resume=True)
    assert file_digest(out / WEIGHTS) == whole


def test_a_second_signal_does_what_it_always_did() -> None:
    with pytest.raises(KeyboardInterrupt), DeferredSignals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGINT
        signal.raise_signal(signal.SIGINT)


def test_signals_stay_unchanged_in_threads_or_if_ignored() -> None:
    """DeferredSignals replaces no handler outside the main thread, and none that is SIG_IGN."""
    seen = []

    def inside() -> None:
        with DeferredSignals():
            seen.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [before]
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with DeferredSignals():
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, old)


def test_every_generator_goes_on_where_it_was() -> None:
    device = torch.device("cpu")
    seed_all(3)
    random.gauss(0, 1), np.random.standard_normal(), torch.rand(3)  # halves of pairs are state too
    held = RandomState.capture(device)
    again = RandomState.read(
        {name: tensor.clone() for name, tensor in held.tensors().items()}, json.loads(json.dumps(held.facts()))
    )

    def draw() -> list[float]:
        return [random.gauss(0, 1), random.random(), float(np.random.standard_normal()), float(torch.rand(1))]

    first = draw()
    again.put_back(device)
    assert draw() == first


def test_updates_go_on_from_any_position() -> None:
    lengths = [3, 5, 2, 9, 4, 1, 7]
    whole = sampler.iterate_updates(lengths, 8, seed=3)
    position = sampler.START
    for _ in range(12):
        rest = sampler.iterate_updates(lengths, 8, 3, position)
        expected = next(whole)
        assert next(rest) == expected
        position = position.after(len(expected), len(lengths))
    assert position.epoch > 1


# Real processes, real signals


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(commands: dict[str, str]) -> Start:
    """`sartor tune RECIPE --out OUT` and further flags, begun."""

    def start(recipe: Path, out: Path, *flags: str) -> subprocess.Popen[str]:
        command = ["sartor", "tune", str(recipe), "--out", str(out), "--json", *flags]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **commands}
        )

    return start


def wait_for(process: subprocess.Popen[str], condition: Any) -> None:
    while process.poll() is None and not condition():
        time.sleep(0.0005)


@pytest.fixture
def slow(tmp_path: Path, recipe: dict[str, Any]) -> tuple[Path, str]:
    """A recipe of 150 updates, and the sha256 of its adapter (made in this process, which has as many threads)."""
    longer = {**recipe, "budget": {"updates": 150}}
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(longer))
    tune(longer, tmp_path / "whole")
    return tmp_path / "t.yaml", file_digest(tmp_path / "whole" / WEIGHTS)


@pytest.mark.services
@pytest.mark.parametrize("inside_save", [False, True])
def test_sigkill_and_resume_give_the_same_bits(
    slow: tuple[Path, str], out: Path, start: Start, inside_save: bool
) -> None:
    file, whole = slow
    folder = folder_of(out)
    inside = 0
    # A kill that comes after the save it was meant for counts for nothing: there are several.
    for least in (3, 9, 15, 21, 27, 33, 39) if inside_save else (3, 20, 41):
        process = start(file, out, "--resume")

        def reached(least: int = least) -> bool:
            newest_number = max((int(path.name[7:]) for path in folder.glob("update-*")), default=0)
            return newest_number >= least and (not inside_save or bool(list(folder.glob(".update-*.part-*"))))

        wait_for(process, reached)
        process.kill()
        process.communicate()
        inside += bool(list(folder.glob(".update-*.part-*")))
    assert process.returncode == -signal.SIGKILL
    assert inside or not inside_save
    process = start(file, out, "--resume")
    assert process.communicate(timeout=600) and process.returncode == 0
    assert file_digest(out / WEIGHTS) == whole
    assert sorted(path.name for path in out.parent.glob("*a*") if path.name.startswith(("a", ".a"))) == ["a"]


@pytest.mark.services
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_from_outside_ends_cleanly(
    slow: tuple[Path, str], out: Path, start: Start, number: signal.Signals
) -> None:
    file, whole = slow
    process = start(file, out)
    wait_for(process, lambda: folder_of(out).is_dir())
    process.send_signal(number)
    said, told = process.communicate(timeout=600)
    assert process.returncode == 128 + number, told
    assert "finished and saved" in told
    error = json.loads(said.splitlines()[-1])["error"]
    assert error["kind"] == "StoppedError" and "--resume" in error["remedy"]
    process = start(file, out, "--resume")
    assert process.communicate(timeout=600) and process.returncode == 0
    assert file_digest(out / WEIGHTS) == whole


@pytest.mark.services
def test_a_disk_that_is_really_full(tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system of a few hundred kB holds a checkpoint or two, and not the third beside them.

    Something else fills it after the run has looked at it.
    """
    monkeypatch.setattr("sartor.tune.preflight.check_disk", lambda *given, **named: None)
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)], capture_output=True, check=False
    ).returncode:
        pytest.skip("mounting a file system needs root: sudo -E make test")
    try:
        with pytest.raises(MissingError, match="the disk is full"):
            tune(recipe, disk / "a")
        assert newest(folder_of(disk / "a")).checkpoint
        subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
        tune(recipe, disk / "a", resume=True)
        tune(recipe, tmp_path / "whole")
        assert file_digest(disk / "a" / WEIGHTS) == file_digest(tmp_path / "whole" / WEIGHTS)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
