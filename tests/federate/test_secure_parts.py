"""What the secure sum is made of: shares, ring, masks, graph, messages, terms."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from federating import COORDINATOR, identity, names, roster_of, secret, terms
from sartor.core import signing
from sartor.core.errors import ArtifactError, BudgetError, ConfigError, RoundError, SignatureError
from sartor.federate.secure import fixed_point, masking_crypto, messages
from sartor.federate.secure.identities import Identity, PinnedKeys
from sartor.federate.secure.secagg_terms import (
    MOST_SUM,
    Graph,
    Round,
    SecureSumTerms,
    TensorSlot,
    failure_bound,
    least_threshold,
    most_degree,
)

SEED = "ab" * 32
DIGEST = "cd" * 32


@settings(max_examples=40, deadline=None)
@given(some.binary(min_size=32, max_size=32), some.integers(1, 12), some.data())
def test_any_threshold_of_shares_rebuilds_the_secret(value: bytes, threshold: int, data: some.DataObject) -> None:
    places = data.draw(some.lists(some.integers(1, 5_000), min_size=threshold, max_size=threshold + 6, unique=True))
    made = masking_crypto.split_secret(
        value, threshold, places, masking_crypto.stream_bytes(secret(value), (threshold - 1) * 48)
    )
    chosen = data.draw(some.permutations(places))[:threshold]
    assert masking_crypto.combine_shares({place: made[place] for place in chosen}, threshold) == value
    with pytest.raises(RoundError):
        masking_crypto.combine_shares({place: made[place] for place in chosen[1:]}, threshold)


@settings(max_examples=20, deadline=None)
@given(some.binary(min_size=32, max_size=32), some.binary(min_size=32, max_size=32))
def test_fewer_shares_fit_every_secret(one: bytes, other: bytes) -> None:
    """For the shares of `one` at two places there are coefficients with which `other` has the same shares."""
    made = masking_crypto.split_secret(one, 3, [1, 2, 3], masking_crypto.stream_bytes(secret(one), 96))
    # the polynomial through (0, other), (1, made[1]), (2, made[2]) has degree 2 as well
    points = {0: int.from_bytes(other, "big"), 1: int.from_bytes(made[1], "big"), 2: int.from_bytes(made[2], "big")}
    half = pow(2, -1, masking_crypto.PRIME)
    second = (points[2] - 2 * points[1] + points[0]) * half % masking_crypto.PRIME
    first = (points[1] - points[0] - second) % masking_crypto.PRIME
    again = masking_crypto.split_secret(other, 3, [1, 2], second.to_bytes(48, "big") + first.to_bytes(48, "big"))
    assert again == {1: made[1], 2: made[2]}


def test_the_field_is_prime_and_holds_every_secret() -> None:
    assert masking_crypto.PRIME > 1 << 256
    assert all(pow(base, masking_crypto.PRIME - 1, masking_crypto.PRIME) == 1 for base in (2, 3, 5, 7, 11, 13))
    full = b"\xff" * 32
    assert masking_crypto.combine_shares(masking_crypto.split_secret(full, 2, [1, 2], bytes(range(48))), 2) == full


@settings(max_examples=40, deadline=None)
@given(
    some.lists(some.floats(-1, 1, width=32), min_size=1, max_size=30),
    some.integers(1, 50),
    some.sampled_from(["nearest", "stochastic"]),
)
def test_a_value_is_right_to_a_unit_of_the_ring(
    values: list[float], count: int, rounding: fixed_point.Rounding
) -> None:
    tensors = {"weight": np.array(values, np.float32)}
    layout = fixed_point.layout_for(tensors, 1.0, count)
    of = SecureSumTerms(names(count), count, layout)
    total = np.zeros(of.size, np.uint32)
    for number in range(count):  # the worst case: everyone sends the same
        total += fixed_point.encode(tensors, of, rounding, np.random.default_rng(number))
    found = fixed_point.decode(total, layout)["weight"]
    assert np.abs(found - count * tensors["weight"].astype(np.float64)).max() <= count * layout[0].scale * 1.001


def test_stochastic_rounding_is_right_on_average() -> None:
    of = SecureSumTerms(names(1), 1, (TensorSlot("weight", (20_000,), 1.0),))
    units = fixed_point.quantise({"weight": np.full(20_000, 0.3)}, of.layout, "stochastic", np.random.default_rng(0))
    assert set(np.unique(units)) == {0, 1}
    assert abs(units.mean() - 0.3) < 0.02


def test_headroom_is_checked_and_nothing_is_clipped() -> None:
    of = terms(10, 3)
    most = of.max_units * of.layout[0].scale
    assert 10 * of.max_units <= MOST_SUM
    fixed_point.encode({"weight": np.array([1.0, -1.0, 0.0])}, of)
    for value in (most * 1.001, -1e30):
        with pytest.raises(BudgetError, match="clip the update"):
            fixed_point.encode({"weight": np.array([0.0, value, 0.0])}, of)


@pytest.mark.parametrize(
    "tensors",
    [{}, {"weight": np.zeros(2)}, {"weight": np.array([0, np.nan, 0])}, {"weight": np.zeros(3), "b": np.zeros(1)}],
)
def test_an_update_of_another_form_is_refused(tensors: dict[str, np.ndarray]) -> None:
    with pytest.raises(ConfigError):
        fixed_point.encode(tensors, terms(10, 3))


def test_masks_of_a_pair_cancel_and_follow_the_stream_of_the_rfc() -> None:
    vector = np.zeros(200_001, np.uint32)
    masking_crypto.add_stream(vector, secret("key"), 1)
    assert vector[:2].tobytes() == masking_crypto.stream_bytes(secret("key"), 8)
    assert vector.tobytes() == masking_crypto.stream_bytes(secret("key"), 4 * vector.size)
    masking_crypto.add_stream(vector, secret("key"), -1)
    assert not vector.any()
    # RFC 8439, appendix A.1, test vector 1: the key and the nonce are zeros
    assert masking_crypto.stream_bytes(bytes(32), 8).hex() == "76b8e0ada0f13d90"


def test_a_key_is_of_one_purpose_round_and_direction() -> None:
    made = {
        masking_crypto.derive(b"s" * 32, digest, *purpose)
        for digest in (DIGEST, SEED)
        for purpose in (("a",), ("a", "b"), ("ab",))
    }
    assert len(made) == 6
    box = masking_crypto.seal(b"text", secret("agreed"), DIGEST, "one", "two")
    assert masking_crypto.unseal(box, secret("agreed"), DIGEST, "one", "two") == b"text"
    for changed in ((DIGEST, "two", "one"), (SEED, "one", "two"), (DIGEST, "one", "three")):
        with pytest.raises(SignatureError):
            masking_crypto.unseal(box, secret("agreed"), *changed)


@settings(max_examples=30, deadline=None)
@given(some.integers(5, 80), some.data())
def test_a_sparse_graph_is_regular_mutual_and_in_one_piece(count: int, data: some.DataObject) -> None:
    degree = 2 * data.draw(some.integers(1, most_degree(count) // 2))
    graph = Graph(names(count), degree, SEED)
    found = {name: graph.neighbours(name) for name in names(count)}
    assert all(len(near) == degree and name not in near for name, near in found.items())
    assert all(name in found[other] for name, near in found.items() for other in near)
    reached, new = set(), {names(count)[0]}
    while new:
        reached |= new
        new = {other for name in new for other in found[name]} - reached
    assert len(reached) == count


def test_a_graph_follows_from_its_seed() -> None:
    graphs = [Graph(names(50), 10, seed).neighbours("ward-0000") for seed in (SEED, SEED, DIGEST)]
    assert graphs[0] == graphs[1] != graphs[2]
    for degree in (3, 50, -2):
        with pytest.raises(ConfigError):
            Graph(names(50), degree, SEED)


def test_how_often_a_round_on_a_sparse_graph_fails() -> None:
    of = SecureSumTerms(names(1000), least_threshold(1000), (TensorSlot("weight", (1,), 1.0),), 100, SEED)
    assert (of.holders, of.share_threshold) == (101, 68)
    tenth, third = failure_bound(1000, 100, 68, 100), failure_bound(1000, 100, 68, 300)
    assert tenth < 1e-6 < third
    assert failure_bound(20, 18, 13, 0) == 0


def test_secret_needs_over_two_thirds_of_its_share_holders() -> None:
    """This holds on complete and sparse graphs of 5 to 59 clients."""
    for count in range(5, 60):
        for degree in (0, *range(2, most_degree(count) + 1, 2)):
            of = SecureSumTerms(names(count), least_threshold(count), (TensorSlot("w", (1,), 1.0),), degree, SEED)
            assert 2 * of.holders < 3 * of.share_threshold <= 3 * of.holders


def test_terms_come_back_from_a_manifest() -> None:
    of = terms(12, 7, degree=6)
    assert SecureSumTerms.of(json.loads(json.dumps(of.as_json()))) == of
    for broken in (
        {},
        {**of.as_json(), "threshold": 1.5},
        {**of.as_json(), "layout": [{"name": "w"}]},
        {**of.as_json(), "cohort": 3},
    ):
        with pytest.raises(ArtifactError):
            SecureSumTerms.of(json.loads(json.dumps(broken)))


@pytest.mark.parametrize(
    "changes",
    [
        {"cohort": ("b", "a")},
        {"cohort": ("a", "a")},
        {"cohort": ("A", "b")},
        {"threshold": 0},
        {"threshold": 3},
        {"seed": "00"},
        {"layout": ()},
        {"layout": (TensorSlot("w", (1,), 0.0),)},
        {"layout": (TensorSlot("w", (1,), 1.0),) * 2},
    ],
)
def test_terms_that_can_be_no_sum_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        SecureSumTerms(**{"cohort": ("a", "b"), "threshold": 2, "layout": (TensorSlot("w", (1,), 1.0),), **changes})
    with pytest.raises(ConfigError):
        Round("00", terms(3), COORDINATOR)


BODIES = [
    messages.Invite(b"manifest", messages.Payload(b"tensors")),
    messages.RoundOutcome("done", ("a",), DIGEST, ""),
    messages.AdvertiseKeys(b"k" * 32, b"m" * 32),
    messages.PeerKeys((b"one", b"two")),
    messages.Shares(b"c" * 32, {"ward-1": b"box"}),
    messages.SealedShares({"ward-1": b"box"}),
    messages.Masked(messages.Payload(b"\n{} \n\x00\xff")),
    messages.SurvivorLists(("a", "b"), ("c",)),
    messages.Consent(DIGEST),
    messages.Unmask(DIGEST, (b"one",)),
    messages.Reveal({"a": b"1"}, {}),
    messages.Shown(messages.Payload(b"tensors")),
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.kind)
def test_a_message_comes_back_and_no_byte_of_it_may_change(body: messages.Body) -> None:
    assert {one.kind for one in BODIES} == set(messages.BODIES)
    me = identity("ward-7")
    content = messages.sealed(body, DIGEST, me)
    assert messages.verify_message(content, type(body), DIGEST, roster_of(me)) == ("ward-7", body)
    for place in range(0, len(content), 7):
        changed = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        with pytest.raises((ArtifactError, SignatureError, RoundError)):
            messages.verify_message(changed, type(body), DIGEST, roster_of(me))
    for longer in (content + b"\n", b" " + content, content[:-1]):
        with pytest.raises((ArtifactError, SignatureError)):
            messages.verify_message(longer, type(body), DIGEST, roster_of(me))


@settings(max_examples=30, deadline=None)
@given(
    some.one_of(
        some.binary(max_size=60),
        some.recursive(
            some.none() | some.integers() | some.text(max_size=5),
            lambda inner: (
                some.lists(inner, max_size=3)
                | some.dictionaries(
                    some.sampled_from(["schema", "kind", "round", "sender", "signature", "keys", "boxes"]),
                    inner,
                    max_size=7,
                )
            ),
            max_leaves=9,
        ).map(lambda said: json.dumps(said).encode()),
    )
)
def test_what_is_no_message_is_refused_without_a_traceback(content: bytes) -> None:
    with pytest.raises(ArtifactError):
        messages.read_message(content)


def test_a_roster_is_a_folder_of_public_keys_without_the_revoked(tmp_path: Path) -> None:
    (tmp_path / "roster").mkdir()
    for name in ("ward-1", "ward-2"):
        made = signing.keygen(tmp_path / name, purposes=("fleet",))
        (tmp_path / "roster" / f"{name}.pub").write_bytes(Path(made["public"]).read_bytes())
    me = Identity.open("ward-1", tmp_path / "ward-1")
    roster = PinnedKeys.open(tmp_path / "roster")
    roster.check("ward-1", b"text", me.sign(b"text"))
    for name, document in (("ward-2", b"text"), ("ward-1", b"other"), ("ward-3", b"text")):
        with pytest.raises(SignatureError):
            roster.check(name, document, me.sign(b"text"))
    revoked = tmp_path / "sartor-home" / "revoked"
    revoked.mkdir(parents=True, exist_ok=True)
    (revoked / "one.pub").write_bytes((tmp_path / "roster" / "ward-2.pub").read_bytes())
    assert set(PinnedKeys.open(tmp_path / "roster").keys) == {"ward-1"}
    with pytest.raises(ConfigError) as refused:
        PinnedKeys.open(tmp_path / "nowhere")
    assert "sartor federate keygen DIR --name NAME" in refused.value.remedy
    with pytest.raises(ConfigError, match="no private key") as refused:
        Identity.open("ward-3", tmp_path / "ward-3")
    assert refused.value.remedy == "sartor federate keygen DIR --name ward-3 makes one"
    (tmp_path / "roster" / "ward-3.pub").write_text("no key")
    with pytest.raises(ConfigError, match="no PEM public key") as refused:
        PinnedKeys.open(tmp_path / "roster")
    assert "sartor federate keygen DIR --name ward-3" in refused.value.remedy
