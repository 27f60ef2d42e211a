"""Messages over Flower's Grid; imports flwr.

requests   ArrayRecord: "0000", "0001", ... the bytes of each request; Flower sends arrays in chunks and resumes an
           interrupted transfer, so no message is too large for it
reply      ConfigRecord "reply": the outcomes as "said"; ArrayRecord "answers": the non-empty answers, by request
number
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from sartor.federate.flower.flower_transport import Node, NodeReply

# message type "query": Flower's own counters of training and evaluation stay empty
KIND = "query"
_REQUESTS, _REPLY, _ANSWERS = "requests", "reply", "answers"
# a message holds the request of the stage, and the outcome of the round before; a few more do no harm
MOST_REQUESTS = 16


class GridPost:
    """MessageCarrier over Flower's Grid."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def nodes(self) -> Mapping[int, Node]:
        """Return the connected nodes by id."""
        return {info.node_id: Node(info.name, info.last_activated_at) for info in self._grid.get_nodes()}

    def send(self, node: int, requests: Sequence[bytes], keep_s: float) -> str:
        """Push a message with the requests to a node, and return its id; "" if SuperLink rejected it."""
        message = Message(RecordDict({_REQUESTS: _array(dict(enumerate(requests)))}), node, KIND, ttl=keep_s)
        return next(iter(self._grid.push_messages([message])), "") or ""

    def collect(self, ids: Sequence[str]) -> Iterator[tuple[str, NodeReply | None]]:
        """Yield the replies that have arrived, by message id; None for a lost message.

        A message that SuperLink rejected has the id "".
        """
        if "" in ids:
            yield "", None
        if message_ids := [row_id for row_id in ids if row_id]:
            for message in self._grid.pull_messages(message_ids):
                reply = None if message.has_error() else _reply(message.content)
                yield message.metadata.reply_to_message_id, reply


def requests_of(content: RecordDict) -> list[bytes]:
    """Return the requests of a message, in order. Raises ValueError for another form."""
    requests = _bytes(content.array_records.get(_REQUESTS))
    if len(requests) > MOST_REQUESTS or sorted(requests) != list(range(len(requests))):
        raise ValueError(f"a letter of {len(requests)} requests; at most {MOST_REQUESTS}, in order")
    return [requests[index] for index in sorted(requests)]


def content_of(reply: NodeReply) -> RecordDict:
    """Return the content of a node's reply."""
    answers = {index: answer for index, answer in enumerate(reply.answers) if answer}
    head = ConfigRecord({"said": list(reply.outcomes)})
    return RecordDict({_REPLY: head, _ANSWERS: _array(answers)})


def _reply(content: RecordDict) -> NodeReply | None:
    """Return the reply of a node; None if it has another form, as that of another app."""
    head = content.config_records.get(_REPLY)
    outcomes = head.get("said") if head else None
    if not isinstance(outcomes, list) or not all(isinstance(item, str) for item in outcomes):
        return None
    try:
        answers = _bytes(content.array_records.get(_ANSWERS))
    except ValueError:
        return None
    return NodeReply(tuple(map(str, outcomes)), tuple(answers.get(index, b"") for index in range(len(outcomes))))


def _array(contents: Mapping[int, bytes]) -> ArrayRecord:
    return ArrayRecord(
        {f"{index:04}": Array("uint8", (len(content),), "bytes", content) for index, content in contents.items()}
    )


def _bytes(record: ArrayRecord | None) -> dict[int, bytes]:
    return {int(index): array.data for index, array in (record or {}).items()}
