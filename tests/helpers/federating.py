"""Cohorts, rounds and whole sums for the tests of federate: everything drawn from a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sartor.federate.secure.fixed_point import Vector, scale_for
from sartor.federate.secure.identities import Identity, PinnedKeys
from sartor.federate.secure.secagg_client import SecAggClient
from sartor.federate.secure.secagg_server import SecAggServer, Sum
from sartor.federate.secure.secagg_terms import Round, SecureSumPolicy, SecureSumTerms, TensorSlot, least_threshold

COORDINATOR = "coordinator"
# a test's graph has few neighbours
LENIENT = SecureSumPolicy(least_degree=2)


def secret(*what: object) -> bytes:
    return hashlib.sha256(repr(what).encode()).digest()


def identity(name: str, seed: int = 0) -> Identity:
    return Identity(name, Ed25519PrivateKey.from_private_bytes(secret("identity", name, seed)))


def names(count: int) -> tuple[str, ...]:
    return tuple(f"ward-{number:04}" for number in range(count))


def terms(count: int, size: int = 50, degree: int = 0, threshold: int = 0, bound: float = 1.0) -> SecureSumTerms:
    layout = (TensorSlot("weight", (size,), scale_for(bound, count)),)
    return SecureSumTerms(names(count), threshold or least_threshold(count), layout, degree, secret("graph").hex())


def roster_of(*identities: Identity) -> PinnedKeys:
    return PinnedKeys({one.name: one.key.public_key() for one in identities})


def write_keys(folder: Path, me: Identity, roster: PinnedKeys) -> None:
    """NAME.key and roster/NAME.pub, as somebody who enrolled has them."""
    secret_ = me.key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / f"{me.name}.key").touch(mode=0o600)
    (folder / f"{me.name}.key").write_bytes(secret_)
    (folder / "roster").mkdir()
    for name, key in roster.keys.items():
        public = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        (folder / "roster" / f"{name}.pub").write_bytes(public)


@dataclass
class Session:
    """A cohort with its server and a vector each; `tamper` changes what the server sends: (stage, name, request) -> request."""

    count: int = 10
    size: int = 50
    degree: int = 0
    seed: int = 0
    vectors: Mapping[str, Vector] = field(default_factory=dict)
    tamper: Callable[[str, str, bytes], bytes] = staticmethod(lambda stage, name, request: request)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.terms = terms(self.count, self.size, self.degree)
        self.round = Round(secret("manifest", self.seed).hex(), self.terms, COORDINATOR)
        self.me = identity(COORDINATOR)
        self.people = {name: identity(name) for name in self.terms.cohort}
        self.roster = roster_of(self.me, *self.people.values())
        self.server = SecAggServer(self.round, self.me, self.roster)
        self.clients = {name: self.client(name) for name in self.terms.cohort}
        self.sent: dict[tuple[str, str], bytes] = {}
        if not self.vectors:
            chance = np.random.default_rng(self.seed)
            self.vectors = {name: chance.integers(0, 1 << 32, self.size, np.uint32) for name in self.terms.cohort}

    def client(self, name: str) -> SecAggClient:
        return SecAggClient(self.round, self.people[name], self.roster, secret("root", self.seed, name), LENIENT)

    def answer(self, stage: str, name: str, request: bytes) -> bytes:
        client = self.clients[name]
        if stage == "keys":
            return client.keys()
        if stage == "shares":
            return client.share(request)
        if stage == "masked":
            client.hold(request)
            return client.mask(self.vectors[name].copy())
        return client.consent(request) if stage == "consent" else client.reveal(request)

    def stage(self, vanish: Sequence[str] = ()) -> None:
        """Every client that is there answers; then the stage is closed."""
        stage = self.server.stage
        for name in self.server.expected:
            if name not in vanish:
                request = self.tamper(stage, name, self.server.request(name))
                self.sent[stage, name] = self.answer(stage, name, request)
                self.server.take(self.sent[stage, name])
        self.server.close()

    def run(self, vanish: Mapping[str, Sequence[str]] | None = None, until: str = "done") -> Session:
        """Stages, up to one that is left open. vanish: stage -> who no longer answers, from there on."""
        gone: set[str] = set()
        while self.server.stage != until:
            gone |= set((vanish or {}).get(self.server.stage, ()))
            self.stage(tuple(gone))
        return self

    def result(self) -> Sum:
        return self.server.result()

    def expected(self, active: Sequence[str]) -> Vector:
        return np.sum([self.vectors[name] for name in active], axis=0, dtype=np.uint32)
