"""Progress with the time left: of one piece of work, and of several as one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from clock import Clock
from sartor.core import progress
from sartor.core.progress import Progress, WholeProgress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


def test_a_line_every_ten_seconds_says_what_is_left(clock: Clock) -> None:
    lines: list[str] = []
    with Progress("export", 40, "prompts", lines.append) as work:
        for _ in range(10):
            clock.now += 3
            work.advance()
    # a quarter of it took 30 s
    assert lines[0] == "export  4 of 40 prompts, 10%, about 108 s left" and len(lines) == 2


def test_pieces_are_one_work(clock: Clock) -> None:
    """Tuning was foreseen to take 100 s and takes twice that: so will what comes after it."""
    lines: list[str] = []
    with WholeProgress("tailor", {"tune": 100.0, "evaluate": 50.0}, lines.append):
        with Progress("tune", 10, "updates", lines.append) as tuning:
            clock.now += 100
            tuning.show(5)
        with Progress("evaluate", 20, "rows", lines.append) as evaluation:
            clock.now += 150
            evaluation.show(10)
        with Progress("fetch", 1, "MB", lines.append) as other:
            clock.now += 20
            other.show(1)
    assert lines == [
        "tailor  tune: 5 of 10 updates; 33% of all, about 3 min left",
        "tailor  evaluate: 10 of 20 rows; 83% of all, about 50 s left",
    ]
    assert progress.whole_progress() is None


def test_whole_that_was_resumed_counts_what_this_process_did(clock: Clock) -> None:
    """The tuning goes on at 40 % and knows its pace; the evaluation was foreseen, and the machine is half as fast."""
    lines: list[str] = []
    with WholeProgress("tailor", {"tune": 100.0, "evaluate": 50.0, "forgetting": 10.0}, lines.append) as whole:
        clock.now += 30  # the base is opened; the first update tells no pace yet
        whole.show("tune", 0.39, "update 39", left_s=math.inf)
        clock.now += 11
        whole.show("tune", 0.4, "update 40", left_s=120.0)
        clock.now += 60
        whole.show("tune", 0.7, "update 70", left_s=60.0)
        clock.now += 90
        whole.show("evaluate", 0.02, "row 1")
        clock.now += 50
        whole.show("evaluate", 0.52, "row 26")
        clock.now += 48
        whole.show("forgetting", 0.0, "probes")
    left = [line.partition("about ")[2] for line in lines]
    # 61 + 60, 120 + 2 * 60, 60 + 2 * 60, 2 * (49 + 10), 2 * (24 + 10), 2 * 10
    assert left == ["2 min left", "4 min left", "3 min left", "118 s left", "68 s left", "20 s left"]


def test_nothing_to_do_is_done(clock: Clock) -> None:
    with Progress("audit", 0, "stages", pytest.fail) as work:
        work.show(0)
    assert work.done == 0


class Handle:
    """What IPython's `display` returns."""

    def __init__(self, drawn: list[str]) -> None:
        self.drawn = drawn

    def update(self, html: str) -> None:
        self.drawn.append(html)


class FakeDisplay:
    """IPython's module `display`, with texts in place of its objects."""

    def __init__(self) -> None:
        self.drawn: list[str] = []
        self.displays = 0

    def HTML(self, text: str) -> str:
        return text

    def display(self, html: str, *, display_id: bool) -> Handle:
        self.displays += 1
        self.drawn.append(html)
        return Handle(self.drawn)


def test_notebook_has_one_bar_that_is_drawn_in_its_place(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand steps are a handful of drawings, and no notice."""
    shown = FakeDisplay()
    monkeypatch.setattr(progress, "_notebook", lambda: shown)
    with Progress("<export>", 1000, "prompts", pytest.fail) as work:
        for _ in range(1000):
            clock.now += 0.02
            work.advance()
    assert shown.displays == 1 and 50 < len(shown.drawn) < 120
    assert "&lt;export&gt;" in shown.drawn[0] and shown.drawn[-1] == ""
    assert 'value="0.5' in "".join(shown.drawn) and "about 10 s left" in "".join(shown.drawn)


def test_bar_that_is_kept_ends_full(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = FakeDisplay()
    monkeypatch.setattr(progress, "_notebook", lambda: shown)
    bar = progress.ProgressBar("tune", "first update ...", is_shown=True, is_kept=True)
    bar.start()
    bar.show(0.5, "loss 2.0")
    bar.show(1.0, "loss 1.0")
    bar.stop()
    assert 'value="1.0000"' in shown.drawn[-1] and "loss 1.0" in shown.drawn[-1]


def test_progress_is_written_for_other_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "progress.jsonl"
    monkeypatch.setenv(progress.PROGRESS_FILE, str(file))
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_RECORDS", 0.0)
    with WholeProgress("tailor", {"tune": 100.0, "evaluate": 100.0}, lambda line: None):
        with Progress("tune", 10, "updates", lambda line: None) as tuning:
            tuning.show(5)
        with Progress("evaluate", 20, "rows", lambda line: None) as evaluation:
            evaluation.show(20)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["what"], line["fraction"]) for line in lines] == [("tailor", 0.25), ("tailor", 1.0)]
    assert "left_s" in lines[0] and lines[1]["left_s"] == 0
    assert lines[1]["text"] == "evaluate: 20 of 20 rows" and lines[1]["at"] >= lines[0]["at"]


def test_progress_is_written_at_most_every_half_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "progress.jsonl"
    monkeypatch.setenv(progress.PROGRESS_FILE, str(file))
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_RECORDS", 100.0)
    monkeypatch.setattr(progress, "_last_record", -200.0)
    with Progress("tune", 10, "updates", lambda line: None) as tuning:
        for done in range(11):
            tuning.show(done)
    fractions = [json.loads(line)["fraction"] for line in file.read_text().splitlines()]
    assert fractions[-1] == 1.0 and len(fractions) <= 2


def test_progress_file_that_cannot_be_written_to_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(progress.PROGRESS_FILE, str(tmp_path / "nowhere" / "x"))
    with Progress("tune", 1, "updates", lambda line: None) as tuning:
        tuning.show(1)
    assert tuning.done == 1 and not (tmp_path / "nowhere").exists()
