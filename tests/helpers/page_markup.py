"""Texts that would act in a page if they became markup, and a parser that lists the tags of a page."""

from __future__ import annotations

from html.parser import HTMLParser

HOSTILE = [
    "<script>alert(1)</script>",
    "</style></svg><img src=x onerror=alert(1)>",
    "](javascript:alert(1)) [x](javascript:alert(2)) ![y](http://evil.example/y.png) <http://evil.example>",
    "a | b | c \\| d \\\\| <b>e</b> |",
    "````\n# heading\n<script>alert(3)</script>\n```\n~~~\n---\nlicense: cc0-1.0\n---",
    "`` ` `` <i>code</i> ``` `",
    "\x00\x1b[31m\x7f\x85 \u202egnp.exe\u2066 \ufeff\u200b \U000e0041",
    "word" * 25_000,
    "x" * 90 + " www.evil.example http://evil.example evil@evil.example @mention #12 :smile:",
    "\u0301" * 3000,
    "<!-- <![CDATA[ &lt;script&gt; &#60;script&#62; \" ' onload=alert(1) x='",
    "$$\\href{javascript:alert(1)}{x}$$ {{ x }} {% x %} <%= x %>",
]


class Tags(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.said: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.said.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.said).split())

    def acting(self, names: set[str]) -> set[str]:
        """Attributes of the page that are called so or run a script."""
        attributes = {name for _, attributes in self.tags for name in attributes}
        return {name for name in attributes if name.startswith("on") or name in names}
