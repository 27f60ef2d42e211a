"""Client side of secure aggregation.

Everything it draws comes from one secret of the round (`root`), so the same requests get the same answers, byte for
byte. A client that was killed resumes from its root and the stored requests. It refuses a second, different request of
one stage: a server that asks twice wants to learn what one answer does not tell.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from sartor.core.errors import RoundError
from sartor.federate.secure import masking_crypto, messages
from sartor.federate.secure.fixed_point import Vector
from sartor.federate.secure.identities import Identity, PinnedKeys
from sartor.federate.secure.masking_crypto import COEFFICIENT_BYTES, SHARE_BYTES
from sartor.federate.secure.messages import (
    AdvertiseKeys,
    Any_Body,
    Consent,
    Masked,
    Payload,
    PeerKeys,
    Reveal,
    SealedShares,
    Shares,
    SurvivorLists,
    Unmask,
)
from sartor.federate.secure.secagg_terms import Round, SecureSumPolicy

ROOT_BYTES = 32
_CHEAT = "leave this coordinator, and tell the others"


def commitment(seed: bytes, round_digest: str, name: str) -> bytes:
    """Return the commitment to a seed that is published before the seed is revealed."""
    return hashlib.sha256(masking_crypto.derive(seed, round_digest, "commitment", name)).digest()


def own_mask_key(seed: bytes, round_digest: str, name: str) -> bytes:
    """Return the key of the mask that only `name` adds."""
    return masking_crypto.derive(seed, round_digest, "own mask", name)


@dataclass(frozen=True)
class HeldShares:
    """Shares that a client holds of another client's secrets.

    seed: share of the seed of its own mask.
    key: share of its mask key.
    """

    seed: bytes
    key: bytes


class SecAggClient:
    """Client of one round of secure aggregation.

    root: 32 secret random bytes for this round alone, stored where a kill does not lose them.
    Raises RoundError, before any message, if the terms break the policy.
    """

    def __init__(
        self, round_: Round, identity: Identity, roster: PinnedKeys, root: bytes, policy: SecureSumPolicy | None = None
    ) -> None:
        (policy or SecureSumPolicy()).check(round_.terms, identity.name, roster.keys)
        self.round, self.name = round_, identity.name
        self._identity, self._roster = identity, roster
        digest = round_.digest
        self._channel = masking_crypto.private_key(root, digest, "channel key")
        self._mask_secret = masking_crypto.derive(root, digest, "mask key")
        self._mask = masking_crypto.private_key(root, digest, "mask key")
        self._seed = masking_crypto.derive(root, digest, "seed")
        length = (round_.terms.share_threshold - 1) * COEFFICIENT_BYTES
        randomness = masking_crypto.stream_bytes(masking_crypto.derive(root, digest, "coefficients"), 2 * length)
        self._randomness = randomness[:length], randomness[length:]
        self._neighbours = round_.terms.graph.neighbours(identity.name)
        self._request_digests: dict[str, str] = {}
        self._peers: dict[str, AdvertiseKeys] = {}
        self._agreements: dict[str, bytes] = {}
        self._own_shares = HeldShares(b"", b"")
        self._held_shares: dict[str, HeldShares] = {}
        self._lists: SurvivorLists | None = None

    def keys(self) -> bytes:
        """Return the first answer: this client's signed public keys of the round."""
        channel, mask = (key.public_key().public_bytes_raw() for key in (self._channel, self._mask))
        return self._sealed(AdvertiseKeys(channel, mask))

    def share(self, request: bytes) -> bytes:
        """Answer PeerKeys with Shares.

        Raises SignatureError for a key that its owner did not sign, RoundError for too few keys or those of strangers.
        """
        peers = self._opened(request, PeerKeys)
        peer_keys: dict[str, AdvertiseKeys] = {}
        for content in peers.keys:
            sender, keys = messages.verify_message(content, AdvertiseKeys, self.round.digest, self._roster)
            if sender not in self._neighbours or sender in peer_keys:
                raise RoundError(f"{sender} is given as a neighbour, and is none or is given twice", _CHEAT, "keys")
            peer_keys[sender] = keys
        self._check_count(len(peer_keys) + 1, "have sent their keys")
        self._note("share", request)
        self._peers = peer_keys
        terms, digest = self.round.terms, self.round.digest
        indices = [terms.share_indices[holder] for holder in (self.name, *sorted(peer_keys))]
        seed_shares = masking_crypto.split_secret(self._seed, terms.share_threshold, indices, self._randomness[0])
        key_shares = masking_crypto.split_secret(
            self._mask_secret, terms.share_threshold, indices, self._randomness[1]
        )
        own_index = terms.share_indices[self.name]
        self._own_shares = HeldShares(seed_shares[own_index], key_shares[own_index])
        boxes = {
            holder: masking_crypto.seal(
                seed_shares[terms.share_indices[holder]] + key_shares[terms.share_indices[holder]],
                self._agreed(holder),
                round_digest=digest,
                sender=self.name,
                recipient=holder,
            )
            for holder in sorted(peer_keys)
        }
        return self._sealed(Shares(commitment(self._seed, digest, self.name), boxes))

    def hold(self, request: bytes) -> None:
        """Store the shares that are meant for this client.

        Raises SignatureError for a changed box, RoundError if too few came.
        """
        boxes = self._opened(request, SealedShares).boxes
        if strangers := sorted(set(boxes) - set(self._peers)):
            raise RoundError(f"{strangers[0]} sends shares, and is no neighbour that sent its keys", _CHEAT, "keys")
        self._check_count(len(boxes) + 1, "have shared their secrets")
        held_shares = {}
        for sender, box in boxes.items():
            plain = masking_crypto.unseal(
                box, self._agreed(sender), round_digest=self.round.digest, sender=sender, recipient=self.name
            )
            if len(plain) != 2 * SHARE_BYTES:
                raise RoundError(f"the shares of {sender} have {len(plain)} bytes", "leave that client out", "shares")
            held_shares[sender] = HeldShares(plain[:SHARE_BYTES], plain[SHARE_BYTES:])
        self._note("hold", request)
        self._held_shares = {self.name: self._own_shares, **held_shares}

    def mask(self, vector: Vector) -> bytes:
        """Return the vector under this client's masks; once a round, whatever the vector.

        vector: (S,) uint32, of the layout's size, changed in place. Bonawitz et al. 2017, figure 4, round 2: y = x +
        PRG(b) + sum over peers v of sign(u, v) PRG(s_uv) mod 2**32. Raises RoundError for a second call.
        """
        if vector.size != self.round.terms.size:
            raise RoundError(
                f"the vector has {vector.size} numbers; the round's {self.round.terms.size}",
                "the round's layout",
                "manifest",
            )
        self.masked_before()
        digest = self.round.digest
        # y = x + PRG(b_u) + sum_v sign(u, v) PRG(s_uv)  mod 2**32;  vector: (S,)
        masking_crypto.add_stream(vector, own_mask_key(self._seed, digest, self.name), 1)
        for peer in sorted(set(self._held_shares) - {self.name}):
            agreed = masking_crypto.agree(self._mask, self._peers[peer].mask, peer)
            masking_crypto.add_stream(
                vector,
                masking_crypto.pair_key(agreed, digest, self.name, peer),
                masking_crypto.sign_between(self.name, peer),
            )
        return self._sealed(Masked(Payload(vector.astype("<u4", copy=False).tobytes())))

    def masked_before(self) -> None:
        """Mark `mask` as done; call it also on resuming after a kill with the stored answer.

        Raises RoundError if it was done before.
        """
        if "mask" in self._request_digests:
            # the difference of two vectors under one mask is unmasked
            raise RoundError(
                f"{self.name} sent its vector of this round before", "send the one that is kept", "replayed"
            )
        self._note("mask", b"")

    def consent(self, request: bytes) -> bytes:
        """Answer SurvivorLists with Consent.

        Raises RoundError for lists that no honest coordinator makes, and for second ones.
        """
        lists = self._opened(request, SurvivorLists)
        if "mask" not in self._request_digests:
            raise RoundError("lists came before this client sent its vector", _CHEAT, "stage")
        self._check_lists(lists)
        self._note("consent", request)
        self._lists = lists
        return self._sealed(Consent(lists.digest))

    def reveal(self, request: bytes) -> bytes:
        """Answer Unmask with Reveal, once a round.

        The lists must be those that this client consented to, and a quorum of its holders must have consented too.
        Raises RoundError otherwise.
        """
        unmask = self._opened(request, Unmask)
        if self._lists is None or unmask.lists != self._lists.digest:
            raise RoundError("shares are asked for by lists that this client did not consent to", _CHEAT, "unmask")
        consenting = set()
        for content in unmask.consents:
            sender, consent = messages.verify_message(content, Consent, self.round.digest, self._roster)
            if consent.lists != unmask.lists:
                raise RoundError(f"{sender} consented to other lists: it was told something else", _CHEAT, "lists")
            consenting.add(sender)
        self._check_count(len((consenting & set(self._held_shares)) | {self.name}), "consented to these lists")
        self._note("reveal", request)
        seeds = {name: shares.seed for name, shares in self._held_shares.items() if name in self._lists.active}
        keys = {name: shares.key for name, shares in self._held_shares.items() if name in self._lists.dropped}
        return self._sealed(Reveal(seeds, keys))

    def _check_lists(self, lists: SurvivorLists) -> None:
        terms, active, dropped = self.round.terms, set(lists.active), set(lists.dropped)
        if overlap := sorted(active & dropped):
            raise RoundError(
                f"{overlap[0]} is in both lists: the two together would unmask its vector", _CHEAT, "lists"
            )
        in_order = all(list(names) == sorted(set(names)) for names in (lists.active, lists.dropped))
        if not in_order or not active | dropped <= set(terms.share_indices):
            raise RoundError("the lists are not names of the cohort in order", _CHEAT, "lists")
        if self.name not in active:
            raise RoundError(
                f"{self.name} sent its vector, and the lists leave it out", "wait for the next round", "lists"
            )
        if len(active) < terms.threshold:
            raise RoundError(
                f"{len(active)} of {len(terms.cohort)} clients are in the sum; {terms.threshold} are the threshold",
                "begin a new round",
                "threshold",
            )
        if unknown := sorted((active | dropped) & self._neighbours - set(self._held_shares)):
            raise RoundError(f"{unknown[0]} is listed, and never shared its secrets with {self.name}", _CHEAT, "lists")
        self._check_count(len(active & set(self._held_shares)), "are in the sum")

    def _check_count(self, count: int, action: str) -> None:
        terms = self.round.terms
        if count < terms.share_threshold:
            raise RoundError(
                f"{count} of the {terms.holders} holders of {self.name} {action}; {terms.share_threshold} are the "
                "threshold",
                "wait for more clients, or begin a new round",
                "threshold",
            )

    def _agreed(self, peer: str) -> bytes:
        if peer not in self._agreements:
            self._agreements[peer] = masking_crypto.agree(self._channel, self._peers[peer].channel, peer)
        return self._agreements[peer]

    def _opened(self, request: bytes, kind: type[Any_Body]) -> Any_Body:
        sender, body = messages.verify_message(request, kind, self.round.digest, self._roster)
        if sender != self.round.coordinator:
            raise RoundError(f"{sender} asks for what only {self.round.coordinator} may", _CHEAT, "stage")
        return body

    def _note(self, stage: str, request: bytes) -> None:
        """Store the digest of a stage's request, in order. Raises RoundError for a different one of the same stage."""
        order = STAGES.index(stage)
        if missing := [earlier for earlier in STAGES[:order] if earlier not in self._request_digests]:
            raise RoundError(f"{stage!r} is asked for before {missing[0]!r}", _CHEAT, "stage")
        digest = messages.digest(request)
        if self._request_digests.setdefault(stage, digest) != digest:
            raise RoundError(
                f"{stage!r} was asked for before, by another request",
                _CHEAT,
                "unmask" if stage == "reveal" else "replayed",
            )

    def _sealed(self, body: AdvertiseKeys | Shares | Masked | Consent | Reveal) -> bytes:
        return messages.sealed(body, self.round.digest, self._identity)


STAGES: Sequence[str] = ("share", "hold", "mask", "consent", "reveal")
