"""Server side of secure aggregation.

Its state follows from the messages it took and the stages it closed, in their order. A coordinator that was killed is
therefore rebuilt from its journal. The server learns the sum over `active`, as long as fewer than a third of each
client's holders tell it more than this protocol does.

A reveal for lists L unmasks no single vector. The seed of v opens only if a quorum of v's holders accepted L. Each of
them accepted because a quorum of its own holders signed L. No other list finds a quorum among those, so its mask key
stays closed. The masks between v and more than a third of its holders, less those that collude, thus cancel only in
the sum.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from sartor.core.errors import ConflictError, RoundError
from sartor.federate.secure import masking_crypto, messages
from sartor.federate.secure.fixed_point import Vector
from sartor.federate.secure.identities import Identity, PinnedKeys
from sartor.federate.secure.messages import (
    AdvertiseKeys,
    Body,
    Consent,
    Masked,
    PeerKeys,
    Reveal,
    SealedShares,
    Shares,
    SurvivorLists,
    Unmask,
)
from sartor.federate.secure.secagg_client import commitment, own_mask_key
from sartor.federate.secure.secagg_terms import Round

Stage = Literal["keys", "shares", "masked", "consent", "reveal", "done"]
STAGES: tuple[Stage, ...] = ("keys", "shares", "masked", "consent", "reveal", "done")


@dataclass(frozen=True)
class Sum:
    """Sum of the vectors of the clients in `active`.

    vector: (S,) uint32, modulo 2**32; fixed_point.decode turns it into tensors.
    """

    vector: Vector
    active: tuple[str, ...]


@dataclass
class _Received:
    """Messages received, by stage and sender.

    ids: digests of the messages; a masked vector is kept as its id only, since it is in the total.
    """

    keys: dict[str, AdvertiseKeys] = field(default_factory=dict)
    shares: dict[str, Shares] = field(default_factory=dict)
    consents: dict[str, bytes] = field(default_factory=dict)
    reveals: dict[str, Reveal] = field(default_factory=dict)
    signed_keys: dict[str, bytes] = field(default_factory=dict)
    ids: dict[Stage, dict[str, str]] = field(default_factory=lambda: {stage: {} for stage in STAGES})


class SecAggServer:
    """Server of one sum. The stage `keys` is open from the beginning: its request is the manifest."""

    def __init__(self, round_: Round, identity: Identity, roster: PinnedKeys) -> None:
        self.round, self._identity, self._roster = round_, identity, roster
        self.stage: Stage = "keys"
        self._total = np.zeros(round_.terms.size, np.uint32)
        self._received = _Received()
        self._lists = SurvivorLists((), ())

    @property
    def expected(self) -> tuple[str, ...]:
        """Clients whose answers the stage waits for, sorted: those who answered every stage before."""
        previous = STAGES[STAGES.index(self.stage) - 1]
        return self.round.terms.cohort if self.stage == "keys" else tuple(sorted(self._received.ids[previous]))

    @property
    def missing(self) -> tuple[str, ...]:
        """Clients whose answers have not come yet."""
        return tuple(name for name in self.expected if name not in self._received.ids[self.stage])

    @property
    def lists(self) -> SurvivorLists:
        """Clients in the sum and clients that vanished, once the stage `masked` is closed."""
        return self._lists

    def request(self, name: str) -> bytes:
        """Return the request that `name` must answer now; the same bytes each time.

        Empty in the stage `keys`, and once the sum is done.
        """
        body = self._request(name)
        return messages.sealed(body, self.round.digest, self._identity) if body else b""

    def _request(self, name: str) -> Body | None:
        neighbours = self.round.terms.graph.neighbours(name)
        match self.stage:
            case "shares":
                return PeerKeys(
                    tuple(self._received.signed_keys[peer] for peer in sorted(neighbours & set(self._received.keys)))
                )
            case "masked":
                boxes_by_peer = {
                    peer: shares.boxes for peer, shares in self._received.shares.items() if peer in neighbours
                }
                return SealedShares(
                    {peer: boxes[name] for peer, boxes in sorted(boxes_by_peer.items()) if name in boxes}
                )
            case "consent":
                return self._lists
            case "reveal":
                holders = sorted((neighbours | {name}) & set(self._received.consents))
                return Unmask(self._lists.digest, tuple(self._received.consents[holder] for holder in holders))
            case _:
                return None

    def take(self, content: bytes) -> bool:
        """Take an answer, and return whether it counts; False if it came before, or too late for its stage.

        Raises ArtifactError, SignatureError, RoundError for an answer that is not due, and ConflictError for a second
        one.
        """
        signed = messages.read_message(content)
        stage = _STAGE_OF.get(type(signed.body))
        if signed.round != self.round.digest or stage is None:
            raise RoundError(
                f"{signed.sender} sends {signed.body.kind!r} of another round, or what it may not",
                "look at it",
                "stage",
            )
        signed.check(self._roster)
        known_id, message_id = self._received.ids[stage].get(signed.sender), messages.digest(content)
        if known_id == message_id:
            return False
        if known_id is not None:
            raise ConflictError(
                f"{signed.sender} sent another {signed.body.kind!r} before, which counts", "look at that client"
            )
        if STAGES.index(stage) < STAGES.index(self.stage):
            return False
        if stage != self.stage or signed.sender not in self.expected:
            raise RoundError(f"{signed.body.kind!r} of {signed.sender} is not due", "wait for the request", "stage")
        self._keep(signed.sender, signed.body, content)
        self._received.ids[stage][signed.sender] = message_id
        return True

    def _keep(self, sender: str, body: Body, content: bytes) -> None:
        match body:
            case AdvertiseKeys():
                self._received.keys[sender], self._received.signed_keys[sender] = body, content
            case Shares():
                self._received.shares[sender] = body
            case Masked():
                if len(body.vector) != 4 * self._total.size:
                    raise RoundError(
                        f"{sender} sends {len(body.vector):,} bytes; the round's vectors have "
                        f"{4 * self._total.size:,}",
                        "look at that client",
                        "manifest",
                    )
                self._total += np.frombuffer(body.vector, "<u4")
            case Consent():
                if body.lists != self._lists.digest:
                    raise RoundError(f"{sender} consents to lists that were not sent", "look at that client", "lists")
                self._received.consents[sender] = content
            case Reveal():
                self._received.reveals[sender] = body

    def close(self) -> Stage:
        """End the stage with the clients that answered, open the next one and return it.

        Raises RoundError if fewer than the threshold answered: the round is over, and no further request is sent.
        """
        n_answered, terms = len(self._received.ids[self.stage]), self.round.terms
        if self.stage == "done":
            return self.stage
        if n_answered < terms.threshold and self.stage != "reveal":
            raise RoundError(
                f"{n_answered} of {len(terms.cohort)} clients answered at the stage {self.stage!r}; "
                f"the threshold is {terms.threshold}",
                "begin a new round when more are there; nothing of this one was revealed",
                "threshold",
            )
        if self.stage == "masked":
            active = self._received.ids["masked"]
            self._lists = SurvivorLists(tuple(sorted(active)), tuple(sorted(set(self._received.shares) - set(active))))
        if self.stage == "reveal":
            self._unmask()
        self.stage = STAGES[STAGES.index(self.stage) + 1]
        return self.stage

    def result(self) -> Sum:
        """Return the sum, once every stage is closed; RoundError before."""
        if self.stage != "done":
            raise RoundError(f"the sum is not done: its stage is {self.stage!r}", "close the stages before", "stage")
        return Sum(self._total.copy(), self._lists.active)

    def _unmask(self) -> None:
        """Subtract the own masks of active clients and the pair masks with dropped ones from the total.

        Bonawitz et al. 2017, figure 4, round 4: z = sum y_u - sum PRG(b_u) - sum over active u, dropped v of sign(u,
        v) PRG(s_uv) mod 2**32. Everything is rebuilt before anything is subtracted: if one secret cannot be rebuilt,
        the total stays masked.
        """
        digest = self.round.digest
        seeds = {name: self._rebuild(name, "seeds") for name in self._lists.active}
        keys = {name: self._rebuild(name, "keys") for name in self._lists.dropped if self._is_masked_with(name)}
        for name, seed in seeds.items():
            if not hmac.compare_digest(commitment(seed, digest, name), self._received.shares[name].commitment):
                raise _false_share(name)
        privates = {name: X25519PrivateKey.from_private_bytes(key) for name, key in keys.items()}
        for name, private in privates.items():
            if private.public_key().public_bytes_raw() != self._received.keys[name].mask:
                raise _false_share(name)
        for name, seed in seeds.items():
            masking_crypto.add_stream(self._total, own_mask_key(seed, digest, name), -1)
        for name, private in privates.items():
            for peer in self._is_masked_with(name):
                agreed = masking_crypto.agree(private, self._received.keys[peer].mask, peer)
                masking_crypto.add_stream(
                    self._total,
                    masking_crypto.pair_key(agreed, digest, peer, name),
                    -masking_crypto.sign_between(peer, name),
                )

    def _is_masked_with(self, dropped: str) -> list[str]:
        """Return the active clients that added a mask with a dropped one: those who were given its shares."""
        recipients = self.round.terms.graph.neighbours(dropped) & set(self._received.shares[dropped].boxes)
        return sorted(recipients & set(self._lists.active))

    def _rebuild(self, name: str, kind: Literal["seeds", "keys"]) -> bytes:
        terms, parts = self.round.terms, {}
        for holder in sorted((terms.graph.neighbours(name) | {name}) & set(self._received.reveals)):
            reveal = self._received.reveals[holder]
            if share := (reveal.seeds if kind == "seeds" else reveal.keys).get(name):
                parts[terms.share_indices[holder]] = share
        if len(parts) < terms.share_threshold:
            raise RoundError(
                f"{len(parts)} of the {terms.holders} holders of {name} revealed their shares; "
                f"{terms.share_threshold} are the "
                "threshold, and without them the sum stays masked",
                "begin a new round when more clients are there",
                "threshold",
            )
        return masking_crypto.combine_shares(parts, terms.share_threshold)


def _false_share(name: str) -> RoundError:
    return RoundError(
        f"the shares of {name} rebuild another secret than it committed to: {name} or a holder of it lies",
        "begin a new round; look at the clients, or leave out whom it fails with",
        "shares",
    )


_STAGE_OF: dict[type[Body], Stage] = {
    AdvertiseKeys: "keys",
    Shares: "shares",
    Masked: "masked",
    Consent: "consent",
    Reveal: "reveal",
}
