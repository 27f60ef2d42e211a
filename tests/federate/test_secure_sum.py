"""The sum is exact, to the bit: whoever vanishes, whenever, on either graph; below the threshold there is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from federating import Session, names
from sartor.core.errors import ConflictError, RoundError
from sartor.federate.secure import fixed_point, messages
from sartor.federate.secure.secagg_server import STAGES

ALL = STAGES[:-1]


def check(session: Session, active: tuple[str, ...]) -> None:
    found = session.result()
    assert found.active == active
    assert np.array_equal(found.vector, session.expected(active))


def test_the_sum_of_everyone_is_exact() -> None:
    check(Session().run(), names(10))


@pytest.mark.parametrize("stage", ALL)
def test_thirty_percent_vanish_and_the_sum_of_the_rest_is_exact(stage: str) -> None:
    gone = ("ward-0002", "ward-0005", "ward-0009")
    session = Session(seed=ALL.index(stage)).run({stage: gone})
    # whose vector came before they vanished is in the sum
    late = stage in ("consent", "reveal")
    check(session, names(10) if late else tuple(name for name in names(10) if name not in gone))


def test_one_vanishes_at_each_stage_and_the_sum_is_exact() -> None:
    session = Session(count=20).run({stage: (f"ward-{place:04}",) for place, stage in enumerate(ALL)})
    check(session, names(20)[3:])


@pytest.mark.parametrize("stage", ["shares", "masked", "reveal"])
def test_sparse_graph_sum_is_exact_when_a_tenth_vanishes(stage: str) -> None:
    """Clients that vanish at the reveal stage still count; those that vanish earlier do not."""
    gone = names(40)[::10]
    session = Session(count=40, degree=24, size=7).run({stage: gone})
    late = stage in ("consent", "reveal")
    check(session, names(40) if late else tuple(name for name in names(40) if name not in gone))


@pytest.mark.parametrize("stage", ALL)
def test_below_the_threshold_nothing_is_revealed(stage: str) -> None:
    session = Session()
    session.run(until=stage)
    with pytest.raises(RoundError) as caught:
        session.run({stage: names(10)[:4]})
    assert (caught.value.check, session.server.stage) == ("threshold", stage)
    assert "threshold" in str(caught.value) and caught.value.remedy
    with pytest.raises(RoundError):
        session.result()
    # the total that the coordinator holds is still under masks
    if stage == "reveal":
        assert not np.array_equal(session.server._total, session.expected(names(10)))


def test_messages_come_twice_and_late_and_change_nothing() -> None:
    session = Session()
    session.run(until="shares")
    early = session.sent["keys", "ward-0003"]
    assert session.server.take(early) is False
    session.run(until="masked")
    kept = {name: session.clients[name] for name in session.clients}
    first = kept["ward-0001"]
    request = session.server.request("ward-0001")
    first.hold(request)
    answer = first.mask(session.vectors["ward-0001"].copy())
    assert session.server.take(answer) is True
    assert session.server.take(answer) is False
    other = messages.sealed(
        messages.Masked(messages.Payload(bytes(200))), session.round.digest, session.people["ward-0001"]
    )
    with pytest.raises(ConflictError):
        session.server.take(other)
    assert "ward-0001" not in session.server.missing


def test_a_client_says_the_same_again_to_the_byte() -> None:
    session = Session()
    session.run(until="shares")
    request = session.server.request("ward-0000")
    first = session.clients["ward-0000"].share(request)
    assert session.clients["ward-0000"].share(request) == first
    again = session.client("ward-0000")
    assert again.share(session.server.request("ward-0000")) == first
    assert again.keys() == session.sent["keys", "ward-0000"]


def test_a_share_that_is_false_is_found() -> None:
    session = Session()
    session.run(until="reveal")
    reveal = messages.read_message(session.clients["ward-0000"].reveal(session.server.request("ward-0000"))).body
    assert isinstance(reveal, messages.Reveal)
    false = messages.Reveal({**reveal.seeds, "ward-0004": bytes(33)}, reveal.keys)
    session.server.take(messages.sealed(false, session.round.digest, session.people["ward-0000"]))
    for name in names(10)[1:]:
        session.server.take(session.clients[name].reveal(session.server.request(name)))
    with pytest.raises(RoundError) as caught:
        session.server.close()
    assert caught.value.check == "shares"
    assert session.server.stage == "reveal"


def test_upload_has_at_most_4_2_bytes_per_parameter() -> None:
    session = Session(count=10, size=100_000).run()
    sent = sum(len(content) for (_, name), content in session.sent.items() if name == "ward-0003")
    assert 4 <= sent / 100_000 <= 4.2


def test_what_quantising_costs_of_the_norm_of_the_sum() -> None:
    """Ten clients, each a vector of norm 1 in 200,000 numbers, at the scale that a clip of 1 allows."""
    count, size = 10, 200_000
    chance = np.random.default_rng(0)
    updates = chance.normal(size=(count, size)).astype(np.float32)
    updates /= np.linalg.norm(updates, axis=1, keepdims=True)
    session = Session(count=count, size=size)
    for rounding in ("nearest", "stochastic"):
        units = [
            fixed_point.encode({"weight": one}, session.terms, rounding, np.random.default_rng(n))
            for n, one in enumerate(updates)
        ]
        total = fixed_point.decode(np.sum(units, axis=0, dtype=np.uint32), session.terms.layout)["weight"]
        exact = updates.astype(np.float64).sum(axis=0)
        assert np.linalg.norm(total - exact) <= 1e-3 * np.linalg.norm(exact) * (
            0.005 if rounding == "nearest" else 0.01
        )


@pytest.mark.parametrize(("degree", "vanish"), [(0, 0.3), (20, 0.0)])
def test_the_benchmark_of_a_round_measures_what_it_says(
    degree: int, vanish: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import secure_sum

    said = secure_sum.measure(24, 40, degree, vanish)
    assert (said["state"], said["vanished"], said["error"] < 1e-3) == ("done", int(24 * vanish), True)
