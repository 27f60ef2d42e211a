"""The full circle in a browser, with kills in between: from an uploaded table to a reply that is traced and repaired.

Jobs, the studio and the browser are killed by turns. After each kill the page must show what is true, which is read
from the processes themselves, and at the end nothing may be missing that was there before.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT / "tools") not in sys.path:
    sys.path.append(str(ROOT / "tools"))

from sartor.core.artifacts import kind_of, open_artifact  # noqa: E402
from sartor.core.processes import ProcessId  # noqa: E402
from sartor.studio.jobs.job_files import END, PROCESS, PROGRESS, read_json  # noqa: E402
from studio_visit import Visit  # noqa: E402

NAME, USER = "faq", "Ada"
CORRECTION, REASON = "As it should be said.", "the circle of the studio"
OVER = ("done", "failed", "stopped", "lost")
TIMEOUT_S = 1800.0
LOOK_S = 0.1


class Kill(Enum):
    """What is killed: the job by SIGKILL, the studio by SIGKILL, or the browser, which another one replaces."""

    JOB = "job"
    STUDIO = "studio"
    BROWSER = "browser"


@dataclass
class Outcome:
    """What became of a circle.

    kills: of each kind. untrue: pages that did not show what was true. lost: what was there and is no longer.
    seconds: of each stage.
    """

    kills: dict[str, int] = field(default_factory=lambda: {kind.value: 0 for kind in Kill})
    untrue: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


class CircleError(Exception):
    """A page or a job did not come as far as it must."""


class Circle:
    """A circle through one studio.

    studio: its process. browser: Playwright's. folder: of the studio. base: of the tuning. rows: CSV with the columns
    prompt and completion. questions: for the conversation.
    """

    def __init__(
        self, browser: Any, studio: Any, folder: Path, *, base: str, rows: Path, questions: list[str]
    ) -> None:
        self._browser, self._studio, self._folder = browser, studio, folder
        self._base, self._rows, self._questions = base, rows, questions
        self._kinds = itertools.cycle(Kill)
        self._asked: dict[str, list[str]] = {}  # path of a conversation -> questions
        self.visit = Visit(browser, studio.address)
        self.outcome = Outcome()

    def run(self, kills: int) -> Outcome:
        """Go round once, with so many kills in all, and return what became of it.

        Those that came too late for a job are made during the conversation.
        """
        evaluation_kills = kills // 5
        tailor_kills = kills - evaluation_kills - max(1, kills // 5)
        with self._stage("upload"):
            self.visit.accept(self._studio.owner_link, USER)
            self._upload()
        with self._stage("tailor"):
            self._follow(self._start_tailor(), tailor_kills)
        with self._stage("evaluate"):
            self.visit.open(f"/artefact/{NAME}/adapter")
            self._follow(self._press("form[action='/evaluate'] button"), evaluation_kills)
        with self._stage("release"):
            self._release()
        with self._stage("talk"):
            path = self._talk(kills - sum(self.outcome.kills.values()))
        with self._stage("feedback"):
            self._correct(path)
        with self._stage("trace"):
            self._trace(path)
        with self._stage("fix"):
            self._fix()
        self._look_for_losses()
        self.visit.close()
        return self.outcome

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.outcome.seconds[name] = round(time.monotonic() - started, 1)

    def _upload(self) -> None:
        page = self.visit.open("/new")
        page.set_input_files("input[type=file]", self._rows)
        page.click("form.drop button")
        page.wait_for_url("**/new?file=*")

    def _start_tailor(self) -> str:
        page = self.visit.page
        page.fill("input[name=name]", NAME)
        page.fill("input[name=base]", self._base)
        page.fill("input[name=licence]", "own")
        return self._press("form[action='/new'] button:not(.second)")

    def _press(self, selector: str) -> str:
        """Press a button that starts a job; return the job's id."""
        self.visit.page.click(selector)
        self.visit.page.wait_for_url("**/jobs/*")
        return self.visit.page.url.rpartition("/")[2]

    def _follow(self, job_id: str, kills: int, *, expected: str = "done") -> str:
        """Follow a job on its page to its end, with kills evenly over its progress; return the id of the last try."""
        for number in range(kills):
            self._wait_for_progress(job_id, (number + 0.5) / kills)
            job_id = self._kill(next(self._kinds), job_id)
        state = self._wait_for_end(job_id)
        if state != expected:
            raise CircleError(f"job {job_id} is {state}, not {expected}: {self._text()}")
        return job_id

    def _job_file(self, job_id: str, name: str) -> Path:
        return self._folder / ".studio" / "jobs" / job_id / name

    def _wait_for_progress(self, job_id: str, threshold: float) -> None:
        """Wait until a job has reported a fraction of its work, or has ended."""
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            if self._job_file(job_id, END).is_file() or self._fraction(job_id) >= threshold:
                return
            time.sleep(LOOK_S)
        raise CircleError(f"job {job_id} makes no progress: {self._text()}")

    def _fraction(self, job_id: str) -> float:
        file = self._job_file(job_id, PROGRESS)
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        try:
            return float(json.loads(lines[-1])["fraction"]) if lines else 0.0
        except ValueError:  # the line is being written
            return 0.0

    def _wait_for_end(self, job_id: str) -> str:
        """Wait until the page of a job, which is renewed by itself, shows that it has ended; return its state."""
        page = self.visit.page
        if not page.url.endswith(f"/jobs/{job_id}"):
            self.visit.open(f"/jobs/{job_id}")
        selector = ", ".join(f"#live .state.{state}" for state in OVER)
        page.wait_for_selector(selector, timeout=TIMEOUT_S * 1000)
        return self._shown_state()

    def _shown_state(self) -> str:
        classes = str(self.visit.page.locator("#live .state").get_attribute("class"))
        return classes.replace("state", "").strip()

    def _kill(self, kind: Kill, job_id: str) -> str:
        """Kill something while a job runs, check what its page shows, and return the id of the job that goes on.

        A job that has ended meanwhile is not killed.
        """
        if kind is Kill.JOB:
            if not self._kill_job(job_id):
                return job_id
            if (state := self._wait_for_end(job_id)) != "failed":
                self.outcome.untrue.append(f"a killed job is {state}")
            if not self.visit.page.locator("#live .warn").count():
                self.outcome.untrue.append("the page of a killed job says nothing of it")
            job_id = self._press(f"form[action='/jobs/{job_id}/again'] button")
        elif kind is Kill.STUDIO:
            self._restart_studio()
        else:
            self._change_browser()
        self._check_state(job_id)
        return job_id

    def _kill_job(self, job_id: str) -> bool:
        """Kill the process of a job; return False if it has ended."""
        pid = int(read_json(self._job_file(job_id, PROCESS))["pid"])
        if self._job_file(job_id, END).is_file():
            return False
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        self.outcome.kills[Kill.JOB.value] += 1
        return True

    def _restart_studio(self) -> None:
        self.outcome.kills[Kill.STUDIO.value] += 1
        self._studio.kill()
        self._studio.start()

    def _change_browser(self) -> None:
        self.outcome.kills[Kill.BROWSER.value] += 1
        url = self.visit.page.url
        self.visit.close()
        self.visit = Visit(self._browser, self._studio.address)
        self.visit.log_in(USER)
        self.visit.open(url.removeprefix(self._studio.address))

    def _check_state(self, job_id: str) -> None:
        """Note it if the page of a job does not show whether its process runs."""
        before = self._is_alive(job_id)
        self.visit.open(f"/jobs/{job_id}")
        shown = self._shown_state()
        after = self._is_alive(job_id)
        if before and after and shown != "running":
            self.outcome.untrue.append(f"a job that runs is {shown}")
        if before is False and after is False and shown not in OVER:
            self.outcome.untrue.append(f"a job that has ended is {shown}")

    def _is_alive(self, job_id: str) -> bool | None:
        """Return whether the process of a job runs; None if it has none yet."""
        fields = read_json(self._job_file(job_id, PROCESS))
        if not fields:
            return None
        try:
            state = Path(f"/proc/{fields['pid']}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        return state != "Z"

    def _release(self) -> None:
        """Release the Adapter with the Report of `tailor`, unless it was released; waive what holds it back."""
        for is_waiving in (False, True):
            page = self.visit.open(f"/evaluate/{NAME}/report")
            if not page.locator("form[action='/release']").count():
                return
            page.fill("form[action='/release'] input[name=name]", NAME)
            if is_waiving:
                page.click("form[action='/release'] summary")
                for box in page.locator("form[action='/release'] input[name=waive]").all():
                    box.check()
                page.fill("form[action='/release'] textarea[name=reason]", REASON)
            job_id = self._press("form[action='/release'] button")
            if (state := self._wait_for_end(job_id)) == "done":
                return
            if is_waiving or not self.visit.page.locator("#live .warn").count():
                raise CircleError(f"the release is {state}: {self._text()}")

    def _talk(self, kills: int) -> str:
        """Ask each question; between two of them kill by turns the job that serves, the studio and the browser.

        Return the path of the last conversation.
        """
        path = self._open_talk()
        for number, question in enumerate(self._questions[: kills + 1]):
            self._ask(path, question)
            if number == kills:
                break
            kind = next(self._kinds)
            if kind is Kill.JOB:
                self._kill_job(path.rpartition("/")[2])
                path = self._open_talk()
            elif kind is Kill.STUDIO:
                self._restart_studio()
            else:
                self._change_browser()
            self._check_conversation(path)
        return path

    def _correct(self, path: str) -> None:
        """Correct the first reply of a conversation."""
        page = self.visit.open(path)
        form = page.locator("#reply-0-0 form").filter(has=page.locator("textarea[name=correction]"))
        page.locator("#reply-0-0 details").filter(has=page.locator("textarea[name=correction]")).locator(
            "summary"
        ).click()
        form.locator("textarea").fill(CORRECTION)
        form.locator("button").click()
        page.wait_for_selector("#reply-0-0 [role=status] code")

    def _trace(self, path: str) -> None:
        """Ask why of the first reply, wait for the training rows, and mark the first of them."""
        page = self.visit.open(path)
        page.click("#reply-0-0 form[action$='/why'] button")
        page.wait_for_url("**/why/*")
        page.wait_for_selector("form#suspects", timeout=TIMEOUT_S * 1000)
        page.locator("form#suspects input[name=examples]").first.check()
        page.click("form#suspects button[name=to]")
        page.wait_for_url("**/why/*/fix")

    def _fix(self) -> None:
        """Drop the marked row, tune again and release the next version; waive what holds it back."""
        page = self.visit.page
        page.fill("input[name=reason]", REASON)
        page.locator("details").filter(has=page.locator("input[name=waive]")).locator("summary").click()
        page.fill("input[name=waive]", "gain forgetting")
        page.locator("main form").filter(has=page.locator("input[name=reason]")).locator("button").click()
        page.wait_for_selector(".verdict.better, .warn[role=alert]", timeout=TIMEOUT_S * 1000)
        if not page.locator(".verdict.better").count():
            raise CircleError(f"the repair failed: {self._text()}")

    def _open_talk(self) -> str:
        """Open the newest Release, or the Adapter if there is none; return the path of the conversation."""
        releases = sorted(path.name for path in (self._folder / NAME).iterdir() if kind_of(path) == "release")
        page = self.visit.open(f"/artefact/{NAME}/{releases[-1] if releases else 'adapter'}")
        page.click("form[action='/talk'] button")
        page.wait_for_url("**/talk/*")
        path = page.url.removeprefix(self._studio.address)
        self._asked.setdefault(path, [])
        return path

    def _ask(self, path: str, question: str) -> None:
        page = self.visit.open(path)
        page.wait_for_selector("textarea[name=prompt]", timeout=TIMEOUT_S * 1000)
        page.fill("textarea[name=prompt]", question)
        page.press("textarea[name=prompt]", "Control+Enter")
        self._asked[path].append(question)
        turns = page.locator("#talk article")
        deadline = time.monotonic() + TIMEOUT_S
        unfinished = page.locator("#talk [aria-busy=true], #talk .busy:visible")
        while turns.count() < len(self._asked[path]) or unfinished.count():
            if time.monotonic() > deadline:
                raise CircleError(f"no reply to {question!r}: {self._text()}")
            time.sleep(LOOK_S)
        if problems := page.locator("#talk article .worse").all_inner_texts():
            raise CircleError(f"the reply to {question!r} is {problems}")

    def _check_conversation(self, path: str) -> None:
        for talked, questions in self._asked.items():
            text = str(self.visit.open(talked).locator("main").inner_text())
            self.outcome.lost += [f"the question {question!r}" for question in questions if question not in text]
        self.visit.open(path)

    def _look_for_losses(self) -> None:
        """Note what is no longer there: the file, the artefacts, the conversations, the user."""
        copies = [path for path in (self._folder / "uploads").iterdir() if _digest(path) == _digest(self._rows)]
        if not copies:
            self.outcome.lost.append("the uploaded file")
        for name, kind in (("data", "dataset"), ("adapter", "adapter"), ("report", "report")):
            try:
                open_artifact(self._folder / NAME / name, kind)
            except Exception as error:  # whatever it is, the artefact cannot be used
                self.outcome.lost.append(f"{name}: {error}")
        if not any(kind_of(path) == "release" for path in (self._folder / NAME).iterdir()):
            self.outcome.lost.append("the Release")
        inboxes = (self._folder / ".studio" / "served").glob("*/state/inbox/*.jsonl")
        if not any(CORRECTION in file.read_text(encoding="utf-8") for file in inboxes):
            self.outcome.lost.append("the correction")
        self._check_conversation("/")

    def _text(self) -> str:
        """Return the start of the page's text, for a message."""
        return str(self.visit.page.locator("main").inner_text())[:2000]


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def end_jobs(folder: Path) -> None:
    """Kill the jobs of a studio that still run, such as the servers of conversations."""
    for file in (folder / ".studio" / "jobs").glob(f"*/{PROCESS}"):
        fields = read_json(file)
        if not (file.parent / END).is_file() and ProcessId(int(fields["pid"]), str(fields["started"])).is_alive:
            os.killpg(int(fields["pid"]), signal.SIGKILL)
