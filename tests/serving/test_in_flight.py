"""A reply made again goes on where it was, whatever the pieces; and who is suspected when workers die."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sartor.core.errors import BusyError, ModelError
from sartor.inference.engine import GenerateCall, Logprob, ReplyDone, ReplyFailed, TextDelta
from sartor.serving.workers.agent_health import AgentQueues, max_rows_per_agent
from sartor.serving.workers.in_flight import InFlightCall, InFlightEvents, ReplayBuffer, ReplayMismatchError

TOKENS = ["The", " sky", " is", "", " ", "blue", "é", ".", "\ud800", " And"]


def pieces(cuts: list[int]) -> list[TextDelta]:
    """TOKENS in pieces of so many tokens."""
    made, at = [], 0
    for cut in [*cuts, len(TOKENS)]:
        part = TOKENS[at : at + cut]
        at += cut
        made.append(TextDelta("c", "".join(part), len(part), tuple(Logprob(token, -0.5) for token in part)))
    return made


CUTS = st.lists(st.integers(1, 4), max_size=5)


@settings(max_examples=80, deadline=None)
@given(CUTS, CUTS, CUTS, st.integers(0, 6), st.integers(0, 6))
def test_a_reply_that_is_made_again_is_one_reply(
    first: list[int], second: list[int], third: list[int], died: int, again: int
) -> None:
    story = ReplayBuffer()
    said = []
    for cuts, until in ((first, died), (second, again), (third, 99)):
        story.restart()
        said += [piece for piece in map(story.advance, pieces(cuts)[:until]) if piece is not None]
    story.end()
    assert "".join(piece.text for piece in said) == "".join(TOKENS)
    assert sum(piece.tokens for piece in said) == len(TOKENS)
    assert [logprob.token for piece in said for logprob in piece.logprobs] == TOKENS


@pytest.mark.parametrize("again", [["The sea"], ["The"], ["the sky is"]])
def test_a_reply_that_differs_is_found(again: list[str]) -> None:
    story = ReplayBuffer()
    story.advance(TextDelta("c", "The sky", 2))
    story.restart()
    with pytest.raises(ReplayMismatchError):
        for text in again:
            story.advance(TextDelta("c", text, 1))
        story.end()


def live(agent: str = "a@1", number: int = 1) -> InFlightCall:
    return InFlightCall(GenerateCall(f"{agent}-{number}"), agent, False, number)


def deaths(*places: int) -> bool:
    """Whether a call is suspected after workers died when it had so many tokens."""
    one = live()
    for place in places:
        one.replay_buffer.advance(TextDelta("c", "x" * place, place))
        one.died()
    return one.is_suspect


def test_call_is_suspect_after_two_near_or_three_deaths() -> None:
    """Two worker deaths near one token position, or three anywhere, make a call suspect."""
    assert not deaths(0) and not deaths(3, 30) and not deaths(30, 0)
    assert deaths(0, 0) and deaths(7, 5) and deaths(3, 30, 60) and deaths(0, 9, 1)


async def test_a_client_takes_merged_pieces_and_then_the_end() -> None:
    one = live()
    events = InFlightEvents(one, cancel=lambda _: None)
    for text in "abc":
        one.add_event(TextDelta("c", text, 1))
    one.add_event(ReplyDone("c", "stop", 1, 3))
    result = [event async for event in events]
    assert result == [TextDelta("c", "abc", 3), ReplyDone("c", "stop", 1, 3)]


def test_only_an_error_without_a_piece_before_it_is_raised() -> None:
    one = live()
    assert one.error() is None
    one.add_event(ReplyFailed("c", "ModelError", "p", "r"))
    assert isinstance(one.error(), ModelError)
    one.add_event(TextDelta("c", "a", 1))
    assert one.error() is None


def test_a_flood_has_its_own_queue_and_its_turn() -> None:
    bulkhead = AgentQueues(per_agent=3)
    for number in range(3):
        bulkhead.enter("flood@1", rows=4)
        bulkhead.put(live("flood@1", number))
    with pytest.raises(BusyError) as caught:
        bulkhead.enter("flood@1", rows=4)
    assert caught.value.retry_after_s >= 1
    bulkhead.enter("calm@1", rows=4)
    bulkhead.put(live("calm@1", 9))
    order = [one.agent for one in bulkhead.in_turn({"flood@1": 1, "calm@1": 0})]
    assert order == ["calm@1", "flood@1"]
    assert [one.number for one in bulkhead.in_turn({"flood@1": 0, "calm@1": 0})] == [0, 9]


def test_a_call_that_is_made_again_keeps_its_place() -> None:
    bulkhead = AgentQueues(per_agent=9)
    for number in (5, 7, 6):
        bulkhead.put(live("a@1", number))
    order = []
    while first := bulkhead.in_turn({"a@1": 0}):
        order.append(first[0].number)
        bulkhead.drop(first[0])
    assert order == [5, 6, 7] and not bulkhead.any_waits()


@pytest.mark.parametrize(("rows", "most"), [(1, 1), (3, 3), (4, 3), (8, 7), (16, 14), (64, 56)])
def test_no_agent_holds_every_row(rows: int, most: int) -> None:
    assert max_rows_per_agent(rows) == most
