"""What a secure sum costs: whole rounds in one process, journals in memory, every signature, share and mask as over a
network.

    python benchmarks/secure_sum.py --clients 1000 --parameters 1000 --degree 100 --vanish 0.05 --json

The seconds are of one process that does the work of all clients and of the coordinator, one after the other;
`client_s` is what
falls to one client. `vanish`: the fraction of clients that send no vector. `error`: of the mean, relative to the norm
of the mean as computed in float64 without quantising.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import smallest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from results import print_result

from sartor.federate.rounds.round_client import Participant, RoundClient
from sartor.federate.rounds.round_coordinator import Coordinator, RoundPlan
from sartor.federate.rounds.round_journal import RoundJournal
from sartor.federate.rounds.round_manifest import LocalUpdate, Manifest, UpdateRules
from sartor.federate.rounds.transport import InProcess, TransferStats, run_round
from sartor.federate.secure.identities import Identity, PinnedKeys
from sartor.federate.secure.secagg_terms import SecureSumPolicy, failure_bound
from sartor.models.lora_tensors import Tensors


class Drawn:
    """An update of norm 1, drawn from a number."""

    def __init__(self, number: int) -> None:
        self.number = number

    def update(self, manifest: Manifest, shared: Tensors) -> LocalUpdate:
        """See Task."""
        values = np.random.default_rng(self.number).normal(size=shared["w"].shape).astype(np.float32)
        return LocalUpdate({"w": values / np.linalg.norm(values)}, 1)


class Losing(InProcess):
    """A transport on which some clients vanish before they send their vectors; clients' bytes and seconds are
    counted.
    """

    def __init__(self, clients: Mapping[str, RoundClient], gone: set[str], coordinator: Coordinator) -> None:
        super().__init__(clients)
        self.gone, self.coordinator, self.upload_bytes, self.client_s = gone, coordinator, 0, 0.0

    def exchange(self, requests: Mapping[str, bytes], wait_s: float) -> Iterator[bytes]:
        """See Transport."""
        if self.coordinator.stage == "masked":
            self.offline |= self.gone
        return super().exchange(requests, wait_s)

    def _answered(self, name: str, request: bytes) -> bytes:
        begin = time.process_time()
        answer = super()._answer(name, request)
        self.client_s += time.process_time() - begin
        self.upload_bytes += len(answer)
        return answer


def measure(clients: int, parameters: int, degree: int, vanish: float) -> dict[str, Any]:
    """One round's figures."""
    names = tuple(f"client-{number:05}" for number in range(clients))
    people = {name: Identity(name, Ed25519PrivateKey.generate()) for name in (*names, "coordinator")}
    roster = PinnedKeys({name: one.key.public_key() for name, one in people.items()})
    policy = SecureSumPolicy(least_degree=min(64, degree))
    members = {name: Participant(one, roster, policy=policy) for name, one in people.items()}
    coordinator = Coordinator(members["coordinator"], RoundJournal(), "benchmark")
    coordinator.start({"w": np.zeros(parameters, np.float32)})
    parties = {name: RoundClient(members[name], RoundJournal(), {"drawn": Drawn(n)}) for n, name in enumerate(names)}
    gone = set(names[: int(vanish * clients)])
    transport, carried = Losing(parties, gone, coordinator), TransferStats()
    plan = RoundPlan("drawn", names, UpdateRules(most_examples=1), degree=degree, stage_s=0, length_s=86_400)
    begin, begin_cpu = time.perf_counter(), time.process_time()
    ended = run_round(coordinator, transport, plan, carried)
    wall_s, cpu_s = time.perf_counter() - begin, time.process_time() - begin_cpu
    said = {
        "clients": clients,
        "parameters": parameters,
        "degree": degree,
        "vanished": len(gone),
        "state": ended.state,
    }
    if ended.state != "done":
        return {**said, "reason": ended.reason}
    staying = [number for number, name in enumerate(names) if name in set(ended.active)]
    exact = np.mean(
        [Drawn(n).update(coordinator, {"w": ended.mean["w"]}).tensors["w"] for n in staying], axis=0, dtype=np.float64
    )
    answering = clients - len(gone)
    return {
        **said,
        "wall_s": round(wall_s, 2),
        "cpu_s": round(cpu_s, 2),
        "client_s": round(transport.client_s / answering, 4),
        "coordinator_s": round(cpu_s - transport.client_s, 2),
        "upload_bytes_per_parameter": round(transport.upload_bytes / answering / parameters, 3),
        "download_bytes": round(carried.sent_bytes / clients),
        "error": float(f"{np.linalg.norm(ended.mean['w'] - exact) / np.linalg.norm(exact):.3g}"),
        "failure_bound": float(f"{_bound(clients, degree, len(gone)):.3g}"),
    }


def _bound(clients: int, degree: int, gone: int) -> float:
    holders = degree + 1
    return failure_bound(clients, degree, -(-(2 * clients // 3 + 1) * holders // clients), gone) if degree else 0.0


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--parameters", type=int, default=1_000)
    parser.add_argument("--degree", type=int, default=0, help="of the sparse graph; 0: everyone with everyone")
    parser.add_argument("--vanish", type=float, default=0.0)
    parser.add_argument("--json", action="store_true")
    smallest.add_argument(parser)
    asked = parser.parse_args()
    if asked.small:
        asked.clients, asked.parameters = 5, 50
    result = measure(asked.clients, asked.parameters, asked.degree, asked.vanish)
    if result["state"] != "done":
        print(json.dumps(result))
        sys.exit(f"the round ended {result['state']}: {result['reason']}")
    print_result(result)


if __name__ == "__main__":
    main()
