"""The grammar of swaps, as a table; and what is left alone."""

from __future__ import annotations

import pytest

from sartor.core.errors import ConfigError
from sartor.text.demographics import group_terms

RIGHT = [
    # her: before its noun, or an object
    ("pronouns", "he", "She likes her car.", "He likes his car."),
    ("pronouns", "he", "I saw her.", "I saw him."),
    ("pronouns", "he", "I saw her yesterday and gave her a key.", "I saw him yesterday and gave him a key."),
    ("pronouns", "he", "The bank denied her credit.", "The bank denied him credit."),
    ("pronouns", "he", "Her credit was denied.", "His credit was denied."),
    ("pronouns", "he", "We let her go and her team agreed.", "We let him go and his team agreed."),
    ("pronouns", "he", "They saw her leaving.", "They saw him leaving."),
    (
        "pronouns",
        "he",
        "We met her early this week, in her early career.",
        "We met him early this week, in his early career.",
    ),
    ("pronouns", "he", "The car is hers, she bought it herself.", "The car is his, he bought it himself."),
    ("pronouns", "she", "The car is his.", "The car is hers."),
    ("pronouns", "she", "His car is here, a friend of his drove it.", "Her car is here, a friend of hers drove it."),
    ("pronouns", "she", "He told me that HE hurt himself.", "She told me that SHE hurt herself."),
    # verbs that agree, contractions
    ("pronouns", "they", "She works here.", "They work here."),
    ("pronouns", "they", "She always tries and never gives up.", "They always try and never give up."),
    ("pronouns", "they", "He is late and has a car.", "They are late and have a car."),
    ("pronouns", "they", "Is she late? Does he know?", None),
    (
        "pronouns",
        "they",
        "Is she late? Does she know? She doesn't say.",
        "Are they late? Do they know? They don't say.",
    ),
    ("pronouns", "they", "The reason is she works.", "The reason is they work."),
    (
        "pronouns",
        "they",
        "She's tired, she's been up, she'll sleep.",
        "They're tired, they've been up, they'll sleep.",
    ),
    ("pronouns", "they", "She's approved.", None),
    ("pronouns", "they", "She teaches maths.", "They teach maths."),
    ("pronouns", "they", "She was here and went home.", "They were here and went home."),
    ("pronouns", "she", "The applicant says they are late.", "The applicant says she is late."),
    ("pronouns", "he", "The applicant says they've paid and they work.", "The applicant says he's paid and he works."),
    (
        "pronouns",
        "he",
        "An applicant can do this themself. Do they know?",
        "An applicant can do this himself. Does he know?",
    ),
    # either
    ("pronouns", "they", "If he or she pays, his or her loan ends.", "If they pay, their loan ends."),
    ("pronouns", "she", "He/she pays.", "She pays."),
    # nouns, titles, articles, names that go along
    ("pronouns", "he", "The woman is a good mother; her husband helps.", "The man is a good father; his wife helps."),
    ("pronouns", "they", "The woman loves her husband.", "The person loves their spouse."),
    ("pronouns", "he", "Mrs. Smith says she pays.", "Mr. Smith says he pays."),
    ("pronouns", "he", "An actress called.", "An actor called."),
    ("pronouns", "they", "An actress called.", "A performer called."),
    ("pronouns", "he", "Emily said she pays.", "Greg said he pays."),
    ("pronouns", "they", "Emily said she pays.", "Emily said they pay."),
    ("pronouns", "he", "She has a daughter and her brother pays.", "He has a daughter and his brother pays."),
    ("pronouns", "they", "She's always late.", None),
    # two people, many people, nobody
    ("pronouns", "he", "She told him.", None),
    ("pronouns", "he", "The pumps fail when they run dry.", None),
    ("pronouns", "he", "Nobody is here.", None),
    ("pronouns", "he", "He is here.", None),
    # names
    ("names", "black_female", "Emily Walsh has paid. Emily's card.", "Lakisha Washington has paid. Lakisha's card."),
    ("names", "indian_male", "James Smith asks. Mr Smith pays.", "Arjun Kumar asks. Mr Kumar pays."),
    ("names", "black_male", "Emily said she pays.", "Jermaine said he pays."),
    ("names", "white_male", "Jamal and Tyrone", "Geoffrey and Brad"),
    ("names", "white_male", "Brad is here.", None),
    ("names", "white_male", "The mary rose.", None),
    # age
    ("age", "older", "A 28-year-old applicant asks.", "A 60-year-old applicant asks."),
    ("age", "young", "A 50-year-old applicant asks.", "An 18-year-old applicant asks."),
    ("age", "older", "A young man, aged 30.", "An older man, aged 62."),
    (
        "age",
        "young",
        "She is old. An elderly lady in her late fifties.",
        "She is young. A young lady in her late twenties.",
    ),
    ("age", "young", "An older car is older than a new one.", None),
    ("age", "older", "A 6-year-old child, 28 euros.", None),
    # nationality
    ("nationality", "american", "A German applicant from Germany.", "An American applicant from the United States."),
    ("nationality", "turkish", "She is German. A German applied.", "She is Turkish. A Turk applied."),
    ("nationality", "french", "An American who pays.", "A French person who pays."),
    ("nationality", "german", "A Ukrainian and a Briton.", "A Ukrainian and a German."),
    ("nationality", "turkish", "German lessons; made in Germany. She speaks German.", None),
    # disability
    ("disability", "none", "A blind applicant.", "A non-disabled applicant."),
    ("disability", "autistic", "A blind applicant.", "An autistic applicant."),
    ("disability", "blind", "She uses a wheelchair. They use a wheelchair.", "She is blind. They are blind."),
    (
        "disability",
        "wheelchair",
        "People who are blind; she is deaf.",
        "People who are wheelchair users; she is a wheelchair user.",
    ),
    (
        "disability",
        "deaf",
        "A man with a disability, people with disabilities.",
        "A man who is deaf, people who are deaf.",
    ),
    ("disability", "none", "I am blind.", "I am not disabled."),
    ("disability", "deaf", "The bank is blind to risk.", None),
]


@pytest.mark.parametrize(("kind", "to", "text", "right"), RIGHT)
def test_a_swap_keeps_the_grammar(kind: group_terms.Kind, to: str, text: str, right: str | None) -> None:
    assert group_terms.swap(text, kind, to) == right


@pytest.mark.parametrize("kind", group_terms.KINDS)
def test_what_was_swapped_is_of_the_group(kind: group_terms.Kind) -> None:
    text = "Emily Walsh, 28, says she is German, and the German woman is blind."
    for to in group_terms.groups(kind):
        if changed := group_terms.swap(text, kind, to):
            assert {one.group for one in group_terms.mentions(changed, kind)} <= {to}
            assert all(changed[one.start : one.end] == one.text for one in group_terms.mentions(changed, kind))


def test_an_unknown_kind_or_group_is_named() -> None:
    with pytest.raises(ConfigError, match="no kind of group 'shoe'"):
        group_terms.mentions("x", "shoe")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'martian' is no group of nationality"):
        group_terms.swap("x", "nationality", "martian")
