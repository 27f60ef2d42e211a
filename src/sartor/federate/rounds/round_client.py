"""Client state machine of a round.

An answer is in the journal before it is returned, so a process that resumes knows what was sent. The journal keeps for
good in which rounds the client took part. A replayed round, and a second manifest of one number, are refused.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from sartor.core import records
from sartor.core.errors import RoundError
from sartor.federate import updates as arrays
from sartor.federate.rounds.round_journal import RoundJournal, State, StoredRound
from sartor.federate.rounds.round_manifest import LocalUpdate, Manifest, Mode, Noise, Tasks, find_task, read_manifest
from sartor.federate.secure import fixed_point, messages
from sartor.federate.secure.identities import Identity, PinnedKeys
from sartor.federate.secure.messages import (
    Invite,
    Payload,
    PeerKeys,
    RoundOutcome,
    SealedShares,
    Shown,
    Signed,
    SurvivorLists,
    Unmask,
)
from sartor.federate.secure.secagg_client import ROOT_BYTES, SecAggClient
from sartor.federate.secure.secagg_terms import SecureSumPolicy, default_colluders
from sartor.models.lora_tensors import Tensors

Chance = Callable[[Manifest], np.random.Generator | None]


class EnrolmentPolicy:
    """Agreement of a client: it takes part in rounds of one mode, whose noise counts with enough colluders.

    assumed_colluders: the fewest that a round with noise must assume; None: `default_colluders` of its cohort.
    """

    def __init__(self, mode: Mode = "private", assumed_colluders: int | None = None) -> None:
        self.mode, self.assumed_colluders = mode, assumed_colluders

    def check(self, manifest: Manifest) -> None:
        """Raise RoundError for a round that was not agreed to.

        Called once a round, before any message is sent in it.
        """
        if manifest.rules.noise:
            self._check_colluders(manifest)
        if (mode := manifest.rules.mode) != self.mode:
            descriptions = {
                "private": "shows the sum alone",
                "inspectable": "shows each client's update to the coordinator",
            }
            raise RoundError(
                f"the round is {mode} ({descriptions[mode]}); this client enrolled for {self.mode} rounds",
                f"leave this coordinator, or enrol for {mode} rounds if their owner agrees to that",
                "mode",
            )

    def _check_colluders(self, manifest: Manifest) -> None:
        """Raise RoundError for noise whose account trusts more clients than this client does."""
        stated, cohort_size = manifest.rules.assumed_colluders, len(manifest.terms.cohort)
        demanded = default_colluders(cohort_size) if self.assumed_colluders is None else self.assumed_colluders
        if stated is None:
            raise RoundError(
                "the round adds noise, and does not state how many clients might collude: an older version signed it",
                "on the coordinator's machine: git -C CLONE pull, or install a newer Sartor from where it came",
                "colluders",
            )
        if stated < demanded:
            raise RoundError(
                f"the round's noise counts with {stated} colluding clients of {cohort_size}; this client assumes "
                f"{demanded}",
                f"rules: {{assumed_colluders: {demanded}}} in the coordinator's recipe",
                "colluders",
            )


@dataclass(frozen=True)
class Participant:
    """Identity of a participant, the keys it knows, and its demands.

    coordinator: name of the only coordinator whose manifests are accepted.
    """

    identity: Identity
    roster: PinnedKeys
    coordinator: str = "coordinator"
    policy: SecureSumPolicy = field(default_factory=SecureSumPolicy)
    agreement: EnrolmentPolicy = field(default_factory=EnrolmentPolicy)


@dataclass
class _Session:
    """Open round, as the journal has it.

    answers: digest of a request -> the answer that was given.
    """

    manifest: Manifest
    client: SecAggClient
    answers: dict[str, bytes]


@dataclass(frozen=True)
class _Update:
    """Local update, and the number of the round that it was computed for."""

    number: int
    local_update: LocalUpdate

    def content(self) -> bytes:
        packed, side_tensors = (
            arrays.pack_tensors(self.local_update.tensors),
            arrays.pack_tensors(self.local_update.side_tensors),
        )
        head = {"number": self.number, "examples": self.local_update.examples, "bytes": len(packed)}
        return records.canonical(head) + b"\n" + packed + side_tensors

    @classmethod
    def of(cls, content: bytes) -> _Update:
        line, _, packed = content.partition(b"\n")
        fields = json.loads(line)
        # an update stored by an older version has no side tensors
        size = fields.get("bytes", len(packed))
        side_tensors = arrays.unpack_tensors(packed[size:]) if size < len(packed) else {}
        return cls(
            fields["number"], LocalUpdate(arrays.unpack_tensors(packed[:size]), fields["examples"], side_tensors)
        )


class RoundClient:
    """Client with its journal and its tasks.

    noise: adds its share of a round's noise; without it such a round is refused.
    chance: random generator of a round's stochastic rounding; None, the default: seeded from the system.
    """

    def __init__(
        self,
        member: Participant,
        journal: RoundJournal,
        tasks: Tasks,
        noise: Noise | None = None,
        clock: Callable[[], float] = time.time,
        chance: Chance = lambda manifest: None,
    ) -> None:
        self._member, self._journal, self._tasks, self._noise, self._clock = member, journal, tasks, noise, clock
        self._chance = chance
        self._session: _Session | None = None

    def answer(self, request: bytes) -> bytes:
        """Return the answer to any request of the coordinator; empty where none is due.

        Raises RoundError, SignatureError or ArtifactError for a request that this client refuses, and any error of its
        task.
        """
        signed = messages.read_message(request)
        if isinstance(signed.body, RoundOutcome):
            self._handle_outcome(request, signed)
            return b""
        if isinstance(signed.body, Invite):
            return self._handle_invite(request, signed)
        try:
            return self._step(request, signed)
        except BaseException:
            # a failed step may have changed memory but not the journal: rebuild the session from the journal
            self._session = None
            raise

    def _handle_invite(self, request: bytes, signed: Signed) -> bytes:
        sender, invite = messages.verify_message(request, Invite, signed.round, self._member.roster)
        manifest = read_manifest(invite.manifest, self._member.coordinator, self._member.roster)
        if sender != self._member.coordinator or manifest.digest != signed.round:
            raise RoundError(
                "the manifest is not that of the round that it comes with", "leave this coordinator", "manifest"
            )
        if arrays.digest(invite.shared) != manifest.work.shared:
            raise RoundError("the shared tensors are not those of the manifest", "get them again", "manifest")
        stored_round = self._journal.find(manifest.digest)
        if stored_round is None:
            stored_round = self._begin(manifest, invite.manifest)
        if stored_round.state != "open":
            raise RoundError(
                f"round {stored_round.number} of {stored_round.run} is over for this client",
                "wait for the next round",
                "replayed",
            )
        self._learn(manifest, invite.shared)
        if manifest.rules.mode != "inspectable":
            return self._open_session(stored_round).client.keys()
        # the update is readable by its carriers, and the same bytes until the round ends
        weight, tensors = self._clip(manifest)
        content = arrays.pack_tensors({**tensors, arrays.WEIGHT: np.array([weight], np.float32)})
        return messages.sealed(Shown(Payload(content)), manifest.digest, self._member.identity)

    def _begin(self, manifest: Manifest, content: bytes) -> StoredRound:
        """Check everything that a round demands, then store the round in the journal."""
        member = self._member
        self._check_time(manifest)
        member.policy.check(manifest.terms, member.identity.name, member.roster.keys)
        find_task(self._tasks, manifest)
        if manifest.rules.noise and self._noise is None:
            raise RoundError(
                f"the round adds noise ({manifest.rules.noise:g} clips), and nothing here adds this client's part of "
                "it",
                "give RoundClient its noise",
                "noise",
            )
        previous = self._journal.rounds(manifest.run)
        if previous and manifest.number <= previous[0].number:
            raise RoundError(
                f"round {manifest.number} of {manifest.run} comes after round {previous[0].number}: it is replayed, "
                "or false",
                "wait for the next round",
                "replayed",
            )
        member.agreement.check(manifest)
        for open_round in (item for item in previous if item.state == "open"):
            self._give_up(open_round)
        stored_round = StoredRound(
            manifest.digest,
            manifest.run,
            manifest.number,
            manifest=content,
            secret=os.urandom(ROOT_BYTES),
            state="open",
        )
        self._journal.begin(stored_round)
        return stored_round

    def _give_up(self, stored_round: StoredRound) -> None:
        """End a round whose outcome never came: an update that may have been summed is not offered again."""
        member = self._member
        is_shown = read_manifest(stored_round.manifest, member.coordinator, member.roster).rules.mode == "inspectable"
        was_sent = is_shown or any(kind == "masked" for kind, _ in self._journal.entries(stored_round.digest))
        self._journal.end(
            stored_round.digest, "abandoned", {_update_key(stored_round.run): None} if was_sent else None
        )
        self._session = None

    def _learn(self, manifest: Manifest, shared: bytes) -> None:
        """Store an update for this round: the one computed for it, a recent one that missed its sum, or a new one."""
        content = self._journal.load(_update_key(manifest.run))
        update = _Update.of(content) if content else None
        # an update computed for this round is 0 rounds old
        if update and manifest.number - update.number <= manifest.rules.stale_rounds and _fits(update, manifest):
            return
        local_update = find_task(self._tasks, manifest).update(manifest, arrays.unpack_tensors(shared))
        self._journal.keep(_update_key(manifest.run), _Update(manifest.number, local_update).content())

    def _step(self, request: bytes, signed: Signed) -> bytes:
        stored_round = self._journal.find(signed.round)
        if stored_round is None or stored_round.state != "open":
            status = "was never invited to" if stored_round is None else "is done with"
            raise RoundError(
                f"{signed.sender} asks of a round that this client {status}", "wait for the next round", "replayed"
            )
        session = self._open_session(stored_round)
        if (known_answer := session.answers.get(messages.digest(request))) is not None:
            return known_answer
        self._check_time(session.manifest)
        kind, answer = self._compute(session, request, signed)
        self._journal.add(stored_round.digest, ("request", request), (kind, answer))
        session.answers[messages.digest(request)] = answer
        return answer

    def _compute(self, session: _Session, request: bytes, signed: Signed) -> tuple[str, bytes]:
        """Return (kind of the answer, answer)."""
        client = session.client
        if session.manifest.rules.mode == "inspectable":
            raise RoundError("an inspectable round has no stages but the first", "leave this coordinator", "stage")
        match signed.body:
            case PeerKeys():
                return "shares", client.share(request)
            case SealedShares():
                client.hold(request)
                return "masked", client.mask(self._vector(session.manifest))
            case SurvivorLists():
                return "consent", client.consent(request)
            case Unmask():
                return "reveal", client.reveal(request)
            case _:
                raise RoundError(
                    f"{signed.sender} sends {signed.body.kind!r}, which asks for nothing", "look at it", "stage"
                )

    def _vector(self, manifest: Manifest) -> fixed_point.Vector:
        """Return this client's vector of the sum, in the ring: (S,) uint32."""
        # noised values are whole units already; rounding to the nearest leaves them unchanged
        rounding: fixed_point.Rounding = "nearest" if manifest.rules.noise else "stochastic"
        weight, tensors = self._clip(manifest)
        return fixed_point.encode(arrays.weighted(tensors, weight), manifest.terms, rounding, self._chance(manifest))

    def _clip(self, manifest: Manifest) -> tuple[float, Tensors]:
        """Return the weight, and the tensors: clipped, with the side tensors and this client's share of the noise."""
        content = self._journal.load(_update_key(manifest.run))
        if content is None:
            raise RoundError("this client has no update for the round", "invite it first", "stage")
        update = _Update.of(content)
        tensors: Tensors = {
            **arrays.clipped(update.local_update.tensors, manifest.rules.clip),
            **update.local_update.side_tensors,
        }
        if manifest.rules.noise and self._noise:
            tensors = self._noise(tensors, manifest)
        return manifest.rules.weight(update.local_update.examples, manifest.number - update.number), tensors

    def _open_session(self, stored_round: StoredRound) -> _Session:
        """Return the session of an open round, rebuilt from the journal where it is not in memory."""
        if self._session and self._session.manifest.digest == stored_round.digest:
            return self._session
        member = self._member
        manifest = read_manifest(stored_round.manifest, member.coordinator, member.roster)
        client = SecAggClient(
            manifest.round, member.identity, member.roster, root=stored_round.secret, policy=member.policy
        )
        session = _Session(manifest, client, {})
        entries = self._journal.entries(stored_round.digest)
        for (_, request), (kind, answer) in zip(entries[::2], entries[1::2], strict=True):
            _replay(client, kind, request)
            session.answers[messages.digest(request)] = answer
        self._session = session
        return session

    def _handle_outcome(self, request: bytes, signed: Signed) -> None:
        sender, outcome = messages.verify_message(request, RoundOutcome, signed.round, self._member.roster)
        stored_round = self._journal.find(signed.round)
        if sender != self._member.coordinator or outcome.state not in ("done", "abandoned"):
            raise RoundError(f"{sender} ends a round as {outcome.state!r:.40}", "look at it", "stage")
        if stored_round is None or stored_round.state != "open":
            return
        is_in = outcome.state == "done" and self._member.identity.name in outcome.active
        state: State
        if is_in:
            state = "done"
        elif outcome.state == "abandoned":
            state = "abandoned"
        else:
            state = "left out"
        self._journal.end(stored_round.digest, state, {_update_key(stored_round.run): None} if is_in else None)
        self._session = None

    def _check_time(self, manifest: Manifest) -> None:
        if (late_s := self._clock() - manifest.deadline) > 0:
            raise RoundError(
                f"round {manifest.number} of {manifest.run} ended {late_s:.0f} s ago by this clock",
                "wait for the next round; see to the clock if it is wrong",
                "deadline",
            )


def _fits(update: _Update, manifest: Manifest) -> bool:
    """Return whether these are the tensors that the round sums.

    A later round may train other tensors and ask for other side tensors.
    """
    local_update = update.local_update
    shapes = {slot.name: slot.shape for slot in manifest.terms.layout if slot.name != arrays.WEIGHT}
    is_new = update.number == manifest.number or not local_update.side_tensors
    return (
        is_new
        and {name: value.shape for name, value in {**local_update.tensors, **local_update.side_tensors}.items()}
        == shapes
    )


def _update_key(run: str) -> str:
    return f"update {run}"


def _replay(client: SecAggClient, kind: str, request: bytes) -> None:
    replays: Mapping[str, Callable[[bytes], object]] = {
        "shares": client.share,
        "masked": client.hold,
        "consent": client.consent,
        "reveal": client.reveal,
    }
    replays[kind](request)
    if kind == "masked":
        client.masked_before()
