"""Tuning within limits: it retries with smaller settings and signs a receipt.

    plan -> tuner under limits -> done
      ^             |-> memory kill: the next rung, from the last checkpoint, each rung once
      |             |-> the policy refuses: paused; the same call resumes there
      +-------------+-> time is up: the state so far is saved

Nothing here loads torch: on a device the parent process must be small.

    receipt.json    {"said": the fields of `Receipt`, "signature": Ed25519 over their canonical JSON}

It is written atomically beside the adapter. A receipt is the device's own statement: it proves who signed it, and
that nobody changed it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from enum import Enum, auto
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sartor.core import resource_limits, strict_json
from sartor.core.artifacts import (
    digests,
)
from sartor.core.errors import ArtifactError, BudgetError, SartorError, SignatureError
from sartor.core.filesystem import file_digest, write_file_atomic
from sartor.core.ipc import error_of
from sartor.core.numerics import FIRST, numerics
from sartor.core.processes import DeferredSignals
from sartor.core.resource_limits import ResourceLimits, ResourceUsage
from sartor.core.signing import AnyPublicKey, check_signature, open_private, signature_of
from sartor.edge.tuning.memory_plan import MemoryPlan, MemorySetting, Planner
from sartor.edge.tuning.tuning_job import DTYPE, TuningJob, tuner_command, tuner_environment

SCHEMA, FILE = 1, "receipt.json"
# done; paused by the policy or a signal, can resume; spent: time or disk ran out, the state so far is saved
Outcome = Literal["done", "paused", "spent", "refused", "failed"]


@dataclass(frozen=True)
class Attempt:
    """One process.

    rung: as `MemorySetting.id`.
    updates: of the whole run, done when the process ended.
    reason: why it ended.
    """

    rung: str
    micro_batch_tokens: int
    is_narrow: bool
    predicted_peak_bytes: int
    usage: ResourceUsage
    updates: int
    reason: str


@dataclass(frozen=True)
class Receipt:
    """Signed record of a tuning.

    plan: predicted peak of the last attempt, by category.
    adapter: {file: sha256}.
    numerics: arithmetic of the last attempt (core/numerics.py).
    """

    schema: int
    base: dict[str, str]
    recipe: dict[str, Any]
    limits: dict[str, float]
    plan: dict[str, int]
    attempts: list[Attempt]
    resumed_at: list[int]
    adapter: dict[str, str]
    outcome: Outcome
    reason: str
    numerics: int = FIRST

    @property
    def document(self) -> bytes:
        """Signed bytes: JSON with sorted keys and no spaces."""
        return _canonical(asdict(self))

    def write(self, folder: Path, key: Ed25519PrivateKey) -> Path:
        """Sign the receipt and write it atomically into `folder`. Returns the file."""
        fields = {"said": json.loads(self.document), "signature": signature_of(self.document, key, "receipt")}
        write_file_atomic(folder / FILE, json.dumps(fields, indent=1).encode() + b"\n")
        return folder / FILE


def verify_receipt(folder: Path, trusted: Iterable[AnyPublicKey] | None = None) -> Receipt:
    """Return the receipt in an adapter's folder, checked against trusted keys and the adapter's files.

    Trusted keys are those of `core.signing` by default. Raises ArtifactError if the receipt is missing or not whole,
    SignatureError for an untrusted signer, a changed receipt or a changed file.
    """
    file = folder / FILE
    try:
        fields = strict_json.loads(file.read_bytes())
        said, signature = fields["said"], fields["signature"]
        if said["schema"] != SCHEMA:
            raise ValueError(f"its schema is {said['schema']}; this Sartor reads {SCHEMA}")
        attempts = [Attempt(**{**item, "usage": ResourceUsage(**item["usage"])}) for item in said["attempts"]]
        receipt = Receipt(**{**said, "attempts": attempts})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{file} is no receipt: {error!r}", "sartor edge tune writes one beside what it tunes"
        ) from None
    check_signature(_canonical(said), signature, file, subject="the receipt", trusted=trusted, purpose="receipt")
    for name, digest in receipt.adapter.items():
        if Path(name).name != name or not (folder / name).is_file() or file_digest(folder / name) != digest:
            raise SignatureError(
                f"{folder / name} is not the file that {file} speaks of", "get both again from the device"
            )
    return receipt


def _canonical(document: Any) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


# Interval in which the policy and the disk are checked
ASK_S = 1.0
# Allowance for log.jsonl, PEFT's config, run.json, the receipt, and other small files
FILES_BYTES = 1 << 20
BUDGET_EXIT = BudgetError.exit_code
Policy = Callable[[], str]


class StopCause(Enum):
    """Cause for which this process stops a tuner."""

    SIGNAL = auto()
    POLICY = auto()
    DISK = auto()


class Stop(NamedTuple):
    """Order to stop a tuner: the cause, and its text in the receipt."""

    cause: StopCause
    detail: str


def _may_run() -> str:
    """Return no refusal."""
    return ""


@dataclass(frozen=True)
class DeviceBudget:
    """Limits of a tuning; 0 is none.

    memory_bytes: anonymous and shared memory.
    wall_s, cpu_s: of one call.
    disk_bytes: maximum size of the job's `out` at any time.
    """

    memory_bytes: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    disk_bytes: int = 0

    def without(self, attempts: list[Attempt]) -> ResourceLimits:
        """Return the limits that remain for a process after some attempts.

        Raises BudgetError if no time remains.
        """
        remaining = []
        for limit, used in (
            (self.wall_s, sum(attempt.usage.wall_s for attempt in attempts)),
            (self.cpu_s, sum(attempt.usage.cpu_s for attempt in attempts)),
        ):
            if limit and used >= limit:
                raise BudgetError(
                    f"{used:.0f} s of {limit:.0f} s are used", "the same call again goes on with a new budget"
                )
            remaining.append(max(limit - used, 0.0))
        return ResourceLimits(self.memory_bytes, *remaining)


def tune_within_budget(
    job: TuningJob,
    budget: DeviceBudget,
    *,
    key: Path,
    policy: Policy | None = None,
    narrow: Path | None = None,
    planner: Planner | None = None,
) -> Receipt:
    """Tune `job` within `budget`, and sign a receipt with the private key in `key`.

    The same call again resumes where it stopped.

    policy: called before and during the tuning; it returns "" or why it must pause.
    narrow: the same base in 4 bits (`mmap_llama.write_narrow`). It is used if the pages of the full base would not
    fit beside the memory held.

    The receipt is written whatever the outcome is. Raises BudgetError if no rung fits, naming the smallest limit that
    would, and the tuner's own error if it failed for another reason.
    """
    ladder = FallbackTuning(job, budget, key=open_private(key, "receipt"), policy=policy or _may_run, narrow=narrow)
    if ladder.earlier and ladder.earlier.outcome == "done":
        return ladder.earlier
    with DeferredSignals() as signals:
        ladder.signals = signals
        return ladder.climb_down(planner or Planner(job))


class FallbackTuning:
    """One call's way through the rungs, from the largest setting down."""

    def __init__(
        self,
        job: TuningJob,
        budget: DeviceBudget,
        key: Ed25519PrivateKey,
        policy: Policy = _may_run,
        narrow: Path | None = None,
    ) -> None:
        self.job, self.budget, self.key, self.policy, self.narrow = job, budget, key, policy, narrow
        self.out = Path(job.out)
        self.earlier = self._earlier()
        self.earlier_attempts = self.earlier.attempts if self.earlier else []
        self.attempts: list[Attempt] = []
        self.signals = DeferredSignals()
        self._asked_at = 0.0
        self._stop: Stop | None = None

    def climb_down(self, planner: Planner) -> Receipt:
        """Tune on the first rung that fits, and on smaller ones after memory kills; return the receipt.

        Raises as `tune_within_budget` does.
        """
        if reason := self.policy():
            return self._end("paused", reason, {})
        max_tokens = 0
        plan: MemoryPlan | None = None
        while True:
            try:
                plan = self._plan(planner, max_tokens)
                limits = self.budget.without(self.attempts)
            except BudgetError as error:
                if self.attempts:  # the receipt records what was tried
                    self._end("failed", error.problem, plan.breakdown if plan else {})
                raise
            attempt = self._attempt(plan, limits)
            self.attempts.append(attempt)
            if attempt.usage.exit_code == 0:
                return self._end("done", "", plan.breakdown)
            if _ran_out_of_memory(attempt):
                # do not try a larger micro-batch on a later rung: the order of the rungs holds for one size only
                max_tokens = plan.rung.micro_batch_tokens
                continue
            return self._end_unfinished(attempt, plan)

    def _plan(self, planner: Planner, max_tokens: int) -> MemoryPlan:
        """Return the plan of the next rung. Raises BudgetError if none fits, or the disk budget is too small."""
        limit = self.budget.memory_bytes
        killed = []
        for attempt in (*self.earlier_attempts, *self.attempts):
            # a rung that was killed would be killed again if the limit is no larger than then
            earlier_limit = attempt.usage.limit_bytes
            if _ran_out_of_memory(attempt) and (not earlier_limit or 0 < limit <= earlier_limit):
                killed.append(attempt.rung)
        narrow_bytes = sum(file.stat().st_size for file in self.narrow.glob("*.safetensors")) if self.narrow else 0
        plan = planner.choose(limit, killed, max_tokens=max_tokens, narrow_bytes=narrow_bytes)
        # checkpoints: those kept, the new one before the oldest is removed, and the adapter (smaller with bf16)
        needed_bytes = (planner.recipe.checkpoints.keep + 2) * plan.checkpoint_bytes + FILES_BYTES
        if 0 < self.budget.disk_bytes < needed_bytes:
            raise BudgetError(
                f"checkpoints and the adapter want {needed_bytes:,} bytes of disk; the budget is "
                f"{self.budget.disk_bytes:,}",
                f"disk_bytes of {needed_bytes:,}, a lower rank, or checkpoints: {{keep: 1}}",
            )
        return plan

    def _attempt(self, plan: MemoryPlan, limits: ResourceLimits) -> Attempt:
        """Run the tuner on one rung."""
        self.out.mkdir(parents=True, exist_ok=True)
        file = self.out / "job.json"
        base = str(self.narrow) if self.narrow and plan.is_narrow else self.job.base
        replace(planned_job(self.job, plan.rung), base=base).write(file)
        self._stop = None
        usage = resource_limits.run(
            tuner_command(file),
            limits,
            environment=tuner_environment(),
            log=self.out / "stderr.txt",
            stop=self._must_stop,
        )
        updates = _updates(self.out / "log.jsonl")
        if self._stop is not None:
            reason = self._stop.detail
        elif not usage.killed and usage.exit_code == BUDGET_EXIT:
            reason = "memory"
        else:
            reason = usage.killed
        return Attempt(
            rung=plan.rung.id,
            micro_batch_tokens=plan.rung.micro_batch_tokens,
            is_narrow=plan.is_narrow,
            predicted_peak_bytes=plan.peak_bytes,
            usage=usage,
            updates=updates,
            reason=reason,
        )

    def _must_stop(self) -> bool:
        """Return whether a signal, the policy or the disk stops the tuner now."""
        now = time.monotonic()
        if self.signals.received:
            self._stop = Stop(StopCause.SIGNAL, self.signals.received.name)
        if self._stop is None and now - self._asked_at >= ASK_S:
            self._asked_at = now
            reason = self.policy()
            self._stop = Stop(StopCause.POLICY, reason) if reason else self._check_disk()
        return self._stop is not None

    def _check_disk(self) -> Stop | None:
        """Return the order to stop if `out` exceeds the disk budget, else None."""
        if not self.budget.disk_bytes:
            return None
        used = _used_bytes(self.out)
        if used <= self.budget.disk_bytes:
            return None
        return Stop(StopCause.DISK, f"disk: {used:,} of {self.budget.disk_bytes:,} bytes")

    def _end_unfinished(self, attempt: Attempt, plan: MemoryPlan) -> Receipt:
        """Return the receipt of a call that is not done. Raises the tuner's error if it failed."""
        usage = attempt.usage
        if usage.killed in ("wall", "cpu"):
            return self._end("spent", f"{usage.killed} time is up", plan.breakdown)
        if self._stop is not None and self._stop.cause is StopCause.DISK:
            return self._end("spent", attempt.reason, plan.breakdown)
        if attempt.reason or usage.exit_code in (-2, -15, 130, 143):
            return self._end("paused", attempt.reason or "a signal", plan.breakdown)
        error = _error(self.out / "stderr.txt", usage)
        self._end("failed", error.problem, plan.breakdown)
        raise error

    def _end(self, outcome: Outcome, reason: str, breakdown: dict[str, int]) -> Receipt:
        """Write the receipt of the call, and return it."""
        job = self.job
        attempts = [*self.earlier_attempts, *self.attempts]
        receipt = Receipt(
            schema=SCHEMA,
            base={"name": job.name, "digest": job.digest, "licence": job.licence},
            recipe=job.recipe,
            limits=asdict(self.budget),
            plan=breakdown,
            attempts=attempts,
            resumed_at=[attempt.updates for attempt in attempts[:-1] if attempt.updates],
            adapter=digests(self.out) if outcome == "done" else {},
            outcome=outcome,
            reason=reason,
            numerics=numerics(DTYPE),
        )
        receipt.write(self.out, self.key)
        return receipt

    def _earlier(self) -> Receipt | None:
        """Return the receipt of earlier calls, if this device signed it for this job's base and recipe."""
        try:
            receipt = verify_receipt(self.out, [self.key.public_key()])
        except (ArtifactError, SignatureError):
            return None
        is_same = receipt.base["digest"] == self.job.digest and receipt.recipe == json.loads(
            json.dumps(self.job.recipe)
        )
        return receipt if is_same else None


def _ran_out_of_memory(attempt: Attempt) -> bool:
    """Return whether memory ended an attempt, and not a policy whose text is "memory"."""
    usage = attempt.usage
    return attempt.reason == "memory" and (usage.killed == "memory" or usage.exit_code == BUDGET_EXIT)


def planned_job(job: TuningJob, rung: MemorySetting) -> TuningJob:
    """Return the job with the settings of a rung."""
    compute = {"micro_batch_tokens": rung.micro_batch_tokens, "recompute": rung.mode.recompute}
    recipe = {**job.recipe, "compute": {**job.recipe.get("compute", {}), **compute}}
    return replace(job, recipe=recipe, top=rung.learning if rung.name == "layers" else 0, zeroth=rung.mode.zeroth)


def _updates(log: Path) -> int:
    """Return the number of updates in the log."""
    try:
        lines = log.read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    result = 0
    for line in lines:
        try:
            result = max(result, int(json.loads(line).get("update", 0)))
        except ValueError:  # the incomplete last line of a process that was killed
            continue
    return result


def _used_bytes(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    used = 0
    for root, _, files in os.walk(folder):
        for name in files:
            try:
                used += os.lstat(os.path.join(root, name)).st_size
            except OSError:  # it was renamed since the listing
                continue
    return used


def _error(log: Path, usage: ResourceUsage) -> SartorError:
    """Return the error on the last line of the tuner's log."""
    last = (resource_limits.log_tail(log) or ["it said nothing"])[-1]
    try:
        fields = json.loads(last)["error"]
        return error_of(fields["kind"], fields["problem"], fields["remedy"])
    except (ValueError, KeyError, TypeError):
        return ArtifactError(
            f"the tuner ended with {usage.exit_code}: {last}", f"tail {log} shows what it said before"
        )
