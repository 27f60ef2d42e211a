"""The three probes of forgetting: which rows they are, and that the worst decides."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from release_fixtures import probe  # noqa: F401
from sartor.core.artifacts import open_artifact
from sartor.core.errors import AssetError
from sartor.core.home import folder
from sartor.core.splits import group_of
from sartor.evaluate.audit import forgetting_probes, probes
from sartor.evaluate.limits import ForgettingLimit
from sartor.models.base import Base
from sartor.models.tuned_model import open_tuned
from sartor.release.gate import check_forgetting
from sartor.tune.recipe import Rehearsal, load

FIVE = {"base": 1.0, "tuned": 1.1, "difference": 0.1, "low": 0.0, "high": 0.2}


def test_arithmetic_is_right_and_drawn_the_same() -> None:
    numbers = {forgetting_probes.number_word(number): number for number in range(50)}
    rows = forgetting_probes.arithmetic_rows()
    for row in rows:
        term, result = re.fullmatch(r"(.+) is (\S+)\.", row.reply.lower()).groups()  # type: ignore[union-attr]
        left, operation, right = term.split()
        sign = {"plus": 1, "minus": -1}[operation]
        assert numbers[left] + sign * numbers[right] == numbers[result]
        assert row.prompt[-1].text == f"What is {term}?"
    assert len({row.id for row in rows}) == forgetting_probes.ARITHMETIC_ROWS
    assert rows == forgetting_probes.arithmetic_rows() != forgetting_probes.arithmetic_rows(seed=1)
    assert (
        rows[0].reply == "Eight plus seven is fifteen."
    )  # another row here is another probe: say so in the changelog


def test_language_rows_are_forty_sentences_of_many_intents() -> None:
    rows = forgetting_probes.language_rows()
    assert len({row.id for row in rows}) == 40 and len({group_of(row) for row in rows}) >= 20
    assert {row.origins[0].licence for row in rows} == {"Apache-2.0"}
    assert all(re.fullmatch(r"[A-ZÄÖÜ].*[.?]", row.reply) for row in rows)


@pytest.fixture
def measured_sides(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[bool]]]:
    """(rows, sides) of each measuring of losses for the probes."""
    calls: list[tuple[int, list[bool]]] = []
    measure = forgetting_probes.measure_losses

    def recorded(
        base: Base, model: Any, rows: Sequence[Any], *, sides: Sequence[bool] = (False, True), progress: Any
    ) -> list[list[float]]:
        calls.append((len(rows), list(sides)))
        fractions: list[float] = []
        losses = measure(base, model, rows, sides=sides, progress=fractions.append)
        assert fractions == sorted(fractions) and fractions[-1] == 1
        return losses

    monkeypatch.setattr(forgetting_probes, "measure_losses", recorded)
    return calls


def test_rows_go_through_both_models_once(adapter: Path, measured_sides: list[tuple[int, list[bool]]]) -> None:
    base, model = open_tuned(open_artifact(adapter))
    results = forgetting_probes.measure_probes(base, model)
    assert measured_sides == [(86, [False, True])]
    assert {name: result["rows"] for name, result in results.items()} == {
        "small_talk": 6,
        "arithmetic": 40,
        "language": 40,
    }
    assert all(result["low"] <= result["difference"] <= result["high"] for result in results.values())
    worst = forgetting_probes.worst_probe(results)
    assert worst["high"] == max(result["high"] for result in results.values())
    assert worst["unit"] == "nats per token" and results[worst["probe"]]["high"] == worst["high"]


def test_losses_of_the_base_are_kept(adapter: Path, measured_sides: list[tuple[int, list[bool]]]) -> None:
    """The next evaluation measures the tuned model alone, with the same results; other rows are measured on both sides."""
    base, model = open_tuned(open_artifact(adapter))
    first = forgetting_probes.measure_probes(base, model)
    assert forgetting_probes.measure_probes(base, model) == first
    assert measured_sides == [(86, [False, True]), (86, [True])]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: b"",
        lambda text: text[:-40],
        lambda text: b"[]",
        lambda text: re.sub(rb'"losses":\[[^,]*,', b'"losses":[', text),
        lambda text: re.sub(rb'"losses":\[[^,]*,', b'"losses":[NaN,', text),
        lambda text: re.sub(rb'"losses":\[[^,]*,', b'"losses":["1",', text),
        lambda text: re.sub(rb'"key":"...', b'"key":"aaa', text),
    ],
    ids=["empty", "torn", "no object", "a row less", "not finite", "no number", "of something else"],
)
def test_damaged_losses_are_measured_anew(
    adapter: Path, measured_sides: list[tuple[int, list[bool]]], damage: Callable[[bytes], bytes]
) -> None:
    base, model = open_tuned(open_artifact(adapter))
    first = forgetting_probes.measure_probes(base, model)
    (file,) = folder("probes").glob("*.json")
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert file.read_bytes() != whole
    assert forgetting_probes.measure_probes(base, model) == first
    assert [sides for _, sides in measured_sides] == [[False, True]] * 2
    assert file.read_bytes() == whole


def test_losses_of_another_base_template_or_dtype_are_not_taken(
    adapter: Path, measured_sides: list[tuple[int, list[bool]]]
) -> None:
    base, model = open_tuned(open_artifact(adapter))
    forgetting_probes.measure_probes(base, model)
    facts = base.as_manifest()
    for key, value in (
        ("digest", "0" * 64),
        ("template_digest", "0" * 64),
        ("dtype", "float16"),  # no processor's own choice
        ("bits", 4),
        ("numerics", 9),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Base, "as_manifest", lambda _, key=key, value=value: facts | {key: value})
            forgetting_probes.measure_probes(base, model)
    assert [sides for _, sides in measured_sides] == [[False, True]] * 6
    with pytest.MonkeyPatch.context() as patch:  # of one that was copied to another place they are
        patch.setattr(Base, "as_manifest", lambda _: facts | {"name": "elsewhere"})
        forgetting_probes.measure_probes(base, model)
    assert measured_sides[-1][1] == [True]


def test_home_that_cannot_be_written_to_stops_nothing(
    adapter: Path, measured_sides: list[tuple[int, list[bool]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(forgetting_probes, "write_file_atomic", refused)
    base, model = open_tuned(open_artifact(adapter))
    assert forgetting_probes.measure_probes(base, model) == forgetting_probes.measure_probes(base, model)
    assert [sides for _, sides in measured_sides] == [[False, True]] * 2


def test_probe_that_was_not_measured_leaves_no_worst(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> list[object]:
        raise AssetError("no network", "sartor assets install chitchat")

    monkeypatch.setattr(probes, "chitchat_rows", absent)
    results = forgetting_probes.measure_probes(*open_tuned(open_artifact(adapter)))
    assert results["arithmetic"]["rows"] == 40
    worst = forgetting_probes.worst_probe(results)
    assert worst == {"skipped": "small talk: no network (sartor assets install chitchat)"}
    assert check_forgetting(worst).outcome == "fail"


@pytest.mark.parametrize("name", forgetting_probes.PROBES)
def test_gate_takes_the_worst_probe(name: str) -> None:
    results = {other: {"rows": 40, **FIVE} for other in forgetting_probes.PROBES}
    results[name] = {**results[name], "high": 0.6}
    check = check_forgetting(forgetting_probes.worst_probe(results), ForgettingLimit(0.5))
    assert check.outcome == "fail" and f"worst of its probes, {name.replace('_', ' ')}" in check.detail
    flags = shlex.split(check.remedy.split(";")[0])[5:]
    for rehearsal in ("auto", "none"):
        taken = load({"base": "starter", "data": {"path": "d", "rehearsal": rehearsal}}, flags)
        assert isinstance(taken.data.rehearsal, Rehearsal) and taken.data.rehearsal.loss == "kl"
    assert check_forgetting(forgetting_probes.worst_probe(results), ForgettingLimit(0.7)).outcome == "pass"


def test_small_talk_rows_ignore_the_order_of_a_set(tmp_path: Path) -> None:
    """Conversations with equal words have one digest; their order must not depend on PYTHONHASHSEED."""
    words = [[{"text": "hello there my friend"}], [{"text": "good day to you"}]]
    (tmp_path / "dataset.json").write_text(json.dumps({f"talk-{number}": {"messages": words} for number in range(50)}))
    code = (
        "import sys\nfrom pathlib import Path\nfrom types import SimpleNamespace\n"
        "from sartor.core import assets\nfrom sartor.evaluate.audit import probes\n"
        "assets.install = lambda name: Path(sys.argv[1])\n"
        "assets.entry = lambda name: SimpleNamespace(paths=['dataset.json'])\n"
        "print([row.group for row in probes.chitchat_rows()])\n"
    )
    results = {
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            env=os.environ | {"PYTHONHASHSEED": str(seed), "PYTHONPATH": os.pathsep.join(sys.path)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in (1, 2)
    }
    assert len(results) == 1
