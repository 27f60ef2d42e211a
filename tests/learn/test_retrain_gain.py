"""The test of a gain over the live version: simulated retrains through the real gate, and the ledger of looks."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import retrain_gain

from sartor.core import parquet_io
from sartor.core.errors import ArtifactError
from sartor.core.records import Example, Message
from sartor.core.splits import least_groups
from sartor.core.statistics import clopper_pearson_upper, lower_bound
from sartor.evaluate import bootstrap
from sartor.learn import gain_test, look_ledger, promotion_checks, training_data
from sartor.learn.gain_test import ALPHA, HELD_OUT_SHARE, level_of_look, plan_claims
from sartor.learn.run_record import Live, RunRecord
from sartor.serving.team_config import NotWorse

LIVE = Live("1", "/faq-1", "a" * 64)
# the same scenarios as the benchmark, of fewer rows and looks: seconds
FAST = replace(retrain_gain.NO_GAIN, held_out=60, looks=2)


def rows(count: int, kind: str = "own", **scores: float) -> list[dict[str, Any]]:
    """So many rows with the same scores, each a group of its own."""
    return [{"id": f"{kind}-{index}", "group": "", "reference": "yes", **scores} for index in range(count)]


@pytest.fixture
def run(tmp_path: Path) -> RunRecord:
    return RunRecord.create(tmp_path, "faq", LIVE)


def test_without_gain_five_percent_are_promoted_at_most() -> None:
    """Of 60 agents, retrained twice each, the bound of those with any promotion is under 5 %.

    The rule before, any of three 95 % intervals over the live version, let half of them pass at the first look.
    """
    result = retrain_gain.false_promotions(60, FAST)
    assert clopper_pearson_upper(result["count"], 60, 0.95) <= 0.05, result
    assert result["uncorrected"]["gain"] > 0.3


def test_a_gain_of_a_tenth_on_300_rows_is_promoted() -> None:
    result = retrain_gain.power(30, retrain_gain.GAIN)
    assert lower_bound(result["count"], 30, 0.95) >= 0.8, result


def test_what_people_corrected_and_nobody_held_out_is_promoted() -> None:
    """Held-out rows show nothing of it; the control does not learn it."""
    result = retrain_gain.power(20, replace(retrain_gain.FEEDBACK_GAIN, held_out=200))
    assert result["count"] >= 16, result


def test_what_the_live_version_learnt_before_is_no_gain() -> None:
    """Of 60 second generations at most 5 % are promoted, though each is far better than its control.

    Live has 0.60 of 150 held-out corrections right, the new version the same but for redrawn outcomes, the control 0.48.
    """
    scenario = replace(retrain_gain.LEARNT_BEFORE, looks=1)
    result = retrain_gain.false_promotions(60, scenario)
    assert clopper_pearson_upper(result["gain_shown"], 60, 0.95) <= 0.05, result


def test_a_gain_over_the_control_alone_is_none() -> None:
    """Half of the corrections were learnt before: the control forgets them, and the new version is as good as the live one."""
    said = [row | {"live": float(index % 2), "new": float(index % 2)} for index, row in enumerate(rows(60, "said"))]
    kinds = {"held_out": rows(50, live=1.0, new=1.0), "feedback": [row | {"control": 0.0} for row in said]}
    judgement = promotion_checks.judge(kinds, {}, NotWorse())
    claim = judgement.claims[1]
    assert (
        claim.result
        and claim.result.low > 0
        and not claim.is_gain
        and judgement.checks["gain over live"].outcome == "fail"
    )
    assert "and over the live version" in judgement.checks["gain over live"].detail
    assert claim.as_json()["over_live"]["low"] <= 0
    kinds["feedback"] = [row | {"new": 1.0} for row in kinds["feedback"]]
    assert not promotion_checks.judge(kinds, {}, NotWorse()).refused


def test_ratings_need_a_margin_over_both() -> None:
    """The control has a smaller margin than the live version, and the new version the live one's."""
    rated = [row | {"rating": 1.0 if index % 2 else -1.0} for index, row in enumerate(rows(80, "rated"))]

    def scores(row: dict[str, Any], **margins: float) -> dict[str, Any]:
        return row | {
            version: row["rating"] * (row["rating"] * margin / 2 - 2.0) for version, margin in margins.items()
        }

    kinds = {
        "held_out": rows(50, live=1.0, new=1.0),
        "ratings": [scores(row, live=1, new=1, control=0) for row in rated],
    }
    claim = promotion_checks.judge(kinds, {}, NotWorse()).claims[1]
    assert claim.kind == "ratings" and claim.result and claim.result.low > 0 and not claim.is_gain
    kinds["ratings"] = [scores(row, live=1, new=2, control=0) for row in rated]
    assert promotion_checks.judge(kinds, {}, NotWorse()).claims[1].is_gain


@pytest.mark.circle
@pytest.mark.parametrize(("scenario", "count"), [(retrain_gain.NO_GAIN, 60), (retrain_gain.RESTLESS, 200)])
def test_without_gain_over_many_series(scenario: retrain_gain.Scenario, count: int) -> None:
    """The fewer series, the harder the bound."""
    result = retrain_gain.false_promotions(count, scenario)
    assert result["high"] <= 0.05 and clopper_pearson_upper(result["gain_shown"], count, 0.95) <= 0.05, result


@pytest.mark.circle
@pytest.mark.parametrize("look", [1, 2, 3])
def test_power_over_many_retrains(look: int) -> None:
    assert retrain_gain.power(40, retrain_gain.GAIN, look)["low"] >= 0.8


def test_the_levels_of_all_looks_sum_to_the_level_of_one_row() -> None:
    levels = [level_of_look(look) for look in range(1, 20_000)]
    assert levels == sorted(levels, reverse=True) and ALPHA * 0.999 < sum(levels) <= ALPHA


def test_the_kinds_share_one_level() -> None:
    rated = [row | {"rating": 1.0 if index % 2 else -1.0} for index, row in enumerate(rows(40, "rated"))]
    kinds = {"held_out": rows(50), "feedback": rows(20, "said"), "ratings": rated}
    claims = plan_claims(kinds, {})
    assert [claim.kind for claim in claims] == ["held_out", "feedback", "ratings"]
    assert sum(claim.level for claim in claims) == pytest.approx(level_of_look(1))
    assert claims[0].level == pytest.approx(HELD_OUT_SHARE * level_of_look(1))
    # five corrections cannot reach any level: the held-out rows have all of it
    (alone,) = plan_claims({"held_out": rows(50), "feedback": rows(5, "said")}, {})
    assert alone.level == level_of_look(1)
    # nor can ratings that are all bad: there is no margin between good and bad replies
    only_bad = [row | {"rating": -1.0} for row in rated]
    assert [claim.kind for claim in plan_claims({"held_out": rows(50), "ratings": only_bad}, {})] == ["held_out"]


def test_rows_that_were_looked_at_have_a_smaller_level() -> None:
    again = plan_claims({"held_out": rows(50)}, {f"own-{index}": 2 for index in range(50)})[0]
    assert (again.look, again.level, len(again.rows)) == (3, level_of_look(3), 50)
    # few old rows among many new ones: the new ones alone tell more
    mixed = plan_claims({"held_out": rows(50)}, {f"own-{index}": 5 for index in range(5)})[0]
    assert (mixed.look, len(mixed.rows)) == (1, 45)


def test_selected_rows_show_no_gain_without_a_control() -> None:
    kinds = {"held_out": rows(50, live=1.0, new=1.0), "feedback": rows(30, "said", live=0.0, new=1.0), "ratings": []}
    judgement = promotion_checks.judge(kinds, {}, NotWorse())
    assert judgement.checks["gain over live"].outcome == "fail" and not judgement.needless_control
    assert "without a control" in judgement.checks["gain over live"].detail
    # the control has unlearnt the same faults
    kinds["feedback"] = [row | {"control": 1.0} for row in kinds["feedback"]]
    assert promotion_checks.judge(kinds, {}, NotWorse()).refused
    kinds["feedback"] = [row | {"control": 0.0} for row in kinds["feedback"]]
    judgement = promotion_checks.judge(kinds, {}, NotWorse())
    assert not judgement.refused and (judgement.decisive.kind, judgement.decisive.opponent) == ("feedback", "control")


@pytest.mark.parametrize(
    ("held_out", "feedback", "reason"),
    [
        ((0.0, 1.0), (0.0, 1.0), "held_out shows the gain"),
        ((1.0, 0.0), (0.0, 1.0), "refused anyway: not worse"),
        ((1.0, 1.0), (0.0, 0.0), "no better than the live version on feedback"),
    ],
)
def test_no_control_is_tuned_that_can_change_nothing(
    held_out: tuple[float, float], feedback: tuple[float, float], reason: str
) -> None:
    kinds = {
        "held_out": rows(50, live=held_out[0], new=held_out[1]),
        "feedback": rows(30, "said", live=feedback[0], new=feedback[1]),
    }
    assert promotion_checks.judge(kinds, {}, NotWorse()).needless_control == reason


def test_ratings_do_not_reward_any_change() -> None:
    """Every rated reply is less likely by 0.5 nats: the sum over mostly bad ones rises, the margin does not move."""
    rated = [
        {"id": str(index), "group": "", "rating": rating, "live": rating * -1.0, "new": rating * -1.5}
        for index, rating in enumerate([-1.0, -1.0, 1.0] * 20)
    ]
    assert sum(row["new"] - row["live"] for row in rated) > 0
    assert gain_test.rating_margins(rated, "live", 0.025).difference == pytest.approx(0.0)
    learnt = [row | {"new": row["live"] + (0.5 if row["rating"] < 0 else 0.0)} for row in rated]
    assert gain_test.rating_margins(learnt, "live", 0.025).low > 0


def test_smaller_level_widens_interval_and_needs_more_groups() -> None:
    """A tail of 0.0005 needs 11 groups; nine give an interval from -1 to 1."""
    base, tuned, groups = [0.0] * 60, [1.0, 0.0, 0.0] * 20, [str(index) for index in range(60)]
    usual, strict = (bootstrap.paired_bootstrap(base, tuned, groups, tail=tail) for tail in (0.025, 0.0005))
    assert usual == bootstrap.paired_bootstrap(base, tuned, groups) and strict.low < usual.low
    assert (least_groups(0.025), least_groups(0.0005)) == (6, 11)
    few = bootstrap.paired_bootstrap([0.0] * 9, [1.0] * 9, groups[:9], tail=0.0005)
    assert (few.low, few.high) == (-1.0, 1.0)


def test_a_resumed_retrain_is_one_look(run: RunRecord, tmp_path: Path) -> None:
    for _ in range(2):
        look_ledger.record_look(run, {"compared": ["a", "b"], "ratings": ["c"]})
    assert not look_ledger.count_looks(run)  # its own look is no earlier one
    later = RunRecord.create(tmp_path, "faq", LIVE)
    assert look_ledger.count_looks(later) == {"a": 1, "b": 1, "c": 1}
    look_ledger.record_look(later, {"compared": ["b"]})
    assert look_ledger.count_looks(RunRecord.create(tmp_path, "faq", LIVE))["b"] == 2
    assert not look_ledger.count_looks(RunRecord.create(tmp_path, "other", LIVE))
    line = json.loads((run.folder.parent / "looks.jsonl").read_text().splitlines()[0])
    assert line["live"] == LIVE.release_id and set(line["sets"]) == {"compared", "ratings"}


def test_looks_outlive_the_folders_of_retrains(
    run: RunRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sartor.learn.run_record.now", lambda: "2126-01-01T00:00:00Z")
    look_ledger.record_look(run, {"compared": ["a"]})
    shutil.rmtree(run.folder)
    again = RunRecord.create(tmp_path, "faq", LIVE)
    assert again.record.number == run.record.number and look_ledger.count_looks(again) == {"a": 1}


def test_retrains_from_before_the_ledger_are_counted(run: RunRecord, tmp_path: Path) -> None:
    table = [{"id": "a"}, {"id": "b"}]
    parquet_io.write_rows(run.folder / "beside.parquet", pa.Table.from_pylist(table).schema, table)
    later = RunRecord.create(tmp_path, "faq", LIVE)
    assert look_ledger.count_looks(later) == {"a": 1, "b": 1}
    look_ledger.record_look(run, {"compared": ["a", "b"]})
    assert look_ledger.count_looks(later) == {"a": 1, "b": 1}


@pytest.mark.parametrize("text", ["{", '{"schema": 1}\n', '{"schema": 2, "number": 1, "began": "", "rows": {}}\n'])
def test_a_damaged_ledger_is_an_error(run: RunRecord, text: str) -> None:
    (run.folder.parent / "looks.jsonl").write_text(text)
    with pytest.raises(ArtifactError, match="looks.jsonl"):
        look_ledger.count_looks(run)


def test_rows_of_fewer_looks_are_held_out_first(
    run: RunRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = [Example((Message.of("user", str(n)), Message.of("assistant", "yes")), ()) for n in range(20)]
    monkeypatch.setattr(training_data.parquet_io, "read_examples", lambda *_: iter(examples))
    looked = {row.id for row in examples[:12]}
    look_ledger.record_look(run, {"compared": looked})
    job: Any = SimpleNamespace(
        run=RunRecord.create(tmp_path, "faq", LIVE), rules=SimpleNamespace(gate=NotWorse(rows=10))
    )
    dataset: Any = SimpleNamespace(manifest={})
    chosen = {row.id for row in training_data._held_out(job, dataset, [])}
    assert len(chosen) == 10 and len(chosen - looked) == 8
