"""The trainer: the one process of a client that has its keys, data and journal. It stays; who carries messages comes and goes.

Each request is checked by RoundClient as if an enemy had sent it, for an enemy may: of what a carrier says nothing is believed
but what the coordinator signed. A refusal leaves as the error's class and check; its text, which may name what lies on this
machine, stays in the log.
"""

from __future__ import annotations

import logging
import signal
import time
from pathlib import Path
from typing import Protocol

from sartor.core.errors import SartorError
from sartor.federate.flower.hatch import Hatch, Limits, Said

LOG = logging.getLogger("sartor.trainer")


class Answers(Protocol):
    """RoundClient, or what stands for it."""

    def answer(self, request: bytes) -> bytes:
        """The answer; empty where none is due."""
        ...


def serve(
    client: Answers,
    name: str,
    path: Path,
    *,
    allowed: frozenset[int] | None = None,
    group: int | None = None,
    limits: Limits | None = None,
) -> None:
    """Answer at the socket `path` until SIGTERM or SIGINT. See Hatch for the options and errors.

    name: whom the coordinator's roster calls this client. To be called in the thread that opened the client's journal.
    """
    with Hatch(path, allowed, group, limits) as hatch:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: hatch.stop())
        LOG.info("%s answers at %s", name, path)
        hatch.serve(name, lambda request: said_to(client, request))


def said_to(client: Answers, request: bytes) -> Said:
    """The answer, or why there is none. Raises nothing, for the next request is another."""
    since = time.monotonic()
    try:
        answer = client.answer(request)
    except SartorError as error:
        LOG.warning("refused a request of %d bytes: %s", len(request), error)
        return Said("no", f"{error.kind} {error.check}".strip().encode())
    except Exception:
        LOG.exception("a request of %d bytes could not be answered", len(request))
        return Said("no", b"failed")
    LOG.info("answered %d bytes with %d in %.2f s", len(request), len(answer), time.monotonic() - since)
    return Said("answer", answer)
