"""The second look at two near texts: what must agree does, what changes nothing may differ."""

from __future__ import annotations

import pytest

from sartor.text.equivalence import TextReading, compare_texts, idf_weights, stem, words


def verdict(one: str, other: str) -> tuple[str, float]:
    found = compare_texts(TextReading.of(one), TextReading.of(other), idf_weights([one, other]))
    assert (
        compare_texts(TextReading.of(other), TextReading.of(one), idf_weights([one, other])).objection
        == found.objection
    )
    return found.objection, found.score


@pytest.mark.parametrize(
    ("one", "other", "objection"),
    [
        ("turn on the kitchen light", "turn off the kitchen light", "opposite"),
        ("Wir öffnen um 9 h", "Wir öffnen um 10 h", "numbers"),
        ("it costs 1,000 euros", "it costs 1.5 euros", "numbers"),
        ("I like it", "I don't like it", "negation"),
        ("I like it", "I don’t like it", "negation"),
        ("das ist erlaubt", "das ist nicht erlaubt", "negation"),
        ("c'est permis", "ce n'est pas permis", "negation"),
        ("लाइट चालू करो", "लाइट चालू मत करो", "negation"),
        ("これは安全です", "これは安全ではない", "negation"),
        ("lock the front door", "unlock the front door", "opposite"),
        ("is it legal to smoke here", "is it illegal to smoke here", "opposite"),
        ("turn on the kitchen light", "turn on the garage light", "swap"),
        ("the dog bites the man", "the man bites the dog", "swap"),
        ("flights from Rome to Oslo", "flights from Oslo to Rome", "swap"),
        ("a trip to Austria in May", "a trip to Australia in May", "swap"),
        ("the employer pays", "the employee pays", "swap"),
        ("打开厨房的灯", "打开卧室的灯", "swap"),
    ],
)
def test_what_must_agree_is_held_against_a_pair(one: str, other: str, objection: str) -> None:
    assert verdict(one, other) == (objection, 0.0)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("How do I reset my password?", "how can I reset my password"),
        ("what is the capital of France", "What's the capital of France?"),
        ("could you tell me when the office opens", "when does the office open?"),
        ("please switch the lights on in the hall", "switch on the light in the hall"),
        ("set it to 20%", "set it to 20 percent"),
        ("réserve une table", "Reserve une table"),
        ("where's today's game played", "where is today's game being played"),
    ],
)
def test_what_changes_nothing_may_differ(one: str, other: str) -> None:
    assert verdict(one, other) == ("", 1.0)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("turn on the light", "turn on the light in the kitchen"),
        ("what is varicose eczema", "is varicose eczema serious"),
        ("is hepatitis serious", "is hepatitis B serious"),
        ("is hepatitis serious", "is hepatitis A serious"),
        ("how many siblings do you have", "do you have siblings"),
        ("open the door", ""),
        ("the", "a"),
    ],
)
def test_a_word_more_lowers_the_score(one: str, other: str) -> None:
    objection, score = verdict(one, other)
    assert objection == "" and score < 0.9


def test_changed_word_in_long_text_raises_no_objection() -> None:
    """One replaced word of a long text only lowers the score, to above 0.85; in a short text it is a swap."""
    long = "our office handles permits contracts drawings inspections payments deliveries repairs insurance claims heating windows "
    long += "roofs gardens lifts stairs kitchens bathrooms garages cellars balconies facades"
    objection, score = verdict(long, long.replace("gardens", "terraces"))
    assert objection == "" and 0.85 < score < 1


def test_rare_words_weigh_more_than_frequent_ones() -> None:
    weights = idf_weights(["turn on the light"] * 40 + ["play some jazz"] * 60 + ["turn on the chandelier light"])
    frequent = compare_texts(
        TextReading.of("on the chandelier light"), TextReading.of("turn on the chandelier light"), weights
    ).score
    rare = compare_texts(
        TextReading.of("turn on the light"), TextReading.of("turn on the chandelier light"), weights
    ).score
    assert rare < frequent


def test_shared_instruction_makes_no_questions_equivalent() -> None:
    """Behind one long instruction other commands are a swap; the same command reordered scores above 0.9."""
    frame = "You are given the spoken command of a person at home read it with care think about which device is meant and answer "
    frame += "with the name of one intent that fits never explain anything or say more than asked for by the owner of this house "
    places = [
        "kitchen",
        "garage",
        "attic",
        "office",
        "cellar",
        "porch",
        "nursery",
        "hallway",
        "garden",
        "bathroom",
        "loft",
    ]
    texts = [f"{frame}turn on the {place} {thing}" for place in places for thing in ("light", "fan")]
    weights = idf_weights(texts)
    for other in texts[1:]:
        verdict = compare_texts(TextReading.of(texts[0]), TextReading.of(other), weights)
        assert verdict.objection == "swap"
    assert (
        compare_texts(
            TextReading.of(texts[0]),
            TextReading.of(texts[0].replace("turn on the kitchen light", "the kitchen light please turn on")),
            weights,
        ).score
        > 0.9
    )


@pytest.mark.parametrize(
    "text", ["", " ", "...", "\U0001f600\U0001f600", "'" * 50, "n't", "\u0301\u0301", "a" * 10_000]
)
def test_any_text_is_read_and_is_equal_to_itself(text: str) -> None:
    assert compare_texts(TextReading.of(text), TextReading.of(text), {}).score == 1.0


def test_stem_removes_endings_and_accents() -> None:
    """Short words, digits and Devanagari words stay whole."""
    assert {stem("light"), stem("lights")} == {"light"}
    assert stem("opening") == stem("opened") == stem("open")
    assert stem("café") == "cafe" and stem("bus") == "bus" and stem("9") == "9"
    assert stem("करो") == "करो"


def test_no_word_is_both_nothing_and_a_negation() -> None:
    assert not words().function & words().negation
