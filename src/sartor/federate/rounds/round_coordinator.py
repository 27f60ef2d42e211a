"""Coordinator state machine of a round.

Each answer that counts, and each stage that is closed, is in the journal before anything follows from it. A
coordinator that was killed replays them and repeats its requests byte for byte. A round with too few clients left is
abandoned, and the next may begin. Of a finished round the journal keeps the transcript: every signed line, without the
vectors.

In an inspectable round `Inspected` takes the part of `SecAggServer`. Its state too follows from the answers it took.
Each update is shown as it would enter a sum: clipped by its client, with the client's weight. A robust rule combines
them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from sartor.core import records
from sartor.core.errors import ArtifactError, ConfigError, ConflictError, RoundError
from sartor.federate import updates as arrays
from sartor.federate.rounds.round_client import Participant
from sartor.federate.rounds.round_journal import RoundJournal, StoredRound
from sartor.federate.rounds.round_manifest import (
    ClientWork,
    Manifest,
    SideTensor,
    UpdateRules,
    read_manifest,
    terms_for,
)
from sartor.federate.secure import fixed_point, messages
from sartor.federate.secure.identities import PinnedKeys
from sartor.federate.secure.messages import Invite, Payload, RoundOutcome, Shown, SurvivorLists
from sartor.federate.secure.secagg_server import SecAggServer
from sartor.federate.secure.secagg_terms import default_colluders
from sartor.federate.updates import Update
from sartor.models.lora_tensors import Tensors, add_changes, norm


class Inspected:
    """Server of one inspectable round: it collects the updates that the clients show."""

    def __init__(self, manifest: Manifest, roster: PinnedKeys) -> None:
        self._manifest, self._roster = manifest, roster
        self.stage: Literal["updates", "done"] = "updates"
        self._updates: dict[str, Update] = {}
        self._ids: dict[str, str] = {}

    @property
    def expected(self) -> tuple[str, ...]:
        """Clients whose updates are awaited."""
        return self._manifest.terms.cohort

    @property
    def missing(self) -> tuple[str, ...]:
        """Clients whose updates have not come yet."""
        return tuple(name for name in self.expected if name not in self._updates) if self.stage == "updates" else ()

    @property
    def lists(self) -> SurvivorLists:
        """Clients that have shown their updates."""
        return SurvivorLists(tuple(sorted(self._updates)), ())

    def request(self, name: str) -> bytes:
        """Return no bytes: the invitation is the only request."""
        return b""

    def take(self, content: bytes) -> bool:
        """Take an update, and return whether it counts; False if it came before, or after the end.

        Raises ArtifactError for an update of another shape, with values that are not finite, too long, or with a false
        weight. Raises SignatureError, RoundError and ConflictError as SecAggServer does.
        """
        digest = self._manifest.digest
        sender, shown = messages.verify_message(content, Shown, digest, self._roster)
        known_id, message_id = self._ids.get(sender), messages.digest(content)
        if known_id == message_id or self.stage == "done":
            return False
        if known_id is not None:
            raise ConflictError(f"{sender} showed another update before, which counts", "look at that client")
        if sender not in self.expected:
            raise RoundError(f"{sender} is not of the cohort", "look at who carries it", "cohort")
        self._updates[sender], self._ids[sender] = (
            self._checked(sender, arrays.unpack_tensors(shown.tensors)),
            message_id,
        )
        return True

    def _checked(self, sender: str, tensors: dict[str, np.ndarray]) -> Update:
        rules, layout = self._manifest.rules, self._manifest.terms.layout
        shapes = {slot.name: slot.shape for slot in layout}
        has_shapes = {name: value.shape for name, value in tensors.items()} == shapes
        if not has_shapes or not all(np.isfinite(value).all() for value in tensors.values()):
            raise ArtifactError(
                f"what {sender} shows is no update of this round", "leave this client out, and look at it"
            )
        weight = float(tensors.pop(arrays.WEIGHT)[0])
        max_norm = rules.clip * (1 + 1e-5)
        if not 0 < weight <= 1 or (length := norm(tensors)) > max_norm:
            text = (
                f"weighs {weight:g}"
                if not 0 < weight <= 1
                else f"has the norm {length:.3g}, and the clip is {rules.clip:g}"
            )
            raise ArtifactError(f"the update of {sender} {text}", "leave this client out, and look at it")
        return Update(sender, tensors, max(1, round(weight * rules.most_examples)))

    def close(self) -> Literal["updates", "done"]:
        """End the round's only stage. Raises RoundError if fewer clients than the threshold showed an update."""
        count, terms = len(self._updates), self._manifest.terms
        if count < terms.threshold:
            problem = (
                f"{count} of {len(terms.cohort)} clients showed their updates; the threshold is {terms.threshold}"
            )
            raise RoundError(problem, "begin a new round when more are there", "threshold")
        self.stage = "done"
        return self.stage

    def updates(self) -> list[Update]:
        """Return the updates, sorted by client."""
        return [self._updates[name] for name in sorted(self._updates)]


# (shared tensors, weighted mean of the updates) -> the next shared tensors
Merge = Callable[[Tensors, Tensors], Tensors]
# updates of an inspectable round, sorted by client -> tensors used as their mean
Pool = Callable[[Sequence[Update]], Tensors]


@dataclass(frozen=True)
class RoundPlan:
    """Plan of a round; its number, tensors and terms follow from the run.

    trained: names of the tensors that are changed; (): all.
    degree: of the mask graph; 0 joins everyone with everyone.
    threshold: number of clients that must stay; 0: the least above 2/3.
    stage_s, work_s: seconds, as in a Manifest.
    length_s: seconds of the whole round.
    """

    task: str
    cohort: tuple[str, ...]
    rules: UpdateRules = field(default_factory=UpdateRules)
    settings: Mapping[str, Any] = field(default_factory=dict)
    base: str = ""
    recipe: str = ""
    trained: tuple[str, ...] = ()
    degree: int = 0
    threshold: int = 0
    stage_s: int = 60
    work_s: int = 0
    length_s: int = 3_600


@dataclass(frozen=True)
class RoundResult:
    """Result of a round.

    active: clients in the sum.
    reason: why it was abandoned.
    mean: mean of their updates; empty if it was abandoned.
    """

    number: int
    state: Literal["done", "abandoned"]
    active: tuple[str, ...]
    reason: str = ""
    mean: Tensors = field(default_factory=dict)


@dataclass
class _Open:
    """Open round.

    stage_started: when its stage began, by this process's clock.
    """

    manifest: Manifest
    server: SecAggServer | Inspected
    stage_started: float
    invite: bytes

    @cached_property
    def digest(self) -> str:
        return self.manifest.digest


class Coordinator:
    """Coordinator of the rounds of one run, restored from its journal.

    member: its identity is the coordinator's.
    merge: (shared tensors, mean of the updates) -> next shared tensors.
    pool: combines the updates of an inspectable round; None excludes such rounds.
    Raises ArtifactError or SignatureError if the journal holds a round that this identity did not sign.
    """

    def __init__(
        self,
        member: Participant,
        journal: RoundJournal,
        run: str,
        merge: Merge = add_changes,
        clock: Callable[[], float] = time.time,
        pool: Pool | None = None,
    ) -> None:
        self._member, self._journal, self.run, self._merge, self._clock = member, journal, run, merge, clock
        self._pool = pool
        self._open: _Open | None = None
        self.last: RoundResult | None = None
        for stored_round in journal.rounds(run)[:1]:
            if stored_round.state == "open":
                self._go_on(stored_round)

    @property
    def is_open(self) -> bool:
        """True while a round is under way."""
        return self._open is not None

    @property
    def manifest(self) -> Manifest | None:
        """Manifest of the open round; None without one."""
        return self._open.manifest if self._open else None

    @property
    def active(self) -> tuple[str, ...]:
        """Clients in the sum of the open round, once they are known."""
        return self._open.server.lists.active if self._open else ()

    @property
    def stage(self) -> str:
        """Stage of the open round that is waited for; "" without one."""
        return self._open.server.stage if self._open else ""

    @property
    def shared(self) -> dict[str, Any]:
        """Current tensors of the run. Raises ConfigError before `start`."""
        return arrays.unpack_tensors(self._packed())

    @property
    def has_tensors(self) -> bool:
        """True once `start` has set the run's tensors."""
        return self._journal.load(self._shared_key) is not None

    def start(self, tensors: Tensors) -> None:
        """Set the tensors that the run starts from, in any shapes. Raises ConflictError if it has tensors."""
        if self.has_tensors:
            raise ConflictError(
                f"the run {self.run} has tensors already", "begin its next round, or choose another name"
            )
        self._journal.keep(self._shared_key, arrays.pack_tensors(tensors))

    def begin(self, plan: RoundPlan, side_tensors: Iterable[SideTensor] = ()) -> Manifest:
        """Open the next round with a signed manifest.

        side_tensors: names, shapes and bounds of what is summed besides the updates; `merge` receives it too.
        Raises ConflictError while a round is open, ConfigError for a wrong plan, RoundError for a round that clients
        would refuse.
        """
        if self._open:
            raise ConflictError(
                f"round {self._open.manifest.number} of {self.run} is open",
                "coordinator.advance() until it returns False",
            )
        if plan.rules.mode == "inspectable" and self._pool is None:
            raise ConfigError(
                "the plan is inspectable, and nothing here makes one of the updates", "Coordinator(..., pool=POOL)"
            )
        packed = self._packed()
        shared = arrays.unpack_tensors(packed)
        rules = plan.rules
        if rules.noise and rules.assumed_colluders is None:
            rules = replace(rules, assumed_colluders=default_colluders(len(set(plan.cohort))))
        unknown = sorted(set(plan.trained) - set(shared))
        if unknown or not plan.cohort:
            raise ConfigError(
                f"the plan trains {unknown[:1]} of a cohort of {len(plan.cohort)}", f"of {sorted(shared)[:3]}"
            )
        trained = {name: shared[name] for name in plan.trained or shared}
        previous = self._journal.rounds(self.run)
        manifest = Manifest(
            self.run,
            number=previous[0].number + 1 if previous else 1,
            coordinator=self._member.identity.name,
            work=ClientWork(
                plan.task, shared=arrays.digest(packed), base=plan.base, recipe=plan.recipe, settings=plan.settings
            ),
            terms=terms_for(
                plan.cohort,
                trained,
                rules,
                degree=plan.degree,
                threshold=plan.threshold,
                side_tensors=side_tensors,
            ),
            deadline=int(self._clock()) + plan.length_s,
            rules=rules,
            stage_s=plan.stage_s,
            work_s=plan.work_s,
        )
        self._member.policy.check(manifest.terms, manifest.terms.cohort[0], self._member.roster.keys)
        stored_round = StoredRound(
            manifest.digest,
            self.run,
            manifest.number,
            manifest=manifest.signed(self._member.identity),
            secret=b"",
            state="open",
        )
        self._journal.begin(stored_round)
        self._go_on(stored_round)
        return manifest

    @property
    def missing(self) -> tuple[str, ...]:
        """Clients whose answers the stage still waits for."""
        return self._open.server.missing if self._open else ()

    def requests(self) -> dict[str, bytes]:
        """Return the request to each client that has not answered; the same bytes until it has."""
        if not self._open:
            return {}
        server = self._open.server
        return {name: server.request(name) or self._open.invite for name in server.missing}

    def take(self, answer: bytes) -> bool:
        """Take an answer, and return whether it counts; it is in the journal by then.

        False: it came before, or belongs to a round or stage that is over. Raises ArtifactError, SignatureError,
        RoundError or ConflictError for an answer that no honest client sends.
        """
        signed = messages.read_message(answer)
        if not self._open or signed.round != self._open.digest:
            if self._journal.find(signed.round) is None:
                raise RoundError(f"{signed.sender} answers a round that never was", "look at that client", "manifest")
            return False
        if counts := self._open.server.take(answer):
            self._write("answer", answer)
        return counts

    def left_s(self) -> float:
        """Return the seconds until the stage is closed without the missing clients; 0 where none is missing."""
        if not self._open or not self._open.server.missing:
            return 0.0
        manifest, now = self._open.manifest, self._clock()
        longest_s = manifest.stage_s + (manifest.work_s if self.stage in ("keys", "updates") else 0)
        return max(0.0, min(self._open.stage_started + longest_s, manifest.deadline) - now)

    def advance(self) -> bool:
        """Close the stage if everyone answered or its time is over; return whether a round is open.

        After the last stage the round ends.
        """
        if not self._open or self.left_s() > 0:
            return self.is_open
        server = self._open.server
        try:
            if self._clock() > self._open.manifest.deadline:
                raise RoundError(
                    f"the round's time is over at the stage {server.stage!r}",
                    "sartor federate coordinator ... --resume with a larger --stage-s or --work-s",
                    "deadline",
                )
            stage = server.close()
            if stage == "done":
                self._finish()
                return False
        except RoundError as error:
            self._end(RoundResult(self._open.manifest.number, "abandoned", (), error.problem), self._packed())
            return False
        self._write("close", stage.encode())
        self._open.stage_started = self._clock()
        return True

    def outcomes(self) -> dict[str, bytes]:
        """Return the message about the end of the last round for each of its clients.

        Empty once the next round has begun.
        """
        content = self._journal.load(f"outcome {self.run}")
        if self._open or content is None:
            return {}
        line, _, message = content.partition(b"\n")
        return dict.fromkeys(json.loads(line), message)

    def transcript(self, digest: str) -> list[bytes]:
        """Return the signed lines of a round, in the order in which they counted."""
        return [
            messages.without_payload(content) for kind, content in self._journal.entries(digest) if kind == "answer"
        ]

    def _finish(self) -> None:
        assert self._open
        manifest, server = self._open.manifest, self._open.server
        if isinstance(server, Inspected):
            assert self._pool
            mean = self._pool(server.updates())
        else:
            mean = arrays.mean_of(fixed_point.decode(server.result().vector, manifest.terms.layout))
        packed = arrays.pack_tensors(self._merge(self.shared, mean))
        self._end(RoundResult(manifest.number, "done", server.lists.active, mean=mean), packed)

    def _end(self, result: RoundResult, packed: bytes) -> None:
        assert self._open
        digest, cohort = self._open.digest, self._open.manifest.terms.cohort
        outcome = RoundOutcome(result.state, result.active, arrays.digest(packed), result.reason)
        content = records.canonical(cohort) + b"\n" + messages.sealed(outcome, digest, self._member.identity)
        transcript = [("answer", line) for line in self.transcript(digest)]
        self._journal.end(digest, result.state, {self._shared_key: packed, f"outcome {self.run}": content}, transcript)
        self._open, self.last = None, result

    def _write(self, kind: str, content: bytes) -> None:
        assert self._open
        try:
            self._journal.add(self._open.digest, (kind, content))
        except BaseException:
            # memory is ahead of the journal: restore from the journal
            if stored_round := self._journal.find(self._open.digest):
                self._go_on(stored_round)
            raise

    def _go_on(self, stored_round: StoredRound) -> None:
        """Restore the open round from the journal; its stage gets its whole time again."""
        member = self._member
        manifest = read_manifest(stored_round.manifest, member.identity.name, member.roster)
        is_shown = manifest.rules.mode == "inspectable"
        server = (
            Inspected(manifest, member.roster)
            if is_shown
            else SecAggServer(manifest.round, member.identity, member.roster)
        )
        for kind, content in self._journal.entries(stored_round.digest):
            if kind == "answer":
                server.take(content)
            else:
                server.close()
        invite = messages.sealed(
            Invite(stored_round.manifest, Payload(self._packed())), manifest.digest, member.identity
        )
        self._open = _Open(manifest, server, self._clock(), invite)

    def _packed(self) -> bytes:
        content = self._journal.load(self._shared_key)
        if content is None:
            raise ConfigError(
                f"the run {self.run} has no tensors", "coordinator.start(tensors) before the first round"
            )
        return content

    @property
    def _shared_key(self) -> str:
        return f"shared {self.run}"
