"""The group of a row is decided in one place: in every verb a row without a group is a group of its own, and says so alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import sartor
from sample_data import write_jsonl
from sartor.core.errors import ConfigError
from sartor.core.records import Example, Message, Origin, Part
from sartor.core.splits import group_of, group_of_stored, hold_out, prompt_group, split_group, stated_group
from sartor.curate.sources.planner import read_all
from sartor.curate.sources.types import SourceOptions
from sartor.evaluate import bootstrap, evaluation
from sartor.evaluate.audit import counterfactual_bias, probes
from sartor.evaluate.predictions import HeldOut
from sartor.federate.tuning import client_shards, personal_adapters
from sartor.learn import personal_tuning, promotion_checks, retrain
from sartor.models.packing import TokenizedExample
from sartor.personalization import user_tokens
from sartor.personalization.user_rows import UserRow
from sartor.release import gate as checks
from sartor.synthesize.validate import samples as validating
from sartor.tune.tokenized_dataset import TokenizedDataset


def row(place: int, group: str = "", system: str = "", reply: str = "approved") -> Example:
    said = [Message.of("system", system)] if system else []
    said += [Message.of("user", f"Emily asks for {place} euros."), Message.of("assistant", reply)]
    return Example(tuple(said), (Origin("file", str(place)),), group, "eval")


def encoded(rows: Sequence[Example]) -> list[TokenizedExample]:
    return [TokenizedExample([1, 2], [False, True], example_id=one.id) for one in rows]


def of_evaluate(rows: Sequence[Example], _: pytest.MonkeyPatch) -> Sequence[Any]:
    return evaluation._measures(HeldOut(list(rows), Path()), "").groups


def of_audit(rows: Sequence[Example], _: pytest.MonkeyPatch) -> Sequence[Any]:
    """Prompts that are the same once every name stands in them are one block already."""
    clusters = {block.id: block.cluster for block in counterfactual_bias.own_prompts(rows, "names").blocks}
    return [clusters.get(one.id, group_of(one)) for one in rows]


def of_retrain(rows: Sequence[Example], patch: pytest.MonkeyPatch) -> Sequence[Any]:
    """Of held-out ratings, as the gate of a retrain compares them."""
    patch.setattr(retrain.training_data, "held_ratings", lambda job: list(rows))
    patch.setattr(retrain, "likelihoods", lambda path, held, notice: [0.0] * len(held))
    record = SimpleNamespace(live=SimpleNamespace(release="live"))
    job = SimpleNamespace(run=SimpleNamespace(record=record), notice=None)
    table = retrain._liked(job, Path("adapter"))["ratings"]  # type: ignore[arg-type]
    return [group_of_stored(one) for one in table]


def of_validate(rows: Sequence[Example], _: pytest.MonkeyPatch) -> Sequence[Any]:
    pool = validating.pooled(validating.ValidationSamples([], list(rows), []), 1_000, 0)
    return list(pool.units)


def of_personal(rows: Sequence[Example], patch: pytest.MonkeyPatch) -> Sequence[Any]:
    patch.setattr(personal_tuning.stored, "read_examples", lambda dataset: list(rows))
    patch.setattr(personal_tuning, "too_few_rows", lambda trained, groups: "")
    return personal_tuning.own_rows(None, TokenizedDataset(held_out=encoded(rows))).groups  # type: ignore[arg-type]


def of_edge(rows: Sequence[Example], patch: pytest.MonkeyPatch) -> Sequence[Any]:
    patch.setattr(user_tokens, "encode_user_row", lambda example, name, chat, most: encoded([example])[0])
    mine = [UserRow(str(place), "2026-11-28", one) for place, one in enumerate(rows)]
    return user_tokens.prepare_rows(mine, None, 1.0, 100).groups  # type: ignore[arg-type]


def of_probe(rows: Sequence[Example], patch: pytest.MonkeyPatch) -> Sequence[Any]:
    """Of what a personal version must go on to know, on a device and on a server."""
    patch.setattr(user_tokens, "encode_user_row", lambda example, name, chat, most: encoded([example])[0])
    return user_tokens.encode_probe(rows, None, 100).groups  # type: ignore[arg-type]


def of_federate(rows: Sequence[Example], patch: pytest.MonkeyPatch) -> Sequence[Any]:
    patch.setattr(personal_adapters.predictions, "reply_limit", lambda base, found: 10_000)
    people = SimpleNamespace(
        rows={"a": TokenizedDataset(held_out=encoded(rows))},
        resident=SimpleNamespace(base=None),
        dataset_of=lambda name: SimpleNamespace(path=Path()),
    )
    return personal_adapters.own_rows(people, "a", {one.id: one for one in rows}).groups  # type: ignore[arg-type]


def of_shards(rows: Sequence[Example], _: pytest.MonkeyPatch) -> Sequence[Any]:
    members = client_shards._members(rows)
    return [next(name for name, some in members.items() if one in some) for one in rows]


VERBS: dict[str, Callable[[Sequence[Example], pytest.MonkeyPatch], Sequence[Any]]] = {
    "evaluate": of_evaluate,
    "audit": of_audit,
    "retrain": of_retrain,
    "validate": of_validate,
    "personal": of_personal,
    "probe": of_probe,
    "federate": of_federate,
    "shards": of_shards,
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_row_without_a_group_is_a_group_of_its_own(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(place) for place in range(12)]
    assert len(set(VERBS[verb](rows, monkeypatch))) == 12


@pytest.mark.parametrize("verb", VERBS)
def test_partly_grouped_file_keeps_ungrouped_rows_apart(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six rows share a group and six have none, so each verb sees seven groups."""
    rows = [row(place, "a talk" if place < 6 else "") for place in range(12)]
    found = VERBS[verb](rows, monkeypatch)
    assert len(set(found[:6])) == 1 and len(set(found)) == 7


@pytest.mark.parametrize("verb", VERBS)
def test_a_row_that_stands_twice_is_one_group(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = VERBS[verb]([row(place % 6) for place in range(12)], monkeypatch)
    assert len(set(found)) == 6 and list(found[:6]) == list(found[6:])


def test_an_edge_row_has_the_group_of_its_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device's rows never have a group: nothing of a person's may name them."""
    assert len(set(of_edge([row(place) for place in range(12)], monkeypatch))) == 12
    assert len(set(of_edge([row(place % 6) for place in range(12)], monkeypatch))) == 6


def test_bias_has_intervals_of_rows_without_a_group(tmp_path: Path) -> None:
    lines = [
        {"prompt": f"{name} asks for {place} euros.", "completion": ("approved", "denied")[place % 3 == 0]}
        for place, name in enumerate(("Emily", "Greg") * 20)
    ]
    source = {"path": str(write_jsonl(tmp_path / "rows.jsonl", lines)), "licence": "CC0-1.0"}
    data = sartor.curate(
        {"sources": [source], "split": {"eval_fraction": 0.0}, "steps": []}, tmp_path / "data"
    ).dataset.path
    (gap, *_) = sartor.bias(data, group=["sex"]).as_json()["before"]["gaps"]
    assert -1 < gap["low"] < gap["difference"] < gap["high"] < 1


def test_retrain_reads_reports_made_before_this_release() -> None:
    """They have no group of rows without one; then it is the row."""
    table = [{"id": str(place), "group": "", "live": 0.0, "new": 1.0} for place in range(12)]
    assert promotion_checks.of_rows(table).low > 0


def test_what_the_model_is_shown_is_the_group() -> None:
    """Other contexts before the same question are other groups to measure, and one group to split."""
    one, other = row(1, system="context one"), row(1, system="context two")
    assert group_of(one) != group_of(other) and split_group(one) == split_group(other) == prompt_group(one)
    assert group_of(row(1)) == group_of(row(1, reply="denied")), "the model answers both alike"
    picture = Part("image", media="media/" + "0" * 64)
    about = [
        Example((Message("user", (picture, Part("text", text))), Message.of("assistant", "a cat")), ())
        for text in ("what", "who")
    ]
    assert group_of(about[0]) == group_of(about[1])


def test_tuning_holds_out_rows_without_a_group_one_by_one() -> None:
    rows = [Example(one.messages, one.origins) for one in (row(place) for place in range(40))]
    held = hold_out(rows, 0.25, 0)
    assert sum(one.split == "eval" for one in held) == 10


def test_a_users_own_test_file_has_intervals_and_may_pass(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "chitchat_rows", lambda: [row(place) for place in range(6)])
    lines = [{"question": f"switch lamp {place} on", "answer": "on"} for place in range(40)]
    found = sartor.evaluate(adapter, data=write_jsonl(tmp_path / "test.jsonl", lines), scorer="f1").as_json()
    assert found["groups"] == found["rows"] == 40
    loss = found["metrics"]["loss"]
    assert -1 < loss["low"] <= loss["difference"] <= loss["high"] < 0
    assert checks.check_gain("loss", loss, groups=found["groups"]).outcome == "pass"
    stored = sartor.open(found["report"]).path / "rows.parquet"
    import polars

    assert polars.read_parquet(stored)["group"].n_unique() == 40


@pytest.mark.parametrize("groups", [2, 5])
def test_too_few_groups_are_told_and_how_many_would_do(groups: int) -> None:
    metric = {"base": 0.1, "tuned": 0.9, "difference": 0.8, "low": -1.0, "high": 1.0}
    check = checks.check_gain("exact_match", metric, groups=groups)
    assert (
        check.outcome == "cannot tell"
        and f"over {groups} groups of rows; fewer than 6 exclude nothing" in check.detail
    )
    assert "evaluate on about" in check.remedy and "--data FILE" in check.remedy
    worse = {"base": 0.9, "tuned": 0.1, "difference": -0.8, "low": -1.0, "high": 1.0}
    assert checks.check_gain("exact_match", worse, groups=groups).remedy == "", "more rows would not make it a gain"


def test_a_group_column_with_gaps_is_read_as_pandas_writes_it(tmp_path: Path) -> None:
    """Whole numbers with gaps become floats, a gap NaN or null; a blank is no group."""
    import polars

    lines = {
        "question": [f"q{place}" for place in range(5)],
        "answer": ["a"] * 5,
        "group": [3.0, 3.0, float("nan"), None, 4.0],
    }
    polars.DataFrame(lines, strict=False).write_parquet(tmp_path / "rows.parquet")
    blank = write_jsonl(
        tmp_path / "blank.jsonl", [{"question": f"b{place}", "answer": "a", "group": " "} for place in range(2)]
    )
    read = [
        one
        for path in (tmp_path / "rows.parquet", blank)
        for one in read_all(SourceOptions(str(path)), 4 << 20, tmp_path / "m")
    ]
    assert [one.group for one in read if isinstance(one, Example)] == ["3", "3", "", "", "4", "", ""]
    assert stated_group(2.5) is None and stated_group(True) == "True" and stated_group(["a"]) is None


def test_gain_check_without_evidence_names_groups_needed() -> None:
    """The remedy names 6 groups where nothing differs, and about 23 where the interval touches 0."""
    metric = {"base": 0.5, "tuned": 0.5, "difference": 0.0, "low": -1.0, "high": 1.0}
    check = checks.check_gain("exact_match", metric, groups=5)
    assert check.outcome == "cannot tell" and "evaluate on 6 groups of rows or more" in check.remedy
    nearly = {"base": 0.1, "tuned": 0.3, "difference": 0.2, "low": 0.0, "high": 0.4}
    assert "about 23 groups" in checks.check_gain("exact_match", nearly, groups=22).remedy
    assert bootstrap.groups_needed(0.2, 0.0, 0.4, 22) == 23


def test_unknown_favourable_outcome_is_refused_before_loading(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An outcome that no reference names is a ConfigError before the model is opened."""
    monkeypatch.setattr(evaluation, "open_tuned", lambda *_: pytest.fail("a model was opened"))
    data = write_jsonl(
        tmp_path / "test.jsonl", [{"question": f"q{n}", "answer": ("yes", "no")[n % 2]} for n in range(12)]
    )
    with pytest.raises(ConfigError, match="no reference says 'maybe', which --favourable names"):
        sartor.evaluate(adapter, data=data, audit=True, favourable=("maybe",))
