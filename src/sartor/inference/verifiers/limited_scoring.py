"""Rewards by code from outside, in a child process under limits (`limited_child.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from sartor.core.errors import BudgetError, ConfigError, MissingError, SartorError, about_option
from sartor.core.resource_limits import JobResult, ResourceLimits, run_job
from sartor.inference.verifiers.limited_child import IMPORT_S, MOST_OUTPUT_BYTES, MOST_WORKER_BYTES, ChildResult, Fault
from sartor.inference.verifiers.submission import Submission

Network = Literal["none", "allowed"]
_MODULE = "sartor.inference.verifiers.limited_child"
_OPTION = "objective.verifier"


def check_time(time_s: float) -> None:
    """Raise ConfigError for a time limit that is not above 0 and at most an hour."""
    if not 0 < time_s <= 3600:
        raise ConfigError(f"time_s is {time_s}; it must be above 0 and at most 3600", "time_s: 10.0")


def score_in_child(
    job: Mapping[str, Any], submissions: Sequence[Submission], *, name: str, time_s: float, network: Network
) -> ChildResult:
    """Return the rewards of submissions, in order, and the detail of unit tests.

    job: `items`, one for each submission, and `function` for an entry point.
    name: of the verifier, for errors.
    time_s: for one reply.
    Raises MissingError if the network cannot be taken away, ConfigError for a function that cannot be imported, raises
    or returns no reward, BudgetError for a child that was killed.
    """
    if not submissions:
        return ChildResult([])
    fields = {**job, "time_s": time_s, "allows_network": network == "allowed"}
    # a worker's own limit ends it first; the child may hold two of them for a moment
    limits = ResourceLimits(2 * MOST_WORKER_BYTES, IMPORT_S + 2 * time_s * len(submissions) + 60)
    done = run_job(_MODULE, fields, limits)
    if done.payload is None:
        raise about_option(_killed(done, name, time_s), _OPTION)
    result = ChildResult(done.payload["rewards"], Fault(done.payload["fault"]), done.payload["detail"])
    if result.fault is Fault.NONE:
        return result
    row = submissions[min(len(result.rewards), len(submissions) - 1)].row
    raise about_option(_error(result, f"the verifier {name}", row, time_s=time_s), _OPTION)


def _killed(done: JobResult, name: str, time_s: float) -> BudgetError:
    """Return the error for a child that ended before it gave its rewards. time_s: for one reply."""
    reason = f"its limit of {done.usage.killed}" if done.usage.killed else f"exit code {done.usage.exit_code}"
    tail = f": {done.log_tail[-1][:200]}" if done.log_tail else ""
    remedies = {
        "memory": "use less memory in it",
        "wall": f"--{_OPTION}.time_s {2 * time_s:g}, and --resume if the run has begun; or faster code",
    }
    remedy = remedies.get(done.usage.killed, "run the verifier's code by hand on these replies: it ends its process")
    return BudgetError(f"the child process of the verifier {name} ended by {reason}{tail}", remedy)


def _error(result: ChildResult, name: str, row: str, *, time_s: float) -> SartorError:
    """Return the error for a fault at the reply to a row."""
    if result.fault is Fault.NETWORK:
        return MissingError(
            f"{name} runs code without a network, which this system does not allow ({result.detail})",
            f"{_OPTION}.network: allowed, if you trust the code and the replies; or a machine with network namespaces",
        )
    if result.fault is Fault.IMPORT:
        return ConfigError(
            f"{name} cannot be imported: {result.detail}",
            f"go to the folder that holds the module, or install it; {_OPTION}.function: MODULE:FUNCTION",
        )
    if result.fault is Fault.HUNG:
        return BudgetError(
            f"{name} took more than {time_s:g} s for the reply to row {row} and was killed",
            f"--objective.verifier.time_s {2 * time_s:g}, and --resume if the run has begun; or a faster function",
        )
    if result.fault is Fault.OUTPUT:
        return BudgetError(
            f"{name} wrote more than {MOST_OUTPUT_BYTES >> 20} MB at the reply to row {row} and was killed",
            "remove what it prints and writes to files",
        )
    if result.fault is Fault.DIED:
        return BudgetError(
            f"{name} ended without a reward at the reply to row {row}: by a signal, for lack of memory or by itself",
            f"call the function by hand on that reply; it has {MOST_WORKER_BYTES >> 30} GB of memory",
        )
    problem = f"raised {result.detail}" if result.fault is Fault.RAISED else f"returned {result.detail}"
    remedy = "let it return a number from 0 to 1 for every reply, however malformed, and --resume if the run has begun"
    return ConfigError(f"{name} {problem} for the reply to row {row}", remedy)
