"""The ClientApp: bytes from Flower to the trainer's socket, and back. It has no key and no data, and understands nothing.

Flower starts a process of it for each message. Of the SuperNode's --node-config it takes trainer="PATH OF THE SOCKET".
"""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from sartor.core.errors import MissingError, RequestError
from sartor.federate.flower import hatch, wire
from sartor.federate.flower.transport import AGAIN, ANSWERED, Reply

# for the name, and to be there at all
_NAME_S = 10.0

app = ClientApp()


@app.query()
def hand_over(message: Message, context: Context) -> Message:
    """One letter: each request to the trainer, in order; what it says to each."""
    place = Path(str(context.node_config["trainer"]))
    return Message(wire.content_of(_reply(place, wire.requests_of(message.content), message.metadata.ttl)), reply_to=message)


def _reply(place: Path, requests: list[bytes], wait_s: float) -> Reply:
    try:
        name = hatch.ask(place, b"", _NAME_S)
    except (MissingError, RequestError):
        return Reply("")
    if name.kind != "answer":
        return Reply("")
    heard = [_asked(place, request, wait_s) for request in requests]
    return Reply(name.content.decode(errors="replace"), tuple(said for said, _ in heard), tuple(answer for _, answer in heard))


def _asked(place: Path, request: bytes, wait_s: float) -> tuple[str, bytes]:
    try:
        said = hatch.ask(place, request, wait_s)
    except (MissingError, RequestError):
        return AGAIN, b""
    if said.kind == "answer":
        return ANSWERED, said.content
    if said.kind == "busy":
        return AGAIN, b""
    return f"no {said.content.decode(errors='replace') or said.kind}", b""
