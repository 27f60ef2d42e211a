"""Flower ClientApp that forwards bytes between Flower and the socket of `sartor federate client`.

It holds no key and no data, and does not interpret the bytes. Flower starts a process of it for each message. From the
SuperNode's --node-config it reads trainer="PATH OF THE SOCKET".
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
    """Forward each request of a message to the client's socket, in order, and reply with the outcomes."""
    socket_path = Path(str(context.node_config["trainer"]))
    results = [
        _ask_trainer(socket_path, request, message.metadata.ttl)
        for request in flower_grid.requests_of(message.content)
    ]
    reply = NodeReply(tuple(outcome for outcome, _ in results), tuple(answer for _, answer in results))
    return Message(flower_grid.content_of(reply), reply_to=message)


def _ask_trainer(socket_path: Path, request: bytes, wait_s: float) -> tuple[str, bytes]:
    try:
        response = local_rpc.ask(socket_path, request, wait_s)
    except (MissingError, RequestError):
        return AGAIN, b""
    if response.kind == "answer":
        return ANSWERED, response.content
    if response.kind == "busy":
        return AGAIN, b""
    return f"no {response.content.decode(errors='replace') or response.kind}", b""
