"""The coordinator's side of an inspectable round: one exchange, in which each client shows its update.

It stands where `secure.server.Server` stands in a private round, and like it follows from the answers it took. What is
shown is as it would go into a sum: clipped by its client, with the client's weight. A robust rule makes one of them.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from sartor.core.errors import ArtifactError, ConflictError, RoundError
from sartor.federate.aggregate.tensors__updates import Update
from sartor.federate.rounds import tensors as arrays
from sartor.federate.rounds.manifest import Manifest
from sartor.federate.secure import messages
from sartor.federate.secure.identity import Roster
from sartor.federate.secure.messages import Lists, Shown
from sartor.models.lora_tensors import norm


class Inspected:
    """The updates of one round."""

    def __init__(self, manifest: Manifest, roster: Roster) -> None:
        self._manifest, self._roster = manifest, roster
        self.stage: Literal["updates", "done"] = "updates"
        self._updates: dict[str, Update] = {}
        self._ids: dict[str, str] = {}

    @property
    def expected(self) -> tuple[str, ...]:
        """Whose updates are waited for."""
        return self._manifest.terms.cohort

    @property
    def missing(self) -> tuple[str, ...]:
        """Whose are not there yet."""
        return tuple(name for name in self.expected if name not in self._updates) if self.stage == "updates" else ()

    @property
    def lists(self) -> Lists:
        """Who has shown its update."""
        return Lists(tuple(sorted(self._updates)), ())

    def request(self, name: str) -> bytes:
        """Nothing but the invitation."""
        return b""

    def take(self, content: bytes) -> bool:
        """See Server. Raises ArtifactError too for what is no update of this round: of another shape, not finite, too long."""
        digest = self._manifest.digest
        sender, shown = messages.opened(content, Shown, digest, self._roster)
        known, identity = self._ids.get(sender), messages.digest(content)
        if known == identity or self.stage == "done":
            return False
        if known is not None:
            raise ConflictError(f"{sender} showed another update before, which counts", "look at that client")
        if sender not in self.expected:
            raise RoundError(f"{sender} is not of the cohort", "look at who carries it", "cohort")
        self._updates[sender], self._ids[sender] = self._checked(sender, arrays.unpack(shown.tensors)), identity
        return True

    def _checked(self, sender: str, found: dict[str, np.ndarray]) -> Update:
        rules, layout = self._manifest.rules, self._manifest.terms.layout
        wanted = {slot.name: slot.shape for slot in layout}
        is_good = {name: value.shape for name, value in found.items()} == wanted
        if not is_good or not all(np.isfinite(value).all() for value in found.values()):
            raise ArtifactError(f"what {sender} shows is no update of this round", "leave this client out, and look at it")
        weight = float(found.pop(arrays.WEIGHT)[0])
        longest = rules.clip * (1 + 1e-5)
        if not 0 < weight <= 1 or (length := norm(found)) > longest:
            said = f"weighs {weight:g}" if not 0 < weight <= 1 else f"has the norm {length:.3g}, and the clip is {rules.clip:g}"
            raise ArtifactError(f"the update of {sender} {said}", "leave this client out, and look at it")
        return Update(sender, found, max(1, round(weight * rules.most_examples)))

    def close(self) -> Literal["updates", "done"]:
        """See Server: fewer than the threshold are too few."""
        count, terms = len(self._updates), self._manifest.terms
        if count < terms.threshold:
            problem = f"{count} of {len(terms.cohort)} clients showed their updates; the threshold is {terms.threshold}"
            raise RoundError(problem, "begin a new round when more are there", "threshold")
        self.stage = "done"
        return self.stage

    def updates(self) -> list[Update]:
        """What was shown, in the order of names."""
        return [self._updates[name] for name in sorted(self._updates)]
