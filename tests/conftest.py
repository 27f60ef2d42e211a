"""Every test has its own SARTOR_HOME, no network, and fixed seeds; the `circle` tier uses the machine's own cache."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import platformdirs
import pytest

import warm
from sample_data import ROWS, recipe_on, write_jsonl

# what numpy and torch read of these when they are loaded must be there before: nothing of Sartor's is imported above
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Two cores, and tests run beside each other: several OpenMP pools that spin for the same cores slow each other by far.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests have homes of their own; the compiled kernels are the machine's, named by source, flags and compiler, and made once.
os.environ.setdefault("SARTOR_KERNELS", str(platformdirs.user_cache_path("sartor") / "kernels"))
Path(os.environ["SARTOR_KERNELS"]).mkdir(parents=True, exist_ok=True)

# fixtures of updates, which tests of several folders ask for; which skips CI allows; which tests `make quick` passes over
pytest_plugins = ["updating", "skips", "durations"]

# torch, transformers and scikit-learn are half a million objects that live as long as the process: no collection while they are
# loaded, and none walks them again afterwards
gc.disable()


# files of the slow tier, the longest first (--durations): no worker then waits for the other at the end. The second needs no `commands`,
# of which the first begins the server.
LONGEST_FILES = (
    "test_smallest_benchmarks.py",
    "attacks/test_fuzz.py",
    "test_docs.py",
    "test_tour_commands.py",
    "federate/test_flower.py",
    "test_frozen.py",
    "test_notebooks.py",
    "test_artefacts.py",
    "learn/test_retrain_gain.py",
    "curate/test_passes.py",
    "tune/test_checkpoint.py",
    "test_team.py",
    "demo/test_end_to_end.py",
    "quickstart/test_tailor_killed.py",
    "test_planted_bias.py",
    "evaluate/test_audit_benchmarks.py",
    "release/test_export_llamacpp.py",
    "federate/test_rounds_to_devices.py",
    "test_edge_example.py",
    "models/test_base.py",
    "curate/test_label_errors.py",
    "serving/test_dispatcher.py",
    "test_options.py",
    "test_first_hour.py",
    "serving/test_server_audio_limits.py",
    "evaluate/test_bootstrap.py",
    "edge/test_private_tuning.py",
    "edge/test_budgeted_tuning_process.py",
    "test_install.py",
    "release/test_export_starter.py",
    "edge/test_owner_commands.py",
    "studio/test_studio_browser.py",
    "edge/test_device_runtime.py",
    "serving/test_api_keys_lost_served.py",
    "test_media_example.py",
    "edge/test_release_store_power_cuts.py",
    "serving/test_server_media.py",
    "federate/test_edge_client.py",
    "release/test_export.py",
    "federate/test_rounds_killed.py",
    "test_typed_facade.py",
    "edge/test_tuner_process.py",
    "curate/test_recipe.py",
    "serving/test_agent_commands.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """Not in the controller of xdist, which runs no test and loads no torch."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        warm.keep_products()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first: `--dist loadfile --no-loadscope-reorder` hands files out in this order."""
    ranks = {Path(__file__).parent / file: rank for rank, file in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)
    gc.enable()


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What to put into an environment so that `sartor` and `python` have imported everything before (warm.py)."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        yield warm.shared_commands(tmp_path_factory.getbasetemp().parent / "warm")
        return
    with warm.commands(tmp_path_factory.mktemp("warm") / "bin") as environment:
        yield environment


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Coroutines among tests and fixtures run on asyncio."""
    return "asyncio"


@pytest.fixture(autouse=True)
def sartor_home(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if "circle" not in request.keywords:
        monkeypatch.setenv("SARTOR_HOME", str(tmp_path / "sartor-home"))
    yield


@pytest.fixture
def memory() -> Iterator[Path]:
    """A short path (a socket's has 107 bytes at most), in memory where there is one: a killed process's writes are in the page
    cache all the same.
    """
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture
def fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` is fp32 whatever this machine multiplies natively: sums compare closely, and a weight has 4 bytes."""
    import torch

    from sartor.models import base
    from sartor.tune import preflight

    for module in (base, preflight):
        monkeypatch.setattr(module, "best_dtype", lambda device: torch.float32)


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """Forty chat rows, JSONL."""
    file = tmp_path / "rows.jsonl"
    write_jsonl(file, ROWS)
    return file


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> float:
    """Patterns have a tenth of a second for a row, not two."""
    from sartor.curate.steps.regex_rules import Clock

    limit_s = 0.1
    monkeypatch.setattr(Clock.__init__, "__defaults__", (limit_s,))
    return limit_s


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """What `dataset` and `adapter` are copies of: made once, in a folder that is then gone, so that no test finds it by path."""
    import sartor

    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SARTOR_HOME", str(folder / "home"))
        write_jsonl(folder / "rows.jsonl", ROWS)
        source = {"path": str(folder / "rows.jsonl"), "licence": "CC-BY-4.0"}
        sartor.curate({"sources": [source], "split": {"eval_fraction": 0.25}}, folder / "dataset")
        sartor.tune(recipe_on(folder / "dataset", tiny_base), folder / "adapter", show=False)
    return folder.rename(folder.with_name("made-and-moved"))


def copied(artifact: Path, folder: Path) -> Path:
    """The artefact in a test's own folder, known to the test's own catalogue."""
    from sartor.core import catalogue
    from sartor.core.artifacts import Artifact, read_manifest

    shutil.copytree(artifact, folder / artifact.name)
    catalogue.register(Artifact(folder / artifact.name, read_manifest(folder / artifact.name)))
    return folder / artifact.name


@pytest.fixture
def dataset(tmp_path: Path, rows_file: Path, originals: Path) -> Path:
    """A curated Dataset of the forty rows, a quarter held out."""
    return copied(originals / "dataset", tmp_path)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base's directory."""
    import tiny

    return tiny.write_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def tune_recipe(dataset: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A recipe that tunes the tiny base on the forty rows in a second. A picture of the losses is drawn for `adapter` alone."""
    monkeypatch.setattr("sartor.tune.trainer.plot_losses", lambda lines, file: file.touch())
    return recipe_on(dataset, tiny_base)


@pytest.fixture
def adapter(tmp_path: Path, dataset: Path, originals: Path) -> Path:
    """An Adapter of the tiny base, tuned on `dataset`."""
    return copied(originals / "adapter", tmp_path)
