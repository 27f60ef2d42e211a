r"""Signed protocol messages of secure aggregation, each with one encoding.

    {"boxes":{...},"kind":"shares","round":"<digest>","schema":1,"sender":"ward-3","signature":"..."}\n<payload>

A message is a line of canonical JSON, then the raw payload, which `Masked`, `Shown` and `Invite` have. The line holds
the payload's digest, and the signature covers the line without the signature. A message written in any other way than
by `sealed` is rejected. The digest of its bytes therefore identifies it: sent twice, it is the same message.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NewType, TypeVar, get_type_hints

from sartor.core import records
from sartor.core.config import is_valid_name
from sartor.core.errors import ArtifactError, RoundError
from sartor.federate.secure.identities import Identity, PinnedKeys

SCHEMA = 1
# largest line: it may hold keys or signatures of a few thousand neighbours
MOST_HEAD_BYTES = 16 << 20
Payload = NewType("Payload", bytes)


@dataclass(frozen=True)
class Invite:
    """Coordinator: the signed manifest of a round, and the tensors that it starts from (federate/updates.py)."""

    kind: ClassVar[str] = "invite"
    manifest: bytes
    shared: Payload


@dataclass(frozen=True)
class AdvertiseKeys:
    """Client: fresh X25519 public keys of this round, for sealing shares and for masks; 32 bytes each."""

    kind: ClassVar[str] = "keys"
    channel: bytes
    mask: bytes


@dataclass(frozen=True)
class PeerKeys:
    """Coordinator: the signed AdvertiseKeys of the recipient's neighbours, as they sent them."""

    kind: ClassVar[str] = "peers"
    keys: tuple[bytes, ...]


@dataclass(frozen=True)
class Shares:
    """Client: sealed shares by holder, and the commitment to its seed.

    commitment: digest that a rebuilt seed is compared with.
    """

    kind: ClassVar[str] = "shares"
    commitment: bytes
    boxes: dict[str, bytes]


@dataclass(frozen=True)
class SealedShares:
    """Coordinator: the sealed shares for the recipient, by sender."""

    kind: ClassVar[str] = "boxes"
    boxes: dict[str, bytes]


@dataclass(frozen=True)
class Masked:
    """Client: its masked vector, little-endian uint32."""

    kind: ClassVar[str] = "masked"
    vector: Payload


@dataclass(frozen=True)
class SurvivorLists:
    """Coordinator: who is in the sum, and who shared secrets and has vanished since.

    active, dropped: names, sorted.
    """

    kind: ClassVar[str] = "lists"
    active: tuple[str, ...]
    dropped: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Digest that a client consents to."""
        return records.digest([self.active, self.dropped])


@dataclass(frozen=True)
class Consent:
    """Client: its statement that these lists are the only ones of this round.

    lists: their digest.
    """

    kind: ClassVar[str] = "consent"
    lists: str


@dataclass(frozen=True)
class Unmask:
    """Coordinator: the signed Consents of the recipient's holders."""

    kind: ClassVar[str] = "unmask"
    lists: str
    consents: tuple[bytes, ...]


@dataclass(frozen=True)
class Reveal:
    """Client: shares of the seeds of the clients in the sum, and of the mask keys of those that vanished."""

    kind: ClassVar[str] = "reveal"
    seeds: dict[str, bytes]
    keys: dict[str, bytes]


@dataclass(frozen=True)
class Shown:
    """Client, in an inspectable round: its update and weight, visible to the coordinator.

    tensors: packed as in federate/updates.py.
    """

    kind: ClassVar[str] = "shown"
    tensors: Payload


@dataclass(frozen=True)
class RoundOutcome:
    """Coordinator: the end of the round.

    state: `done` or `abandoned`.
    active: names of the clients in the sum.
    shared: digest of the new tensors.
    """

    kind: ClassVar[str] = "outcome"
    state: str
    active: tuple[str, ...]
    shared: str
    reason: str


Body = (
    Invite
    | AdvertiseKeys
    | PeerKeys
    | Shares
    | SealedShares
    | Masked
    | SurvivorLists
    | Consent
    | Unmask
    | Reveal
    | Shown
    | RoundOutcome
)
BODIES: dict[str, type[Body]] = {
    body.kind: body
    for body in (
        Invite,
        AdvertiseKeys,
        PeerKeys,
        Shares,
        SealedShares,
        Masked,
        SurvivorLists,
        Consent,
        Unmask,
        Reveal,
        Shown,
        RoundOutcome,
    )
}
Any_Body = TypeVar(
    "Any_Body",
    Invite,
    AdvertiseKeys,
    PeerKeys,
    Shares,
    SealedShares,
    Masked,
    SurvivorLists,
    Consent,
    Unmask,
    Reveal,
    Shown,
    RoundOutcome,
)


@dataclass(frozen=True)
class Signed:
    """Message as it was read, with its signature not yet checked.

    document: bytes that the signature should cover.
    """

    round: str
    sender: str
    body: Body
    document: bytes
    signature: bytes

    def check(self, roster: PinnedKeys) -> None:
        """Raise SignatureError unless the sender's pinned key signed it."""
        roster.check(self.sender, self.document, self.signature)


def sealed(body: Body, round_digest: str, identity: Identity) -> bytes:
    """Return the bytes of a message, signed by `identity`."""
    head = _head(body, round_digest, identity.name)
    return _written(head, identity.sign(records.canonical(head)), _payload(body))


def without_payload(content: bytes) -> bytes:
    """Return what a transcript keeps of a message: the signed line, with the payload's digest."""
    return content.partition(b"\n")[0] + b"\n"


def digest(content: bytes) -> str:
    """Return the id of a message: sha256 of its bytes, hex."""
    return hashlib.sha256(content).hexdigest()


def read_message(content: bytes) -> Signed:
    """Return a message from its bytes, with its signature not yet checked.

    Raises ArtifactError for bytes that are no message, or that `sealed` would write differently.
    """
    line, _, payload = content.partition(b"\n")
    try:
        fields = json.loads(line) if len(line) <= MOST_HEAD_BYTES else None
        if not isinstance(fields, dict):
            raise TypeError("no JSON object of a message's size")
        if fields.get("schema") != SCHEMA or fields.get("kind") not in BODIES:
            raise ValueError(f"schema {fields.get('schema')!r:.20}, kind {fields.get('kind')!r:.20}")
        signature, sender, round_digest = _bytes(fields["signature"]), fields["sender"], fields["round"]
        body = _body(BODIES[fields["kind"]], fields, payload)
        if not is_valid_name(sender) or not isinstance(round_digest, str):
            raise TypeError("a sender or a round of another form")
        head = _head(body, round_digest, sender)
        if _written(head, signature, _payload(body)) != content:
            raise ValueError("it is not written as this version writes it")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ArtifactError(f"this is no message of a round: {error}", "look at who sends it") from None
    return Signed(round_digest, sender, body, records.canonical(head), signature)


def verify_message(
    content: bytes, kind: type[Any_Body], round_digest: str, roster: PinnedKeys
) -> tuple[str, Any_Body]:
    """Return (sender, body) of a message of this kind and round, after checking its signature.

    Raises ArtifactError, SignatureError, and RoundError if it belongs to another round or is of another kind.
    """
    signed = read_message(content)
    if signed.round != round_digest:
        raise RoundError(
            f"a message of {signed.sender} is of another round ({signed.round[:16]}) than this ({round_digest[:16]}): "
            "it is replayed, or the manifest that it was given is another",
            "begin a new round",
            "manifest",
        )
    if not isinstance(signed.body, kind):
        raise RoundError(
            f"{signed.sender} sends {signed.body.kind!r} where {kind.kind!r} is due", "wait for it", "stage"
        )
    signed.check(roster)
    return signed.sender, signed.body


def _head(body: Body, round_digest: str, sender: str) -> dict[str, Any]:
    head = {
        field.name: _plain(getattr(body, field.name))
        for field in fields(body)
        if _HINTS[body.kind][field.name] is not Payload
    }
    if payload := _payload(body):
        head["payload_sha256"] = hashlib.sha256(payload).hexdigest()
    return {**head, "schema": SCHEMA, "kind": body.kind, "round": round_digest, "sender": sender}


def _written(head: Mapping[str, Any], signature: bytes, payload: bytes) -> bytes:
    return records.canonical({**head, "signature": _plain(signature)}) + b"\n" + payload


def _payload(body: Body) -> bytes:
    if isinstance(body, Masked):
        return body.vector
    if isinstance(body, Shown):
        return body.tensors
    return body.shared if isinstance(body, Invite) else b""


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _bytes(value: Any) -> bytes:
    return base64.b64decode(_text(value), validate=True)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} where text is due")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r:.40} where a list is due")
    return value


_READERS: dict[Any, Callable[[Any], Any]] = {
    bytes: _bytes,
    str: _text,
    tuple[str, ...]: lambda value: tuple(map(_text, _list(value))),
    tuple[bytes, ...]: lambda value: tuple(map(_bytes, _list(value))),
    dict[str, bytes]: lambda value: {name: _bytes(item) for name, item in value.items()},
}


_HINTS: dict[str, dict[str, Any]] = {
    kind: {name: hint for name, hint in get_type_hints(body).items() if name != "kind"}
    for kind, body in BODIES.items()
}


def _body(kind: type[Body], head: Mapping[str, Any], payload: bytes) -> Body:
    try:
        values: dict[str, Any] = {
            name: payload if hint is Payload else _READERS[hint](head[name])
            for name, hint in _HINTS[kind.kind].items()
        }
    except AttributeError:
        raise TypeError("something else where names are due") from None
    return kind(**values)
