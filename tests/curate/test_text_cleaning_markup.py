"""`markup` takes HTML and Markdown out, never lets a script through, and leaves comparisons and generics alone."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rows import HERE, applied, reason, row, step_of
from sartor.core.errors import ConfigError
from sartor.core.records import Example
from sartor.curate.steps.text_cleaning import Markup


def stripped(text: str, **options: object) -> str:
    """A reply after the step."""
    outcome = applied(step_of(Markup, **options), row("q", text))
    assert isinstance(outcome, Example)
    return outcome.reply


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("<p>Hello <b>world</b> &amp; co</p>", "Hello world & co"),
        ("<ul><li>one</li><li>two</li></ul>", "- one\n- two"),
        ("one<br>two<br/>three", "one\ntwo\nthree"),
        ("<a href='http://x.y'>link</a>", "link"),
        ("<table><tr><td>a</td><td>b</td></tr><tr><td>c</td></tr></table>", "a b \nc"),
        ("A<!-- note --> B", "A B"),
        ('<?xml version="1.0"?><r><v k="1">t</v></r>', "t"),
        ("<![CDATA[raw]]>", "raw"),
        ("Use the &lt;br&gt; tag", "Use the <br> tag"),
        ("5 &gt; 3&nbsp;&#128512;", "5 > 3 😀"),
        ("<p>First<p>Second", "First\nSecond"),
    ],
)
def test_html_becomes_text(markup: str, text: str) -> None:
    assert stripped(markup) == text


@pytest.mark.parametrize(
    "text",
    [
        "a < b and c > d",
        "if a<b && c>d then",
        "List<String> x = new ArrayList<>();",
        "Dear <your name>, hello",
        "I <3 you",
        "1 <2 and 3> 2",
        "How do I centre a <div>?",
        "Use the <br> tag",
        "see <http://example.com/>",
        "mail <a@b.com> now",
        "x <- y",
        "<<<>>>",
        "AT&T, R&D, ?a=1&copy=2",
        "Put the <script> tag into the head.",
        "map<string, vector<int>> m;",
        "<",
        "a <b and c> d",
    ],
)
def test_what_is_no_markup_stays(text: str) -> None:
    assert stripped(text) == text
    assert reason(Markup(html="drop"), row("q", text)) == ""


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "<SCRIPT SRC=x.js>alert(1)",
        "<scr<script></script>ipt>alert(1)</script>",
        "<style>alert(1){}</style>",
        "<scr<b>x</b>ipt>alert(1)</script>",
        "<script\n>alert(1)</script >",
        "<script>`x`alert(1)`</script>",
        "<script>a`b;alert(1)</script>`",
        "&lt;script&gt;alert(1)&lt;/script&gt;",
        "<svg onload=alert(1)>",
        "<iframe src=x>alert(1)</iframe>",
        '<img src=x onerror="alert(1)">',
        "<noscript><p>alert(1)</p></noscript>",
        "<script>alert(1)</script" + " " * 50,
    ],
)
def test_scripts_and_styles_never_survive(text: str) -> None:
    after = stripped(f"Before. {text} After.")
    assert "alert(1)" not in after.replace("<scrxipt>alert(1)", "") and after.startswith("Before.")


def test_code_stays_or_goes_by_option() -> None:
    text = "See <b>this</b>:\n```html\n<div>&amp;</div>\n```\nand `<i>x</i>`."
    assert stripped(text) == "See this:\n```html\n<div>&amp;</div>\n```\nand `<i>x</i>`."
    assert "<div>" not in stripped(text, code="strip")


@pytest.mark.parametrize(
    ("markdown", "text"),
    [
        ("# Title\n\nSome **bold** and _it_ and ~~gone~~.", "Title\n\nSome bold and it and gone."),
        ("[text](http://u) ![alt](i.png)", "text alt"),
        ("- **a**\n- b\n  - c", "- a\n- b\n  - c"),
        ("> quoted\n\n---\n\n1. x\n2. `y`", "quoted\n\n1. x\n2. `y`"),
        ("| a | b |\n|---|---|\n| 1 | 2 |", "a | b\n1 | 2"),
        ("2*3*4 and snake_case_name", "2*3*4 and snake_case_name"),
        ("- only\n- a list", "- only\n- a list"),
        ("**x**\n\n```py\na*b*c\n```", "x\n\n```py\na*b*c\n```"),
    ],
)
def test_markdown_becomes_text(markdown: str, text: str) -> None:
    assert stripped(markdown, markdown="strip") == text
    assert stripped(markdown) == markdown


def test_dropping_names_what_was_found() -> None:
    drop = applied(Markup(html="drop"), row("q", "<p>x</p>"))
    assert (drop.reason, "<p>" in drop.detail) == ("markup", True)  # type: ignore[union-attr]
    drop = applied(Markup(html="keep", markdown="drop"), row("q", "# T\n\n**b**"))
    assert drop.detail == "Markdown: bold, headings"  # type: ignore[union-attr]


def test_markup_only_reply_is_dropped_and_idle_step_refused() -> None:
    """The reason of the drop is nothing_left; a step that would change nothing raises ConfigError."""
    assert reason(Markup(), row("q", "<br><br>")) == "nothing_left"
    with pytest.raises(ConfigError, match="does nothing"):
        Markup(html="keep")


@pytest.mark.parametrize(
    "hostile",
    ["<", "<a ", "<a '\"", "<!--", "<script ", "<script>", '<a href="x', "`", "``` ", "&amp", "<b>", "</b><b>"],
)
def test_hostile_text_takes_no_time(hostile: str) -> None:
    started = time.process_time()
    Markup().open(HERE)(row("q", "x" + hostile * 20_000))
    assert time.process_time() - started < 5


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text("<>/ab&;\"'=! -`pi*#\n", max_size=60))
def test_any_text_comes_through(text: str) -> None:
    for options in ({}, {"code": "strip"}, {"markdown": "strip"}):
        assert applied(step_of(Markup, **options), row("q", f"x {text}")) is not None
