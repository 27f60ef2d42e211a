"""Flower ClientApp: forwards bytes to the trainer's socket and back.

It has no key and no data, and understands nothing.

Flower starts a process of it for each message. Of the SuperNode's --node-config it takes trainer="PATH OF THE SOCKET".
"""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from sartor.core.errors import MissingError, RequestError
from sartor.federate.flower import flower_grid, local_rpc
from sartor.federate.flower.flower_transport import AGAIN, ANSWERED, NodeReply

app = ClientApp()


@app.query()
def hand_over(message: Message, context: Context) -> Message:
    """One letter: each request to the trainer, in order; what it says to each."""
    place = Path(str(context.node_config["trainer"]))
    heard = [_asked(place, request, message.metadata.ttl) for request in flower_grid.requests_of(message.content)]
    reply = NodeReply(tuple(said for said, _ in heard), tuple(answer for _, answer in heard))
    return Message(flower_grid.content_of(reply), reply_to=message)


def _asked(place: Path, request: bytes, wait_s: float) -> tuple[str, bytes]:
    try:
        said = local_rpc.ask(place, request, wait_s)
    except (MissingError, RequestError):
        return AGAIN, b""
    if said.kind == "answer":
        return ANSWERED, said.content
    if said.kind == "busy":
        return AGAIN, b""
    return f"no {said.content.decode(errors='replace') or said.kind}", b""
