"""Rows of a Dataset as tokens: rehearsal beside them is counted apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import sartor
from sample_data import write_jsonl
from sartor.core.artifacts import Artifact
from sartor.core.errors import SourceError
from sartor.models.base import open_chat
from sartor.tune import preflight
from sartor.tune.dataset_encoding import _no_rows_error, encode_rows
from sartor.tune.tokenized_dataset import TokenizedDataset


def curated(folder: Path, name: str, replies: list[str]) -> Artifact:
    rows = [{"prompt": f"{name} {number}", "completion": reply} for number, reply in enumerate(replies)]
    source = {"path": str(write_jsonl(folder / f"{name}.jsonl", rows)), "licence": "CC0-1.0"}
    return sartor.curate({"sources": [source], "split": {"eval_fraction": 0.0}}, folder / name).dataset


def recipe(max_tokens: int) -> Any:
    return sartor.load_recipe({"base": "starter", "data": {"path": "d", "max_length_tokens": max_tokens}})


def test_rehearsal_does_not_change_overlong_refusal(tmp_path: Path, tiny_base: Path) -> None:
    """The fraction of overlong rows is of the user's rows alone."""
    chat = open_chat(tiny_base)
    own = curated(tmp_path, "own", ["yes"] * 70 + ["a long reply " * 60] * 30)
    talk = curated(tmp_path, "talk", ["hello"] * 250 + ["a long story " * 60] * 20)
    data = encode_rows(own, recipe(64), chat, talk)
    assert len(data.lengths) == 100 and len(data.rehearsal) == 250
    assert {reason: len(ids) for reason, ids in data.left_out.items()} == {"too_long": 30, "rehearsal_too_long": 20}
    (refusal,) = preflight.of_lengths(data.lengths, recipe(64))
    assert "30 of 100 rows (30%)" in refusal.problem
    short = curated(tmp_path, "short", ["yes"] * 10)
    assert not list(preflight.of_lengths(encode_rows(short, recipe(64), chat, talk).lengths, recipe(64)))


def test_weight_of_rehearsal_is_that_of_all_its_tokens_together(tmp_path: Path, tiny_base: Path) -> None:
    """By the fraction of the tokens that is read, long replies and short ones weigh the same."""
    chat = open_chat(tiny_base)
    own, talk = curated(tmp_path, "own", ["yes"] * 10), curated(tmp_path, "talk", ["a longer reply"] * 10)
    rehearsal = {"path": "talk", "fraction": 0.25, "weight": 2.0}
    chosen = {"base": "starter", "data": {"path": "d", "max_length_tokens": 64, "rehearsal": rehearsal}}
    data = encode_rows(own, sartor.load_recipe(chosen), chat, talk)
    read_tokens = data.tokens / 3  # of rehearsal in an epoch
    weight = read_tokens * sum(row.loss_weight for row in data.rehearsal) / sum(row.tokens for row in data.rehearsal)
    assert weight == pytest.approx(2.0 * sum(row.loss_weight for row in data.train))
    plain = encode_rows(own, recipe(64), chat, talk)
    assert plain.rehearsal_factor == 1.0 and {row.weight for row in plain.rehearsal} == {1.0}


def test_rehearsal_of_which_nothing_fits_is_named(tmp_path: Path, tiny_base: Path) -> None:
    own, talk = curated(tmp_path, "own", ["yes"] * 10), curated(tmp_path, "talk", ["a long story " * 60] * 20)
    with pytest.raises(SourceError, match="of the rehearsal no training row") as error:
        encode_rows(own, recipe(64), open_chat(tiny_base), talk)
    assert error.value.remedy.endswith("or --data.rehearsal none")


def test_every_held_out_row_has_its_group(tmp_path: Path, tiny_base: Path) -> None:
    rows = [{"prompt": f"row {number}", "completion": "yes", "group": f"g{number % 20}"} for number in range(60)]
    source = {"path": str(write_jsonl(tmp_path / "rows.jsonl", rows)), "licence": "CC0-1.0"}
    dataset = sartor.curate({"sources": [source], "split": {"eval_fraction": 0.2}}, tmp_path / "dataset").dataset
    data = encode_rows(dataset, recipe(64), open_chat(tiny_base))
    assert len(data.held_out_groups) == len(data.held_out) == 12 and len(set(data.held_out_groups)) == 4


def test_the_commonest_reason_decides_the_remedy(tmp_path: Path, tiny_base: Path) -> None:
    """Of 21 rows one is too long; a longer limit would leave that one alone to learn from."""
    rows = curated(tmp_path, "rows", ["yes"] * 20 + ["a long reply " * 60])
    data = TokenizedDataset(lengths=[8] * 20 + [400])
    data.leave_out("nothing_supervised", *map(str, range(20)))
    data.leave_out("too_long", "long")
    assert "max_length_tokens" not in _no_rows_error(rows, recipe(64), data).remedy
    data.leave_out("too_long", *map(str, range(20, 60)))
    assert _no_rows_error(rows, recipe(64), data).remedy == "--data.max_length_tokens 1024; it is 64 now"
