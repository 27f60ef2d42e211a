"""Benchmarks go on where a call ended, end in time, and are recorded; the scoreboard says what their results say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
# programs that are one part -> why
ONE_PART = {
    "bad_adapters": "writes files of seconds",
    "chaos": "faults are done to one served team, whose state they share",
    "collaborate": "--out has the specialist and every answer",
    "federate_robust": "a minute",
    "norms": "seconds",
    "packing": "a minute",
    "personal": "minutes",
    "preferences": "minutes, on one base that is made for them",
    "revoke": "minutes, on one Dataset that is made for them",
    "secure_sum": "one round",
    "serve": "a round has every side, which are processes that stay open",
    "spoken_rows": "writes files",
    "start": "seconds",
}
PROGRAM = """
import argparse, sys, time
sys.path.insert(0, {benchmarks!r})
import parts, smallest
from results import print_result
parser = argparse.ArgumentParser()
parser.add_argument("--json", action="store_true")
parser.add_argument("--seconds", type=float, default=0.0)
smallest.add_argument(parser)
arguments = parser.parse_args()
def compute(number):
    with open("calls.txt", "a") as file:
        file.write(str(number))
    return {{number: number}}
results = [parts.run(f"part {{number}}", lambda: compute(number)) for number in (1, 2)]
results.append(parts.run("slow", lambda: time.sleep(arguments.seconds)))
print_result({{"results": results[:2]}})
"""


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(BENCHMARKS / "scoreboard"))


def call(folder: Path, *options: str, record: bool = False) -> subprocess.CompletedProcess[str]:
    (folder / "small.py").write_text(PROGRAM.format(benchmarks=str(BENCHMARKS)))
    recorder = [str(BENCHMARKS / "scoreboard" / "record.py")] if record else []
    command = [sys.executable, *recorder, str(folder / "small.py"), "--json", *options]
    environment = {**os.environ, "SARTOR_BENCH_RESULTS": str(folder / "results")}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=600
    )


def test_second_call_takes_over_finished_parts(tmp_path: Path) -> None:
    first, second = (call(tmp_path, "--work", "work") for _ in range(2))
    assert (tmp_path / "calls.txt").read_text() == "12", first.stderr + second.stderr
    assert first.stdout == second.stdout and json.loads(second.stdout) == {"results": [{"1": 1}, {"2": 2}]}
    assert re.search(r"part 1: \d+\.\d s", first.stderr) and "part 1: of an earlier call" in second.stderr
    call(tmp_path, "--work", "work", "--seconds", "0.01")
    assert (tmp_path / "calls.txt").read_text() == "1212", "other options, other parts"


def test_second_call_of_a_program_measures_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import intervals
    import parts

    command = ["intervals.py", "--trials", "2", "--groups", "5", "--methods", "sartor", "--work", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(parts, "_watch", lambda call: None)
    monkeypatch.setattr(parts, "_call", parts.Call())  # put back after the test
    intervals.main()
    first = json.loads(capsys.readouterr().out)

    def measure_again(each: Any) -> tuple[float, float]:
        raise AssertionError("measured twice")

    monkeypatch.setitem(intervals.METHODS, "sartor", measure_again)
    intervals.main()
    captured = capsys.readouterr()
    second = json.loads(captured.out)
    assert {**first, "wall_s": 0} == {**second, "wall_s": 0}
    assert captured.err.count("of an earlier call") == len(intervals.DRAWS) + len(intervals.EFFECTS)


def test_call_that_ends_within_a_pair_repeats_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds that were measured hours apart are no pair."""
    import argparse

    import parts
    import train

    monkeypatch.setattr(parts, "_call", parts.Call(folder=tmp_path))
    sides: list[str] = []

    def run(folder: Path, side: Any, *_: Any) -> dict[str, Any]:
        sides.append(side.folder)
        if len(sides) == 2:
            raise KeyboardInterrupt
        return {"side": side.folder}

    monkeypatch.setattr(train, "run", run)
    pair = ("trl", 0, tmp_path, train.PEERS["trl"], {}, argparse.Namespace())
    with pytest.raises(KeyboardInterrupt):
        train.run_pair(*pair)
    assert train.run_pair(*pair) == train.run_pair(*pair) == ({"side": "sartor"}, {"side": "trl"})
    assert sides == ["sartor", "trl"] * 2


def test_requirements_of_a_peer_are_part_of_the_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import parts

    monkeypatch.setattr(parts, "HERE", tmp_path / "benchmarks")
    monkeypatch.setattr(parts, "CODE", (tmp_path,))
    (tmp_path / "requirements.txt").write_text("trl==1.0")
    before = parts.digest_of_code()
    (tmp_path / "requirements.txt").write_text("trl==1.1")
    assert parts.digest_of_code() != before


def test_call_ends_within_a_part_when_its_minutes_are_over(tmp_path: Path) -> None:
    """It exits with 75, prints no result and says that the same command goes on."""
    done = call(tmp_path, "--work", "work", "--seconds", "50", "--minutes", "0.05")
    assert done.returncode == 75 and done.stdout == ""
    assert "in the part 'slow': the same command goes on" in done.stderr


def test_record_says_what_was_measured_and_what_was_not(tmp_path: Path) -> None:
    done = call(tmp_path, "--work", "work", "--seconds", "50", "--minutes", "0.05", record=True)
    record = json.loads((tmp_path / "results" / "small.json").read_text())
    assert done.returncode == 0, "the same command only has to go on"
    assert "result" not in record and "unfinished" in record["not_run"]
    assert json.loads(call(tmp_path, record=True).stdout)["results"]
    record = json.loads((tmp_path / "results" / "small.json").read_text())
    assert record["result"]["results"] == [{"1": 1}, {"2": 2}] and record["machine"]["cores"] and "commit" in record


PARTIAL = """
import sys
sys.path.insert(0, {benchmarks!r})
import results
results.print_result({{"sets": {{"a": 1}}, "absent": {{"b": "the minutes are over"}}, "unfinished": ["b"]}})
"""


def test_partial_result_is_recorded_as_not_run_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "partial.py").write_text(PARTIAL.format(benchmarks=str(BENCHMARKS)))
    command = [sys.executable, str(BENCHMARKS / "scoreboard" / "record.py"), str(tmp_path / "partial.py")]
    environment = {**os.environ, "SARTOR_BENCH_RESULTS": str(tmp_path)}
    for _ in range(2):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
        assert done.returncode == 0 and json.loads(done.stdout)["sets"] == {"a": 1}
        assert "--again" not in done.stderr, "it was taken for a finished result"
    record = json.loads((tmp_path / "partial.json").read_text())
    assert "unfinished when its call ended: b" in record["not_run"] and record["result"]["sets"] == {"a": 1}


SECTIONED = """
import sys
sys.path.insert(0, {benchmarks!r})
import results
asked = sys.argv[sys.argv.index("--only") + 1:]
figures = {{"a": {{"x": 1, "y": 2}}, "b": 3}}
result = {{name: figures[name] for name in asked}}
absent = {{name: f"not asked for: --only {{name}}" for name in figures if name not in asked}}
results.print_result({{**result, "absent": {{**absent, "peer": "not installed"}}}})
"""


def test_keep_adds_sections_and_says_where_each_is_from(tmp_path: Path) -> None:
    """A figure of the scoreboard is whole once no part of it is absent, and names the call that measured it."""
    import scoreboard

    program, file = tmp_path / "sectioned.py", tmp_path / "sectioned.json"
    program.write_text(SECTIONED.format(benchmarks=str(BENCHMARKS)))
    recorder = [sys.executable, str(BENCHMARKS / "scoreboard" / "record.py")]
    environment = {**os.environ, "SARTOR_BENCH_RESULTS": str(tmp_path)}

    def record(*options: str) -> dict[str, Any]:
        command = [*recorder, *options[:-1], str(program), "--only", options[-1]]
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=600)
        return dict(json.loads(file.read_text()))

    of_a, of_b = target(program="sectioned", value="a.x"), target(program="sectioned", value="b", take="")
    record("a")
    assert scoreboard.standing_of(of_a, tmp_path).state == "met"
    assert "not asked for" in scoreboard.standing_of(of_b, tmp_path).source
    both = record("--keep", "b")
    assert both["result"]["a"] == {"x": 1, "y": 2} and both["result"]["absent"] == {"peer": "not installed"}
    assert both["command"][-1] == "b" and both["kept"]["a"]["command"][-1] == "a"
    for of_section, name in ((of_a, "a"), (of_b, "b")):
        standing = scoreboard.standing_of(of_section, tmp_path)
        assert standing.state == "met" and f"--only {name}`" in standing.source
    again = record("--keep", "a")
    assert list(again["kept"]) == ["b"] and again["result"]["b"] == 3
    for unfinished in (PARTIAL.format(benchmarks=str(BENCHMARKS)), "raise SystemExit(75)"):
        program.write_text(unfinished)
        assert record("--keep", "--again", "a") == again, "a call that ended early took the figures away"
    assert "result" not in record("--again", "a")


def begin(monkeypatch: pytest.MonkeyPatch, program: Any, work: Path, *options: str) -> None:
    """Set a benchmark's command line, with the clock put back after the test."""
    import parts

    monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", "--json", "--work", str(work), *options])
    monkeypatch.setattr(parts, "_watch", lambda call: None)
    monkeypatch.setattr(parts, "_call", parts.Call())


def test_kept_results_are_of_one_code_and_its_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import forecast
    import parts

    folders = []
    for options in ((), ("--only", "snips"), ("--seconds", "5")):
        begin(monkeypatch, forecast, tmp_path, *options)
        forecast.parse_arguments()
        folders.append(parts.work_folder(tmp_path))
    assert folders[0] == folders[1] != folders[2] and {folder.parent for folder in folders} == {tmp_path}
    monkeypatch.setattr(parts, "digest_of_code", lambda: "another code")
    forecast.parse_arguments()
    assert parts.work_folder(tmp_path) not in folders


def test_forecast_tunes_again_what_a_busy_machine_slowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import forecast
    import parts

    interval = {"actual": 2.0, "low": 1.0, "high": 3.0, "inside": True, "width": 3.0}
    tuned: list[str] = []
    others = {"construction-faq-starter-16": 0.9, "construction-faq-starter-32": 0.0}

    def plan_and_tune(run: Any, *_: Any) -> dict[str, Any]:
        tuned.append(run.name)
        measured = dict.fromkeys(("time", "memory", "memory_of_tune"), interval)
        return {"run": run.name, "others_cpus": others[run.name], **measured}

    monkeypatch.setattr(forecast, "plan_and_tune", plan_and_tune)
    begin(monkeypatch, forecast, tmp_path, "--only", "construction-faq")
    with pytest.raises(SystemExit) as ended:
        forecast.main()
    result = json.loads(capsys.readouterr().out)
    assert ended.value.code == parts.UNFINISHED and result["unfinished"] == ["construction-faq-starter-16"]
    assert (result["runs"], result["time_runs"]) == (2, 1) and list(result["absent"]) == [
        "construction-faq-starter-16.time"
    ]
    others["construction-faq-starter-16"] = 0.1
    forecast.main()
    result = json.loads(capsys.readouterr().out)
    assert (result["time_runs"], result["absent"], result["unfinished"]) == (2, {}, [])
    assert tuned == ["construction-faq-starter-16", "construction-faq-starter-32", "construction-faq-starter-16"]


def test_forecast_without_time_for_a_run_is_unfinished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import forecast
    import parts

    begin(monkeypatch, forecast, tmp_path, "--only", "construction-faq", "--minutes", "0")
    with pytest.raises(SystemExit) as ended:
        forecast.main()
    assert ended.value.code == parts.UNFINISHED


def test_defaults_out_of_time_are_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import defaults
    import parts

    def measure(name: str, options: Any) -> dict[str, Any]:
        if name == "textile":
            raise defaults.OutOfTimeError
        return {"default": 0.5}

    monkeypatch.setattr(defaults, "measure", measure)
    begin(monkeypatch, defaults, tmp_path, "--sets", "snips", "textile")
    with pytest.raises(SystemExit) as ended:
        defaults.main()
    result = json.loads(capsys.readouterr().out)
    assert (
        ended.value.code == parts.UNFINISHED
        and result["unfinished"] == ["sets.textile"]
        and list(result["sets"]) == ["snips"]
    )
    assert "minutes are over" in result["absent"]["sets.textile"]
    assert "not asked for" in result["absent"]["sets.documents"]


@pytest.mark.parametrize(("values", "fraction"), [((0.0, 0.0), None), ((0.25, 0.5), 0.5), ((0.2, 0.0), 1.0)])
def test_defaults_of_nothing_over_nothing_are_not_measured(
    values: tuple[float, float],
    fraction: float | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """values: exact match of the default, and of each point of the grid."""
    import defaults

    class Runs:
        def __init__(self, training_set: Any, folder: Path, options: Any) -> None:
            settings = {name: {"value": {}} for name in ("budget", "data.rehearsal")}
            settings |= {"optimizer.learning_rate": {"value": 1}, "optimizer.batch_tokens": {"value": 1}}
            (folder / "default-0.json").write_text(json.dumps({"settings": settings}))

        def value(self, name: str, settings: dict[str, Any], seed: int) -> float:
            return values[name != "default"]

        def counts(self) -> dict[str, int]:
            return {}

    monkeypatch.setattr(defaults, "Runs", Runs)
    begin(monkeypatch, defaults, tmp_path, "--sets", "snips")
    defaults.main()
    result = json.loads(capsys.readouterr().out)
    assert result["sets"]["snips"].get("fraction") == pytest.approx(fraction)
    assert result["absent"].get("fraction") == (None if fraction is not None else "both values are 0: snips")


def target(**changes: Any) -> Any:
    import scoreboard

    fields = {
        "issue": 20,
        "item": "A1",
        "text": "fraction",
        "program": "defaults",
        "value": "sets.*.fraction",
        "take": "min",
    }
    return scoreboard.Target(**{**fields, "at_least": 0.97, **changes})


@pytest.mark.parametrize(
    ("record", "state"),
    [
        ({"result": {"sets": {"a": {"fraction": 0.98}, "b": {"fraction": 0.99}}}}, "met"),
        ({"result": {"sets": {"a": {"fraction": 0.98}, "b": {"fraction": 0.96}}}}, "**not met**"),
        ({"result": {"absent": {"sets": "not asked for"}}}, "not run here"),
        (
            {"result": {"sets": {"a": {"fraction": 0.98}}, "absent": {"b": "no time"}, "unfinished": ["b"]}},
            "not run here",
        ),
        ({"result": {"sets": {"a": {"fraction": 0.98}}}, "not_run": "unfinished"}, "not run here"),
        ({"not_run": "exit code 1"}, "not run here"),
    ],
)
def test_standing_is_what_the_results_file_says(record: dict[str, Any], state: str, tmp_path: Path) -> None:
    import scoreboard

    assert scoreboard.standing_of(target(), tmp_path).state == "not run here"
    common = {"command": ["benchmarks/defaults.py"], "commit": "abc", "machine": {"processor": "x"}}
    (tmp_path / "defaults.json").write_text(json.dumps({**common, **record}))
    assert scoreboard.standing_of(target(), tmp_path).state == state


def test_figure_of_a_part_or_other_processor_is_not_compared(tmp_path: Path) -> None:
    """It is shown with the reason; a figure of a processor with the needed flag is `met`."""
    import scoreboard

    result = {"result": {"sets": {"a": {"fraction": 0.98}}}, "commit": "abc"}
    common = {**result, "command": ["benchmarks/defaults.py"], "machine": {"processor": "x", "flags": ["avx2"]}}
    file = tmp_path / "defaults.json"
    for record, needs, why in (
        ({**common, "command": ["benchmarks/defaults.py", "--sets=snips"]}, "", "of a part alone (--sets=snips)"),
        (common, "avx512_bf16", "a processor with avx512_bf16"),
        (common, "avx2", ""),
    ):
        file.write_text(json.dumps(record))
        standing = scoreboard.standing_of(target(needs=needs), tmp_path)
        assert standing.measured == "0.98" and why in standing.source
        assert standing.state == ("not compared" if why else "met")
    file.write_text(json.dumps({**common, "command": ["benchmarks/defaults.py", "--quick"]}))
    assert scoreboard.standing_of(target(), tmp_path).state == "not compared"
    assert scoreboard.standing_of(target(whole_with="--quick"), tmp_path).state == "met"


@pytest.mark.parametrize(("success", "state"), [(1.0, "met"), (0.999, "**not met**"), (None, "not run here")])
def test_chaos_of_attackers_reaches_the_scoreboard(success: float | None, state: str, tmp_path: Path) -> None:
    """The target reads what chaos writes of lost keys, a lost database, bombs and forged turns; of all or of none."""
    import chaos
    import chaos_faults
    import scoreboard

    assert {fault.name for fault in chaos_faults.FAULTS} >= set(chaos_faults.HOSTILE)
    faults: dict[str, Any] = {name: {"others_success": 1.0, "p99_s": 0.2} for name in chaos_faults.HOSTILE}
    faults["all API keys lost"] = {"p99_s": 0.1}
    faults["forged turns"] = {"skipped": "no base"} if success is None else {"others_success": success, "p99_s": 0.3}
    result = {"faults": faults, **chaos.hostile_of(faults)}
    (stated,) = (one for one in scoreboard.read_targets() if one.issue == 23 and one.program == "chaos")
    assert stated.equals == 1.0 and stated.text == (
        "chaos with keys lost, database lost, bombs, forged turns: others' success 1, p99 stated"
    )
    record = {"command": ["benchmarks/chaos.py"], "commit": "abc", "machine": {"processor": "x"}, "result": result}
    (tmp_path / "chaos.json").write_text(json.dumps(record))
    assert scoreboard.standing_of(stated, tmp_path).state == state


@pytest.mark.parametrize(
    "changes", [{"at_least": None}, {"at_most": 1.0}, {"program": ""}, {"take": "best"}, {"value": ""}]
)
def test_target_that_nothing_could_be_compared_with_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="fraction"):
        target(**changes)


def test_page_is_what_the_results_say() -> None:
    command = [sys.executable, str(BENCHMARKS / "scoreboard" / "scoreboard.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_benchmark_can_be_called_with_a_work_folder() -> None:
    """`make bench` gives each `--work`; five had such an option before, for parts of their own."""
    programs = [
        file for file in BENCHMARKS.glob("*.py") if '__name__ == "__main__"' in file.read_text(encoding="utf-8")
    ]
    parts_of_others = {"serve_sides", "serve_work", "learn_rows"}
    texts = {file.stem: file.read_text(encoding="utf-8") for file in programs}
    lacking = {name for name, text in texts.items() if "smallest.add_argument(" not in text}
    assert lacking == parts_of_others
    undivided = {name for name, text in texts.items() if "parts.run(" not in text and "has_work=True" not in text}
    assert undivided - parts_of_others == set(ONE_PART)
