"""Child process that runs code from outside over replies.

    python -m sartor.inference.verifiers.limited_child

It is started by `limited_scoring.py` under limits of memory and time, leaves the network, and forks workers. A worker
runs the code: all replies for a function, one reply for unit tests. Each worker may write below a scratch folder of
its own alone, which no other worker has seen, and is killed if it takes longer than its time for a reply or writes
more than MOST_OUTPUT_BYTES. What a worker reports comes as lines of JSON through a pipe.

A reply's code runs in the interpreter that then runs the asserts. One that sets out to deceive them can.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import numbers
import os
import resource
import select
import shutil
import signal
import sys
import time
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from sartor.core.confinement import confine_writes, leave_network
from sartor.core.resource_limits import limit_data

# Largest file that a worker may write, its output among them, and longest line of the pipe
MOST_OUTPUT_BYTES = 1 << 20
# Private memory of a worker
MOST_WORKER_BYTES = 2 << 30
# Seconds in which a module is imported
IMPORT_S = 60.0
_DETAIL = 300
# A function's sums may be so far outside 0..1
_ROUNDING = 1e-9


class Fault(StrEnum):
    """End of a worker or of the child other than by a reward."""

    NONE = "none"
    NETWORK = "network"  # the system does not let it leave the network
    IMPORT = "import"
    RAISED = "raised"
    NO_REWARD = "no reward"  # what the function returned is no number from 0 to 1
    HUNG = "hung"
    OUTPUT = "output"
    DIED = "died"


# What ended a reply's code and asserts, which then get 0
_ENDS: Mapping[Fault, str] = {
    Fault.HUNG: "its code and asserts took more than {seconds:g} s and were killed",
    Fault.OUTPUT: f"its code wrote more than {MOST_OUTPUT_BYTES >> 20} MB and was killed",
    Fault.DIED: f"its process ended by itself, by a signal, or for lack of memory ({MOST_WORKER_BYTES >> 30} GB)",
}


@dataclass(frozen=True)
class ChildResult:
    """Rewards of the first replies, and the fault at the next one.

    detail: of the fault, for people; of unit tests, why the first reply with less than the full reward has it.
    """

    rewards: list[float]
    fault: Fault = Fault.NONE
    detail: str = ""


@dataclass
class _Worker:
    """Forked process and the reading end of its pipe."""

    pid: int
    pipe: int
    _buffer: bytes = b""

    def line(self, seconds: float) -> tuple[Mapping[str, Any], Fault]:
        """Return the next line of the worker, or the fault for which there is none; then the worker has ended."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not select.select([self.pipe], [], [], left_s)[0]:
                self.end()
                return {}, Fault.HUNG
            received = os.read(self.pipe, 1 << 16)
            self._buffer += received
            if len(self._buffer) > MOST_OUTPUT_BYTES:
                self.end()
                return {}, Fault.OUTPUT
            if not received:
                return {}, Fault.OUTPUT if self.end() == signal.SIGXFSZ else Fault.DIED
        text, _, self._buffer = self._buffer.partition(b"\n")
        fields = None
        with contextlib.suppress(ValueError):
            fields = json.loads(text)
        if isinstance(fields, dict):
            return fields, Fault.NONE
        self.end()
        return {}, Fault.DIED

    def end(self) -> int:
        """Kill what is left of the worker's process group; return the signal that had ended the worker, or 0."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid and select.select([self.pipe], [], [], 0)[0]:  # the pipe closes a moment before the process ends
            for _ in range(20):
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    break
                time.sleep(0.01)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        if not pid:
            os.waitpid(self.pid, 0)
        os.close(self.pipe)
        return os.WTERMSIG(status) if pid and os.WIFSIGNALED(status) else 0


def _fork(work: Callable[[Callable[[Mapping[str, Any]], None]], None], scratch: Path, cpu_s: float) -> _Worker:
    """Run `work` in a confined process, which passes what it reports to the function that it is given.

    scratch: made here. The output is opened before the worker is confined, so that a folder which another worker could
        write to may hold a link to any file in its place.
    """
    scratch.mkdir(mode=0o700)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return _Worker(pid, reading)
    try:
        os.close(reading)
        os.setsid()
        os.chdir(scratch)
        output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for target, source in ((0, nothing), (1, output), (2, output)):
            os.dup2(source, target)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it; the worker is to end
        resource.setrlimit(resource.RLIMIT_FSIZE, (MOST_OUTPUT_BYTES, MOST_OUTPUT_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        seconds = math.ceil(cpu_s) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        limit_data(MOST_WORKER_BYTES)
        confine_writes(scratch)
        worker_pid = os.getpid()

        def report(fields: Mapping[str, Any]) -> None:
            if os.getpid() != worker_pid:  # a process that the code forked, and that came to an end of its own
                os._exit(1)
            _write(writing, fields)

        work(report)
    except BaseException:  # of a reply's code, SystemExit among them
        os._exit(1)
    os._exit(0)


def _empty_output() -> None:
    """Drop what a function has printed so far: the limit of output is that of one reply."""
    with contextlib.suppress(Exception):  # of a stream that the function has replaced or closed
        sys.stdout.flush()
        sys.stderr.flush()
        os.lseek(1, 0, os.SEEK_SET)
        os.ftruncate(1, 0)


def _write(pipe: int, fields: Mapping[str, Any]) -> None:
    rest = json.dumps(fields).encode() + b"\n"
    while rest:
        rest = rest[os.write(pipe, rest) :]


def run_function(job: Mapping[str, Any], scratch: Path) -> ChildResult:
    """Return the rewards of a function `module:name` called as (reply, reference, prompt)."""
    module, _, name = job["function"].partition(":")
    items: Sequence[Mapping[str, Any]] = job["items"]

    def work(report: Callable[[Mapping[str, Any]], None]) -> None:
        try:
            function = getattr(importlib.import_module(module), name)
        except BaseException as error:
            report({"fault": Fault.IMPORT, "detail": _text(error)})
            return
        report({})
        for item in items:
            try:
                value = function(item["reply"], item["reference"], item["prompt"])
            except BaseException as error:
                report({"fault": Fault.RAISED, "detail": _text(error)})
                return
            if not isinstance(value, numbers.Real) or not -_ROUNDING <= float(value) <= 1 + _ROUNDING:
                report({"fault": Fault.NO_REWARD, "detail": f"{value!r:.80}"})
                return
            _empty_output()
            report({"reward": min(max(float(value), 0.0), 1.0)})

    worker = _fork(work, scratch / "function", IMPORT_S + job["time_s"] * len(items))
    rewards: list[float] = []
    for seconds in (IMPORT_S, *[job["time_s"]] * len(items)):
        fields, fault = worker.line(seconds)
        if fault is not Fault.NONE:
            return ChildResult(rewards, fault)
        if "fault" in fields:
            worker.end()
            return ChildResult(rewards, Fault(fields["fault"]), fields["detail"])
        rewards += [fields["reward"]] if "reward" in fields else []
    worker.end()
    return ChildResult(rewards)


def run_unit_tests(job: Mapping[str, Any], scratch: Path) -> ChildResult:
    """Return for each reply the fraction of its asserts that hold; 0 for code that fails, hangs or is killed."""
    rewards, detail = [], ""
    for number, item in enumerate(job["items"]):

        def work(report: Callable[[Mapping[str, Any]], None], item: Mapping[str, Any] = item) -> None:
            module = types.ModuleType("reply")  # dataclasses look it up by name
            sys.modules["reply"] = module
            try:
                # without this file's own `annotations` of __future__, as the code would run elsewhere
                exec(compile(item["code"], "<reply>", "exec", dont_inherit=True), vars(module))
            except BaseException as error:
                report({"reward": 0.0, "detail": f"its code raised {_text(error)}"})
                return
            passed, failed = 0, ""
            for test in item["tests"]:
                try:
                    exec(compile(test, "<test>", "exec", dont_inherit=True), vars(module))
                    passed += 1
                except Exception as error:
                    end = "does not hold" if isinstance(error, AssertionError) else f"raised {_text(error)}"
                    failed = failed or f"{test[:_DETAIL]} {end}"
            report({"reward": passed / len(item["tests"]), "detail": failed})

        own_scratch = scratch / str(number)
        worker = _fork(work, own_scratch, job["time_s"])
        fields, fault = worker.line(job["time_s"])
        if fault is Fault.NONE:
            worker.end()
        shutil.rmtree(own_scratch, ignore_errors=True)
        reward = fields.get("reward", 0.0)
        # the code can write to the pipe as well
        is_reward = type(reward) in (int, float) and 0 <= reward <= 1
        rewards.append(float(reward) if is_reward else 0.0)
        if rewards[-1] < 1 and not detail:
            detail = _ENDS.get(fault, "").format(seconds=job["time_s"]) or str(fields.get("detail", ""))[: 3 * _DETAIL]
    return ChildResult(rewards, detail=detail)


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:_DETAIL]


def main() -> None:
    """Run the job in the first file and write the result to the second."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    result_file = Path(sys.argv[2])
    if os.getcwd() not in sys.path:  # `-m` puts it there, unless the environment forbids it
        sys.path.insert(0, os.getcwd())
    problem = "" if job["allows_network"] else leave_network()
    if problem:
        result = ChildResult([], Fault.NETWORK, problem)
    else:
        scratch = result_file.absolute().parent / "scratch"  # removed with the job's folder
        scratch.mkdir()
        result = run_function(job, scratch) if "function" in job else run_unit_tests(job, scratch)
    result_file.write_text(json.dumps(asdict(result)), encoding="utf-8")


if __name__ == "__main__":
    main()
