"""The circle tier: what `make demo` does, on the real starter base and data."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sartor.core import assets, model_refs
from sartor.core.artifacts import open_artifact
from sartor.core.home import folder
from sartor.demo.home_intents import rehearsal_rows
from sartor.evaluate.audit import probes

pytestmark = pytest.mark.circle


Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def run(commands: dict[str, str]) -> Run:
    """A command of sartor by its arguments -> its JSON."""
    return partial(_run, {**os.environ, **commands})


def _run(environment: dict[str, str], *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        ["sartor", *arguments, "--json"], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("circle") / "demo"


@pytest.fixture(scope="module")
def said(out: Path, run: Run) -> dict[str, Any]:
    return run("demo", "--out", str(out))


def test_the_demo_goes_once_around(said: dict[str, Any], out: Path) -> None:
    for kind in ("dataset", "adapter", "release"):
        open_artifact(said[kind])
    assert {"base", "tuned", "gain", "forgetting", "wall_s", "trainable_fraction", "ask"} <= set(said)
    assert said["base"]["exact_match"] <= 0.05 and said["gain"]["low"] > 0.5
    assert 0 < said["trainable_fraction"] < 0.04
    assert said["ask"]["reply"] and said["ask"]["nearest"][0]["locator"].startswith("rows.jsonl:")
    assert "<svg" in Path(said["report"]).read_text()
    assert json.loads((out / "report/report.json").read_text())["probes"]["small_talk"]["rows"] == 200


def test_the_gate_passes_the_demo_without_a_waiver(said: dict[str, Any]) -> None:
    """What a stranger sees first; a limit that moves, or a recipe, has to be seen here first."""
    assert set(said["gate"].values()) == {"pass"}
    assert json.loads((Path(said["release"]) / "release.json").read_text())["waivers"] == []


def test_a_small_demo_names_its_waivers(tmp_path: Path, run: Run) -> None:
    few = run("demo", "--out", str(tmp_path / "few"), "--limit", "20")
    waivers = json.loads((Path(few["release"]) / "release.json").read_text())["waivers"]
    assert {waiver["check"] for waiver in waivers} == {"gain", "forgetting"}
    assert few["rows"]["train"] + few["rows"]["evaluated"] <= 25


def test_small_talk_and_forgetting_probe_share_no_text() -> None:
    probe = {message.text.lower() for row in probes.chitchat_rows() for message in row.messages}
    talk = [message["content"].lower() for row in rehearsal_rows(200) for message in row["messages"]]
    assert len(set(talk)) > 390 and not probe & set(talk)


def test_demo_release_traces_back_to_its_source_files(said: dict[str, Any], run: Run) -> None:
    """`inspect` shows adapter, Report and Dataset, and each source with its digest and licence."""
    seen = run("inspect", said["release"])
    assert [step["kind"] for step in seen["parents"]] == ["adapter", "report", "dataset"]
    assert [source["path"] for source in seen["sources"]] == ["rows.jsonl", "general.jsonl"]
    for source in seen["sources"]:
        assert source["licence"] == "Apache-2.0" and len(source["sha256"]) == 64


def test_a_second_demo_does_not_convert_the_base_again(said: dict[str, Any], run: Run) -> None:
    ref = model_refs.locate_base("starter")
    before = ref.path.stat().st_ino, ref.path.stat().st_mtime_ns
    run("verify", said["release"])
    run("ask", said["release"], "turn on the hall light", "--max-tokens", "4")
    assert (ref.path.stat().st_ino, ref.path.stat().st_mtime_ns) == before


def test_no_template_of_the_demo_is_in_both_splits(said: dict[str, Any]) -> None:
    import polars

    table = polars.read_parquet(f"{said['dataset']}/examples/*.parquet")
    both = set(table.filter(split="train")["group"]) & set(table.filter(split="eval")["group"])
    assert both == set() and table["split"].n_unique() == 2


def test_an_asset_is_listed_as_installed_and_opens_at_once(said: dict[str, Any], run: Run) -> None:
    listed = {asset["name"]: asset["installed"] for asset in run("assets", "list")["assets"]}
    assert listed["starter"] and listed["home-intents"] and len(listed) == len(assets.entries())
    began = time.monotonic()
    run("assets", "install", "starter")
    assert time.monotonic() - began < 60
    assert folder("assets").is_dir()
