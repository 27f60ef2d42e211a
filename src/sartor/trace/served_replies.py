"""Replies of a served agent, found and checked by their receipts.

Receipts belong to a higher level. On import, the package `sartor` registers how one is checked
(`offer_receipt_check`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ServedReply:
    """Reply whose words are those of its receipt.

    path: the Release that gave it, or the personal adapter.
    agent: exact version.
    compared: parts that were compared with the receipt's digests.
    reply: the reply as it was served, with a line end that the words which were given had lost.
    """

    receipt: str
    path: Path
    agent: str
    signer: str
    compared: str
    reply: str

    def as_json(self) -> dict[str, str]:
        """Return the part of the trace's JSON on the receipt."""
        return {"id": self.receipt, "agent": self.agent, "signer": self.signer, "compared": self.compared}


# (receipt file, turns of the prompt, reply, team file or None) -> the reply
CheckReceipt = Callable[[Path, Sequence[Mapping[str, Any]], str, Path | None], ServedReply]
_OFFERED: list[CheckReceipt] = []


def offer_receipt_check(check: CheckReceipt) -> None:
    """Register the function that checks words against a receipt."""
    _OFFERED[:] = [check]


def check_served(file: Path, messages: Sequence[Mapping[str, Any]], reply: str, team: Path | None) -> ServedReply:
    """Return the reply that a receipt was written for, after comparing the words with the receipt's digests.

    messages: turns of the prompt as the client sent them.
    team: TEAM.yaml; None to look for the team on this machine.
    Raises ArtifactError for other words, a damaged receipt, or an agent that is no longer here; SignatureError,
    ConfigError.
    """
    return _OFFERED[0](file, messages, reply, team)
