"""A client's trainer as a process: `flower_trainer.py FOLDER NAME SOCKET [USER]`; what it does, it logs to stderr."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import numpy as np

from federating import COORDINATOR, LENIENT, identity, names
from round_parties import Pull
from sartor.federate.flower.local_rpc import serve
from sartor.federate.rounds.round_client import Participant, RoundClient
from sartor.federate.rounds.round_journal import RoundJournal
from sartor.federate.rounds.round_manifest import LocalUpdate, Manifest
from sartor.federate.secure.identities import PinnedKeys
from sartor.models.lora_tensors import Tensors


class Logged(Pull):
    def update(self, manifest: Manifest, shared: Tensors) -> LocalUpdate:
        logging.info("learns round %d", manifest.number)
        return super().update(manifest, shared)


def certain() -> None:
    """Stochastic rounding without chance, in each process alike, so that two runs can be compared to the bit."""
    seeded = np.random.default_rng
    np.random.default_rng = lambda seed=0: seeded(seed)  # type: ignore[assignment]


if __name__ == "__main__":
    folder, name, path = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    certain()
    member = Participant(identity(name), PinnedKeys.open(folder / "roster"), COORDINATOR, LENIENT)
    task = Logged(names(9).index(name))
    with RoundJournal(folder / f"{name}.sqlite") as journal:
        user = int(sys.argv[4]) if sys.argv[4:] else None
        heard = frozenset({user}) if user is not None else None
        serve(RoundClient(member, journal, {"pull": task}), name, path, allowed=heard, group=user)
