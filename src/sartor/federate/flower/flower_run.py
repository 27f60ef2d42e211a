"""Writer of the Flower app, and watcher of its runs.

The ServerApp holds the journal while it leads. If no process holds it and rounds are left, a run is started: by `flwr
run`, in a process that ends with the run, or by a person, who is given the command. A failed run, as when SuperLink is
killed, is started again. An error that no new run can fix is written down by the ServerApp before it ends.

The bundle does not contain the code: each side runs its installed Sartor. docs/federate-flower.md describes what a
SuperLink that sends another bundle can reach.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sartor.core.artifacts import create_output_directory
from sartor.core.errors import BusyError, MissingError, missing_package
from sartor.core.ipc import error_of
from sartor.federate.flower.driver_options import RoundDriverOptions
from sartor.federate.rounds.round_journal import RoundJournal

# Switches off Flower's telemetry, its update check, and the installation of a bundle's dependencies
ENVIRONMENT: Mapping[str, str] = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
_PROJECT = """\
[project]
name = "sartor-rounds"
version = "1.0.0"
description = "Sartor's federated rounds, carried by Flower"
license = { file = "LICENSE" }
dependencies = ["flwr>=1.42,<1.43"]

[tool.flwr.app]
publisher = "sartor"
fab-format-version = 1
flwr-version-target = "1.42.0"

[tool.flwr.app.components]
serverapp = "sartor_rounds.server:app"
clientapp = "sartor_rounds.client:app"

# flwr run --run-config 'lead="/absolute/path.yaml"'
[tool.flwr.app.config]
lead = ""
"""
_FILES: Mapping[str, str] = {
    "pyproject.toml": _PROJECT,
    "LICENSE": "Apache License 2.0: https://www.apache.org/licenses/LICENSE-2.0\n",
    "sartor_rounds/__init__.py": '"""Sartor\'s rounds over Flower: the code is in the installed package."""\n',
    "sartor_rounds/server.py": "from sartor.federate.flower import server_app\n\napp = server_app.app\n",
    "sartor_rounds/client.py": "from sartor.federate.flower import client_app\n\napp = client_app.app\n",
}


def write_app(folder: Path) -> Path:
    """Write the app's folder and return it. Raises ConfigError if the folder is taken."""
    with create_output_directory(folder) as part:
        for name, text in _FILES.items():
            file = part / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")
    return folder


_POLL_S = 1.0
# seconds between two attempts to start a run
_AGAIN_S = 5.0
# seconds for which a run may tell its clients of the end: longer than the ServerApp's _FAREWELL_S
_FAREWELL_S = 90.0


@dataclass
class RunWatcher:
    """Watcher of the rounds of a run.

    lead: options of the ServerApp.
    file: the file that holds them.
    link: SuperLink's name in Flower's config.toml; "": a person starts the runs.
    patience_s: seconds for which a SuperLink that accepts no run is tried again.
    """

    lead: RoundDriverOptions
    file: Path
    link: str
    patience_s: float
    notice: Callable[[str], object]
    _lines_read: int = field(init=False)

    def __post_init__(self) -> None:
        self._lines_read = len(self._lines())
        # error of an earlier run; the next run writes it again if it persists
        self.lead.trouble.unlink(missing_ok=True)

    @property
    def command(self) -> list[str]:
        """Command that starts a run."""
        return [
            "flwr",
            "run",
            str(self.file.parent / "app"),
            *([self.link] if self.link else []),
            "--stream",
            "--run-config",
            f"lead={json.dumps(str(self.file))}",
        ]

    @property
    def log(self) -> Path:
        """File with the output of `flwr run`."""
        return self.file.parent / "flwr.log"

    def tell(self) -> bool:
        """Report the rounds that ended since the last call; return whether there were any."""
        new_lines = self._lines()[self._lines_read :]
        for line in new_lines:
            summary = f"{len(line['active'])} clients" if line["state"] == "done" else line["reason"]
            away = f"; away: {', '.join(line['away'])}" if line.get("away") else ""
            refusals = "".join(f"; {refusal} ({count} times)" for refusal, count in line.get("said_no", {}).items())
            round_name = f"round {line['number']} of {self.lead.rounds} {line['state']}"
            self.notice(f"{round_name}: {summary}, {line['took_s']:.0f} s{away}{refusals}")
        self._lines_read += len(new_lines)
        return bool(new_lines)

    def reasons(self) -> str:
        """Return the reasons why rounds were abandoned, each once."""
        reasons = dict.fromkeys(line["reason"] for line in self._lines() if line["reason"])
        return "; ".join(reasons) or "nothing is known of why"

    def _lines(self) -> list[dict[str, Any]]:
        with contextlib.suppress(FileNotFoundError):
            # a line that is still being written has no line end
            text = self.lead.record.read_text(encoding="utf-8").rpartition("\n")[0]
            return [json.loads(line) for line in text.splitlines()]
        return []


@contextmanager
def run_to_the_end(watch: RunWatcher) -> Iterator[RoundJournal]:
    """Yield the journal once all rounds are over.

    Raises the error that ended the ServerApp for good, or MissingError after `patience_s` without progress.
    """
    run = _Run(watch)
    try:
        with _wait_for_journal(watch, run) as journal:
            watch.tell()
            yield journal
        run.farewell()
    finally:
        run.close()


def _wait_for_journal(watch: RunWatcher, run: _Run) -> RoundJournal:
    """Return the journal once no round is left and no process leads."""
    last_progress = time.monotonic()
    while True:
        if watch.tell():
            last_progress = time.monotonic()
        _check_trouble(watch.lead)
        try:
            journal = RoundJournal(Path(watch.lead.journal))
        except BusyError:
            last_progress = time.monotonic()  # another process leads
        else:
            if _is_over(journal, watch.lead):
                return journal
            journal.close()
            if time.monotonic() - last_progress > watch.patience_s and watch.link:
                raise _given_up(watch)
            run.begin()
        time.sleep(_POLL_S)


def _is_over(journal: RoundJournal, lead: RoundDriverOptions) -> bool:
    rounds = journal.rounds(lead.run)
    return bool(rounds) and rounds[0].number >= lead.rounds and rounds[0].state != "open"


class _Run:
    """Process of `flwr run`, or the advice to start one. A started run continues in SuperLink even if the process
    ends.
    """

    def __init__(self, watch: RunWatcher) -> None:
        self._watch = watch
        self._child: subprocess.Popen[bytes] | None = None
        self._not_before, self._is_told = 0.0, False

    def begin(self) -> None:
        """Start a run, unless one was started that may still lead."""
        if not self._watch.link:
            self._tell()
        elif self._child is None and time.monotonic() >= self._not_before:
            self._child = _begun(self._watch)
        elif self._child and self._child.poll() is not None:
            self._child, self._not_before = None, time.monotonic() + _AGAIN_S

    def farewell(self) -> None:
        """Wait until the clients have heard of the end."""
        if self._child:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(_FAREWELL_S)

    def close(self) -> None:
        """Terminate the process."""
        if self._child and self._child.poll() is None:
            self._child.terminate()
            self._child.wait()

    def _tell(self) -> None:
        if not self._is_told:
            settings = " ".join(f"{name}={value}" for name, value in ENVIRONMENT.items())
            text = shlex.join(self._watch.command)
            self._watch.notice(
                f"begin the rounds, by Flower's config.toml for this machine's SuperLink:\n  {settings} {text}"
            )
        self._is_told = True


def _begun(watch: RunWatcher) -> subprocess.Popen[bytes]:
    """Start `flwr run`, which ends with the run, or with its SuperLink."""
    sibling = Path(sys.executable).with_name("flwr")
    flwr = str(sibling) if sibling.exists() else shutil.which("flwr")
    if flwr is None:
        raise missing_package("flwr", "federated")
    with watch.log.open("ab") as log:
        return subprocess.Popen(
            [flwr, *watch.command[1:]],
            env={**os.environ, **ENVIRONMENT},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            # SuperLink continues the run whatever becomes of this process
            start_new_session=True,
        )


def _check_trouble(lead: RoundDriverOptions) -> None:
    """Raise the error that ended the ServerApp, if another run would end alike."""
    try:
        fields = json.loads(lead.trouble.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    lead.trouble.unlink()
    error = error_of(fields["kind"], fields["problem"], fields["remedy"], MissingError)
    if type(error) not in (BusyError, MissingError):
        raise error


def _given_up(watch: RunWatcher) -> MissingError:
    last = " / ".join(watch.log.read_text(encoding="utf-8", errors="replace").split("\n")[-8:]).strip(" /")
    problem = (
        f"for {watch.patience_s:.0f} s no round ended, and no run was taken or went on: {last or 'it says nothing'}"
    )
    return MissingError(problem, f"see to SuperLink and to {watch.link} in Flower's config.toml, then --resume")
