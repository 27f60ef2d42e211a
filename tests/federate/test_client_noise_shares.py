"""Noise inside the secure sum is shared by no more clients than must stay to the end: who vanishes takes none of it away."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest

import round_parties
from round_parties import House
from sartor.federate.privacy.client_noise import noise_of, noised
from sartor.federate.rounds.round_client import RoundClient
from sartor.federate.rounds.round_manifest import UpdateRules
from sartor.federate.rounds.transport import InProcess, run_round
from sartor.federate.secure.secagg_terms import default_colluders, least_threshold

RULES = UpdateRules(clip=1.0, noise=3.0, most_examples=1)


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor in which the spread of noise can be seen."""
    monkeypatch.setattr(round_parties, "START", {"head.weight": np.zeros((200, 100), np.float32)})


class Noisy(House):
    """Clients with noise."""

    def client(self, name: str, **options: object) -> RoundClient:
        return super().client(name, **{"noise": noised, **options})


@dataclass
class Vanishing(InProcess):
    """All but the first few clients vanish before they send their masked updates."""

    house: House | None = None
    staying: int = 0
    sharers: set[int] = field(default_factory=set)

    def exchange(self, requests: Mapping[str, bytes], wait_s: float) -> Iterator[bytes]:
        assert self.house
        if self.house.coordinator.is_open:
            self.sharers.add(noise_of(self.house.coordinator._open.manifest).sharers)
            if self.house.coordinator.stage == "masked":
                self.offline |= set(self.house.names[self.staying :])
        return super().exchange(requests, wait_s)


@pytest.mark.parametrize("count", [4, 7, 10])
def test_fewest_survivors_draw_the_full_accounted_noise(count: int) -> None:
    """Only the clients that are sure to stay and not to collude share the noise."""
    house, least = Noisy(count), least_threshold(count)
    sharers = least - default_colluders(count)
    transport = Vanishing(house.clients, house=house, staying=least)
    ended = run_round(house.coordinator, transport, house.plan(rules=RULES, settings={"rate": 0.0}))
    assert ended.state == "done" and len(ended.active) == least < count
    assert transport.sharers == {sharers}, "no more than are sure to stay, less those who might collude"
    of_sum = float(ended.mean["head.weight"].std()) * least
    paid = RULES.noise * RULES.clip
    assert of_sum == pytest.approx(paid * (least / sharers) ** 0.5, rel=0.03), (
        "what was paid for, and the colluders' too"
    )


def test_with_one_fewer_the_sum_is_not_opened() -> None:
    house = Noisy(7)
    transport = Vanishing(house.clients, house=house, staying=least_threshold(7) - 1)
    ended = run_round(house.coordinator, transport, house.plan(rules=RULES))
    assert ended.state == "abandoned" and not ended.mean
