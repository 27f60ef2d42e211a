"""Copies of a run's log: read back by the trackers' own readers, each step once, also after a kill, and without a row."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import sartor
from killed_tuning import SETTINGS, WEIGHTS, killed, tune
from sample_data import ROWS
from sartor.core.artifacts import open_artifact
from sartor.core.errors import ConfigError, ExtraError
from sartor.core.filesystem import file_digest
from sartor.tune import trackers

# the packages' own warnings: of protobuf, of pkg_resources and of pydantic, at import and at use
pytestmark = [
    pytest.mark.usefixtures("fp32"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
Points = dict[str, list[tuple[int, float]]]
BOTH = ("tensorboard", "mlflow")


def run_folder(folder: Path) -> Path:
    (found,) = (folder / "tensorboard").iterdir()
    return found


def tensorboard_points(folder: Path) -> tuple[Points, dict[str, str]]:
    """Scalars by name, and texts, of the only run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_folder(folder)), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    points = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in tags["scalars"]}
    texts = {}
    for name in (tag for tag in tags["tensors"] if tag.endswith("/text_summary")):
        texts[name.removesuffix("/text_summary")] = events.Tensors(name)[-1].tensor_proto.string_val[0].decode()
    return points, texts


def mlflow_run(folder: Path) -> tuple[Any, Any]:
    """The client and the only run."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("sartor")
    (run,) = client.search_runs([experiment.experiment_id])
    return client, run


def mlflow_points(folder: Path) -> Points:
    client, run = mlflow_run(folder)
    points = {}
    for name in run.data.metrics:
        history = sorted(client.get_metric_history(run.info.run_id, name), key=lambda metric: metric.step)
        points[name] = [(metric.step, metric.value) for metric in history]
    return points


READERS = {"tensorboard": lambda folder: tensorboard_points(folder)[0], "mlflow": mlflow_points}


def expected_points(adapter: Path) -> Points:
    """What the log of a finished run says, by the trackers' names."""
    points: Points = {}
    for text in (adapter / "log.jsonl").read_text().splitlines():
        for value in trackers.values_of(json.loads(text), 0.0):
            points.setdefault(value.name, []).append((value.step, value.value))
    return points


def assert_same(found: Points, expected: Points) -> None:
    assert found.keys() == expected.keys()
    for name, points in expected.items():
        assert [step for step, _ in found[name]] == [step for step, _ in points], name
        assert [value for _, value in found[name]] == pytest.approx([value for _, value in points], rel=1e-6), name


@pytest.fixture
def tracked(tmp_path: Path, tune_recipe: dict[str, Any]) -> dict[str, Any]:
    return {**tune_recipe, "track": {"to": list(BOTH), "folder": str(tmp_path / "tracking")}}


def test_both_trackers_have_each_update_once(tmp_path: Path, tracked: dict[str, Any]) -> None:
    """Losses, rate, speed and memory of each update, and the held-out losses, as the log has them."""
    tune(tracked, tmp_path / "faq")
    expected = expected_points(tmp_path / "faq")
    updates = [step for step, _ in expected["train/loss"]]
    assert updates == list(range(1, len(updates) + 1)) and len(updates) > 4
    assert {"train/loss", "train/learning_rate", "train/tokens_per_s", "train/memory_bytes", "eval/loss"} <= set(
        expected
    )
    for read in READERS.values():
        assert_same(read(tmp_path / "tracking"), expected)


def test_trackers_know_recipe_and_artefacts_and_no_row(tmp_path: Path, tracked: dict[str, Any]) -> None:
    """Parameters, tags, card and plot are there; no prompt or reply is in any byte of either."""
    tune(tracked, tmp_path / "faq")
    manifest = open_artifact(tmp_path / "faq").manifest
    folder = tmp_path / "tracking"
    _, texts = tensorboard_points(folder)
    client, run = mlflow_run(folder)
    assert run.data.params["method.rank"] == "8" and run.data.params["seed"] == "0"
    for tags in (run.data.tags, {name.removeprefix("tags/"): text for name, text in texts.items()}):
        assert tags["sartor.adapter"] == manifest["id"]
        assert tags["sartor.base_digest"] == manifest["base"]["digest"]
        assert tags["sartor.datasets"] == manifest["parents"][0]["id"]
    assert run.info.status == texts["tags/status"] == "FINISHED"
    artefacts = {entry.path for entry in client.list_artifacts(run.info.run_id)}
    assert artefacts == {"README.md", "loss.png"}
    card = (folder / "mlartifacts" / run.info.run_id / "artifacts/README.md").read_text()
    assert card == texts["card"] and "library_name: peft" in card
    words = [row["messages"][1]["content"].encode() for row in ROWS]
    for file in folder.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert not any(word in content for word in words), file


def test_tracking_changes_no_bit_and_stands_in_no_manifest(
    tmp_path: Path, tune_recipe: dict[str, Any], tracked: dict[str, Any]
) -> None:
    tune(tracked, tmp_path / "a")
    tune(tune_recipe, tmp_path / "b")
    assert file_digest(tmp_path / "a" / WEIGHTS) == file_digest(tmp_path / "b" / WEIGHTS)
    assert open_artifact(tmp_path / "a").manifest["recipe"] == open_artifact(tmp_path / "b").manifest["recipe"]
    assert str(tmp_path / "tracking") not in (tmp_path / "a/sartor.json").read_text()


@pytest.mark.parametrize("update", [3, 6])
def test_killed_run_that_goes_on_shows_each_step_once(
    update: int, tmp_path: Path, tracked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trackers had written steps after the checkpoint, or none of the last; the whole equals the finished log."""
    recipe = {**tracked, **SETTINGS}
    monkeypatch.setattr(trackers, "FLUSH_S", 0.0 if update == 3 else 60.0)
    killed(monkeypatch, recipe, tmp_path / "faq", update)
    tune(recipe, tmp_path / "faq", resume=True)
    expected = expected_points(tmp_path / "faq")
    for name, read in READERS.items():
        found = read(tmp_path / "tracking")
        assert found.keys() == expected.keys(), name
        for metric, points in expected.items():
            assert [step for step, _ in found[metric]] == [step for step, _ in points], (name, metric)
        assert [value for _, value in found["train/loss"]] == pytest.approx([v for _, v in expected["train/loss"]])
    assert mlflow_run(tmp_path / "tracking")[1].info.status == "FINISHED"


def test_killed_run_leaves_what_was_written(
    tmp_path: Path, tracked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between two updates: the steps before it can be read."""
    monkeypatch.setattr(trackers, "FLUSH_S", 0.0)
    monkeypatch.setattr(trackers.LogCopies, "__exit__", lambda *arguments: None)  # a killed process does not come here
    killed(monkeypatch, {**tracked, **SETTINGS}, tmp_path / "faq", 4)
    found = mlflow_points(tmp_path / "tracking")
    assert [step for step, _ in found["train/loss"]] == [1, 2, 3]


def test_track_copies_a_finished_run(tmp_path: Path, adapter: Path) -> None:
    """The same as while it ran; twice is once."""
    for _ in range(2):
        done = sartor.track(adapter, list(BOTH), folder=tmp_path / "later")
    assert done.values == sum(map(len, expected_points(adapter).values()))
    for read in READERS.values():
        assert_same(read(tmp_path / "later"), expected_points(adapter))


def test_track_completes_what_tune_began(
    tmp_path: Path, tracked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is found again by the digest of what decides it, in MLflow and in TensorBoard's folder."""
    tune(tracked, tmp_path / "faq")
    place = run_folder(tmp_path / "tracking").name
    done = sartor.track(tmp_path / "faq", "mlflow", folder=tmp_path / "tracking")
    assert done.run == place
    assert_same(mlflow_points(tmp_path / "tracking"), expected_points(tmp_path / "faq"))


@pytest.mark.parametrize("name", BOTH)
def test_missing_package_is_named_before_the_run(
    name: str, tmp_path: Path, tune_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda module, package=None: None)
    with pytest.raises(ExtraError, match=name) as missing:
        tune({**tune_recipe, "track": name}, tmp_path / "faq")
    assert "[track]" in missing.value.remedy and not (tmp_path / "faq").exists()


def test_folder_that_cannot_be_written_ends_the_run_before_it_begins(
    tmp_path: Path, tune_recipe: dict[str, Any]
) -> None:
    (tmp_path / "file").write_text("no folder")
    track = {"to": "tensorboard", "folder": str(tmp_path / "file")}
    with pytest.raises(ConfigError, match="cannot be opened") as refused:
        tune({**tune_recipe, "track": track}, tmp_path / "faq")
    assert not (tmp_path / "faq").exists()
    assert "--folder DIR of sartor track" in refused.value.remedy and "--track.folder DIR" in refused.value.remedy


def test_tracker_that_fails_does_not_end_the_run(
    tmp_path: Path, tracked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is given up with a notice that names the command for afterwards; the other one goes on."""

    def fail(self: Any, values: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(trackers.MlflowTracker, "write", fail)
    notices: list[str] = []
    tune(tracked, tmp_path / "faq", notice=notices.append)
    (line,) = [line for line in notices if "mlflow failed" in line]
    assert "No space left" in line and "sartor track" in line
    assert_same(READERS["tensorboard"](tmp_path / "tracking"), expected_points(tmp_path / "faq"))


def test_files_of_others_in_a_run_s_folder_stay(tmp_path: Path, adapter: Path) -> None:
    sartor.track(adapter, "tensorboard", folder=tmp_path / "later")
    other = run_folder(tmp_path / "later") / "events.out.tfevents.1.other"
    other.write_bytes(b"")
    sartor.track(adapter, "tensorboard", folder=tmp_path / "later")
    assert other.exists() and len(list(other.parent.glob("*.sartor"))) == 1


def test_line_without_an_update_has_no_values() -> None:
    line = {"wall_s": 2.0, "update": 3, "loss": 0.5, "grad_norm": None, "notice": "words", "tokens": 7, "packed": True}
    values = trackers.values_of(line, 100.0)
    assert values == [("train/loss", 0.5, 3, 102.0), ("train/tokens", 7.0, 3, 102.0)]
    assert trackers.values_of({"wall_s": 1.0, "forecast": {"update": 1}}, 0.0) == []
    assert trackers.values_of({"update": 1, "loss": math.nan}, 0.0) == []
