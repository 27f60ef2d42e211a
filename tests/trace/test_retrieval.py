"""Retrieval: BM25 over prompts and replies, runs of words, media by their bytes, pairs, duplicates as one."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from rows import document, row
from sartor.core.records import Example, Message, Origin, Part
from sartor.media import content_parts
from sartor.text.example_text import words
from sartor.trace.attribution import Method
from sartor.trace.credit import rank_groups, sum_by_source
from sartor.trace.retrieval import RetrievalIndex, RowSources, shared_pieces, shared_span
from sartor.trace.traced_adapter import TraceQuery
from sartor.trace.word_index import K1, B, WordIndex

TEXTS = ["the lamp is red", "the door is blue and the wall is blue", "a lamp", "", "the the the"]


def query(prompt: str, reply: str) -> TraceQuery:
    return TraceQuery((Message.of("user", prompt),), reply)


def bm25(texts: Sequence[str], asked: str) -> list[float]:
    """Equation 3.15 of Robertson and Zaragoza (2009), written out, over the value of the question with itself."""
    bags = [Counter(words(text)) for text in texts]
    mean = sum(bag.total() for bag in bags) / len(bags)

    def value(bag: Counter[str]) -> float:
        total = 0.0
        for word, repeats in Counter(words(asked)).items():
            n = sum(word in other for other in bags)
            rarity = math.log(1 + (len(bags) - n + 0.5) / (n + 0.5))
            tf = bag[word]
            total += repeats * rarity * tf * (K1 + 1) / (tf + K1 * (1 - B + B * bag.total() / mean))
        return total

    return [min(1.0, value(bag) / value(Counter(words(asked)))) for bag in bags]


@pytest.mark.parametrize("asked", ["the red lamp", "blue blue wall", "an unseen word", "the"])
def test_similarity_is_bm25(asked: str) -> None:
    found = WordIndex.of(TEXTS).similarities(asked)
    assert found is not None and found == pytest.approx(bm25(TEXTS, asked))


def test_text_without_words_has_no_similarity() -> None:
    index = WordIndex.of(TEXTS)
    assert index.similarities(" ?! ") is None
    assert index.span_fractions("two words") is None


def test_equal_row_scores_one_and_a_foreign_one_zero() -> None:
    index = RetrievalIndex.of([row("what is red", "the lamp is red"), row("wer da", "niemand ist hier")])
    assert index.scores([query("what is red", "the lamp is red")]).tolist() == [[pytest.approx(1.0), 0.0]]


def test_rare_run_outranks_common_words() -> None:
    """The row that holds a rare run of the reply comes before rows with more of its common words."""
    common = [row(f"question {n}", "the delivery is free of charge and the price is low") for n in range(30)]
    index = RetrievalIndex.of([*common, row("other", "call Zora Quill at once")])
    scores = index.scores([query("something", "the price is low, call Zora Quill at the office")])[0]
    assert int(scores.argmax()) == 30


def test_longest_shared_run_and_its_rows() -> None:
    rows = [row("a", f"Open from nine to five, room {n}.") for n in range(4)]
    match = RetrievalIndex.of(rows).match(query("a", "It is open from nine to five, room 2!"), 2)
    assert (match.shared_reply.text, match.shared_reply.words) == ("Open from nine to five, room 2", 7)
    assert match.shared_reply.rows == 1
    assert RetrievalIndex.of(rows).match(query("a", "open from nine to"), 0).shared_reply.rows == 4


def test_rejected_reply_of_a_pair_is_found() -> None:
    pair = row("colour?", "blue as the sky", rejected=(Message.of("assistant", "green as the grass"),))
    index = RetrievalIndex.of([row("colour?", "red as a rose"), pair])
    asked = query("colour?", "green as the grass")
    assert index.scores([asked])[0].tolist() == [pytest.approx(0.4, abs=0.2), pytest.approx(1.0)]
    assert index.match(asked, 1).is_rejected and not index.match(query("colour?", "blue as the sky"), 1).is_rejected


def test_document_is_found_by_its_text() -> None:
    index = RetrievalIndex.of([document("The shop opens at nine."), document("Parking is free.")])
    assert int(index.scores([query("when?", "the shop opens at nine")])[0].argmax()) == 0


def test_characters_count_as_words_in_chinese() -> None:
    index = RetrievalIndex.of([row("问", "商店九点开门"), row("问", "停车免费")])
    asked = query("问", "商店九点开门吗")
    assert int(index.scores([asked])[0].argmax()) == 0
    assert index.match(asked, 0).shared_reply.text == "商店九点开门"


def test_identical_media_decide_between_equal_words() -> None:
    content = b"\x89PNG one"
    names = [hashlib.sha256(content).hexdigest(), "0" * 64]
    rows = [
        Example(
            (Message("user", (Part("image", media=f"media/{name}.png"), Part("text", "what?"))),)
            + (Message.of("assistant", "a scratch"),),
            (Origin("a", "a:1"),),
        )
        for name in names
    ]
    shown = Part("image", media=content_parts.url_of(content, "image/png"))
    asked = TraceQuery((Message("user", (shown, Part("text", "what?"))),), "a scratch")
    index = RetrievalIndex.of(rows)
    assert index.scores([asked])[0].tolist() == [pytest.approx(1.0), pytest.approx(2 / 3)]
    assert index.match(asked, 0).media == 1.0 and index.match(asked, 1).media == 0.0
    assert index.equal_rows.tolist() == [0, 1]


def test_duplicates_share_their_credit() -> None:
    rows = [
        row("switch the hall lamp on", "done"),
        row("Switch the hall lamp on!", "Done."),  # equal words
        row("switch the hall lamps on", "done"),  # a near-duplicate
        row("switch the cellar lamp on", "done"),  # another prompt
        row("switch the hall lamp on", "no"),  # another reply
    ]
    index = RetrievalIndex.of(rows)
    scores = np.array([0.2, 0.5, 0.1, 0.3, 0.05])
    groups = rank_groups(index, scores, Method.UNROLLED, 5)
    assert [(group.rows, round(group.score, 6)) for group in groups] == [((1, 0, 2), 0.8), ((3,), 0.3), ((4,), 0.05)]
    assert [round(group.score, 6) for group in rank_groups(index, scores, Method.RETRIEVAL, 2)] == [0.5, 0.3]


def test_sources_get_equal_parts_of_a_row() -> None:
    def of(score: float, *sources: str) -> tuple[Example, float]:
        origins = tuple(Origin(source, f"{source}:1", "CC0-1.0") for source in sources)
        example = Example((Message.of("user", "a"), Message.of("assistant", f"{score}")), origins)
        return example, score

    rows, scores = zip(of(4.0, "a", "b"), of(1.0, "b"), of(-1.0, "c"), strict=True)
    credits = sum_by_source(RowSources.of(rows), np.array(scores))
    assert [(credit.source, credit.score, credit.rows) for credit in credits] == [
        ("b", 3.0, 2),
        ("a", 2.0, 1),
        ("c", -1.0, 1),
    ]


def test_pieces_join_to_the_texts() -> None:
    first, second = "Open: nine to five; closed on Sunday.", "We are open nine to FIVE, and closed on a Sunday"
    own, other = shared_pieces(first, second)
    assert "".join(text for _, text in own) == first and "".join(text for _, text in other) == second
    assert [text for is_shared, text in own if is_shared] == ["Open: nine to five", "closed on"]
    assert [text for is_shared, text in other if is_shared] == ["open nine to FIVE", "closed on"]
    assert shared_span(first, "nothing alike").words == 0
    assert shared_pieces("", "a") == ([], [(False, "a")])


@pytest.mark.parametrize("seed", range(3))
def test_scores_lie_between_zero_and_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    vocabulary = [f"w{n}" for n in range(12)]

    def text() -> str:
        return " ".join(rng.choice(vocabulary, rng.integers(0, 9)))

    index = RetrievalIndex.of([row(text() or "x", text() or "y") for _ in range(40)])
    scores = index.scores([query(text(), text() or "y") for _ in range(10)])
    assert scores.shape == (10, 40) and scores.min() >= 0 and scores.max() <= 1
