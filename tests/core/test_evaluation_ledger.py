"""The ledger of evaluations counts what is known of rows, and is never read in part."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from sartor.core import evaluation_ledger, line_ledger
from sartor.core.errors import ArtifactError
from sartor.core.evaluation_ledger import ledger_file, record_evaluation


def test_first_evaluation_counts_itself() -> None:
    evaluation_ledger.check_ledger()
    chosen = record_evaluation("a", ["1", "2"], "eval")
    assert (chosen.evaluations_known, chosen.adapters_known, chosen.problem) == (1, 1, "")
    assert chosen.sentence.startswith("at least 1 evaluation of these rows known on this machine since 20")


def test_evaluations_that_share_a_row_are_counted() -> None:
    for adapter, rows in (("a", "12"), ("a", "12"), ("b", "23"), ("c", "45")):
        record_evaluation(adapter, rows, "eval")
    chosen = record_evaluation("a", "12", "eval").as_json()
    assert (chosen["evaluations_known"], chosen["adapters_known"]) == (4, 2)
    assert chosen["rows_digest"] == record_evaluation("x", "21", "test").rows_digest


def test_ledger_holds_no_row_id() -> None:
    record_evaluation("a", ["f" * 64], "eval")
    line = json.loads(ledger_file().read_text())
    assert set(line) == {"schema", "digest", "adapter", "time", "split", "rows"} and "ffff" not in json.dumps(line)


@pytest.mark.parametrize("text", ["{", "[]\n", '{"schema": 1}\n', '{"schema": 2, "rows": []}\n', "\x00\n"])
@pytest.mark.parametrize("call", [evaluation_ledger.check_ledger, lambda: record_evaluation("a", ["1"], "eval")])
def test_damaged_ledger_is_an_error(text: str, call: Callable[[], object]) -> None:
    record_evaluation("a", ["1"], "eval")
    damaged = ledger_file().read_text() + text
    ledger_file().write_text(damaged)
    with pytest.raises(ArtifactError, match=r"evaluations\.jsonl") as error:
        call()
    assert error.value.remedy and ledger_file().read_text() == damaged


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("{\n", "line 3, column 2: "),
        ("[1]\n", "line 3: "),
        ('{"schema": 1}\n', "line 3 lacks 'rows'"),
        ('{"schema": 1, "rows": {}}\n', "line 3 lacks a value"),
        ('{"schema": 2}\n', "schema 2 in line 3"),
    ],
)
def test_error_names_the_damaged_line(text: str, detail: str) -> None:
    for adapter in "ab":
        record_evaluation(adapter, ["1"], "eval")
    ledger_file().write_text(ledger_file().read_text() + text)
    with pytest.raises(ArtifactError) as error:
        evaluation_ledger.check_ledger()
    assert detail in error.value.problem


def test_home_that_cannot_be_written_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    record_evaluation("a", ["1"], "eval")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(line_ledger, "write_file_atomic", refuse)
    chosen = record_evaluation("b", ["1"], "eval")
    assert chosen.evaluations_known == 2 and not chosen.as_json()["recorded"]
    assert "Read-only file system" in chosen.sentence
