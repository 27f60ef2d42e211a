"""`sartor evaluate --metrics`: the scores of whole replies, cut replies that are counted and marked, and what the gate makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import sartor
import tiny
from release_fixtures import PASSES, keys, probe  # noqa: F401
from sample_data import recipe_on, write_jsonl
from sartor.cli import main
from sartor.core.artifacts import open_artifact
from sartor.core.errors import GateError
from sartor.core.parquet_io import read_file
from sartor.models.kernels import cpu

METRICS = ("exact_match", "loss")
ROOMS = ("kitchen", "hall", "attic", "garage", "patio", "office", "cellar", "porch")


@pytest.fixture
def kernels() -> None:
    """Replies end early in the compiled kernels alone."""
    try:
        cpu.load()
    except cpu.NoKernels as error:
        pytest.skip(str(error))


@pytest.fixture
def switch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An adapter that says `1` to everything, and eight held-out rows that want `1`, eight that want `0`."""
    monkeypatch.setattr("sartor.tune.trainer.plot_losses", lambda lines, file: file.touch())
    # of other tiny bases the embedding of a reply's end is that of the padding, and nil: it could not be learnt
    base = tiny.write_base(tmp_path / "base", initializer_range=0.3, pad_token_id=0)
    train = [{"prompt": f"switch on {room}", "completion": "1"} for room in ROOMS]
    held = [
        {"prompt": f"{verb} the {room}", "completion": reply}
        for verb, reply in (("switch", "1"), ("close", "0"))
        for room in ROOMS
    ]
    sources = [
        {"path": str(write_jsonl(tmp_path / f"{split}.jsonl", rows)), "licence": "CC0-1.0", "split": split}
        for split, rows in (("train", train), ("eval", held))
    ]
    sartor.curate({"sources": sources, "workers": 1}, tmp_path / "dataset")
    recipe = {**recipe_on(tmp_path / "dataset", base), "budget": {"updates": 30}}
    return Path(sartor.tune(recipe, tmp_path / "adapter", show=False).adapter.path)


def evaluated(adapter: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    """The JSON of `sartor evaluate`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", str(adapter), "--json", *flags])
    printed = capsys.readouterr()
    assert ended.value.code == 0, printed
    result: dict[str, Any] = json.loads(printed.out.splitlines()[-1])
    return result


@pytest.mark.usefixtures("kernels", "fp32")
def test_chosen_metrics_equal_those_of_whole_replies(
    tmp_path: Path,
    switch: Path,
    keys: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = evaluated(switch, capsys, "--out", str(tmp_path / "whole"))
    cut = evaluated(switch, capsys, "--metrics", *METRICS, "--out", str(tmp_path / "cut"))
    assert cut["metrics"] == {name: whole["metrics"][name] for name in METRICS}
    assert cut["forgetting"] == whole["forgetting"] and "cut_replies" not in whole
    whole_rows, cut_rows = (list(read_file(tmp_path / name / "rows.parquet")) for name in ("whole", "cut"))
    assert cut["cut_replies"] == {side: sum(row[f"{side}_is_cut"] for row in cut_rows) for side in ("base", "tuned")}
    assert (
        cut["cut_replies"]["base"]
        and cut["cut_replies"]["tuned"] == 8
        and cut["metrics"]["exact_match"]["tuned"] == 0.5
    )
    absent = {f"{side}_{name}" for side in ("base", "tuned") for name in ("f1", "rouge_l")}
    assert absent <= set(whole_rows[0]) and set(cut_rows[0]) == set(whole_rows[0]) - absent | {
        "base_is_cut",
        "tuned_is_cut",
    }
    for row, other in zip(cut_rows, whole_rows, strict=True):
        for side in ("base", "tuned"):
            reply, full = row[f"{side}_reply"], other[f"{side}_reply"]
            assert full.startswith(reply) if row[f"{side}_is_cut"] else full == reply
            assert not (row[f"{side}_is_cut"] and row[f"{side}_exact_match"])
    # a Release is made of such a Report where no rule asks what the replies say; no check prompt is made of a cut one
    terms: dict[str, Any] = {
        "name": "switch",
        "version": "1",
        "key": keys,
        "report": tmp_path / "cut",
        "waivers": PASSES,
    }
    rules = {"slices": [{"name": "polite", "where": {}, "forbid": {".": "no"}}]}
    with pytest.raises(GateError, match="slice:polite: 8 of 16 replies were not written to their end") as error:
        sartor.release(switch, **terms, rules=rules)
    assert "sartor evaluate without --metrics" in error.value.remedy
    floor = {"slices": [{"name": "right", "where": {}, "metric": "exact_match", "at_least": 0.0}]}
    released = sartor.release(switch, **terms, rules=floor).release
    gate = open_artifact(released.path, "release").manifest["gate"]
    assert gate["slice:right"]["outcome"] == "pass"
    whole_replies = {row["tuned_reply"] for row in cut_rows if not row["tuned_is_cut"]}
    assert {canary["reply"] for canary in released.manifest["canaries"]} == whole_replies == {"1"}
    assert all("switch" in canary["messages"][-1]["content"] for canary in released.manifest["canaries"])
    floor["slices"][0]["metric"] = "f1"
    with pytest.raises(GateError, match="the rows of the Report have no score 'f1'"):
        sartor.release(switch, **terms, rules=floor, replace=True)
