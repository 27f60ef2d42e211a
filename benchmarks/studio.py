"""The studio in Chromium through its real server: the circle with kills, review by keyboard, time left, first page.

first_page    {seconds, bytes}: Home of a folder with a specialist, in a browser without a cache, to its `load` event;
              median of a few, bytes of all bodies
review        {rows_per_minute, decisions, stored}: decisions by the keys a, r and u, one after the other, as fast as
              the page takes them; a person reads besides
million       {rows, drops, seconds.{browse, filter_split, filter_text, filter_nothing, drops, drops_reason}, worst_s}:
              a Dataset of a million rows, each page to its `load` event
time_left     {run_s, killed_at, error.{25, 50, 75}, worst}: a tuning that is killed at 40 % and started again; the
              time left that its page states at 25, 50 and 75 %, against the seconds that the run then took, without
              those in which it was dead; |stated - true| / true
circle        {kills.{job, studio, browser}, kills_in_all, untrue, lost, seconds}: upload, tailor, evaluate, release,
              talk, feedback, trace and fix, with kills in between; `untrue` counts pages that did not show what was
              true after a kill, `lost` what was there and is no longer

    python benchmarks/studio.py --json             # the starter, 20 kills: an hour
    python benchmarks/studio.py --small --json     # a tiny base, 3 kills, 40,000 rows
    python benchmarks/studio.py --json --only review million

Needs Chromium (Debian: chromium) and Playwright. Exits 1 if a page was untrue or something was lost.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import parts
import smallest
from large_dataset import write_large_dataset
from results import print_result
from studio_circle import Circle, end_jobs

import sartor
from sartor.core import assets
from sartor.core.home import home
from sartor.studio.jobs.job_control import JobControl
from sartor.studio.jobs.job_files import END, PROCESS, JobState, read_json
from studio_visit import CHROMIUM, StudioProcess, Visit, chromium

USER = "Ada"
FEW_ROWS = 8192
PARTS = ("first_page", "review", "million", "time_left", "circle")
MARKS, KILLED_AT = (0.25, 0.5, 0.75), 0.4
LOOK_S = 0.1


@dataclass(frozen=True)
class Sizes:
    """How much is done. minutes: budget of the circle's tuning; 0 for none. rows: of the circle's table."""

    kills: int
    decisions: int
    million_rows: int
    drops: int
    updates: int
    batch_tokens: int
    checkpoint_minutes: float
    rows: int
    minutes: float
    rounds: int


FULL = Sizes(20, 100, 1_000_000, 250_000, 240, 1024, 0.1, 400, 10, 5)
SMALL = Sizes(3, 6, 40_000, 2_000, 500, 64, 0.01, 160, 0, 1)


def main() -> None:
    """Measure, and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line (always so)")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=[], help="these parts alone")
    smallest.add_argument(parser, selections=("only",))
    arguments = parser.parse_args()
    if not shutil.which(CHROMIUM):
        sys.exit(f"there is no {CHROMIUM}: apt-get install chromium")
    sizes = SMALL if arguments.small else FULL
    measures: dict[str, Callable[[Path, Sizes], dict[str, Any]]] = {
        "first_page": measure_first_page,
        "review": measure_review,
        "million": measure_million,
        "time_left": measure_time_left,
        "circle": measure_circle,
    }
    result: dict[str, Any] = {}
    with smallest.home(arguments.small, "starter", "small-talk", "chitchat", "construction-faq"):
        for name in PARTS:
            if not arguments.only or name in arguments.only:
                # a job that was killed last may write on for a moment
                with tempfile.TemporaryDirectory(prefix="sartor-studio-", ignore_cleanup_errors=True) as folder:
                    result[name] = parts.run(name, lambda: measures[name](Path(folder).resolve(), sizes))  # noqa: B023
    result["absent"] = {name: "not asked for" for name in PARTS if name not in result}
    result["processors"] = len(os.sched_getaffinity(0))
    print_result(result)
    circle = result.get("circle", {})
    sys.exit(1 if circle.get("untrue") or circle.get("lost") else 0)


@contextmanager
def visited(folder: Path) -> Iterator[Visit]:
    """A studio on a folder as a process, and its owner's browser."""
    with StudioProcess(folder, os.environ) as studio, chromium() as browser:
        visit = Visit(browser, studio.address)
        visit.accept(studio.owner_link, USER)
        yield visit


def timed(visit: Visit, path: str) -> float:
    """Return the seconds from asking for a page to its `load` event."""
    started = time.perf_counter()
    visit.page.goto(f"{visit.address}{path}", wait_until="load")
    return time.perf_counter() - started


def measure_first_page(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Home with a cold cache."""
    write_large_dataset(folder / "faq" / "data", FEW_ROWS, 10)
    seconds, sent = [], 0
    with StudioProcess(folder, os.environ) as studio, chromium() as browser:
        owner = Visit(browser, studio.address)
        owner.accept(studio.owner_link, USER)
        state = owner.page.context.storage_state()
        for _ in range(sizes.rounds + 1):  # the first fills the studio's own caches
            visit = Visit(browser, studio.address, storage_state=state)
            bodies: list[Any] = []
            visit.page.on("response", lambda response, found=bodies: found.append(response))
            seconds.append(timed(visit, "/"))
            sent = sum(len(response.body()) for response in bodies)
            visit.close()
    return {"seconds": round(statistics.median(seconds[1:]), 3), "bytes": sent}


def measure_review(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Decide findings by keyboard, each fifth a second time."""
    dataset = folder / "faq" / "data"
    sartor.curate({"sources": [str(write_table(folder / "rows.csv", 2 * sizes.decisions))]}, dataset)
    examples = list(itertools.islice(sartor.read_examples(sartor.open(dataset)), sizes.decisions))
    fields = {"kind": "label", "reason": "suspicious_label", "suggestion": {"reply": "Another answer."}}
    lines = [
        json.dumps({**fields, "examples": [row.id], "detail": str(number)}) for number, row in enumerate(examples)
    ]
    (dataset / "review.jsonl").write_text("\n".join(lines) + "\n")
    with visited(folder) as visit:
        page = visit.open("/review/faq/data")
        started, decisions = time.monotonic(), 0
        for number in range(sizes.decisions):
            page.wait_for_selector(f"text={sizes.decisions - number} wait for you")
            page.wait_for_load_state("load")
            if number % 5 == 0:  # one that is changed
                page.keyboard.press("r")
                page.wait_for_selector(_after(sizes.decisions - number - 1))
                page.wait_for_load_state("load")
                page.keyboard.press("u")
                page.wait_for_selector("text=Your decision so far")
                page.wait_for_load_state("load")
                decisions += 1
            page.keyboard.press("a")
            decisions += 1
        page.wait_for_selector(".empty")
        wall_s = time.monotonic() - started
    counts = sartor.review_counts(dataset)
    return {
        "rows_per_minute": round(60 * sizes.decisions / wall_s, 1),
        "decisions": decisions,
        "stored": counts["accepted"] + counts["rejected"],
    }


def _after(waiting: int) -> str:
    """Return the selector of what a review queue shows once so many findings wait."""
    return f"text={waiting} wait for you" if waiting else ".empty"


def measure_million(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Pages of a large Dataset."""
    write_large_dataset(folder / "large", sizes.million_rows, sizes.drops)
    last = sizes.million_rows - 1
    pages = {
        "browse": "/data/large",
        "filter_split": "/data/large?split=eval",
        "filter_text": f"/data/large?q=question+{last}:",
        "filter_nothing": "/data/large?q=no+such+words",
        "drops": "/data/large?split=dropped",
        "drops_reason": "/data/large?split=dropped&reason=too_long",
    }
    with visited(folder) as visit:
        seconds = {name: round(timed(visit, path), 3) for name, path in pages.items()}
    return {
        "rows": sizes.million_rows,
        "drops": sizes.drops,
        "seconds": seconds,
        "worst_s": max(seconds.values()),
    }


def measure_time_left(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Kill a tuning at 40 %, start it again, and compare what its page states with what it took."""
    sartor.curate({"sources": [str(write_table(folder / "rows.csv", sizes.rows))]}, folder / "data")
    recipe = {
        "base": "starter",
        "data": str(folder / "data"),
        "budget": {"updates": sizes.updates},
        "optimizer": {"batch_tokens": sizes.batch_tokens},
        "checkpoints": {"every_minutes": sizes.checkpoint_minutes},
    }
    (folder / "tune.yaml").write_text(json.dumps(recipe))
    control = JobControl(folder / ".studio" / "jobs")
    arguments = ["tune", str(folder / "tune.yaml"), "--out", str(folder / "adapter")]
    job = control.start(arguments, title="time left", by=USER, cwd=folder)
    stated, killed = follow(control, job.id, MARKS[:1], stop_at=KILLED_AT)
    os.kill(int(read_json(control.files.path(job.id) / PROCESS)["pid"]), 9)
    while not control.files.status(job.id).state.is_over:
        time.sleep(LOOK_S)
    again = control.again(job.id, by=USER)
    reached: dict[str, float] = {}
    more, _ = follow(control, again.id, MARKS[1:], passing=(killed[1], reached))
    status = control.files.status(again.id)
    if status.state is not JobState.DONE:
        sys.exit(f"the tuning is {status.state.value}: {control.log_lines(again.id)[-5:]}")
    error = {}
    for mark, (at, left_s) in {**stated, **more}.items():
        dead_s = reached["at"] - killed[0] if mark < KILLED_AT else 0.0
        true_s = status.ended_at - at - dead_s
        error[f"{mark:.0%}".rstrip("%")] = round(abs(left_s - true_s) / true_s, 4)
    first = read_json(control.files.path(job.id) / PROCESS)
    run_s = killed[0] - float(first["at"]) + status.ended_at - status.started_at
    return {
        "run_s": round(run_s, 1),
        "killed_at": round(killed[1], 3),
        "error": error,
        "worst": max(error.values()),
    }


def follow(
    control: JobControl,
    job_id: str,
    marks: tuple[float, ...],
    *,
    stop_at: float = 2.0,
    passing: tuple[float, dict[str, float]] | None = None,
) -> tuple[dict[float, tuple[float, float]], tuple[float, float]]:
    """Follow a running job up to a fraction or to its end.

    passing: (fraction, where the moment at which it is passed is noted under "at").
    Returns {mark: (moment, seconds left that the page then states)} and the last (moment, fraction).
    """
    stated: dict[float, tuple[float, float]] = {}
    last = (time.time(), 0.0)
    while not (control.files.path(job_id) / END).is_file():
        progress = control.progress(control.files.status(job_id))
        if progress is not None:
            last = (time.time(), progress.fraction)
            for mark in marks:
                if progress.fraction >= mark and mark not in stated and math.isfinite(progress.left_s or math.inf):
                    stated[mark] = (last[0], progress.left_s or 0.0)
            if passing is not None and progress.fraction >= passing[0]:
                passing[1].setdefault("at", last[0])
            if progress.fraction >= stop_at:
                break
        time.sleep(LOOK_S)
    if len(stated) < len(marks):
        sys.exit(f"the run was over before its time left was seen at {marks}: {control.log_lines(job_id)[-5:]}")
    return stated, last


def write_table(file: Path, rows: int) -> Path:
    """Write questions and answers of the asset construction-faq as CSV and return the file."""
    source = next(Path(assets.install("construction-faq")).rglob("faq-en.jsonl"))
    with source.open(encoding="utf-8") as lines, file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["prompt", "completion"])
        for number, line in enumerate(lines):
            if number < rows:
                fields = json.loads(line)
                writer.writerow([fields["q"], fields["a"]])
    return file


def measure_circle(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """The circle with its kills."""
    work = folder / "work"
    work.mkdir()
    if not (home() / "keys" / "default").exists():
        keygen = [sys.executable, "-P", "-m", "sartor", "keygen", str(home() / "keys" / "default"), "--trust"]
        subprocess.run(keygen, check=True, stdout=subprocess.DEVNULL)
    table = write_table(folder / "rows.csv", sizes.rows)
    with table.open(encoding="utf-8") as stream:
        questions = [row["prompt"] for row in csv.DictReader(stream)]
    try:
        with StudioProcess(work, os.environ) as studio, chromium() as browser:
            circle = Circle(browser, studio, work, base="starter", rows=table, questions=questions)
            outcome = asdict(circle.run(sizes.kills))
    finally:
        end_jobs(work)
    for fault in (*outcome["untrue"], *outcome["lost"]):
        print(fault, file=sys.stderr)
    return {
        **outcome,
        "kills_in_all": sum(outcome["kills"].values()),
        "untrue": len(outcome["untrue"]),
        "lost": len(outcome["lost"]),
    }


if __name__ == "__main__":
    main()
