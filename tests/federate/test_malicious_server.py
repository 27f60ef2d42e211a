"""What a coordinator that lies may try, each by name: the client says no, and what it said before is of no use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from federating import COORDINATOR, LENIENT, Session, identity, names, roster_of, secret, terms
from sartor.core.errors import RoundError, SartorError, SignatureError
from sartor.federate.secure import messages
from sartor.federate.secure.messages import AdvertiseKeys, PeerKeys, SurvivorLists, Unmask
from sartor.federate.secure.secagg_client import SecAggClient
from sartor.federate.secure.secagg_terms import Round, SecureSumPolicy

VICTIM = "ward-0004"


def refused(check: str, act: Callable[[], object], kind: type[SartorError] = RoundError) -> SartorError:
    with pytest.raises(kind) as caught:
        act()
    assert caught.value.remedy
    assert not check or caught.value.check == check
    return caught.value


def as_server(session: Session, body: messages.Body) -> bytes:
    return messages.sealed(body, session.round.digest, session.me)


def begin(session: Session, changed: Round | None = None, policy: SecureSumPolicy = LENIENT) -> SecAggClient:
    return SecAggClient(changed or session.round, session.people[VICTIM], session.roster, secret("root"), policy)


def with_terms(session: Session, **changes: object) -> Round:
    return replace(session.round, terms=replace(session.terms, **changes))


def test_asks_both_lists_of_one_client() -> None:
    session = Session().run(until="consent")
    both = SurvivorLists(names(10), (VICTIM,))
    for name in ("ward-0001", VICTIM):
        refused("lists", lambda name=name: session.clients[name].consent(as_server(session, both)))


def test_tells_two_halves_different_lists() -> None:
    """The victim is in the sum to half of the others, and has vanished to the other half."""
    session = Session().run(until="consent")
    lists = {
        half: SurvivorLists(names(10), ())
        if half
        else SurvivorLists(tuple(n for n in names(10) if n != VICTIM), (VICTIM,))
        for half in (0, 1)
    }
    told = {name: lists[place % 2] for place, name in enumerate(names(10)) if name != VICTIM}
    consents = {name: session.clients[name].consent(as_server(session, said)) for name, said in told.items()}
    for name, said in told.items():
        agreeing = tuple(consents[other] for other, heard in told.items() if heard == said)
        refused(
            "threshold",
            lambda n=name, s=said, a=agreeing: session.clients[n].reveal(as_server(session, Unmask(s.digest, a))),
        )
        everyone = tuple(consents.values())
        refused(
            "lists", lambda n=name, s=said: session.clients[n].reveal(as_server(session, Unmask(s.digest, everyone)))
        )


def test_counts_one_consent_many_times() -> None:
    session = Session().run(until="reveal")
    one = session.sent["consent", "ward-0001"]
    unmask = Unmask(session.server.lists.digest, (one,) * 10)
    refused("threshold", lambda: session.clients[VICTIM].reveal(as_server(session, unmask)))


def test_forges_consents() -> None:
    session = Session().run(until="reveal")
    consent = messages.Consent(session.server.lists.digest)
    forged = tuple(messages.sealed(consent, session.round.digest, identity(name, seed=1)) for name in names(10))
    unmask = as_server(session, Unmask(consent.lists, forged))
    refused("", lambda: session.clients[VICTIM].reveal(unmask), SignatureError)


def test_threshold_one() -> None:
    session = Session()
    for threshold in (1, 6):
        refused("threshold", lambda threshold=threshold: begin(session, with_terms(session, threshold=threshold)))
    nine = with_terms(session, threshold=6, cohort=names(9))  # exactly 2/3 is not above it
    refused("threshold", lambda: begin(session, nine))


def test_cohort_of_one() -> None:
    session = Session()
    refused("cohort", lambda: begin(session, with_terms(session, cohort=(VICTIM,), threshold=1)))
    refused("cohort", lambda: begin(session, with_terms(session, cohort=("ward-0001", VICTIM), threshold=2)))
    refused("cohort", lambda: begin(session, policy=SecureSumPolicy(least_cohort=11)))


def test_cohort_of_strangers() -> None:
    session = Session()
    cohort = tuple(sorted((*names(10), "nobody")))
    refused("cohort", lambda: begin(session, with_terms(session, cohort=cohort, threshold=8)))


def test_cohort_without_this_client() -> None:
    session = Session()
    others = tuple(name for name in names(10) if name != VICTIM)
    refused("cohort", lambda: begin(session, with_terms(session, cohort=others)))


def test_graph_in_which_a_client_has_two_neighbours() -> None:
    session = Session()
    refused("cohort", lambda: begin(session, with_terms(session, degree=2), SecureSumPolicy()))


def test_swapped_public_key() -> None:
    """The coordinator sits in the middle: a key of its own under the name of a client."""
    session = Session().run(until="shares")
    genuine = [session.sent["keys", name] for name in names(10) if name not in (VICTIM, "ward-0007")]
    mine = AdvertiseKeys(secret("channel"), secret("mask"))
    forged = messages.sealed(mine, session.round.digest, identity("ward-0007", seed=1))
    refused(
        "", lambda: session.clients[VICTIM].share(as_server(session, PeerKeys((*genuine, forged)))), SignatureError
    )
    # its own signature over the key, under the name of a client, is no better
    swapped = messages.sealed(mine, session.round.digest, replace(session.me, name="ward-0007"))
    refused(
        "", lambda: session.clients[VICTIM].share(as_server(session, PeerKeys((*genuine, swapped)))), SignatureError
    )


def test_swapped_shares() -> None:
    session = Session().run(until="masked")
    boxes = messages.read_message(session.server.request(VICTIM)).body
    assert isinstance(boxes, messages.SealedShares)
    swapped = {**boxes.boxes, "ward-0001": boxes.boxes["ward-0002"]}
    refused(
        "", lambda: session.clients[VICTIM].hold(as_server(session, messages.SealedShares(swapped))), SignatureError
    )


def test_the_coordinator_as_a_neighbour() -> None:
    session = Session().run(until="shares")
    genuine = [session.sent["keys", name] for name in names(10) if name != VICTIM]
    own = messages.sealed(AdvertiseKeys(secret("channel"), secret("mask")), session.round.digest, session.me)
    refused("keys", lambda: session.clients[VICTIM].share(as_server(session, PeerKeys((*genuine, own)))))
    refused("keys", lambda: session.clients[VICTIM].share(as_server(session, PeerKeys((*genuine, genuine[0])))))


def test_few_neighbours() -> None:
    session = Session().run(until="shares")
    few = tuple(session.sent["keys", name] for name in names(10)[:4])
    refused("threshold", lambda: session.clients[VICTIM].share(as_server(session, PeerKeys(few))))


def test_altered_manifest() -> None:
    """Each half of the cohort is given another manifest: no key of the one half is a key in the round of the other."""
    session, other = Session(), Session(seed=1)
    foreign = tuple(other.clients[name].keys() for name in names(10) if name != VICTIM)
    error = refused("manifest", lambda: session.clients[VICTIM].share(as_server(session, PeerKeys(foreign))))
    assert "manifest" in error.problem


def test_replayed_messages_of_another_round() -> None:
    session, before = Session(), Session(seed=1).run()
    for stage, body in (("shares", "share"), ("consent", "consent"), ("reveal", "reveal")):
        session.run(until=stage)
        old = before.sent[stage, VICTIM]
        refused("manifest", lambda body=body, old=old: getattr(session.clients[VICTIM], body)(old))
        refused("stage", lambda old=old: session.server.take(old))


def test_second_request_of_one_stage() -> None:
    session = Session().run(until="shares")
    client = session.clients[VICTIM]
    client.share(session.server.request(VICTIM))
    fewer = tuple(session.sent["keys", name] for name in names(10)[:8] if name != VICTIM)
    refused("replayed", lambda: client.share(as_server(session, PeerKeys(fewer))))


def test_second_vector_under_one_mask() -> None:
    session = Session().run(until="consent")
    refused("replayed", lambda: session.clients[VICTIM].mask(session.vectors[VICTIM].copy()))


def test_vector_before_shares() -> None:
    session = Session().run(until="masked")
    refused("stage", lambda: session.clients[VICTIM].mask(session.vectors[VICTIM].copy()))


def test_at_most_one_unmask() -> None:
    session = Session().run()
    client = session.clients[VICTIM]
    again = SurvivorLists(names(10)[1:], (names(10)[0],))
    refused("replayed", lambda: client.consent(as_server(session, again)))
    refused("unmask", lambda: client.reveal(as_server(session, Unmask(again.digest, ()))))
    # the same lists with one consent less are another request
    fewer = tuple(session.sent["consent", name] for name in names(10)[1:])
    refused("unmask", lambda: client.reveal(as_server(session, Unmask(session.server.lists.digest, fewer))))


def test_drops_to_one_survivor() -> None:
    session = Session().run(until="consent")
    refused(
        "threshold",
        lambda: session.clients[VICTIM].consent(as_server(session, SurvivorLists((VICTIM,), names(10)[:4]))),
    )


def test_lists_that_leave_this_client_out() -> None:
    session = Session().run(until="consent")
    others = tuple(name for name in names(10) if name != VICTIM)
    refused("lists", lambda: session.clients[VICTIM].consent(as_server(session, SurvivorLists(others, (VICTIM,)))))


def test_lists_of_strangers_or_out_of_order() -> None:
    session = Session().run(until="consent")
    for active in ((*names(10), "zz"), names(10)[::-1], (*names(10), names(10)[-1])):
        refused(
            "lists",
            lambda active=active: session.clients[VICTIM].consent(as_server(session, SurvivorLists(active, ()))),
        )


def test_unmask_before_consent() -> None:
    session = Session().run(until="consent")
    refused(
        "unmask",
        lambda: session.clients[VICTIM].reveal(as_server(session, Unmask(SurvivorLists(names(10), ()).digest, ()))),
    )


def test_another_client_asks() -> None:
    session = Session().run(until="consent")
    request = messages.sealed(SurvivorLists(names(10), ()), session.round.digest, session.people["ward-0001"])
    refused("stage", lambda: session.clients[VICTIM].consent(request))


def test_key_of_small_order() -> None:
    """A neighbour that colludes sends a key with which everything agrees on zero."""
    session = Session().run(until="shares")
    weak = messages.sealed(AdvertiseKeys(bytes(32), bytes(32)), session.round.digest, session.people["ward-0007"])
    genuine = [session.sent["keys", name] for name in names(10) if name not in (VICTIM, "ward-0007")]
    refused("keys", lambda: session.clients[VICTIM].share(as_server(session, PeerKeys((*genuine, weak)))))


def bytes_of(vector: np.ndarray, seed: int) -> bytes:
    """The masked upload of the victim, whose update is `vector`, in a round of its own."""
    session = Session(count=4, size=vector.size, seed=seed)
    name = names(4)[1]
    session.vectors = {**session.vectors, name: vector}
    session.run(until="consent")
    body = messages.read_message(session.sent["masked", name]).body
    assert isinstance(body, messages.Masked)
    return body.vector


def counts(upload: bytes) -> np.ndarray:
    return np.bincount(np.frombuffer(upload, np.uint8), minlength=256)


def test_one_clients_upload_is_uniform() -> None:
    """Chi-square over the bytes, many rounds: the p-values of uniform bytes are themselves uniform (Kolmogorov-Smirnov)."""
    values = [stats.chisquare(counts(bytes_of(np.zeros(2_000, np.uint32), seed))).pvalue for seed in range(40)]
    assert stats.kstest(values, "uniform").pvalue > 1e-3
    assert min(values) > 1e-5


def test_uploads_of_two_updates_are_indistinguishable() -> None:
    """All zeros, and all of one large value: two samples of uploads, byte by byte and place by place."""
    one, other = np.zeros(2_000, np.uint32), np.full(2_000, 0x12345678, np.uint32)
    samples = [
        [bytes_of(vector, 100 + 2 * seed + which) for seed in range(24)] for which, vector in enumerate((one, other))
    ]
    table = np.array([sum(map(counts, sample)) for sample in samples])
    assert stats.chi2_contingency(table).pvalue > 1e-3
    numbers = [np.frombuffer(b"".join(sample), "<u4") for sample in samples]
    assert stats.ks_2samp(*numbers).pvalue > 1e-3
    # the mean at each place of the vector, over rounds: what a server that adds up many rounds would look at
    means = [np.frombuffer(b"".join(sample), "<u4").reshape(24, -1).mean(axis=0) for sample in samples]
    assert stats.ks_2samp(*means).pvalue > 1e-3


def test_the_test_of_uniform_bytes_sees_an_upload_without_masks() -> None:
    bare = np.random.default_rng(0).normal(0, 1e6, 2_000).astype(np.int64).astype(np.uint32).tobytes()
    assert stats.chisquare(counts(bare)).pvalue < 1e-9


def test_the_rest_of_a_transcript_says_nothing_of_the_update() -> None:
    """Of two runs that differ in one client's update, every message but its masked upload is the same, to the byte."""
    first, second = Session(), Session()
    second.vectors = {**second.vectors, VICTIM: second.vectors[VICTIM] + 1}
    first.run(), second.run()
    differing = {place for place in first.sent if first.sent[place] != second.sent[place]}
    assert differing == {("masked", VICTIM)}
    assert identity(COORDINATOR).name not in first.terms.cohort
    assert roster_of(*first.people.values()).keys.keys() == set(first.terms.cohort)
    assert terms(10).share_threshold == 7
